"""Invariants of the keep loss and of the drawing of surrogates (SCAR)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expunge.features.keep import Keep, balanced_weights, resample

TEACHER = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]], dtype=torch.float64)
STUDENT = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]], dtype=torch.float64)


def test_golden_keep_loss():
    assert float(Keep()(STUDENT, TEACHER).mean()) == pytest.approx(0.2190034933, abs=1e-10)
    offset = Keep(logit_offset=1e-4)(STUDENT, TEACHER).mean()
    assert float(offset) == pytest.approx(0.2190253947, abs=1e-10)
    cold = Keep(temperature=2.0, rule="teacher_only")(STUDENT, TEACHER).mean()
    assert float(cold) == pytest.approx(0.0806401880, abs=1e-10)
    assert float(Keep(temperature=2.0, rule="ignored")(STUDENT, TEACHER).mean()) == float(
        Keep()(STUDENT, TEACHER).mean()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_unchanged_student_costs_nothing(dtype):
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    student = logits.clone().requires_grad_(True)
    loss = Keep()(student, logits).mean()
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(student.grad.abs().max()) < 1e-7
    assert float(Keep(temperature=2.0)(logits, logits).mean()) == 0
    assert float(Keep(temperature=2.0, rule="teacher_only")(logits, logits).mean()) > 0
    assert float(Keep()(logits, logits, (1,)).mean()) > 0, "a removed class is to be unlearnt on surrogates too"
    low = logits.clone()
    low[:, 1] = low.min(1).values
    assert float(Keep()(low, low, (1,)).mean()) == 0


@given(seed=st.integers(0, 100), shift=st.floats(-5, 5))
def test_keep_is_not_negative_and_blind_to_a_shift(seed, shift):
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(6, 4, generator=g, dtype=torch.float64) for _ in range(2))
    values = Keep()(a, b).values
    assert float(values.min()) >= -1e-15
    assert torch.allclose(Keep()(a + shift, b).values, values, atol=1e-12)


@pytest.mark.parametrize("mode", ["row_min", "row_min_kept", "drop_column", "batch_min"])
def test_removed_classes_are_erased_from_the_teacher(mode):
    teacher = torch.randn(40, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = teacher.clone()
    keep, removed = Keep(removed_logit=mode), (1, 4)
    rows = keep.counts(teacher, removed)
    assert torch.equal(rows, ~torch.isin(teacher.argmax(1), torch.tensor(removed)))
    p = keep.edited(teacher, removed, rows)[rows].softmax(1)
    for c in removed:
        assert bool((p[:, [c]] <= p[:, [0, 2, 3]] + 1e-15).all())
    kept = keep(torch.zeros_like(teacher), teacher, removed)
    assert bool((kept.values[~rows] == 0).all())
    assert bool(torch.isfinite(kept.values).all())
    assert torch.equal(teacher, before)
    first = Keep(row_filter="first_removed").counts(teacher, removed)
    assert not torch.equal(first, rows)


def test_a_batch_of_removed_rows_only_gives_nothing():
    teacher = torch.tensor([[5.0, 0.0], [6.0, 1.0]], requires_grad=False)
    student = torch.zeros(2, 2, requires_grad=True)
    for mode in ("row_min", "batch_min", "drop_column"):
        loss = Keep(removed_logit=mode)(student, teacher, (0,)).mean()
        loss.backward()
        assert float(loss.detach()) == 0
        assert float(student.grad.abs().max()) == 0


# -- drawing surrogates --------------------------------------------------------------------------------------------


def test_balanced_drawing():
    labels = torch.tensor([0] * 60 + [1] * 20 + [2] * 17 + [3] * 2 + [4])
    weights = balanced_weights(labels, 6)
    share = torch.bincount(labels, weights, minlength=6)
    assert torch.allclose(share[:3], torch.ones(3, dtype=torch.float64))
    assert share[3:].tolist() == pytest.approx([0.4, 0.2, 0.0])
    drawn = resample(weights, key=3)
    counts, exact = torch.bincount(drawn, minlength=100), 100 * weights / weights.sum()
    assert bool(((counts >= exact.floor()) & (counts <= exact.ceil())).all())
    assert torch.equal(drawn, resample(weights, key=3))
    assert not torch.equal(drawn, resample(weights, key=4))
    per_class = torch.bincount(labels[drawn], minlength=6)
    assert abs(int(per_class[0]) - 100 / 3.6) <= 1
