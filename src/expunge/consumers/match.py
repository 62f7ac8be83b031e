"""Where a CLIP tower sits in a larger model, and the proof that it is the same tower, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.consumers.reads import Reads, block_of
from expunge.digest import tensor_digest
from expunge.errors import ArtifactError, CapabilityError, ExpungeError
from expunge.models.clip_names import canonical_pieces
from expunge.models.towers import Tower, Towers
from expunge.patch import Change

_STACK = re.compile(r"^((?:.*\.)?)encoder\.layers\.\d+\.")
_PROJECTIONS = ("visual_projection.weight", "text_projection.weight")
_EMBEDDINGS: dict[str, Tower] = {
    "embeddings.patch_embedding.weight": "vision",
    "embeddings.token_embedding.weight": "language",
}


@dataclass(frozen=True)
class Home:
    """A transformer stack inside a larger model.

    Args:
        prefix: What stands before ``encoder.layers.`` in its names, such as ``model.vision_tower.``.
        tower: What it reads, by its embeddings; ``None`` if it embeds neither image patches nor tokens.
        depth: Number of its blocks.
    """

    prefix: str
    tower: Tower | None
    depth: int

    def __str__(self) -> str:
        return f"'{self.prefix}encoder.layers'"

    def name(self, canonical: str) -> str:
        """The name here of a tensor that ``transformers.CLIPModel`` calls ``canonical``."""
        if canonical in _PROJECTIONS:
            above, dot, _ = self.prefix.removesuffix(".").rpartition(".")
            return f"{above}{dot}{canonical}"
        return self.prefix + re.sub(r"^(vision_model|text_model)\.", "", canonical)


def homes(names: Mapping[str, Any]) -> list[Home]:
    """The transformer stacks among a model's tensor names, in order."""
    depth: dict[str, int] = {}
    for name in names:
        match, block = _STACK.match(name), block_of(name)
        if match and block is not None:
            depth[match[1]] = max(depth.get(match[1], 0), block + 1)
    return [
        Home(prefix, next((t for key, t in _EMBEDDINGS.items() if prefix + key in names), None), blocks)
        for prefix, blocks in depth.items()
    ]


def what_is_read(module: nn.Module, home: Home) -> Reads | None:
    """What a model uses of a tower, as far as its configuration tells; ``None`` if it does not.

    A bare text encoder counts as used completely; a pipeline may read less of it, see
    :func:`~expunge.consumers.diffusion_text.text_reads`.
    """
    from expunge.consumers.diffusion_text import text_reads
    from expunge.consumers.llava import vision_reads

    config = getattr(module, "config", None)
    if home.tower == "vision":
        found = vision_reads(config, home.depth)
        if found is not None:
            return found
    kind = getattr(config, "model_type", "")
    if kind == "clip_text_model" and home.tower == "language" and not hasattr(module, "text_projection"):
        return text_reads(home.depth)
    if kind in ("clip", "clip_text_model", "clip_vision_model") and home.tower is not None:
        return Reads(home.tower, home.depth, True, True, f"everything ({home.depth} blocks)")
    return None


@dataclass(frozen=True)
class Cut:
    """A change of the tensor ``name`` of the source, or of the part of it that is one tensor in transformers."""

    name: str
    canonical: str
    change: Change


@dataclass(frozen=True)
class Match:
    """A tower that was found: where, what is read of it, and to which precision its weights are rounded there."""

    home: Home
    reads: Reads | None
    rounded: str


