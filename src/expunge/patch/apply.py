"""Putting patches on a model and taking them off again, exactly.

Undo is always recomputed from the base tensors, never subtracted: ``(w + d) - d`` differs from ``w`` for about one
float in nine. Changes are summed in an order fixed by the patches' digests, so the order of application does not
matter.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from expunge.digest import WRAPPER, combine, is_wrapped, named_tensors, state_digests, tensor_digest
from expunge.errors import ArtifactError
from expunge.patch.changes import Change, Sparse, accumulate_dtype
from expunge.patch.patch import Patch


@dataclass
class _Record:
    base: dict[str, Tensor]
    digests: dict[str, str]
    patched: dict[str, str]
    patches: list[Patch]


_records: WeakKeyDictionary[nn.Module, _Record] = WeakKeyDictionary()


def materialise(name: str, base: Tensor, patches: Sequence[Patch]) -> Tensor:
    """Return ``base`` with the changes of all patches, in the dtype and on the device of ``base``.

    Elements that no patch changes keep their bits (also -0.0).

    Raises:
        ArtifactError: Two patches touch a tensor that one of them replaces, or a change does not fit the tensor.
    """
    for patch in patches:
        if name in patch.changes:
            _check_fits(name, base, patch[name])
    changes = [p[name] for p in sorted(patches, key=lambda p: p.digest) if name in p.changes]
    if any(not c.additive for c in changes):
        if len(changes) > 1:
            raise ArtifactError(f"'{name}' is replaced by one patch and changed by another; they cannot be stacked")
        return changes[0].dense().to(base)
    acc = base.to(accumulate_dtype(base.dtype), copy=True)
    touched = torch.zeros(base.shape, dtype=torch.bool, device=base.device)
    for change in changes:
        if isinstance(change, Sparse):
            mask = change.mask.to(base.device)
            acc[mask] += change.values.to(acc)
            touched |= mask
        else:
            delta = change.dense().to(acc)
            acc += delta
            touched |= delta != 0
    return torch.where(touched, acc.to(base.dtype), base)


def _check_fits(name: str, base: Tensor, change: Change) -> None:
    if change.shape != tuple(base.shape):
        raise ArtifactError(f"'{name}' has shape {list(base.shape)} but its change has {list(change.shape)}")
    if change.additive and not base.is_floating_point():
        raise ArtifactError(f"'{name}' holds {base.dtype} and can only be replaced, not added to")


def check_base(digests: Mapping[str, str], patch: Patch) -> None:
    """Refuse a model that is not the one the patch was made on.

    Raises:
        ArtifactError: Missing, extra or different tensors; the first ones are named, with both digests.
    """
    wanted = patch.manifest.base_tensors
    missing, extra = sorted(set(wanted) - set(digests)), sorted(set(digests) - set(wanted))
    if missing or extra:
        parts = [f"missing {missing[:3]}" if missing else "", f"unexpected {extra[:3]}" if extra else ""]
        raise ArtifactError(
            f"the model has another architecture than the patch's base: {'; '.join(filter(None, parts))}"
        )
    differing = [n for n in wanted if wanted[n] != digests[n]]
    if differing:
        first = differing[0]
        raise ArtifactError(
            f"the patch belongs to another base: {len(differing)} of {len(wanted)} tensors differ, first '{first}' "
            f"(patch {wanted[first]}, model {digests[first]}); base digest {patch.manifest.base_digest[:12]} against "
            f"{combine(dict(digests))[:12]}. Same architecture but other weights, another precision, or a "
            "patch already applied?"
        )


def apply(model: nn.Module, *patches: Patch) -> nn.Module:
    """Change a model's weights in place by one or several patches.

    The base tensors that change are kept, so :func:`revert` restores them bit for bit. Patches applied earlier stay.
    On any error the model is as it was.

    Args:
        model: The base model (or the base with other patches applied by this function).
        patches: Patches made on that base.

    Returns:
        The same model.

    Raises:
        ArtifactError: Wrong base, a patch applied twice, or two patches in conflict; the tensor is named.
    """
    record = _records.get(model)
    tensors = named_tensors(model)[0]
    if is_wrapped(model):
        warnings.warn(
            f"all tensor names start with '{WRAPPER}' (a data-parallel wrapper); matched without it", stacklevel=2
        )
    if record is None:
        record = _Record({}, state_digests(tensors), {}, [])
    else:  # also tensors that no patch has changed yet: the next one may
        _check_untouched(tensors, {**record.digests, **record.patched})
    combined = list(record.patches)
    for patch in patches:
        if any(patch.digest == p.digest for p in combined):
            raise ArtifactError(
                f"patch {patch.digest[:12]} (first tensor '{next(iter(patch), '-')}') is already applied"
            )
        made_on = patch.manifest.base_digest
        if made_on != combine(record.digests) and made_on == combine({**record.digests, **record.patched}):
            raise ArtifactError(
                f"patch {patch.digest[:12]} was made on this model with other patches applied; `revert` cannot take "
                "those off again beneath it. Make them permanent with `settle` first"
            )
        check_base(record.digests, patch)
        combined.append(patch)
    _rewrite(model, tensors, record, combined)
    return model


def revert(model: nn.Module, *patches: Patch) -> nn.Module:
    """Take patches off a model again, recomputing it from the base; without ``patches``, all of them.

    Raises:
        ArtifactError: The patch was not applied to this very object (use the base file or the undo file then), or a
            changed tensor was modified since.
    """
    record = _records.get(model)
    if record is None:
        raise ArtifactError(
            "this model object carries no applied patch. If it was loaded from a patched file, use `expunge revert` "
            "with the undo file, or load the base again"
        )
    tensors = named_tensors(model)[0]
    _check_untouched(tensors, record.patched)
    dropped = {p.digest for p in patches} if patches else {p.digest for p in record.patches}
    unknown = dropped - {p.digest for p in record.patches}
    if unknown:
        raise ArtifactError(f"patch {sorted(unknown)[0][:12]} is not applied to this model")
    _rewrite(model, tensors, record, [p for p in record.patches if p.digest not in dropped])
    return model


def applied(model: nn.Module) -> tuple[Patch, ...]:
    """The patches that :func:`apply` put on this model object."""
    record = _records.get(model)
    return tuple(record.patches) if record else ()


def settle(model: nn.Module) -> None:
    """Make a model's present weights its base: what was applied can no longer be taken off."""
    _records.pop(model, None)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's tensors without any applied patch."""
    record = _records.get(model)
    saved = record.base if record else {}
    return {n: saved.get(n, t).detach().clone() for n, t in named_tensors(model)[0].items()}


