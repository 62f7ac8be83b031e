"""The patch: a small safetensors file that says how to change a model's weights, and how it came about."""

from __future__ import annotations

import fnmatch
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from expunge.digest import combine, json_digest, tensor_digest
from expunge.errors import ArtifactError, ConfigError, RequestError, did_you_mean
from expunge.files import atomic_save_safetensors, read_safetensors
from expunge.part import Frozen
from expunge.patch.changes import Change, decode

FORMAT = 1
_HEADER_KEY = "expunge"


def current_versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    import numpy

    from expunge import __version__

    return {
        "expunge": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


class Manifest(Frozen):
    """Where a patch came from and what it belongs to.

    Args:
        base_digest: Digest of the model that the patch was made on.
        base_tensors: Digest of each tensor of that model, so that a mismatch can be named.
        aliases: Other names of tied tensors.
        request: The request to forget, as data; ``request_digest`` identifies it.
        recipe: The recipe with every setting spelled out.
        seed: Seed of the run.
        versions: Versions of the libraries.
        metrics: Numbers measured on the patched model, if any.
        notes: What the run had to say (warnings, stop reason, memory fall-backs).
        findings: What the method found out on its way (scores, searches), as plain data for the report.
        parents: Digests of the patches this one was derived from by scaling or restriction.
    """

    format: int = FORMAT
    base_digest: str
    base_tensors: dict[str, str]
    aliases: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    request: dict[str, Any] = Field(default_factory=dict)
    request_digest: str = ""
    recipe: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    versions: dict[str, str] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    findings: dict[str, Any] = Field(default_factory=dict)
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Patch:
    """Named changes of tensors plus a :class:`Manifest`.

    Example:
        >>> import torch
        >>> from expunge.patch import Dense, Manifest, Patch
        >>> p = Patch({"w": Dense(torch.ones(2))}, Manifest(base_digest="0", base_tensors={"w": "0"}))
        >>> len(p), p.scale(0.5)["w"].dense().tolist()
        (1, [0.5, 0.5])
    """

    changes: Mapping[str, Change]
    manifest: Manifest

    def __post_init__(self) -> None:
        for name, change in self.changes.items():
            if name not in self.manifest.base_tensors:
                raise ArtifactError(f"the patch changes '{name}', which its base model does not have")
            for part, tensor in change.tensors().items():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise ArtifactError(f"the change of '{name}' ({part}) holds NaN or infinite values")

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Patch) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __len__(self) -> int:
        return len(self.changes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.changes)

    def __getitem__(self, name: str) -> Change:
        return self.changes[name]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the base and every stored tensor: the identity of the patch."""
        tensors = {
            f"{n}::{part}": f"{c.kind}:{c.shape}:{tensor_digest(t)}"
            for n, c in self.changes.items()
            for part, t in c.tensors().items()
        }
        return json_digest({"base": self.manifest.base_digest, "changes": combine(tensors)})

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors (the file adds its header)."""
        return sum(c.nbytes for c in self.changes.values())

    def scale(self, factor: float) -> Patch:
        """The patch with every change multiplied by ``factor``.

        Raises:
            ArtifactError: A replaced tensor cannot be scaled.
        """
        return self._derive({n: c.scale(factor) for n, c in self.changes.items()})

    def restrict(self, patterns: Sequence[str] | str) -> Patch:
        """The patch on the tensors whose names match one of the glob patterns only.

        Raises:
            RequestError: A pattern matches nothing.
        """
        wanted = [patterns] if isinstance(patterns, str) else list(patterns)
        kept: dict[str, Change] = {}
        for pattern in wanted:
            hits = {n: c for n, c in self.changes.items() if fnmatch.fnmatchcase(n, pattern)}
            if not hits:
                raise RequestError(f"'{pattern}' matches no changed tensor{did_you_mean(pattern, self.changes)}")
            kept.update(hits)
        return self._derive({n: c for n, c in self.changes.items() if n in kept})

    def _derive(self, changes: dict[str, Change]) -> Patch:
        manifest = self.manifest.model_copy(update={"parents": (*self.manifest.parents, self.digest), "metrics": {}})
        return Patch(changes, manifest)

    def with_metrics(self, metrics: dict[str, Any]) -> Patch:
        """The same patch with measured numbers in its manifest."""
        return replace(self, manifest=self.manifest.model_copy(update={"metrics": metrics}))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically."""
        tensors = {f"{n}::{p}": t.contiguous() for n, c in self.changes.items() for p, t in c.tensors().items()}
        header = {
            "manifest": self.manifest.model_dump(mode="json"),
            "changes": {n: c.meta() for n, c in self.changes.items()},
            "digest": self.digest,
        }
        header["header_digest"] = json_digest(header)
        atomic_save_safetensors(path, tensors, {_HEADER_KEY: json.dumps(header, sort_keys=True)})
        return Path(path)

    @staticmethod
    def load(path: str | Path) -> Patch:
        """Read and verify a patch file. Nothing in it can run code.

        Raises:
            ArtifactError: Broken file, not a patch, newer format, or content that does not match its digest.
        """
        header, tensors = _read(Path(path))
        try:
            if header["manifest"]["format"] > FORMAT:
                raise ArtifactError(
                    f"it has format {header['manifest']['format']}; this version reads up to {FORMAT}: update expunge"
                )
            if header.pop("header_digest") != json_digest(header):
                raise ArtifactError("its header does not match its digest; the file was altered or damaged")
            manifest = Manifest(**header["manifest"])
            metas: dict[str, dict[str, Any]] = header["changes"]
            grouped: dict[str, dict[str, Tensor]] = {n: {} for n in metas}
            for key, tensor in tensors.items():
                name, _, part = key.rpartition("::")
                if name not in grouped:
                    raise ArtifactError(f"tensor '{key}' is not in the manifest")
                grouped[name][part] = tensor
            changes = {}
            for name, meta in metas.items():
                try:
                    changes[name] = decode(meta, grouped[name])
                except ArtifactError as error:
                    raise ArtifactError(f"'{name}': {error}") from None
            patch = Patch(changes, manifest)
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise ArtifactError(f"{path}: the patch header is malformed ({error})") from None
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from None
        if header.get("digest") != patch.digest:
            raise ArtifactError(f"{path}: its content does not match its digest; the file was altered or damaged")
        return patch


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise ArtifactError(f"{path}: no such patch file")
    tensors, metadata = read_safetensors(path)
    if _HEADER_KEY not in metadata:
        raise ArtifactError(f"{path}: a safetensors file, but not a patch (no '{_HEADER_KEY}' header)")
    try:
        return json.loads(metadata[_HEADER_KEY]), tensors
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path}: the patch header is not JSON ({error})") from None
