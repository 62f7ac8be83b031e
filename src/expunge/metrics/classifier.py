"""All classifier metrics from the outputs of each role, and plain-word warnings about figures that mislead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from expunge.errors import DataError, did_you_mean
from expunge.metrics.accuracy import (
    constant_prediction,
    forget_test_accuracy,
    retain_accuracy,
    unlearning_accuracy,
    unseen_accuracy,
    validation_accuracy,
)
from expunge.metrics.estimate import Estimate, not_run
from expunge.metrics.membership import (
    MIN_SAMPLES,
    AttackSets,
    attack_auc,
    attack_sets,
    forget_auc,
    mia,
    mia_svc,
    mia_threshold,
)
from expunge.metrics.outputs import ClassifierOutputs
from expunge.metrics.scar_mia import measure_scar

ROLES = ("forget", "retain", "test", "val", "forget_test")
ATTACKS: dict[str, Callable[[AttackSets], Estimate]] = {
    "mia": mia,
    "mia_threshold": mia_threshold,
    "mia_svc": mia_svc,
}
#: Attacks on whole outputs; each may give several figures. Slow, so never by default.
OUTPUT_ATTACKS: dict[str, Callable[..., dict[str, Estimate]]] = {
    "mia_scar": measure_scar,
    "mia_scar_published": partial(measure_scar, published=True),
}
_CLASS_NOTE = "forgotten class left out of the test set"
_CLASS_MIA = (
    "class request: non-members are test samples of the other classes, so a retrained model scores near 100 % too"
)


def measure_classifier(
    outputs: Mapping[str, ClassifierOutputs],
    *,
    class_wise: bool = False,
    attacks: tuple[str, ...] = ("mia", "mia_threshold"),
    seed: int = 0,
    min_samples: int = MIN_SAMPLES,
) -> dict[str, Estimate]:
    """UA, RA, TA, membership attacks and AUCs of one model.

    Args:
        outputs: ``forget`` and, where there are such data, ``retain``, ``test``, ``val``, ``forget_test`` (test samples
            of the forgotten class). ``ids`` of forget and retain are train-set ids.
        class_wise: The request names whole classes; the test set must then hold none of them.
        attacks: Of ``mia`` (the SVC of the published tables, binned), ``mia_threshold``, ``mia_svc`` (slow),
            ``mia_scar`` and ``mia_scar_published`` (slow).
        seed: Of the balanced draw of members and non-members.
        min_samples: Fewest samples per set for any membership figure.

    Returns:
        Every metric by registered name; one that could not be measured carries the reason instead of a value.

    Raises:
        DataError: Unknown roles or attacks, no forget set, overlapping sets, or a class-wise test set that still
            holds the forgotten class.
    """
    for name, known in [(r, ROLES) for r in outputs] + [(a, (*ATTACKS, *OUTPUT_ATTACKS)) for a in attacks]:
        if name not in known:
            raise DataError(f"measure: {name!r} is not known{did_you_mean(name, known)}")
    forget, retain, test = (outputs.get(r) for r in ("forget", "retain", "test"))
    if forget is None or len(forget) == 0:
        raise DataError("measure: no outputs for the forget set; nothing can be said about forgetting")
    _check_sets(forget, retain, test, class_wise)

    found = {"ua": unlearning_accuracy(forget)}
    notes = {"ta": _CLASS_NOTE if class_wise else ""}
    plain = {
        "ra": ("retain", retain_accuracy),
        "ta": ("test", unseen_accuracy),
        "val_accuracy": ("val", validation_accuracy),
        "forget_test": ("forget_test", forget_test_accuracy),
    }
    for key, (role, function) in plain.items():
        given = outputs.get(role)
        if given is not None and len(given):
            found[key] = function(given, note=notes.get(key, ""))
        elif role in ("retain", "test") or given is not None or (role == "forget_test" and class_wise):
            found[key] = not_run(f"no {role.replace('_', ' ')} samples", unit="%")
    found |= _membership(forget, retain, test, class_wise, [a for a in attacks if a in ATTACKS], seed, min_samples)
    for name in (a for a in attacks if a in OUTPUT_ATTACKS):
        found |= OUTPUT_ATTACKS[name](outputs, class_wise=class_wise, seed=seed, min_samples=min_samples)
    return found


def _check_sets(
    forget: ClassifierOutputs, retain: ClassifierOutputs | None, test: ClassifierOutputs | None, class_wise: bool
) -> None:
    if retain is not None and retain.ids is not None and forget.ids is not None:
        shared = np.intersect1d(retain.ids, forget.ids)
        if len(shared):
            raise DataError(f"measure: {len(shared)} samples are both forgotten and kept (first id {shared[0]})")
    if class_wise and test is not None:
        left = int(np.isin(test.labels, np.unique(forget.labels)).sum())
        if left:
            raise DataError(f"measure: {left} test samples belong to the forgotten class; pass them as 'forget_test'")


def _membership(
    forget: ClassifierOutputs,
    retain: ClassifierOutputs | None,
    test: ClassifierOutputs | None,
    class_wise: bool,
    attacks: list[str],
    seed: int,
    min_samples: int,
) -> dict[str, Estimate]:
    names = (*attacks, "attack_auc", "forget_auc")
    if retain is None or test is None:
        lacking = " and ".join(n for n, o in (("kept", retain), ("test", test)) if o is None)
        return {name: not_run(f"needs {lacking} samples") for name in names}
    try:
        sets = attack_sets(
            retain.confidence,
            test.confidence,
            forget.confidence,
            member_ids=retain.ids,
            forget_ids=forget.ids,
            seed=seed,
            min_samples=min_samples,
        )
    except DataError as error:
        return {name: not_run(str(error)) for name in names}
    found = {name: ATTACKS[name](sets) for name in attacks}
    found["attack_auc"] = attack_auc(retain.confidence, test.confidence)
    found["forget_auc"] = forget_auc(forget.confidence, test.confidence)
    return {k: _noted(e, _CLASS_MIA) if class_wise and k != "attack_auc" else e for k, e in found.items()}


def _noted(estimate: Estimate, note: str) -> Estimate:
    joined = "; ".join(filter(None, (estimate.note, note)))
    return Estimate(**{**estimate.to_dict(), "note": joined})


def warnings_for(
    outputs: Mapping[str, ClassifierOutputs],
    measured: Mapping[str, Estimate],
    *,
    before: Mapping[str, Estimate] | None = None,
    reference: Mapping[str, Estimate] | None = None,
    class_wise: bool = False,
) -> list[str]:
    """Sentences about figures that would mislead: broken model, no effect, over-forgetting, attack too weak.

    Args:
        outputs: The outputs ``measured`` was computed from.
        measured: Figures of the model after forgetting.
        before: Figures of the model before.
        reference: Figures of a model retrained without the data, the best yardstick.
        class_wise: Whole classes were forgotten; then low confidence is expected of a retrained model too.
    """
    found = []
    for role, out in outputs.items():
        constant = constant_prediction(out)
        if constant is not None:
            found.append(f"Every {role.replace('_', ' ')} sample is given class {constant}: the model is broken.")
    if before is not None and _same(before, measured):
        found.append("All figures equal those of the original model: the change had no visible effect.")
    found += _against_reference(measured, reference) if reference is not None else _alone(measured, class_wise)
    strength = measured.get("attack_auc")
    if strength is not None and strength.low is not None and strength.high is not None and strength.low <= 0.55:
        found.append(
            f"The membership attack is close to guessing on known data (AUC {strength.value:.2f}): its figures for the "
            "forgotten data show little."
        )
    return found


def _same(a: Mapping[str, Estimate], b: Mapping[str, Estimate]) -> bool:
    shared = [k for k in a if k in b and a[k].ran and b[k].ran]
    return bool(shared) and all(a[k].value == b[k].value for k in shared)


def _against_reference(measured: Mapping[str, Estimate], reference: Mapping[str, Estimate]) -> list[str]:
    found = []
    for key, high, low in (
        ("mia", "judged unseen more often than by the retrained model", "judged unseen less often than by it"),
        ("ua", "wrong more often than in the retrained model", "wrong less often than in the retrained model"),
        ("forget_auc", "more confident than in the retrained model", "less confident than in the retrained model"),
    ):
        a, b = measured.get(key), reference.get(key)
        if a is None or b is None or a.value is None or b.value is None or a.overlaps(b) is not False:
            continue
        above = a.value > b.value
        over = above != (key == "forget_auc")
        kind = "Over-forgetting" if over else "Not fully forgotten"
        unit = f" {a.unit}" if a.unit else ""
        digits = 1 if a.unit == "%" else 3
        found.append(
            f"{kind}: forgotten samples are {high if above else low} "
            f"({a.value:.{digits}f}{unit} against {b.value:.{digits}f}{unit}); that difference is itself recognisable."
        )
    return found


def _alone(measured: Mapping[str, Estimate], class_wise: bool) -> list[str]:
    e = measured.get("forget_auc")
    if e is None or e.value is None or e.low is None or e.high is None:
        return []
    if e.low > 0.55:
        return [f"Forgotten samples still get more confidence than new ones (AUC {e.value:.3f}, alike would be 0.5)."]
    if e.high < 0.45 and not class_wise:
        return [
            f"Over-forgetting: forgotten samples get less confidence than new ones (AUC {e.value:.2g}, alike would be "
            "0.5), so they can be recognised as erased."
        ]
    if e.high < 0.45:
        return [
            "Forgotten samples get less confidence than new samples of other classes. A model retrained without the "
            "class shows this too; only a retrained reference can tell how much is expected."
        ]
    return []
