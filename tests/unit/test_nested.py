"""Nested schedules, steps that only forward, and steps in which nothing has a weight."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.context import Context
from expunge.errors import ConfigError
from expunge.objectives.base import Term
from expunge.objectives.cross_entropy import FineTune
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.schedule import FORWARD_ONLY, Nested, Step, chunks
from expunge.tasks.classifier import ClassifierTask
from expunge.tasks.tiny import tiny_classifier

REQUEST = ForgetRequest.label("ant")
SIZES = {"forget": 10, "surrogate": 23}  # 4 forget batches of 3, 5 surrogate batches of 5


def nested(**changes: Any) -> Nested:
    return Nested(**{"batch_size": 3, "inner_batch_size": 5, "repeats": 3, **changes})


def steps(schedule: Nested, epochs: int = 1, key: int = 7) -> list[Step]:
    return [s for e in range(epochs) for s in schedule.steps(SIZES, e, key)]


def updates(found: list[Step]) -> list[Step]:
    return [s for s in found if FORWARD_ONLY not in s]


def same(a: list[Step], b: list[Step]) -> bool:
    return len(a) == len(b) and all(
        list(x) == list(y) and all(torch.equal(x[r], y[r]) for r in x) for x, y in zip(a, b, strict=True)
    )


# ---- the schedule


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(("repeats", "count"), [(1, 1), (3, 3), (5, 5), (6, 5), (100, 5)])
def test_a_lead_batch_gets_the_smaller_of_repeats_and_inner_batches(repeats: int, count: int, restart: bool) -> None:
    found = steps(nested(repeats=repeats, restart=restart))
    assert len(found) == 4 * count
    assert all(set(s) == {"forget", "surrogate"} for s in found)
    for i in range(4):
        group = found[i * count : (i + 1) * count]
        assert all(torch.equal(s["forget"], group[0]["forget"]) for s in group)
        assert len({tuple(s["surrogate"].tolist()) for s in group}) == count


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("repeats", [1, 4, 5, 6])
def test_one_more_pair_is_forwarded_only_where_a_batch_remains(repeats: int, restart: bool) -> None:
    found, plain = (steps(nested(repeats=repeats, restart=restart, discard=d)) for d in (True, False))
    assert same(updates(found), plain)
    extra = [i for i, s in enumerate(found) if FORWARD_ONLY in s]
    if repeats >= 5:
        assert extra == []
        return
    assert extra == [(repeats + 1) * (n + 1) - 1 for n in range(4)]
    for i in extra:
        assert found[i][FORWARD_ONLY].numel() == 0
        assert torch.equal(found[i]["forget"], found[i - 1]["forget"])
        assert not torch.equal(found[i]["surrogate"], found[i - 1]["surrogate"])


@pytest.mark.parametrize("repeats", [1, 2, 3, 4, 5, 9])
def test_passes_that_go_on_use_the_inner_role_evenly(repeats: int) -> None:
    found = updates(steps(nested(repeats=repeats, discard=True), epochs=3))
    counts: Counter[int] = Counter(dict.fromkeys(range(23), 0))
    for step in found:
        counts.update(step["surrogate"].tolist())
        assert max(counts.values()) - min(counts.values()) <= 1
    first = torch.cat([s["surrogate"] for s in found[:5]])
    assert sorted(first.tolist()) == list(range(23))


def test_fresh_passes_leave_the_use_to_chance() -> None:
    counts = Counter(i for s in steps(nested(restart=True), epochs=6) for i in s["surrogate"].tolist())
    assert max(counts.values()) - min(counts.values()) > 1
    whole = updates(steps(nested(restart=True, repeats=5), epochs=2))
    for i in range(0, len(whole), 5):
        assert sorted(torch.cat([s["surrogate"] for s in whole[i : i + 5]]).tolist()) == list(range(23))
    heads = {tuple(s["surrogate"].tolist()) for s in whole[::5]}
    assert len(heads) == 8  # every lead batch and every epoch shuffles anew


def test_the_lead_order_is_the_stored_one_unless_shuffled() -> None:
    def lead(schedule: Nested) -> list[list[int]]:
        found = steps(schedule, epochs=2)
        return [torch.cat([s["forget"] for s in found[e * 12 : e * 12 + 12 : 3]]).tolist() for e in (0, 1)]

    assert lead(nested()) == [list(range(10))] * 2
    mixed = lead(nested(shuffle=True))
    assert [sorted(m) for m in mixed] == [list(range(10))] * 2
    assert mixed[0] != mixed[1] != list(range(10)) != mixed[0]


def test_steps_are_a_function_of_epoch_and_key() -> None:
    schedule = nested(shuffle=True, discard=True)
    assert same(schedule.steps(SIZES, 2, 7), schedule.steps(SIZES, 2, 7))
    assert not same(schedule.steps(SIZES, 2, 7), schedule.steps(SIZES, 1, 7))
    assert not same(schedule.steps(SIZES, 2, 7), schedule.steps(SIZES, 2, 8))
    assert same(nested(discard=True).steps(SIZES, 0, 7), Nested(**nested(discard=True).model_dump()).steps(SIZES, 0, 7))


def test_an_inner_role_smaller_than_its_batch_is_used_whole() -> None:
    found = Nested(batch_size=8, discard=True).steps({"forget": 10, "surrogate": 3}, 0, 1)
    assert [sorted(s["surrogate"].tolist()) for s in found] == [[0, 1, 2]] * 2
    assert not any(FORWARD_ONLY in s for s in found)


def test_one_role_cannot_be_both() -> None:
    with pytest.raises(ConfigError, match="'lead' and 'inner'"):
        Nested(lead="surrogate")
    assert Nested(lead="retain", inner="forget").roles() == ("retain", "forget")


@pytest.mark.parametrize("micro", [1, 2, 100])
def test_pieces_of_a_forward_step_hold_every_sample_once(micro: int) -> None:
    step = next(s for s in steps(nested(discard=True)) if FORWARD_ONLY in s)
    pieces = chunks(step, micro)
    for role in ("forget", "surrogate"):
        assert torch.equal(torch.cat([p[role] for p in pieces if role in p]), step[role])


# ---- steps in the loop


@pytest.fixture
def task() -> ClassifierTask:
    return tiny_classifier(dropout=0.0)


PAIR = {"forget": tuple(range(8)), "retain": tuple(range(16))}
OTHER = {"forget": tuple(range(8, 16)), "retain": tuple(range(30, 46))}
ONLY = {**OTHER, FORWARD_ONLY: ()}
OPTIMISERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
}


def replay(*pattern: dict[str, Any], optim: dict[str, Any], **changes: Any) -> Recipe:
    objective = {"kind": "random_label", "redraw": "never", "schedule": {"kind": "replay", "epochs": (pattern,)}}
    return Recipe(name="t", objective=objective, space="all", optim={"epochs": 1, **optim}).replace(**changes)


class States:
    """Weights, buffers and optimiser state after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.buffers: list[dict[str, torch.Tensor]] = []
        self.optimiser: list[list[torch.Tensor]] = []

    def __call__(self, number: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        self.buffers.append({n: b.clone() for n, b in model.named_buffers()})
        state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        self.optimiser.append([v.clone() for v in state])


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("norm", ["frozen", "train"])
def test_a_forward_only_step_touches_neither_weights_nor_optimiser(task: ClassifierTask, name: str, norm: str) -> None:
    optim, seen = {**OPTIMISERS[name], "norm": norm}, States()
    patch = unlearn(task, REQUEST, replay(PAIR, ONLY, PAIR, optim=optim), on_step=seen)
    assert equal(seen.weights[0], seen.weights[1])
    assert not equal(seen.weights[1], seen.weights[2])
    assert len(seen.optimiser[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(seen.optimiser[0], seen.optimiser[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen.optimiser[1], seen.optimiser[2], strict=True))
    moved = {n for n in seen.buffers[0] if not torch.equal(seen.buffers[0][n], seen.buffers[1][n])}
    assert (len(moved) == len(seen.buffers[0])) if norm == "train" else not moved
    without = unlearn(task, REQUEST, replay(PAIR, PAIR, optim=optim))
    alike = all(torch.equal(patch[n].dense(), without[n].dense()) for n in without)
    assert alike == (norm == "frozen")
    updated = unlearn(task, REQUEST, replay(PAIR, OTHER, PAIR, optim=optim))
    assert any(not torch.equal(patch[n].dense(), updated[n].dense()) for n in updated)


@pytest.mark.parametrize("micro", [None, 3])
def test_the_log_of_a_forward_only_step_has_terms_but_no_update(
    task: ClassifierTask, tmp_path: Path, micro: int | None
) -> None:
    optim = {**OPTIMISERS["sgd"], "micro_batch": micro}
    unlearn(task, REQUEST, replay(PAIR, ONLY, OTHER, optim=optim), run_dir=tmp_path)
    done, only, after = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert {"forget", "retain"} <= set(only)
    assert not {"loss", "grad_norm"} & set(only)
    assert {"loss", "grad_norm"} <= set(done) & set(after)
    assert only["forget"] == pytest.approx(after["forget"], abs=1e-5)  # same batch, same weights
    assert [r["step"] for r in (done, only, after)] == [0, 1, 2]


def test_a_penalty_is_logged_but_does_not_move_a_forward_only_step(task: ClassifierTask) -> None:
    seen = States()
    recipe = replay(PAIR, ONLY, optim=OPTIMISERS["sgd"], protections=[{"kind": "l1", "weight": 0.1}])
    unlearn(task, REQUEST, recipe, on_step=seen)
    assert equal(seen.weights[0], seen.weights[1])


def weights_by_step(monkeypatch: pytest.MonkeyPatch, weights: list[float]) -> None:
    def bind(self: FineTune, ctx: Context) -> Any:
        return lambda batches: {r: Term(ctx.task.loss(b), r, weights[ctx.step]) for r, b in batches.items()}

    monkeypatch.setattr(FineTune, "bind", bind)


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("micro", [None, 5])
def test_a_step_without_any_weight_makes_no_update(
    task: ClassifierTask, monkeypatch: pytest.MonkeyPatch, name: str, micro: int | None
) -> None:
    """Neither momentum nor weight decay may move the weights then."""
    optim, seen, control = {**OPTIMISERS[name], "micro_batch": micro}, States(), States()
    pattern = {"kind": "replay", "epochs": ((PAIR, OTHER, PAIR),)}
    wanted = replay(PAIR, optim=optim).replace(objective={"kind": "fine_tune", "schedule": pattern})
    weights_by_step(monkeypatch, [1.0, 0.0, 1.0])
    unlearn(task, REQUEST, wanted, on_step=seen)
    assert equal(seen.weights[0], seen.weights[1])
    assert all(torch.equal(a, b) for a, b in zip(seen.optimiser[0], seen.optimiser[1], strict=True))
    assert not equal(seen.weights[1], seen.weights[2])
    weights_by_step(monkeypatch, [1.0, 1e-30, 1.0])
    unlearn(task, REQUEST, wanted, on_step=control)
    assert not equal(control.weights[0], control.weights[1])


def test_a_term_of_weight_zero_beside_another_is_logged_only(task: ClassifierTask, tmp_path: Path) -> None:
    both = replay(PAIR, optim=OPTIMISERS["sgd"]).replace(
        objective={**replay(PAIR, optim={}).objective.describe(), "alpha": 0.0}  # type: ignore[union-attr]
    )
    unlearn(task, REQUEST, both, run_dir=tmp_path)
    (row,) = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert row["loss"] == row["forget"]
    assert row["retain"] > 0
