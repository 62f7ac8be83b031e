"""Concept shifts: which matrices they change, what they leave alone, their loss and their stop rule."""

from collections import OrderedDict

import pytest
import torch
from shift_toys import CHANNELS, WIDTH, Toy, made, make_batch, make_prompts, make_toy, many
from torch import Tensor, nn

from expunge.diffusion.correlation import (
    GradientSum,
    MomentumStop,
    correlation,
    joint_weights,
    l1,
    shifted,
    swapped,
    teach,
    unconfined,
)
from expunge.diffusion.merge import merge
from expunge.diffusion.selection import Matrix, count, cross_attention, key_value, matrices
from expunge.diffusion.shift import Attached, Shift, attach, storage
from expunge.errors import CapabilityError, RequestError


@pytest.fixture
def toy() -> Toy:
    return make_toy()


@pytest.fixture
def prompts() -> dict[str, Tensor]:
    return make_prompts()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return make_batch()


# -- which matrices ----------------------------------------------------------------------------------------------------


def test_full_size_unet_on_the_meta_device() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=64,
            in_channels=4,
            out_channels=4,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        )
    assert count(unet.parameters()) == 859_520_964
    chosen = key_value(unet)
    assert (len(chosen), count(chosen.values())) == (32, 19_169_280)
    assert all(n.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for n in chosen)
    shapes = matrices(chosen)
    assert sorted(m.rows for m in shapes.values()) == [320] * 10 + [640] * 10 + [1280] * 12
    everything = cross_attention(unet)
    assert (len(everything), count(everything.values())) == (80, 43_962_560)
    sizes = {n: storage(shapes, n) for n in (691, 235, 83, 7)}
    assert all(s.dense == 4 * 19_169_280 for s in sizes.values())
    assert sizes[691].shared == 4 * 691 * (24_960 + 768)
    assert sizes[691].factors > sizes[691].dense == sizes[691].smallest
    assert sizes[83].smallest == sizes[83].factors == 4 * 83 * (24_960 + 32 * 768) < sizes[83].dense
    assert sizes[235].smallest < min(sizes[235].factors, sizes[235].dense)
    assert sizes[7].smallest == 1_387_008


def test_a_selection_that_matches_nothing_is_an_error(toy: Toy) -> None:
    plain = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RequestError, match="no cross-attention key or value"):
        key_value(plain)
    with pytest.raises(RequestError, match="no cross-attention parameter"):
        cross_attention(plain)
    assert [n for n in key_value(toy) if "attn1" in n] == []
    assert len(cross_attention(toy)) == 10


def test_matrices_that_do_not_read_the_text_alone_are_refused(toy: Toy) -> None:
    toy.blocks[1].attn2.to_k = nn.Linear(CHANNELS, CHANNELS, bias=False)
    with pytest.raises(CapabilityError, match="different widths"):
        key_value(toy)
    toy.blocks[1].attn2.to_k = nn.Sequential(OrderedDict(base_layer=nn.Linear(WIDTH, CHANNELS)))
    with pytest.raises(CapabilityError, match="merge or unload adapters"):
        key_value(toy)
    with pytest.raises(RequestError, match="needs matrices"):
        matrices({"bias": nn.Parameter(torch.zeros(3))})


def test_fused_projections_are_refused(toy: Toy) -> None:
    toy.blocks[0].attn2.fused_projections = True
    with pytest.raises(CapabilityError, match="unfuse_qkv_projections"):
        attach(toy, {}).__enter__()


# -- protection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_protected_prompts_keep_all_bits(toy: Toy, prompts, batch, dtype: torch.dtype) -> None:
    toy, (x, t) = toy.to(dtype), batch
    states = {n: s.to(dtype) for n, s in prompts.items()}
    shift = made(toy, states, ["null", "a"])
    mixed = torch.stack([states["null"], states["c"], states["a"]])
    plain = toy(x.to(dtype), t, mixed)
    with attach(toy, {"c": shift}), torch.no_grad():
        moved = toy(x.to(dtype), t, mixed)
    assert torch.equal(moved[[0, 2]], plain[[0, 2]])
    assert moved.dtype == dtype
    assert float((moved[1] - plain[1]).abs().max()) > 0.05
    assert not torch.equal(moved[1], plain[1])


