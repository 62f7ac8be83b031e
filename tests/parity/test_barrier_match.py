"""BARRIER: layer matching against golden files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from barrier_files import Case, cases

from expunge.errors import RequestError
from expunge.protections.interval.match import find


@pytest.mark.parametrize("path", cases("match_*"))
def test_selected_modules(path: Path) -> None:
    case = Case(path)
    model, rule = case.model(), case.meta["variant"]
    matched, trained = [], []
    for entry in case.meta["expected_names"]:
        if entry.get("error_if_empty"):
            with pytest.raises(RequestError, match="select no Linear or Conv2d"):
                find(model, entry["targets"], rule)
            names: list[str] = []
            parameters: list[str] = []
        else:
            got = find(model, entry["targets"], rule)
            names, parameters = list(got.layers), got.parameter_names()
            assert list(got.unsupported) == entry.get("unsupported", [])
        assert names == entry["matched"]
        assert sorted(parameters) == sorted(entry["trained_parameters"])
        matched.append([n in names for n in case.replay["module_order"]])
        trained.append([n in parameters for n in case.replay["parameter_order"]])
    case.expect("expected.matched", torch.tensor(matched))
    case.expect("expected.trained", torch.tensor(trained))
    case.finish()
