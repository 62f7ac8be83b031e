"""BARRIER: loss values and gradients against golden files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from barrier_files import Case, Graph, cases
from test_barrier_stats import settings as collect_settings
from torch import Tensor

from expunge.protections.interval.collect import collect
from expunge.protections.interval.loss import IntervalPenalty, PenaltySettings, ProtectedLayer, build
from expunge.protections.interval.noising import antithetic_timesteps, noised
from expunge.protections.interval.published import PublishedLayer, build_published, collect_published, from_published
from expunge.protections.interval.regions import Bounds
from expunge.protections.interval.statistics import Collected, Statistics

SPECIAL = ("flag_combinations", "sign_flips", "setup_twice", "low_precision", "regions", "closed_form")


def ordinary(variant: str) -> list:
    params = [p for p in cases("loss_*", variant) if not any(s in p.id for s in SPECIAL)]
    return params


def penalty_settings(hyper: dict, **changes: object) -> PenaltySettings:
    base = {
        "lambda_interval": hyper["lambda_interval"],
        "normalize": hyper["normalize_protection"],
        "region": "two_corner",
        "interval": 0.0 if hyper["skip_interval"] and not hyper["skip_svd"] else 1.0,
    }
    return PenaltySettings(**{**base, **changes})


def stored(case: Case, prefix: str, layer: str) -> Statistics:
    t = {k: case.tensors[f"{prefix}{layer}.{k}"] for k in ("mu", "U_forget", "U_residual", "S_residual")}
    bounds = Bounds(*(case.tensors[f"{prefix}{layer}.{k}"] for k in ("z_min", "z_max", "inf_low", "inf_high")))
    return from_published(t["mu"], t["U_forget"], t["U_residual"], t["S_residual"], bounds)


def move(case: Case, model: Graph, prefix: str) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if prefix + name in case.tensors:
                parameter.copy_(case.tensors[prefix + name])
            parameter.grad = None


def gradients(model: Graph, value: Tensor) -> dict[str, Tensor]:
    value.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def check_gradients(case: Case, prefix: str, grads: dict[str, Tensor]) -> None:
    for name, grad in grads.items():
        if case.has(prefix + name):
            case.expect(prefix + name, grad)


def term_values(penalty: IntervalPenalty, layers: dict, case: Case, stats: Collected, base: PenaltySettings) -> Tensor:
    """``[layer, 3]`` from penalties with one part switched on, or directly for the published images."""
    rows = []
    for name, layer in penalty.layers.items():
        if isinstance(layer, PublishedLayer):
            rows.append(layer.terms().detach())
            continue
        snapshot = {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
        values = []
        for part in ("mean", "residual", "interval"):
            only = {p: (getattr(base, p) if p == part else 0.0) for p in ("mean", "residual", "interval")}
            one = PenaltySettings(lambda_interval=1.0, normalize=False, region=base.region, **only)
            values.append(build({name: layers[name]}, stats, one, conv="channels", snapshot=snapshot)().detach())
        rows.append(torch.stack(values))
    return torch.stack(rows)


@pytest.mark.parametrize("force", [False, True], ids=["closed", "images"])
@pytest.mark.parametrize("path", ordinary("as_published"))
def test_published(path: Path, force: bool) -> None:
    case = Case(path)
    model = case.model()
    if "expected_error" in case.meta:
        layers = {n: m for n, m in model.named_modules() if any(t == n for t in case.hyper["targets"])}
        stats = collect_published(
            model.float(), layers, lambda b: model(*b), lambda: case.batches("forget", torch.float32),
            collect_settings(case.hyper),
        )  # fmt: skip
        with pytest.raises(RuntimeError, match=case.meta["expected_error"]["message"][:13]):
            build_published(layers, stats, penalty_settings(case.hyper), skip_svd=case.hyper["skip_svd"])()
        return
    layers = {n: model.get_submodule(n) for n in case.replay["layer_order"]}
    stats = {n: (stored(case, "stats.", n),) for n in layers}
    base = penalty_settings(case.hyper)
    penalty = build_published(layers, stats, base, skip_svd=case.hyper["skip_svd"], force=force)
    for drift in case.replay["drifts"]:
        move(case, model, f"param.{drift}.")
        value = penalty()
        case.expect(f"expected.{drift}.total", value)
        case.expect(f"expected.{drift}.terms", term_values(penalty, layers, case, stats, base))
        check_gradients(case, f"expected.{drift}.grad.", gradients(model, value))
        if drift == "zero":
            assert float(value.detach()) == 0.0
    case.finish()


PARTS = {
    "mean": {"mean": 1.0}, "res_cov": {"residual": 1.0}, "two_corner": {"interval": 1.0, "region": "two_corner"},
    "env_box": {"interval": 1.0}, "floor": {"floor": 1.0}, "retain": {"retain": 1.0},
}  # fmt: skip


def only(part: str) -> PenaltySettings:
    nothing = {"mean": 0.0, "residual": 0.0, "interval": 0.0}
    return PenaltySettings(lambda_interval=1.0, normalize=False, **{**nothing, **PARTS[part]})


@pytest.mark.parametrize("path", ordinary("as_intended"))
def test_intended(path: Path) -> None:
    case = Case(path)
    model = case.model()
    layers = {n: model.get_submodule(n) for n in case.replay["layer_order"]}
    remain = case.batches("remain")
    stats = collect(
        model, layers, lambda b: model(*b), lambda: case.batches("forget"),
        collect_settings(case.hyper, retain_moments=bool(remain)), (lambda: remain) if remain else None,
    )  # fmt: skip
    total = build(layers, stats, penalty_settings(case.hyper, region="env_box"))
    parts = {p: build(layers, stats, only(p)) for p in case.replay["part_order"] if p != "retain" or remain}
    for drift in case.replay["drifts"]:
        table = []
        for part in case.replay["part_order"]:
            move(case, model, f"param.{drift}.")
            if part not in parts:
                table.append(torch.zeros(len(layers), dtype=torch.float64))
                continue
            # the library's retain part is a mean over outputs, the file's a sum
            outputs = [m.weight.shape[0] if part == "retain" else 1 for m in layers.values()]
            values = [v() * o for v, o in zip(parts[part].layers.values(), outputs, strict=True)]
            table.append(torch.stack(values).detach())
            check_gradients(case, f"expected.{drift}.grad.{part}.", gradients(model, torch.stack(values).sum()))
        case.expect(f"expected.{drift}.parts", torch.stack(table, 1))
        move(case, model, f"param.{drift}.")
        value = total()
        case.expect(f"expected.{drift}.total_recommended", value)
        check_gradients(case, f"expected.{drift}.grad.total_recommended.", gradients(model, value))
    case.finish(() if remain else (".grad.retain.",))


@pytest.mark.parametrize("path", cases("loss_flag_combinations"))
def test_flag_combinations(path: Path) -> None:
    case = Case(path)
    model = case.model()
    layers = {n: model.get_submodule(n) for n in case.replay["layer_order"]}
    snapshot = {n: p.detach().clone() for n, p in model.named_parameters()}
    for combination in case.hyper["combinations"]:
        hyper, tag = {**case.hyper["base"], **combination}, combination["name"]
        stats = {n: (stored(case, f"stats.{tag}.", n),) for n in layers}
        base = penalty_settings(hyper)
        move(case, model, "param.d.")
        penalty = build_published(layers, stats, base, skip_svd=hyper["skip_svd"], snapshot=snapshot)
        value = penalty()
        case.expect(f"expected.{tag}.total", value)
        case.expect(f"expected.{tag}.terms", term_values(penalty, layers, case, stats, base))
        check_gradients(case, f"expected.{tag}.grad.", gradients(model, value))
    case.finish()


@pytest.mark.parametrize("path", cases("loss_sign_flips"))
def test_sign_flips(path: Path) -> None:
    case = Case(path)
    model = case.model()
    layers = {n: model.get_submodule(n) for n in case.replay["layer_order"]}
    snapshot = {n: p.detach().clone() for n, p in model.named_parameters()}
    original = {n: stored(case, "stats.", n) for n in layers}
    move(case, model, "param.d.")
    base = penalty_settings(case.hyper)
    totals, terms, env = [], [], []
    patterns = case.tensors[f"sign.{next(iter(layers))}"].shape[0]
    for i in range(patterns):
        stats = {}
        for n in layers:
            given = Bounds(*(case.tensors[f"flipstats.{i}.{n}.{k}"] for k in ("z_min", "z_max", "inf_low", "inf_high")))
            turned = original[n].flipped(case.tensors[f"sign.{n}"][i].float())
            torch.testing.assert_close(tuple(turned.bounds), tuple(given), rtol=1e-5, atol=1e-5)
            stats[n] = (turned.with_bounds(given),)
        penalty = build(layers, stats, base, snapshot=snapshot)
        totals.append(penalty().detach())
        terms.append(term_values(penalty, layers, case, stats, base))
        boxes = build(layers, stats, only("env_box"), snapshot=snapshot)
        env.append(torch.stack([v().detach() for v in boxes.layers.values()]))
    if case.has("expected.totals"):
        case.expect("expected.totals", torch.stack(totals))
        case.expect("expected.terms", torch.stack(terms))
        assert float(torch.stack(totals).std()) > 1e-3 * float(totals[0]), "the two-corner term depends on signs"
    else:
        case.expect("expected.env_box", torch.stack(env))
        torch.testing.assert_close(env[0].expand_as(torch.stack(env)), torch.stack(env), rtol=1e-5, atol=0.0)
    case.finish()


@pytest.mark.parametrize("path", cases("loss_setup_twice"))
def test_setup_twice(path: Path) -> None:
    case = Case(path)
    model = case.model()
    layers = {n: model.get_submodule(n) for n in case.replay["layer_order"]}
    # as published every set-up appends its entries
    times = 2 if case.meta["variant"] == "as_published" else 1
    totals = []
    for normalize in (False, True):
        model = case.model()
        layers = {n: model.get_submodule(n) for n in case.replay["layer_order"]}
        stats = {n: (stored(case, "stats.", n),) for n in layers}
        base = penalty_settings(case.hyper, normalize=normalize)
        one = build_published(layers, stats, base)
        entries = {f"{n}#{i}": value for i in range(times) for n, value in one.layers.items()}
        move(case, model, "param.d.")
        totals.append(IntervalPenalty(entries, base)().detach())
    case.expect("expected.totals", torch.stack(totals))
    case.expect("expected.n_entries", torch.tensor(len(entries)))
    case.finish()


@pytest.mark.parametrize("path", cases("loss_low_precision"))
def test_low_precision(path: Path) -> None:
    case = Case(path)
    for tag, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16}.items():
        model = case.model(dtype, f"init.{tag}.")
        layers = {n: model.get_submodule(n) for n in case.replay["layer_order"]}
        stats = {n: (stored(case, f"stats.{tag}.", n),) for n in layers}
        published = case.meta["variant"] == "as_published"
        base = penalty_settings(case.hyper)
        kind = dtype if published else torch.float64
        penalty = build_published(layers, stats, base, dtype=kind, force=published)
        single = build(layers, stats, base)
        move(case, model, f"param.{tag}.")
        value = penalty()
        if published and tag == "fp16":
            assert not torch.isfinite(value)
            case.checked += 1
            continue
        case.expect(f"expected.{tag}.total", value)
        if not published:
            torch.testing.assert_close(single().double(), case.tensors[f"expected.{tag}.total"], rtol=1e-4, atol=0.0)
    case.finish()


@pytest.mark.parametrize("path", cases("loss_closed_form"))
def test_closed_form(path: Path) -> None:
    case = Case(path)
    model = case.model()
    layers = {n: model.get_submodule(n) for n in case.replay["layer_order"]}
    penalty = build(layers, {n: (stored(case, "stats.", n),) for n in layers}, penalty_settings(case.hyper))
    move(case, model, "param.d.")
    for name, layer in penalty.layers.items():
        assert isinstance(layer, ProtectedLayer)
        quadratic, width = layer.parts()
        case.expect(f"expected.{name}.H", layer.form.H[0])
        case.expect(f"expected.{name}.quadratic", quadratic)
        case.expect(f"expected.{name}.width", width)
        case.expect(f"expected.{name}.curvature", penalty.curvature(name))
        case.expect(f"expected.{name}.curvature_majoriser", penalty.curvature(name, majoriser=True))
    case.expect("expected.total", penalty())
    case.finish()


@pytest.mark.parametrize("path", cases("forward_diffusion"))
def test_forward_diffusion(path: Path) -> None:
    case = Case(path)
    for i in range(case.replay["batches"]):
        x, draws = case.tensors[f"input.{i}.x"], case.tensors[f"replay.{i}.t_draws"]
        t = antithetic_timesteps(draws, x.shape[0], case.hyper["num_timesteps"])
        case.expect(f"expected.{i}.t", t.float())
        case.expect(
            f"expected.{i}.x_t", noised(2 * x - 1, case.tensors[f"replay.{i}.noise"], case.tensors["input.betas"], t)
        )
    case.finish()


def test_a_swapped_box_is_noticed() -> None:
    case = Case(cases("loss_linear", "as_published")[0].values[0])
    model = case.model()
    layers = {n: model.get_submodule(n) for n in case.replay["layer_order"]}
    stats = {n: (stored(case, "stats.", n),) for n in layers}
    wrong = {n: (s[0].with_bounds(s[0].bounds._replace(low=s[0].z_min, z_min=s[0].low)),) for n, s in stats.items()}
    penalty = build(layers, wrong, penalty_settings(case.hyper, mode="centre_only"))
    move(case, model, "param.rand_0.1.")
    with pytest.raises(AssertionError, match="off by"):
        case.expect("expected.rand_0.1.total", penalty())
