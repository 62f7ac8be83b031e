from collections import Counter

import pytest
import torch

from expunge.errors import ConfigError
from expunge.schedule import Paired, Replay, Sequential, Single, chunks

SIZES = {"forget": 10, "retain": 37, "mixed": 47}


def used(schedule, epochs):
    counts = {}
    for epoch in range(epochs):
        for step in schedule.steps(SIZES, epoch, key=5):
            for role, ids in step.items():
                counts.setdefault(role, Counter()).update(ids.tolist())
    return counts


@pytest.mark.parametrize("role", ["forget", "retain", "mixed"])
def test_single_uses_every_sample_once_per_epoch(role):
    counts = used(Single(role=role, batch_size=8), 3)
    assert set(counts) == {role}
    assert counts[role] == Counter(dict.fromkeys(range(SIZES[role]), 3))


def test_sequential_is_a_forget_pass_then_a_retain_pass():
    steps = Sequential(batch_size=8).steps(SIZES, 0, 5)
    assert [next(iter(s)) for s in steps] == ["forget"] * 2 + ["retain"] * 5
    assert used(Sequential(batch_size=8), 2)["retain"] == Counter(dict.fromkeys(range(37), 2))


def test_forget_epochs_end_the_forget_passes_and_leave_the_retain_passes():
    whole, limited = Sequential(batch_size=8), Sequential(batch_size=8, forget_epochs=2)
    for epoch in range(4):
        want = [s for s in whole.steps(SIZES, epoch, 5) if epoch < 2 or "retain" in s]
        got = limited.steps(SIZES, epoch, 5)
        assert [list(s) for s in got] == [list(s) for s in want]
        assert all(torch.equal(a[r], b[r]) for a, b in zip(got, want, strict=True) for r in a)
    assert "forget" not in used(Sequential(batch_size=8, forget_epochs=0), 1)
    assert "forget_epochs" not in whole.model_dump()
    assert Sequential(**limited.model_dump()) == limited != whole
    with pytest.raises(ConfigError, match="forget_epochs"):
        Sequential(forget_epochs=-1)


@pytest.mark.parametrize("batch_size", [3, 8, 64])
def test_paired_uses_forget_once_per_epoch_and_retain_evenly(batch_size):
    counts = used(Paired(batch_size=batch_size), 9)
    assert counts["forget"] == Counter(dict.fromkeys(range(10), 9))
    times = [counts["retain"][i] for i in range(37)]
    assert max(times) - min(times) <= 1


def test_paired_epochs_continue_where_the_last_one_stopped():
    one = Paired(batch_size=5)
    steps = [s["retain"] for e in range(4) for s in one.steps(SIZES, e, 5)]
    first_lap = torch.cat(steps)[:37]
    assert torch.equal(first_lap.sort().values, torch.arange(37))


def test_orders_change_with_epoch_and_key_and_not_otherwise():
    s = Single(role="retain", batch_size=37)
    a = s.steps(SIZES, 0, 5)[0]["retain"]
    assert torch.equal(a, s.steps(SIZES, 0, 5)[0]["retain"])
    assert not torch.equal(a, s.steps(SIZES, 1, 5)[0]["retain"])
    assert not torch.equal(a, s.steps(SIZES, 0, 6)[0]["retain"])
    unshuffled = Single(role="retain", batch_size=37, shuffle=False).steps(SIZES, 3, 5)[0]["retain"]
    assert torch.equal(unshuffled, torch.arange(37))


def test_third_stream_with_its_own_batch_size():
    paired = Paired(streams=("forget", "surrogate"), batch_size=5, batch_sizes={"surrogate": 7})
    steps = paired.steps({"forget": 10, "surrogate": 20}, 0, 1)
    assert [(len(s["forget"]), len(s["surrogate"])) for s in steps] == [(5, 7), (5, 7)]


def test_replay_returns_what_was_recorded():
    steps = Replay(epochs=(({"forget": (2, 1)}, {"retain": (0,)}),)).steps({}, 0, 9)
    assert [s[k].tolist() for s in steps for k in s] == [[2, 1], [0]]


@pytest.mark.parametrize("micro", [1, 2, 3, 100, None])
def test_chunks_hold_every_sample_once(micro):
    step = {"forget": torch.arange(5), "retain": torch.arange(8)}
    pieces = chunks(step, micro)
    for role, ids in step.items():
        assert torch.equal(torch.cat([p[role] for p in pieces if role in p]), ids)
    assert micro is None or all(len(ids) <= micro for p in pieces for ids in p.values())


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="batch_size"):
        Single(batch_size=0)
