"""Textual inversion, stage 1 of Forget-Me-Not: prompts with new tokens, what is trained, and stage 2 on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from concept_runs import REQUEST, batch_of, context
from torch import Tensor

from expunge.diffusion import inversion as pure
from expunge.diffusion.attention_maps import cross_attention_maps
from expunge.diffusion.forget_me_not import pulled
from expunge.diffusion.inversion import Inversion
from expunge.digest import model_digest
from expunge.errors import ConfigError, DivergedError, RequestError
from expunge.method import build_recipe
from expunge.methods import _inversion
from expunge.methods.forget_me_not import ForgetMeNot
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.tasks.tiny_text_to_image import tiny_text_to_image

SHORT = Inversion(tokens=2, steps=3)


def short(steps: int = 3, **settings: Any) -> Recipe:
    recipe = build_recipe({"method": "forget_me_not", "inversion": {"tokens": 2, "steps": 5}, **settings})
    return recipe.replace(optim={"max_steps": steps, "epochs": steps, "lr": 1e-3})


def words(task: Any, text: str) -> list[int]:
    found: list[int] = task.parts.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def test_places_in_a_prompt(task: Any) -> None:
    prompt = pure.prompt_of(task.text, "a photo of {} here", 3)
    plain = task.text.token_ids(["a photo of x x x here"])[0]
    (ids,) = prompt.ids
    assert prompt.places.nonzero()[:, 0].tolist() == [4, 5, 6]
    assert torch.equal(ids[~prompt.places], plain[~prompt.places])
    end = int(task.parts.tokenizer.eos_token_id)
    first = int((ids == end).nonzero()[0])
    assert prompt.positions(end).nonzero()[:, 0].tolist() == [4, 5, 6, first]
    assert prompt.positions(end, published=True).sum() == 3 + (ids == end).sum()
    with pytest.raises(RequestError, match="prompts have"):
        pure.prompt_of(task.text, "a photo of {}", 60)


def test_the_row_of_a_word_gives_the_states_of_the_word(task: Any) -> None:
    prompt = pure.prompt_of(task.text, "a photo of {}", 1)
    (table,) = pure.tables(task.text)
    (star,), (circle,) = words(task, "star"), words(task, "circle")
    found = pure.conditions(task.text, prompt, [table.weight[[star]]]).detach()
    torch.testing.assert_close(found, task.conditions(["a photo of star"]).detach(), rtol=0, atol=1e-6)
    other = pure.conditions(task.text, prompt, [table.weight[[circle]]]).detach()
    assert not torch.allclose(found, other, atol=1e-3)
    assert not table._forward_hooks


def test_only_the_rows_get_gradients(task: Any) -> None:
    ctx = context(task)
    prompt = pure.prompt_of(task.text, "a photo of {}", 2)
    rows = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = _inversion._losses(ctx, task, SHORT, prompt, ctx.split["forget"], 0)
    with _inversion._still(task.model):
        losses(0, [rows]).mean().backward()  # type: ignore[no-untyped-call]
    assert rows.grad is not None
    assert float(rows.grad.abs().min(1).values.max()) > 0
    assert all(p.grad is None for p in task.model.parameters())
    assert all(p.requires_grad for p in task.model.parameters())


def test_updates_are_those_of_adamw_with_norms_pulled() -> None:
    start = torch.tensor([[3.0, 4.0], [0.1, -0.2]])
    goal = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    settings = Inversion(tokens=2, steps=2, lr=2e-3, weight_decay=0.5, norm=0.7)
    told: list[int] = []

    def losses(step: int, rows: list[Tensor]) -> Tensor:
        return (rows[0] - goal).square().sum(1) * (step + 1)

    found, history = pure.learn(losses, [start], settings, told.append)
    x, m, v = start.clone(), torch.zeros(2, 2), torch.zeros(2, 2)
    for step in range(2):
        gradient = (step + 1) * (x - goal)  # of the mean of two rows' sums of squares
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient.square()
        x = x * (1 - 2e-3 * 0.5)
        x = x - 2e-3 * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        n = x.norm(dim=1, keepdim=True)
        x = x * ((n + 0.2 * (0.7 - n)) / n)
    torch.testing.assert_close(found[0], x)
    assert not torch.allclose(found[0], pulled(start, 2e-3, 0.7), rtol=1e-3)
    assert float(history[0]) == pytest.approx(float((start - goal).square().sum(1).mean()))
    assert told == [1, 1]
    with pytest.raises(DivergedError, match="not finite"):
        pure.learn(lambda step, rows: rows[0].sum(1) / 0, [start], settings)


def test_first_values(task: Any) -> None:
    (star,), ring = words(task, "star"), words(task, "zebra")
    assert pure.first_rows(task.text, "star", Inversion()) == f"{star}|<rand-1>|<rand-1>|<rand-1>"
    assert pure.first_rows(task.text, "x", Inversion(initial="star|<rand-0.5>", tokens=2)) == f"{star}|<rand-0.5>"
    assert len(ring) > 1
    with pytest.raises(ConfigError, match=f"'zebra' has {len(ring)} tokens"):
        pure.first_rows(task.text, "x", Inversion(initial="zebra", tokens=1))
    with pytest.raises(ConfigError, match="one piece per token"):
        Inversion(initial="star|star")
    with pytest.raises(ConfigError, match="where the new tokens go"):
        Inversion(template="a photo")


def test_the_loss_falls_and_the_model_keeps_its_bits(task: Any) -> None:
    ctx = context(task)
    before = model_digest(task.model)
    settings = Inversion(tokens=2, steps=60, lr=0.02, batch_size=4)
    prompt, states = _inversion.inverted(ctx, settings, ["circle"], lambda targets, ids: [0] * len(ids))
    assert model_digest(task.model) == before
    assert all(p.grad is None for p in task.model.parameters())
    losses = _inversion._losses(context(task, seed=1), task, settings, prompt, ctx.split["forget"], 0)
    rows = ctx.state["inversion.rows.0"][0]
    (table,) = pure.tables(task.text)
    first = torch.stack([table.weight[words(task, "circle")[0]], torch.zeros(64) + 0.05]).detach()
    with torch.no_grad():
        after, start = (sum(float(losses(s, [r]).mean()) for s in range(20)) for r in (rows, first))
    assert after < start
    assert list(states.shape) == [1, *task.conditions(["a"]).shape[1:]]
    facts = ctx.findings["inversion"]["concepts"][0]
    assert facts["last_loss"] < facts["first_loss"]
    assert facts["norms"][0] == pytest.approx(rows.norm(dim=1).tolist(), rel=1e-5)
    assert ctx.findings["inversion"]["steps"] == 60


def test_stage_two_suppresses_the_new_tokens(task: Any) -> None:
    """Invariant: the loss is the norm of the probabilities gathered by hand, at the new tokens and the text's end."""
    ctx = context(task)
    batch = batch_of(ctx, "forget")
    bound = ForgetMeNot(inversion=SHORT).bind(ctx)
    prompt = pure.prompt_of(task.text, SHORT.template, 2)
    states = pure.conditions(task.text, prompt, [ctx.state["inversion.rows.0"][0]]).detach()
    x_t, t, _ = task.drawn(batch)
    with cross_attention_maps(task.unet) as maps, torch.no_grad():
        task.eps(x_t, t, states.expand(3, -1, -1))
    squares = torch.zeros(3)
    for m in maps:
        squares += m.probs[:, :, 4:7].square().sum((1, 2)).view(3, -1).sum(1)
    found = bound({"forget": batch})
    torch.testing.assert_close(found["forget"].values.detach(), squares.sqrt(), rtol=1e-5, atol=1e-7)
    own = ForgetMeNot().bind(ctx)({"forget": batch})["forget"].values.detach()
    assert not torch.allclose(found["forget"].values.detach(), own, rtol=1e-3)
    assert set(found) == {"forget"}
    both = ForgetMeNot(inversion=SHORT, words=True).bind(ctx)({"forget": batch})
    torch.testing.assert_close(both["forget"].values.detach(), squares.sqrt(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(both["words"].values.detach(), own, rtol=1e-5, atol=1e-7)
    assert both["words"].weight == 1.0


def test_every_concept_learns_from_its_own_images(task: Any) -> None:
    ctx = context(task, ForgetRequest.label("circle", "star"))
    bound = ForgetMeNot(inversion=SHORT).bind(ctx)
    facts = ctx.findings["inversion"]["concepts"]
    labels = task.images_of("forget").labels[ctx.split["forget"]]
    assert [f["name"] for f in facts] == ["circle", "star"]
    assert [f["images"] for f in facts] == [int((labels == task.classes.index(n)).sum()) for n in ("circle", "star")]
    assert facts[0]["digests"] != facts[1]["digests"]
    batch = batch_of(ctx, "forget", torch.arange(6))
    values = bound({"forget": batch})["forget"].values.detach()
    for name in ("circle", "star"):
        alone = context(task, ForgetRequest.label("circle", "star"))
        alone.state |= ctx.state
        i = ["circle", "star"].index(name)
        alone.state["inversion.rows.0"] = ctx.state["inversion.rows.0"][[i, i]]
        same = ForgetMeNot(inversion=SHORT).bind(alone)({"forget": batch})["forget"].values.detach()
        here = batch.targets == task.classes.index(name)
        torch.testing.assert_close(values[here], same[here])
        assert not torch.allclose(values[~here], same[~here], rtol=1e-5)
    with pytest.raises(RequestError, match="'square' has none"):
        _inversion.inverted(context(task), SHORT, ["circle", "square"], lambda targets, ids: [0] * len(ids))


def test_a_killed_run_learns_nothing_twice(task: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):  # noqa: N818
        pass

    def kill(step: int, *_: Any) -> None:
        if step == 2:
            raise Killed

    whole = unlearn(task, REQUEST, short())
    assert whole.digest != unlearn(task, REQUEST, short(inversion={"tokens": 2, "steps": 4})).digest
    with pytest.raises(Killed):
        unlearn(task, REQUEST, short(), run_dir=tmp_path, checkpoint_every=1, on_step=kill)
    monkeypatch.setattr(_inversion.pure, "learn", None)
    resumed = unlearn(task, REQUEST, short(), run_dir=tmp_path, checkpoint_every=1)
    assert resumed.digest == whole.digest
    assert resumed.manifest.findings == whole.manifest.findings
    assert len(resumed.manifest.findings["inversion"]["concepts"]) == 1


def test_two_text_encoders_learn_a_vector_each() -> None:
    task = tiny_text_to_image(kind="xl")
    ctx = context(task)
    batch = batch_of(ctx, "forget")
    values = ForgetMeNot(inversion=SHORT).bind(ctx)({"forget": batch})["forget"].values
    assert bool(values.isfinite().all())
    a, b = (ctx.state[f"inversion.rows.{e}"] for e in range(2))
    assert a.shape == b.shape == (1, 2, 64)
    assert not torch.equal(a, b)


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="learns from images"):
        build_recipe({"method": "forget_me_not", "images": False, "inversion": True})
    with pytest.raises(ConfigError, match="no textual inversion"):
        build_recipe({"method": "forget_me_not", "profile": "srs-me", "inversion": True})
    with pytest.raises(ConfigError, match="goes with 'inversion'"):
        build_recipe({"method": "forget_me_not", "words": True})
    with pytest.raises(ConfigError, match=r"inversion.template"):
        build_recipe({"method": "forget_me_not", "inversion": True, "prompt": "a {}"})
    assert build_recipe("forget_me_not").objective.inversion is None  # type: ignore[union-attr]
    published: Any = build_recipe({"method": "forget_me_not", "profile": "as_published"}).objective
    assert published.inversion == Inversion()
    assert published.end_of_text == "all"
    empty: Any = build_recipe({"method": "forget_me_not", "profile": "as_published", "images": False}).objective
    assert empty.inversion is None
    canvas = build_recipe({"method": "forget_me_not", "profile": "unlearn-canvas"})
    assert (canvas.optim.lr, canvas.optim.max_steps) == (2e-5, 100)
    assert canvas.objective.inversion.lr == 1e-4  # type: ignore[union-attr]
    again = Recipe(**canvas.describe())
    assert again == canvas
