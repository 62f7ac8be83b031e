"""Ablating Concepts: losses, the detached first token, captions and placed pictures."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from eraser_toys import WIDTH, LinearEps, eps_of, normal, tiny_unet
from torch import Tensor, nn

from expunge import rng
from expunge.diffusion import ablation, captions
from expunge.diffusion.parameter_sets import select
from expunge.errors import CapabilityError, ConfigError, DataError, RequestError

X, TIMES = normal(3, 4, 8, 8, seed=1), torch.tensor([10, 500, 900])
TARGET, ANCHOR, NOISE = normal(3, 5, WIDTH, seed=2), normal(3, 5, WIDTH, seed=3), normal(3, 4, 8, 8, seed=4)


def test_masked_means() -> None:
    a, b, mask = normal(2, 4, 8, 8, seed=5), normal(2, 4, 8, 8, seed=6), torch.zeros(2, 1, 8, 8)
    mask[0, :, 1:4, 2:7], mask[1, :, 5:, :] = 1, 1
    by_hand = torch.stack([(a - b)[0, :, 1:4, 2:7].square().mean(), (a - b)[1, :, 5:, :].square().mean()])
    torch.testing.assert_close(ablation.masked_squares(a, b, mask), by_hand)
    torch.testing.assert_close(ablation.masked_squares(a, b, mask, "channel_sum"), 4 * by_hand)
    torch.testing.assert_close(ablation.masked_squares(a, b), (a - b).square().mean((1, 2, 3)))
    torch.testing.assert_close(ablation.masked_squares(a, b), ablation.masked_squares(a, b, torch.ones_like(mask)))
    assert not torch.allclose(ablation.masked_squares(a, b), by_hand)
    with pytest.raises(ConfigError, match="one channel"):
        ablation.masked_squares(a, b, torch.ones(2, 4, 8, 8))


def test_no_loss_where_target_and_anchor_are_the_same() -> None:
    eps = LinearEps()
    assert float(ablation.losses(eps, X, TIMES, ANCHOR, anchor_states=ANCHOR).detach().abs().max()) == 0
    assert float(ablation.losses(eps, X, TIMES, TARGET, anchor_states=ANCHOR).detach().min()) > 0.01


def test_goals() -> None:
    """The goal is the current prediction without gradient, a frozen one, or the noise."""
    eps, frozen = LinearEps(), LinearEps(7)
    prediction, goal = eps(X, TIMES, TARGET), eps(X, TIMES, ANCHOR).detach()
    loss = ablation.losses(eps, X, TIMES, TARGET, anchor_states=ANCHOR)
    torch.testing.assert_close(loss, (prediction - goal).square().mean((1, 2, 3)))
    (mine,) = torch.autograd.grad(loss.sum(), eps.gain, retain_graph=True)
    (by_hand,) = torch.autograd.grad((prediction - goal).square().mean((1, 2, 3)).sum(), eps.gain, retain_graph=True)
    (through,) = torch.autograd.grad((prediction - eps(X, TIMES, ANCHOR)).square().mean((1, 2, 3)).sum(), eps.gain)
    torch.testing.assert_close(mine, by_hand)
    assert not torch.allclose(mine, through)
    other = ablation.losses(eps, X, TIMES, TARGET, anchor_states=ANCHOR, teacher=frozen)
    torch.testing.assert_close(other, (eps(X, TIMES, TARGET) - frozen(X, TIMES, ANCHOR)).square().mean((1, 2, 3)))
    noise = ablation.losses(eps, X, TIMES, TARGET, noise=NOISE)
    torch.testing.assert_close(noise, ablation.denoising_losses(eps, X, TIMES, TARGET, NOISE))
    assert not torch.allclose(noise, loss)
    for wrong in ({}, {"anchor_states": ANCHOR, "noise": NOISE}, {"noise": NOISE, "teacher": frozen}):
        with pytest.raises(ConfigError):
            ablation.losses(eps, X, TIMES, TARGET, **wrong)  # type: ignore[arg-type]


def test_srsme_version_adds_ten_times_the_anchor() -> None:
    student, teacher = LinearEps(3), LinearEps()
    concept, anchor = TARGET[:1], ANCHOR[:1]
    goal = teacher(X, TIMES, anchor.expand(3, -1, -1))
    terms = [(student(X, TIMES, s.expand(3, -1, -1)) - goal).square().mean((1, 2, 3)) for s in (concept, anchor)]
    got = ablation.srsme_losses(student, teacher, X, TIMES, concept, anchor)
    torch.testing.assert_close(got, terms[0] + 10 * terms[1])
    torch.testing.assert_close(
        ablation.srsme_losses(student, teacher, X, TIMES, concept, anchor, anchor_weight=0.0), terms[0]
    )


def _state_gradient(unet: nn.Module) -> Tensor:
    states = TARGET.clone().requires_grad_()
    eps_of(unet)(X, TIMES, states).square().sum().backward()
    assert states.grad is not None
    return states.grad


def test_no_gradient_through_the_first_token() -> None:
    unet = tiny_unet()
    unet.requires_grad_(False)
    with torch.no_grad():
        before = eps_of(unet)(X, TIMES, TARGET)
    with ablation.first_token_detached(unet):
        with torch.no_grad():
            assert torch.equal(eps_of(unet)(X, TIMES, TARGET), before)
        inside = _state_gradient(unet)
    assert float(inside[:, 0].abs().max()) == 0
    assert float(inside[:, 1:].abs().min(-1).values.max()) > 0
    outside = _state_gradient(unet)
    assert float(outside[:, 0].abs().max()) > 0
    torch.testing.assert_close(inside[:, 1:], outside[:, 1:])


def test_hooks_are_gone_after_an_error() -> None:
    unet = tiny_unet()
    with ablation.first_token_detached(unet):
        assert sum(len(m._forward_hooks) for m in unet.modules()) == len(select(unet, "cross-attn"))
    with pytest.raises(RuntimeError), ablation.first_token_detached(unet):
        eps_of(unet)(X, TIMES, TARGET[..., 1:])
    assert not any(m._forward_hooks for m in unet.modules())
    with pytest.raises(CapabilityError, match="no modules attn2"), ablation.first_token_detached(nn.Linear(2, 2)):
        pass


def test_recipes_name_sets_that_exist() -> None:
    unet = tiny_unet()
    assert all(select(unet, recipe["parameters"]) for recipe in ablation.RECIPES.values())


def _drawn(build: str, n: int = 600) -> Counter[str]:
    keys = [rng.key(0, "captions", i) for i in range(n)]
    return Counter(captions.style_caption("a tree", "van gogh", k, build) for k in keys)  # type: ignore[arg-type]


def test_style_captions() -> None:
    after, before = "a tree, in the style of van gogh", "in van gogh's style, a tree"
    even, published, compvis = (_drawn(v) for v in ("as_intended", "diffusers", "compvis"))
    assert set(even) == set(published) == {after, before}
    assert 0.43 < even[before] / 600 < 0.57
    assert 0.6 < published[before] / 600 < 0.73
    assert len(compvis) == 6
    assert "van gogh van gogh inspired painting, a tree" in compvis
    assert _drawn("compvis") == compvis


def test_replaced_captions() -> None:
    assert captions.replaced_caption("A Cat on cattle", "cat", "grumpy cat") == "A grumpy cat on cattle"
    assert captions.replaced_caption("A Cat", "cat", "grumpy cat", lower=True) == "a grumpy cat"
    assert captions.replaced_caption("cattle", "cat", "grumpy cat", published=True) == "grumpy cattle"
    assert captions.replaced_caption("a dog", "cat", "grumpy cat", published=True) == "a dog"
    with pytest.raises(DataError, match="does not name the anchor 'cat'"):
        captions.replaced_caption("cattle", "cat", "grumpy cat")
    assert captions.replaced_caption("a robot", "robot", r"r2\d2") == r"a r2\d2"


def test_content_captions_take_turns() -> None:
    made = [captions.content_caption("a room", ["nudity", "blood"], i, rng.key(0, "c", i)) for i in range(60)]
    assert all("nudity" in c for c in made[::2])
    assert all("blood" in c for c in made[1::2])
    assert {c.replace("blood", "nudity") for c in made} == {
        "nudity, a room",
        "in nudity style, a room",
        "a room, nudity",
    }


def test_names_and_templates() -> None:
    assert captions.parse_target("*+a memorised caption") == ("*", "a memorised caption")
    for wrong in ("cat", "+cat", "cat+ "):
        with pytest.raises(RequestError, match="anchor\\+target"):
            captions.parse_target(wrong)
    assert captions.concepts_of("a b; c") == ["a b", "c"]
    with pytest.raises(RequestError, match="';'"):
        captions.concepts_of("a;;b")
    art, thing = captions.expanded("Monet", "art"), captions.expanded("church", "object")
    assert len(art) == len(thing) == 6
    assert "photo of church" in thing
    assert not set(art) & set(captions.expanded("Monet", "object")[1:])


def test_placed_pictures() -> None:
    """Valid cells show the picture only, the ground is never valid, and the caption says what was done."""
    image, kinds = torch.full((3, 64, 64), 0.5), Counter[str]()
    for i in range(300):
        placed = captions.place(image, rng.key(0, "place", i), 8, fill=-1.0)
        assert placed.image.shape == image.shape
        assert placed.mask.shape == (1, 8, 8)
        assert set(placed.mask.unique().tolist()) <= {0.0, 1.0}
        assert float(placed.mask.sum()) >= 1
        shown = (placed.image[0] > 0.49).float()
        cells = shown.view(8, 8, 8, 8).mean((1, 3))
        assert float(cells[placed.mask[0] > 0].min()) == 1
        share = float(shown.mean()) ** 0.5
        kinds[placed.prefix] += 1
        if placed.prefix in ("a far away ", "very small "):
            assert share < 0.6
        elif placed.prefix:
            assert float(placed.mask.mean()) == 1
        else:
            assert share >= 0.6
        if share < 1:
            assert float(placed.mask.mean()) < share**2
    assert set(kinds) == {"", "a far away ", "very small ", "zoomed in ", "close up "}
    zooms = kinds["zoomed in "] + kinds["close up "]
    assert 0.25 < zooms / 300 < 0.42


def test_placing_is_counted_and_never_leaves_an_empty_mask() -> None:
    image = normal(3, 16, 16, seed=8)
    for i in range(200):
        key = rng.key(1, "place", i)
        placed, again = captions.place(image, key, 8), captions.place(image, key, 8)
        assert torch.equal(placed.image, again.image)
        assert torch.equal(placed.mask, again.mask)
        assert placed.prefix == again.prefix
        assert float(placed.mask.sum()) >= 1
    with pytest.raises(ConfigError, match="cannot place"):
        captions.place(image, 0, 5)
