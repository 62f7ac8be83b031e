"""Golden numbers of SRS-ME: null spaces, shifts, losses and gradients, three Adam steps, stop rules, merging."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import golden_files
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from expunge.diffusion.correlation import (
    Correlation,
    Eps,
    GradientSum,
    MomentumStop,
    correlation,
    l1,
    shifted,
    swapped,
    teach,
    unconfined,
)
from expunge.diffusion.merge import merge, merge_published
from expunge.diffusion.nullspace import capacity, null_space, predicted_rank, published_elimination
from expunge.diffusion.selection import cross_attention, key_value, matrices
from expunge.diffusion.shift import Attached, Shift, attach
from expunge.errors import RequestError

cases = partial(golden_files.cases, "srs-me")


class Case:
    """One golden file pair."""

    def __init__(self, path: Path) -> None:
        self.meta = json.loads(path.read_text())
        self.tensors = load_file(path.with_suffix(".safetensors"))
        self.hyper, self.expected = self.meta["hyper"], self.meta["expected"]
        self.published = self.meta["variant"] == "as_published"

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[f"input.{name}"]

    def want(self, name: str) -> Tensor:
        return self.tensors[f"expected.{name}"]

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(f"{prefix}."): t for n, t in self.tensors.items() if n.startswith(f"{prefix}.")}

    def unet(self) -> Any:
        diffusers = pytest.importorskip("diffusers")
        unet = diffusers.UNet2DConditionModel(**self.meta["model"]["config"])
        unet.load_state_dict({n: t.float() for n, t in self.group("init").items()})
        return unet.eval().requires_grad_(False)


def eps_of(unet: nn.Module) -> Eps:
    return lambda x, t, states: unet(x, t, states).sample


def near(got: Tensor, want: Tensor, share: float, what: str = "") -> None:
    """Off by at most a share of the tensor's maximum."""
    off, top = float((got.detach() - want).abs().max()), float(want.abs().max())
    assert off <= share * top, (what, off, top)


def all_near(got: Mapping[str, Tensor], want: Mapping[str, Tensor], share: float) -> None:
    assert want.keys() == got.keys()
    for name, golden in want.items():
        near(got[name], golden, share, name)


# -- null spaces -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("nullspace"))
def test_null_spaces(path: Path) -> None:
    case = Case(path)
    for name, about in case.expected["sets"].items():
        prompts = about["prompts"]
        flat = case[f"{name}.states"]
        states = flat.reshape(len(prompts), -1, flat.shape[1])
        assert len(flat) == about["rows"]

        vectors = published_elimination(states)
        assert len(vectors) == about["n_vectors_as_published"], name
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors), dtype=torch.float64))
        if "residual_as_published" in about:
            assert float((flat.double() @ vectors.T).abs().max()) < 5e-6
            off = torch.linalg.pinv(vectors) @ vectors - case.want(f"{name}.projector_as_published")
            assert float(off.abs().max()) <= 1e-9, name
            recorded = case.want(f"{name}.basis_as_published")
            again = torch.linalg.pinv(recorded) @ recorded
            assert float((again - case.want(f"{name}.projector_as_published")).abs().max()) <= 1e-9

        room = capacity(states)
        assert (room.rank, room.left) == (about["rank_float64_svd"], about["n_k_as_intended"]), name
        ids = [case.hyper["token_ids"].get(p) for p in prompts]
        if all(ids):
            assert room.rank == min(room.dim, predicted_rank(torch.tensor(ids)))
        if not room.left:
            with pytest.raises(RequestError, match="fit"):
                null_space(states, prompts=prompts)
            continue
        basis = null_space(states)
        assert basis.residual <= max(1e-12, 1.5 * about["residual_as_intended"])
        dependent = name in ("float_dependent", "scaled_copy")
        off = basis.projector - case.want(f"{name}.projector_as_intended")
        assert float(off.abs().max()) <= (1e-5 if dependent else 1e-9), name
        if room.left == len(vectors):
            mine = torch.linalg.pinv(vectors) @ vectors
            assert float((mine - basis.projector).abs().max()) <= 5e-5
        if len(states) > 1:
            fewer = null_space(states[:1]).projector
            assert float((fewer - case.want(f"{name}.projector_as_intended")).abs().max()) > 1e-3