def stack(base: Mapping[str, Tensor], *patches: Patch) -> dict[str, Tensor]:
    """The tensors of a base state with several patches applied; pure, order-independent.

    To revoke one patch, call it again without that patch: the result equals the stack that never had it, bit for bit.

    Raises:
        ArtifactError: Wrong base, repeated patch or conflict.
    """
    digests = state_digests(base, [n for n in base if not _is_alias(n, patches)])
    seen: set[str] = set()
    for patch in patches:
        if patch.digest in seen:
            raise ArtifactError(f"patch {patch.digest[:12]} is given twice")
        seen.add(patch.digest)
        check_base(digests, patch)
    out = dict(base)
    for name in sorted({n for p in patches for n in p}):
        out[name] = materialise(name, base[name], patches)
        for alias in {a for p in patches for a in p.manifest.aliases.get(name, ())} & set(base):
            out[alias] = out[name]
    return out


def _is_alias(name: str, patches: Sequence[Patch]) -> bool:
    return any(name in names for p in patches for names in p.manifest.aliases.values())


def _check_untouched(tensors: Mapping[str, Tensor], expected: Mapping[str, str]) -> None:
    for name, digest in expected.items():
        if name not in tensors or tensor_digest(tensors[name]) != digest:
            raise ArtifactError(f"'{name}' was modified after a patch was applied; reload the base model")


@torch.no_grad()
def _rewrite(model: nn.Module, tensors: Mapping[str, Tensor], record: _Record, patches: list[Patch]) -> None:
    names = sorted({n for p in patches for n in p})
    base = {n: record.base.get(n, tensors[n]) for n in [*names, *sorted(set(record.base) - set(names))]}
    new = {n: materialise(n, base[n], patches) if n in names else base[n] for n in base}
    saved = {n: base[n] if n in record.base else base[n].detach().clone() for n in names}
    for name, value in new.items():
        tensors[name].copy_(value)
    record.base, record.patches = saved, patches
    record.patched = {n: tensor_digest(new[n]) for n in names}
    if patches:
        _records[model] = record
    else:
        _records.pop(model, None)
