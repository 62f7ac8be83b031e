"""What the forms of Unified Concept Editing share: the maps that are edited, and states of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from expunge.diffusion import uce as pure
from expunge.errors import ConfigError
from expunge.spaces.base import OpenSpace

if TYPE_CHECKING:
    from expunge.tasks.text_to_image import TextToImageTask

PAPER = "Gandikota et al., Unified Concept Editing in Diffusion Models, WACV 2024, arXiv 2308.14761"
CODE = "rohitgandikota/unified-concept-editing"


def cross_maps(space: OpenSpace) -> dict[str, Tensor]:
    """Key and value maps of cross-attention in a space.

    Raises:
        ConfigError: There are none, or the space restricts single weights of one.
    """
    maps = {
        n: p.detach() for n, p in space.parameters.items() if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }
    if not maps:
        raise ConfigError("uce edits keys and values of cross-attention, and its space has none: take 'unet_set' 'kv'")
    masked = next((n for n in maps if space.mask(n) is not None), None)
    if masked is not None:
        raise ConfigError(f"uce solves for whole maps, and its space restricts single weights of '{masked}'")
    return maps


@torch.no_grad()
def prompt_states(task: TextToImageTask, texts: Sequence[str]) -> dict[str, pure.Prompt]:
    """States of every prompt. Its last token is the one before the first end-of-text token."""
    end, found = task.parts.tokenizer.eos_token_id, {}
    for text in dict.fromkeys(texts):
        ids = task.text.token_ids([text])[0].tolist()
        found[text] = pure.Prompt(task.states([text])[0].cpu(), ids.index(end) - 1)
    return found
