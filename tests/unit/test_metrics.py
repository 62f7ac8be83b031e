"""Metrics against independent references, and the invariants of the specification (26 to 30)."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.errors import ArtifactError, ConfigError, DataError, NotComparableError
from expunge.metrics import accuracy, cost, deepdive, membership, threshold
from expunge.metrics.classifier import measure_classifier, warnings_for
from expunge.metrics.describe import Metric, metric
from expunge.metrics.estimate import Estimate, bootstrap, mean, not_run, proportion
from expunge.metrics.mia import attack_scores, condense, fit_svc, svc_mia, svc_rule, tabulate
from expunge.metrics.outputs import ClassifierOutputs
from expunge.registry import Info, registry

RNG = np.random.default_rng(0)


def from_confidence(p: np.ndarray, classes: int = 3, ids: np.ndarray | None = None) -> ClassifierOutputs:
    """Outputs with class 0 true, probability p, and the rest shared equally."""
    rest = np.repeat(((1 - p) / (classes - 1))[:, None], classes - 1, axis=1)
    return ClassifierOutputs(probs=np.column_stack([p, rest]), labels=np.zeros(len(p), int), ids=ids)


def random_outputs(n: int, strength: float, *, seed: int, first_id: int = 0, classes: int = 5) -> ClassifierOutputs:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += rng.normal(strength, 0.4 * strength + 1e-9, n)
    return ClassifierOutputs(logits=logits, labels=labels, ids=np.arange(first_id, first_id + n))


# --- estimates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 7), (12, 500), (250, 500), (500, 500)])
@pytest.mark.parametrize(("interval", "reference"), [("wilson", "wilson"), ("clopper_pearson", "exact")])
def test_proportion_intervals(k: int, n: int, interval: str, reference: str) -> None:
    got = proportion(k, n, interval=interval)
    expected = scipy.stats.binomtest(k, n).proportion_ci(method=reference)
    assert got.value == pytest.approx(100 * k / n)
    assert (got.low, got.high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-7)


def test_intervals_differ_between_methods() -> None:
    assert proportion(12, 500).low != pytest.approx(proportion(12, 500, interval="clopper_pearson").low, abs=1e-3)


def test_mean_uses_students_t() -> None:
    x = [1.0, 2.0, 4.0, 4.5]
    low, high = scipy.stats.t.interval(0.95, 3, loc=np.mean(x), scale=scipy.stats.sem(x))
    got = mean(x, unit="points")
    assert (got.value, got.low, got.high) == pytest.approx((2.875, low, high))


def test_several_runs_average_and_one_run_has_no_interval() -> None:
    """Invariant 30."""
    assert mean([3.0, 5.0, 10.0]).value == 6.0
    single = mean([3.0])
    assert (single.value, single.low, single.high) == (3.0, None, None)
    assert "no interval" in single.method


def test_estimate_text_and_dict() -> None:
    e = Estimate(12.3, 10.1, 14.8, 500, "%", "m", "note")
    assert str(e) == "12.3 % [10.1, 14.8], n=500"
    assert Estimate.from_dict(e.to_dict()) == e
    assert str(not_run("no test set")) == "not run (no test set)"
    assert Estimate.from_dict(not_run("why").to_dict()).value is None


@pytest.mark.parametrize(
    "bad",
    [
        {"value": float("nan")},
        {"value": None},
        {"value": None, "low": 0.0, "high": 1.0, "note": "x"},
        {"value": 1.0, "low": 0.0},
        {"value": 3.0, "low": 0.0, "high": 1.0},
        {"value": 1.0, "n": -1},
    ],
)
def test_estimates_that_say_nothing_are_refused(bad: dict) -> None:
    with pytest.raises(DataError):
        Estimate(**bad)


@pytest.mark.parametrize("bad", [{"value": 1.0, "colour": 2}, {"low": 1.0}, {"value": "much"}])
def test_broken_dicts_are_refused(bad: dict) -> None:
    with pytest.raises(ArtifactError):
        Estimate.from_dict(bad)


def test_bootstrap_has_its_own_generator() -> None:
    x = RNG.normal(size=200)
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    a, b, c = (bootstrap(np.mean, x, seed=s) for s in (1, 1, 2))
    assert (np.random.get_state()[1] == before).all()
    assert a == b
    assert a != c
    half = 1.96 * x.std() / np.sqrt(len(x))
    assert (a.high - a.low) / 2 == pytest.approx(half, rel=0.15)


# --- accuracy -------------------------------------------------------------------------------------------------------


def test_unlearning_accuracy_complements_accuracy() -> None:
    """Invariant 28."""
    out = random_outputs(77, 1.0, seed=1)
    assert accuracy.unlearning_accuracy(out).value + accuracy.accuracy(out).value == pytest.approx(100)


def test_per_class_accuracy_counts_each_class() -> None:
    out = random_outputs(300, 1.0, seed=2)
    found = accuracy.per_class_accuracy(out)
    for c, e in found.items():
        mine = [int(row.argmax()) == c for row, y in zip(out.logits, out.labels, strict=True) if y == c]
        assert (e.value, e.n) == (pytest.approx(100 * sum(mine) / len(mine)), len(mine))
    only = ClassifierOutputs(logits=out.logits[out.labels == 1], labels=out.labels[out.labels == 1])
    assert set(accuracy.per_class_accuracy(only)) == {1}


def test_average_gap() -> None:
    """Invariant 26."""
    a = {"ua": 2.85, "ra": 99.62, "ta": 93.93, "mia": 14.39}
    b = {"ua": 5.24, "ra": 100.0, "ta": 94.26, "mia": 12.88}
    assert accuracy.avg_gap(a, a) == 0
    assert accuracy.avg_gap(a, b) == accuracy.avg_gap(b, a) == pytest.approx(1.1525)
    assert round(accuracy.avg_gap(a, b), 2) == 1.15
    with pytest.raises(NotComparableError, match="mia"):
        accuracy.avg_gap({k: a[k] for k in ("ua", "ra", "ta")}, b)


def test_gap_of_means_and_mean_of_gaps_differ_when_runs_scatter() -> None:
    a, b = [{"ua": 0.0}, {"ua": 10.0}], [{"ua": 5.0}, {"ua": 5.0}]
    assert accuracy.avg_gap(a, b, ["ua"]) == 0
    assert accuracy.seed_gap(a, b, ["ua"]).value == 5
    with pytest.raises(NotComparableError):
        accuracy.seed_gap(a, b[:1], ["ua"])


# --- membership -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("forget", "expected"), [(0.01, 100.0), (0.99, 0.0)])
@pytest.mark.parametrize("attack", [membership.mia, membership.mia_svc, membership.mia_threshold])
def test_clear_cases(attack, forget: float, expected: float) -> None:
    """Invariant 27."""
    sets = membership.AttackSets(np.full(60, 0.99), np.full(60, 0.01), np.full(50, forget))
    assert attack(sets).value == expected


def test_tabulated_rule_is_the_classifier() -> None:
    """Invariant 29, on a case where the classifier has more than one cut."""
    members, others, targets = RNG.beta(8, 1, 300), RNG.beta(1.5, 1, 300), RNG.random(2000)
    svc = fit_svc(members, others)
    rule = tabulate(lambda x: svc.decision_function(x[:, None]))
    np.testing.assert_array_equal(rule.predict(targets), svc.predict(targets[:, None]).astype(bool))
    assert len(rule.cuts) >= 1
    wrong = type(rule)(rule.cuts + 0.02, rule.first)
    assert (wrong.predict(targets) != svc.predict(targets[:, None]).astype(bool)).any()


def test_binned_classifier_gives_the_same_figure() -> None:
    rng = np.random.default_rng(5)
    sets = membership.AttackSets(*(1 / (1 + np.exp(-rng.normal(m, 2.0, 1500))) for m in (5, 3, 4)))
    full, fast = membership.mia_svc(sets), membership.mia(sets)
    assert full.low <= fast.value <= full.high
    assert abs(full.value - fast.value) < 1.0
    best = membership.mia_threshold(sets)
    assert not full.low <= best.value <= full.high  # another attack: near 1 it sees what the kernel smooths over


def test_condensing_keeps_mass_and_mean() -> None:
    x = RNG.random(1003)
    centres, counts = condense(x, 64)
    assert counts.sum() == 1003
    assert (centres * counts).sum() == pytest.approx(x.sum())
    np.testing.assert_array_equal(condense(x[:50], 64)[0], np.sort(x[:50]))


def brute_force(members: np.ndarray, nonmembers: np.ndarray) -> float:
    cuts = [*np.unique(np.concatenate([members, nonmembers])), np.inf]
    return max(0.5 * ((members >= t).mean() + (nonmembers < t).mean()) for t in cuts)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=25),
    st.lists(st.integers(0, 12), min_size=1, max_size=25),
)
def test_best_threshold_is_the_best(a: list[int], b: list[int]) -> None:
    members, nonmembers = np.array(a) / 12, np.array(b) / 12
    rule = threshold.best_threshold(members, nonmembers)
    reached = 0.5 * (rule.predict(members).mean() + (~rule.predict(nonmembers)).mean())
    assert reached == pytest.approx(brute_force(members, nonmembers), abs=1e-12)
    assert rule.balanced_accuracy == pytest.approx(reached, abs=1e-12)


def test_threshold_between_adjacent_floats_separates_them() -> None:
    low = 0.3
    rule = threshold.best_threshold(np.array([np.nextafter(low, 1)]), np.array([low]))
    assert rule.balanced_accuracy == 1.0
    assert not rule.predict(np.array([low]))[0]


def test_threshold_interval_covers_the_choice_of_threshold() -> None:
    rng = np.random.default_rng(1)
    members, others, forget = rng.beta(3, 1, 400), rng.beta(2, 1, 400), rng.beta(2.5, 1, 2000)
    got = threshold.threshold_efficacy(members, others, forget, seed=1)
    alone = proportion(round(got.value * 20), 2000)
    assert got.high - got.low > 2 * (alone.high - alone.low)
    assert got == threshold.threshold_efficacy(members, others, forget, seed=1)
    assert got.low != threshold.threshold_efficacy(members, others, forget, seed=2).low


def test_auc_matches_reference_and_extremes() -> None:
    from sklearn.metrics import roc_auc_score

    a, b = np.round(RNG.beta(3, 1, 200), 2), np.round(RNG.beta(2, 1, 150), 2)
    truth = np.r_[np.ones(200), np.zeros(150)]
    assert membership.auc(a, b).value == pytest.approx(roc_auc_score(truth, np.r_[a, b]))
    perfect, worst = membership.auc(a + 2, b), membership.auc(b - 2, a)
    assert (perfect.value, perfect.high, worst.value, worst.low) == (1.0, 1.0, 0.0, 0.0)
    assert 0.9 < perfect.low < 1
    assert 0 < worst.high < 0.1


def test_a_random_attacker_is_seen_as_random() -> None:
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        e = membership.auc(rng.random(80), rng.random(120))
        hits += e.low <= 0.5 <= e.high
    assert 0.90 <= hits / 200 <= 0.995


def test_modified_entropy_by_hand() -> None:
    p = np.array([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0]])
    got = attack_scores(ClassifierOutputs(probs=p, labels=[0, 1]))["m_entropy"]
    expected = -(0.3 * np.log(0.7) + 0.2 * np.log(0.8) + 0.1 * np.log(0.9))
    np.testing.assert_allclose(got, [expected, 0.0], atol=1e-15)


def test_published_modified_entropy_depends_on_the_other_samples() -> None:
    """The defect is kept in the published variant and absent from the intended one."""
    p = RNG.dirichlet(np.ones(3), 2)
    for variant, same in (("as_published", False), ("as_intended", True)):
        alone = attack_scores(ClassifierOutputs(probs=p[:1], labels=[0]), variant)["m_entropy"][0]
        with_other = attack_scores(ClassifierOutputs(probs=p, labels=[0, 2]), variant)["m_entropy"][0]
        assert bool(alone == with_other) is same


def test_svc_attack_averages_over_both_targets() -> None:
    train, test = from_confidence(RNG.beta(9, 1, 60)), from_confidence(RNG.beta(1, 1, 60))
    forget, known = from_confidence(RNG.beta(3, 1, 40)), from_confidence(RNG.beta(9, 1, 40))
    one = svc_mia(train, test, forget, features=("confidence",))["confidence"]
    both = svc_mia(train, test, forget, known, features=("confidence",))["confidence"]
    assert both.score == pytest.approx((one.score + both.predicted["target_train"].mean()) / 2)


def test_sets_are_balanced_disjoint_and_large_enough() -> None:
    x = RNG.random(500)
    sets = membership.attack_sets(x, x[:120], x[:60], seed=1)
    assert (len(sets.members), len(sets.nonmembers)) == (120, 120)
    again, other = (membership.attack_sets(x, x[:120], x[:60], seed=s).members for s in (1, 2))
    np.testing.assert_array_equal(sets.members, again)
    assert (sets.members != other).any()
    with pytest.raises(DataError, match="at least 50"):
        membership.attack_sets(x, x[:49], x[:60])
    with pytest.raises(DataError, match="3 forget samples"):
        membership.attack_sets(x, x, x[:60], member_ids=np.arange(500), forget_ids=np.arange(497, 557))


def test_empty_sides_are_refused() -> None:
    for call in (fit_svc, threshold.best_threshold, membership.auc, svc_rule):
        with pytest.raises(DataError):
            call(np.array([]), np.array([0.5]))


# --- all metrics of a classifier ------------------------------------------------------------------------------------


def good_model(forget: float, *, seed: int = 0) -> dict[str, ClassifierOutputs]:
    return {
        "forget": random_outputs(200, forget, seed=seed + 1),
        "retain": random_outputs(600, 9.0, seed=seed + 2, first_id=200),
        "test": random_outputs(400, 4.0, seed=seed + 3),
    }


def test_measure_classifier() -> None:
    outputs = good_model(4.0)
    found = measure_classifier(outputs, attacks=("mia", "mia_svc", "mia_threshold"))
    assert set(found) == {"ua", "ra", "ta", "mia", "mia_svc", "mia_threshold", "attack_auc", "forget_auc"}
    assert found["ra"].value == pytest.approx(100 * outputs["retain"].correct.mean())
    assert found["forget_auc"].low <= 0.5 <= found["forget_auc"].high
    assert found["attack_auc"].low > 0.6
    assert all(e.n and e.method for e in found.values())
    known = measure_classifier(good_model(9.0))
    assert known["mia"].value < found["mia"].value
    assert known["forget_auc"].low > 0.6


def test_what_cannot_be_measured_says_why() -> None:
    outputs = good_model(4.0)
    alone = measure_classifier({"forget": outputs["forget"]})
    assert alone["ua"].ran
    assert not alone["ra"].ran
    assert "kept and test" in alone["mia"].note
    few = measure_classifier({**outputs, "forget": outputs["forget"].take(np.arange(20))})
    assert few["ua"].n == 20
    assert few["mia"].value is None
    assert "20 forget samples" in few["mia"].note


def test_roles_and_overlaps_are_checked() -> None:
    outputs = good_model(4.0)
    with pytest.raises(DataError, match="did you mean 'forget'"):
        measure_classifier({"forgot": outputs["forget"]})
    with pytest.raises(DataError, match="nothing can be said"):
        measure_classifier({"test": outputs["test"]})
    with pytest.raises(DataError, match="both forgotten and kept"):
        measure_classifier({**outputs, "retain": random_outputs(600, 9.0, seed=9, first_id=150)})


def test_class_requests_keep_the_class_out_of_the_test_set() -> None:
    outputs = good_model(4.0)
    is_zero = {k: v.labels == 0 for k, v in outputs.items()}
    split = {
        "forget": outputs["retain"].take(is_zero["retain"]),
        "retain": outputs["retain"].take(~is_zero["retain"]),
        "test": outputs["test"].take(~is_zero["test"]),
        "forget_test": outputs["test"].take(is_zero["test"]),
    }
    found = measure_classifier(split, class_wise=True)
    assert found["forget_test"].n == is_zero["test"].sum()
    assert "retrained" in found["mia"].note
    assert "left out" in found["ta"].note
    with pytest.raises(DataError, match="forget_test"):
        measure_classifier({**split, "test": outputs["test"]}, class_wise=True)


def test_outputs_are_checked() -> None:
    ok = np.array([[0.2, 0.8]])
    for bad in (
        {"logits": ok, "probs": ok, "labels": [0]},
        {"labels": [0]},
        {"logits": ok, "labels": [2]},
        {"logits": ok, "labels": [0, 1]},
        {"logits": ok * np.nan, "labels": [0]},
        {"probs": ok * 2, "labels": [0]},
        {"logits": np.zeros((2, 2)), "labels": [0, 1], "ids": [5, 5]},
    ):
        with pytest.raises(DataError):
            ClassifierOutputs(**bad)


def test_torch_outputs_of_any_float_type() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    want = ClassifierOutputs(logits=logits.numpy(), labels=[1, 0])
    got = ClassifierOutputs(logits=logits.bfloat16().requires_grad_(), labels=torch.tensor([1, 0]))
    np.testing.assert_allclose(got.confidence, want.confidence)
    reference = torch.nn.functional.cross_entropy(logits.double(), torch.tensor([1, 0]), reduction="none")
    np.testing.assert_allclose(want.losses, reference.numpy(), rtol=1e-12)


# --- warnings (case 24) ---------------------------------------------------------------------------------------------


def test_a_sound_result_raises_no_warning() -> None:
    outputs = good_model(4.0)
    found = measure_classifier(outputs)
    reference = measure_classifier(good_model(4.0, seed=50))
    before = measure_classifier(good_model(9.0))
    assert warnings_for(outputs, found, before=before, reference=reference) == []
    assert warnings_for(outputs, found, before=before) == []


def test_over_forgetting_is_flagged_with_and_without_reference() -> None:
    outputs = good_model(0.1)
    found = measure_classifier(outputs)
    assert found["forget_auc"].high < 0.4
    reference = measure_classifier(good_model(4.0, seed=50))
    assert any(w.startswith("Over-forgetting") for w in warnings_for(outputs, found, reference=reference))
    assert any(w.startswith("Over-forgetting") for w in warnings_for(outputs, found))
    assert not any(w.startswith("Over-forgetting") for w in warnings_for(outputs, found, class_wise=True))
    assert warnings_for(outputs, found, class_wise=True)


def test_what_is_still_known_is_flagged() -> None:
    outputs = good_model(9.0)
    found = measure_classifier(outputs)
    reference = measure_classifier(good_model(4.0, seed=50))
    assert any(w.startswith("Not fully forgotten") for w in warnings_for(outputs, found, reference=reference))
    assert any("still get more confidence" in w for w in warnings_for(outputs, found))


def test_broken_unchanged_and_weakly_attacked_models_are_flagged() -> None:
    outputs = good_model(4.0)
    found = measure_classifier(outputs)
    assert any("no visible effect" in w for w in warnings_for(outputs, found, before=found))
    constant = {k: ClassifierOutputs(logits=np.tile([0, 0, 1.0, 0, 0], (len(v), 1)), labels=v.labels, ids=v.ids)
                for k, v in outputs.items()}  # fmt: skip
    broken = warnings_for(constant, measure_classifier(constant))
    assert any("broken" in w for w in broken)
    assert any("close to guessing" in w for w in broken)


# --- cost, forest attack, registry ----------------------------------------------------------------------------------


def test_weight_changes_are_counted_bit_by_bit(tmp_path) -> None:
    before = {"a": torch.tensor([1.0, 0.0, 2.0]), "b": torch.zeros(5, dtype=torch.int64)}
    after = {"a": torch.tensor([1.0, -0.0, 3.0]), "b": torch.zeros(5, dtype=torch.int64)}
    got = cost.weights_changed(before, after)
    assert (got.value, got.n, got.low) == (25.0, 8, None)
    assert cost.weights_changed(before, before).value == 0
    change = {c.name: c for c in cost.layer_changes(before, after)}
    assert change["a"].relative == pytest.approx(1 / np.sqrt(5))
    assert change["b"].relative is None
    with pytest.raises(ArtifactError, match="only one"):
        cost.weights_changed(before, {"a": after["a"]})
    with pytest.raises(ArtifactError, match="a is"):
        cost.weights_changed(before, {**after, "a": torch.zeros(4)})
    (tmp_path / "p").write_bytes(b"12345")
    assert cost.patch_bytes(tmp_path / "p").value == 5
    with pytest.raises(ArtifactError):
        cost.patch_bytes(tmp_path / "absent")
    assert cost.run_time(2.0, preparation=1.0).value == 3.0


def test_deepdive_accumulator_is_only_in_the_published_variant() -> None:
    outputs = {
        k: random_outputs(n, 1.0, seed=n) for k, n in (("test", 30), ("forget", 20), ("retain", 40), ("val", 25))
    }
    plain = deepdive.evaluate(outputs)
    published = deepdive.evaluate(outputs, variant="as_published", batch_size=8)
    assert plain.accuracy["test"] == published.accuracy["test"]
    assert published.accuracy["forget"] == pytest.approx(plain.accuracy["forget"] + plain.accuracy["test"] / 20)
    assert plain.accuracy["forget"] != published.accuracy["forget"]
    with pytest.raises(DataError, match="forget"):
        deepdive.evaluate({**outputs, "forget": outputs["forget"].take(np.arange(0))})


def test_registered_metrics_describe_themselves() -> None:
    entries = registry.list("metric")
    assert {"ua", "ra", "ta", "mia", "mia_svc", "mia_threshold", "avg_gap", "forget_auc"} <= {e.name for e in entries}
    for e in entries:
        assert isinstance(e.obj, Metric)
        assert e.obj.explain.endswith(".")
        low, high = e.obj.bounds
        assert low is None or high is None or low < high
    assert registry.get("metric", "avg_gap").obj({"ua": 1.0}, {"ua": 3.0}, ["ua"]) == 2.0


def test_a_taken_metric_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="already registered"):
        metric("ua", Info("another"), label="x", explain="x.")(lambda: None)
