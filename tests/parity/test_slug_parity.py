"""Golden numbers of SLUG: gradients, scores, fronts, layer choice, one-layer updates and search traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from slug_files import Case, cases
from torch import Tensor

from expunge.models.towers import Towers
from expunge.restore import evaluating
from expunge.slug.gradients import Gradients, assert_ascent, forget_gradient, retain_gradient
from expunge.slug.losses import contrastive_losses, forget_losses
from expunge.slug.pareto import front, nondominated
from expunge.slug.pick import deepest, deepest_published, expand
from expunge.slug.published import published_gradients
from expunge.slug.scores import candidates, score_layers, step_size
from expunge.slug.search import Criterion, Probe, search


def agree(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """The files' rule: 1e-4 of the tensor's maximum; tensors of rounding noise 1e-6 of the largest entry of all."""
    assert want
    largest = max(float(t.abs().max()) for t in want.values())
    for name, golden in want.items():
        off, top = float((got[name] - golden).abs().max()), float(golden.abs().max())
        assert off <= (1e-4 * top if top >= 1e-5 * largest else 1e-6 * largest), (name, off, top)


def gradients(case: Case) -> Gradients:
    """The stored tensors, as the variant says."""
    if case.variant != "as_intended":
        variant = "openclip" if case.open_clip else case.variant
        prompt = None if case.open_clip else case.tokens("forget", name_only=True)[:1]
        return published_gradients(
            case.towers(), case.loader("forget"), case.loader("retain"), variant=variant, prompt=prompt
        )
    towers = case.towers()
    names = [n for n, _ in towers.model.named_parameters()]
    forget, about = forget_gradient(
        towers, case.loader("forget", name_only=not case.open_clip), names=names, weighting="batches"
    )
    size = case.hyper["batch_size"]
    retain, facts = retain_gradient(towers, case.loader("retain"), names=names, batch_size=size, weighting="batches")
    return Gradients(forget, retain, {"forget": about, "retain": facts})


@pytest.mark.parametrize("path", cases("hf-gradients", "openclip-gradients"))
def test_gradients_scores_and_fronts(path: Path) -> None:
    case = Case(path)
    found = gradients(case)
    stored = "forget_grad_stored" if case.open_clip else "forget_grad"
    if case.group(stored):  # some files refer to another one's forget gradients
        agree(found.forget, case.group(stored))
    agree(found.retain, case.group("retain_grad"))
    losses(case, found)

    towers = case.towers()
    scores = {s.name: s for s in score_layers(towers, found.forget, found.retain, published=True)}
    names = case.expected["parameter_names"]
    assert set(scores) == set(names)
    compared = 0
    want = {n: case.want(n) for n in ("importance", "abs_cosine")}
    largest = float(want["importance"].nan_to_num(0).max())
    for i, name in enumerate(names):
        score = scores[name]
        golden = float(want["importance"][i])
        if math.isnan(golden):
            assert score.forget_norm == 0
            continue
        assert abs(score.importance - golden) <= 5e-5 * largest, name
        if not math.isnan(float(want["abs_cosine"][i])) and not name.endswith("bias"):
            assert abs(score.alignment - float(want["abs_cosine"][i])) <= 5e-5, name
            if "expected.signed_cosine" in case.tensors:
                assert abs(score.cosine - float(case.want("signed_cosine")[i])) <= 5e-5, name
            compared += 1
    assert compared > 20

    kept, _ = candidates(towers, list(scores.values()), norms="include" if case.open_clip else "exclude")
    assert {t: [s.name for s in front(kept, t)] for t in ("vision", "language")} == case.expected["fronts"]
    corrected = case.expected.get("fronts_visual_projection_in_vision")
    if corrected:
        kept, _ = candidates(towers, score_layers(towers, found.forget, found.retain))
        assert {t: [s.name for s in front(kept, t)] for t in ("vision", "language")} == corrected


def losses(case: Case, found: Gradients) -> None:
    golden = case.expected["batch_losses"]
    rows = {side: found.facts[side] for side in ("forget", "retain")}
    for side, symbol in (("forget", "L_f"), ("retain", "L_r")):
        want = golden[f"{side}_{symbol}"] if case.open_clip else [b[symbol] for b in golden[f"{side}_batches"]]
        about = rows[side]
        got = about["batch_losses"] if "batch_losses" in about else [b[symbol] for b in about["batches"]]
        assert got == pytest.approx(want, abs=1e-5)
    if "batches" in rows["retain"] and not case.open_clip:
        for half in ("image_to_text_ce", "text_to_image_ce"):
            got = [b[half] for b in rows["retain"]["batches"]]
            assert got == pytest.approx([b[half] for b in golden["retain_batches"]], abs=1e-5)


@pytest.mark.parametrize("path", cases("openclip-gradients"))
def test_sample_means_and_squares(path: Path) -> None:
    case = Case(path)
    means, squares = case.group("forget_grad_sample_mean"), case.group("forget_sq")
    got, _ = forget_gradient(case.towers(), case.loader("forget"), names=list(means))
    agree(got, means)
    batches, _ = forget_gradient(case.towers(), case.loader("forget"), names=list(means), weighting="batches")
    with pytest.raises(AssertionError):
        agree(batches, means)
    found = published_gradients(
        case.towers(), case.loader("forget"), case.loader("retain"), variant="openclip", squared=True
    )
    agree(found.forget, squares)
    agree(found.retain, case.group("retain_sq"))


@pytest.mark.parametrize("path", cases("hf-gradients-as_published.", "hf-gradients-as_published_2025"))
def test_variants_differ(path: Path) -> None:
    """The comparison notices the faults: no published variant has the tensors of another one."""
    case = Case(path)
    want = case.group("retain_grad")
    case.variant = {"as_published": "as_published_2025", "as_published_2025": "as_intended"}[case.variant]
    with pytest.raises(AssertionError):
        agree(gradients(case).retain, want)


@pytest.mark.parametrize("path", cases("one-layer-update"))
def test_one_layer_updates(path: Path) -> None:
    case = Case(path)
    alphas, sign = case.hyper["alphas"], case.hyper["sign"]
    forget = case.loader("forget", name_only=not case.open_clip)
    retain = case.loader("retain")

    def measured(towers: Towers) -> tuple[float, float]:
        with evaluating(towers.model):
            pairs = [(towers.image(b.pixels), towers.text(b.tokens)) for b in forget()]
            l_f = torch.cat([forget_losses(v, t) for v, t in pairs]).mean()
            kept = [(towers.image(b.pixels), towers.text(b.tokens)) for b in retain()]
            l_r = torch.stack([contrastive_losses(v, t, towers.scale()).mean() for v, t in kept]).mean()
        return float(l_f), float(l_r)

    towers = case.towers()
    weights = dict(towers.model.named_parameters())
    base = {n: p.detach().clone() for n, p in weights.items()}
    start = measured(towers)
    assert start == pytest.approx((case.expected["L_f0"], case.expected["L_r0"]), abs=2e-5)
    for key, group in case.expected["groups"].items():
        names = group["tensors"]
        grads = {n: case.input(f"{key}.grad.{n}") for n in names}
        for i, alpha in enumerate(alphas):
            with torch.no_grad():
                for n, original in base.items():
                    weights[n].copy_(original)
            step = sign * step_size(weights[names[0]], grads[names[0]], alpha)
            assert step == pytest.approx(float(case.want(f"{key}.lambda")[i]), rel=1e-6)
            assert abs(step) / alpha == pytest.approx(group["unit_ratio"], rel=1e-6)
            delta = {n: step * g for n, g in grads.items()}
            if i == 0 and (sign > 0 or case.open_clip):
                assert assert_ascent(towers, forget, delta) > 0
            with torch.no_grad():
                for n in names:
                    weights[n] += delta[n]
            l_f, l_r = measured(towers)
            assert l_f == pytest.approx(float(case.want(f"{key}.L_f")[i]), abs=2e-5)
            assert l_r == pytest.approx(float(case.want(f"{key}.L_r")[i]), abs=2e-5)
            for n in names if i in (3, 6) else ():
                golden = case.want(f"{key}.step{i}.{n}")
                assert float((weights[n].detach() - golden).abs().max()) <= 1e-6 * float(golden.abs().max())


@pytest.mark.parametrize("path", cases("pareto-points"))
def test_pareto_points(path: Path) -> None:
    case = Case(path)
    for name, tensor in case.tensors.items():
        if name.startswith("input."):
            want = case.want(name.removeprefix("input.")).tolist()
            assert nondominated([(x, y) for x, y in tensor.tolist()]) == want, name


@pytest.mark.parametrize("path", cases("layer-pick"))
def test_layer_pick(path: Path) -> None:
    for name, want in Case(path).expected["fronts"].items():
        listed = want["front_in_descending_abs_cos_order"]
        got = deepest_published(listed)
        assert got == want["picked_as_published"], name
        assert deepest(listed) == want["picked_as_intended"], name
        block = got.split("layers.")[1].split(".")[0]
        stem = f"text_model.encoder.layers.{block}."
        attention = [f"{stem}self_attn.{part}_proj.weight" for part in ("q", "k", "v", "out")]
        known = [*attention, f"{stem}mlp.fc1.weight", f"{stem}mlp.fc2.weight"]
        assert expand(got, known) == want["edited_tensors_as_published"], name
        assert expand(got, known, "tensor") == [got]


def constant(breaks: Tensor, values: Tensor) -> Callable[[float], float]:
    """A piecewise constant function of the relative step."""
    return lambda alpha: float(values[int((breaks <= alpha).sum())])


def same(got: float | None, want: float | None) -> bool:
    return got is want or (got is not None and want is not None and math.isclose(got, want, rel_tol=1e-12))


@pytest.mark.parametrize("path", cases("search-trace-as_", "search-trace-log_bisection"))
def test_search_traces(path: Path) -> None:
    case = Case(path)
    hyper = case.hyper
    unit, sign = hyper["unit_ratio"], -1 if case.variant == "as_published" else 1
    for name, want in case.expected["functions"].items():
        level = constant(case.input(f"{name}.breaks"), case.input(f"{name}.values"))
        settings: dict = {"alpha0": hyper["alpha0"]}
        if case.variant == "log_bisection":
            settings |= {"bounds": tuple(hyper["bounds"]), "width": hyper["stop_hi_over_lo"], "budget": hyper["budget"]}
        else:
            settings |= {"method": "bisection", "budget": hyper["evaluations"]}
        found = search(lambda alpha, level=level: Probe(alpha, level(alpha)), **settings)
        assert [sign * unit * p.alpha for p in found.probes] == pytest.approx(
            case.want(f"{name}.lambda").tolist(), rel=1e-12
        )
        assert [p.alpha for p in found.probes] == pytest.approx(case.want(f"{name}.alpha").tolist(), rel=1e-12)
        assert [p.forget for p in found.probes] == case.want(f"{name}.accuracy").tolist()
        assert len(found.probes) == want.get("n_evaluations", hyper.get("evaluations"))
        if "answer" in want:
            answer = want["answer"]
            assert (found.feasible, found.monotone) == (answer["feasible"], answer["monotone"])
            assert same(found.alpha, answer["alpha"])
        if "bounds_before_each_probe" in want:
            golden = [tuple(float(b) for b in pair) for pair in want["bounds_before_each_probe"]]
            signed = [(sign * unit * lo, math.inf if math.isinf(hi) else sign * unit * hi) for lo, hi in found.brackets]
            assert [x for pair in signed for x in pair] == pytest.approx(
                [x for pair in golden for x in pair], rel=1e-12
            )
            assert found.probes[-1].ok == want["last_probe_succeeds"]
            smallest = min((p.alpha for p in found.probes if p.ok), default=None)
            assert same(smallest, want["smallest_success_in_log"])


@pytest.mark.parametrize("path", cases("search-trace-uncanvas"))
def test_uncanvas_traces(path: Path) -> None:
    case = Case(path)
    unit = case.hyper["unit_ratio"]
    for name, want in case.expected["functions"].items():
        ua, ira = (constant(case.input(f"{name}.{k}.breaks"), case.input(f"{name}.{k}.values")) for k in ("ua", "ira"))
        found = search(
            lambda alpha, ua=ua, ira=ira: Probe(alpha, ua(alpha), ira(alpha)),
            method="uncanvas",
            criterion=Criterion(original=want["ira_original"]),
            alpha0=case.hyper["alpha0"],
            budget=case.hyper["max_evaluations"],
        )
        assert [-unit * p.alpha for p in found.probes] == pytest.approx(case.want(f"{name}.lambda").tolist(), rel=1e-12)
        assert [p.forget for p in found.probes] == case.want(f"{name}.ua").tolist()
        assert [p.utility for p in found.probes] == case.want(f"{name}.ira").tolist()
        assert len(found.probes) == want["n_evaluations"]
        assert -unit * found.written == pytest.approx(want["step_written_as_published"], rel=1e-12)
        last = want["step_actually_evaluated_last"]
        assert -unit * found.probes[-1].alpha == pytest.approx(last, rel=1e-12)
        assert found.alpha in (None, found.probes[-1].alpha)
