"""What a classifier said about one role's samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from expunge.errors import DataError


def to_numpy(x: Any) -> np.ndarray:
    """A torch tensor (any device, any float type) or array-like as a NumPy array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x.float() if x.is_floating_point() and x.itemsize < 4 else x).numpy()
    return np.asarray(x)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise log-softmax in float64, shape ``[N, C]``."""
    x = logits.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@dataclass(frozen=True, eq=False)
class ClassifierOutputs:
    """Logits or probabilities ``[N, C]``, true labels ``[N]`` and, where known, sample ids ``[N]``.

    Raises:
        DataError: Shapes that do not fit, labels out of range, non-finite values, rows that are no distribution,
            repeated ids, or neither / both of logits and probs.
    """

    logits: Any = None
    labels: Any = None
    ids: Any = None
    probs: Any = None

    def __post_init__(self) -> None:
        if (self.logits is None) == (self.probs is None):
            raise DataError("classifier outputs: give either logits or probs")
        table = to_numpy(self.logits if self.logits is not None else self.probs)
        labels = to_numpy(self.labels)
        if table.ndim != 2 or labels.shape != (table.shape[0],):
            raise DataError(f"classifier outputs: [N, C] and labels [N] expected, got {table.shape} and {labels.shape}")
        if not np.isfinite(table).all():
            rows = int((~np.isfinite(table)).any(axis=1).sum())
            raise DataError(f"classifier outputs: {rows} of {len(table)} rows are not finite; the model is broken")
        if len(labels) and (labels.min() < 0 or labels.max() >= table.shape[1]):
            raise DataError(f"classifier outputs: labels {labels.min()}..{labels.max()} but {table.shape[1]} classes")
        if self.probs is not None and len(table):
            off = float(np.abs(table.sum(axis=1, dtype=np.float64) - 1).max())
            if table.min() < 0 or off > 1e-3:
                raise DataError(f"classifier outputs: probabilities are negative or do not sum to 1 (off by {off:.2g})")
        if self.ids is not None:
            ids = to_numpy(self.ids)
            if ids.shape != labels.shape or len(np.unique(ids)) != len(ids):
                raise DataError(f"classifier outputs: {len(labels)} samples need as many distinct ids")
            object.__setattr__(self, "ids", ids.astype(np.int64))
        object.__setattr__(self, "logits" if self.logits is not None else "probs", table)
        object.__setattr__(self, "labels", labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def table(self) -> np.ndarray:
        """Whatever was given, ``[N, C]``; its row-wise argmax is the prediction."""
        return self.logits if self.logits is not None else self.probs

    @cached_property
    def prob(self) -> np.ndarray:
        """Probabilities ``[N, C]``, float64."""
        return np.exp(log_softmax(self.logits)) if self.logits is not None else self.probs.astype(np.float64)

    @cached_property
    def correct(self) -> np.ndarray:
        """Whether the most likely class is the true one, bool ``[N]`` (lowest index wins a tie)."""
        return self.table.argmax(axis=1) == self.labels

    @cached_property
    def confidence(self) -> np.ndarray:
        """Probability of the true class, float64 ``[N]``."""
        return self.prob[np.arange(len(self)), self.labels]

    @cached_property
    def losses(self) -> np.ndarray:
        """Cross-entropy per sample in nats, float64 ``[N]``."""
        if self.logits is not None:
            return -log_softmax(self.logits)[np.arange(len(self)), self.labels]
        return -np.log(np.maximum(self.confidence, 1e-30))

    def take(self, rows: np.ndarray) -> ClassifierOutputs:
        """The outputs of some rows."""
        pick = {k: None if v is None else v[rows] for k, v in (("logits", self.logits), ("probs", self.probs))}
        return ClassifierOutputs(labels=self.labels[rows], ids=None if self.ids is None else self.ids[rows], **pick)
