"""Forget-Me-Not as a method: its loss on known attention, empty latents, stopping on drift."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from concept_runs import REQUEST, batch_of, context, train_a_little
from torch import Tensor

from expunge.diffusion.attention_maps import cross_attention_maps, uniform_norm
from expunge.diffusion.parameter_sets import select
from expunge.errors import CapabilityError, ConfigError, RequestError
from expunge.method import build_recipe
from expunge.methods.forget_me_not import ForgetMeNot
from expunge.request import ForgetRequest
from expunge.run import unlearn


def without_keys(task: Any) -> None:
    """Every token gets the same attention."""
    for name, p in task.unet.named_parameters():
        if "attn2.to_k" in name:
            p.data.zero_()


@pytest.mark.parametrize(("end", "columns"), [("none", 1), ("first", 2), ("all", None)])
def test_loss_of_uniform_attention(task: Any, end: Any, columns: int | None) -> None:
    without_keys(task)
    ctx = context(task)
    batch = batch_of(ctx, "forget")
    values = ForgetMeNot(end_of_text=end, prompt="a {} here").bind(ctx)({"forget": batch})["forget"].values.detach()
    ids = task.text.token_ids(["a circle here"])[0]
    columns = columns or 1 + int((ids == task.parts.tokenizer.eos_token_id).sum())
    with cross_attention_maps(task.unet) as maps, torch.no_grad():
        task.eps(batch.inputs[:1], torch.zeros(1, dtype=torch.int64), task.conditions([""]))
    rows = sum(m.probs.shape[0] * m.probs.shape[1] for m in maps)
    assert values.tolist() == pytest.approx([uniform_norm(rows, columns, len(ids))] * 3, rel=1e-5)


def test_loss_is_the_norm_of_gathered_probabilities(task: Any) -> None:
    ctx = context(task)
    batch = batch_of(ctx, "forget")
    x_t, t, _ = task.drawn(batch)
    states = task.conditions(["circle"] * 3)
    with cross_attention_maps(task.unet) as maps, torch.no_grad():
        task.eps(x_t, t, states)
    squares = torch.zeros(3)
    for m in maps:
        squares += m.probs[:, :, 1:3].square().sum((1, 2)).view(3, -1).sum(1)  # "circle" and the end of the text
    found = ForgetMeNot().bind(ctx)({"forget": batch})["forget"].values.detach()
    torch.testing.assert_close(found, squares.sqrt(), rtol=1e-5, atol=1e-7)
    uniform = uniform_norm(sum(m.probs.shape[0] * m.probs.shape[1] for m in maps) // 3, 2, states.shape[1])
    assert abs(float(found[0]) - uniform) > 1e-5


def test_logits_of_the_version_of_srs_me(task: Any) -> None:
    recipe = build_recipe({"method": "forget_me_not", "profile": "srs-me", "prompt": "a picture of a {}"})
    assert (recipe.optim.name, recipe.optim.lr, recipe.optim.max_steps) == ("adam", 1e-5, 20)
    ctx = context(task)
    batch = batch_of(ctx, "forget")
    x_t, t, _ = task.drawn(batch)
    states, anchor = task.conditions(["a picture of a circle"] * 3), task.conditions(["a picture of a"] * 3)
    with cross_attention_maps(task.unet) as maps, torch.no_grad():
        task.eps(x_t, t, states)
        expected = sum(
            (m.query @ (m.keys(states) - m.keys(anchor)).mT * m.scale).square().mean((1, 2)).view(3, -1).mean(1)
            for m in maps
        )
    assert recipe.objective is not None
    found = recipe.objective.bind(ctx)({"forget": batch})["forget"].values.detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)
    assert float(found.min()) > 1e-4
    without_keys(task)
    again = recipe.objective.bind(ctx)({"forget": batch})["forget"].values.detach()
    assert float(again.max()) == 0.0


def test_images_of_several_classes_go_with_their_own_names(task: Any) -> None:
    ctx = context(task, ForgetRequest.label("circle", "star"))
    batch = batch_of(ctx, "forget", torch.arange(6))
    names = [task.classes[c] for c in batch.targets.tolist()]
    assert set(names) == {"circle", "star"}
    found = ForgetMeNot().bind(ctx)({"forget": batch})["forget"].values.detach()
    alone = {n: ForgetMeNot(concepts=(n,)).bind(ctx)({"forget": batch})["forget"].values.detach() for n in set(names)}
    expected = torch.stack([alone[n][i] for i, n in enumerate(names)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(alone["circle"], alone["star"], rtol=1e-3)


def test_attention_to_the_concept_falls(task: Any) -> None:
    ctx = context(task)
    batch = batch_of(ctx, "forget")
    bound = ForgetMeNot().bind(ctx)

    def values() -> Tensor:
        return bound({"forget": batch})["forget"].values

    before = float(values().detach().mean())
    keys = [n for n in select(task.unet, "cross-attn") if "to_k" in n]
    for _ in range(3):
        train_a_little(task, keys, values, 0.05)
    assert float(values().detach().mean()) < before


def test_empty_latents_instead_of_images(task: Any) -> None:
    ctx = context(task)
    batch = batch_of(ctx, "concept")
    found = ForgetMeNot().bind(ctx)({"concept": batch})["concept"].values.detach()
    moved = replace(batch, inputs=batch.inputs + 3)
    torch.testing.assert_close(ForgetMeNot().bind(ctx)({"concept": moved})["concept"].values.detach(), found)
    images = ForgetMeNot().bind(ctx)({"forget": replace(moved, role="forget")})["forget"].values.detach()
    assert not torch.allclose(images, found)
    with pytest.raises(ConfigError, match="reads 'retain'"):
        ForgetMeNot().bind(ctx)({"retain": batch_of(ctx, "retain")})


def test_stops_when_other_prompts_drift(task: Any) -> None:
    recipe = build_recipe("forget_me_not").replace(optim={"max_steps": 4, "epochs": 4, "lr": 1e-3})
    watched = recipe.objective.model_copy(update={"max_drift": 1e-12, "drift_every": 2})  # type: ignore[union-attr]
    patch = unlearn(task, REQUEST, recipe.replace(objective=watched))
    assert any("stopped after step 2 of" in n and "other prompts have moved" in n for n in patch.manifest.notes)
    loose = watched.model_copy(update={"max_drift": 1e6})
    assert not unlearn(task, REQUEST, recipe.replace(objective=loose)).manifest.notes


def test_names_must_reach_the_model(task: Any) -> None:
    with pytest.raises(RequestError, match="do not occur in the prompt"):
        ForgetMeNot(prompt="a " * 40 + "{}").bind(context(task))
    with pytest.raises(ConfigError, match="where the name goes"):
        ForgetMeNot(prompt="a circle")
    with pytest.raises(CapabilityError, match="no concept"):
        ForgetMeNot().bind(context(task, ForgetRequest.samples([0, 1])))
    assert ForgetMeNot(concepts=("circle",)).bind(context(task, ForgetRequest.samples([0, 1])))
