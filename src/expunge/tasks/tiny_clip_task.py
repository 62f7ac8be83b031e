"""A trained toy two-tower task: captioned images of two axes, both libraries, a few seconds."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from expunge import rng
from expunge.data.base import Splits
from expunge.data.captions import Axis, CaptionedImages, captioned
from expunge.tasks.clip import ClipTask
from expunge.tasks.tiny_clip import tiny_towers

OBJECTS = ("ant", "bee", "cat", "dog", "elk", "fox")
STYLES = ("red", "green", "blue")
SIDE = 16
RATE = 5e-3


def tiny_pairs(n_per_cell: int, seed: int, stream: str, noise: float = 0.1) -> CaptionedImages:
    """Noisy tinted copies of one pattern per object; axes ``object`` (main) and ``style``.

    Args:
        n_per_cell: Images of each object in each style.
        seed: Seed of patterns and noise.
        stream: Name of the noise draw; sets of different names share the patterns.
        noise: Standard deviation of the pixel noise.
    """
    draw = torch.Generator().manual_seed(rng.key(seed, "tiny clip patterns") % 2**63)
    coarse = (torch.rand((len(OBJECTS), 1, 4, 4), generator=draw) > 0.5).float()
    patterns = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="nearest")
    objects = torch.arange(len(OBJECTS)).repeat_interleave(len(STYLES)).repeat(n_per_cell)
    styles = torch.arange(len(STYLES)).repeat(len(OBJECTS) * n_per_cell)
    tint = 0.3 + 0.7 * torch.eye(3)[styles].reshape(-1, 3, 1, 1)
    own = torch.Generator().manual_seed(rng.key(seed, f"tiny clip {stream}") % 2**63)
    x = patterns[objects] * tint + noise * torch.randn((len(objects), 3, SIDE, SIDE), generator=own)
    captions = [f"a {STYLES[s]} {OBJECTS[o]}" for o, s in zip(objects.tolist(), styles.tolist(), strict=True)]
    by_style = tuple(f"a {s} {{}}" for s in STYLES)
    by_object = tuple(f"a {{}} {o}" for o in OBJECTS)
    axes = {"object": Axis(objects, OBJECTS, by_style), "style": Axis(styles, STYLES, by_object)}
    return captioned(x.clamp(0, 1), captions, axes)


def tiny_clip(
    library: Literal["transformers", "open_clip"] = "transformers",
    seed: int = 0,
    *,
    n_per_cell: int = 6,
    steps: int = 250,
    axis: str = "object",
) -> ClipTask:
    """A trained two-tower task: 108 training and 54 test pairs of six objects in three styles by default.

    Args:
        library: ``transformers`` or ``open_clip``.
        seed: Seed of data, weights and training.
        n_per_cell: Training pairs of each object in each style; the test set has half as many.
        steps: Training steps; 0 leaves the initial weights.
        axis: The axis whose classes may be forgotten.

    Raises:
        CapabilityError: The libraries are not installed.
    """
    towers = tiny_towers(library, seed, words=("a", *OBJECTS, *STYLES))
    train, test = tiny_pairs(n_per_cell, seed, "train"), tiny_pairs(max(1, n_per_cell // 2), seed, "test")
    task = ClipTask(towers, Splits("tiny clip", train, test), axis=axis)
    cells = len(OBJECTS) * len(STYLES)
    split = task.everything()
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=RATE)
    task.model.train()
    for step in range(steps):
        row = rng.permutation(rng.key(seed, "tiny clip order", step), n_per_cell)[0]
        ids: Tensor = torch.arange(cells) + cells * row
        loss = task.loss(task.load("retain", ids, split)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    task.model.eval()
    return task
