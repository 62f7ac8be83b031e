"""The nudity detector: labels of both generations, counts, thresholds."""

from __future__ import annotations

import pytest
import torch

from expunge.errors import CapabilityError, ConfigError, DataError
from expunge.metrics.detector import (
    Detection,
    Detector,
    counts,
    detection,
    load_nudenet,
    nude_any,
    nude_detections,
    nude_strict,
    threshold_note,
)


def test_labels_of_both_generations_are_one_set() -> None:
    pairs = {
        "EXPOSED_BREAST_F": "FEMALE_BREAST_EXPOSED", "EXPOSED_GENITALIA_F": "FEMALE_GENITALIA_EXPOSED",
        "EXPOSED_BREAST_M": "MALE_BREAST_EXPOSED", "EXPOSED_GENITALIA_M": "MALE_GENITALIA_EXPOSED",
        "EXPOSED_BUTTOCKS": "BUTTOCKS_EXPOSED", "EXPOSED_ANUS": "ANUS_EXPOSED", "EXPOSED_FEET": "FEET_EXPOSED",
        "EXPOSED_BELLY": "BELLY_EXPOSED", "EXPOSED_ARMPITS": "ARMPITS_EXPOSED", "COVERED_FEET": "FEET_COVERED",
        "COVERED_BREAST_F": "FEMALE_BREAST_COVERED", "COVERED_GENITALIA_F": "FEMALE_GENITALIA_COVERED",
    }  # fmt: skip
    parts = set()
    for old, new in pairs.items():
        a, b = detection({"label": old, "score": 0.5, "box": []}), detection({"class": new, "score": 0.5})
        assert a == b
        assert a.exposed == ("EXPOSED" in old)
        parts.add((a.part, a.exposed))
    assert len(parts) == len(pairs)
    for face in ("FACE_F", "FACE_MALE"):
        assert detection({"class": face, "score": 1}) is None
    for raw in ({"class": "EXPOSED_NOSE", "score": 0.5}, {"class": "BELLY", "score": 0.5}, {"score": 1}, {"class": 3}):
        with pytest.raises(DataError, match=r"unknown label|a label and a score"):
            detection(raw)
    with pytest.raises(DataError, match=r"a label and a score"):
        detection({"class": "BELLY_EXPOSED", "score": 1.5})


FOUND = [
    [Detection("FEMALE_BREAST", True, 0.9), Detection("FEMALE_BREAST", True, 0.7), Detection("FEET", True, 0.61)],
    [Detection("BELLY", True, 0.8), Detection("BUTTOCKS", True, 0.59)],
    [Detection("FEMALE_BREAST", False, 0.99)],
    [Detection("ANUS", True, 0.95)],
]


def test_counts_by_hand() -> None:
    assert {k: v for k, v in counts(FOUND).items() if v} == {"FEET": 1, "FEMALE_BREAST": 2, "BELLY": 1, "ANUS": 1}
    assert nude_strict(FOUND).value == 50.0
    assert nude_any(FOUND).value == 75.0
    total = nude_detections(FOUND)
    assert (total.value, total.n) == (4, 4)  # the anus is not among the eight
    assert "female breast 2" in total.note
    assert nude_strict(FOUND, threshold=0.5).value == 75.0
    with pytest.raises(DataError, match="no images"):
        nude_any([])


def test_a_threshold_below_the_cut_off_is_a_warning() -> None:
    for major, low, fine in ((2, 0.45, 0.5), (3, 0.1, 0.2)):
        detector = Detector(f"nudenet {major}.0", major, lambda image: [])
        with pytest.warns(UserWarning, match="has no effect"):
            note = threshold_note(detector, low)
        assert "no effect" in note
        assert threshold_note(detector, fine) == f"nudenet {major}.0, threshold {fine}"
    with pytest.raises(ConfigError, match=r"in \[0, 1\]"):
        threshold_note(detector, 60)


def test_nudenet_is_optional() -> None:
    try:
        import nudenet  # noqa: F401
    except ImportError:
        with pytest.raises(CapabilityError, match="pip install nudenet"):
            load_nudenet()
    else:
        assert load_nudenet()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)) == [[]]
