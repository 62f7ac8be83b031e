"""Golden files of SLUG: rebuild their models and splits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import golden_files
import torch
from safetensors.torch import load_file
from torch import Tensor

from expunge.models.towers import Tokens, Towers
from expunge.models.towers_hf import HFTowers
from expunge.models.towers_open_clip import OpenClipTowers
from expunge.slug.differentiate import Loader, Pairs

cases = partial(golden_files.cases, "slug")


class Case:
    """One golden file pair."""

    def __init__(self, path: Path) -> None:
        self.meta = json.loads(path.read_text())
        self.tensors = load_file(path.with_suffix(".safetensors"))
        self.hyper, self.expected = self.meta["hyper"], self.meta["expected"]
        self.variant: str = self.meta["variant"]

    @property
    def open_clip(self) -> bool:
        return self.meta["model"]["library"].startswith("open_clip")

    def input(self, name: str) -> Tensor:
        """An input; bfloat16 becomes float32, exactly."""
        value = self.tensors[f"input.{name}"]
        return value.float() if value.dtype == torch.bfloat16 else value

    def want(self, name: str) -> Tensor:
        return self.tensors[f"expected.{name}"]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All expected tensors below a prefix."""
        start = f"expected.{prefix}."
        return {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}

    def towers(self, dtype: torch.dtype = torch.float32) -> Towers:
        config: dict[str, Any] = self.meta["model"]["config"]
        if self.open_clip:
            from open_clip.model import CLIP

            model: Any = CLIP(**config, output_dict=True)
        else:
            from transformers import CLIPConfig, CLIPModel

            model = CLIPModel(CLIPConfig(**config))
        state = {n[5:]: t.float() for n, t in self.tensors.items() if n.startswith("init.")}
        model.load_state_dict(state)
        model.to(dtype).train()
        return OpenClipTowers(model) if self.open_clip else HFTowers(model)

    def tokens(self, split: str, *, name_only: bool) -> Tokens:
        n = self.hyper[f"n_{split}"]
        if name_only:
            return Tokens(self.input("forget_name_ids").expand(n, -1))
        mask = None if self.open_clip else self.input(f"{split}_caption_mask")
        return Tokens(self.input(f"{split}_caption_ids"), mask)

    def loader(self, split: str, *, name_only: bool = False, dtype: torch.dtype = torch.float32) -> Loader:
        pixels = self.input(f"{split}_pixel_values").to(dtype)
        tokens, size = self.tokens(split, name_only=name_only), self.hyper["batch_size"]

        def batches() -> Iterator[Pairs]:
            for i in range(0, len(pixels), size):
                yield Pairs(pixels[i : i + size], tokens[i : i + size])

        return batches
