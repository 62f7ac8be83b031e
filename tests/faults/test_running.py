"""Cases 14 and 16: unequal streams are paired as documented, and only running out of memory is retried."""

import copy
from collections import Counter

import inject
import pytest
import torch

from expunge import loop
from expunge.digest import model_digest
from expunge.errors import ResourceError
from expunge.objectives.base import Term
from expunge.recipe import Optim
from expunge.request import ForgetRequest
from expunge.run import unlearn


@pytest.fixture(scope="module")
def trained():
    return inject.faulty()


@pytest.fixture
def task(trained):
    return copy.deepcopy(trained)


# ---- 14 unequal loaders


def used(task, schedule, epochs, request=inject.REQUEST):
    recipe = inject.recipe(
        objective={"kind": "random_label", "schedule": schedule}, optim={"epochs": epochs, "lr": 1e-4}
    )
    unlearn(task, request, recipe)
    counts = {}
    for role, ids in task.seen:
        counts.setdefault(role, Counter()).update(ids)
    return counts


@pytest.mark.parametrize("batch_size", [7, 13, 39, 40, 41])
def test_paired_uses_every_forget_sample_once_an_epoch_and_retain_evenly(task, batch_size):
    counts = used(task, {"kind": "paired", "batch_size": batch_size}, epochs=5)
    assert set(counts["forget"].values()) == {5}
    assert len(counts["forget"]) == 40
    uses = [counts["retain"][i] for i in task.split(inject.REQUEST)["retain"].tolist()]
    assert max(uses) - min(uses) <= 1


def test_a_stream_that_starts_anew_every_epoch_would_be_uneven(task):
    """The control: pairing with a fresh shuffle per epoch, as a rebuilt iterator gives, is not even."""
    counts = Counter()
    for epoch in range(5):
        order = torch.randperm(120, generator=torch.Generator().manual_seed(epoch))
        counts.update(order[:40].tolist())
    uses = [counts[i] for i in range(120)]
    assert max(uses) - min(uses) > 1


@pytest.mark.parametrize("kind", ["sequential", "single"])
def test_passes_use_every_sample_once_an_epoch(task, kind):
    schedule = {"kind": kind, "batch_size": 13, **({"role": "mixed"} if kind == "single" else {})}
    counts = used(task, schedule, epochs=3)
    assert sum((Counter(c) for c in counts.values()), Counter()) == Counter(dict.fromkeys(range(160), 3))


def test_a_last_batch_of_one_sample_is_trained_on(task):
    request = ForgetRequest.samples(range(21))
    counts = used(task, {"kind": "sequential", "batch_size": 20}, epochs=2, request=request)
    assert set(counts["forget"].values()) == {2}
    assert 1 in task.sizes


def test_a_role_smaller_than_its_batch_is_used_whole(task):
    counts = used(task, {"kind": "paired", "batch_size": 64}, epochs=4)
    assert set(counts["forget"].values()) == {4}


# ---- 16 out of memory


def digest_and_log(task, tmp_path, name, **changes):
    patch = unlearn(task, inject.REQUEST, inject.recipe(**changes), run_dir=tmp_path / name)
    return patch


def difference(a, b):
    return max(float((a[n].dense() - b[n].dense()).abs().max()) for n in a)


@pytest.mark.parametrize("call", [1, 7])
def test_out_of_memory_halves_the_micro_batch_with_the_same_maths(task, tmp_path, call):
    plain = unlearn(copy.deepcopy(task), inject.REQUEST, inject.recipe())
    inject.oom_at(task, call, limit=6)
    patch = unlearn(task, inject.REQUEST, inject.recipe(), run_dir=tmp_path / "a")
    notes = [n for n in patch.manifest.notes if "out of memory" in n]
    assert [n.rpartition(" ")[2] for n in notes] == ["10", "5"]
    assert notes[0].startswith(f"out of memory at step {call - 1}:")
    assert difference(patch, plain) < 1e-4
    fewer = unlearn(copy.deepcopy(task), inject.REQUEST, inject.recipe(optim={"max_steps": 15}))
    assert difference(fewer, plain) > 1e-3
    again = copy.deepcopy(task)
    again.calls = 0
    assert unlearn(again, inject.REQUEST, inject.recipe()).digest == patch.digest


def test_micro_batches_are_the_same_maths_as_whole_batches(task):
    plain = unlearn(copy.deepcopy(task), inject.REQUEST, inject.recipe())
    for size in (1, 7):
        cut = unlearn(copy.deepcopy(task), inject.REQUEST, inject.recipe(optim={"micro_batch": size}))
        assert difference(cut, plain) < 1e-4


def test_a_data_free_term_counts_once_however_the_step_is_cut(task):
    """Penalties and role-free terms of an objective must not grow with the number of micro-batches."""
    recipe = inject.recipe(protections=[{"kind": "l1", "weight": 0.01}], optim={"lr": 1e-3})
    plain = unlearn(copy.deepcopy(task), inject.REQUEST, recipe)
    cut = unlearn(copy.deepcopy(task), inject.REQUEST, recipe.replace(optim={"micro_batch": 5}))
    without = unlearn(copy.deepcopy(task), inject.REQUEST, recipe.replace(protections=()))
    assert difference(cut, plain) < 1e-5
    assert difference(without, plain) > 1e-4