# -- shifts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("shift"))
def test_shifts(path: Path) -> None:
    case = Case(path)
    base, concept = case.group("init"), case.hyper["active_concept"]
    shift = Shift(
        case[f"S.{concept}"], matrices({n: nn.Parameter(t) for n, t in base.items()}), beta=case.hyper["beta"]
    )
    fill(shift, case.group(f"input.omega.{concept}"))
    deltas = {n: shift.delta(n).detach() for n in base}
    all_near(deltas, case.group("expected.delta"), 2e-6)
    all_near({n: t.float() for n, t in shift.deltas().items()}, case.group("expected.delta"), 2e-6)
    all_near({n: c.dense() for n, c in shift.changes().items()}, case.group("expected.delta"), 2e-6)
    all_near(merge(base, {concept: deltas}, [concept]), case.group("expected.merged"), 2e-6)
    assert float(shift.l1().detach()) == pytest.approx(case.expected["loss_reg"], rel=1e-6)
    other = next(c for c in case.hyper["folder_order"] if c != concept)
    fill(shift, case.group(f"input.omega.{other}"))
    with pytest.raises(AssertionError):
        all_near({n: shift.delta(n).detach() for n in base}, case.group("expected.delta"), 2e-6)


def fill(shift: Shift, omega: Mapping[str, Tensor]) -> None:
    assert omega.keys() == shift.omega.keys()
    for name, value in omega.items():
        shift.omega[name].data.copy_(value)


def on_unet(case: Case, unet: nn.Module) -> Shift:
    assert list(key_value(unet)) == case.hyper["target_names"]
    shift = Shift.on(unet, case["S"], beta=case.hyper["beta"])
    assert len(case["S"]) == case.hyper["n_k"]
    return shift


# -- loss and gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graded_null", [False, True])
@pytest.mark.parametrize("path", cases("loss-and-gradient"))
def test_loss_and_gradient(path: Path, graded_null: bool) -> None:
    case = Case(path)
    unet = case.unet()
    eps, t = eps_of(unet), torch.tensor([case.expected["timestep"]])
    x, c, null = case["x_t"], case["emb_concept"], case["emb_null"]
    shift = on_unet(case, unet)
    for point, omega in (("zero", None), ("random", case.group("input.omega"))):
        if omega is not None:
            fill(shift, omega)
        with attach(unet, {"c": shift}) as attached:
            if graded_null:
                teacher = teach(eps, attached.off(), x, t, c, null)
                found = correlation(eps(x, t, c), eps(x, t, null), teacher)
            else:
                found = shifted(eps, attached.off(), x, t, c, null)
            check_point(case, point, shift, found)
            with torch.no_grad(), attached.off():
                teacher = teach(eps, nullcontext(), x, t, c, null)
            near(teacher.representation, case.want("r_original"), 1e-5)


def check_point(case: Case, point: str, shift: Shift, found: Correlation) -> None:
    golden = case.expected[point]
    regular = shift.l1()
    loss = found.losses.mean() + case.hyper["lam"] * regular
    assert float(found.losses.mean().detach()) == pytest.approx(golden["L_cor"], rel=1e-5)
    assert float(regular.detach()) == pytest.approx(golden["loss_reg"], rel=1e-5)
    assert float(loss.detach()) == pytest.approx(golden["loss"], rel=1e-5)
    near(found.representation, case.want(f"{point}.r_unlearned"), 1e-5, point)
    if point == "zero":
        assert float(found.ratio) == pytest.approx(1, rel=1e-5)
    names = list(shift.omega)
    gradients = torch.autograd.grad(loss, [shift.omega[n] for n in names])
    all_near(dict(zip(names, gradients, strict=True)), case.group(f"expected.{point}.grad"), 5e-5)


@pytest.mark.parametrize("path", cases("loss-and-gradient"))
def test_beside_the_layer_is_adding_to_the_weight(path: Path) -> None:
    case = Case(path)
    unet = case.unet()
    eps, t = eps_of(unet), torch.tensor([case.expected["timestep"]])
    shift = on_unet(case, unet)
    fill(shift, case.group("input.omega"))
    weights = {n: p + shift.delta(n) for n, p in key_value(unet).items()}
    slow = functional_call(unet, weights, (case["x_t"], t, case["emb_concept"])).sample
    with attach(unet, {"c": shift}):
        fast = eps(case["x_t"], t, case["emb_concept"])
    plain = eps(case["x_t"], t, case["emb_concept"])
    names = list(shift.omega)
    seen = [torch.autograd.grad(e.square().mean(), [shift.omega[n] for n in names]) for e in (slow, fast)]
    near(fast, slow.detach(), 1e-5)
    for mine, want in zip(seen[1], seen[0], strict=True):
        near(mine, want, 5e-5)
    with pytest.raises(AssertionError):
        near(plain, slow.detach(), 1e-3)