def test_a_shift_runs_beside_weights_that_stay_as_they_are(toy: Toy, prompts, batch) -> None:
    x, t = batch
    before = {n: p.clone() for n, p in toy.named_parameters()}
    shift, states = made(toy, prompts, ["null"]), many(prompts["c"])
    plain = toy(x, t, states)
    with attach(toy, {"c": shift}) as attached:
        on = toy(x, t, states)
        with attached.off():
            assert torch.equal(toy(x, t, states), plain)
        assert torch.equal(toy(x, t, states), on)
        with pytest.raises(ZeroDivisionError), attached.off():
            raise ZeroDivisionError
        assert torch.equal(toy(x, t, states), on)
        with pytest.raises(RequestError, match="no shift of 'd' is attached; known: c"):
            attached.only("d").__enter__()
    assert torch.equal(toy(x, t, states), plain)
    with pytest.raises(ZeroDivisionError), attach(toy, {"c": shift}):
        raise ZeroDivisionError
    assert torch.equal(toy(x, t, states), plain)
    with swapped(key_value(toy), merge(key_value(toy), {"c": shift.deltas()}, ["c"])):
        merged = toy(x, t, states)
    assert torch.allclose(merged, on, atol=1e-5)
    assert not torch.allclose(plain, on, atol=1e-2)
    assert all(torch.equal(p, before[n]) for n, p in toy.named_parameters())


def test_coordinates_follow_the_states_of_each_pass(toy: Toy, prompts, batch) -> None:
    x, t = batch
    shift, states = made(toy, prompts, ["null"]), many(prompts["c"])
    with attach(toy, {"c": shift}):
        with torch.inference_mode():
            first = toy(x, t, states)
        second = toy(x, t, states)
        assert torch.equal(first, second)
        assert second.requires_grad
        states.copy_(many(prompts["a"]))
        changed = toy(x, t, states)
        assert torch.equal(changed, toy(x, t, many(prompts["a"])))
        assert not torch.equal(changed, second)
        states.requires_grad_(True)
        toy(x, t, states).sum().backward()
        assert states.grad is not None


def test_misfits_are_refused(toy: Toy, prompts) -> None:
    with pytest.raises(RequestError, match="width 32, the basis has width 16"):
        Shift.on(toy, torch.eye(16, dtype=torch.float64), beta=1.0)
    with pytest.raises(RequestError, match="n > 0"):
        Shift(torch.zeros(0, WIDTH), {}, beta=1.0)
    other = Shift(torch.eye(WIDTH), {"elsewhere.attn2.to_k.weight": Matrix(8, WIDTH)}, beta=1.0)
    with pytest.raises(RequestError, match="which this U-Net lacks"):
        Attached(toy, {"c": other})


# -- the loss ----------------------------------------------------------------------------------------------------------


def gradients(loss: Tensor, shift: Shift) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(shift.omega.values()), retain_graph=True))


def test_at_zero_the_loss_is_the_energy(toy: Toy, prompts, batch) -> None:
    x, t = batch
    shift = made(toy, prompts, ["null"], seed=None)
    with attach(toy, {"c": shift}) as attached:
        found = shifted(toy, attached.off(), x, t, many(prompts["c"]), many(prompts["null"]))
    assert found.losses.shape == (3,)
    assert torch.allclose(found.losses, found.energy, rtol=1e-6)
    assert float(found.ratio) == pytest.approx(1, abs=1e-6)
    one_by_one = [float(r.detach().square().mean()) for r in found.representation]
    assert found.energy.tolist() == pytest.approx(one_by_one, rel=1e-5)
    assert not shift.l1().detach().any()
    assert all(not g.any() for g in gradients(shift.l1(), shift))


def test_one_graded_pass_has_the_gradient_of_two(toy: Toy, prompts, batch) -> None:
    x, t = batch
    c, null = many(prompts["c"]), many(prompts["null"])
    for protected, same in ((["null", "a"], True), (["a"], False)):
        shift = made(toy, prompts, protected)
        with attach(toy, {"c": shift}) as attached:
            short = shifted(toy, attached.off(), x, t, c, null).losses.mean()
            full = unconfined(toy, attached.off(), x, t, c, null).losses.mean()
        pairs = zip(gradients(short, shift), gradients(full, shift), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in pairs) == same


def test_mutually_protected_concepts_train_apart(toy: Toy, prompts, batch) -> None:
    x, t = batch
    for protects, apart in ((["null", "b"], True), (["null"], False)):
        a, b = made(toy, prompts, protects), made(toy, prompts, ["null", "a"], seed=4)
        with attach(toy, {"a": a, "b": b}) as attached:
            teacher = teach(toy, attached.off(), x, t, many(prompts["b"]), many(prompts["null"]))
            loss = correlation(toy(x, t, many(prompts["b"])), teacher.null, teacher).losses.mean()
            with attached.only("b"):
                alone = correlation(toy(x, t, many(prompts["b"])), teacher.null, teacher).losses.mean()
        foreign = max(float(g.abs().max()) for g in gradients(loss, a))
        assert (foreign == 0) == apart
        assert min(float(g.abs().max()) for g in gradients(loss, b)) > 1e-6
        assert torch.equal(loss, alone) == apart


