"""Saliency scores and masks: selection, invariances, files, and the space that holds weights at their bits."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from expunge.context import Context
from expunge.digest import model_digest
from expunge.errors import ArtifactError, ConfigError
from expunge.request import ForgetRequest
from expunge.saliency import Mask, count_ones, layout_digest, make_mask, saliency_scores, top_k
from expunge.spaces.saliency import MaskedSpace, SaliencyMask
from expunge.tasks.tiny import tiny_classifier

REQUEST = ForgetRequest.label("ant")
RATIOS = [i / 10 for i in range(1, 11)]


@pytest.fixture(scope="module")
def trained():
    return tiny_classifier()


@pytest.fixture
def task(trained):
    return copy.deepcopy(trained)


def context(task):
    return Context(task, task.split(REQUEST))


def scores_of(task, batch_size=16, reduction="sample_mean", order=None):
    ctx = context(task)
    batches = list(ctx.batches("forget", batch_size))
    if order is not None:
        batches = [batches[i] for i in order]
    return saliency_scores(task, batches, dict(task.model.named_parameters()), reduction)[0]


def flat(scores):
    return torch.cat([s.reshape(-1) for s in scores.values()])


# -- how many, and which -------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 4), min_size=10, max_size=200),  # few values: many ties and zeros
    st.sampled_from(RATIOS),
)
def test_exactly_k_ones_with_any_ties(values, keep):
    scores = torch.tensor(values, dtype=torch.float32)
    k = count_ones(len(scores), keep)
    mask, gamma = top_k(scores, k)
    assert int(mask.sum()) == k
    if k < len(scores):
        assert float(scores[~mask].max()) <= float(scores[mask].min())
    assert gamma == float(scores[mask].min()) == float(scores.sort(descending=True).values[k - 1])
    stable = torch.sort(scores, descending=True, stable=True).indices[:k]  # the lowest index wins among equals
    assert mask.nonzero().flatten().tolist() == sorted(stable.tolist())


@pytest.mark.parametrize("keep", RATIOS)
def test_all_zero_scores(keep):
    mask = make_mask({"a": torch.zeros(7, 5), "b": torch.zeros(15)}, keep)
    assert mask.ones == count_ones(50, keep)
    assert mask.gamma == 0.0


def test_golden_vectors():
    scores = torch.tensor([3.0, -5, 1, 0, 2, -4]).abs()
    assert top_k(scores, count_ones(6, 0.5))[0].int().tolist() == [1, 1, 0, 0, 0, 1]
    assert top_k(scores, count_ones(6, 0.3))[0].int().tolist() == [0, 1, 0, 0, 0, 0]


@given(st.integers(10, 10**8), st.integers(1, 100))
def test_size_is_the_exact_integer_share(n, percent):
    assert count_ones(n, percent / 100) == n * percent // 100


def test_the_published_rounding_is_one_short_where_floats_are():
    assert [count_ones(90, 0.7, r) for r in ("as_intended", "as_published")] == [63, 62]
    assert [count_ones(100, 0.29, r) for r in ("as_intended", "as_published")] == [29, 28]
    resnet18 = [count_ones(11_173_962, r, "as_published") for r in RATIOS]
    assert resnet18 == [count_ones(11_173_962, r) for r in RATIOS]
    assert resnet18[:5] == [1117396, 2234792, 3352188, 4469584, 5586981]


@pytest.mark.parametrize("select", ["top", "bottom", "random"])
def test_a_mask_without_ones_is_refused(select):
    with pytest.raises(ConfigError, match="selects none"):
        make_mask({"a": torch.rand(5)}, 0.1, select=select)
    assert make_mask({"a": torch.rand(10)}, 0.1, select=select).ones == 1


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, math.nan])
def test_a_share_outside_its_range_is_refused(keep):
    with pytest.raises(ConfigError, match="keep"):
        make_mask({"a": torch.rand(5)}, keep)


@pytest.mark.parametrize("select", ["top", "bottom", "random"])
def test_masks_are_nested_and_of_equal_size(task, select):
    scores = scores_of(task)
    masks = [make_mask(scores, r, select=select, key=3) for r in RATIOS]
    for small, large in pairwise(masks):
        assert all(bool((small.bits[n] <= large.bits[n]).all()) for n in scores)
    assert [m.ones for m in masks] == [count_ones(masks[0].numel, r) for r in RATIOS]
    assert all(bool(m.all()) for m in masks[-1].bits.values())


def test_density_is_the_share_of_ones(task):
    mask = make_mask(scores_of(task), 0.3)
    weighted = sum(mask.density[n] * m.numel() for n, m in mask.bits.items()) / mask.numel
    assert weighted == pytest.approx(mask.ones / mask.numel, rel=1e-6)
    assert max(mask.density.values()) - min(mask.density.values()) > 0.1  # ranked over all weights together
    per_layer = make_mask(scores_of(task), 0.3, scope="layer")
    assert all(m.sum() == max(1, count_ones(m.numel(), 0.3)) for m in per_layer.bits.values())


def test_top_and_bottom_are_complements(task):
    scores = scores_of(task)
    n = flat(scores).numel()
    top, bottom = make_mask(scores, 0.3), make_mask(scores, 0.7, select="bottom")
    assert top.ones + bottom.ones == n
    assert all(bool((top.bits[k] ^ bottom.bits[k]).all()) for k in scores)
    random = make_mask(scores, 0.7, select="random")
    assert not all(bool((top.bits[k] ^ random.bits[k]).all()) for k in scores)


# -- scores --------------------------------------------------------------------------------------------------------


class Scaled:
    """The same task with its loss times a factor."""

    def __init__(self, task, factor):
        self.task, self.factor, self.model = task, factor, task.model

    def loss(self, batch):
        return self.factor * self.task.loss(batch)


@pytest.mark.parametrize("factor", [-1.0, 4.0, -0.25])
def test_sign_and_scale_of_the_loss_do_not_matter(task, factor):
    batches = list(context(task).batches("forget", 16))
    names = dict(task.model.named_parameters())
    one, _ = saliency_scores(task, batches, names)
    other, _ = saliency_scores(Scaled(task, factor), batches, names)
    assert torch.equal(flat(one) * abs(factor), flat(other))  # powers of two, so exact
    a, b = make_mask(one, 0.4), make_mask(other, 0.4)
    assert all(torch.equal(a.bits[n], b.bits[n]) for n in names)


@pytest.mark.parametrize("batch_size", [1, 7, 16, 1000])
def test_batch_size_and_order_do_not_matter(task, batch_size):
    task.model.double()
    reference = flat(scores_of(task, 40))
    torch.testing.assert_close(flat(scores_of(task, batch_size)), reference, rtol=1e-9, atol=1e-14)
    count = len(list(context(task).batches("forget", batch_size)))
    backwards = scores_of(task, batch_size, order=range(count - 1, -1, -1))
    torch.testing.assert_close(flat(backwards), reference, rtol=1e-9, atol=1e-14)


def test_with_the_published_reduction_they_do(task):
    task.model.double()
    whole, uneven = (flat(scores_of(task, b, "batch_mean_sum")) for b in (40, 16))  # 16 + 16 + 8 samples
    assert float((whole / whole.norm() - uneven / uneven.norm()).norm()) > 1e-3
    equal = flat(scores_of(task, 20, "batch_mean_sum"))  # equal batches: only the scale differs
    torch.testing.assert_close(equal / equal.norm(), whole / whole.norm(), rtol=1e-9, atol=1e-14)


def test_the_scores_are_the_gradient_of_the_mean_loss(task):
    got = scores_of(task, 7)
    ctx = context(task)
    task.model.eval()
    loss = task.loss(task.load("forget", ctx.split["forget"], ctx.split)).mean()
    for name, grad in zip(got, torch.autograd.grad(loss, list(task.model.parameters())), strict=True):
        torch.testing.assert_close(got[name], grad.abs(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_found(task, training):
    model = task.model.train(training)
    model.bn1.eval()
    model.fc.weight.requires_grad_(False)
    model.fc.bias.grad = kept = torch.ones_like(model.fc.bias)
    before, modes = model_digest(model), [m.training for m in model.modules()]
    scores_of(task)
    assert model_digest(model) == before
    assert [m.training for m in model.modules()] == modes
    assert model.fc.bias.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert model.conv1.weight.grad is None
    assert [p.requires_grad for p in model.fc.parameters()] == [False, True]


def test_the_last_batch_alone(task):
    batches = list(context(task).batches("forget", 16))
    names = dict(task.model.named_parameters())
    _, last = saliency_scores(task, batches, names)
    alone, _ = saliency_scores(task, batches[-1:], names)
    for name, value in last.items():
        torch.testing.assert_close(value.abs() / len(batches[-1]), alone[name], rtol=1e-3, atol=1e-5)


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_saved_mask_comes_back(task, tmp_path):
    parameters = dict(task.model.named_parameters())
    mask = make_mask(scores_of(task), 0.37)
    mask.save(tmp_path / "mask.safetensors")
    back = Mask.load(tmp_path / "mask.safetensors", parameters)
    assert list(back.bits) == list(parameters)
    assert all(torch.equal(back.bits[n], mask.bits[n]) for n in parameters)
    assert (back.keep, back.gamma) == (mask.keep, mask.gamma)
    assert (tmp_path / "mask.safetensors").stat().st_size <= mask.numel / 8 + 4096


@pytest.mark.parametrize("n", [1, 8, 1_000_003])
def test_a_file_takes_a_bit_per_weight(tmp_path, n):
    bits = {"w": torch.rand(n, generator=torch.Generator().manual_seed(0)) < 0.5}
    Mask(bits, 0.5).save(tmp_path / "mask.safetensors")
    assert (tmp_path / "mask.safetensors").stat().st_size <= n / 8 + 4096


def renamed(parameters):
    return {("head." + n if n.startswith("fc") else n): p for n, p in parameters.items()}


def reordered(parameters):
    return dict(sorted(parameters.items(), reverse=True))


def reshaped(parameters):
    return {n: (p.reshape(-1) if n == "fc.weight" else p) for n, p in parameters.items()}


def shortened(parameters):
    return {n: p for n, p in parameters.items() if n != "fc.bias"}


@pytest.mark.parametrize("change", [renamed, reordered, reshaped, shortened])
def test_a_mask_for_another_layout_is_refused(task, tmp_path, change):
    parameters = dict(task.model.named_parameters())
    make_mask(scores_of(task), 0.5).save(tmp_path / "mask.safetensors")
    assert layout_digest(change(parameters)) != layout_digest(parameters)
    with pytest.raises(ArtifactError, match="another layout"):
        Mask.load(tmp_path / "mask.safetensors", change(parameters))


def test_a_mask_for_other_weights_or_another_forget_set_is_refused(task, tmp_path):
    file = str(tmp_path / "mask.safetensors")
    SaliencyMask().open(context(task)).selection.save(file)
    again = SaliencyMask(file=file).open(context(task))
    assert again.selection.ones == count_ones(again.selection.numel, 0.5)
    with pytest.raises(ArtifactError, match="other forget set"):
        SaliencyMask(file=file).open(Context(task, task.split(ForgetRequest.label("bee"))))
    with torch.no_grad():
        task.model.fc.bias[0] += 1e-3
    with pytest.raises(ArtifactError, match="other weights"):
        SaliencyMask(file=file).open(context(task))


# -- holding weights -----------------------------------------------------------------------------------------------

OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=5e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
}
UNUSUAL = [0.5, -0.0, math.inf, -math.inf, 1e-45, -3.0, 7.0, 0.0]


def stepped(optimiser, freeze="weights", steps=5, clip=None):
    """A vector of unusual values after a few steps; even positions are masked out."""
    theta = nn.Parameter(torch.tensor([v for pair in zip(UNUSUAL, range(1, 9), strict=True) for v in pair]))
    bits = torch.arange(16) % 2 == 1
    space = MaskedSpace({"theta": theta}, Mask({"theta": bits}, 0.5), freeze)
    optimizer = OPTIMISERS[optimiser]([theta])
    start = theta.detach().clone()
    for step in range(steps):
        theta.grad = torch.full_like(theta, 100.0 * (-1) ** step)
        space.before_step()
        if clip:
            nn.utils.clip_grad_norm_([theta], clip)
        optimizer.step()
        space.after_step(optimizer)
    return start, theta.detach(), ~bits, optimizer.state[theta]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_frozen_weights_keep_their_bits_and_have_no_optimiser_state(optimiser, clip):
    start, now, frozen, state = stepped(optimiser, clip=clip)
    assert torch.equal(now[frozen].view(torch.int32), start[frozen].view(torch.int32))
    assert not torch.equal(now[~frozen], start[~frozen])
    buffers = [v for v in state.values() if v.shape == now.shape]
    assert buffers
    assert all(bool((b[frozen] == 0).all()) and bool((b[~frozen] != 0).any()) for b in buffers)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_masking_the_gradient_alone_would_not_keep_them(optimiser):
    start, now, frozen, _ = stepped(optimiser, freeze="gradient")
    assert not torch.equal(now[frozen].view(torch.int32), start[frozen].view(torch.int32))


def test_clipping_sees_the_masked_gradient_only():
    theta = nn.Parameter(torch.zeros(2))
    space = MaskedSpace({"theta": theta}, Mask({"theta": torch.tensor([True, False])}, 0.5))
    theta.grad = torch.tensor([0.5, 1e6])
    space.before_step()
    assert float(nn.utils.clip_grad_norm_([theta], 1.0)) == 0.5
    assert theta.grad.tolist() == [pytest.approx(0.5, rel=1e-5), 0.0]


def test_golden_decay_of_a_weight_masked_by_gradient_only():
    theta = nn.Parameter(torch.ones(2, dtype=torch.float64))
    space = MaskedSpace({"theta": theta}, Mask({"theta": torch.tensor([True, False])}, 0.5), "gradient")
    optimizer = torch.optim.SGD([theta], lr=0.1, momentum=0.9, weight_decay=5e-4)
    seen = []
    for _ in range(1770):
        theta.grad = torch.zeros_like(theta)
        space.before_step()
        optimizer.step()
        space.after_step(optimizer)
        seen.append((float(theta.detach()[1]), float(optimizer.state[theta]["momentum_buffer"][1])))
    assert seen[0] == pytest.approx((0.99995, 5e-4), abs=1e-15)
    assert seen[1] == pytest.approx((0.9998550025, 9.49975e-4), abs=1e-15)
    assert seen[-1][0] == pytest.approx(0.413, abs=5e-4)
