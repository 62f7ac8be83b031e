"""One-shot edits: by hand, at their edges, and under masks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from expunge.context import Context
from expunge.data.base import MemoryImages, Splits
from expunge.edits import gradients
from expunge.edits.gradients import flatten, gram_product, sample_gradients, sample_squares
from expunge.errors import DivergedError, NoEffectError
from expunge.method import build_recipe
from expunge.methods import influence
from expunge.methods.fisher_forgetting import FisherForgetting
from expunge.methods.influence import conjugate_gradients
from expunge.methods.ssd import SSD
from expunge.patch import apply
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.saliency import Mask
from expunge.spaces.layers import AllWeights
from expunge.tasks.classifier import ClassifierTask
from expunge.tasks.tiny import tiny_classifier

REQUEST = ForgetRequest.label("ant")
EDITS = {"influence": {"samples": 40}, "fisher_forgetting": {}, "ssd": {"alpha": 0.5, "dampening": 0.1}}


@pytest.fixture(scope="module")
def trained():
    return tiny_classifier(dropout=0.0, steps=25)


@pytest.fixture
def task(trained):
    return copy.deepcopy(trained)


def recipe(name: str, **settings: object) -> Recipe:
    return build_recipe({"method": name, **EDITS[name], **settings})


def context(task: ClassifierTask) -> tuple[Context, dict[str, torch.Tensor]]:
    task.model.eval()
    ctx = Context(task, task.split(REQUEST))
    return ctx, {n: p.detach() for n, p in task.model.named_parameters()}


def one_by_one(task: ClassifierTask, ctx: Context, role: str) -> torch.Tensor:
    """Per-sample gradients ``[n, N]`` the slow way."""
    rows = []
    for i in ctx.split[role]:
        loss = task.loss(task.load(role, i[None], ctx.split)).sum()
        rows.append(flatten(dict(enumerate(torch.autograd.grad(loss, list(task.model.parameters()))))))
    return torch.stack(rows)


def twins(task: ClassifierTask) -> tuple[ClassifierTask, ForgetRequest]:
    """Every image twice: one copy is to be forgotten, the other to be retained."""
    n = len(task.data.train)
    x, y = task.data.train.images(torch.arange(n)), task.data.train.labels
    both = MemoryImages(torch.cat([x, x]), torch.cat([y, y]), task.classes)
    return ClassifierTask(task.model, Splits("twins", both, task.data.test)), ForgetRequest.samples(list(range(n)))


# -- gradients -----------------------------------------------------------------------------------------------------


def test_sample_gradients_equal_autograd(task, monkeypatch):
    ctx, parameters = context(task)
    batch = ctx.load("forget", ctx.split["forget"])
    want = one_by_one(task, ctx, "forget")
    for limit in (gradients.CHUNK_BYTES, 7 * 4 * want.shape[1], 1):  # all at once, by sevens, one by one
        monkeypatch.setattr(gradients, "CHUNK_BYTES", limit)
        found = list(sample_gradients(ctx, batch, parameters))
        assert len(found) == {gradients.CHUNK_BYTES: len(found), 1: 40}.get(limit, 6)
        rows = torch.cat([torch.cat([g.flatten(1) for g in chunk.values()], 1) for _, chunk in found])
        torch.testing.assert_close(rows, want, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(want[0], want[1], rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in task.model.parameters())


class Branching(nn.Module):
    """Looks at its values, which cannot be vectorised."""

    def __init__(self, inner: nn.Module, message: str | None = None) -> None:
        super().__init__()
        self.inner, self.message = inner, message

    def forward(self, x):
        if self.message is not None:
            raise RuntimeError(self.message)
        return self.inner(x) * (1.0 if x.sum() > 0 else 2.0)


def test_a_model_that_cannot_be_vectorised(task):
    ctx, parameters = context(task)
    batch = ctx.load("forget", ctx.split["forget"])
    want = sample_squares(ctx, batch, parameters)
    assert not ctx.notes
    task.model = Branching(task.model)
    got = sample_squares(ctx, batch, {f"inner.{n}": p for n, p in parameters.items()})
    torch.testing.assert_close(flatten(got), flatten(want))
    assert "one by one" in ctx.notes[0]
    task.model.message = "something else"
    with pytest.raises(RuntimeError, match="something else"):
        sample_squares(ctx, batch, {f"inner.{n}": p for n, p in parameters.items()})


def test_weighted_and_shifted_squares(task):
    ctx, parameters = context(task)
    rows = one_by_one(task, ctx, "forget")
    weights = torch.linspace(0, 1, len(rows))
    got = sample_squares(ctx, ctx.load("forget", ctx.split["forget"]), parameters, weights=weights, shift=0.5)
    torch.testing.assert_close(flatten(got), ((rows + 0.5) ** 2 * weights[:, None]).sum(0), rtol=1e-4, atol=1e-5)
    plain = sample_squares(ctx, ctx.load("forget", ctx.split["forget"]), parameters)
    assert not torch.allclose(flatten(plain), flatten(got), rtol=1e-2)


def test_a_change_that_is_not_finite_is_refused(task):
    ctx, parameters = context(task)
    space = AllWeights().open(ctx)
    with pytest.raises(DivergedError, match=r"'fc\.bias' is not finite"):
        gradients.changes_within(space, {"fc.bias": parameters["fc.bias"] / 0}, "test")


# -- influence -----------------------------------------------------------------------------------------------------


def test_products_and_solver_equal_dense_algebra(task):
    task.model.double()
    ctx, parameters = context(task)
    rows = one_by_one(task, ctx, "forget")
    batch = ctx.load("forget", ctx.split["forget"])
    x = torch.linspace(-1, 1, rows.shape[1], dtype=torch.float64)
    vector = gradients.unflatten(x, parameters)
    got = flatten(gram_product(task, batch, parameters, vector))
    torch.testing.assert_close(got, rows.T @ (rows @ x), rtol=1e-9, atol=1e-9)
    # Woodbury: (I + G^T G / a)^-1 x = x - G^T (a I + G G^T)^-1 G x
    inner = torch.linalg.solve(3.0 * torch.eye(len(rows), dtype=torch.float64) + rows @ rows.T, rows @ x)
    solved = conjugate_gradients(lambda v: v + rows.T @ (rows @ v) / 3.0, x)
    torch.testing.assert_close(solved, x - rows.T @ inner, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(solved, x, rtol=1e-3)


def test_a_step_that_is_not_solved_is_an_error(monkeypatch):
    monkeypatch.setattr(influence, "ITERATIONS", 2)
    spread = torch.logspace(0, 6, 50, dtype=torch.float64)
    with pytest.raises(DivergedError, match="larger 'damping'"):
        conjugate_gradients(lambda v: spread * v, torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("profile", ["as_intended", "as_published"])
def test_identical_sets_leave_nothing_to_undo(task, profile):
    same, request = twins(task)
    with pytest.raises(NoEffectError):
        unlearn(same, request, recipe("influence", profile=profile))
    assert len(unlearn(same, REQUEST, recipe("influence", profile=profile)))


def test_influence_by_hand_with_weak_curvature(task):
    ctx, _ = context(task)
    forget, retain = one_by_one(task, ctx, "forget"), one_by_one(task, ctx, "retain")
    v = forget.sum(0) / 160 - 40 / (160 * 120) * retain.sum(0)
    patch = unlearn(task, REQUEST, recipe("influence", alpha=2.0, damping=1e9))
    got = flatten({n: patch.changes[n].dense() for n, _ in task.model.named_parameters()})
    torch.testing.assert_close(got, 2 * v, rtol=1e-3, atol=1e-6)
    strong = unlearn(task, REQUEST, recipe("influence", alpha=2.0, damping=1.0))
    assert float(flatten({n: c.dense() for n, c in strong.changes.items()}).norm()) < 0.9 * float(got.norm())


def test_influence_raises_the_forget_loss_most(task):
    ctx, _ = context(task)

    def losses():
        with torch.no_grad():
            return [float(task.loss(ctx.load(r, ctx.split[r])).mean()) for r in ("forget", "retain")]

    before = losses()
    apply(task.model, unlearn(task, REQUEST, recipe("influence", alpha=1.0)))
    after = losses()
    assert after[0] - before[0] > 2 * abs(after[1] - before[1])


# -- SSD -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dampening", [1.0, 0.25])
def test_ssd_by_hand(task, dampening):
    ctx, parameters = context(task)
    squares = {r: one_by_one(task, ctx, r).double() ** 2 for r in ("forget", "retain")}
    f, whole = squares["forget"].mean(0), torch.cat(list(squares.values())).mean(0)
    theta = flatten(parameters).double()
    want = torch.where(f > 0.8 * whole, torch.clamp(dampening * whole / f, max=1) * theta, theta)
    assert 0 < int((want != theta).sum()) < len(theta)
    unlearn(task, REQUEST, recipe("ssd", alpha=0.8, dampening=dampening), inplace=True)
    torch.testing.assert_close(flatten(dict(task.model.named_parameters())).double(), want, rtol=1e-4, atol=1e-6)
    other = unlearn(copy.deepcopy(task), REQUEST, recipe("ssd", alpha=0.8, profile="as_published"))
    assert len(other)


def test_ssd_squares_of_batch_means(task):
    ctx, parameters = context(task)
    rows = {r: one_by_one(task, ctx, r) for r in ("forget", "retain")}
    means = {r: torch.stack([g.mean(0) for g in torch.split(t, 32)]) ** 2 for r, t in rows.items()}
    whole, forget = SSD(squares="batch", batch_size=32).importances(ctx, parameters)
    torch.testing.assert_close(flatten(forget), means["forget"].mean(0), rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(flatten(whole), torch.cat(list(means.values())).mean(0), rtol=1e-3, atol=1e-8)
    single = SSD(squares="batch", batch_size=1).importances(ctx, parameters)[0]
    torch.testing.assert_close(flatten(single), flatten(SSD().importances(ctx, parameters)[0]), rtol=1e-3, atol=1e-7)
    assert not torch.allclose(flatten(whole), flatten(single), rtol=0.1)


@pytest.mark.parametrize(("alpha", "message"), [(1e300, "at most 4 F"), (4.0, "choose a smaller")])
def test_ssd_that_selects_nothing_says_why(task, alpha, message):
    with pytest.raises(NoEffectError, match=message):
        unlearn(task, REQUEST, recipe("ssd", alpha=alpha))


def test_ssd_with_identical_sets_selects_nothing(task):
    same, request = twins(task)
    with pytest.raises(NoEffectError, match="dampens no weight: F_f is at most 1 F"):
        unlearn(same, request, recipe("ssd", alpha=1.0))
    assert len(unlearn(same, request, recipe("ssd", alpha=0.99, dampening=0.5)))


def test_a_weight_without_gradient_is_never_dampened(task):
    with torch.no_grad():  # channel 3 is dead: nothing flows through it
        task.model.bn2.weight[3], task.model.bn2.bias[3] = 0, -1
    start = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    unlearn(task, REQUEST, recipe("ssd", alpha=1e-6, dampening=0.0), inplace=True)
    assert torch.equal(task.model.conv2.weight[3], start["conv2.weight"][3])
    assert torch.equal(task.model.fc.weight[:, 3], start["fc.weight"][:, 3])
    alive = [i for i in range(16) if i != 3]
    assert float(task.model.fc.weight.detach()[:, alive].abs().max()) == 0


# -- Fisher --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["scrub", "diagonal"])
def test_fisher_noise_has_the_stated_scale(task, variant):
    ctx, parameters = context(task)
    edit = FisherForgetting(variant=variant, alpha=1e-4, samples=30)
    mean, variance = edit.noise_scale(ctx, parameters, edit.fisher(ctx, parameters))
    new = {n: parameters[n] + c.dense() for n, c in edit.compute(ctx, AllWeights().open(ctx)).items()}
    draws = flatten({n: (new[n] - mean[n]) / variance[n].sqrt() for n in new})
    assert float(draws.std()) == pytest.approx(1, abs=0.1)
    assert float(draws.mean()) == pytest.approx(0, abs=0.1)
    removed = mean["fc.weight"][0].eq(0).all()
    assert bool(removed) == (variant == "scrub")
    assert bool((mean["fc.weight"][1:] == parameters["fc.weight"][1:]).all())


def test_fisher_head_rules():
    task = tiny_classifier(n_classes=4, steps=0)
    task.model.bn1 = nn.BatchNorm2d(8)
    ctx, parameters = context(task)
    parameters = {**parameters, "stranger": torch.ones(4, 3)}  # four rows, but not the head
    ones = {n: torch.ones_like(p) for n, p in parameters.items()}
    for rule, gain in (("as_intended", 1), ("as_published", 10)):
        variance = FisherForgetting(alpha=1.0, head=rule).noise_scale(ctx, parameters, ones)[1]
        assert variance["stranger"][1, 0].item() == pytest.approx(gain)
        assert variance["fc.weight"][1, 0].item() == pytest.approx(10)
        assert variance["fc.weight"][0, 0].item() == pytest.approx(1e-3)
        assert variance["conv1.weight"][0, 0, 0, 0].item() == pytest.approx(1)


def test_fisher_noise_is_a_function_of_the_seed_and_the_name(task):
    how = recipe("fisher_forgetting", samples=20)
    one, other = unlearn(task, REQUEST, how, seed=1), unlearn(task, REQUEST, how, seed=2)
    assert one.digest == unlearn(task, REQUEST, how, seed=1).digest != other.digest
    part = unlearn(task, REQUEST, how.replace(space={"kind": "layers", "targets": ["fc"]}), seed=1)
    assert set(part.changes) == {"fc.weight", "fc.bias"}
    assert torch.equal(part.changes["fc.bias"].dense(), one.changes["fc.bias"].dense())


# -- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(EDITS))
def test_masks_are_respected(task, tmp_path, name):
    bits = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in task.model.named_parameters()}
    for m in bits.values():
        m.view(-1)[::2] = True
    file = str(tmp_path / "mask.safetensors")
    Mask(bits, 0.5).save(file)
    masked, free = (unlearn(task, REQUEST, recipe(name, mask_file=f)) for f in (file, None))
    assert all(not bool(masked.changes[n].dense()[~bits[n]].any()) for n in masked.changes)
    assert any(bool(masked.changes[n].dense()[bits[n]].any()) for n in masked.changes)
    assert any(bool(free.changes[n].dense()[~bits[n]].any()) for n in free.changes)
