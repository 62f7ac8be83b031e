"""Forget-Me-Not: collected attention, the re-steering loss, token positions, textual inversion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from eraser_toys import WIDTH, LinearEps, eps_of, normal, tiny_unet

from expunge import rng
from expunge.diffusion import forget_me_not as fmn
from expunge.diffusion.attention_maps import cross_attention_maps, uniform_norm
from expunge.diffusion.parameter_sets import select
from expunge.errors import CapabilityError, ConfigError, DataError, RequestError

X, TIMES, STATES = normal(2, 4, 8, 8, seed=1), torch.tensor([10, 900]), normal(2, 5, WIDTH, seed=2)
POSITIONS = torch.tensor([[False, True, True, False, False], [False, False, False, True, True]])


def _processors(unet: Any) -> list[Any]:
    return [m.processor for n, m in unet.named_modules() if n.endswith("attn2")]


def test_collected_maps_are_those_of_the_model() -> None:
    unet = tiny_unet()
    before = _processors(unet)
    with torch.no_grad():
        fused = eps_of(unet)(X, TIMES, STATES)
        with cross_attention_maps(unet) as maps:
            plain = eps_of(unet)(X, TIMES, STATES)
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-5)
    assert [m.name for m in maps] == sorted(m.name for m in maps)  # down, mid, up: the order in which they run
    assert len(maps) == len(before)
    for m in maps:
        rows = m.probs.shape[0]
        assert rows == 2 * m.heads
        torch.testing.assert_close(m.probs.sum(-1), torch.ones(m.probs.shape[:2]))
        torch.testing.assert_close(m.probs, (m.query @ m.keys(STATES).transpose(1, 2) * m.scale).softmax(-1))
    assert all(a is b for a, b in zip(_processors(unet), before))
    assert not any("get_attention_scores" in vars(m) for m in unet.modules())


def test_processors_are_put_back_after_an_error() -> None:
    unet = tiny_unet()
    before = _processors(unet)
    with cross_attention_maps(unet):
        assert not any(a is b for a, b in zip(_processors(unet), before))
    with pytest.raises(RuntimeError), cross_attention_maps(unet):
        eps_of(unet)(X, TIMES, STATES[..., 1:])
    assert all(a is b for a, b in zip(_processors(unet), before))
    assert not any("get_attention_scores" in vars(m) for m in unet.modules())


def test_what_cannot_be_collected_is_refused() -> None:
    unet = tiny_unet()
    with pytest.raises(CapabilityError, match="no cross-attention layer"), cross_attention_maps(torch.nn.Linear(2, 2)):
        pass
    with (
        cross_attention_maps(unet),
        pytest.raises(CapabilityError, match="has the processor _Collecting"),
        cross_attention_maps(unet),
    ):
        pass


def test_loss_is_the_norm_of_the_gathered_probabilities() -> None:
    unet = tiny_unet()
    with cross_attention_maps(unet) as maps:
        eps_of(unet)(X, TIMES, STATES)
    probs = [m.probs for m in maps]
    by_hand = []
    for sample, columns in enumerate(([1, 2], [3, 4])):
        own = [m.probs.view(2, m.heads, -1, 5)[sample][..., columns].flatten() for m in maps]
        by_hand.append(torch.cat(own).norm())
    got = fmn.losses(probs, POSITIONS)
    torch.testing.assert_close(got, torch.stack(by_hand))
    torch.testing.assert_close(fmn.joint_loss(probs, POSITIONS), torch.stack(by_hand).norm())
    assert not torch.allclose(fmn.joint_loss(probs, POSITIONS, published=True), torch.stack(by_hand).norm(), rtol=1e-4)
    counts = torch.tensor([sum(p.shape[0] // 2 * p.shape[1] * 2 for p in probs)] * 2)
    torch.testing.assert_close(fmn.losses(probs, POSITIONS, reduction="mean_square"), got.square() / counts)
    one = fmn.losses([p[: p.shape[0] // 2] for p in probs], POSITIONS[:1])
    torch.testing.assert_close(one, got[:1])
    grad = torch.autograd.grad(
        got.sum(), [unet.get_parameter(n) for n in select(unet, "cross-attn")], allow_unused=True
    )
    assert sum(g is None for g in grad) == 1  # the last layer's values


def test_uniform_attention_has_a_closed_form() -> None:
    unet = tiny_unet()
    with torch.no_grad():
        for name in select(unet, "cross-attn"):
            if "to_k" in name:
                unet.get_parameter(name).zero_()
        with cross_attention_maps(unet) as maps:
            eps_of(unet)(X[:1], TIMES[:1], STATES[:1])
    rows = sum(m.heads * m.probs.shape[1] for m in maps)
    assert float(fmn.losses([m.probs for m in maps], POSITIONS[:1])) == pytest.approx(uniform_norm(rows, 2, 5))
    assert uniform_norm(rows, 2, 5) != pytest.approx(uniform_norm(rows, 1, 5))


def test_wrong_positions_are_refused() -> None:
    probs = [torch.full((4, 3, 5), 0.2)]
    with pytest.raises(RequestError, match="prompt of sample 1"):
        fmn.losses(probs, torch.tensor([[True] * 5, [False] * 5]))
    with pytest.raises(DataError, match="layer 0"):
        fmn.losses(probs, torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(DataError, match="layer 0"):
        fmn.losses(probs, torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(DataError, match="inside cross_attention_maps"):
        fmn.losses([], torch.ones(3, 5, dtype=torch.bool))


def test_half_precision_is_summed_in_single() -> None:
    probs = [torch.full((2, 4096, 5), 0.2, dtype=torch.bfloat16)]
    got = fmn.losses(probs, POSITIONS[:1])
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(uniform_norm(8192, 2, 5), rel=2e-3)


def test_positions_and_the_padding_trap() -> None:
    sd1, sd2 = [1, 7, 8, 2, 2, 2], [1, 7, 8, 2, 0, 0]
    assert fmn.token_positions(sd1, [7, 8]).tolist() == [False, True, True, False, False, False]
    for ids in (sd1, sd2):
        assert fmn.token_positions(ids, [7, 8], 2).tolist() == [False, True, True, True, False, False]
    assert fmn.token_positions(sd1, [7, 8], 2, published=True).tolist() == [False, True, True, True, True, True]
    assert fmn.token_positions([5, 5, 5], [5, 5]).tolist() == [True, True, True]
    assert not fmn.token_positions(sd1, [8, 7]).any()
    with pytest.raises(RequestError, match="no tokens"):
        fmn.token_positions(sd1, [])


def test_logit_differences_of_the_srsme_version() -> None:
    unet = tiny_unet()
    with cross_attention_maps(unet) as maps:
        eps_of(unet)(X, TIMES, STATES)
    zero = fmn.srsme_losses(maps, STATES)
    assert zero.shape == (2,)
    assert float(zero.detach().abs().max()) == 0
    anchor = normal(1, 5, WIDTH, seed=3)
    got = fmn.srsme_losses(maps, anchor)
    by_hand = torch.zeros(2)
    for m in maps:
        gap = m.query @ (m.key - m.keys(anchor.expand(2, -1, -1))).transpose(1, 2) * m.scale
        by_hand = by_hand + gap.view(2, -1).square().mean(1)
    torch.testing.assert_close(got, by_hand)
    assert float(got.detach().min()) > 0.1
    with pytest.raises(DataError, match="inside cross_attention_maps"):
        fmn.srsme_losses([], anchor)


def test_drift_needs_two_models_that_differ() -> None:
    same, other = LinearEps(), LinearEps(1)
    assert float(fmn.drift(same, LinearEps(), X, TIMES, STATES).max()) == 0
    far = fmn.drift(other, same, X, TIMES, STATES)
    assert far.shape == (2,)
    assert float(far.min()) > 0
    assert not far.requires_grad


def test_norms_are_pulled() -> None:
    rows = normal(3, 6, seed=4)
    for lr, share in ((1e-3, 0.1), (5e-3, 0.5), (1.0, 1.0)):
        new = fmn.pulled(rows, lr)
        torch.testing.assert_close(new.norm(dim=1), rows.norm(dim=1) * (1 - share) + 0.4 * share)
        torch.testing.assert_close(new / new.norm(dim=1, keepdim=True), rows / rows.norm(dim=1, keepdim=True))
    with pytest.raises(DataError, match="is zero"):
        fmn.pulled(torch.zeros(1, 6), 1e-3)


def test_first_rows_of_new_tokens() -> None:
    table = {"elon": torch.full((64,), 2.0), "musk": torch.full((64,), 3.0)}
    key = rng.key(0, "inversion")
    rows = fmn.initial_rows("elon|musk|<rand-1>|<rand-0.1>", table.__getitem__, key)
    assert rows.shape == (4, 64)
    assert torch.equal(rows[0], table["elon"])
    assert torch.equal(rows[1], table["musk"])
    assert 0.7 < float(rows[2].std()) < 1.3
    assert 0.07 < float(rows[3].std()) < 0.13
    assert torch.equal(fmn.initial_rows("musk|elon|<rand-1>", table.__getitem__, key)[2], rows[2])
    assert not torch.equal(fmn.initial_rows("musk|elon|<rand-1>", table.__getitem__, key + 1)[2], rows[2])
    for wrong in ("elon||musk", "<rand-1>"):
        with pytest.raises(ConfigError, match="separated by"):
            fmn.initial_rows(wrong, table.__getitem__, key)
