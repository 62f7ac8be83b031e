"""Golden numbers of UCE: the erase script, the 2023 script and the rounds of debiasing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from eraser_files import Case, cases, within
from torch import Tensor

from expunge.diffusion import uce


def _vectors(case: Case, names: Sequence[str]) -> Tensor | None:
    return torch.stack([case.input(f"state.{n}") for n in names]) if names else None


def _limit(case: Case, run: str) -> float:
    """The file's tolerance against the published float32 inverse; it loosens two runs by name."""
    recommended = case.meta["tolerance"]["recommended"]
    loose = [text for key, text in recommended.items() if key.startswith("runs ") and run in key.split()]
    return float((loose[0] if loose else recommended["weights"]).split(" * ")[0])


def _compare(case: Case, solved: uce.Solved, prefix: str, limit: float) -> None:
    for name, weight in case.inits().items():
        case.close(uce.applied(weight, solved.changes.get(name)), f"{prefix}{name}", limit)


def _erase(case: Case, run: dict[str, Any], **other: Any) -> uce.Solved:
    edits, guides = _vectors(case, run["edit"]), _vectors(case, run["guide"])
    assert edits is not None
    assert guides is not None
    settings = {k: run[k] for k in ("erase_scale", "preserve_scale", "lamb")} | other
    pairs = [uce.Pair(c[None], g[None]) for c, g in zip(edits, guides)]
    return uce.edit(case.inits(), pairs, _vectors(case, run["preserve"]), **settings)


@pytest.mark.parametrize("path", cases("uce-erase"))
def test_erase(path: Path) -> None:
    case = Case(path)
    for name, run in case.hyper["runs"].items():
        solved = _erase(case, run)
        assert solved.condition == pytest.approx(run["condition_number"], rel=1e-9)
        _compare(case, solved, f"{name}.", _limit(case, name))
        _compare(case, solved, f"{name}.float64_solve.", 1e-6)
        assert all(c.kind == "low_rank" for c in solved.changes.values())
        if run["edit"] == run["guide"]:
            assert not solved.changes, "the maps must come back exactly"
        else:
            assert set(solved.changes) == set(case.inits())
    case.finish()


@pytest.mark.parametrize("path", cases("uce-erase"))
def test_other_settings_differ(path: Path) -> None:
    """The comparison notices each setting."""
    case = Case(path)
    run = next(r for r in case.hyper["runs"].values() if r["preserve"] and r["edit"] != r["guide"])
    name = next(n for n, r in case.hyper["runs"].items() if r is run)
    for other in ({"lamb": run["lamb"] * 1.01}, {"erase_scale": run["erase_scale"] * 0.99}, {"preserve_scale": 0.9}):
        with pytest.raises(AssertionError):
            _compare(case, _erase(case, run, **other), f"{name}.float64_solve.", 1e-6)


def _prompt(case: Case, name: str) -> uce.Prompt:
    """A single space has the tokens and states of the empty prompt, which the file calls ``null``."""
    index = case.hyper["last_token_index"]["" if name == "null" else name]
    return uce.Prompt(case.input(f"states.{'null' if name.strip() == '' else name}"), index)


def _script_2023(case: Case, run: dict[str, Any], rows: uce.Rows = "span") -> uce.Solved:
    pairs = [uce.pair(_prompt(case, c), _prompt(case, g), rows) for c, g in zip(run["edit"], run["guide"])]
    kept = uce.preserved([_prompt(case, p) for p in run["preserve"]], "span")
    settings = {k: run[k] for k in ("erase_scale", "preserve_scale", "lamb", "technique")}
    return uce.edit(case.inits(), pairs, kept, **settings)


@pytest.mark.parametrize("path", cases("uce-2023"))
def test_2023_script(path: Path) -> None:
    case = Case(path)
    for name, run in case.hyper["runs"].items():
        _compare(case, _script_2023(case, run), f"{name}.", _limit(case, name))
        with pytest.raises(AssertionError):
            _compare(case, _script_2023(case, run, "last"), f"{name}.", _limit(case, name))
    case.finish()


@pytest.mark.parametrize("path", cases("uce-debias"))
@pytest.mark.parametrize("variant", ["as_published", "as_intended"])
def test_debias_rounds(path: Path, variant: str) -> None:
    case = Case(path)
    h = case.hyper
    weights, rounds = case.inits(), torch.tensor(h["rounds"])
    concepts, attributes = _vectors(case, h["edit"]), _vectors(case, h["attributes"])
    assert concepts is not None
    assert attributes is not None
    limit = 1e-6 if variant == "as_intended" else _limit(case, "")
    seen: list[dict[str, Any]] = []

    def measure(changes: Any) -> Tensor:
        """Ratios that give the recorded gaps, and after the last round ratios as wanted."""
        seen.append(dict(changes))
        return 0.5 - rounds[len(seen) - 1] if len(seen) <= len(rounds) else torch.full(rounds[0].shape, 0.5)

    result = uce.debias(
        weights,
        concepts,
        attributes,
        torch.full(rounds[0].shape, 0.5),
        measure,
        _vectors(case, h["preserve"]),
        step_size=1.0 if variant == "as_published" else h["step_size"],
        edit_scale=h["edit_scale"],
        preserve_scale=h["preserve_scale"],
        lamb=h["lamb"],
    )
    assert result.converged
    assert len(result.gaps) == len(rounds) + 1
    assert seen[0] == {}
    for r, changes in enumerate(seen[1:], 1):
        for name, weight in weights.items():
            case.close(uce.applied(weight, changes[name]), f"{variant}.round{r}.{name}", limit)
    assert {n for n in case.tensors if n.startswith(f"expected.{variant}.")} == case.checked
    other = {"as_published": "as_intended", "as_intended": "as_published"}[variant]
    name, weight = next(iter(weights.items()))
    with pytest.raises(AssertionError):
        within(uce.applied(weight, seen[1][name]), case.tensors[f"expected.{other}.round1.{name}"], limit)
