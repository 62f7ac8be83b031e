"""The embedding of a model: features, labels and class prototypes of a fixed list of samples, and its file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from expunge.errors import ArtifactError, ConfigError, DataError, NotComparableError
from expunge.files import atomic_path, atomic_save_safetensors, read_safetensors

FORMAT = 1
#: Key of the JSON text in the header.
KEY = "expunge_embedding"
_FACTS: dict[str, type] = {
    "name": str,
    "role": str,
    "seed": int,
    "classes": list,
    "model_digest": str,
    "data_digest": str,
    "request_digest": str,
    "head": str,
}


@dataclass(frozen=True)
class Embedding:
    """What a model's head sees for a list of samples, in evaluation mode and without augmentation.

    Args:
        name: Name of the model; also the name of its file and pictures.
        features: ``[S, D]``, floating point.
        labels: True classes, int64 ``[S]``.
        ids: Sample ids within the role's set, int64 ``[S]``, all different.
        forget: Bool ``[S]``: was this sample to be forgotten?
        prototypes: Rows of the head's weight, ``[C, D]``.
        classes: Class names.
        bias: Bias of the head ``[C]``, if it has one.
        role: ``train`` or ``test``: the set that ``ids`` index.
        seed: Seed of the choice of samples.
        model_digest: Digest of all weights and buffers.
        data_digest: Digest of the task's images and normalisation.
        request_digest: Digest of the request that ``forget`` follows; empty if unknown.
        head: Name of the module whose inputs are the features.

    Raises:
        DataError: Shapes, types or labels that do not fit, repeated ids, or values that are not finite.
    """

    name: str
    features: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    ids: Tensor = field(repr=False)
    forget: Tensor = field(repr=False)
    prototypes: Tensor = field(repr=False)
    classes: tuple[str, ...]
    bias: Tensor | None = field(default=None, repr=False)
    role: str = "train"
    seed: int = 0
    model_digest: str = ""
    data_digest: str = ""
    request_digest: str = ""
    head: str = ""

    def __post_init__(self) -> None:
        n, c = len(self.labels), len(self.classes)
        d = self.features.shape[-1]
        wanted: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype | None]] = {
            "features": (self.features, (n, d), None),
            "labels": (self.labels, (n,), torch.int64),
            "ids": (self.ids, (n,), torch.int64),
            "forget": (self.forget, (n,), torch.bool),
            "prototypes": (self.prototypes, (c, d), None),
            "bias": (self.bias, (c,), None),
        }
        for name, (tensor, shape, dtype) in wanted.items():
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape or (dtype is not None and tensor.dtype != dtype):
                raise DataError(
                    f"embedding {self.name!r}: {name} is {tensor.dtype} {list(tensor.shape)}, expected "
                    f"{dtype or 'floating point'} {list(shape)}"
                )
            if dtype is None and not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
                raise DataError(f"embedding {self.name!r}: {name} holds values that are not finite numbers")
        if n == 0 or d == 0:
            raise DataError(f"embedding {self.name!r} is empty")
        if int(self.labels.min()) < 0 or int(self.labels.max()) >= c:
            raise DataError(f"embedding {self.name!r}: labels are outside 0..{c - 1}")
        if len(self.ids.unique()) != n:
            raise DataError(f"embedding {self.name!r}: a sample id appears twice")

    def __len__(self) -> int:
        return len(self.labels)

    def clouds(self) -> list[Tensor]:
        """Features of each class, ``[n_c, D]``."""
        return [self.features[self.labels == c] for c in range(len(self.classes))]

    def unit(self) -> Self:
        """A copy with features and prototypes of length one.

        Raises:
            DataError: A feature vector is zero and has no direction.
        """
        from dataclasses import replace

        scaled = []
        for what, x in (("sample", self.features), ("prototype of class", self.prototypes)):
            length = x.norm(dim=1, keepdim=True)
            zero = (length.flatten() == 0).nonzero().flatten()
            if len(zero):
                first = int(self.ids[zero[0]]) if what == "sample" else int(zero[0])
                raise DataError(f"embedding {self.name!r}: {what} {first} is the zero vector and has no unit length")
            scaled.append(x / length)
        return replace(self, features=scaled[0], prototypes=scaled[1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``features``, ``labels``, ``ids``, ``forget``, ``prototypes`` and ``bias`` with their description."""
        tensors = {n: getattr(self, n) for n in ("features", "labels", "ids", "forget", "prototypes", "bias")}
        present = {n: t for n, t in tensors.items() if t is not None}
        facts: dict[str, Any] = {"format": FORMAT, **{k: getattr(self, k) for k in _FACTS}}
        facts["classes"] = list(self.classes)
        facts["shapes"] = {n: list(t.shape) for n, t in present.items()}
        atomic_save_safetensors(path, present, {KEY: json.dumps(facts)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read an embedding.

        Raises:
            ArtifactError: Another kind of file, another schema, or contents that contradict each other.
        """
        tensors, metadata = read_safetensors(path)
        if KEY not in metadata:
            raise ArtifactError(f"{path}: not an embedding (no '{KEY}' in its header); write one by `analyze embed`")
        try:
            facts = json.loads(metadata[KEY])
            version = facts["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtifactError(f"{path}: malformed header ({error!r})") from None
        if version != FORMAT:
            raise ArtifactError(f"{path}: unknown embedding schema {version!r}; this version reads {FORMAT}")
        wrong = [k for k, kind in _FACTS.items() if not isinstance(facts.get(k), kind)]
        if wrong or not all(isinstance(c, str) for c in facts["classes"]):
            raise ArtifactError(f"{path}: malformed header ({', '.join(wrong) or 'classes'})")
        shapes = {n: list(t.shape) for n, t in tensors.items()}
        if facts.get("shapes") != shapes:
            raise ArtifactError(f"{path}: the header promises tensors {facts.get('shapes')}, the file holds {shapes}")
        try:
            fields: dict[str, Any] = {k: facts[k] for k in _FACTS} | {"classes": tuple(facts["classes"])}
            return cls(**(fields | tensors))
        except (TypeError, DataError) as error:
            raise ArtifactError(f"{path}: {error}") from None

    def save_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write one row per sample, then one per prototype (``kind``), with the features as a list column."""
        n, c = len(self), len(self.classes)
        labels = [*self.labels.tolist(), *range(c)]
        columns = {
            "model": [self.name] * (n + c),
            "kind": ["sample"] * n + ["prototype"] * c,
            "id": [*self.ids.tolist(), *[None] * c],
            "label": labels,
            "class_name": [self.classes[k] for k in labels],
            "forget": [*self.forget.tolist(), *[None] * c],
            "features": [*self.features.tolist(), *self.prototypes.tolist()],
        }
        save_parquet(path, columns)


def save_parquet(path: str | os.PathLike[str], columns: dict[str, Any]) -> None:
    """Write columns as a Parquet file, whole or not at all.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError("Parquet files need pyarrow: pip install pyarrow") from None
    with atomic_path(path) as temporary:
        parquet.write_table(pyarrow.table(columns), temporary)


def check_comparable(embeddings: Sequence[Embedding]) -> None:
    """Refuse embeddings that do not show the same samples.

    Raises:
        ConfigError: None given, or two of one name.
        NotComparableError: Other sample ids, labels, classes, data or feature dimension; the first pair is named.
    """
    if not embeddings:
        raise ConfigError("no embedding was given")
    names = [e.name for e in embeddings]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ConfigError(f"two embeddings are called {twice[0]!r}; names tell them apart")
    first = embeddings[0]
    for other in embeddings[1:]:
        pair = f"embeddings {first.name!r} and {other.name!r} cannot be compared"
        if first.classes != other.classes:
            raise NotComparableError(f"{pair}: their classes differ")
        if first.role != other.role or first.ids.tolist() != other.ids.tolist():
            raise NotComparableError(
                f"{pair}: they hold different samples ({len(first)} of {first.role}, {len(other)} of {other.role}); "
                "embed both with the same role, number of samples and seed"
            )
        if first.data_digest != other.data_digest or not torch.equal(first.labels, other.labels):
            raise NotComparableError(f"{pair}: they were made from different data")
        if first.features.shape[1] != other.features.shape[1]:
            widths = f"{first.features.shape[1]} and {other.features.shape[1]}"
            raise NotComparableError(f"{pair}: their features have {widths} dimensions")


def load_folder(folder: str | os.PathLike[str]) -> list[Embedding]:
    """Read all embeddings that lie directly in a folder and show the same samples; ``base`` comes first.

    Raises:
        ArtifactError: A ``.safetensors`` file there is not an embedding, or its name is not its file's.
        ConfigError: There is none.
        NotComparableError: They do not show the same samples.
    """
    files = sorted(Path(folder).glob("*.safetensors"), key=lambda p: (p.stem != "base", p.stem))
    if not files:
        raise ConfigError(f"{folder}: no embedding (*.safetensors) in this folder")
    found = []
    for file in files:
        embedding = Embedding.load(file)
        if embedding.name != file.stem:
            raise ArtifactError(f"{file}: holds the embedding of {embedding.name!r}; give the file that name")
        found.append(embedding)
    check_comparable(found)
    return found
