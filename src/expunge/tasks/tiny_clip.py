"""Tiny two-tower models with random weights: both libraries, the same weights, no files."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Literal

import torch

from expunge.errors import CapabilityError
from expunge.models.clip_names import canonical_state, library_state
from expunge.models.towers import Tokens, Towers
from expunge.models.towers_hf import HFTowers
from expunge.models.towers_open_clip import OpenClipTowers

BOS, EOS, VOCABULARY = 62, 63, 64


class WordTokenizer:
    """Whole words as tokens: listed words have numbers of their own, others share the rest by a hash.

    Args:
        words: Words that must not share a number with another one.
        context: Longest text in tokens, begin and end included.
    """

    def __init__(self, words: Sequence[str] = (), context: int = 12) -> None:
        self.numbers = {w: i for i, w in enumerate(dict.fromkeys(words), 1)}
        self.context = context
        self._free = BOS - 1 - len(self.numbers)
        if self._free < 1:
            raise CapabilityError(f"at most {BOS - 2} words can be listed, not {len(self.numbers)}")

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Token ids, cut at the context, padded with 0 to the longest text."""
        rows = [[BOS, *map(self._number, t.lower().split()[: self.context - 2]), EOS] for t in texts]
        width = max(map(len, rows), default=2)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        for row, numbers in zip(ids, rows, strict=True):
            row[: len(numbers)] = torch.tensor(numbers)
        return Tokens(ids)

    def _number(self, word: str) -> int:
        return self.numbers.get(word) or 1 + len(self.numbers) + zlib.crc32(word.encode()) % self._free


def tiny_towers(
    library: Literal["transformers", "open_clip"] = "transformers",
    seed: int = 0,
    layers: int = 2,
    width: int = 32,
    *,
    image_size: int = 16,
    patch: int = 8,
    embed: int = 24,
    context: int = 12,
    words: Sequence[str] = (),
) -> Towers:
    """A two-tower model with random weights, in eval mode; the same weights in both libraries for the same seed.

    Args:
        library: ``transformers`` or ``open_clip``; both must be installed.
        seed: Of the weights; torch's own random state is left alone.
        layers: Transformer blocks of each tower.
        width: Hidden size of both towers, even (two heads).
        image_size: Side of the images.
        patch: Side of the patches.
        embed: Size of the shared space.
        context: Longest text in tokens.
        words: Words with tokens of their own (others may share).

    Raises:
        CapabilityError: A library is missing.
    """
    original = _open_clip(seed, layers, width, image_size, patch, embed, context)
    tokenizer = WordTokenizer(words, context)
    if library == "open_clip":
        return OpenClipTowers(original, tokenizer)
    model = _transformers(layers, width, image_size, patch, embed, context)
    state = canonical_state("open_clip", original.state_dict())
    model.load_state_dict(library_state("transformers", state, model.state_dict()))
    return HFTowers(model.eval(), tokenizer)


def _open_clip(seed: int, layers: int, width: int, image_size: int, patch: int, embed: int, context: int) -> Any:
    try:
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    except ImportError:
        raise CapabilityError('this needs open_clip: pip install "expunge[clip]"') from None
    vision = CLIPVisionCfg(layers=layers, width=width, head_width=width // 2, patch_size=patch, image_size=image_size)
    text = CLIPTextCfg(context_length=context, vocab_size=VOCABULARY, width=width, heads=2, layers=layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(embed, vision, text)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases of zero and norms of one would hide mistakes
                    parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def _transformers(layers: int, width: int, image_size: int, patch: int, embed: int, context: int) -> Any:
    try:
        from transformers import CLIPConfig, CLIPModel
    except ImportError:
        raise CapabilityError('this needs transformers: pip install "expunge[clip]"') from None
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "projection_dim": embed,
        "hidden_act": "gelu",
    }
    text = tower | {"vocab_size": VOCABULARY, "max_position_embeddings": context}
    config = CLIPConfig(
        text_config=text | {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0},
        vision_config=tower | {"image_size": image_size, "patch_size": patch},
        projection_dim=embed,
    )
    with torch.random.fork_rng(devices=[]):
        return CLIPModel(config)
