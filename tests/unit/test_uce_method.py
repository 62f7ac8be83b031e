"""UCE as a method: what prompts say becomes what guides say, and what is preserved stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from expunge.diffusion.captions import MODERATION
from expunge.digest import model_digest
from expunge.errors import CapabilityError, ConfigError, NoEffectError, RequestError
from expunge.method import build_recipe
from expunge.methods.uce import UCE
from expunge.patch import LowRank, Patch, apply, revert
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.spaces.unet_set import UNetSet
from expunge.tasks.tiny_text_to_image import tiny_text_to_image

REQUEST = ForgetRequest.label("circle")
OTHERS = ("square", "triangle", "star", "cross", "ring", "heart", "moon", "")


@pytest.fixture(scope="module")
def task() -> Any:
    return tiny_text_to_image()


def erase(task: Any, request: ForgetRequest = REQUEST, method: str = "uce", **settings: Any) -> Patch:
    return unlearn(task, request, build_recipe({"method": method, **settings}))


def maps(task: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in task.model.named_parameters() if "attn2.to_k" in n or "attn2.to_v" in n}


def last(task: Any, *texts: str) -> Tensor:
    """State of the last word of each text, found by counting words: every name here is one token."""
    return torch.stack([task.states([t])[0, len(t.split())].detach() for t in texts])


def new(task: Any, patch: Patch) -> dict[str, Tensor]:
    apply(task.model, patch)
    found = maps(task)
    revert(task.model, patch)
    return found


def test_every_map_solves_the_ridge_problem(task: Any) -> None:
    """The same minimiser from stacked least squares."""
    patch = erase(task, guides=("square",), erase_scale=2.0, preserve_scale=0.7, lamb=0.3)
    c, g, p = (last(task, *t).double() for t in (["circle"], ["square"], OTHERS))
    for name, w in maps(task).items():
        weight = w.double()
        eye = torch.eye(weight.shape[1], dtype=torch.float64)
        inputs = torch.cat([2.0**0.5 * c, 0.7**0.5 * p, 0.3**0.5 * eye])
        outputs = torch.cat([2.0**0.5 * g @ weight.T, 0.7**0.5 * p @ weight.T, 0.3**0.5 * weight.T])
        wanted = torch.linalg.lstsq(inputs, outputs).solution.T
        torch.testing.assert_close(new(task, patch)[name].double(), wanted, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(weight, wanted, rtol=1e-3, atol=1e-3)


def test_concepts_go_and_preserved_ones_stay(task: Any) -> None:
    old, changed = maps(task), new(task, patch := erase(task, guides=("square",), lamb=1e-3))
    c, g, p = last(task, "circle"), last(task, "square"), last(task, *OTHERS)
    careless = new(task, erase(task, guides=("square",), lamb=1e-3, preserve=()))
    for name, w in old.items():
        torch.testing.assert_close(c @ changed[name].T, g @ w.T, rtol=0.02, atol=0.02)
        assert not torch.allclose(c @ w.T, g @ w.T, rtol=0.1, atol=0.1)
        moved, unkept = (float((p @ (m[name] - w).T).norm() / (p @ w.T).norm()) for m in (changed, careless))
        assert moved < 0.01
        assert unkept > 3 * moved
    facts = patch.manifest.findings["uce"]
    assert facts["edits"] == [{"concept": "circle", "guide": "square"}]
    assert facts["preserved"] == list(OTHERS)
    assert (facts["maps"], facts["rank"]) == (len(old), 1)
    assert facts["left_to_guides"] < 0.01
    assert 0 < facts["moved_of_preserved"] < 0.01
    assert facts["condition"] > 100


def test_changes_are_low_rank_apply_and_come_off(task: Any, tmp_path: Any) -> None:
    before = model_digest(task.model)
    patch = erase(task)
    assert model_digest(task.model) == before
    assert set(patch) == set(maps(task))
    assert all(isinstance(patch[n], LowRank) and patch[n].up.shape[1] == 1 for n in patch)  # type: ignore[attr-defined]
    loaded = Patch.load(patch.save(tmp_path / "p.safetensors"))
    assert loaded.digest == patch.digest
    apply(task.model, loaded)
    assert model_digest(task.model) != before
    revert(task.model, loaded)
    assert model_digest(task.model) == before


def test_order_does_not_matter_and_all_at_once_is_not_the_sum_of_each(task: Any) -> None:
    both = new(task, erase(task, concepts=("circle", "star"), preserve=("",)))
    turned = new(task, erase(task, concepts=("star", "circle"), preserve=("",)))
    for name, w in both.items():
        torch.testing.assert_close(turned[name], w, rtol=1e-5, atol=1e-6)
    each = [erase(task, concepts=(c,), preserve=("",)) for c in ("circle", "star")]
    apply(task.model, *each)
    after = maps(task)
    revert(task.model, *each)
    assert any(not torch.allclose(after[n], w, rtol=1e-3, atol=1e-4) for n, w in both.items())


def test_a_concept_that_is_its_own_guide_changes_nothing(task: Any) -> None:
    with pytest.raises(NoEffectError):
        erase(task, guides=("circle",))
    strong = erase(task, lamb=1e9)
    weak = erase(task)
    size = {k: sum(float(p[n].dense().norm()) for n in p) for k, p in {"strong": strong, "weak": weak}.items()}
    assert size["strong"] < 1e-6 * size["weak"]


def test_what_settings_add(task: Any) -> None:
    moderated = erase(task, moderate=True).manifest.findings["uce"]
    assert [e["concept"] for e in moderated["edits"]] == ["circle", *MODERATION]
    expanded = erase(task, expand="object", guides=("square",)).manifest.findings["uce"]
    assert len(expanded["edits"]) == 6
    assert {"concept": "photo of circle", "guide": "photo of square"} in expanded["edits"]
    paper = build_recipe({"method": "uce", "profile": "paper"}).edit
    assert isinstance(paper, UCE)
    assert (paper.rows, paper.preserve_scale) == ("span", None)
    spans = unlearn(task, REQUEST, build_recipe({"method": "uce", "profile": "paper", "guides": ["square"]}))
    assert spans.manifest.findings["uce"]["rank"] == task.states(["circle"]).shape[1] - 1
    tensor = erase(task, technique="tensor", guides=("square",))
    assert tensor.digest != erase(task, guides=("square",)).digest


def test_the_prompts_of_a_class(task: Any) -> None:
    """All positions of all prompts; those of other classes stay."""
    patch = erase(task, texts="prompts", guides=("square",))
    facts = patch.manifest.findings["uce"]
    circles, squares = task.prompts()[:2]
    assert [(e["concept"], e["guide"]) for e in facts["edits"]] == list(zip(circles, squares, strict=True))
    assert set(facts["preserved"]) == {p for prompts in task.prompts()[1:] for p in prompts} | {""}
    assert facts["rank"] == len(circles) * task.states([""]).shape[1]
    old, changed = maps(task), new(task, patch)
    c, g, p = (task.states(t).flatten(0, 1).detach() for t in (circles, squares, task.prompts()[4]))
    named = new(task, erase(task, guides=("square",)))
    for name, w in old.items():
        left, left_by_names = (
            float(((c @ m[name].T) - g @ w.T).norm() / ((c - g) @ w.T).norm()) for m in (changed, named)
        )
        assert left < 0.5
        assert left_by_names > left + 0.1
        assert float((p @ (changed[name] - w).T).norm() / (p @ w.T).norm()) < 0.1
    nothing = erase(task, texts="prompts").manifest.findings["uce"]["edits"][0]
    assert nothing == {"concept": circles[0], "guide": circles[0].replace("circle ", "")}
    with pytest.raises(RequestError, match="no class of this task"):
        erase(task, texts="prompts", concepts=("hexagon",))
    with pytest.raises(ConfigError, match="'expand' adds templates"):
        UCE(texts="prompts", expand="art")


def test_what_it_refuses(task: Any) -> None:
    with pytest.raises(ConfigError, match="2 guides for 1 concepts"):
        UCE(concepts=("circle",), guides=("a", "b"))
    with pytest.raises(ConfigError, match="keys and values of cross-attention"):
        unlearn(task, REQUEST, Recipe(name="uce", edit=UCE(), space=UNetSet(parameters="selfattn")))
    with pytest.raises(ConfigError, match="restricts single weights"):
        unlearn(task, REQUEST, Recipe(name="uce", edit=UCE(), space={"kind": "saliency_mask"}))
    with pytest.raises(CapabilityError, match="names samples and no concept"):
        erase(task, ForgetRequest.samples([0, 1]))
    assert len(erase(task, ForgetRequest.samples([0, 1]), concepts=("circle",)))


def test_two_text_encoders() -> None:
    task = tiny_text_to_image(kind="xl")
    assert len(erase(task)) == len(maps(task))


class Scripted:
    """A judge whose verdict depends on how far the keys have moved: at first everything is "flat"."""

    classes = {"style": ("flat", "outline", "dots")}

    def __init__(self, task: Any, until: float) -> None:
        self.task, self.until, self.first = task, until, maps(task)
        self.moved: list[float] = []

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        now = maps(self.task)
        self.moved.append(sum(float((now[n] - w).norm()) for n, w in self.first.items()))
        votes = torch.zeros(len(images), 3)
        votes[:, 2] = 9.0  # no attribute that was asked for: it does not count
        votes[:, 0] = 1.0
        if self.moved[-1] > self.until:
            votes[::2, 1] = 2.0
        return {"style": votes}

    def features(self, images: Tensor) -> Tensor:
        raise AssertionError("not asked for")


def debias(task: Any, **settings: Any) -> Patch:
    return erase(task, method="uce_debias", attributes=["flat", "outline"], images=4, **settings)


def test_debiasing_edits_until_the_shares_fit(monkeypatch: Any, task: Any) -> None:
    judge = Scripted(task, until=0.35)
    monkeypatch.setattr(task, "judge", judge)
    before = model_digest(task.model)
    patch = debias(task, step_size=0.1)
    assert model_digest(task.model) == before
    facts = patch.manifest.findings["uce_debias"]
    assert facts["shares"][0] == [[1.0, 0.0]]
    assert facts["shares"][-1] == [[0.5, 0.5]]
    assert facts["converged"]
    assert len(facts["shares"]) > 2
    assert judge.moved[0] == 0
    assert judge.moved == sorted(judge.moved), "every round goes on from the sum of the gaps"
    assert set(patch) == set(maps(task))
    apply(task.model, patch)
    now = maps(task)
    revert(task.model, patch)
    moved = sum(float((now[n] - w).norm()) for n, w in judge.first.items())
    assert moved == pytest.approx(judge.moved[-1], rel=1e-4)
    steps = len(debias(task, step_size=0.1, profile="as_published").manifest.findings["uce_debias"]["shares"])
    assert steps < len(facts["shares"])


def test_debiasing_says_when_it_cannot(monkeypatch: Any, task: Any) -> None:
    with pytest.raises(CapabilityError, match="needs a judge"):
        debias(task)
    monkeypatch.setattr(task, "judge", Scripted(task, until=1e9))
    patch = debias(task, max_rounds=2)
    assert not patch.manifest.findings["uce_debias"]["converged"]
    assert any("not within 0.05" in n for n in patch.manifest.notes)
    with pytest.raises(NoEffectError, match="nothing to do"):
        debias(task, desired=[1.0, 0.0])
    with pytest.raises(CapabilityError, match="does not know all of"):
        erase(task, method="uce_debias")
    with pytest.raises(ConfigError, match="add up to 1"):
        debias(task, desired=[1.0, 1.0])
    with pytest.raises(ConfigError, match="1 wanted shares for 2"):
        debias(task, desired=[1.0])
