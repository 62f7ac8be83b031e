"""BARRIER: region families against golden files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from barrier_files import Case, cases
from test_barrier_loss import check_gradients, gradients, move, penalty_settings, stored

from expunge.protections.interval.loss import build
from expunge.protections.interval.regions import Bounds, boxes, row_maximum, uniform_margin


@pytest.mark.parametrize("path", cases("loss_regions", "as_published"))
def test_families(path: Path) -> None:
    case = Case(path)
    model = case.model()
    layers = {n: model.get_submodule(n) for n in case.replay["layer_order"]}
    snapshot = {n: p.detach().clone() for n, p in model.named_parameters()}
    stats = {n: stored(case, "stats.", n) for n in layers}
    uniform = {}
    for n in layers:
        got = uniform_margin(stats[n].bounds)
        case.expect(f"expected.uniform.{n}.inf_low", got.low)
        case.expect(f"expected.uniform.{n}.inf_high", got.high)
        given = (case.tensors[f"expected.uniform.{n}.inf_low"], case.tensors[f"expected.uniform.{n}.inf_high"])
        uniform[n] = stats[n].with_bounds(Bounds(got.z_min, got.z_max, *given))
    sides = {n: (case.tensors[f"side.{n}"],) for n in layers}
    totals = []
    for name in case.replay["configurations"]:
        words = name.split(".")
        changes: dict[str, object] = {}
        chosen = stats
        if words[0] == "uniform_margin":
            chosen = uniform
        if words[0] in ("uniform_margin", "no_mean", "no_res"):
            changes = {"no_mean": {"mean": 0.0}, "no_res": {"residual": 0.0}}.get(words.pop(0), {})
        changes |= {"region": words[0], "mode": words[1], "normalize_region": words[2] == "norm"}
        changes |= {"include_db": words[-1] == "db"}
        penalty = build(
            layers, {n: (s,) for n, s in chosen.items()}, penalty_settings(case.hyper, **changes),
            snapshot=snapshot, sides=sides,
        )  # fmt: skip
        move(case, model, "param.d.")
        value = penalty()
        totals.append(value.detach())
        check_gradients(case, f"expected.{name}.grad.", gradients(model, value))
    case.expect("expected.totals", torch.stack(totals))
    case.finish()


@pytest.mark.parametrize("path", cases("loss_regions", "as_intended"))
def test_maxima(path: Path) -> None:
    case = Case(path)
    for n in case.replay["layer_order"]:
        stats = stored(case, "stats.", n)
        drift = case.tensors[f"param.d.{n}.weight"] - case.tensors[f"init.{n}.weight"].double()
        delta = drift @ stats.basis.double().T
        bounds = Bounds(*(b.double() for b in stats.bounds))
        best = {r: row_maximum(delta, *boxes(r, bounds)) for r in ("env_box", "slabs_2k", "two_corner")}  # type: ignore[arg-type]
        case.expect(f"expected.{n}.max_complement", best["env_box"])
        case.expect(f"expected.{n}.max_envelope", best["env_box"])
        case.expect(f"expected.{n}.max_slabs", best["slabs_2k"])
        case.expect(f"expected.{n}.max_two_corner", best["two_corner"])
        assert (best["two_corner"] <= best["env_box"] + 1e-12).all()
    case.finish()
