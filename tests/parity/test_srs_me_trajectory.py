"""Three steps of SRS-ME and CiE through `unlearn`: nothing of the loop is re-implemented here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_srs_me_parity import Case, all_near, cases
from torch import Tensor, nn

from expunge.diffusion.nullspace import Basis, Capacity
from expunge.diffusion.selection import cross_attention
from expunge.method import build_recipe
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.schedule import Replay
from expunge.spaces.concept_shift import attached_to
from expunge.tasks.base import Batch, Split, Task


class Text:
    """States of two prompts as recorded."""

    def __init__(self, states: dict[str, Tensor]) -> None:
        self._states = states

    def __call__(self, prompts: list[str]) -> Tensor:
        return torch.cat([self._states[p] for p in prompts])

    def empty(self, n: int) -> Tensor:
        return self._states[""].expand(n, -1, -1)

    def unpack(self, conditions: Tensor) -> tuple[Tensor, None]:
        return conditions, None


class Recorded(Task):
    """A U-Net whose noised latents, times and states were recorded; sample ``i`` is that of step ``i``."""

    name, capabilities = "recorded", frozenset({"diffusion", "text"})

    def __init__(self, case: Case) -> None:
        self.case, self.unet = case, case.unet()
        self.model = nn.ModuleDict({"unet": self.unet})
        self.text = Text({"": case["emb_null"], "c": case["emb_concept"]})
        self.states = self.conditions = self.text
        self.seen: list[int] = []

    def split(self, request: ForgetRequest) -> Split:
        n = len(self.case["x_t"])
        return Split({"forget": torch.arange(n), "retain": torch.arange(n, n + 1)}, concept="c")

    def concept_prompts(self, split: Split) -> list[str]:
        return ["c"]

    def load(self, role: str, ids: Tensor, split: Split, *, augment: int | None = None) -> Batch:
        return Batch(self.case["x_t"][ids], torch.zeros(len(ids)), ids, role, split.is_forget(role, ids))

    def drawn(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        self.seen += batch.ids.tolist()
        return batch.inputs, self.case["timesteps"][batch.ids], torch.zeros_like(batch.inputs)

    def eps(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        found: Tensor = self.unet(x, t, states).sample
        return found

    def predict(self, batch: Batch) -> Tensor:
        return batch.inputs

    def everything(self) -> Split:
        raise NotImplementedError

    def loss(self, batch: Batch, targets: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def wrong_target(self, batch: Batch, *, key: int, exclude_true: bool = True) -> Tensor:
        raise NotImplementedError

    def data_digest(self) -> str:
        return "recorded"


def replayed(case: Case, method: str, published: bool, **settings: Any) -> Recipe:
    recipe = build_recipe(
        {
            "method": method,
            "profile": "as_published" if published else "as_intended",
            "threshold": None,
            **settings,
            "optim": {"lr": case.hyper["lr"], "betas": case.hyper["betas"], "epochs": 1},
        }
    )
    assert recipe.objective is not None
    schedule = Replay(epochs=(tuple({"forget": (i,)} for i in range(case.hyper["steps"])),))
    return recipe.replace(objective={**recipe.objective.describe(), "schedule": schedule.model_dump()})


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def recorded_basis(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    n, width = case["S"].shape
    basis = Basis(case["S"].double(), Capacity(width - n, n, width, 1, 1.0, 0.0), 0.0)
    monkeypatch.setattr("expunge.spaces.concept_shift.ConceptShift._basis", lambda *_: basis)


def run_shift(case: Case, published: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded_basis(case, monkeypatch)
    task, hyper, expected = Recorded(case), case.hyper, case.expected
    space = {"beta": hyper["beta"], "protect_others": False, "lambda_l1": hyper["lam"]}

    def check(step: int, *_: object) -> None:
        attached = attached_to(task.unet)
        assert attached is not None
        omega = attached.shifts["concept"].omega
        gradients = {n: p.grad for n, p in omega.items() if p.grad is not None}
        all_near(gradients, case.group(f"expected.step{step}.grad"), 2e-4)
        all_near({n: p.detach() for n, p in omega.items()}, case.group(f"expected.step{step}.omega"), 2e-3)

    patch = unlearn(
        task,
        ForgetRequest.concept("c"),
        replayed(case, "srs_me", published, **space),
        run_dir=folder,
        on_step=check,
    )
    assert task.seen[: hyper["steps"]] == list(range(hyper["steps"]))
    assert set(patch) == {f"unet.{n}" for n in hyper["target_names"]}
    rows = rows_of(folder)
    assert [r["correlation"] for r in rows] == pytest.approx(expected["L_cor_before_step"], rel=1e-4)
    assert [r["l1"] for r in rows] == pytest.approx(expected["loss_reg_before_step"], rel=1e-4)


@pytest.mark.parametrize("path", cases("adam3"))
def test_the_separable_method_through_the_loop(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(path)
    run_shift(case, case.published, tmp_path, monkeypatch)


@pytest.mark.parametrize("path", cases("adam3"))
def test_the_other_profile_parts_from_the_golden_numbers(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(path)
    with pytest.raises(AssertionError, match=r"attn2"):
        run_shift(case, not case.published, tmp_path, monkeypatch)


def run_cie(case: Case, published: bool, folder: Path) -> None:
    task, hyper, expected = Recorded(case), case.hyper, case.expected
    parameters = cross_attention(task.unet)
    assert list(parameters) == hyper["trained_names"]
    base = {n: p.detach().clone() for n, p in parameters.items()}

    def check(step: int, *_: object) -> None:
        golden = case.group(f"expected.step{step}.grad")
        if golden:
            all_near({n: p.grad for n, p in parameters.items() if p.grad is not None}, golden, 2e-4)

    recipe = replayed(case, "cie", published, lambda_l1=hyper["reg_beta"])
    patch = unlearn(task, ForgetRequest.concept("c"), recipe, run_dir=folder, on_step=check)
    rows = rows_of(folder)
    assert [r["correlation"] for r in rows] == pytest.approx(expected["L_cor_before_step"], rel=2e-4)
    assert [r["l1"] for r in rows] == pytest.approx(expected["reg_before_step"], rel=2e-4)
    golden = case.group(f"expected.step{hyper['steps']}.param")
    changes = {n: t - base[n] for n, t in golden.items()}
    all_near({n: patch[f"unet.{n}"].dense() for n in changes}, changes, 5e-3)
    assert all(torch.equal(p, base[n]) for n, p in parameters.items())


@pytest.mark.parametrize("path", cases("cie3"))
def test_the_irreversible_variant_through_the_loop(path: Path, tmp_path: Path) -> None:
    case = Case(path)
    run_cie(case, case.published, tmp_path)


@pytest.mark.parametrize("path", cases("cie3"))
def test_its_other_profile_parts_from_the_golden_numbers(path: Path, tmp_path: Path) -> None:
    case = Case(path)
    with pytest.raises(AssertionError):
        run_cie(case, not case.published, tmp_path)
