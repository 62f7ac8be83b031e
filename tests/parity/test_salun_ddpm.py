"""Golden numbers of SalUn's diffusion part: masks and every step of the recorded runs, through the method itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from replay import FOLDER, Case, runs, save_mask
from torch import Tensor, nn
from torch.nn import functional

from expunge.context import Context
from expunge.data.base import MemoryImages, Splits
from expunge.method import build_recipe
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.run import LOG, unlearn
from expunge.saliency import make_mask
from expunge.schedule import Replay
from expunge.tasks.base import Batch
from expunge.tasks.ddpm import DdpmTask
from expunge.track import read_log

if not any(FOLDER.glob("ddpm_*.json")):
    pytest.skip("these golden files are too large for the committed subset", allow_module_level=True)

LOOPS, MASKS = ("ddpm_rl", "ddpm_ga"), ("ddpm_saliency",)


class TinyUNet(nn.Module):
    """The golden files' network, built from its description; class number ``classes`` is the learned null vector."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        for entry in case.meta["model"]["parameter_order"]:
            if "." not in entry["name"]:
                self.register_parameter(entry["name"], nn.Parameter(torch.empty(entry["shape"])))
        for layer in case.meta["model"]["layers"]:
            own = {k: v for k, v in layer.items() if k not in ("name", "op")}
            if layer["op"] == "Embedding":
                self.add_module(layer["name"], nn.Embedding(own["num"], own["dim"]))
            elif layer["op"] in ("Linear", "Conv2d", "GroupNorm"):
                self.add_module(layer["name"], getattr(nn, layer["op"])(**own))
        self.load_state_dict({n[5:]: t for n, t in case.tensors.items() if n.startswith("init.")})
        order = [e["name"] for e in case.meta["model"]["parameter_order"]]
        assert sorted(order) == sorted(n for n, _ in self.named_parameters())
        self.frequencies = case.tensors["input.time_frequencies"].to(case.dtype)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        swish, rows = functional.silu, len(self.emb.weight)
        angle = t[:, None].to(x.dtype) * self.frequencies
        time = self.t2(swish(self.t1(torch.cat([angle.sin(), angle.cos()], 1))))
        given = self.emb(class_labels.clamp(max=rows - 1))
        given = torch.where((class_labels == rows)[:, None], self.null, given)
        joint = swish(torch.cat([time, self.c2(swish(self.c1(given)))], 1))

        def block(name: str, h: Tensor) -> Tensor:
            part = {k: getattr(self, f"{name}_{k}") for k in ("n1", "conv1", "emb", "n2", "conv2")}
            inner = part["conv1"](swish(part["n1"](h))) + part["emb"](joint)[:, :, None, None]
            skip = self.u_skip(h) if name == "u" else h
            return skip + part["conv2"](swish(part["n2"](inner)))

        high = block("d", self.conv_in(x))
        low = block("m", functional.avg_pool2d(high, 2))
        low = functional.interpolate(low, scale_factor=2, mode="nearest")
        return (self.conv_out(swish(self.n_out(block("u", torch.cat([low, high], 1))))),)


