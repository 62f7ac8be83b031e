"""Golden files of the concept erasers: find them, rebuild their U-Nets and compare under their own tolerances."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import golden_files
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

cases = partial(golden_files.cases, "erasers")


class Case:
    """One golden file pair.

    The committed files leave the U-Net's initial weights to ``unet.safetensors``: they are the same in all of them.
    """

    def __init__(self, path: Path) -> None:
        self.meta = json.loads(path.read_text())
        self.tensors = load_file(path.with_suffix(".safetensors"))
        common = path.with_name("unet.safetensors")
        if common.is_file() and not any(n.startswith("init.") for n in self.tensors):
            self.tensors |= load_file(common)
        self.hyper, self.expected = self.meta["hyper"], self.meta["expected"]
        self.checked: set[str] = set()

    def input(self, name: str) -> Tensor:
        """An input; bfloat16 becomes float32, exactly."""
        value = self.tensors[f"input.{name}"]
        return value.float() if value.dtype == torch.bfloat16 else value

    def inits(self) -> dict[str, Tensor]:
        return {n[5:]: t.float() for n, t in self.tensors.items() if n.startswith("init.")}

    def unet(self) -> nn.Module:
        from diffusers import UNet2DConditionModel

        unet: nn.Module = UNet2DConditionModel(**self.meta["model"]["config"])
        unet.load_state_dict(self.inits())
        return unet

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All expected tensors below a prefix."""
        start = f"expected.{prefix}."
        self.checked |= {n for n in self.tensors if n.startswith(start)}
        return {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}

    def close(self, got: Tensor, name: str, limit: float) -> None:
        """Within ``limit`` of the expected tensor's largest entry."""
        self.checked.add(f"expected.{name}")
        within(got, self.tensors[f"expected.{name}"], limit, name)

    def finish(self) -> None:
        """Every expected tensor was compared."""
        left = [n for n in self.tensors if n.startswith("expected.") and n not in self.checked]
        assert not left, f"not compared: {left[:5]} ({len(left)} in all)"


def eps_of(unet: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The U-Net as a function from latents, times and states to the noise."""

    def eps(x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        sample: Tensor = unet(x, t, states).sample
        return sample

    return eps


def scheduler(settings: Mapping[str, Any]) -> Any:
    import diffusers

    return getattr(diffusers, settings["class"])(**settings["config"])


def within(got: Tensor, want: Tensor, limit: float, name: str = "") -> None:
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    off = float((got.detach().double() - want.double()).abs().max())
    assert off <= limit * float(want.abs().max()), (
        f"{name}: off by {off:.2e}, largest entry {float(want.abs().max()):.2e}"
    )


def gradients(unet: nn.Module, loss: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor | None]:
    """Gradients by name; ``None`` where the loss does not reach."""
    own = dict(unet.named_parameters())
    names = list(own) if names is None else list(names)
    return dict(zip(names, torch.autograd.grad(loss, [own[n] for n in names], allow_unused=True)))


def agree(got: Mapping[str, Tensor | None], want: Mapping[str, Tensor], limit: float = 1e-4) -> None:
    """``limit`` of each tensor's largest entry; tensors of rounding noise 1e-6 of the largest entry of all."""
    assert want
    largest = max(float(t.abs().max()) for t in want.values())
    for name, golden in want.items():
        mine = got[name]
        assert mine is not None, f"{name} has no gradient"
        off, top = float((mine - golden).abs().max()), float(golden.abs().max())
        assert off <= (limit * top if top >= 1e-5 * largest else 1e-6 * largest), (name, off, top)
