"""Ablating Concepts as a method: captions, anchors, both losses, the prior term, pictures placed at random."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from concept_runs import IDS, batch_of, context, train_a_little
from torch import Tensor

from expunge import rng
from expunge.diffusion import ablation
from expunge.diffusion.parameter_sets import select
from expunge.errors import ConfigError, DataError, RequestError
from expunge.method import build_recipe
from expunge.methods._ablation import AblatingConcepts
from expunge.methods._anchors import sources
from expunge.schedule import Paired


def test_the_same_name_for_concept_and_anchor_is_no_loss(task: Any) -> None:
    ctx = context(task)
    batch = batch_of(ctx, "retain")
    one = batch_of(ctx, "retain", IDS[:1])
    own = task.classes[int(one.targets[0])]
    same = AblatingConcepts(concepts=(own,)).bind(ctx)({"retain": one})["retain"].values
    other = AblatingConcepts().bind(ctx)({"retain": batch})["retain"].values
    assert float(same.detach().abs().max()) == 0.0
    assert float(other.detach().min()) > 1e-8


def test_losses_of_both_variants_and_the_prior(task: Any) -> None:
    ctx = context(task)
    batch: Any = batch_of(ctx, "retain")
    x_t, t, noise = task.drawn(batch)
    anchors = [task.classes[c] for c in batch.targets.tolist()]
    targets = [c.replace(a, "circle") for c, a in zip(batch.captions, anchors, strict=True)]
    assert all("circle" in c and a not in c for c, a in zip(targets, anchors, strict=True))
    with torch.no_grad():
        student = task.eps(x_t, t, task.conditions(targets))
        goal = task.eps(x_t, t, task.conditions(batch.captions))
        again: Any = replace(batch, key=rng.key(batch.key, "prior"))
        prior = task.loss(again)
    found = AblatingConcepts(prior=0.3).bind(ctx)({"retain": batch})
    model = (student - goal).square().mean((1, 2, 3))
    torch.testing.assert_close(found["retain"].values.detach(), model, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found["prior"].values.detach(), prior, rtol=1e-4, atol=1e-9)
    assert found["prior"].weight == 0.3
    by_noise = AblatingConcepts(variant="noise").bind(ctx)({"retain": batch})["retain"].values.detach()
    torch.testing.assert_close(by_noise, (student - noise).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-9)
    assert not torch.allclose(by_noise, model, rtol=0.1)
    with pytest.raises(ConfigError, match="has no teacher"):
        AblatingConcepts(variant="noise", teacher="frozen").bind(ctx)


def test_no_gradient_through_the_first_token(task: Any) -> None:
    ctx = context(task)
    batch = batch_of(ctx, "retain")
    names = select(task.unet, "cross-attn")
    chosen = [task.unet.get_parameter(n) for n in names]

    def gradient(detach: bool) -> Tensor:
        values = AblatingConcepts(detach_first=detach).bind(ctx)({"retain": batch})["retain"].values
        return torch.cat([g.flatten() for g in torch.autograd.grad(values.mean(), chosen)])

    def by_hand() -> Tensor:
        x_t, t, _ = task.drawn(batch)
        texts = batch.captions  # type: ignore[attr-defined]
        anchors = [task.classes[c] for c in batch.targets.tolist()]
        states = task.conditions([c.replace(a, "circle") for c, a in zip(texts, anchors, strict=True)]).detach()
        with ablation.first_token_detached(task.unet):
            values = ablation.losses(task.eps, x_t, t, states, anchor_states=task.conditions(texts).detach())
        return torch.cat([g.flatten() for g in torch.autograd.grad(values.mean(), chosen)])

    torch.testing.assert_close(gradient(True), by_hand(), rtol=1e-4, atol=1e-9)
    assert not torch.allclose(gradient(True), gradient(False), rtol=1e-2)


def test_a_frozen_teacher_differs_only_once_something_is_trained(task: Any) -> None:
    ctx = context(task)
    batch = batch_of(ctx, "retain")
    parts = {t: AblatingConcepts(teacher=t).bind(ctx) for t in ("current", "frozen")}  # type: ignore[arg-type]

    def values() -> dict[str, Tensor]:
        return {s: f({"retain": batch})["retain"].values.detach() for s, f in parts.items()}

    first = values()
    torch.testing.assert_close(first["current"], first["frozen"])
    train_a_little(
        task, select(task.unet, "cross-attn"), lambda: parts["frozen"]({"retain": batch})["retain"].values, 50.0
    )
    later = values()
    assert not torch.allclose(later["current"], later["frozen"], rtol=1e-3)


def test_generated_anchors_are_made_once_by_the_original(task: Any) -> None:
    ctx = context(task)
    part = AblatingConcepts(anchor_images=3, anchor="square", schedule=Paired(streams=("concept",)))
    bound = part.bind(ctx)
    batch = batch_of(ctx, "concept")
    first = bound({"concept": batch})["concept"].values.detach()
    anchors = ctx.state["ablating_concepts.anchors"]
    assert list(anchors.shape) == [3, *task.latent_shape]
    kept = anchors.clone()
    for p in task.unet.parameters():
        p.data += 0.01
    bound({"concept": batch})
    assert torch.equal(anchors, kept)
    other = context(task)
    values = part.bind(other)({"concept": batch_of(other, "concept")})["concept"].values.detach()
    assert not torch.allclose(values, first, rtol=1e-3)
    assert all("square" in c for c, _ in sources(part, ctx))
    with pytest.raises(RequestError, match="give 'captions'"):
        sources(AblatingConcepts(anchor="hexagon"), ctx)
    with pytest.raises(ConfigError, match="need 'anchor'"):
        AblatingConcepts(captions=("a hexagon",), schedule=Paired(streams=("concept",))).bind(ctx)


def test_captions_by_form(task: Any) -> None:
    ctx = context(task)
    batch = batch_of(ctx, "retain")
    texts = batch.captions  # type: ignore[attr-defined]
    style = AblatingConcepts(form="style", concepts=("crayon",))._prepared(ctx, batch, ["crayon"]).targets
    assert all(t in s and "crayon" in s for t, s in zip(texts, style, strict=True))
    assert AblatingConcepts(form="memorised")._prepared(ctx, batch, ["a b c"]).targets == ["a b c"] * 3
    content = AblatingConcepts(form="content")._prepared(ctx, batch, ["nudity"]).targets
    assert all(t in s and "nudity" in s for t, s in zip(texts, content, strict=True))
    with pytest.raises(DataError, match="does not name the anchor"):
        AblatingConcepts(anchor="hexagon")._prepared(ctx, batch, ["circle"])


def test_placed_pictures_have_masks_and_say_so(task: Any) -> None:
    ctx = context(task)
    batch = batch_of(ctx, "retain", torch.arange(8))
    ready = AblatingConcepts(place=True)._prepared(ctx, batch, ["circle"])
    assert ready.mask is not None
    assert list(ready.mask.shape) == [8, 1, *task.latent_shape[1:]]
    assert 0 < float(ready.mask.mean()) < 1
    prefixed = [c for c in ready.anchors if c.startswith(("a far away ", "very small ", "zoomed in ", "close up "))]
    assert prefixed
    assert all("circle" in t for t in ready.targets)
    plain = AblatingConcepts()._prepared(ctx, batch, ["circle"])
    assert plain.mask is None
    assert not torch.allclose(plain.latents, ready.latents, atol=0.1)
    values = AblatingConcepts(place=True, prior=1.0).bind(ctx)({"retain": batch})
    assert bool(values["retain"].values.isfinite().all())
    assert bool(values["prior"].values.isfinite().all())


def test_the_version_of_srs_me(task: Any) -> None:
    """At first the student is the teacher, so the anchor's own term is zero whatever it weighs."""
    ctx = context(task)
    batch: Any = batch_of(ctx, "forget")
    recipe = build_recipe({"method": "ablating_concepts", "profile": "srs-me", "anchor": "square"})
    assert (recipe.optim.name, recipe.optim.lr, recipe.optim.max_steps) == ("adam", 1e-6, 50)
    assert recipe.objective is not None
    bound = recipe.objective.bind(ctx)
    x_t, t, _ = task.drawn(batch)
    anchors = task.conditions([c.replace("circle", "square") for c in batch.captions]).detach()
    original = copy.deepcopy(task.unet)

    def gap(states: Tensor) -> Tensor:
        with torch.no_grad():
            return (task.eps(x_t, t, states) - original(x_t, t, anchors).sample).square().mean((1, 2, 3))

    values = bound({"forget": batch})["forget"].values
    torch.testing.assert_close(values.detach(), gap(task.conditions(batch.captions)), rtol=1e-4, atol=1e-9)
    train_a_little(task, select(task.unet, "cross-attn"), lambda: bound({"forget": batch})["forget"].values, 10.0)
    concept, anchor = gap(task.conditions(batch.captions)), gap(anchors)
    later = bound({"forget": batch})["forget"].values.detach()
    torch.testing.assert_close(later, concept + 10 * anchor, rtol=1e-4, atol=1e-9)
    assert float(anchor.min()) > 0.01 * float(concept.min())
    with pytest.raises(ConfigError, match="needs 'anchor'"):
        AblatingConcepts(variant="srs-me").bind(ctx)
    with pytest.raises(ConfigError, match="trains on forget"):
        recipe.objective.bind(ctx)({"retain": batch_of(ctx, "retain")})