# -- three steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("adam3"))
def test_three_steps_of_the_separable_method(path: Path) -> None:
    case = Case(path)
    unet = case.unet()
    shift = on_unet(case, unet)
    with attach(unet, {"c": shift}) as attached:
        run_shift(case, unet, shift, attached)


def run_shift(case: Case, unet: nn.Module, shift: Shift, attached: Attached) -> None:
    hyper, expected = case.hyper, case.expected
    optimizer = torch.optim.Adam(
        shift.omega.values(), lr=hyper["lr"], betas=tuple(hyper["betas"]), eps=hyper["eps"], foreach=False
    )
    sums = GradientSum()
    c, null = case["emb_concept"], case["emb_null"]
    losses, regulars = [], []
    for step in range(hyper["steps"]):
        optimizer.zero_grad()
        x, t = case["x_t"][step : step + 1], case["timesteps"][step : step + 1]
        found = shifted(eps_of(unet), attached.off(), x, t, c, null)
        regular = shift.l1()
        (found.losses.mean() + hyper["lam"] * regular).backward()
        losses.append(float(found.losses.mean().detach()))
        regulars.append(float(regular.detach()))
        if case.published:
            sums.add(shift.omega)
        gradients = {n: p.grad for n, p in shift.omega.items() if p.grad is not None}
        all_near(gradients, case.group(f"expected.step{step + 1}.grad"), 2e-4)
        optimizer.step()
        all_near({n: p.detach() for n, p in shift.omega.items()}, case.group(f"expected.step{step + 1}.omega"), 2e-3)
    assert losses == pytest.approx(expected["L_cor_before_step"], rel=1e-4)
    assert regulars == pytest.approx(expected["loss_reg_before_step"], rel=1e-4)
    statistics = MomentumStop(0.0, published=case.published).statistics(losses)
    assert statistics == pytest.approx(expected["ema_0.9"], rel=1e-4)


@pytest.mark.parametrize("path", cases("adam3"))
def test_the_variants_part_after_the_first_step(path: Path) -> None:
    case = Case(path)
    unet = case.unet()
    case.published = not case.published
    shift = on_unet(case, unet)
    with attach(unet, {"c": shift}) as attached, pytest.raises(AssertionError, match=r"attn2"):
        run_shift(case, unet, shift, attached)


@pytest.mark.parametrize("path", cases("cie3"))
def test_three_steps_of_the_irreversible_variant(path: Path) -> None:
    case = Case(path)
    hyper, unet = case.hyper, case.unet()
    parameters = cross_attention(unet)
    assert list(parameters) == hyper["trained_names"]
    base = {n: p.detach().clone() for n, p in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters.values(), lr=hyper["lr"], betas=tuple(hyper["betas"]), eps=hyper["eps"])
    sums, losses, regulars = GradientSum(), [], []
    for step in range(hyper["steps"]):
        optimizer.zero_grad()
        x, t = case["x_t"][step : step + 1], case["timesteps"][step : step + 1]
        original = swapped(parameters, base)
        found = unconfined(eps_of(unet), original, x, t, case["emb_concept"], case["emb_null"])
        regular = l1(p - base[n] for n, p in parameters.items())
        (found.losses.mean() + hyper["reg_beta"] * regular).backward()
        losses.append(float(found.losses.mean().detach()))
        regulars.append(float(regular.detach()))
        if case.published:
            sums.add(parameters)
        golden = case.group(f"expected.step{step + 1}.grad")
        if golden:
            all_near({n: p.grad for n, p in parameters.items() if p.grad is not None}, golden, 2e-4)
        optimizer.step()
    assert losses == pytest.approx(case.expected["L_cor_before_step"], rel=2e-4)
    assert regulars == pytest.approx(case.expected["reg_before_step"], rel=2e-4)
    golden = case.group(f"expected.step{hyper['steps']}.param")
    change = {n: t - base[n] for n, t in golden.items()}
    all_near({n: p.detach() - base[n] for n, p in parameters.items()}, change, 5e-3)


