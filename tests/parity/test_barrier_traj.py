"""BARRIER: whole runs through the real training loop, against golden trajectories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from barrier_files import Case, Graph, cases
from test_barrier_loss import stored
from torch import Tensor
from torch.nn import functional

from expunge.objectives.cross_entropy import GradientAscent, RandomLabel
from expunge.patch.apply import apply
from expunge.protections.interval import IntervalProtection, save
from expunge.recipe import Optim, Recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.schedule import Replay, Single
from expunge.spaces.layers import Layers
from expunge.tasks.base import Batch, Split, Task


class RecordedTask(Task):
    """A golden file's model and samples; wrong targets are the recorded ones."""

    name = "recorded"

    def __init__(
        self, model: Graph, forget: tuple[Tensor, Tensor], retain: tuple[Tensor, Tensor], wrong: Tensor
    ) -> None:
        self.model = model
        self.inputs = torch.cat([forget[0], retain[0]])
        self.targets = torch.cat([forget[1], retain[1]])
        self.wrong = wrong
        self.n_forget = len(forget[1])

    def split(self, request: ForgetRequest) -> Split:
        everything = torch.arange(len(self.targets))
        return Split({"forget": everything[: self.n_forget], "retain": everything[self.n_forget :]})

    def everything(self) -> Split:
        return Split({"forget": torch.arange(0), "retain": torch.arange(len(self.targets))})

    def load(self, role: str, ids: Tensor, split: Split, *, augment: int | None = None) -> Batch:
        return Batch(self.inputs[ids], self.targets[ids], ids, role, split.is_forget(role, ids))

    def loss(self, batch: Batch, targets: Tensor | None = None) -> Tensor:
        wanted = batch.targets if targets is None else targets
        return functional.cross_entropy(self.model(batch.inputs), wanted, reduction="none")

    def predict(self, batch: Batch) -> Tensor:
        return self.model(batch.inputs)

    def wrong_target(self, batch: Batch, *, key: int, exclude_true: bool = True) -> Tensor:
        return self.wrong[batch.ids]

    def data_digest(self) -> str:
        return "recorded"


def recorded(case: Case, dtype: torch.dtype) -> RecordedTask:
    t, model = case.tensors, case.model(dtype)

    def whole(role: str) -> tuple[Tensor, Tensor]:
        if f"input.{role}.x_int8" in t:
            return t[f"input.{role}.x_int8"].to(dtype) / 32, t[f"input.{role}.y"]
        entries = case.replay[role]
        return torch.cat([t[e["x"]] for e in entries]).to(dtype), torch.cat([t[e["y"]] for e in entries])

    steps = case.replay["steps"] if isinstance(case.replay["steps"], list) else []
    labels = [t[s["label"]] for s in steps if "label" in s]
    return RecordedTask(model, whole("forget"), whole("remain"), torch.cat(labels) if labels else torch.empty(0))


def protection(case: Case, statistics: Path | None) -> IntervalProtection:
    hyper = case.hyper
    names = set(IntervalProtection.model_fields) & set(hyper)
    return IntervalProtection(
        **{n: hyper[n] for n in names - {"targets"}},
        targets=tuple(hyper["targets"]),
        profile="as_published" if case.meta["variant"] == "as_published" else "recommended",
        statistics=str(statistics) if statistics else None,
    )


def recipe(case: Case, schedule: Replay | Single, statistics: Path | None) -> Recipe:
    hyper = case.hyper
    o = hyper["optimizer"]
    kind = GradientAscent if hyper["base_method"] == "ga" else RandomLabel
    extra = {} if kind is GradientAscent else {"exclude_true": False}
    return Recipe(
        name="barrier",
        objective=kind(schedule=schedule, **extra),
        space=Layers(targets=tuple(case.replay["layer_order"])),
        protections=(protection(case, statistics),),
        optim=Optim(
            name=o["name"].lower(),
            lr=o["lr"],
            momentum=o.get("momentum", 0.0),
            betas=tuple(o.get("betas", (0.9, 0.999))),
            # the recommended runs have no decay
            weight_decay=o["weight_decay"],
            epochs=hyper["epochs"],
            norm="train" if hyper["batch_norm"].startswith("train") else "frozen",
        ),
    )


