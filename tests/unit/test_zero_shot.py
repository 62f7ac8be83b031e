"""Zero-shot figures: ranks and ties, intervals for few images, macro means, other axes, captions, and the whole set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from expunge.errors import DataError
from expunge.metrics import zero_shot as z
from expunge.metrics.contrastive import measure_zero_shot
from expunge.metrics.describe import Metric
from expunge.metrics.estimate import clopper_pearson, proportion, wilson
from expunge.metrics.outputs import ClassifierOutputs
from expunge.registry import registry

NAMES = ("fa1", "fa5", "zs_top1", "zs_top5", "zs_macro", "zs_macro_all")


def outputs(n: int = 60, c: int = 8, seed: int = 0, strength: float = 2.0) -> ClassifierOutputs:
    g = np.random.default_rng(seed)
    labels = np.arange(n) % c
    logits = g.normal(size=(n, c))
    logits[np.arange(n), labels] += strength
    return ClassifierOutputs(logits=logits, labels=labels)


def test_ranks_are_those_of_topk() -> None:
    o = outputs()
    order = torch.topk(torch.tensor(o.logits), 8).indices.numpy()
    expected = (order == o.labels[:, None]).argmax(axis=1)
    for ties in ("first", "recognised"):
        np.testing.assert_array_equal(z.ranks(o, ties=ties), expected)
    assert (z.ranks(outputs(seed=1)) != expected).any()


def test_ties_never_count_as_forgetting_and_never_as_skill() -> None:
    o = ClassifierOutputs(logits=[[2.0, 1, 2, 2], [2, 1, 2, 2], [1, 2, 0, 0]], labels=[3, 0, 0])
    assert z.ranks(o, ties="recognised").tolist() == [0, 0, 1]
    assert z.ranks(o, ties="first").tolist() == [2, 0, 1]
    np.testing.assert_array_equal(z.ranks(o) < 1, o.correct)
    flat = ClassifierOutputs(logits=np.zeros((16, 8)), labels=np.arange(16) % 8)
    assert z.zero_shot_top1(flat).value == 100 / 8
    assert z.forget_top1(flat).value == 100


def test_half_precision_ties_are_counted() -> None:
    logits = torch.tensor([[25.01, 25.0, 3.0]])
    full, half = (ClassifierOutputs(logits=x, labels=[1]) for x in (logits, logits.bfloat16()))
    assert z.forget_top1(full).value == 0
    assert z.forget_top1(half).value == 100


def test_none_of_few_images_is_at_most_15_percent() -> None:
    e = z.exact(0, 18)
    assert (e.value, e.low) == (0, 0)
    assert e.high == pytest.approx(15.3, abs=0.05)
    assert e.high == pytest.approx(100 * (1 - 0.05 ** (1 / 18)))
    assert 100 * wilson(0, 18)[1] == pytest.approx(17.6, abs=0.05)
    assert 100 * clopper_pearson(0, 18)[1] == pytest.approx(18.5, abs=0.05)
    assert z.exact(18, 18).low == pytest.approx(100 - e.high)
    assert z.exact(0, 180).high < 2


@pytest.mark.parametrize("k", [1, 3, 17])
def test_other_counts_have_the_two_sided_exact_interval(k: int) -> None:
    e, reference = z.exact(k, 18), binomtest(k, 18).proportion_ci(0.95, method="exact")
    assert (e.low, e.high) == (pytest.approx(100 * reference.low), pytest.approx(100 * reference.high))
    assert e.low != pytest.approx(proportion(k, 18).low, abs=1e-3)
    assert e.method == z.exact(0, 18).method  # reports of equal n stay comparable


@pytest.mark.parametrize("score", [z.forget_top5, z.zero_shot_top5])
def test_five_names_have_no_top_five(score) -> None:
    few, more = outputs(c=5), outputs(c=6)
    assert score(few).value is None
    assert "5 of 5 classes" in score(few).note
    assert score(more).value == pytest.approx(100 * (z.ranks(more) < 5).mean())


@pytest.mark.parametrize("score", [z.forget_top1, z.forget_top5, z.zero_shot_top1, z.macro_with, z.macro_without])
def test_nothing_measured_is_an_error(score) -> None:
    with pytest.raises(DataError, match="no samples"):
        score(outputs().take(np.arange(0)))


def test_macro_is_the_mean_over_classes() -> None:
    o = ClassifierOutputs(logits=[[1.0, 0, 0]] * 9 + [[0.0, 0, 1], [0, 1, 0]], labels=[0] * 9 + [1, 1])
    assert z.macro_without(o).value == 75
    assert z.zero_shot_top1(o).value == pytest.approx(100 * 10 / 11)
    one = o.take(np.arange(9))
    single, low = z.macro_without(one), wilson(9, 9)[0]
    assert (single.low, single.high) == (pytest.approx(100 * low), 100)


def test_the_interval_of_a_macro_mean() -> None:
    """Coverage by simulation: 20 classes of 15 images with fixed rates."""
    g = np.random.default_rng(0)
    rates = np.linspace(0.6, 1.0, 20)
    inside = narrower = 0
    for _ in range(200):
        hits = [g.random(15) < r for r in rates]
        e = z.mean_of_proportions(hits)
        inside += e.low <= 100 * rates.mean() <= e.high
        narrower += abs(e.value - 100 * rates.mean()) <= (e.high - e.low) / 8
    assert inside >= 190
    assert narrower < 150
    unequal = z.mean_of_proportions([np.ones(2), np.ones(200)])
    assert (unequal.low, unequal.high) == (pytest.approx(100 * wilson(8, 8)[0], abs=1), 100)
    with pytest.raises(DataError):
        z.mean_of_proportions([])


def test_batches_and_single_images_agree() -> None:
    o = outputs()
    single = [z.ranks(o.take(np.array([i])))[0] for i in range(len(o))]
    np.testing.assert_array_equal(z.ranks(o), single)
    assert len(set(single)) > 2


def test_cosines() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 5, generator=g), torch.randn(7, 5, generator=g)
    found = z.cosines(a, 4 * b)
    np.testing.assert_allclose(found, torch.cosine_similarity(a.double(), b.double()).numpy(), rtol=1e-12)
    assert abs(found - z.cosines(a, b.flip(0))).max() > 0.1
    e = z.paired_cosine(found)
    assert (e.value, e.n) == (pytest.approx(found.mean()), 7)
    assert e.low < e.value < e.high
    for bad in (torch.zeros(7, 5), torch.full((7, 5), float("nan"))):
        with pytest.raises(DataError, match="broken"):
            z.cosines(a, bad)
    with pytest.raises(DataError, match=r"\(3, 5\)"):
        z.cosines(a, b[:3])


def test_held_out_images_are_used() -> None:
    test, train = outputs(80, seed=1), outputs(60, seed=2, strength=9.0)
    lost, kept = test.labels == 2, test.labels != 2
    found = measure_zero_shot(
        {"test": test.take(np.flatnonzero(kept)), "forget_test": test.take(np.flatnonzero(lost)), "forget": train},
        forgotten=[2],
    )
    assert set(found) == set(NAMES)
    ranks = z.ranks(test)
    assert found["fa1"].value == pytest.approx(100 * (ranks[lost] < 1).mean())
    assert found["fa1"].n == 10
    assert found["zs_top1"].value == pytest.approx(100 * (ranks[kept] < 1).mean())
    rates = [100 * (ranks[test.labels == c] < 1).mean() for c in range(8)]
    assert found["zs_macro_all"].value == pytest.approx(np.mean(rates))
    assert found["zs_macro"].value == pytest.approx(np.mean(np.delete(rates, 2)))
    assert found["zs_macro"].value != found["zs_macro_all"].value
    assert found == measure_zero_shot({"test": test}, forgotten=[2])  # split by label when roles are not
    assert all(e.note == "" for k, e in found.items() if "macro" not in k)


def test_without_held_out_images_the_note_says_so() -> None:
    o = outputs()
    rows = [np.flatnonzero((o.labels == 2) == gone) for gone in (True, False)]
    found = measure_zero_shot({"forget": o.take(rows[0]), "retain": o.take(rows[1])}, forgotten=[2])
    assert all("training images" in e.note for e in found.values())
    only = measure_zero_shot({"test": o.take(rows[1])}, forgotten=[2])
    assert only["fa1"].value is None
    assert only["zs_macro_all"].value is None
    assert only["zs_top1"].ran


def test_other_axes_other_sets_and_captions() -> None:
    o, style = outputs(c=8), outputs(c=3, seed=5)
    by_role = {"test": style}
    found = measure_zero_shot(
        {"test": o},
        forgotten=[2],
        axes={"style": by_role},
        others={"digits": outputs(40, 4, seed=9), "letters": outputs(30, 5, seed=8)},
        pairs={"forget": np.array([0.1, 0.2]), "retain": np.array([0.3, 0.5])},
    )
    lost = o.labels == 2
    assert found["cross_axis"].value == pytest.approx(100 * style.correct[~lost].mean())
    assert found["cross_axis_forget"].value == pytest.approx(100 * style.correct[lost].mean())
    assert "style" in found["cross_axis"].note
    sets = [outputs(40, 4, seed=9), outputs(30, 5, seed=8)]
    assert found["zs_other"].value == pytest.approx(np.mean([100 * s.correct.mean() for s in sets]))
    assert "letters" in found["zs_other"].note
    assert (found["paired_cosine"].value, found["paired_cosine_retain"].value) == (pytest.approx(0.15), 0.4)
    two = z.cross_axis({"style": style, "object": o})
    assert two.value == pytest.approx(50 * (style.correct.mean() + o.correct.mean()))
    assert two.low < two.value < two.high


def test_what_does_not_fit_is_refused() -> None:
    o = outputs()
    with pytest.raises(DataError, match="did you mean"):
        measure_zero_shot({"tests": o}, forgotten=[2])
    with pytest.raises(DataError, match="forgotten class 8 of 8"):
        measure_zero_shot({"test": o}, forgotten=[8])
    with pytest.raises(DataError, match="59 of the 60 test images"):
        measure_zero_shot({"test": o}, forgotten=[2], axes={"style": {"test": outputs(59)}})
    with pytest.raises(DataError, match="same images"):
        z.cross_axis({"a": outputs(10), "b": outputs(11)})


def test_every_figure_is_registered() -> None:
    names = (*NAMES, "zs_other", "cross_axis", "cross_axis_forget", "paired_cosine", "paired_cosine_retain")
    entries = {e.name: e.obj for e in registry.list("metric")}
    assert set(names) <= set(entries)
    assert all(isinstance(entries[n], Metric) for n in names)
    assert (entries["fa1"].direction, entries["zs_top1"].direction) == ("lower", "higher")
