"""ESD as a method: first losses, samples and their times, the teacher, erasing from another prompt."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from concept_runs import IDS, batch_of, context, train_a_little
from torch import Tensor

from expunge import rng
from expunge.diffusion import esd
from expunge.diffusion.parameter_sets import select
from expunge.diffusion.process import draw_noise
from expunge.errors import ConfigError
from expunge.methods.esd import ESD
from expunge.schedule import Paired


def predictions(task: Any, batch: Any, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        null = task.conditions([""]).expand(len(x_t), -1, -1)
        return task.eps(x_t, t, task.conditions(batch.captions)), task.eps(x_t, t, null)


@pytest.mark.parametrize(("convention", "eta"), [("current", 2.0), ("paper", 1.0), ("alternative", 2.0)])
def test_first_loss_of_esd_on_images(task: Any, convention: Any, eta: float) -> None:
    ctx = context(task)
    part = ESD(x_t="images", convention=convention, eta=eta)
    batch: Any = batch_of(ctx, "forget")
    x_t, t, _ = task.drawn(batch)
    given, without = predictions(task, batch, x_t, t)
    values = part.bind(ctx)({"forget": batch})["forget"].values.detach()
    factor = {"current": eta, "paper": 1 + eta, "alternative": 1 + eta}[convention]
    torch.testing.assert_close(values, factor**2 * (given - without).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-9)
    assert float(values.min()) > 1e-7


def test_first_loss_of_esd_on_samples_and_what_they_are(task: Any) -> None:
    ctx = context(task)
    ctx.step = 5
    total = 6
    batch: Any = batch_of(ctx, "concept")
    bound = ESD(inference_steps=total).bind(ctx)
    values = bound({"concept": batch})["concept"].values.detach()
    steps = int(esd.draw_steps(ctx.key("esd sampling steps", 5), torch.zeros(1, dtype=torch.int64), "current", total))
    assert 0 < steps < total
    noise = draw_noise(rng.key(batch.key, "esd"), batch.ids, task.latent_shape)
    states, null = task.conditions(batch.captions).detach(), task.conditions([""]).detach()
    x_t, t = esd.denoise(task.eps, task.scheduler, noise, states, null, guidance=3.0, total=total, steps=steps)
    given, without = predictions(task, batch, x_t, t.expand(3))
    torch.testing.assert_close(values, esd.first_losses(given, without, 2.0), rtol=1e-4, atol=1e-9)
    alone = bound({"concept": batch_of(ctx, "concept", IDS[1:2])})["concept"].values.detach()
    torch.testing.assert_close(alone, values[1:2], rtol=1e-4, atol=1e-9)
    ctx.step = 6
    other = bound({"concept": batch_of(ctx, "concept")})["concept"].values.detach()
    assert not torch.allclose(other, values, rtol=1e-2)


@pytest.mark.parametrize("convention", ["paper", "alternative"])
def test_times_belong_to_the_samples(task: Any, convention: Any) -> None:
    """The time of training is that of the noise that is left, up to the width of one sampling step."""
    ctx, seen = context(task), []
    part = ESD(convention=convention, eta=1.0, inference_steps=10)
    batch = batch_of(ctx, "concept", IDS[:1])
    states = esd.States(task.conditions(batch.captions).detach(), task.conditions([""]).detach())  # type: ignore[attr-defined]
    for step in range(12):
        ctx.step, called = step, []

        def counted(x: Tensor, t: Tensor, c: Tensor, called: list[int] = called) -> Tensor:
            called.append(int(t[0]))
            return task.eps(x, t, c)

        _, t = part._sampled(ctx, batch, counted, states)
        following = called[-1] - 100 if called else 901
        seen.append(len(called))
        assert abs(int(t[0]) - following) <= 100
    assert len(set(seen)) > 3


def test_the_target_stays_that_of_the_original(task: Any) -> None:
    ctx = context(task)
    original = copy.deepcopy(task.model)
    bound = ESD(x_t="images", schedule=Paired(streams=("forget",))).bind(ctx)
    batch: Any = batch_of(ctx, "forget")
    x_t, t, _ = task.drawn(batch)
    names = select(task.unet, "esd-x")
    for _ in range(3):
        train_a_little(task, names, lambda: bound({"forget": batch})["forget"].values, 50.0)
    values = bound({"forget": batch})["forget"].values.detach()

    def teacher(x: Tensor, at: Tensor, c: Tensor) -> Tensor:
        found: Tensor = original.unet(x, at, c).sample
        return found

    states = esd.States(task.conditions(batch.captions).detach(), task.conditions([""]).detach())
    with torch.no_grad():
        right = esd.losses(task.eps, teacher, x_t, t, states, eta=2.0)
        wrong = esd.losses(task.eps, task.eps, x_t, t, states, eta=2.0)
    torch.testing.assert_close(values, right, rtol=1e-4, atol=1e-9)
    assert not torch.allclose(values, wrong, rtol=1e-2)


def test_who_samples(task: Any) -> None:
    ctx = context(task)
    ctx.step = 1
    batch = batch_of(ctx, "concept", IDS[:1])
    parts = {s: ESD(sampler=s, inference_steps=8).bind(ctx) for s in ("teacher", "student")}

    def values() -> dict[str, Tensor]:
        return {s: f({"concept": batch})["concept"].values.detach() for s, f in parts.items()}

    first = values()
    torch.testing.assert_close(first["teacher"], first["student"])
    names = select(task.unet, "esd-x")
    train_a_little(task, names, lambda: parts["teacher"]({"concept": batch})["concept"].values, 100.0)
    later = values()
    assert not torch.allclose(later["teacher"], later["student"], rtol=1e-4)


def test_erasing_from_another_prompt_trains_that_prompt(task: Any) -> None:
    ctx = context(task)
    batch: Any = batch_of(ctx, "forget")
    x_t, t, _ = task.drawn(batch)
    part = ESD(x_t="images", erase_from="a square", eta=1.5, prompts=("a circle",))
    values = part.bind(ctx)({"forget": batch})["forget"].values.detach()
    own = replace(batch, captions=("a circle",) * 3)
    given, without = predictions(task, own, x_t, t)
    torch.testing.assert_close(values, 2.25 * (given - without).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-9)
    from_captions = ESD(x_t="images", erase_from="{}", prompts=("a circle",)).bind(ctx)({"forget": batch})["forget"]
    with torch.no_grad():
        whole = task.eps(x_t, t, task.conditions(batch.captions))
    torch.testing.assert_close(
        from_captions.values.detach(), 4 * (given - without).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-9
    )
    assert not torch.allclose(whole, given)
    gradient = torch.autograd.grad(from_captions.values.sum(), task.unet.conv_in.weight)[0]
    assert bool(gradient.any())
    with pytest.raises(ConfigError, match="erases from the concept itself"):
        ESD(convention="paper", erase_from="a square").bind(ctx)
    with pytest.raises(ConfigError, match="reads 'retain'"):
        part.bind(ctx)({"retain": batch_of(ctx, "retain")})