# -- stop rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("ema-stop"))
def test_stop_rule(path: Path) -> None:
    case = Case(path)
    for name, run in case.expected["runs"].items():
        losses = case[f"{name}.losses"]
        rule = MomentumStop(run["threshold"], case.hyper["alpha"], run["iter_break"], published=True)
        assert rule.first_tested == case.hyper["first_tested_index"]
        assert (rule.index(losses), rule.updates(losses)) == (run["stop_index"], run["updates_done"]), name
        golden = case.want(f"{name}.ema")
        got = torch.tensor(rule.statistics(losses)[: len(golden)], dtype=torch.float64)
        assert float((got - golden).abs().max()) <= 1e-9, name
        corrected = MomentumStop(run["threshold"], case.hyper["alpha"])
        seen = losses[: len(golden)]
        assert rule.crossing(seen) == corrected.index(seen) == run["first_crossing_ignoring_warmup"], name


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("merge-recover"))
def test_merge_and_recover(path: Path) -> None:
    case = Case(path)
    unet = case.unet()
    targets = case.hyper["target_names"]
    assert list(key_value(unet)) == targets
    base = {n: unet.get_parameter(n).detach().clone() for n in targets}
    concepts = sorted(case.hyper["protected"])
    shifts = {int(c): case.group(f"input.delta.{c}") for c in concepts}
    embeddings = case.group("input.emb")
    t, x = torch.tensor([case.expected["timestep"]]), case["x_t"]
    seen: dict[str, dict[str, Tensor]] = {}
    for subset in case.hyper["subsets"]:
        active = [int(c) for c in subset]
        merged = merge(base, shifts, active[::-1])
        golden = case.group(f"expected.as_intended.{subset}") if subset else case.group("expected.as_intended.none")
        assert golden.keys() == merged.keys() if golden else not subset
        for name, want in golden.items():
            assert torch.equal(merged[name], want), (subset, name)
        if not subset:
            assert all(torch.equal(merged[n], base[n]) for n in targets)
        with torch.no_grad(), swapped(key_value(unet), merged):
            seen[subset] = {p: unet(x, t, e).sample for p, e in embeddings.items()}
        for prompt, got in seen[subset].items():
            near(got, case.want(f"eps.{subset or 'none'}.{prompt}"), 2e-5, f"{subset} {prompt}")
        protects = [set(case.hyper["protected"][c]) for c in subset]
        for prompt in embeddings:
            if protects and all(("" if prompt == "null" else prompt) in p for p in protects):
                assert float((seen[subset][prompt] - seen[""][prompt]).abs().max()) <= 2e-5
        for c in subset:
            assert float((seen[subset][f"c{c}"] - seen[c][f"c{c}"]).abs().max()) <= 2e-5
    assert all(float((seen[c]["c3"] - seen[""]["c3"]).abs().max()) > 0.1 for c in concepts)
    kept = shifts[0][targets[0]]
    for prompt, embedding in embeddings.items():
        golden = case.want(f"K_change.{prompt}")
        assert float((embedding[0] @ kept.T - golden).abs().max()) <= 2e-5


@pytest.mark.parametrize("path", cases("merge-recover"))
def test_published_merging_leaks_the_first_model(path: Path) -> None:
    case = Case(path)
    extra, targets = case.hyper["extra_difference"], case.hyper["target_names"]
    base = {n: p.detach().clone() for n, p in cross_attention(case.unet()).items()}
    models = {}
    for c in sorted(case.hyper["protected"]):
        deltas = case.group(f"input.delta.{c}")
        models[int(c)] = {n: w + deltas[n] if n in deltas else w.clone() for n, w in base.items()}
    models[extra["model"]][extra["tensor"]] += extra["value"]
    compared = 0
    for subset in case.hyper["subsets"]:
        golden = case.group(f"expected.as_published.{subset}")
        got = merge_published(base, models, [int(c) for c in subset])
        for name, want in golden.items():
            assert float((got[name] - want).abs().max()) <= 1e-6, (subset, name)
            compared += 1
        leaked = not torch.equal(got[extra["tensor"]], base[extra["tensor"]])
        assert leaked == (extra["model"] == min(models) and str(extra["model"]) in subset)
    assert compared > len(targets)
