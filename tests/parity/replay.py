"""Golden files of SalUn: rebuild their models and data, replay their batches and labels, compare every state.

Everything goes through :func:`expunge.run.unlearn`; nothing of the loop is re-implemented here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from expunge.data.base import MemoryImages, Splits
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.saliency import Mask
from expunge.schedule import Replay
from expunge.tasks.base import Batch
from expunge.tasks.classifier import ClassifierTask

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("EXPUNGE_SHARED", ROOT.parent / "shared")) / "parity" / "salun"
FOLDER = SHARED if SHARED.is_dir() else Path(__file__).parent / "data" / "salun"
DTYPES = {"f32": torch.float32, "f64": torch.float64}


def paths(*methods: str) -> list[Path]:
    found = [p for p in sorted(FOLDER.glob("*.json")) if json.loads(p.read_text())["method"] in methods]
    assert found, f"no golden files for {methods} in {FOLDER}"
    return found


def cases(*methods: str) -> list:
    """One parameter per file."""
    return [pytest.param(p, id=p.stem) for p in paths(*methods)]


def runs(*methods: str) -> list:
    """One parameter per file and precision recorded in it."""
    return [
        pytest.param(p, dt, id=f"{p.stem}-{dt}")
        for p in paths(*methods)
        for dt in DTYPES
        if dt in json.loads(p.read_text())["tolerance"]
    ]


class Layered(nn.Module):
    """A network described by a list of layers; vectors arrive as ``[B, 1, 1, d]`` images."""

    def __init__(self, layers: list[dict[str, Any]]) -> None:
        super().__init__()
        self.steps: list[Callable[[Tensor], Tensor]] = []
        if layers[0]["op"] == "Linear":
            self.steps.append(lambda x: x.flatten(1))
        for layer in layers:
            settings = {k: v for k, v in layer.items() if k not in ("name", "op")}
            if layer["op"] in ("Linear", "Conv2d", "BatchNorm2d"):
                module = getattr(nn, layer["op"])(**settings)
                self.add_module(layer["name"], module)
                self.steps.append(module)
            else:
                assert not settings, f"unknown options of {layer['op']}: {settings}"
                self.steps.append({"ReLU": torch.relu, "GlobalAvgPool": lambda x: x.mean((2, 3))}[layer["op"]])

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class ReplayTask(ClassifierTask):
    """A classifier whose wrong labels were recorded; also records the plain loss of every step."""

    def __init__(self, model: nn.Module, data: Splits, labels: list[dict[str, Tensor]]) -> None:
        super().__init__(model, data)
        self.recorded, self.step, self.losses = labels, 0, []

    def wrong_target(self, batch: Batch, *, key: int, exclude_true: bool = True) -> Tensor:
        return self.recorded[self.step][batch.role]

    def loss(self, batch: Batch, targets: Tensor | None = None) -> Tensor:
        values = super().loss(batch, targets)
        if torch.is_grad_enabled() and self.model.training:
            self.losses.append((self.step, batch.role, values.detach().mean()))
        return values


class Case:
    """One golden file pair in one precision."""

    def __init__(self, path: Path, dt: str = "f64") -> None:
        self.meta = json.loads(path.read_text())
        self.tensors = load_file(path.with_suffix(".safetensors"))
        self.hyper, self.replay = self.meta["hyper"], self.meta["replay"]
        self.published = self.meta["variant"] == "as_published"
        self.dt, self.dtype = dt, DTYPES[dt]
        self.checked: set[str] = set()

    def model(self) -> Layered:
        model = Layered(self.meta["model"]["layers"])
        model.load_state_dict({n[5:]: t for n, t in self.tensors.items() if n.startswith("init.")})
        order = [(e["name"], e["shape"]) for e in self.meta["model"]["parameter_order"]]
        assert [(n, list(p.shape)) for n, p in model.named_parameters()] == order
        return model.to(self.dtype)

    def mask(self, prefix: str = "mask.") -> dict[str, Tensor]:
        names = [e["name"] for e in self.meta["model"]["parameter_order"]]
        return {n: self.tensors[prefix + n].bool() for n in names if prefix + n in self.tensors}

    # -- data ------------------------------------------------------------------------------------------------------

    def data(self) -> tuple[Splits, list[int]]:
        """All training samples, and which of them are to be forgotten."""
        t = self.tensors
        if "input.x" in t:
            x, y, forget = t["input.x"], t["input.y"], t["input.forget_indices"].tolist()
        else:
            parts = [r for r in ("forget", "retain") if f"input.x_{r}" in t]
            x, y = (torch.cat([t[f"input.{k}_{r}"] for r in parts]) for k in "xy")
            forget = list(range(len(t["input.x_forget"]))) if "forget" in parts else [len(x)]
            if len(parts) == 1:  # such a method never looks at the other set, but there has to be one
                x, y = torch.cat([x, torch.zeros_like(x[:1])]), torch.cat([y, y[:1]])
        x = x if x.ndim == 4 else x[:, None, None, :]
        n_classes = self.tensors[f"init.{self.meta['model']['parameter_order'][-1]['name']}"].numel()
        images = MemoryImages(x, y, [str(c) for c in range(n_classes)])
        return Splits("golden", images, images), forget

    def steps(self) -> tuple[Replay, list[dict[str, Tensor]]]:
        """The recorded steps as positions within roles, and the labels used in each."""
        splits, forget = self.data()
        retain = [i for i in range(len(splits.train)) if i not in set(forget)]
        where = {"forget": forget, "retain": retain, "mixed": forget + retain}
        epochs: dict[int, list[dict[str, tuple[int, ...]]]] = {}
        labels = []
        for entry in self.replay["steps"]:
            used: dict[str, tuple[int, ...]] = {}
            given: dict[str, Tensor] = {}
            if "forget_indices" in entry:
                for role in ("forget", "retain"):
                    used[role] = tuple(entry[f"{role}_indices"])
                    given[role] = torch.tensor(entry[f"{role}_labels"])
            else:
                role, indices = self._role(entry, set(forget)), entry["indices"]
                if "source" not in entry:  # indices count through the whole training set
                    number = {i: p for p, i in enumerate(where[role])}
                    indices = [number[i] for i in indices]
                used[role], given[role] = tuple(indices), torch.tensor(entry["labels"])
            for role, positions in used.items():
                self._check_true_labels(entry, role, [where[role][p] for p in positions], given[role], set(forget))
            epochs.setdefault(entry.get("epoch", 0), []).append(used)
            labels.append(given)
        return Replay(epochs=tuple(tuple(e) for _, e in sorted(epochs.items()))), labels

    def _role(self, entry: dict[str, Any], forget: set[int]) -> str:
        if "source" in entry:
            return str(entry["source"])
        if self.meta["method"] in ("deepdive_rl", "deepdive_ga"):
            return "mixed"
        return "forget" if set(entry["indices"]) <= forget else "retain"

    def _check_true_labels(
        self, entry: dict[str, Any], role: str, ids: list[int], labels: Tensor, forget: set[int]
    ) -> None:
        truth = self.data()[0].train.labels[ids]
        own = torch.tensor([i not in forget for i in ids])
        assert torch.equal(labels[own], truth[own]), (
            f"step {entry['step']}: a retain label is not the true one ({role})"
        )
        if "signs" in entry:
            assert torch.equal(torch.tensor(entry["signs"]) == 1, own)

    # -- comparison ------------------------------------------------------------------------------------------------

    def close(self, group: str, got: Tensor, name: str) -> None:
        """Compare with a recorded tensor under the file's own tolerance; integers exactly."""
        want = self.tensors[name]
        self.checked.add(name)
        assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
        if not want.is_floating_point():
            assert torch.equal(got.to(want.dtype), want), name
            return
        limit = self.meta["tolerance"][self.dt][group]
        got, want = got.detach().double(), want.double()
        excess = (got - want).abs() - (limit["atol"] + limit["rtol"] * want.abs())
        assert bool((excess <= 0).all()), f"{name}: off by {float((got - want).abs().max()):.2e}, {limit}"

    def check_state(self, step: int, model: nn.Module) -> None:
        prefix = f"expected.{self.dt}.step{step}."
        state = model.state_dict()
        assert {n[len(prefix) :] for n in self.tensors if n.startswith(prefix)} == set(state)
        for name, value in state.items():
            self.close("step", value, prefix + name)

    def check_frozen(self, model: nn.Module) -> None:
        """Masked weights have the bits they started with."""
        view = {torch.float32: torch.int32, torch.float64: torch.int64}[self.dtype]
        for name, mask in self.mask().items():
            now, start = model.get_parameter(name).detach(), self.tensors[f"init.{name}"].to(self.dtype)
            assert torch.equal(now[~mask].view(view), start[~mask].view(view)), f"{name}: a masked weight moved"

    def check_momentum(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for name, parameter in model.named_parameters():
            buffer = optimizer.state[parameter].get("momentum_buffer")
            self.close("momentum", buffer, f"expected.{self.dt}.momentum.{name}")

    def check_losses(self, task: ReplayTask) -> None:
        for key, role in (("ce", None), ("ce_mean", None), ("ce_forget", "forget"), ("ce_retain", "retain")):
            if f"expected.{self.dt}.{key}" in self.tensors:
                got = torch.stack([v for _, r, v in task.losses if role in (None, r)])
                self.close(key, got, f"expected.{self.dt}.{key}")

    def finish(self, *skipped: str) -> None:
        """Every number recorded for this precision was compared."""
        names = {n for n in self.tensors if n.startswith(f"expected.{self.dt}.")}
        left = {n for n in names - self.checked if not any(s in n for s in skipped)}
        assert not left, f"not compared: {sorted(left)[:5]}"


def save_mask(case: Case, folder: Path) -> str | None:
    """Write the case's mask as the library does; ``None`` when it has none."""
    bits = case.mask()
    if not bits:
        return None
    ones, total = sum(int(m.sum()) for m in bits.values()), sum(m.numel() for m in bits.values())
    Mask(bits, keep=ones / total).save(folder / "mask.safetensors")
    return str(folder / "mask.safetensors")


def replayed(recipe: Recipe, case: Case) -> Recipe:
    """The same recipe over the recorded batches, rates and optimiser settings."""
    schedule, _ = case.steps()
    assert recipe.objective is not None
    hyper = case.hyper
    optim: dict[str, Any] = {
        "lr": hyper["lr"],
        "momentum": hyper["momentum"],
        "weight_decay": hyper["weight_decay"],
        "epochs": len(schedule.epochs),
        "norm": "train",
        "augment": False,
    }
    if "lr_milestones" in hyper:
        optim |= {"lr_schedule": "multistep", "milestones": hyper["lr_milestones"], "gamma": hyper["lr_gamma"]}
    objective = recipe.objective.model_copy(update={"schedule": schedule})
    return recipe.replace(objective=objective, optim=optim)


def run_case(case: Case, recipe: Recipe, *, frozen: bool = True) -> None:
    """Unlearn as recorded and compare every step, the momentum, the losses and the patched model."""
    splits, forget = case.data()
    _, labels = case.steps()
    model = case.model()
    task = ReplayTask(model, splits, labels)
    recipe = replayed(recipe, case)
    rates = [e["lr"] for e in case.replay["steps"]]

    def on_step(step: int, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rates[step - 1], rel=1e-12)
        case.check_state(step, net)
        if frozen:
            case.check_frozen(net)
        task.step = step
        if step == len(rates) and any(".momentum." in n for n in case.tensors):
            case.check_momentum(net, optimizer)

    start = {n: t.clone() for n, t in model.state_dict().items()}
    request = ForgetRequest.samples(forget)
    patch = unlearn(task, request, recipe, on_step=on_step)
    assert task.step == len(rates)
    assert all(torch.equal(t, start[n]) for n, t in model.state_dict().items()), "the model was not left as found"
    case.check_losses(task)
    task.step = 0
    task.losses.clear()
    assert unlearn(task, request, recipe, inplace=True, on_step=lambda s, m, o: setattr(task, "step", s)).changes
    if frozen:
        case.check_frozen(model)
    logits = f"expected.{case.dt}.logits_forget"
    if logits in case.tensors:
        model.eval()
        with torch.no_grad():
            case.close("logits_forget", model(splits.train.images(torch.tensor(forget)).to(case.dtype)), logits)
    assert patch.manifest.recipe["name"] == recipe.name
