"""Golden numbers of the SalUn and SalUn_DeepDive evaluations.

Every file whose ``method`` is known here is run, so files with other seeds or shapes need no new code. Without the
shared folder a small copied subset is used. Tolerances come from the files.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from expunge.metrics import accuracy, deepdive
from expunge.metrics.mia import attack_scores, svc_mia, svc_rule
from expunge.metrics.outputs import ClassifierOutputs
from expunge.metrics.threshold import class_threshold_mia

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("EXPUNGE_SHARED", ROOT.parent / "shared")) / "parity" / "salun"
FOLDER = SHARED if SHARED.is_dir() else Path(__file__).parent / "data" / "salun"


def cases(method: str) -> list:
    found = [p for p in sorted(FOLDER.glob("*.json")) if json.loads(p.read_text())["method"] == method]
    assert found, f"no golden files for {method} in {FOLDER}"
    return [pytest.param(p, id=p.stem) for p in found]


def load(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def outputs(tensors: dict[str, np.ndarray], role: str) -> ClassifierOutputs | None:
    labels = tensors.get(f"input.{role}.labels")
    if labels is None:
        return None
    if f"input.{role}.prob" in tensors:
        return ClassifierOutputs(probs=tensors[f"input.{role}.prob"], labels=labels)
    return ClassifierOutputs(logits=tensors[f"input.{role}.logits"], labels=labels)


def close(meta: dict, group: str, got: object, expected: np.ndarray) -> None:
    for kind in ("f64", "f32"):
        limits = meta["tolerance"].get(kind, {}).get(group)
        if limits:
            np.testing.assert_allclose(got, expected, rtol=limits["rtol"], atol=limits["atol"], err_msg=group)
            return
    raise AssertionError(f"{meta['name']} states no tolerance for {group}")


@pytest.mark.parametrize("path", cases("svc_mia"))
def test_svc_attack(path: Path) -> None:
    meta, t = load(path)
    variant = "as_published" if meta["variant"] == "as_published" else "as_intended"
    sets = {r: outputs(t, r) for r in ("shadow_train", "shadow_test", "target_test", "target_train")}
    for role, out in sets.items():
        if out is None:
            continue
        if f"input.{role}.logits" in t:
            again = ClassifierOutputs(logits=t[f"input.{role}.logits"], labels=out.labels)
            close(meta, "prob", again.prob, t[f"input.{role}.prob"])
        scores = attack_scores(out, variant)
        for feature in ("correctness", "confidence", "entropy", "m_entropy"):
            if f"expected.feature.{feature}.{role}" in t:
                close(meta, "feature", scores[feature], t[f"expected.feature.{feature}.{role}"])
    result = svc_mia(**sets, features=tuple(meta["hyper"]["features"]), variant=variant)
    close(meta, "score", [r.score for r in result.values()], t["expected.score"])
    atol = meta["tolerance"]["decision_values"]["atol"]
    for feature, r in result.items():
        for role in r.predicted:
            np.testing.assert_array_equal(r.predicted[role], t[f"expected.pred.{feature}.{role}"])
            np.testing.assert_allclose(
                r.decision[role], t[f"expected.decision.{feature}.{role}"].reshape(-1), rtol=0, atol=atol
            )


@pytest.mark.parametrize("path", cases("svc_mia"))
def test_tabulated_and_binned_rule_decide_as_the_published_classifier(path: Path) -> None:
    """With no more samples than bins the fast form is the same classifier."""
    meta, t = load(path)
    members, nonmembers = (t[f"expected.feature.confidence.{r}"] for r in ("shadow_train", "shadow_test"))
    if max(len(members), len(nonmembers)) > 256:
        pytest.skip("more samples than bins")
    for bins in (None, 256):
        rule = svc_rule(members, nonmembers, bins=bins)
        for role in ("target_test", "target_train"):
            if f"input.{role}.labels" in t:
                got = rule.predict(t[f"expected.feature.confidence.{role}"])
                np.testing.assert_array_equal(
                    got, t[f"expected.pred.confidence.{role}"].astype(bool), err_msg=meta["name"]
                )


def test_the_two_definitions_of_modified_entropy_differ() -> None:
    """Control: the parity test above can fail."""
    meta, t = load(next(p.values[0] for p in cases("svc_mia") if p.id == "svc_mia_random__as_intended"))
    wrong = attack_scores(outputs(t, "target_test"), "as_published")["m_entropy"]
    with pytest.raises(AssertionError):
        close(meta, "feature", wrong, t["expected.feature.m_entropy.target_test"])


@pytest.mark.parametrize("path", cases("threshold_mia"))
def test_class_threshold_attack(path: Path) -> None:
    meta, t = load(path)
    result = class_threshold_mia(
        *(outputs(t, r) for r in ("shadow_train", "shadow_test", "target_train", "target_test"))
    )
    for column, name in enumerate(("target_train_acc", "target_test_acc")):
        close(meta, name, [result[f][column] for f in meta["hyper"]["features"]], t[f"expected.{name}"])


@pytest.mark.parametrize("path", cases("accuracy_metrics"))
def test_accuracies_and_gap(path: Path) -> None:
    meta, t = load(path)
    ua = accuracy.unlearning_accuracy(outputs(t, "forget")).value
    ra = accuracy.retain_accuracy(outputs(t, "retain")).value
    ta = accuracy.unseen_accuracy(outputs(t, "test")).value
    close(meta, "UA_RA_TA", [ua, ra, ta], t["expected.UA_RA_TA"])
    values = {"ua": ua, "ra": ra, "ta": ta, "mia": float(t["input.MIA"][0])}
    reference = dict(zip(accuracy.GAP_KEYS, t["input.reference_UA_RA_TA_MIA"].tolist(), strict=True))
    close(meta, "avg_gap", [accuracy.avg_gap(values, reference)], t["expected.avg_gap"])
    assert accuracy.avg_gap(values, {**reference, "ua": reference["ua"] + 1}) != pytest.approx(
        float(t["expected.avg_gap"][0]), abs=1e-3
    )


@pytest.mark.parametrize("path", cases("deepdive_evaluation"))
def test_deepdive_evaluation(path: Path) -> None:
    import sklearn

    meta, t = load(path)
    order = tuple(meta["hyper"]["order"])
    result = deepdive.evaluate(
        {r: outputs(t, r) for r in order},
        variant=meta["variant"],
        batch_size=meta["hyper"]["batch_size"],
        order=order,
    )
    close(meta, "accuracy", list(result.accuracy.values()), t["expected.accuracy"])
    for role in order:
        close(meta, "losses", result.losses[role], t[f"expected.losses.{role}"])
    if meta["variant"] == "as_intended":
        assert result.mia is None
    elif sklearn.__version__ == meta["hyper"]["sklearn"]:
        close(meta, "mia_auc_acc", result.mia, t["expected.mia_auc_acc"])
