"""The table of neighbours: similarity, paired changes with interval and test, and where images went."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from expunge.errors import DataError
from expunge.metrics.neighbours import Neighbours, class_cosines, name_cosines, neighbours, paired_change
from expunge.metrics.outputs import ClassifierOutputs

NAMES = ["dog", "wolf", "cat", "car"]
#: Names in the plane at 0, 20, 60 and 90 degrees.
TEXTS = np.stack([[np.cos(a), np.sin(a)] for a in np.deg2rad([0, 20, 60, 90])])


def predicting(predicted: list[int], labels: list[int]) -> ClassifierOutputs:
    return ClassifierOutputs(logits=np.eye(4)[predicted], labels=labels, ids=np.arange(len(labels)))


LABELS = [0] * 10 + [1] * 12 + [2] * 8
BEFORE = predicting([0] * 10 + [1] * 11 + [0] + [2] * 8, LABELS)
AFTER = predicting([1] * 6 + [2] * 3 + [0] + [1] * 2 + [0] * 7 + [2] * 3 + [2] * 8, LABELS)


def table(**changes) -> Neighbours:
    given = {"before": BEFORE, "after": AFTER, "classifier": 5 * TEXTS, "names": NAMES, "forgotten": [0], **changes}
    return neighbours(**given)


def test_rows() -> None:
    found = table()
    assert [r.name for r in found.rows] == ["wolf", "cat", "car"]
    wolf, cat, car = found.rows
    assert [round(r.similarity, 6) for r in found.rows] == [round(np.cos(np.deg2rad(a)), 6) for a in (20, 60, 90)]
    assert (wolf.before.value, wolf.after.value) == (pytest.approx(100 * 11 / 12), pytest.approx(100 * 2 / 12))
    assert wolf.change.value == pytest.approx(-75)
    assert wolf.taken.value == pytest.approx(100 * 7 / 12)
    assert (wolf.received.value, cat.received.value) == (60, 30)
    assert (cat.change.value, cat.p, cat.damaged) == (0, 1.0, False)
    assert cat.change.low < 0 < cat.change.high
    assert (car.before.value, car.p, car.received.value) == (None, None, 0)
    assert (found.still.value, found.tested, found.n_forgotten) == (10, 2, 10)


def test_the_worst_neighbour() -> None:
    found = table()
    assert found.worst is found.rows[0]
    assert found.worst_p == pytest.approx(2 * binomtest(0, 9).pvalue)
    assert table(after=BEFORE).worst is None
    assert table(before=AFTER, after=BEFORE).worst is None  # better is no damage


def test_a_loss_of_a_few_images_is_no_finding() -> None:
    few = predicting([0] * 10 + [1] * 8 + [0] * 4 + [2] * 8, LABELS)
    row = table(after=few).rows[0]
    assert row.change.value == pytest.approx(-25)
    assert row.p == 0.25
    assert not row.damaged


def test_several_forgotten_classes() -> None:
    found = table(forgotten=[0, 3])
    assert [(r.name, r.nearest) for r in found.rows] == [("wolf", "dog"), ("cat", "car")]
    assert found.forgotten == ("dog", "car")


def test_paired_change_is_paired() -> None:
    before = np.array([True] * 15 + [False] * 5)
    lost = before & (np.arange(20) >= 8)
    swapped = ~before  # 15 lost, 5 won
    e, p = paired_change(before, lost)
    assert (e.value, p) == (-40, pytest.approx(2 * 0.5**8))
    d, q = (0 + 1) / 22, (8 + 1) / 22
    half = 1.959963984540054 * np.sqrt((d + q - (d - q) ** 2) / 22)
    assert (e.low, e.high) == (pytest.approx(100 * (d - q - half)), pytest.approx(100 * (d - q + half)))
    other, p_other = paired_change(before, swapped)
    assert other.value == -50
    assert p_other > p  # a larger loss, but with many images won
    assert other.high - other.low > e.high - e.low
    nothing, none = paired_change(before[:0], lost[:0])
    assert (nothing.value, none) == (None, None)
    everything, _ = paired_change(np.ones(18, bool), np.zeros(18, bool))
    assert everything.low == -100
    with pytest.raises(DataError):
        paired_change(before, lost[:3])


def test_coverage_of_the_interval() -> None:
    g = np.random.default_rng(1)
    inside = wide = 0
    for _ in range(300):
        before = g.random(18) < 0.9
        after = before & (g.random(18) < 0.8)
        e, _ = paired_change(before, after)
        inside += e.low <= -18 <= e.high
        wide += e.low <= 18 <= e.high
    assert inside >= 279
    assert wide < 279


def test_shown_keeps_what_matters() -> None:
    c = 40
    g = np.random.default_rng(0)
    texts = g.normal(size=(c, 6))
    labels = np.repeat(np.arange(c), 10)
    right = np.eye(c)[labels]
    after = right.copy()
    order = [r.name for r in neighbours(*_pair(right, right, labels), texts, list(map(str, range(c))), [0]).rows]
    hurt, got = int(order[-1]), int(order[-2])
    after[labels == hurt] = np.eye(c)[got]
    after[labels == 0] = np.eye(c)[got]
    found = neighbours(*_pair(right, after, labels), texts, list(map(str, range(c))), [0])
    few = found.shown(nearest=3, worst=1, receiving=1)
    assert [r.name for r in few.rows] == [*order[:3], str(got), str(hurt)]
    assert few.worst.name == str(hurt)
    assert few.worst_p == found.worst_p
    assert len(found.rows) == c - 1


def _pair(a, b, labels):
    return [ClassifierOutputs(logits=x, labels=labels) for x in (a, b)]


def test_cosines_of_names_and_images() -> None:
    np.testing.assert_allclose(name_cosines(3 * TEXTS, [0])[:, 0], TEXTS[:, 0], atol=1e-12)
    images = np.array([[2.0, 0], [0, 5], [0, 1]])
    found = class_cosines(images, [0, 0, 3], TEXTS, [0, 3])
    np.testing.assert_allclose(found[0], (TEXTS[:, 0] + TEXTS[:, 1]) / 2, atol=1e-12)
    np.testing.assert_allclose(found[1], TEXTS[:, 1], atol=1e-12)
    with pytest.raises(DataError, match="no images of class 1"):
        class_cosines(images, [0, 0, 3], TEXTS, [1])
    with pytest.raises(DataError, match="broken"):
        name_cosines(np.zeros((4, 2)), [0])


def test_round_trip() -> None:
    found = table()
    again = Neighbours.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    assert again != table(after=BEFORE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"after": predicting([0] * 30, LABELS[::-1])}, "same images"),
        ({"after": ClassifierOutputs(logits=AFTER.logits, labels=LABELS, ids=np.arange(30) + 1)}, "ids differ"),
        ({"names": ["dog", "dog", "cat", "car"]}, "3 different"),
        ({"classifier": TEXTS[:3]}, "classifier of 3 classes"),
        ({"forgotten": []}, "at least one"),
        ({"forgotten": [4]}, "at least one"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        table(**change)
