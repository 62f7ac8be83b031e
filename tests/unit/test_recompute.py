"""Gradient checkpointing: the same gradients and patches, less kept, and the U-Net's own switches left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from expunge.config.tasks import TextToImageTaskConfig
from expunge.diffusion.recompute import recomputing
from expunge.errors import CapabilityError
from expunge.method import build_recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.tasks.build import make_task
from expunge.tasks.tiny_text_to_image import tiny_text_to_image

METHODS: dict[str, dict[str, Any]] = {
    "srs_me": {"threshold": None, "protect_others": False},
    "cie": {"threshold": None},
    "esd": {"inference_steps": 3},
    "ablating_concepts": {"profile": "style", "batch_size": 1},
    "forget_me_not": {},
    "random_label": {"batch_size": 2},
}


@pytest.fixture(scope="module")
def task() -> Any:
    return tiny_text_to_image()


def kept(task: Any) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that a graded pass keeps, and the gradients."""
    seen: dict[int, torch.Tensor] = {}
    own = {p.untyped_storage()._cdata for p in task.model.parameters()}

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage()._cdata not in own:
            seen[x.untyped_storage()._cdata] = x
        return x

    x = torch.randn(2, *task.latent_shape, generator=torch.Generator().manual_seed(0))
    states = task.conditions(["a ring", "a star"]).detach()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = task.eps(x, torch.tensor([10, 900]), states).square().mean()
    total = sum(x.untyped_storage().nbytes() for x in seen.values())
    task.unet.zero_grad()
    loss.backward()
    return total, {n: p.grad.clone() for n, p in task.unet.named_parameters() if p.grad is not None}


def test_the_same_gradients_from_less(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, wanted = kept(task)
    before = {n: m.gradient_checkpointing for n, m in task.unet.named_modules() if hasattr(m, "gradient_checkpointing")}
    monkeypatch.setattr(task, "gradient_checkpointing", True)
    less, found = kept(task)
    assert less < 0.5 * plain
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name
    assert {n: task.unet.get_submodule(n).gradient_checkpointing for n in before} == before
    assert not any(before.values())


@pytest.mark.parametrize("name", METHODS)
def test_methods_give_the_same_patch(task: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those whose hooks or attention processors are gone by the time of the backward pass."""
    recipe = build_recipe({"method": name, **METHODS[name]}).replace(optim={"max_steps": 2})
    plain = unlearn(task, ForgetRequest.label("circle"), recipe)
    monkeypatch.setattr(task, "gradient_checkpointing", True)
    assert unlearn(task, ForgetRequest.label("circle"), recipe).digest == plain.digest


def test_a_hook_that_is_gone_acts_in_the_backward_pass_all_the_same(task: Any) -> None:
    """Without what the context keeps, the gradient would be that of a pass without the hook."""
    block = next(m for n, m in task.unet.named_modules() if n.endswith("attn2.to_v"))
    x, t = torch.ones(1, *task.latent_shape), torch.tensor([5])
    states = task.conditions(["a ring"]).detach()

    def gradient(by: Any, hooked: bool) -> torch.Tensor:
        handle = block.register_forward_hook(lambda module, inputs, output: 3 * output) if hooked else None
        with recomputing(task.unet, by):
            loss = task.unet(x, t, encoder_hidden_states=states).sample.square().mean()
        if handle is not None:
            handle.remove()
        task.unet.zero_grad()
        loss.backward()
        found: torch.Tensor = block.weight.grad.clone()
        return found

    def keeping(module: nn.Module, *inputs: Any) -> Any:
        return module(*inputs)

    wanted = gradient(keeping, hooked=True)
    assert torch.equal(gradient(None, hooked=True), wanted)
    assert not torch.allclose(gradient(None, hooked=False), wanted)


def test_a_configuration_asks_for_it() -> None:
    spec: dict[str, Any] = {"family": "text_to_image", "classes": ["ring", "star"]}
    assert make_task(TextToImageTaskConfig(**spec, gradient_checkpointing=True)).gradient_checkpointing  # type: ignore[attr-defined]
    assert not make_task(TextToImageTaskConfig(**spec)).gradient_checkpointing  # type: ignore[attr-defined]


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(CapabilityError, match="no gradient checkpointing"), recomputing(nn.Linear(2, 2)):
        pass