def replayed(case: Case) -> Replay:
    start, steps = 0, []
    for step in case.replay["steps"]:
        size = len(case.tensors[step["batch"]["y"]])
        steps.append({"forget": tuple(range(start, start + size))})
        start += size
    return Replay(epochs=(tuple(steps),))


def run(case: Case, dtype: torch.dtype, folder: Path) -> tuple[list[dict[str, Tensor]], list[dict], RecordedTask]:
    task = recorded(case, dtype)
    statistics = None
    if any(n.startswith("stats.") for n in case.tensors):
        statistics = folder / "statistics.safetensors"
        save({n: (stored(case, "stats.", n),) for n in case.replay["layer_order"]}, statistics)
    states: list[dict[str, Tensor]] = []

    def keep(step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        states.append({n: v.detach().clone() for n, v in model.state_dict().items()})

    before = {n: v.clone() for n, v in task.model.state_dict().items()}
    patch = unlearn(
        task, ForgetRequest.label(0), recipe(case, replayed(case), statistics), run_dir=folder / "run", on_step=keep
    )
    assert all(torch.equal(v, before[n]) for n, v in task.model.state_dict().items()), "the model was not left as found"
    apply(task.model, patch)
    for name, value in task.model.state_dict().items():
        torch.testing.assert_close(value, states[-1][name], rtol=1e-6, atol=1e-7 if dtype == torch.float32 else 1e-12)
    for name in case.replay["must_stay_bit_identical"]:
        assert torch.equal(states[-1][name], before[name]), name
    rows = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return states, rows, task


@pytest.mark.parametrize("path", cases("traj_*"))
def test_trajectory(path: Path, tmp_path: Path) -> None:
    case = Case(path)
    states, rows, _ = run(case, torch.float64, tmp_path)
    for name in case.meta["expected"]:
        if name.startswith("expected.step"):
            step, _, tensor = name.removeprefix("expected.step").partition(".")
            case.expect(name, states[int(step) - 1][tensor])
    sign = -1.0 if case.hyper["base_method"] == "ga" else 1.0
    rows = [r for r in rows if "interval" in r]
    case.expect("expected.base_loss", torch.tensor([sign * r["forget"] for r in rows], dtype=torch.float64))
    case.expect("expected.protection_loss", torch.tensor([r["interval"] for r in rows], dtype=torch.float64))
    assert rows[0]["interval"] == 0.0
    single = [n for n in case.meta["expected"] if n.startswith("expected.final_fp32.")]
    if single:
        folder = tmp_path / "single"
        folder.mkdir()
        states, _, _ = run(case, torch.float32, folder)
        for name in single:
            case.expect(name, states[-1][name.removeprefix("expected.final_fp32.")])
    case.finish()


@pytest.mark.parametrize("path", cases("control_lr0_*"))
def test_learning_rate_zero(path: Path) -> None:
    case = Case(path)
    task = recorded(case, torch.float32)
    n = task.n_forget

    def accuracy(start: int, stop: int | None) -> tuple[float, Tensor]:
        task.model.eval()
        with torch.no_grad():
            logits = task.model(task.inputs[start:stop])
        return float((logits.argmax(1) == task.targets[start:stop]).double().mean() * 100), logits

    def measure(when: str) -> None:
        forget, logits = accuracy(0, n)
        case.expect(f"expected.UA_{when}", 100 - forget)
        case.expect(f"expected.RA_{when}", accuracy(n, None)[0])
        case.expect(f"expected.logits_forget_{when}", logits[:16])

    measure("before")
    schedule = Single(role="forget", batch_size=case.replay["batch_size"], shuffle=False)
    before = {k: p.detach().clone() for k, p in task.model.named_parameters()}
    unlearn(task, ForgetRequest.label(0), recipe(case, schedule, None), inplace=True, allow_no_effect=True)
    assert all(torch.equal(p, before[k]) for k, p in task.model.named_parameters())
    measure("after")
    state = task.model.state_dict()
    for name in case.meta["expected"]:
        if name.startswith("expected.buffer_after."):
            case.expect(name, state[name.removeprefix("expected.buffer_after.")])
    case.finish()


def test_a_skipped_step_is_noticed(tmp_path: Path) -> None:
    case = Case(cases("traj_mlp_sgd_ga_bnfrozen", "as_published")[0].values[0])
    states, _, _ = run(case, torch.float64, tmp_path)
    with pytest.raises(AssertionError, match="off by"):
        case.expect("expected.step3.fc.weight", states[1]["fc.weight"])