@dataclass(frozen=True)
class Container:
    """The model that contains the tower.

    Args:
        module: The model.
        tensors: All its tensors, under all their names.
        reads: What it uses, if that is given from outside.
        at: Prefix of the tower, if it was named.
    """

    module: nn.Module
    tensors: Mapping[str, Tensor]
    reads: Reads | None
    at: str | None

    @property
    def kind(self) -> str:
        """For messages."""
        return type(self.module).__name__

    def locate(self, cuts: list[Cut], weights: Mapping[str, Tensor], source: Towers, side: Tower) -> Match:
        """The one place where the tower sits.

        Args:
            cuts: Changes that have to find a place.
            weights: Tensors of the source that have to be equal where they exist here.
            source: The two-tower model.
            side: Which of its towers.

        Raises:
            ArtifactError: Other shapes or other weights.
            CapabilityError: No place, several places, or a change that the model does not use.
        """
        stacks = homes(self.tensors)
        at = None if self.at is None else self.at.strip(".")
        wanted = [h for h in stacks if h.tower in (side, None) and at in (None, h.prefix.strip("."))]
        if not wanted:
            there = ", ".join(f"{h} ({h.tower or 'unknown'})" for h in stacks) or "no 'encoder.layers' at all"
            place = "" if at is None else f" at '{at}'"
            raise CapabilityError(f"{self.kind} has no {side} tower{place} that the patch could go to; found: {there}")
        fits: list[Match] = []
        problems: list[ExpungeError] = []
        for home in wanted:
            try:
                fits.append(self._compare(home, cuts, weights, source, side))
            except ExpungeError as error:
                problems.append(error)
        if len(fits) > 1:
            places = ", ".join(str(m.home) for m in fits)
            raise CapabilityError(
                f"{len(fits)} places of {self.kind} hold this {side} tower: {places}; name one: at=..."
            )
        if fits:
            return fits[0]
        if len(problems) == 1:
            raise problems[0]
        listed = "; ".join(f"{h}: {e}" for h, e in zip(wanted, problems, strict=True))
        raise ArtifactError(f"none of the {len(wanted)} possible places of {self.kind} fits. {listed}")

    def _compare(
        self, home: Home, cuts: list[Cut], weights: Mapping[str, Tensor], source: Towers, side: Tower
    ) -> Match:
        reads = self.reads or what_is_read(self.module, home)
        for cut in cuts:
            target = home.name(cut.canonical)
            if target not in self.tensors:
                there = (
                    f"it has blocks 0 to {home.depth - 1}" if block_of(target) is not None else "it has no such part"
                )
                used = f" and reads {reads.words}" if reads else ""
                raise CapabilityError(f"'{cut.name}' does not exist in {self.kind} (as '{target}'): {there}{used}")
            if reads is not None:
                reads.check(target)
        rounded: set[torch.dtype] = set()
        for name, weight in weights.items():
            for piece in canonical_pieces(source.library, name, tuple(weight.shape)):
                target = home.name(piece.name)
                if target in self.tensors:
                    dtype = same(name, piece.take(weight), target, self.tensors[target])
                    rounded |= {dtype} if dtype.itemsize < weight.dtype.itemsize else set()
        return Match(home, reads, ", ".join(sorted(str(d).removeprefix("torch.") for d in rounded)))


def same(name: str, ours: Tensor, target: str, theirs: Tensor) -> torch.dtype:
    """The precision at which two tensors are equal bit for bit; ``theirs`` may hold rounded numbers.

    Raises:
        ArtifactError: There is none, or the shapes differ.
        CapabilityError: ``theirs`` is quantised.
    """
    if not theirs.is_floating_point():
        raise CapabilityError(f"'{target}' holds {theirs.dtype}; load the model without quantisation")
    if ours.shape != theirs.shape:
        raise ArtifactError(f"'{target}' has shape {list(theirs.shape)}, '{name}' of the source {list(ours.shape)}")
    held = tensor_digest(theirs)
    for dtype in dict.fromkeys((theirs.dtype, torch.float16, torch.bfloat16)):
        if tensor_digest(ours.detach().to(dtype).to(theirs.dtype)) == held:
            return dtype
    gap = float((theirs.detach().cpu().double() - ours.detach().cpu().double()).abs().max())
    raise ArtifactError(
        f"'{target}' is not the tensor '{name}' that the patch was made on: the largest difference is {gap:.3g}. "
        "This encoder was trained further, or comes from another CLIP; make the patch on the CLIP that it contains"
    )
