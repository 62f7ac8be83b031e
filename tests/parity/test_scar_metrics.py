"""Golden numbers of SCAR's score and membership attack: all files, all expected tensors, their tolerances."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from expunge.metrics import scar_mia
from expunge.metrics.aus import PUBLISHED_ORIGINAL, aus, aus_error, aus_published, aus_runs

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("EXPUNGE_SHARED", ROOT.parent / "shared")) / "parity" / "scar"
FOLDER = SHARED if SHARED.is_dir() else Path(__file__).parent / "data" / "scar"
SCORES = ("accuracy", "chance", "accuracy_label0", "accuracy_label1")
SCORES += ("precision_micro", "recall_micro", "f1_micro", "mutual_information_bits")


def cases(method: str, *variants: str) -> list:
    found = []
    for p in sorted(FOLDER.glob("*.json")):
        meta = json.loads(p.read_text())
        if meta["method"] == method and (not variants or meta["variant"] in variants):
            found.append(pytest.param(p, id=p.stem))
    assert found, f"no golden files for {method} {variants} in {FOLDER}"
    return found


class Golden:
    """A file whose expected tensors are each compared once, all of them."""

    def __init__(self, path: Path) -> None:
        self.meta = json.loads(path.read_text())
        self.t = load_file(path.with_suffix(".safetensors"))
        self.open = {k for k in self.t if k.startswith("expected")}
        self.tol = self.meta["tolerance"]["float64"]["values"]

    def check(self, name: str, got: object) -> None:
        key = f"expected.{name}"
        want, got = self.t[key], np.asarray(got)
        assert got.shape == want.shape, key
        if np.issubdtype(want.dtype, np.integer):
            np.testing.assert_array_equal(got, want, err_msg=key)
        else:
            worst = np.abs(got.astype(np.float64) - want).max(initial=0)
            assert worst <= self.tol * max(np.abs(want).max(initial=0), 1e-6), (key, worst)
        self.open.discard(key)

    def done(self) -> None:
        assert not self.open, f"not compared: {sorted(self.open)}"


def inputs(g: Golden) -> dict[str, np.ndarray]:
    return {k.removeprefix("input.f64."): v for k, v in g.t.items() if k.startswith("input.f64.")}


@pytest.mark.parametrize("path", cases("AUS"))
def test_adaptive_unlearning_score(path: Path) -> None:
    g = Golden(path)
    x, cr, variant = inputs(g), g.meta["hyper"]["mode"] == "CR", g.meta["variant"]
    table, errors = (x["a_or"], x["a_t"], x["a_f"]), (x["a_or_std"], x["a_t_std"], x["a_f_std"])
    g.check("aus", aus(*table, class_wise=cr))
    g.check("aus_std", aus_error(*table, errors, class_wise=cr, variant=variant))
    if variant == "as_intended":
        runs = [x[f"runs_{k}"] for k in ("a_or", "a_t", "a_f")]
        g.check("runs_aus", aus(*runs, class_wise=cr))
        estimate, std = aus_runs(*(r.tolist() for r in runs), class_wise=cr)
        g.check("runs_mean", estimate.value)
        g.check("runs_std", std)
    else:
        published = g.meta["hyper"]["published_a_or (HR value, HR std, CR value, CR std)"]
        names = {"cifar10": "cifar10", "cifar100": "cifar100", "tinyImagenet": "tiny_imagenet"}
        flat = {k: [*PUBLISHED_ORIGINAL[v][False], *PUBLISHED_ORIGINAL[v][True]] for k, v in names.items()}
        assert flat == {k: pytest.approx(v) for k, v in published.items()}
        for row in range(len(table[0])):
            known = [
                n for n in names.values() if np.allclose(PUBLISHED_ORIGINAL[n][cr], (table[0][row], errors[0][row]))
            ]
            for name in known:
                pairs = [(float(table[k][row]), float(errors[k][row])) for k in (1, 2)]
                got = aus_published(name, a_t=pairs[0], a_f=pairs[1], class_wise=cr)
                want = (g.t["expected.aus"][row], g.t["expected.aus_std"][row])
                assert got == pytest.approx(want, abs=g.tol)
    g.done()


def test_the_two_error_formulas_differ() -> None:
    """Control: the parity test above can fail."""
    path = next(p.values[0] for p in cases("AUS", "as_intended") if p.id.startswith("aus_hr"))
    g = Golden(path)
    x = inputs(g)
    errors = (x["a_or_std"], x["a_t_std"], x["a_f_std"])
    wrong = aus_error(x["a_or"], x["a_t"], x["a_f"], errors, class_wise=False, variant="as_published")
    with pytest.raises(AssertionError):
        g.check("aus_std", wrong)
    with pytest.raises(AssertionError, match="not compared"):
        g.done()


@pytest.mark.parametrize("path", cases("MIA", "as_intended"))
def test_mended_attack(path: Path) -> None:
    g = Golden(path)
    members, nonmembers = (g.t[f"input.{k}s"][g.t[f"input.{k}_index"]] for k in ("member", "nonmember"))
    r = scar_mia.attack(members, nonmembers, tolerance=g.meta["hyper"]["svm"]["tolerance"])
    g.check("cv_mean_accuracy", r.cv_accuracy)
    g.check("best_C", r.best[0])
    g.check("best_gamma", r.best[1])
    g.check("test_decision", r.decision)
    g.check("test_prediction", r.predicted)
    g.check("accuracy", r.accuracy)
    g.check("balanced_accuracy", r.balanced_accuracy)
    g.check("f1", r.f1)
    g.check("roc_auc", r.roc_auc.value)
    g.done()


def published_sides(g: Golden, rep: int) -> tuple[np.ndarray, np.ndarray]:
    members, nonmembers = (g.t[f"input.rep{rep}.{k}"] for k in ("members", "nonmembers"))
    if g.meta["hyper"]["mode"] == "HR":
        return members[g.t[f"input.rep{rep}.member_order"]], nonmembers
    source = [g.t[f"input.rep{rep}.{k}_row_source"] for k in ("member", "nonmember")]
    return members[source[0]], nonmembers[source[1]]


@pytest.mark.parametrize("path", cases("MIA", "as_published", "both"))
def test_published_attack(path: Path) -> None:
    g = Golden(path)
    class_wise = g.meta["hyper"]["mode"] == "CR"
    rows = []
    for rep in range(g.meta["hyper"]["repetitions"]):
        sides = published_sides(g, rep)
        parts = scar_mia.published_rows(*sides, class_wise=class_wise)
        for name, part in zip(("train_x", "train_y", "test_x", "test_y"), parts, strict=True):
            g.check(f"rep{rep}.attack_{name}", part)
        r = scar_mia.published_attack(*sides, class_wise=class_wise, random_state=rep)
        g.check(f"rep{rep}.best_C", r.best[0])
        g.check(f"rep{rep}.best_gamma", r.best[1])
        g.check(f"rep{rep}.cv_mean_accuracy", r.cv_accuracy)
        g.check(f"rep{rep}.test_prediction", r.predicted)
        g.check(f"rep{rep}.test_decision", r.decision)
        values = (r.accuracy, float(r.labels.mean()), r.accuracy_of(0), r.accuracy_of(1))
        values += (r.accuracy,) * 3 + (r.mutual_information,)
        for name, value in zip(SCORES, values, strict=True):
            g.check(f"rep{rep}.{name}", value)
        rows.append(values)
    g.check("mean_over_repetitions", np.mean(rows, axis=0))
    g.done()


def test_published_rows_without_the_shuffle_differ() -> None:
    """Control: the row comparison can fail."""
    g = Golden(next(p.values[0] for p in cases("MIA", "as_published") if p.id.startswith("mia_cr_null")))
    plain = scar_mia.published_rows(g.t["input.rep0.members"], g.t["input.rep0.nonmembers"], class_wise=True)
    with pytest.raises(AssertionError):
        g.check("rep0.attack_train_x", plain[0])


@pytest.mark.parametrize("path", cases("MIA", "as_published"))
def test_our_emulation_loses_rows_as_the_published_shuffle_does(path: Path) -> None:
    """Row i only ever holds a row of 0..i, in the recorded shuffles and in ours, and as many rows get lost."""
    g = Golden(path)
    for name in [k for k in g.t if k.endswith("_row_source")]:
        source = g.t[name]
        n = len(source)
        ours = [scar_mia.published_shuffle(n, key) for key in range(200)]
        assert (source <= np.arange(n)).all()
        assert all((o <= np.arange(n)).all() for o in ours)
        kept = np.array([len(np.unique(o)) / n for o in ours])
        assert abs(len(np.unique(source)) / n - kept.mean()) < 4 * kept.std()
        assert 0.4 < kept.mean() < 0.6