def test_training_lowers_the_correlation_and_leaves_the_protected(toy: Toy, prompts, batch) -> None:
    x, t = batch
    shift = made(toy, prompts, ["null", "a"], seed=None)
    optimizer = torch.optim.Adam(shift.omega.values(), lr=0.05)
    ratios = []
    with attach(toy, {"c": shift}) as attached:
        for _ in range(25):
            found = shifted(toy, attached.off(), x, t, many(prompts["c"]), many(prompts["null"]))
            optimizer.zero_grad()
            (found.losses.mean() + 1e-5 * shift.l1()).backward()
            optimizer.step()
            ratios.append(float(found.ratio))
        with torch.no_grad():
            on = toy(x, t, many(prompts["a"]))
        with attached.off():
            assert torch.equal(on, toy(x, t, many(prompts["a"])))
    assert ratios[0] == pytest.approx(1, abs=1e-6)
    assert ratios[-1] < 0.5
    stop = MomentumStop(0.5).index(ratios)
    assert stop is None or ratios[stop] < 0.5


def test_the_models_own_tensors_can_have_themselves_as_teacher(toy: Toy, prompts, batch) -> None:
    x, t = batch
    parameters = cross_attention(toy)
    base = {n: p.detach().clone() for n, p in parameters.items()}
    first = toy(x, t, many(prompts["c"]))
    for parameter in parameters.values():
        parameter.data.mul_(1.1)
    with swapped(parameters, base):
        assert torch.equal(toy(x, t, many(prompts["c"])), first)
    assert not torch.equal(toy(x, t, many(prompts["c"])), first)
    assert float(l1(p - base[n] for n, p in parameters.items()).detach()) > 0
    with pytest.raises(RequestError, match="no original value of 10 parameters"), swapped(parameters, {}):
        pass
    with pytest.raises(RequestError, match="no tensor"):
        l1([])


# -- optimisation as published, and stopping ---------------------------------------------------------------------------


def test_summed_gradients_are_those_that_are_never_cleared() -> None:
    series = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    ends = {}
    for kind in ("never cleared", "summed", "cleared"):
        parameter = nn.Parameter(torch.zeros(4))
        optimizer, sums = torch.optim.Adam([parameter], lr=0.1), GradientSum()
        for gradient in series:
            if kind != "never cleared":
                optimizer.zero_grad()
            (parameter * gradient).sum().backward()
            if kind == "summed":
                sums.add({"p": parameter, "without gradient": nn.Parameter(torch.zeros(1))})
            optimizer.step()
        ends[kind] = parameter.detach()
    assert torch.equal(ends["summed"], ends["never cleared"])
    assert not torch.allclose(ends["summed"], ends["cleared"])


def test_momentum_stop_by_hand() -> None:
    losses = [1.0, 0.0, 0.5, -9.0]
    rule = MomentumStop(0.1, alpha=0.5)
    assert rule.statistics(losses) == [1.0, 0.5, 0.5, -4.25]
    assert (rule.index(losses), rule.updates(losses)) == (3, 3)
    assert (rule.index(losses[:3]), rule.updates(losses[:3])) == (None, 3)
    assert MomentumStop(0.1, alpha=0.5, at_most=2).index(losses) == 2
    assert MomentumStop(-5.0, alpha=0.5).crossing(losses) is None


def test_as_published_nothing_is_tested_before_twelve_updates() -> None:
    losses = torch.full((15,), -1.0)
    early, published = MomentumStop(0.0), MomentumStop(0.0, published=True)
    assert (early.index(losses), early.updates(losses)) == (0, 0)
    assert (published.index(losses), published.updates(losses)) == (11, 12)
    assert published.crossing(losses) == 0
    assert MomentumStop(-2.0, at_most=10, published=True).index(losses) is None
    assert MomentumStop(-2.0, at_most=11, published=True).index(losses) == 11
    assert MomentumStop(-2.0, at_most=10).index(losses) == 10


def test_joint_weights_level_the_losses() -> None:
    losses = torch.tensor([0.5, -0.1, 0.25])
    assert torch.allclose(joint_weights(losses), torch.tensor([1.0, 5.0, 2.0]))
    assert joint_weights(torch.tensor([1.0, 0.0]), largest=50.0).tolist() == [1.0, 50.0]
    assert joint_weights(torch.zeros(2)).tolist() == [1.0, 1.0]
