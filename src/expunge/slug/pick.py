"""From the front to the tensors that are edited."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from expunge.errors import RequestError
from expunge.slug.scores import LayerScore

Policy = Literal["deepest", "best_aligned", "most_important", "all"]
Group = Literal["tensor", "whole"]

#: What the public code edits when no block is on the front, whatever the model's depth.
PUBLISHED_FALLBACK = "text_model.encoder.layers.11.self_attn.out_proj.weight"
_BLOCK = re.compile(r"(?:^|\.)(?:layers|resblocks)\.(\d+)\.")
#: Tensors that are edited together. Fused q, k, v of open_clip already are one tensor.
_TOGETHER = (
    tuple(f"self_attn.{c}_proj.weight" for c in "kvq"),
    ("mlp.fc1.weight", "mlp.fc2.weight"),
    ("mlp.c_fc.weight", "mlp.c_proj.weight"),
)


def block_of(name: str) -> int | None:
    """Number of the block in a parameter's name, ``None`` outside the stack.

    >>> block_of("visual.transformer.resblocks.9.attn.out_proj.weight"), block_of("text_projection")
    (9, None)
    """
    found = _BLOCK.search(name)
    return int(found[1]) if found else None


def deepest(names: Sequence[str]) -> str | None:
    """The last-named tensor of the deepest block: the best aligned if names come in the front's order.

    Returns ``None`` if no tensor lies in the stack.

    >>> deepest(["text_model.encoder.layers.0.mlp.fc1.weight", "text_projection.weight"])
    'text_model.encoder.layers.0.mlp.fc1.weight'
    """
    inside = [(block, i) for i, n in enumerate(names) if (block := block_of(n)) is not None]
    return names[max(inside)[1]] if inside else None


def deepest_published(names: Sequence[str]) -> str:
    """The public code's rule: the first-named tensor of the deepest block, where block 0 never wins.

    With names in the published order this is the worst aligned one. Without a winner it is
    :data:`PUBLISHED_FALLBACK`, whether the model has that block or not.
    """
    best, chosen = 0, PUBLISHED_FALLBACK
    for name in names:
        block = block_of(name)
        if block is not None and block > best:
            best, chosen = block, name
    return chosen


def pick(front: Sequence[LayerScore], policy: Policy = "deepest", *, published: bool = False) -> list[LayerScore]:
    """Members of a front to search a step for.

    Args:
        front: Of one tower, in any order.
        policy: ``deepest`` block, and in it the best aligned; ``best_aligned`` and ``most_important`` of all;
            ``all`` members, worst aligned first.
        published: Take the ``deepest`` block by the public code's rule, see :func:`deepest_published`.

    Returns:
        One member, or all; empty if the front is, or if no member of it lies in a block that ``deepest`` could take.

    Raises:
        RequestError: The public code falls back to a tensor that is not on the front.
    """
    order = sorted(front, key=lambda s: -s.alignment)
    if not order or policy == "all":
        return order
    if policy == "best_aligned":
        return [min(order, key=lambda s: (s.alignment, -s.importance))]
    if policy == "most_important":
        return [max(order, key=lambda s: (s.importance, -s.alignment))]
    names = [s.name for s in order]
    name = deepest_published(names) if published else deepest(names)
    found = [s for s in order if s.name == name]
    if published and not found:
        raise RequestError(f"no block but 0 is on the front; the public code would edit '{name}' here, which is not")
    return found


def expand(name: str, known: Iterable[str], group: Group = "whole") -> list[str]:
    """Tensors that are edited together with ``name``, all with the step of ``name``.

    Args:
        name: The tensor that was picked.
        known: Names of the model's tensors.
        group: ``whole`` layer: k, v and q of a block, or both matrices of its MLP, as published for Stable Diffusion
            and UnlearnCanvas; ``tensor``: only this one, as published for CLIP alone.

    Raises:
        RequestError: The model lacks one of them.

    >>> expand("layers.3.self_attn.q_proj.weight", [f"layers.3.self_attn.{c}_proj.weight" for c in "qkv"])
    ['layers.3.self_attn.k_proj.weight', 'layers.3.self_attn.v_proj.weight', 'layers.3.self_attn.q_proj.weight']
    """
    found = [name]
    for tails in _TOGETHER if group == "whole" else ():
        own = next((t for t in tails if name == t or name.endswith("." + t)), None)
        if own is not None:
            found = [name.removesuffix(own) + t for t in tails]
    missing = sorted(set(found) - set(known))
    if missing:
        why = "" if name in missing else f", which is edited together with '{name}'"
        raise RequestError(f"the model has no such tensor: '{missing[0]}'{why}")
    return found
