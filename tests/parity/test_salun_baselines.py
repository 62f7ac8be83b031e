"""Golden numbers of SalUn's other baselines: boundary shrink and expanding, influence unlearning, Fisher forgetting."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from replay import Case, Layered, ReplayTask, cases, paths, replayed, run_case, runs, save_mask
from torch import Tensor, nn

from expunge.context import Context
from expunge.data.base import Splits
from expunge.method import build_recipe
from expunge.methods import boundary_expand as expanding
from expunge.methods.boundary_shrink import neighbour_inputs, neighbour_labels
from expunge.methods.fisher_forgetting import FisherForgetting
from expunge.methods.influence import Influence, conjugate_gradients, published_recursion
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.spaces.layers import AllWeights
from expunge.tasks.base import Split
from expunge.tasks.classifier import ClassifierTask


def by_name(case: Case, group: str, tensors: dict[str, Tensor]) -> None:
    for name, value in tensors.items():
        case.close(group, value, f"expected.{case.dt}.{group}.{name}")


def opened(case: Case) -> tuple[ClassifierTask, Context]:
    splits, forget = case.data()
    task = ClassifierTask(case.model().eval(), splits)
    return task, Context(task, task.split(ForgetRequest.samples(forget)))


# -- boundary shrink -----------------------------------------------------------------------------------------------


def check_neighbours(case: Case, step: float) -> None:
    task, ctx = opened(case)
    inputs = []
    for entry in case.replay["steps"]:
        batch = task.load("forget", torch.tensor(entry["indices"]), ctx.split)
        inputs.append(neighbour_inputs(task, batch, step, eight_bit=True))
        assert neighbour_labels(task, batch, inputs[-1], exclude_true=False).tolist() == entry["labels"]
        other = neighbour_labels(task, batch, inputs[-1], exclude_true=True)
        assert not bool((other == batch.targets).any())
        kept = torch.tensor(entry["labels"]) != batch.targets
        assert torch.equal(other[kept], torch.tensor(entry["labels"])[kept])
    moved, want = torch.cat(inputs), case.tensors[f"expected.{case.dt}.x_adv"]
    case.checked.add(f"expected.{case.dt}.x_adv")
    assert torch.equal(moved.reshape(want.shape), want)


@pytest.mark.parametrize(("path", "dt"), runs("boundary_shrink"))
def test_boundary_shrink(path: Path, dt: str, tmp_path: Path) -> None:
    case = Case(path, dt)
    recipe = build_recipe(
        {
            "method": "boundary_shrink",
            "profile": "as_published",
            "step": case.hyper["fgsm_bound"],
            "mask_file": save_mask(case, tmp_path),
        }
    )
    run_case(case, recipe)
    check_neighbours(case, case.hyper["fgsm_bound"])
    case.finish()


def test_another_step_is_noticed() -> None:
    path = paths("boundary_shrink")[0]
    with pytest.raises(AssertionError):
        check_neighbours(Case(path), 0.05)


# -- boundary expanding --------------------------------------------------------------------------------------------


class Expanding(Case):
    """The recorded model has C + 1 outputs; ours has C, and the extra row beside them."""

    def __init__(self, path: Path, dt: str = "f64") -> None:
        super().__init__(path, dt)
        self.head = self.meta["model"]["parameter_order"][-1]["name"].rpartition(".")[0]
        self.classes: int = self.hyper["num_classes"]

    def original(self) -> Layered:
        layers = copy.deepcopy(self.meta["model"]["layers"])
        layers[-1]["out_features"] = self.classes
        model = Layered(layers)
        state = {n[5:]: t for n, t in self.tensors.items() if n.startswith("init.")}
        for key in ("weight", "bias"):
            state[f"{self.head}.{key}"] = state[f"{self.head}.{key}"][: self.classes]
            if f"original_last_layer.{key}" in self.tensors:
                assert torch.equal(state[f"{self.head}.{key}"], self.tensors[f"original_last_layer.{key}"])
        model.to(state[f"{self.head}.weight"].dtype).load_state_dict(state)
        return model.to(self.dtype)

    def row(self) -> tuple[Tensor, Tensor]:
        weight, bias = (self.tensors[f"init.{self.head}.{k}"][self.classes :] for k in ("weight", "bias"))
        return weight.to(self.dtype).clone(), bias.to(self.dtype).clone()

    def images(self) -> Splits:
        splits, _ = self.data()
        return replace(splits, train=self.cut(splits.train), test=self.cut(splits.test))

    def cut(self, images: Any) -> Any:
        return type(images)(images.images(torch.arange(len(images))), images.labels, images.classes[: self.classes])

    def widened(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Head and extra row joined, as the published model has them."""
        joined = {n: t for n, t in tensors.items() if "extra_" not in n}
        for key in ("weight", "bias"):
            own, extra = f"{self.head}.{key}", f"{self.head}.extra_{key}"
            joined[own] = torch.cat([tensors[own], tensors[extra]])
        return joined