class ReplayTask(DdpmTask):
    """Times, noise, dropped classes and wrong classes as recorded."""

    def __init__(self, case: Case) -> None:
        t = case.tensors
        classes, forgotten = case.hyper["num_classes"], case.hyper["label_to_forget"]
        parts, labels = [t["input.x_forget"]], [torch.full((len(t["input.x_forget"]),), forgotten)]
        if "input.x_remain" in t:
            parts, labels = [*parts, t["input.x_remain"]], [*labels, t["input.c_remain"]]
        else:  # there has to be a retain set
            parts, labels = [*parts, parts[0][:1]], [*labels, torch.tensor([(forgotten + 1) % classes])]
        images = MemoryImages(torch.cat(parts), torch.cat(labels), [str(c) for c in range(classes)])
        betas = t["input.betas"].double()
        noise_levels = SimpleNamespace(alphas_cumprod=(1 - betas).cumprod(0), config=SimpleNamespace())
        super().__init__(TinyUNet(case).to(case.dtype), noise_levels, Splits("golden", images, images))
        self.case, self.step, self.condition_drop = case, 0, 0.0
        self.n_forget = len(t["input.x_forget"])

    def _recorded(self, batch: Batch) -> tuple[str, dict]:
        steps = self.case.replay["steps"]
        return ("forget" if batch.role == "forget" else "remain"), steps[self.step]

    def drawn(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        role, entry = self._recorded(batch)
        ids = batch.ids - (self.n_forget if role == "remain" else 0)
        assert ids.tolist() == entry[f"{role}_indices"]
        start = sum(len(e[f"{role}_indices"]) for e in self.case.replay["steps"][: self.step])
        noise = self.case.tensors[f"input.eps_{role}"][start : start + len(batch)].to(batch.inputs)
        t = torch.tensor(entry[f"{role}_t"])
        return self.process.noised(batch.inputs, noise, t), t, noise

    def predict(self, batch: Batch) -> Tensor:  # of the check after a run; nothing is recorded for it
        return self.eps(batch.inputs, torch.zeros_like(batch.targets), batch.targets)

    def dropped(self, batch: Batch, labels: Tensor, share: float, branch: str) -> Tensor:
        if share == 0:
            return labels
        keep = torch.tensor(self._recorded(batch)[1][{"retain": "remain"}.get(branch, branch) + "_keep"])
        return torch.where(keep.bool(), labels, self.null)

    def wrong_target(self, batch: Batch, *, key: int, exclude_true: bool = True) -> Tensor:
        return torch.full_like(batch.targets, self._recorded(batch)[1]["pseudo_class"])


def request(task: ReplayTask) -> ForgetRequest:
    return ForgetRequest.samples(range(task.n_forget))


def recipe_of(case: Case, folder: Path) -> Recipe:
    h = case.hyper
    optim = {"lr": 1e-3, "grad_clip": h["grad_clip"], "epochs": 1, "max_steps": None, "augment": False}
    assert h["optimizer"].startswith("Adam lr 0.001, betas (0.9, 0.999)")
    recipe = build_recipe(
        {
            "method": "ddpm_salun",
            "on": "gradient_ascent" if case.meta["method"] == "ddpm_ga" else "random_label",
            "alpha": h["alpha"] if case.published else h["alpha_mean"],
            "mask_file": save_mask(case, folder),
            "profile": case.meta["variant"],
            "optim": optim,
        }
    )
    steps = tuple(
        {"forget": tuple(e["forget_indices"]), "retain": tuple(e["remain_indices"])} for e in case.replay["steps"]
    )
    update = {"schedule": Replay(epochs=(steps,))}
    if case.published:
        update["condition_drop"] = h["cond_drop_prob"]
    return recipe.replace(objective=recipe.objective.model_copy(update=update))


def replay(case: Case, task: ReplayTask, recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlearn as recorded; compare every state, loss and norm."""
    opened = []
    kind = type(recipe.space)
    open_space = kind.open
    monkeypatch.setattr(kind, "open", lambda self, ctx: opened.append(open_space(self, ctx)) or opened[-1])
    norms = []

    def on_step(step: int, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        case.check_state(step, net)
        case.check_frozen(net)
        norms.append(getattr(opened[-1], "full_norm", None))
        task.step = step

    unlearn(task, request(task), recipe, run_dir=folder, on_step=on_step)
    assert task.step == case.hyper["iterations"] == len(case.replay["steps"])
    rows = read_log(folder / LOG)
    found = [row["grad_norm"] if norm is None else norm for row, norm in zip(rows, norms, strict=True)]
    case.close("losses", torch.tensor([row["loss"] for row in rows], dtype=torch.float64), _name(case, "losses"))
    case.close("grad_norms", torch.tensor(found, dtype=torch.float64), _name(case, "grad_norms"))
    case.finish()


def _name(case: Case, what: str) -> str:
    return f"expected.{case.dt}.{what}"


@pytest.mark.parametrize(("path", "dt"), runs(*LOOPS))
def test_loop(path: Path, dt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(path, dt)
    replay(case, ReplayTask(case), recipe_of(case, tmp_path), tmp_path / "run", monkeypatch)


@pytest.mark.parametrize("change", ["profile", "drop", "clip"])
def test_another_loop_is_noticed(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: sums taken as means, classes kept, or clipping after the mask give other numbers."""
    path = next(p.values[0] for p in runs("ddpm_rl") if "as_published" in p.id)
    case = Case(path)
    task, recipe = ReplayTask(case), recipe_of(case, tmp_path)
    if change == "profile":
        recipe = recipe.replace(objective=recipe.objective.model_copy(update={"alpha": 192 * case.hyper["alpha"]}))
    elif change == "drop":
        recipe = recipe.replace(objective=recipe.objective.model_copy(update={"condition_drop": 0.0}))
    else:
        recipe = recipe.replace(
            space=recipe.space.model_copy(update={"clip": None}), optim={"grad_clip": case.hyper["grad_clip"]}
        )
    with pytest.raises(AssertionError, match="off by"):
        replay(case, task, recipe, tmp_path / "run", monkeypatch)


@pytest.mark.parametrize(("path", "dt"), runs(*MASKS))
def test_mask(path: Path, dt: str) -> None:
    case = Case(path, dt)
    h, entries = case.hyper, case.replay["batches"]
    assert [i for e in entries for i in e["indices"]] == list(range(len(case.tensors["input.x_forget"])))

    class MaskTask(ReplayTask):
        def drawn(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            t = torch.tensor([x for e in entries for x in e["t"]])[batch.ids]
            noise = case.tensors["input.eps"][batch.ids].to(batch.inputs)
            return self.process.noised(batch.inputs, noise, t), t, noise

    task = MaskTask(case)
    guidance = 1 + h["cond_scale"]
    space = build_recipe(
        {
            "method": "ddpm_salun",
            "profile": case.meta["variant"],
            "guidance": guidance,
            "keep": h["ratio"],
            "batch_size": h["batch_size"],
            "passes": 1,
            "optim": {"grad_clip": h["grad_clip"]},
        }
    ).space
    assert space.clip_scores == h["grad_clip"]
    ctx = Context(task, task.split(request(task)))
    parameters = dict(task.model.named_parameters())
    pixels = 1 if case.published else h.get("numel_per_image", task.data.train.images(torch.tensor([0]))[0].numel())

    def batches() -> Iterator[Batch]:
        return (replace(b, key=0) for b in ctx.batches("forget", h["batch_size"]))

    scores = {n: pixels * s for n, s in space.scores(task.guided(guidance), batches(), parameters).items()}
    order = [e["name"] for e in case.meta["model"]["parameter_order"]]
    scores = {n: scores[n] for n in order}
    for name, value in scores.items():
        case.close("S", value, _name(case, f"S.{name}"))
    mask = make_mask(scores, h["ratio"], rule=case.meta["variant"])
    for name, bits in mask.bits.items():
        case.close("mask", bits, _name(case, f"mask_{h['ratio']}.{name}"))
    if case.published:
        _check_batches(case, task.guided(guidance), list(batches()))
    case.finish()
    opened = space.open(ctx)
    assert all(torch.equal(opened.selection.bits[n], mask.bits[n]) for n in order), "the space's own mask is another"


def _check_batches(case: Case, task: DdpmTask, batches: list[Batch]) -> None:
    """Loss and norm of every batch before clipping."""
    losses, norms = [], []
    for batch in batches:
        value = batch.inputs[0].numel() * task.loss(batch).mean()
        grads = torch.autograd.grad(value, list(task.model.parameters()))
        losses.append(value.detach())
        norms.append(torch.nn.utils.get_total_norm(grads))
    case.close("losses", torch.stack(losses), _name(case, "losses"))
    case.close("grad_norms", torch.stack(norms), _name(case, "grad_norms"))


def test_another_guidance_is_noticed() -> None:
    path, dt = next(p.values for p in runs(*MASKS) if "as_published" in p.id)
    case = Case(path, dt)
    case.hyper["cond_scale"] += 0.01
    case_of = Case.__init__

    def changed(self: Case, *args: object) -> None:
        case_of(self, *args)
        self.hyper["cond_scale"] += 0.01

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Case, "__init__", changed)
        with pytest.raises(AssertionError, match="off by"):
            test_mask(path, dt)
