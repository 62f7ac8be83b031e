"""A patch made on a CLIP tower, carried over to a larger model that contains the tower.

LLaVA-style models contain the vision tower, diffusion pipelines the text tower. The tensors of such a model have other
names and often half precision, and not all of them are used. A transfer finds the tower, proves that it is the one
that the patch was made on, and refuses edits without any effect.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from expunge.consumers.match import Container, Cut
from expunge.consumers.reads import Reads
from expunge.digest import combine, named_tensors, state_digests
from expunge.errors import ArtifactError, CapabilityError, DivergedError, NoEffectError
from expunge.models.clip_names import canonical_changes
from expunge.models.towers import TOWERS, Tower, Towers
from expunge.patch import Change, Manifest, Patch, applied
from expunge.patch.apply import check_base, materialise
from expunge.patch.patch import current_versions


def transfer(
    patch: Patch,
    source: Towers,
    module: nn.Module,
    *,
    tower: Tower | None = None,
    at: str | None = None,
    reads: Reads | None = None,
    whole: bool = True,
) -> Patch:
    """Carry a patch over to a model that contains one of the towers it was made on.

    A tensor is matched by its name from ``encoder.layers.`` on (or embeddings, norms, projection), by its shape, and by
    its bits: the source's tensor, cast to the precision of the model, must be the model's tensor. A model in float32
    whose tower holds rounded half-precision numbers is accepted, too. The change itself stays as it is, in float32:
    :func:`expunge.patch.apply` adds in float32 and rounds once.

    Args:
        patch: Made on ``source``.
        source: The two-tower model without any patch.
        module: The larger model: a ``LlavaForConditionalGeneration``, the text encoder of a pipeline, or another
            module with a CLIP encoder of transformers in it. It is not changed.
        tower: Carry over only what belongs to this tower; by default every change must find its place.
        at: Prefix of the tower in ``module`` if there are several equal ones, such as ``model.vision_tower``.
        reads: What is used of the tower; by default told from the model
            (:func:`~expunge.consumers.match.what_is_read`). Give
            :func:`~expunge.consumers.diffusion_text.text_reads` for a pipeline that stops earlier.
        whole: Also compare the tensors that the patch leaves alone. An encoder that was trained further elsewhere
            would take the patch otherwise, but react to it in its own way.

    Returns:
        A patch on ``module``, with its digests. Its notes count the elements that rounding leaves as they are.

    Raises:
        ArtifactError: The patch was made on another model than ``source``, shapes differ, ``module`` holds other
            weights (the tensor and the largest difference are named), or carries a patch already.
        CapabilityError: There is no such tower, there are several, or the model does not use what the patch changes.
        NoEffectError: Rounding to the precision of the model leaves every element as it is.
        DivergedError: A changed weight is too large for that precision.

    Deviates:
        The published code copies all parameters of the edited encoder by name. That overwrites an encoder that was
        trained further, and edits blocks that the consumer never reads.
    """
    weights = named_tensors(source.model)[0]
    check_base(state_digests(weights), patch)
    if applied(module):
        raise ArtifactError(f"{type(module).__name__} carries a patch already; revert it, or make it permanent first")
    tensors, aliases = named_tensors(module)
    first = {other: name for name, others in aliases.items() for other in others}
    container = Container(module, {**tensors, **{n: tensors[f] for n, f in first.items()}}, reads, at)
    places = {n: source.place(n).tower for n in {**source.parameters(), **patch.changes}}
    sides = _sides({n: places[n] for n in patch}, tower)
    notes = [f"made on {source.library} CLIP as patch {patch.digest[:12]}, transferred to {container.kind}"]
    left = sum(places[n] not in sides for n in patch)
    notes += [f"{left} changes outside the {tower} tower were left out"] if left else []
    changes: dict[str, Change] = {}
    for side in sides:
        own = [n for n in patch if places[n] == side]
        # Parts of a fused tensor that stay as they are do not appear here.
        cuts = [Cut(n, m, c) for n in own for m, c in canonical_changes(source.library, {n: patch[n]}).items()]
        compared = {n: w for n, w in weights.items() if places.get(n) == side and (whole or n in patch)}
        match = container.locate(cuts, compared, source, side)
        for cut in cuts:
            target = match.home.name(cut.canonical)
            changes[first.get(target, target)] = cut.change
        if match.rounded:
            notes.append(f"{match.home} holds the weights of the source rounded to {match.rounded}")
        if match.reads is None:
            notes.append(f"what {container.kind} reads of {match.home} is not known; `influences` can test it")
    notes += _rounding(changes, tensors)
    digests = state_digests(tensors)
    manifest = patch.manifest.model_copy(
        update={
            "base_digest": combine(digests),
            "base_tensors": digests,
            "aliases": aliases,
            "versions": current_versions(),
            "metrics": {},
            "notes": (*patch.manifest.notes, *notes),
            "parents": (*patch.manifest.parents, patch.digest),
        }
    )
    return Patch(changes, manifest)


def _sides(places: Mapping[str, Tower | None], tower: Tower | None) -> list[Tower]:
    """The towers to carry over."""
    shared = [n for n, side in places.items() if side is None]
    if shared and tower is None:
        raise CapabilityError(
            f"'{shared[0]}' belongs to neither tower, and no larger model contains it; name the tower to carry over"
        )
    sides = [t for t in TOWERS if t in places.values() and tower in (None, t)]
    if not sides:
        raise CapabilityError(f"the patch changes nothing of the {tower or 'vision or language'} tower")
    return sides


def _rounding(changes: Mapping[str, Change], tensors: Mapping[str, Tensor]) -> list[str]:
    """Notes on what rounding to the model's precision takes away; an error if that is everything."""
    notes: list[str] = []
    wanted_all = kept_all = 0
    for name, change in changes.items():
        base = tensors[name].detach()
        dtype = str(base.dtype).removeprefix("torch.")
        new = materialise(name, base, [Patch({name: change}, Manifest(base_digest="", base_tensors={name: ""}))])
        if not bool(new.isfinite().all()):
            raise DivergedError(f"'{name}': a changed weight does not fit into {dtype}; scale the patch down")
        delta = change.dense().to(base.device)
        wanted = delta != 0 if change.additive else delta != base
        n, kept = int(wanted.sum()), int((wanted & (new == base)).sum())
        wanted_all, kept_all = wanted_all + n, kept_all + kept
        if kept:
            notes.append(f"'{name}': rounding to {dtype} leaves {kept:,} of {n:,} changed elements as they are")
    if wanted_all and kept_all == wanted_all:
        raise NoEffectError(
            f"all {wanted_all:,} changes are below the rounding of {dtype}: the model would stay as it is. Take a "
            "larger step, or load the model in float32"
        )
    return notes
