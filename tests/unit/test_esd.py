"""ESD and the parameter sets: the invariants of targets and losses, draws, selection."""

from __future__ import annotations

import pytest
import torch
from eraser_toys import WIDTH, LinearEps, normal, tiny_unet
from torch import Tensor, nn

from expunge import rng
from expunge.diffusion import esd
from expunge.diffusion.parameter_sets import ALIASES, SETS, published_names, select, size, token_tables
from expunge.errors import CapabilityError, ConfigError, RequestError

X, TIMES = normal(3, 4, 8, 8, seed=1), torch.tensor([10, 500, 900])
C, NULL, FROM = (normal(1, 5, WIDTH, seed=s) for s in (2, 3, 4))


def test_first_losses_of_every_convention() -> None:
    eps = LinearEps()
    ec, e0 = (eps(X, TIMES, s.expand(3, -1, -1)).detach() for s in (C, NULL))
    gap = (ec - e0).square().mean((1, 2, 3))
    for how, eta, factor in (("current", 2.0, 4.0), ("paper", 2.0, 9.0), ("alternative", 1.5, 6.25)):
        got = esd.losses(eps, eps, X, TIMES, esd.States(C, NULL), eta=eta, convention=how)  # type: ignore[arg-type]
        torch.testing.assert_close(got, factor * gap)
        torch.testing.assert_close(got, esd.first_losses(ec, e0, eta, how))  # type: ignore[arg-type]
    assert float(gap.min()) > 0.01


def test_conventions_meet_where_eta_differs_by_one() -> None:
    ec, e0, ef = (normal(2, 4, 3, 3, seed=s) for s in range(3))
    now = esd.target(ec, e0, 2.0)
    torch.testing.assert_close(now, esd.target(ec, e0, esd.convert_eta(2.0, "current", "paper"), convention="paper"))
    assert not torch.allclose(now, esd.target(ec, e0, 2.0, convention="paper"))
    other = esd.target(ec, e0, 1.5, eps_from=ef)
    torch.testing.assert_close(other, ef - 1.5 * (ec - e0))
    torch.testing.assert_close(other, esd.target(ec, e0, 1.5, eps_from=ef, convention="alternative"))
    with pytest.raises(ConfigError, match="erases from the concept itself"):
        esd.target(ec, e0, 1.0, eps_from=ef, convention="paper")


def test_only_the_student_is_trained() -> None:
    student, teacher = LinearEps(), LinearEps()
    seen: list[bool] = []

    def frozen(x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return teacher(x, t, states)

    esd.losses(student, frozen, X, TIMES, esd.States(C, NULL, FROM), eta=1.0).sum().backward()
    assert seen == [False]
    assert teacher.gain.grad is None
    assert student.gain.grad is not None


def test_samples_do_not_mix() -> None:
    """Cutting a batch leaves every loss as it is."""
    eps, teacher = LinearEps(5), LinearEps()
    states = esd.States(C, NULL, FROM)
    whole = esd.losses(eps, teacher, X, TIMES, states, eta=2.0)
    parts = [esd.losses(eps, teacher, X[i : i + 1], TIMES[i : i + 1], states, eta=2.0) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(parts))
    assert len({round(float(v.detach()), 6) for v in whole}) == 3


def test_draws_are_counted_and_in_range() -> None:
    key, ids = rng.key(0, "esd", 3), torch.arange(4000)
    steps = esd.draw_steps(key, ids, "current")
    assert (int(steps.min()), int(steps.max())) == (0, 49)
    alternative = esd.draw_steps(key, ids, "alternative")
    assert (int(alternative.min()), int(alternative.max())) == (1, 48)
    times = esd.draw_paper_times(key, ids, steps)
    assert torch.equal(times // 20, steps)
    assert (int((times % 20).min()), int((times % 20).max())) == (0, 19)
    assert torch.equal(esd.draw_paper_times(key, ids[7:9], steps[7:9]), times[7:9])
    assert not torch.equal(esd.draw_steps(rng.key(0, "esd", 4), ids, "current"), steps)


def test_denoise_goes_the_asked_way() -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    eps, noise = LinearEps(), X[:2]
    x, t = esd.denoise(eps, scheduler, noise, C, NULL, guidance=3.0, total=10, steps=0)
    assert torch.equal(x, noise)
    assert int(t) == int(scheduler.timesteps[0]) == 901
    one, t = esd.denoise(eps, scheduler, noise, C, NULL, guidance=1.0, total=10, steps=1)
    assert int(t) == 801
    at = torch.full((2,), 901)
    by_hand = scheduler.step(eps(noise, at, C.expand(2, -1, -1)), torch.tensor(901), noise).prev_sample
    torch.testing.assert_close(one, by_hand.detach())
    guided, _ = esd.denoise(eps, scheduler, noise, C, NULL, guidance=3.0, total=10, steps=1)
    assert not torch.allclose(guided, one)
    with pytest.raises(ConfigError, match="leave no time"):
        esd.denoise(eps, scheduler, noise, C, NULL, guidance=3.0, total=10, steps=10)


def test_sets_partition_the_model() -> None:
    unet = tiny_unet()
    inside, outside = select(unet, "esd-x"), select(unet, "esd-u")
    assert set(inside) | set(outside) == set(select(unet, "esd-all"))
    assert not set(inside) & set(outside)
    assert set(select(unet, "esd-x-strict")) == set(select(unet, "cross-attn")) < set(inside)
    everything = select(unet, "full-weight")
    assert size(unet, everything)[1] == sum(p.numel() for p in unet.parameters())
    assert any("norm" in n for n in set(everything) - set(select(unet, "esd-all")))
    assert not any(n.startswith(("conv_out", "time_embedding")) for n in select(unet, "compvis-noxattn"))
    assert set(select(unet, "attn-qkv")) < set(select(unet, "attn"))
    for name in [*SETS, *ALIASES]:
        assert select(unet, name)


def test_a_name_that_selects_nothing_is_an_error() -> None:
    unet = tiny_unet()
    assert published_names(unet, "esd_sd.py", "xattn") == []
    assert published_names(unet, "utils.py FineTunedModel", "xattn-strict") == []
    assert select(unet, "xattn-strict")
    with pytest.raises(RequestError, match="did you mean 'esd-x'"):
        select(unet, "esd_x")
    with pytest.raises(RequestError, match="fits no parameter of this Linear"):
        select(nn.Linear(2, 2), "esd-x")
    with pytest.raises(RequestError, match="unknown script"):
        published_names(unet, "esd.py", "esd-x")


def test_the_sdxl_script_selects_less() -> None:
    unet = tiny_unet()
    for name in ("esd-u", "esd-all"):
        gone = set(select(unet, name)) - set(select(unet, name, sdxl=True))
        assert {n.partition(".")[0] for n in gone} >= {"conv_in", "conv_out", "time_embedding"}
        assert all("emb" in n or "block" not in n for n in gone)
        assert published_names(unet, "esd_sdxl.py", name) == select(unet, name, sdxl=True)
    assert select(unet, "esd-x") == select(unet, "esd-x", sdxl=True)


def test_token_tables() -> None:
    encoder = nn.ModuleDict({"embeddings": nn.ModuleDict({"token_embedding": nn.Embedding(4, 2)})})
    assert token_tables(encoder) == ["embeddings.token_embedding.weight"]
    with pytest.raises(CapabilityError, match="0 token tables"):
        token_tables(nn.Linear(2, 2))
