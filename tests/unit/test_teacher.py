"""The teacher is the original, whatever happens to the student."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from eraser_toys import WIDTH, eps_of, normal, tiny_unet
from torch import Tensor, nn

from expunge.diffusion.parameter_sets import select
from expunge.diffusion.teacher import Teacher

X, TIMES, STATES = normal(2, 4, 8, 8, seed=1), torch.tensor([10, 900]), normal(2, 5, WIDTH, seed=2)


def train(unet: Any, names: list[str], steps: int = 3) -> None:
    chosen = [unet.get_parameter(n) for n in names]
    optimizer = torch.optim.SGD(chosen, lr=0.5)
    for step in range(steps):
        optimizer.zero_grad()
        eps_of(unet)(X, TIMES, STATES + step).square().mean().backward()
        optimizer.step()


def only(unet: Any, names: list[str]) -> None:
    for name, p in unet.named_parameters():
        p.requires_grad_(name in names)


@pytest.mark.parametrize("which", ["esd-x", "full-weight"])
def test_predicts_like_the_original_after_several_steps(which: str) -> None:
    unet = tiny_unet()
    original = copy.deepcopy(unet)
    names = select(unet, which)
    teacher = Teacher(unet, eps_of(unet))
    only(unet, names)
    train(unet, names)
    with torch.no_grad():
        wanted = eps_of(original)(X, TIMES, STATES)
        assert torch.equal(teacher(X, TIMES, STATES), wanted)
        assert not torch.allclose(eps_of(unet)(X, TIMES, STATES), wanted)
    train(unet, names, 1)
    assert torch.equal(teacher(X, TIMES, STATES), wanted)


def test_made_too_late_it_is_not_the_original() -> None:
    unet = tiny_unet()
    original = copy.deepcopy(unet)
    names = select(unet, "esd-x")
    only(unet, names)
    train(unet, names)
    late = Teacher(unet, eps_of(unet))
    assert not torch.allclose(late(X, TIMES, STATES), eps_of(original)(X, TIMES, STATES))


def test_weights_loaded_before_the_first_pass_do_not_reach_it() -> None:
    """A resumed run puts the trained weights back before the first step."""
    unet = tiny_unet()
    original = copy.deepcopy(unet)
    teacher = Teacher(unet, eps_of(unet))
    unet.load_state_dict(tiny_unet(seed=1).state_dict())
    assert torch.equal(teacher(X, TIMES, STATES), eps_of(original)(X, TIMES, STATES).detach())


def test_keeps_trained_tensors_only_and_leaves_the_student_alone() -> None:
    unet = tiny_unet()
    names = select(unet, "cross-attn")
    teacher = Teacher(unet, eps_of(unet))
    assert len(teacher.kept) == len(list(unet.parameters()))
    only(unet, names)
    unet.train()
    before = {n: (id(p), p.detach().clone()) for n, p in unet.named_parameters()}
    prediction = eps_of(unet)(X, TIMES, STATES)
    advice = teacher(X, TIMES, STATES)
    assert sorted(teacher.kept) == sorted(names)
    assert not advice.requires_grad
    assert unet.training
    assert all(before[n][0] == id(p) and torch.equal(before[n][1], p) for n, p in unet.named_parameters())
    prediction.sum().backward()  # a graph that was built before the teacher's pass is still good
    expected = [unet.get_parameter(n).grad.clone() for n in names]
    unet.zero_grad()
    eps_of(unet)(X, TIMES, STATES).sum().backward()
    torch.testing.assert_close(expected, [unet.get_parameter(n).grad for n in names], rtol=0, atol=0)
    assert any(bool(g.any()) for g in expected)


class Dropping(nn.Module):
    """A student whose passes are noisy in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor = nn.functional.dropout(self.layer(x), 0.5, self.training)
        return dropped


def test_runs_in_eval_mode_and_under_autocast_with_its_own_weights() -> None:
    model = Dropping().train()
    teacher = Teacher(model, lambda x, t, c: model(x))
    x, wanted = normal(3, 4), None
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        wanted = copy.deepcopy(model).eval()(x)
    for p in model.parameters():
        p.data += 1.0
    with torch.autocast("cpu", torch.bfloat16):
        student = model(x)  # autocast now remembers the student's weights in half precision
        assert torch.equal(teacher(x, TIMES, None), wanted)
    assert not torch.allclose(student.detach(), wanted)
