"""Tensor names of CLIP in transformers and open_clip, and patches carried from one library to the other.

The canonical form is transformers' ``CLIPModel``. open_clip stores query, key and value as one ``in_proj`` tensor
(rows ``0 .. d``, ``d .. 2d``, ``2d .. 3d``) and its two projections transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from expunge.digest import combine, named_tensors, state_digests, tensor_digest
from expunge.errors import ArtifactError
from expunge.models.towers import Towers
from expunge.patch.apply import check_base
from expunge.patch.changes import Change, Dense, LowRank, Replace, Sparse
from expunge.patch.patch import Patch


@dataclass(frozen=True)
class Piece:
    """One canonical tensor inside a tensor of a library.

    Args:
        name: Canonical (transformers) name.
        rows: Its rows in the library's tensor, ``None``: all.
        transposed: Whether the library's tensor is the transpose.
    """

    name: str
    rows: slice | None = None
    transposed: bool = False

    def take(self, tensor: Tensor) -> Tensor:
        """The canonical tensor out of the library's tensor (a view)."""
        part = tensor if self.rows is None else tensor[self.rows]
        return part.T if self.transposed else part

    def put(self, into: Tensor, tensor: Tensor) -> None:
        """Write the canonical tensor into the library's tensor."""
        part = into if self.rows is None else into[self.rows]
        part.copy_((tensor.T if self.transposed else tensor).reshape(part.shape))


_TOWERS = (("visual.transformer.resblocks.", "vision_model"), ("transformer.resblocks.", "text_model"))
_WHOLE = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection.weight": "text_projection.weight",  # a linear layer, as some configurations build it
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_IN_BLOCK_NAME = re.compile(r"^(\d+)\.(.+)[._](weight|bias)$")
_CLIP_NAME = re.compile(r"^((vision|text)_model\.|(visual|text)_projection\.weight$|logit_scale$)")