def test_a_role_free_term_of_an_objective_counts_once(task, monkeypatch):
    from expunge.objectives.cross_entropy import FineTune

    def bind(self, ctx):
        weight = ctx.model.fc.weight
        return lambda batches: {
            "loss": Term(ctx.task.loss(batches["retain"]), "retain"), "decay": Term(weight.pow(2).sum(), None, 0.1)
        }  # fmt: skip

    monkeypatch.setattr(FineTune, "bind", bind)
    recipe = inject.recipe(
        objective={"kind": "fine_tune", "schedule": {"kind": "single", "role": "retain", "batch_size": 20}}
    )
    plain = unlearn(copy.deepcopy(task), inject.REQUEST, recipe)
    cut = unlearn(copy.deepcopy(task), inject.REQUEST, recipe.replace(optim={"micro_batch": 5}))
    assert difference(cut, plain) < 1e-4


def test_a_term_that_is_not_per_sample_is_refused(task, monkeypatch):
    from expunge.errors import ConfigError
    from expunge.objectives.cross_entropy import FineTune

    def bind(self, ctx):
        return lambda batches: {"loss": Term(ctx.task.loss(batches["retain"]).mean(), "retain")}

    monkeypatch.setattr(FineTune, "bind", bind)
    with pytest.raises(ConfigError, match=r"'loss' must hold one value per sample.*shape \[\]"):
        unlearn(task, inject.REQUEST, inject.recipe(objective="fine_tune"))


def test_a_replayed_step_draws_what_it_would_have_drawn(tmp_path):
    """With dropout and statistics in training mode, the replay starts from the state before the failed attempt."""
    task = inject.faulty(dropout=0.5)
    recipe = inject.recipe(optim={"norm": "train", "micro_batch": 10})
    inject.oom_at(task, 1, limit=5)
    oom = unlearn(copy.deepcopy(task), inject.REQUEST, recipe)
    task.fault = lambda number, losses: losses
    five = unlearn(copy.deepcopy(task), inject.REQUEST, recipe.replace(optim={"micro_batch": 5}))
    ten = unlearn(copy.deepcopy(task), inject.REQUEST, recipe)
    assert oom["bn1.running_mean"].dense().equal(five["bn1.running_mean"].dense())
    assert {n: c.dense().tolist() for n, c in oom.changes.items()} == {
        n: c.dense().tolist() for n, c in five.changes.items()
    }
    assert not oom["bn1.running_mean"].dense().equal(ten["bn1.running_mean"].dense())


def test_without_the_saved_draws_the_replay_would_differ(monkeypatch):
    monkeypatch.setattr(loop, "_set_random_states", lambda states: None)
    with pytest.raises(AssertionError):
        test_a_replayed_step_draws_what_it_would_have_drawn(None)


def test_at_one_sample_the_run_stops(task):
    before = model_digest(task.model)
    inject.oom_at(task, 3, limit=0)
    with pytest.raises(ResourceError, match=r"out of memory at step 2 with one sample at a time.*2.00 GiB") as caught:
        unlearn(task, inject.REQUEST, inject.recipe())
    assert caught.value.exit_code == 6
    assert model_digest(task.model) == before


@pytest.mark.parametrize(
    "error", [inject.Fault("disk on fire"), RuntimeError("mat1 and mat2 shapes cannot be multiplied")]
)
def test_other_errors_pass_through_at_once(task, error):
    def fault(number, losses):
        raise error

    task.fault = fault
    with pytest.raises(type(error), match=str(error)):
        unlearn(task, inject.REQUEST, inject.recipe())
    assert task.calls == 1


def test_out_of_memory_in_the_optimiser_is_not_retried(task, monkeypatch):
    """Half of its tensors may be updated already, so the step cannot be taken again."""

    class Full(torch.optim.SGD):
        def step(self, closure=None):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "make_optimizer", lambda settings, parameters: Full(list(parameters.values()), lr=0.1))
    with pytest.raises(ResourceError, match="in the optimiser at step 0"):
        unlearn(task, inject.REQUEST, inject.recipe())


def test_a_resumed_run_keeps_the_smaller_micro_batch(task, tmp_path):
    inject.oom_at(task, 2, limit=6)
    whole = unlearn(copy.deepcopy(task), inject.REQUEST, inject.recipe())
    with pytest.raises(inject.Fault):  # noqa: PT012
        stop = inject.raise_at(5, inject.Fault())
        unlearn(
            copy.deepcopy(task), inject.REQUEST, inject.recipe(), run_dir=tmp_path, checkpoint_every=2, on_step=stop
        )
    task.fault = lambda number, losses: losses
    resumed = unlearn(task, inject.REQUEST, inject.recipe(), run_dir=tmp_path, checkpoint_every=2)
    assert resumed.digest == whole.digest
    assert max(task.sizes) <= 5


def test_the_memory_errors_that_are_recognised():
    assert loop._is_oom(torch.OutOfMemoryError("x"))
    assert loop._is_oom(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    )
    assert loop._is_oom(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"))
    assert not loop._is_oom(RuntimeError("CUDA error: device-side assert triggered"))
    assert Optim().micro_batch is None
