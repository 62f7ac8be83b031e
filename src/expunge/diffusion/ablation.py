"""Ablating Concepts (CA): the prediction for a target prompt becomes that of an anchor prompt.

Kumari et al., "Ablating Concepts in Text-to-Image Diffusion Models", ICCV 2023 (nupurkmr9/concept-ablation). The images
are generated for anchor prompts (``"a painting of a tree"``); each is shown under its anchor caption ``c*`` and a
target caption ``c`` that names the concept. All losses are per sample, ``[B]``.

Also here: the version of the SRS-ME repository (``train-scripts/Abconcept.py``), :func:`srsme_losses`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expunge.diffusion.process import Eps
from expunge.errors import CapabilityError, ConfigError

Reduction = Literal["channel_mean", "channel_sum"]

#: Settings of the public recipes. ``lr`` is the base rate, which ``--scale_lr`` multiplies by batch size and GPUs (2).
#: ``prior``: whether the prior term is used; for objects only if the target's name contains the anchor's.
RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "style": MappingProxyType(
            {"parameters": "cross-attn", "lr": 2e-6, "steps": 100, "batch_size": 4, "prior": False, "place": False}
        ),
        "object": MappingProxyType(
            {"parameters": "cross-attn", "lr": 2e-6, "steps": 100, "batch_size": 4, "prior": False, "place": True}
        ),
        "memorised": MappingProxyType(
            {"parameters": "full-weight", "lr": 5e-7, "steps": 400, "batch_size": 2, "prior": True, "place": False}
        ),
        "content": MappingProxyType(
            {"parameters": "attn", "lr": 4e-6, "steps": 400, "batch_size": 4, "prior": True, "place": False}
        ),
    }
)


def masked_squares(
    prediction: Tensor, goal: Tensor, mask: Tensor | None = None, reduction: Reduction = "channel_mean"
) -> Tensor:
    """Mean of the squared difference over the valid area, per sample, ``[B]``.

    Args:
        prediction: ``[B, C, H, W]``.
        goal: The same shape.
        mask: Valid latent cells, ``[B, 1, H, W]``; everything by default.
        reduction: ``channel_mean`` is the mean over valid entries. ``channel_sum`` divides the sum over the channels by
            the one-channel mask's sum, as the public diffusers script does: ``C`` times as much.

    Raises:
        ConfigError: A mask with more than one channel.
    """
    squares = (prediction - goal).square()
    if mask is None:
        per_cell = squares.mean((2, 3))
    elif mask.shape[1] == 1:
        per_cell = (squares * mask).sum((2, 3)) / mask.sum((2, 3))
    else:
        raise ConfigError(f"the mask of valid latents must have one channel: {list(mask.shape)}")
    return per_cell.sum(1) if reduction == "channel_sum" else per_cell.mean(1)


def losses(
    eps: Eps,
    x_t: Tensor,
    t: Tensor,
    states: Tensor,
    *,
    anchor_states: Tensor | None = None,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    teacher: Eps | None = None,
    reduction: Reduction = "channel_mean",
) -> Tensor:
    """The ablation term of every sample, ``[B]``.

    Args:
        eps: The model being trained.
        x_t: Noised latents of anchor images, ``[B, C, H, W]``.
        t: int64 ``[B]``.
        states: Of the target captions, ``[B, T, D]``.
        anchor_states: Of the anchor captions: the model-based loss, whose goal is the prediction under them.
        noise: The noise of ``x_t``: the noise-based loss, whose goal it is.
        mask: Valid latent cells, ``[B, 1, H, W]``.
        teacher: Gives the model-based goal, without gradients; the current weights by default, as in paper and code.
            A frozen model is a variant of its own.
        reduction: See :func:`masked_squares`.

    Raises:
        ConfigError: Not exactly one of ``anchor_states`` and ``noise``, or a teacher for the noise-based loss.

    Deviates: The public diffusers script has ``reduction="channel_sum"``, four times the formula's mean, which also
        changes the weight of the prior term relative to it.
    """
    if (anchor_states is None) == (noise is None):
        raise ConfigError("give anchor states (model-based loss) or the noise (noise-based loss), and not both")
    if noise is not None and teacher is not None:
        raise ConfigError("the noise-based loss has no teacher")
    if anchor_states is not None:
        with torch.no_grad():
            goal = (teacher or eps)(x_t, t, anchor_states)
    else:
        assert noise is not None
        goal = noise
    return masked_squares(eps(x_t, t, states), goal, mask, reduction)


def denoising_losses(eps: Eps, x_t: Tensor, t: Tensor, states: Tensor, noise: Tensor) -> Tensor:
    """The ordinary training loss, ``[B]``: mean squared error of the predicted noise.

    The prior term of Ablating Concepts (on anchor images and captions), and the loss of textual inversion.
    """
    return masked_squares(eps(x_t, t, states), noise)


def srsme_losses(
    student: Eps,
    teacher: Eps,
    x_t: Tensor,
    t: Tensor,
    concept_states: Tensor,
    anchor_states: Tensor,
    *,
    anchor_weight: float = 10.0,
) -> Tensor:
    """The version of the SRS-ME repository, ``[B]``: both prompts are pulled to the frozen anchor prediction.

    ``|eps(concept) - eps_0(anchor)|^2 + anchor_weight |eps(anchor) - eps_0(anchor)|^2``, means over entries.
    """
    n = len(x_t)
    with torch.no_grad():
        goal = teacher(x_t, t, anchor_states.expand(n, -1, -1))
    concept = masked_squares(student(x_t, t, concept_states.expand(n, -1, -1)), goal)
    anchor = masked_squares(student(x_t, t, anchor_states.expand(n, -1, -1)), goal)
    return concept + anchor_weight * anchor


@contextmanager
def first_token_detached(unet: nn.Module) -> Iterator[None]:
    """No gradient flows through the key and the value of token 0 of any cross-attention layer while this is open.

    Token 0 is the same for every prompt, so training it would move all prompts alike. The values are untouched.

    Raises:
        CapabilityError: The model has no cross-attention layers named as diffusers names them.
    """
    maps = [m for n, m in unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    if not maps:
        raise CapabilityError(f"{type(unet).__name__} has no modules attn2.to_k and attn2.to_v to hook")
    with ExitStack() as stack:
        for module in maps:
            stack.callback(module.register_forward_hook(_detach_first).remove)
        yield


def _detach_first(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return torch.cat([output[:, :1].detach(), output[:, 1:]], 1)