def canonical_pieces(library: str, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """Which canonical tensors a tensor of a library consists of.

    Args:
        library: ``transformers`` or ``open_clip``.
        name: Name in ``CLIPModel`` or in open_clip's ``CLIP`` / ``CustomTextCLIP``.
        shape: Its shape; a fused ``in_proj`` tensor is cut into three equal parts.

    Returns:
        One piece, or three (q, k, v in this order) for a fused tensor.

    Raises:
        ArtifactError: The tensor has no counterpart in the other library.
    """
    if library == "transformers":
        if _CLIP_NAME.match(name):
            return [Piece(name)]
        raise ArtifactError(f"'{name}' is no tensor of a transformers CLIPModel")
    if library != "open_clip":
        raise ArtifactError(f"names of {library!r} are not known; known: transformers, open_clip")
    bare = name.removeprefix("text.")
    if bare in _WHOLE:
        return [Piece(_WHOLE[bare])]
    if bare in _TRANSPOSED:
        return [Piece(_TRANSPOSED[bare], transposed=True)]
    for prefix, tower in _TOWERS:
        found = _IN_BLOCK_NAME.match(bare.removeprefix(prefix)) if bare.startswith(prefix) else None
        if found is None:
            continue
        block, module, kind = found.groups()
        layer = f"{tower}.encoder.layers.{block}"
        if module == "attn.in_proj":
            d = shape[0] // 3
            return [
                Piece(f"{layer}.self_attn.{p}_proj.{kind}", slice(i * d, i * d + d))
                for i, p in enumerate(("q", "k", "v"))
            ]
        if module in _IN_BLOCK:
            return [Piece(f"{layer}.{_IN_BLOCK[module]}.{kind}")]
    raise ArtifactError(f"'{name}' of the open_clip model has no counterpart in transformers' CLIP")


def canonical_state(library: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model under canonical names and in canonical layout (views).

    Raises:
        ArtifactError: A tensor has no counterpart.
    """
    return {
        p.name: p.take(t.detach()) for name, t in state.items() for p in canonical_pieces(library, name, tuple(t.shape))
    }


def library_state(library: str, canonical: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in a library's own layout: the inverse of :func:`canonical_state`.

    Args:
        library: ``transformers`` or ``open_clip``.
        canonical: Tensors by canonical name; every one must be used.
        like: The tensors of the target model; give names, shapes, dtypes.

    Raises:
        ArtifactError: A tensor is missing, left over, or has another size.
    """
    out, used = {}, set()
    for name, tensor in like.items():
        new = torch.empty_like(tensor, requires_grad=False)
        for piece in canonical_pieces(library, name, tuple(tensor.shape)):
            if piece.name not in canonical:
                raise ArtifactError(f"'{name}' needs '{piece.name}', which is not there")
            if canonical[piece.name].numel() != piece.take(new).numel():
                raise ArtifactError(f"'{piece.name}' is {list(canonical[piece.name].shape)}, not what '{name}' holds")
            piece.put(new, canonical[piece.name])
            used.add(piece.name)
        out[name] = new
    left = sorted(set(canonical) - used)
    if left:
        raise ArtifactError(f"the target has no place for {left[:3]} ({len(left)} tensors)")
    return out


def translate(patch: Patch, source: Towers, target: Towers) -> Patch:
    """A patch made on one model for the same model in the other library.

    A change of the query alone becomes a change of those rows of the fused tensor. Low-rank changes stay low-rank.

    Args:
        patch: Made on ``source``.
        source: The model without the patch.
        target: The same weights in the other library, in any precision.

    Returns:
        A patch that belongs to ``target``; recipe, request and notes are kept, measured numbers are not.

    Raises:
        ArtifactError: The patch is not from ``source``, the weights under a changed tensor differ, a tensor has no
            counterpart, or part of a fused tensor is replaced; the tensor is named.
    """
    tensors, _ = named_tensors(source.model)
    check_base(state_digests(tensors), patch)
    goal, aliases = named_tensors(target.model)
    changes = canonical_changes(source.library, patch.changes)
    expected = canonical_state(source.library, {n: t for n, t in tensors.items() if n in patch.changes})
    _check_same({n: expected[n] for n in changes}, target.library, goal)
    digests = state_digests(goal)
    note = f"translated from {source.library} to {target.library}"
    manifest = patch.manifest.model_copy(
        update={
            "base_digest": combine(digests),
            "base_tensors": digests,
            "aliases": aliases,
            "metrics": {},
            "notes": (*patch.manifest.notes, note),
            "parents": (*patch.manifest.parents, patch.digest),
        }
    )
    return Patch(library_changes(target.library, changes, {n: tuple(t.shape) for n, t in goal.items()}), manifest)


def canonical_changes(library: str, changes: Mapping[str, Change]) -> dict[str, Change]:
    """Changes of a library's tensors as changes of canonical tensors; pieces that do not change are left out.

    Raises:
        ArtifactError: A tensor has no counterpart.
    """
    out = {}
    for name, change in changes.items():
        for piece in canonical_pieces(library, name, change.shape):
            part = _cut(change, piece)
            if not _is_nothing(part):
                out[piece.name] = part
    return out


def library_changes(
    library: str, changes: Mapping[str, Change], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Change]:
    """Changes of canonical tensors as changes of a library's own: the inverse of :func:`canonical_changes`.

    Args:
        library: ``transformers`` or ``open_clip``.
        changes: By canonical name.
        shapes: Of the target's tensors.

    Raises:
        ArtifactError: A canonical tensor is in none of the target's, or part of a fused tensor is replaced.
    """
    out, used = {}, set()
    for name, shape in shapes.items():
        pieces = _pieces_or_none(library, name, shape)
        touched = [p for p in pieces if p.name in changes]
        if touched:
            out[name] = _join(name, shape, pieces, changes)
            used |= {p.name for p in touched}
    left = sorted(set(changes) - used)
    if left:
        raise ArtifactError(f"the target has no place for the change of {left[:3]} ({len(left)} tensors)")
    return out


def _pieces_or_none(library: str, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """Tensors without a counterpart may stay as they are."""
    try:
        return canonical_pieces(library, name, shape)
    except ArtifactError:
        return []


def _is_nothing(change: Change) -> bool:
    if isinstance(change, Sparse):
        return change.values.numel() == 0
    if isinstance(change, LowRank):
        return not bool(change.up.any() and change.down.any())
    return change.additive and not bool(change.dense().any())


def _cut(change: Change, piece: Piece) -> Change:
    """The change of one canonical tensor out of the change of the library's tensor."""
    if isinstance(change, LowRank):
        up = change.up if piece.rows is None else change.up[piece.rows]
        shape = (up.shape[0], *change.shape[1:]) if piece.rows is not None else change.shape
        return LowRank(change.down.T, up.T, shape[::-1]) if piece.transposed else LowRank(up, change.down, shape)
    if isinstance(change, Sparse):
        mask = piece.take(change.mask).contiguous()
        return Sparse(mask, piece.take(change.dense())[mask])
    new = piece.take(change.dense()).contiguous()
    return Dense(new) if isinstance(change, Dense) else Replace(new)


def _join(name: str, shape: tuple[int, ...], pieces: list[Piece], changes: Mapping[str, Change]) -> Change:
    """The change of a library's tensor out of the changes of its pieces."""
    found = {p.name: changes[p.name] for p in pieces if p.name in changes}
    if len(pieces) == 1:
        only, change = pieces[0], next(iter(found.values()))
        back = _cut(change, Piece(name, transposed=only.transposed))
        return back if back.shape == shape else _reshape(name, back, shape)
    for piece in pieces:
        cut = (shape[0] // len(pieces), *shape[1:])
        if piece.name in found and found[piece.name].shape != cut:
            has = list(found[piece.name].shape)
            raise ArtifactError(f"'{name}' holds {list(cut)} of '{piece.name}', its change has {has}")
    replaced = [n for n, c in found.items() if not c.additive]
    if replaced:
        if len(replaced) < len(pieces):
            raise ArtifactError(f"'{replaced[0]}' is replaced, but '{name}' also holds tensors that are not")
        return Replace(torch.cat([changes[p.name].dense() for p in pieces]))
    parts = list(found.values())
    if all(isinstance(c, LowRank) for c in parts):
        return _stack_low_rank(shape, pieces, {n: c for n, c in found.items() if isinstance(c, LowRank)})
    dtype = reduce(torch.promote_types, (c.dense().dtype for c in parts))
    delta, mask = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=torch.bool)
    for piece in pieces:
        if piece.name in found:
            change = found[piece.name]
            piece.put(delta, change.dense())
            # A stored zero is a change only where a mask says so; a full delta leaves such elements alone.
            piece.put(mask, change.mask if isinstance(change, Sparse) else change.dense() != 0)
    if len(found) == len(pieces) and all(isinstance(c, Dense) for c in parts):
        return Dense(delta)
    return Sparse(mask, delta[mask])


def _stack_low_rank(shape: tuple[int, ...], pieces: list[Piece], found: Mapping[str, LowRank]) -> LowRank:
    """Factors of several pieces, one block each, in one pair of factors."""
    first = next(iter(found.values()))
    down = torch.cat([found[p.name].down for p in pieces if p.name in found])
    up, at = torch.zeros(shape[0], len(down), dtype=first.up.dtype), 0
    for piece in pieces:
        if piece.name in found:
            block = found[piece.name].up
            up[piece.rows, at : at + block.shape[1]] = block
            at += block.shape[1]
    return LowRank(up, down, shape)


def _reshape(name: str, change: Change, shape: tuple[int, ...]) -> Change:
    """Scalars are stored as ``[]`` or ``[1]``; nothing else may differ in shape."""
    if {change.shape, shape} != {(), (1,)}:
        raise ArtifactError(f"'{name}' is {list(shape)} in the target, its change has {list(change.shape)}")
    if isinstance(change, Sparse):
        return Sparse(change.mask.reshape(shape), change.values)
    new = change.dense().reshape(shape)
    return Replace(new) if isinstance(change, Replace) else Dense(new)


def _check_same(wanted: Mapping[str, Tensor], library: str, goal: Mapping[str, Tensor]) -> None:
    """The target's tensors under a change must be the source's, bit for bit after a cast."""
    for name, tensor in goal.items():
        for piece in _pieces_or_none(library, name, tuple(tensor.shape)):
            if piece.name not in wanted:
                continue
            theirs, ours = piece.take(tensor.detach()), wanted[piece.name]
            if ours.numel() != theirs.numel() or tensor_digest(ours.to(theirs.dtype).reshape(theirs.shape)) != (
                tensor_digest(theirs)
            ):
                raise ArtifactError(
                    f"'{name}' of the target is not '{piece.name}' of the model that the patch was made on: other "
                    "weights; only a model with the same weights can take the patch"
                )
