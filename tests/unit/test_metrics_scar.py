"""AUS, SCAR's attack, U-LiRA, relearn time and distances of predictions (invariants 17 and 19)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy, norm

from expunge import apply, revert
from expunge.bench_table import Cell, lines, markdown
from expunge.config.models import Evaluate
from expunge.digest import model_digest
from expunge.errors import ConfigError, DataError, NotComparableError
from expunge.evaluation import Candidate, evaluate
from expunge.loop import Loop
from expunge.method import build_recipe
from expunge.metrics import divergence, lira, scar_mia
from expunge.metrics.aus import aus, aus_error, aus_estimate, aus_published, aus_runs
from expunge.metrics.classifier import measure_classifier
from expunge.metrics.estimate import not_run, proportion
from expunge.metrics.lira import Lira, u_lira
from expunge.metrics.outputs import ClassifierOutputs
from expunge.metrics.probe import probed
from expunge.metrics.relearn import Relearn, relearn_steps
from expunge.recipe import Optim
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.tasks.classifier import ClassifierTask
from expunge.tasks.tiny import tiny_classifier

FRACTION = st.floats(0, 1)
#: Trains the tiny network in a quarter of a second.
TRAIN = {"lr": 0.05, "epochs": 3, "lr_schedule": "constant", "milestones": [], "norm": "train", "augment": False}


def softmax_rows(n: int, strength: float, seed: int, classes: int = 5) -> np.ndarray:
    """Softmax vectors whose first class gets ``strength`` more on average."""
    x = np.random.default_rng(seed).normal(size=(n, classes))
    x[:, 0] += strength
    return np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)


# --- AUS (invariant 17) ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "class_wise", "expected"),
    [
        ((0.7755, 0.7293, 0.02), True, 0.9351),
        ((0.7755, 0.7797, 0.0), True, 1.0042),
        ((0.7755, 0.7755, 0.775), True, 0.5634),
        ((0.8, 0.8, 0.8), False, 1.0),
    ],
)
def test_aus_golden(values: tuple[float, float, float], class_wise: bool, expected: float) -> None:
    assert float(aus(*values, class_wise=class_wise)) == pytest.approx(expected, abs=5e-5)
    assert float(aus(values[0], values[1] - 0.01, values[2], class_wise=class_wise)) < expected - 1e-3


@given(FRACTION, FRACTION, st.floats(0, 0.9), st.floats(0.01, 0.1))
def test_aus_falls_with_what_is_left_and_grows_with_what_is_kept(o: float, t: float, f: float, step: float) -> None:
    score = float(aus(o, t, f, class_wise=True))
    if score > 1e-6:
        assert float(aus(o, t, f + step, class_wise=True)) < score
    if t + step <= 1:
        assert float(aus(o, t + step, f, class_wise=True)) > score
    assert 0 <= score <= 2


def test_aus_refuses_percentages_and_missing_numbers() -> None:
    for values in ((77.55, 0.7, 0.0), (0.7, 0.7, -0.1), (0.7, float("nan"), 0.1)):
        with pytest.raises(DataError, match="fractions"):
            aus(*values, class_wise=True)


@pytest.mark.parametrize("class_wise", [True, False])
def test_aus_error_is_the_spread_of_noisy_inputs(class_wise: bool) -> None:
    rng = np.random.default_rng(1)
    centre, errors = (0.78, 0.73, 0.60), (0.002, 0.003, 0.004)
    drawn = [rng.normal(c, e, 40_000) for c, e in zip(centre, errors, strict=True)]
    spread = float(aus(*drawn, class_wise=class_wise).std())
    assert float(aus_error(*centre, errors, class_wise=class_wise)) == pytest.approx(spread, rel=0.02)
    if not class_wise:
        published = aus_error(*centre, errors, class_wise=False, variant="as_published")
        assert float(published) != pytest.approx(spread, rel=0.02)


def percent(value: float, n: int = 1000) -> object:
    return proportion(round(value * n), n)


def test_aus_of_a_report_uses_the_untouched_model() -> None:
    measured = {"ta": percent(0.729), "forget_test": percent(0.02), "ua": percent(0.98)}
    before = {"ta": percent(0.775)}
    got = aus_estimate(measured, before, True)
    assert got.value == pytest.approx(float(aus(0.775, 0.729, 0.02, class_wise=True)))
    assert got.low < got.value < got.high
    other = aus_estimate(measured, before, False)
    assert other.value == pytest.approx(float(aus(0.775, 0.729, 0.02, class_wise=False)))
    assert other.value != pytest.approx(got.value, abs=1e-3)
    plain = aus_estimate({k: e.to_dict() for k, e in measured.items()}, {"ta": before["ta"].to_dict()}, True)
    assert plain == got
    assert not aus_estimate({"ta": percent(0.7)}, before, True).ran
    assert not aus_estimate(measured, {"ta": not_run("no test samples")}, True).ran


def test_aus_of_runs_and_as_published() -> None:
    estimate, std = aus_runs([0.8, 0.8], [0.7, 0.6], [0.0, 0.0], class_wise=True)
    assert (estimate.value, std) == (pytest.approx(0.85), pytest.approx(0.1 / 2**0.5))
    with pytest.raises(DataError, match="two"):
        aus_runs([0.8], [0.7], [0.0], class_wise=True)
    score, _ = aus_published("cifar100", a_t=(0.7293, 0.0), a_f=(0.02, 0.0), class_wise=True)
    assert score == pytest.approx(0.9351, abs=5e-5)
    with pytest.raises(DataError, match="cifar100"):
        aus_published("mnist", a_t=(0.7, 0.0), a_f=(0.0, 0.0), class_wise=True)


# --- SCAR's attack (invariant 19) -----------------------------------------------------------------------------------


def test_attack_on_equal_distributions_guesses() -> None:
    values, n = [], 60
    for seed in range(6):
        sides = softmax_rows(n, 1.0, 2 * seed), softmax_rows(n, 1.0, 2 * seed + 1)
        values.append(scar_mia.scar_attack(*sides, seed=seed, repetitions=1)[0].balanced_accuracy)
    sigma = 0.5 / np.sqrt(6 * 2 * 18)
    assert abs(np.mean(values) - 0.5) < 3 * sigma


def test_published_attack_on_equal_distributions_does_not_guess() -> None:
    """The faults of the published protocol make chance look like an effect."""
    values = []
    for seed in range(6):
        sides = softmax_rows(180, 1.0, 2 * seed), softmax_rows(60, 1.0, 2 * seed + 1)
        values += [
            r.accuracy for r in scar_mia.scar_attack_published(*sides, class_wise=True, seed=seed, repetitions=1)
        ]
    assert np.mean(values) > 0.65


def test_attack_on_separable_sets_succeeds() -> None:
    sides = softmax_rows(60, 8.0, 0), softmax_rows(60, -8.0, 1)
    results = scar_mia.scar_attack(*sides, repetitions=2)
    assert scar_mia.mia_scar(results).value == pytest.approx(100, abs=3)
    assert scar_mia.mia_scar_auc(results).value == pytest.approx(1, abs=0.01)
    weaker = scar_mia.scar_attack(softmax_rows(60, 0.5, 0), softmax_rows(60, 0.0, 1), repetitions=2)
    assert scar_mia.mia_scar(weaker).value < 90


def test_attack_with_the_sides_exchanged_scores_the_same() -> None:
    a, b = softmax_rows(40, 1.5, 0), softmax_rows(40, 0.0, 1)
    first, second = scar_mia.attack(a, b, tolerance=1e-8), scar_mia.attack(b, a, tolerance=1e-8)
    assert first.balanced_accuracy == pytest.approx(second.balanced_accuracy)
    assert first.roc_auc.value == pytest.approx(second.roc_auc.value)
    assert first.balanced_accuracy > 0.6
    np.testing.assert_allclose(first.decision, -np.roll(second.decision, 12), atol=1e-5)


@pytest.mark.parametrize(("members", "nonmembers", "limit"), [(90, 30, None), (30, 90, None), (90, 80, 50)])
def test_attack_rows_are_balanced_and_disjoint(members: int, nonmembers: int, limit: int | None) -> None:
    rows = scar_mia.draw_sides(members, nonmembers, key=3, limit=limit)
    n = min(members, nonmembers, limit or 99)
    assert [len(r) for r in rows] == [n, n]
    assert all(len(np.unique(r)) == n for r in rows)
    again = scar_mia.draw_sides(members, nonmembers, key=4, limit=limit)
    assert not np.array_equal(rows[0], again[0])


def test_published_shuffle_puts_rows_on_both_sides_of_the_split() -> None:
    source = scar_mia.published_shuffle(150, 0)
    assert np.isin(source[120:], source[:120]).mean() > 0.2
    assert len(np.unique(source)) < 100


def test_attack_needs_equal_sides() -> None:
    with pytest.raises(DataError, match="as many"):
        scar_mia.attack(softmax_rows(30, 0, 0), softmax_rows(20, 0, 0))
    with pytest.raises(DataError, match="at least 9"):
        scar_mia.attack(softmax_rows(6, 0, 0), softmax_rows(6, 0, 0))


def role(n: int, strength: float, seed: int, label: int = 0, first: int = 0) -> ClassifierOutputs:
    rows = softmax_rows(n, strength, seed)
    return ClassifierOutputs(probs=rows, labels=np.full(n, label), ids=np.arange(first, first + n))


def test_attacks_are_chosen_by_name() -> None:
    outputs = {"forget": role(60, 3.0, 0), "retain": role(80, 3.0, 1, first=60), "test": role(70, 0.0, 2)}
    found = measure_classifier(outputs, attacks=("mia_scar", "mia_scar_published"))
    assert {"mia_scar", "mia_scar_auc", "mia_scar_published"} <= set(found)
    assert found["mia_scar"].value > 75
    assert found["mia_scar"].low < found["mia_scar"].value < found["mia_scar"].high
    assert "mia_scar" not in measure_classifier(outputs)
    of_class = {**outputs, "test": role(70, 0.0, 2, label=1)}
    assert "forget test" in measure_classifier(of_class, attacks=("mia_scar",), class_wise=True)["mia_scar"].note
    of_class["forget_test"] = role(60, -3.0, 5)
    assert measure_classifier(of_class, attacks=("mia_scar",), class_wise=True)["mia_scar"].value > 90


# --- distances between predictions ----------------------------------------------------------------------------------


def random_outputs(n: int, seed: int, scale: float = 2.0) -> ClassifierOutputs:
    rng = np.random.default_rng(seed)
    return ClassifierOutputs(logits=scale * rng.normal(size=(n, 4)), labels=np.arange(n) % 4, ids=np.arange(n))


def test_distances_agree_with_scipy() -> None:
    a, b = random_outputs(50, 0), random_outputs(50, 1)
    want = jensenshannon(a.prob, b.prob, axis=1, base=2)
    np.testing.assert_allclose(divergence.js_distances(a, b), want, atol=1e-9)
    np.testing.assert_allclose(divergence.kl_divergences(a, b), entropy(b.prob, a.prob, axis=1, base=2), atol=1e-9)
    assert not np.allclose(divergence.kl_divergences(b, a), divergence.kl_divergences(a, b), atol=1e-3)


def test_distance_of_a_model_to_itself_is_zero() -> None:
    a = random_outputs(30, 0)
    assert divergence.js_forget(a, a).value == pytest.approx(0, abs=1e-7)
    assert divergence.kl_forget(a, a).value == pytest.approx(0, abs=1e-12)
    assert divergence.js_forget(a, random_outputs(30, 1)).value > 0.1


@given(st.integers(0, 1000), st.floats(0, 300))
def test_distance_is_symmetric_and_at_most_one(seed: int, scale: float) -> None:
    a, b = random_outputs(5, seed, scale), random_outputs(5, seed + 1, scale)
    found = divergence.js_distances(a, b)
    assert ((found >= 0) & (found <= 1)).all()
    np.testing.assert_allclose(found, divergence.js_distances(b, a), atol=1e-7)
    assert np.isfinite(divergence.kl_divergences(a, b)).all()


def test_distance_of_disjoint_predictions_is_one_bit() -> None:
    a = ClassifierOutputs(probs=[[1.0, 0.0], [0.0, 1.0]], labels=[0, 1])
    b = ClassifierOutputs(probs=[[0.0, 1.0], [1.0, 0.0]], labels=[0, 1])
    np.testing.assert_array_equal(divergence.js_distances(a, b), [1.0, 1.0])
    found = divergence.kl_forget(a, b)
    assert not found.ran
    assert "2 samples" in found.note


def test_distance_needs_the_same_samples() -> None:
    a, b = random_outputs(30, 0), random_outputs(30, 1)
    moved = ClassifierOutputs(logits=b.logits, labels=b.labels, ids=b.ids + 1)
    for other in (random_outputs(20, 1), moved):
        with pytest.raises(NotComparableError):
            divergence.js_distances(a, other)


# --- U-LiRA -----------------------------------------------------------------------------------------------------------


def test_scaled_confidence() -> None:
    logits, labels = np.array([[2.0, 0.0, -1.0], [500.0, 0.0, 0.0]]), np.array([1, 0])
    p = np.exp(logits[0]) / np.exp(logits[0]).sum()
    got = lira.scaled_confidence(torch.tensor(logits), torch.tensor(labels))
    assert got[0] == pytest.approx(np.log(p[1] / (1 - p[1])))
    assert got[1] == pytest.approx(500 - np.log(2))


def test_log_ratio_is_that_of_the_fitted_gaussians() -> None:
    rng = np.random.default_rng(0)
    a, b, x = rng.normal(1, 2, (6, 3)), rng.normal(0, 1, (5, 3)), rng.normal(size=3)
    fits = [(s.mean(axis=0), np.sqrt(s.var(axis=0, ddof=1))) for s in (a, b)]
    want = norm.logpdf(x, *fits[0]) - norm.logpdf(x, *fits[1])
    np.testing.assert_allclose(lira.log_ratio(a, b, x, variance="per_sample"), want)
    pooled = lira.log_ratio(a, b, x)
    assert not np.allclose(pooled, want)
    np.testing.assert_allclose(pooled, lira.log_ratio(a, b, x, variance="pooled"))
    with pytest.raises(DataError, match="two"):
        lira.log_ratio(a[:1], b, x)
    with pytest.raises(DataError, match="do not differ"):
        lira.log_ratio(np.ones((4, 3)), b, x)


def test_lira_on_equal_distributions_guesses_and_order_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    shape = (8, 800)
    a, b = rng.normal(size=shape), rng.normal(size=shape)
    found = lira.lira(*lira.held_out_ratios(a, b))
    sigma = 50 / np.sqrt(shape[0] * shape[1])
    assert abs(found.value - 50) < 3 * sigma
    assert lira.lira_auc(*lira.held_out_ratios(a, b)).value == pytest.approx(0.5, abs=0.03)
    apart = b + 6
    one, other = (lira.lira(*lira.held_out_ratios(*s)).value for s in ((a, apart), (apart, a)))
    assert one == pytest.approx(other)
    assert one > 99
    assert lira.lira_auc(*lira.held_out_ratios(a, apart)).value > 0.99


def test_lira_interval_holds_chance_when_whole_models_vary() -> None:
    """All samples of one model move together; the interval must know that there are few models."""
    rng = np.random.default_rng(0)
    kept = {"half": 0, "one out": 0}
    for _ in range(100):
        a, b = (rng.normal(size=(8, 1)) + 0.3 * rng.normal(size=(8, 30)) for _ in range(2))
        honest = lira.lira(*lira.held_out_ratios(a, b))
        rest = [np.arange(8) != k for k in range(8)]
        one_out = lira.lira(*(np.stack([lira.log_ratio(a[r], b[r], s[~r][0]) for r in rest]) for s in (a, b)))
        kept["half"] += honest.low <= 50 <= honest.high
        kept["one out"] += one_out.low <= 50 <= one_out.high
    assert kept["half"] >= 90
    assert kept["one out"] < 90


@pytest.fixture(scope="module")
def task() -> ClassifierTask:
    return tiny_classifier()


CLASS = ForgetRequest.label(1)
ASCENT = build_recipe(
    {"method": "gradient_ascent", "batch_size": 16, "optim": {"lr": 0.01, "epochs": 2, "augment": False}}
)


def shadowed(task: ClassifierTask, **settings: object) -> lira.LiraResult:
    settings = {"train": Optim(**TRAIN), "batch_size": 32, "shadows": 4, **settings}
    return u_lira(task, CLASS, ASCENT, **settings)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lira")


def test_u_lira_trains_once_and_leaves_the_model_alone(
    task: ClassifierTask, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPUNGE_CACHE", str(cache))
    before, state = model_digest(task.model), torch.get_rng_state()
    patch = unlearn(task, CLASS, ASCENT)
    seen: list[tuple[int, int]] = []
    first = shadowed(task, patch=patch, on_shadow=lambda k, n: seen.append((k, n)))
    assert seen == [(k, 4) for k in range(4)]
    assert first.unlearned.shape == first.unseen.shape == (4, 40)
    assert set(first.metrics) == {"lira", "lira_auc", "lira_forget"}
    assert all(e.ran for e in first.metrics.values())
    assert len(list((cache / "lira").glob("*/patch.safetensors"))) == 12
    assert model_digest(task.model) == before
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(Loop, "run", lambda *a, **k: pytest.fail("a shadow was trained again"))
    again = shadowed(task, patch=patch)
    np.testing.assert_array_equal(first.unlearned, again.unlearned)
    np.testing.assert_array_equal(first.unseen, again.unseen)
    assert first.metrics == again.metrics
    with pytest.raises(pytest.fail.Exception, match="trained again"):  # another training is another model
        shadowed(task, train=Optim(**{**TRAIN, "lr": 0.04}))


def test_other_recipes_share_the_trained_shadows(
    task: ClassifierTask, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPUNGE_CACHE", str(cache))
    shadowed(task)
    before = len(list((cache / "lira").iterdir()))
    gentle = ASCENT.replace(optim={"lr": 1e-3, "epochs": 1})
    u_lira(task, CLASS, gentle, train=Optim(**TRAIN), batch_size=32, shadows=4)
    assert len(list((cache / "lira").iterdir())) == before + 4


def test_u_lira_with_given_models(task: ClassifierTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expunge.models.weights import save_weights

    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    given = []
    for k in range(4):
        pair = []
        for kind in (0, 1):
            path = tmp_path / f"{k}{kind}.safetensors"
            other = tiny_classifier(0, steps=0)
            with torch.no_grad():
                for p in other.model.parameters():
                    p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * k + kind)))
            save_weights(other.model, path)
            pair.append(path)
        given.append(tuple(pair))
    found = shadowed(task, given=given)
    assert found.metrics["lira"].n == 2
    other = tiny_classifier(0, steps=0)
    from expunge.models.weights import load_weights

    load_weights(other.model, given[1][1])
    want = lira.scaled_confidence(*other.logits("forget", other.split(CLASS)))
    np.testing.assert_allclose(found.unseen[1], want)
    assert not np.allclose(found.unseen[0], want)
    with pytest.raises(ConfigError, match="at least 4"):
        shadowed(task, given=given[:2])


# --- relearn time, and all of it in a report ------------------------------------------------------------------------


def test_relearning_counts_steps_and_leaves_the_model_alone(task: ClassifierTask) -> None:
    split, before = task.split(CLASS), model_digest(task.model)
    patch = unlearn(task, CLASS, ASCENT)
    settings = Relearn(batch_size=16, optim={"lr": 0.02})
    found = relearn_steps(task, split, patch, settings)
    assert model_digest(task.model) == before
    assert found.unit == "steps"
    assert found.value >= 1
    assert relearn_steps(task, split, patch, settings) == found
    assert relearn_steps(task, split, None, settings).value == 0
    slower = relearn_steps(task, split, patch, Relearn(batch_size=16, optim={"lr": 0.001}))
    assert slower.value > found.value
    coarse = relearn_steps(task, split, patch, Relearn(batch_size=16, optim={"lr": 0.02}, every=1000))
    assert coarse.value == 60  # looked at the end only
    apply(task.model, patch)
    revert(task.model, patch)
    assert model_digest(task.model) == before


def test_relearning_that_does_not_succeed_says_so(task: ClassifierTask) -> None:
    patch = unlearn(task, CLASS, ASCENT)
    found = relearn_steps(task, task.split(CLASS), patch, Relearn(optim={"lr": 0.0, "epochs": 2}))
    assert not found.ran
    assert "not back after 2 steps" in found.note


def test_a_probe_that_fails_gives_its_reason(task: ClassifierTask) -> None:
    patch = unlearn(task, CLASS, ASCENT)
    broken = Relearn(optim={"lr": 1e30, "weight_decay": 1e30})
    found = probed(task, CLASS, patch, [broken])
    assert not found["relearn_steps"].ran
    assert probed(task, CLASS, patch, []) == {}


def test_report_has_every_figure(task: ClassifierTask, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_CACHE", str(cache))
    patch = unlearn(task, CLASS, ASCENT)
    retrained = unlearn(
        task, CLASS, build_recipe({"method": "retrain", "batch_size": 32, "optim": {**TRAIN, "epochs": 10}})
    )
    wanted = Evaluate(
        lira=Lira(shadows=4, optim=TRAIN, batch_size=32), relearn=Relearn(batch_size=16, optim={"lr": 0.02})
    )
    candidates = [
        Candidate("after", patch),
        Candidate("lr = 0", patch, "control"),
        Candidate("retrained", retrained, "reference"),
    ]
    report = evaluate(task, CLASS, candidates, attacks=("mia",), probes=wanted.probes())
    after, oracle, control = (report.row(r) for r in ("after", "reference", "control"))
    assert report.row("before").metrics["aus"].value == pytest.approx(0.5, abs=0.1)
    fractions = [m[k].value / 100 for m, k in ((report.row("before").metrics, "ta"), (after.metrics, "ta"))]
    left = after.metrics["forget_test"].value / 100
    assert after.metrics["aus"].value == pytest.approx(float(aus(*fractions, left, class_wise=True)))
    assert oracle.metrics["aus"].value > 0.9
    assert oracle.metrics["relearn_steps"].value > after.metrics["relearn_steps"].value
    new = {"aus", "avg_gap", "js_forget", "js_test", "kl_forget", "kl_test", "relearn_steps", "lira", "lira_auc"}
    assert new | {"lira_forget"} <= set(after.metrics)
    assert {"js_forget", "lira"}.isdisjoint(oracle.metrics)
    assert {"aus", "relearn_steps"} <= set(oracle.metrics)
    assert {"relearn_steps", "lira"}.isdisjoint(control.metrics)
    assert 0 < after.metrics["js_forget"].value <= 1
    assert not any("relearning" in limit for limit in report.not_shown)
    assert all(report.definitions[m]["explain"] for m in new)
    plain = evaluate(task, CLASS, [Candidate("after", patch)], attacks=("mia",))
    assert any("relearning" in limit for limit in plain.not_shown)
    assert {"js_forget", "relearn_steps", "lira"}.isdisjoint(plain.row("after").metrics)


def test_table_has_a_column_for_the_score() -> None:
    cell = Cell("a", "after", "r", 0, "cells/a", {"aus": {"value": 0.9351}})
    assert "AUS" in markdown(lines([cell]), "t", "0" * 64)
    assert "AUS" not in markdown(lines([Cell("a", "after", "r", 0, "cells/a")]), "t", "0" * 64)


def test_evaluations_from_a_configuration() -> None:
    given = Evaluate(lira={"shadows": 4, "optim": {"epochs": 2}}, relearn={})
    assert given.lira.build_optim().epochs == 2
    assert [type(p) for p in given.probes()] == [Relearn, Lira]
    assert Evaluate().probes() == ()
    for bad in ({"lira": {"shadows": 3}}, {"relearn": {"steps": 3}}, {"lyra": {}}):
        with pytest.raises((ConfigError, ValueError)):
            Evaluate(**bad)