def run_expanding(case: Expanding, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Layered, dict[str, Tensor]]:
    """Unlearn as recorded; the patched model and the forget logits with C + 1 columns."""
    splits, (_, labels) = case.images(), case.steps()
    forget = case.data()[1]
    model = case.original()
    task = ReplayTask(model, splits, labels)
    recipe = replayed(build_recipe({"method": "boundary_expand", "profile": "as_published"}), case)
    monkeypatch.setattr(expanding, "extra_row", lambda ctx: case.row())
    seen: dict[str, Tensor] = {}
    x = splits.train.images(torch.tensor(forget)).to(case.dtype)

    def on_step(step: int, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        prefix = f"expected.{case.dt}.step{step}."
        state = case.widened(net.state_dict())
        assert {n[len(prefix) :] for n in case.tensors if n.startswith(prefix)} == set(state)
        for name, value in state.items():
            case.close("step", value, prefix + name)
        if step == len(case.replay["steps"]):
            momentum = {n: optimizer.state[p]["momentum_buffer"] for n, p in net.named_parameters()}
            by_name(case, "momentum", case.widened(momentum))
            net.eval()
            ctx = Context(task, task.split(ForgetRequest.samples(forget)))
            with torch.no_grad():
                seen["widened"] = expanding.widened_logits(ctx, task.load("forget", torch.tensor(forget), ctx.split))
            net.train()

    unlearn(task, ForgetRequest.samples(forget), recipe, on_step=on_step, run_dir=folder)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [r["forget"] for r in rows if "forget" in r]
    case.close("ce", torch.tensor(losses, dtype=case.dtype), f"expected.{case.dt}.ce")
    unlearn(task, ForgetRequest.samples(forget), recipe, inplace=True)
    model.eval()
    with torch.no_grad():
        seen["pruned"] = model(x)
    return model, seen


def published_expanding() -> list[Any]:
    return [r for r in runs("boundary_expanding") if Case(r.values[0]).published]


@pytest.mark.parametrize(("path", "dt"), published_expanding())
def test_boundary_expand(path: Path, dt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Expanding(path, dt)
    _, logits = run_expanding(case, tmp_path, monkeypatch)
    case.close("logits_forget", logits["widened"], f"expected.{dt}.logits_forget")
    case.finish()
    assert logits["pruned"].shape[1] == case.classes


@pytest.mark.parametrize("path", [p for p in paths("boundary_expanding") if not Case(p).published])
def test_boundary_expand_pruned_back(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch gives the published run's final state without the extra output."""
    case = Expanding(path)
    trained = Expanding(path.with_name(path.stem.removesuffix("_pruned_back__as_intended") + ".json"))
    model, logits = run_expanding(trained, tmp_path, monkeypatch)
    want = case.original()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, want.state_dict()[name], rtol=1e-9, atol=5e-12)
    case.close("logits_forget", logits["pruned"], "expected.f64.logits_forget")
    case.close("pred", logits["pruned"].argmax(1), "expected.f64.pred_pruned")
    case.close("pred", logits["widened"].argmax(1), "expected.f64.pred_widened")
    case.finish()


def test_another_extra_row_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Expanding(published_expanding()[0].values[0])
    weight, bias = case.row()
    monkeypatch.setattr(Expanding, "row", lambda self: (weight * 1.01, bias))
    with pytest.raises(AssertionError, match="off by"):
        run_expanding(case, tmp_path, monkeypatch)


# -- influence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("influence_recursion"))
def test_influence_recursion(path: Path) -> None:
    case = Case(path)
    g, v, damping = case.tensors["input.gradients"], case.tensors["input.v"], float(case.hyper["A"])
    if case.published:
        k = published_recursion(v, g, damping)
        assert k.tolist() == pytest.approx([0.997003, 2.0], abs=1e-6)
    else:
        k = conjugate_gradients(lambda x: x + g.T @ (g @ x) / damping, v)
    case.close("k", k, "expected.f64.k")
    case.finish()


@pytest.mark.parametrize(("path", "dt"), runs("influence_unlearning"))
def test_influence(path: Path, dt: str, tmp_path: Path) -> None:
    case = Case(path, dt)
    settings = {"alpha": case.hyper["alpha"], "damping": case.hyper["A"], "batch_size": case.hyper["batch_size"]}
    recipe = build_recipe(
        {
            "method": "influence",
            "profile": "as_published" if case.published else "as_intended",
            "mask_file": save_mask(case, tmp_path),
            **settings,
        }
    )
    task, ctx = opened(case)
    assert isinstance(recipe.edit, Influence)
    v, k = recipe.edit.direction(ctx, recipe.space.open(ctx))
    for group, value in (("v", v), ("k", k)):
        case.close(group, torch.cat([t.reshape(-1) for t in value.values()]), f"expected.{dt}.{group}")
    unlearn(task, ForgetRequest.samples(case.data()[1]), recipe, inplace=True)
    state = task.model.state_dict()
    for name in [n for n in case.tensors if n.startswith(f"expected.{dt}.final.")]:
        case.close("final", state[name.removeprefix(f"expected.{dt}.final.")], name)
    case.check_frozen(task.model)
    logits = f"expected.{dt}.logits_forget"
    if logits in case.tensors:
        with torch.no_grad():
            batch = task.load("forget", ctx.split["forget"], ctx.split)
            case.close("logits_forget", task.predict(batch), logits)
    case.finish()


def test_the_published_recursion_is_not_the_inverse() -> None:
    files = {Case(p).meta["variant"]: Case(p) for p in paths("influence_unlearning") if "mlp" in p.stem}
    published, intended = files["as_published"], files["as_intended"]
    with pytest.raises(AssertionError, match="off by"):
        intended.close("k", published.tensors["expected.f64.k"], "expected.f64.k")


# -- Fisher --------------------------------------------------------------------------------------------------------


def fisher_case(path: Path, dt: str) -> tuple[Case, Context, dict[str, Tensor]]:
    case = Case(path, dt)
    splits, forget = case.data()
    retain = torch.arange(len(case.tensors["input.y_retain"]))  # of what to forget, only a whole class counts
    assert forget == [len(retain)]
    task = ClassifierTask(case.model().eval(), splits)
    gone = case.hyper.get("full_class_removed")
    split = Split({"forget": torch.tensor(forget), "retain": retain}, removed=() if gone is None else (gone,))
    ctx = Context(task, split)
    return case, ctx, {n: p.detach() for n, p in AllWeights().open(ctx).parameters.items()}


@pytest.mark.parametrize(("path", "dt"), runs("fisher_diagonal"))
def test_fisher_diagonal(path: Path, dt: str) -> None:
    case, ctx, parameters = fisher_case(path, dt)
    settings = {"alpha": case.hyper["alpha"], "largest": case.hyper["sigma_max"], "head": "as_published"}
    edit = FisherForgetting(variant="diagonal", batch_size=7, **settings)
    fisher = edit.fisher(ctx, parameters)
    by_name(case, "F", fisher)
    mean, variance = edit.noise_scale(ctx, parameters, fisher)
    if dt == "f64":
        by_name(case, "theta_unit_noise", {n: mean[n] + variance[n].sqrt() for n in mean})
    case.finish()


@pytest.mark.parametrize(("path", "dt"), runs("fisher_scrub"))
def test_fisher_scrub(path: Path, dt: str) -> None:
    case, ctx, parameters = fisher_case(path, dt)
    profile = "as_published" if case.published else "as_intended"
    recipe = build_recipe(
        {
            "method": "fisher_forgetting",
            "alpha": case.hyper["alpha"],
            "batch_size": case.hyper["batch_size"],
            "profile": profile,
        }
    )
    edit = recipe.edit
    assert isinstance(edit, FisherForgetting)
    fisher = edit.fisher(ctx, parameters)
    by_name(case, "F", fisher)
    if case.published:
        mean, variance = edit.noise_scale(ctx, parameters, fisher)
        by_name(case, "mean", mean)
        by_name(case, "var", variance)
    case.finish()


def test_batch_means_are_not_samples() -> None:
    path = next(p for p in paths("fisher_scrub") if not Case(p).published)
    case, ctx, parameters = fisher_case(path, "f64")
    by_name(case, "F", FisherForgetting().fisher(ctx, parameters))
    with pytest.raises(AssertionError, match="off by"):
        by_name(case, "F", FisherForgetting(squares="batch").fisher(ctx, parameters))
