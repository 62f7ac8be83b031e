"""ESD, Ablating Concepts and Forget-Me-Not on the tiny pipeline: what they train, undo, resuming; sets of the U-Net."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from concept_runs import REQUEST, context

from expunge.diffusion.parameter_sets import select
from expunge.digest import model_digest
from expunge.errors import CapabilityError, ConfigError, RequestError
from expunge.method import build_recipe
from expunge.patch import Patch, apply, revert
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.spaces.unet_set import UNetSet
from expunge.tasks.tiny import tiny_classifier
from expunge.tasks.tiny_text_to_image import tiny_text_to_image

METHODS: dict[str, dict[str, Any]] = {
    "esd": {"inference_steps": 4},
    "esd images": {"x_t": "images", "parameters": "u", "batch_size": 2},
    "esd paper": {"profile": "paper", "parameters": "strict", "inference_steps": 4},
    "ablating_concepts": {"batch_size": 2},
    "ablating_concepts generated": {
        "anchors": "generated", "anchor_images": 3, "batch_size": 2, "prior": 0.5, "profile": "style",
        "teacher": "frozen", "parameters": "attn",
    },
    "forget_me_not": {},
    "forget_me_not inverted": {"inversion": {"tokens": 2, "steps": 2}, "words": True},
    "forget_me_not empty": {"images": False, "parameters": "cross-attn-all", "profile": "as_published"},
}  # fmt: skip
SETS = {
    "esd": "esd-x", "esd images": "esd-u", "esd paper": "cross-attn", "ablating_concepts": "cross-attn",
    "ablating_concepts generated": "attn", "forget_me_not": "full-weight", "forget_me_not empty": "cross-attn-all",
    "forget_me_not inverted": "full-weight",
}  # fmt: skip


def short(name: str, steps: int = 3, lr: float = 1e-3) -> Recipe:
    recipe = build_recipe({"method": name.split()[0], **METHODS[name]})
    return recipe.replace(optim={"max_steps": steps, "epochs": steps, "lr": lr})


@pytest.mark.parametrize("name", METHODS)
def test_changes_its_tensors_only_comes_off_and_resumes(task: Any, tmp_path: Any, name: str) -> None:
    class Killed(Exception):  # noqa: N818
        pass

    def kill(step: int, *_: Any) -> None:
        if step == 2:
            raise Killed

    before = model_digest(task.model)
    whole = unlearn(task, REQUEST, short(name))
    assert model_digest(task.model) == before
    declared = {f"unet.{n}" for n in select(task.unet, SETS[name])}
    assert set(whole) <= declared
    assert len(whole) > len(declared) / 2
    loaded = Patch.load(whole.save(tmp_path / "patch.safetensors"))
    apply(task.model, loaded)
    assert model_digest(task.model) != before
    revert(task.model, loaded)
    assert model_digest(task.model) == before
    with pytest.raises(Killed):
        unlearn(task, REQUEST, short(name), run_dir=tmp_path / "run", checkpoint_every=1, on_step=kill)
    taken: list[int] = []
    resumed = unlearn(
        task, REQUEST, short(name), run_dir=tmp_path / "run", checkpoint_every=1, on_step=lambda n, *_: taken.append(n)
    )
    assert taken[0] == 2
    assert resumed.digest == whole.digest
    assert unlearn(task, REQUEST, short(name, steps=2)).digest != whole.digest


@pytest.mark.parametrize("name", ["esd", "uce", "ablating_concepts", "forget_me_not"])
def test_a_classifier_is_refused_before_any_work(name: str) -> None:
    with pytest.raises(CapabilityError, match=f"{name} needs .*diffusion"):
        unlearn(tiny_classifier(), ForgetRequest.label("ant"), build_recipe(name))


@pytest.mark.parametrize("name", ["esd", "forget_me_not"])
def test_two_text_encoders(name: str) -> None:
    task = tiny_text_to_image(kind="xl")
    assert len(unlearn(task, REQUEST, short(name, steps=1)))


def test_a_saliency_mask_under_esd(task: Any) -> None:
    recipe = build_recipe({"method": "salun", "on": "esd", "keep": 0.25})
    patch = unlearn(task, REQUEST, recipe.replace(optim={"max_steps": 1, "epochs": 1, "weight_decay": 0.0}))
    moved = {n: int((patch[n].dense() != 0).sum()) for n in patch}
    assert all(n.startswith("unet.") for n in moved)
    assert 0 < sum(moved.values()) <= 0.25 * sum(p.numel() for p in task.model.parameters())


def test_settings_follow_the_published_recipes() -> None:
    paper, current = build_recipe({"method": "esd", "profile": "paper"}), build_recipe("esd")
    assert (paper.optim.lr, paper.optim.max_steps, paper.optim.epochs) == (1e-5, 1000, 1000)
    assert (current.optim.lr, current.optim.max_steps) == (5e-5, 200)
    assert (paper.objective.eta, paper.objective.sampler) == (1.0, "student")  # type: ignore[union-attr]
    given = build_recipe({"method": "esd", "profile": "paper", "optim": {"lr": 1e-6, "max_steps": 500}})
    assert (given.optim.lr, given.optim.max_steps, given.optim.epochs) == (1e-6, 500, 500)
    content = build_recipe({"method": "ablating_concepts", "profile": "content"})
    assert (content.optim.lr, content.optim.max_steps) == (pytest.approx(3.2e-5), 400)
    assert content.objective.prior == 1.0  # type: ignore[union-attr]
    assert build_recipe("ablating_concepts").optim.lr == pytest.approx(1.6e-5)


@pytest.mark.parametrize(
    ("short_name", "full"),
    [("x", "esd-x"), ("strict", "esd-x-strict"), ("u", "esd-u"), ("all", "esd-all"), ("selfattn", "selfattn"),
     ("kv", "cross-attn"), ("full-weight", "full-weight")],
)  # fmt: skip
def test_the_space_opens_on_the_named_set(task: Any, short_name: str, full: str) -> None:
    opened = UNetSet(parameters=short_name).open(context(task))
    assert list(opened.parameters) == [f"unet.{n}" for n in select(task.unet, full)]
    assert all(p is task.model.get_parameter(n) for n, p in opened.parameters.items())


def test_unknown_and_empty_sets_are_errors(task: Any) -> None:
    with pytest.raises(ConfigError, match=r"esd-y.*did you mean"):
        UNetSet(parameters="esd-y")
    odd = copy.copy(task)
    odd.unet = torch.nn.Linear(2, 2)
    with pytest.raises(RequestError, match="fits no parameter"):
        UNetSet(parameters="x").open(context(odd))
