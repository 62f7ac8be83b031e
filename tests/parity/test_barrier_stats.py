"""BARRIER: collected statistics against golden files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from barrier_files import Case, cases
from torch import Tensor

from expunge.protections.interval.collect import CollectSettings, collect
from expunge.protections.interval.match import find
from expunge.protections.interval.published import collect_published, gather
from expunge.protections.interval.rows import as_finite
from expunge.protections.interval.statistics import Statistics, box, decompose

BOUNDS = {"z_min": "z_min", "z_max": "z_max", "inf_low": "low", "inf_high": "high"}


def settings(hyper: dict, **changes: object) -> CollectSettings:
    return CollectSettings(
        lower=hyper["lower_percentile"],
        upper=hyper["upper_percentile"],
        reduced_dim=hyper["reduced_dim"],
        margin=hyper["infinity_scale"],
        actual_bounds=hyper["use_actual_bounds"],
        skip_svd=hyper["skip_svd"],
        remove_top=hyper["remove_top_directions"],
        **changes,
    )


def well_determined(case: Case, layer: str) -> Tensor | None:
    name = f"expected.{layer}.row_ok"
    if case.has(name):
        case.checked += 1
        return case.tensors[name].bool()
    return None


@pytest.mark.parametrize("path", cases("stats_*", "as_published"))
def test_published(path: Path) -> None:
    case = Case(path)
    model = case.model(torch.float32)
    found = find(model, case.hyper["targets"], "as_published")
    assert sorted(found.parameter_names()) == case.meta["snapshot_keys"]
    layers = {n: m for n, m in model.named_modules() if n in case.replay["layer_order"]}
    forward = lambda batch: model(*batch)  # noqa: E731
    forget, remain = case.batches("forget", torch.float32), case.batches("remain", torch.float32)
    rows = gather(model, layers, forward, lambda: forget)
    held = gather(model, layers, forward, lambda: remain) if remain else {}
    got = collect_published(
        model, layers, forward, lambda: forget, settings(case.hyper), case.hyper["decomp_method"],
        (lambda: remain) if remain else None,
    )  # fmt: skip
    precise = case.model()
    layers64 = {n: precise.get_submodule(n) for n in layers}
    rows64 = gather(precise, layers64, lambda b: precise(*b), lambda: case.batches("forget"))
    held64 = gather(precise, layers64, lambda b: precise(*b), lambda: case.batches("remain")) if remain else {}
    for layer in layers:
        check_published(case, layer, got[layer][0], rows[layer], held.get(layer))
        check_invariants(case, layer, rows64[layer], held64.get(layer), got[layer][0].basis.shape[0])
    case.finish()


def check_published(case: Case, layer: str, stats: Statistics, rows: Tensor, held: Tensor | None) -> None:
    name = f"expected.{layer}."
    k, d = stats.basis.shape
    ok = well_determined(case, layer)
    ok = torch.ones(d, dtype=torch.bool) if ok is None else ok
    first = case.tensors[name + "U_residual"].shape[0]
    start = min(case.hyper["reduced_dim"], d) if case.hyper["remove_top_directions"] else k
    leading, rest = ok[:k], ok[start : start + first]
    case.expect(name + "rows", rows)
    case.expect(name + "mu", stats.mean)
    signs = (case.tensors[name + "U_forget"] * stats.basis).sum(1).sign()
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    assert stats.residual_basis is not None
    assert stats.residual_scale is not None
    case.expect(name + "U_forget", stats.basis * signs[:, None], leading)
    flips = (case.tensors[name + "U_residual"] * stats.residual_basis).sum(1).sign()
    case.expect(name + "U_residual", stats.residual_basis * flips[:, None], rest)
    case.expect(name + "S_residual", stats.residual_scale, rest)
    aligned = bounds_of(rows, stats.mean, stats.basis * signs[:, None], case.hyper, held)
    direct = stats.flipped(signs)
    for key, field in BOUNDS.items():
        case.expect(name + key, aligned[key], leading)
        if case.hyper["lower_percentile"] + case.hyper["upper_percentile"] == pytest.approx(1.0):
            torch.testing.assert_close(getattr(direct, field)[leading], aligned[key][leading], rtol=1e-4, atol=1e-4)


def bounds_of(rows: Tensor, mean: Tensor, basis: Tensor, hyper: dict, held: Tensor | None) -> dict[str, Tensor]:
    z = (as_finite(rows).to(basis.dtype) - mean) @ basis.T
    z_min, z_max, low, high = box(z, hyper["lower_percentile"], hyper["upper_percentile"], hyper["infinity_scale"])
    if hyper["use_actual_bounds"] and held is not None and z.shape[1]:
        z_r = (as_finite(held).to(basis.dtype) - mean) @ basis.T
        if not hyper["skip_svd"]:
            low, high = z.amin(0), z.amax(0)
        low, high = torch.minimum(low, z_r.amin(0)), torch.maximum(high, z_r.amax(0))
    return {"z_min": z_min, "z_max": z_max, "inf_low": low, "inf_high": high}


def check_invariants(case: Case, layer: str, rows: Tensor, held: Tensor | None, k: int) -> None:
    """The float64 numbers, from our own decomposition of rows collected in float64."""
    name = f"expected.{layer}."
    x = as_finite(rows)
    ok = case.tensors.get(name + "row_ok", torch.ones(x.shape[1])).bool()
    mean = x.mean(0)
    scatter = (x - mean).T @ (x - mean)
    found = decompose(scatter.clone(), max(k, min(case.hyper["reduced_dim"], scatter.shape[0])))
    if case.has(name + "inv.spectrum"):
        case.expect(name + "inv.spectrum", torch.cat([found.sigma[: found.rank], found.sigma[found.rank :] * 0]))
    if case.has(name + "inv.P_forget"):
        case.expect(name + "inv.P_forget", found.basis[:k].T @ found.basis[:k])
    if case.has(name + "inv.residual_scatter"):
        case.expect(name + "inv.residual_scatter", found.residual)
    if not case.has(name + "canon.U_forget"):
        return
    basis = torch.cat([found.basis, found.basis.new_zeros(max(0, k - found.basis.shape[0]), x.shape[1])])[:k]
    case.expect(name + "canon.U_forget", basis, ok[:k])
    for key, value in bounds_of(x, mean, basis, case.hyper, held).items():
        case.expect(name + f"canon.{key}", value, ok[:k])
    turned = bounds_of(x, mean, -basis, case.hyper, held)
    for key in ("z_min", "z_max"):
        case.expect(name + f"canon.{key}_flipped", turned[key], ok[:k])


@pytest.mark.parametrize("path", cases("stats_*", "as_intended"))
@pytest.mark.parametrize("one_by_one", [False, True], ids=["batches", "rows"])
def test_intended(path: Path, one_by_one: bool) -> None:
    case = Case(path)
    model = case.model().train()
    layers = {n: model.get_submodule(n) for n in case.replay["layer_order"]}
    forget, remain = case.batches("forget"), case.batches("remain")
    if one_by_one:
        forget = [tuple(part[i : i + 1] for part in batch) for batch in forget for i in range(len(batch[0]))]
    got = collect(
        model, layers, lambda batch: model(*batch), lambda: forget,
        settings(case.hyper, retain_moments=bool(remain)), (lambda: remain) if remain else None,
    )  # fmt: skip
    assert model.training
    for layer in layers:
        groups = got[layer]
        for g, stats in enumerate(groups):
            prefix = f"expected.{layer}." if len(groups) == 1 else f"expected.{layer}.{g}."
            name = prefix if case.has(prefix + "mu") else f"expected.{layer}.g{g}."
            check_intended(case, name, stats)
    case.finish()


def check_intended(case: Case, name: str, stats: Statistics) -> None:
    k = stats.basis.shape[0]
    ok = case.tensors[name + "row_ok"].bool()[:k]
    case.checked += 1
    for key, value in {"mu": stats.mean, "sigma_forget": stats.sigma[:k], "residual_cov": stats.residual}.items():
        case.expect(name + key, value)
    case.expect(name + "U_forget", stats.basis, ok)
    for key, value in zip(("z_min", "z_max", "env_low", "env_high"), stats.bounds, strict=True):
        case.expect(name + key, value, ok)
    case.expect(name + "forget_cov", stats.covariance)
    sigma = torch.where(torch.arange(len(stats.sigma)) < stats.rank, stats.sigma, torch.zeros_like(stats.sigma))
    case.expect(name + "sigma", sigma)
    for key, number in {"n_rows": stats.n_rows, "rank": stats.rank, "k": k, "r": stats.residual_dim}.items():
        case.expect(name + key, torch.tensor(number))
    if case.has(name + "mu_retain"):
        assert stats.retain_mean is not None
        assert stats.retain_cov is not None
        case.expect(name + "mu_retain", stats.retain_mean)
        case.expect(name + "cov_retain", stats.retain_cov)


def test_a_wrong_level_is_noticed() -> None:
    case = Case(cases("stats_*", "as_intended")[0].values[0])
    model = case.model()
    layers = {n: model.get_submodule(n) for n in case.replay["layer_order"]}
    wrong = dict(case.hyper, lower_percentile=0.06)
    got = collect(
        model, layers, lambda b: model(*b), lambda: case.batches("forget"), settings(wrong),
        (lambda: case.batches("remain")) if case.batches("remain") else None,
    )  # fmt: skip
    layer = next(iter(layers))
    with pytest.raises(AssertionError, match="off by"):
        check_intended(case, f"expected.{layer}.", got[layer][0])
