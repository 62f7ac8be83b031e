"""Golden distances between class clouds, as the DeepDive analysis computes them.

Every file of the method is run, with every exact solver that is installed; tolerances come from the files.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from expunge.analysis import Embedding, wasserstein_difference, wasserstein_matrix

SHARED = Path(os.environ.get("EXPUNGE_SHARED", Path(__file__).parents[2].parent / "shared")) / "parity" / "salun"
FOLDER = SHARED if SHARED.is_dir() else Path(__file__).parent / "data" / "salun"
FILES = [p for p in sorted(FOLDER.glob("*.json")) if json.loads(p.read_text())["method"] == "deepdive_wasserstein"]
SOLVERS = ["auto", "assignment", "lp", *(["pot"] if importlib.util.find_spec("ot") else [])]


def embedding(tensors: dict[str, np.ndarray], name: str, classes: int, shift: float) -> Embedding:
    features = torch.from_numpy(tensors[f"input.{name}.features"])
    features[0, 0] += shift
    labels = torch.from_numpy(tensors[f"input.{name}.labels"])
    n, d = features.shape
    return Embedding(
        name=name,
        features=features,
        labels=labels,
        ids=torch.arange(n),
        forget=torch.zeros(n, dtype=torch.bool),
        prototypes=torch.zeros(classes, d),
        classes=tuple(str(c) for c in range(classes)),
    )


def compare(path: Path, solver: str, shift: float = 0.0) -> None:
    meta, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    found = {}
    for name in "ab":
        e = embedding(tensors, name, meta["hyper"]["num_classes"], shift)
        found[name] = wasserstein_matrix(e, solver=solver)
        assert found[name].counts.tolist() == meta["hyper"][f"counts_{name}"]
    got = {f"W_{n}": d.values for n, d in found.items()}
    got["delta"] = wasserstein_difference(found["a"], found["b"])
    assert {f"expected.{k}" for k in got} == {k for k in tensors if k.startswith("expected.")}
    for key, values in got.items():
        limit = meta["tolerance"]["f64"][key]
        np.testing.assert_allclose(values, tensors[f"expected.{key}"], rtol=limit["rtol"], atol=limit["atol"])


def test_files_were_found() -> None:
    assert {p.stem for p in FILES} >= {"deepdive_wasserstein_equal", "deepdive_wasserstein_unequal"}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden(path: Path, solver: str) -> None:
    compare(path, solver)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_moved_point_is_noticed(path: Path) -> None:
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare(path, "auto", shift=1e-6)
