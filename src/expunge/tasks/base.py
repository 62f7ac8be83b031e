"""The task: the only place that knows a model family's batches, losses and predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.errors import CapabilityError, RequestError, did_you_mean
from expunge.metrics.estimate import Estimate
from expunge.metrics.outputs import ClassifierOutputs
from expunge.request import ForgetRequest

if TYPE_CHECKING:
    from expunge.data.base import ImageSet
    from expunge.patch import Patch
    from expunge.report.model import Report

#: Roles whose ids index the training set.
TRAIN_ROLES = frozenset({"forget", "retain", "mixed"})


@dataclass(frozen=True)
class Batch:
    """Samples of one role in one step.

    Args:
        inputs: Model inputs, ``[B, ...]``.
        targets: True targets, int64 ``[B]`` for classifiers.
        ids: Sample ids within the role's set, int64 ``[B]``.
        role: ``forget``, ``retain``, ``mixed``, ``surrogate``, ``test``, ``val`` ...
        is_forget: Bool ``[B]``: which samples belong to the forget set.
        key: Key of the draws that a loss makes (timesteps, noise); each draw is a function of it and of the sample id.
    """

    inputs: Any
    targets: Tensor
    ids: Tensor
    role: str
    is_forget: Tensor
    key: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Split:
    """Index sets by role. ``forget`` and ``retain`` index the training set; the other roles their own sets.

    ``removed`` holds the classes that the request removes as a whole; it is empty for requests that name samples.
    ``concept`` is what the request names in words.
    """

    indices: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    removed: tuple[int, ...] = ()
    concept: str = ""
    _forget: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_forget", self.indices["forget"])

    def __getitem__(self, role: str) -> Tensor:
        if role == "mixed":
            return torch.cat([self.indices["forget"], self.indices["retain"]])
        try:
            return self.indices[role]
        except KeyError:
            raise RequestError(f"no samples have the role '{role}'{did_you_mean(role, self.indices)}") from None

    def __contains__(self, role: object) -> bool:
        return role in self.indices or role == "mixed"

    def roles(self) -> tuple[str, ...]:
        """Names of the roles present."""
        return tuple(self.indices)

    def with_indices(self, **indices: Tensor) -> Split:
        """A copy with other index sets for some roles."""
        return Split({**self.indices, **indices}, self.notes, self.removed, self.concept)

    def is_forget(self, role: str, ids: Tensor) -> Tensor:
        """Bool per id: does it belong to the forget set?"""
        if role == "mixed":
            return torch.isin(ids, self._forget)
        return torch.full((len(ids),), role == "forget")


@dataclass(frozen=True)
class Observed:
    """What a model says about the data: classifier outputs by role, and what else its family looks at."""

    outputs: dict[str, ClassifierOutputs]
    extra: Any = None


class Task(ABC):
    """One model with its data. Subclasses are final; each serves one model family.

    Attributes:
        model: The network that may be edited.
        name: Family name, as registered.
        capabilities: What methods may rely on beyond ``loss`` and ``predict``: ``features``, ``head`` ...
        classes: Names of the classes, for tasks that have some.
        counts_draws: Whether the loss draws (timesteps, noise) by the ids of a batch.
        classifies: Whether ``predict`` gives logits over ``classes``.
        couples_samples: Whether the loss of a sample depends on the others in its batch; then a batch cannot be cut
            into pieces, and a single sample has no gradient of its own.
    """

    model: nn.Module
    name: str
    capabilities: frozenset[str] = frozenset()
    classes: list[str] = []
    couples_samples: bool = False
    counts_draws: bool = False
    classifies: bool = False

    @abstractmethod
    def split(self, request: ForgetRequest) -> Split:
        """Turn a request into index sets, checked against the data.

        Raises:
            RequestError: The request does not fit the data.
            DataError: A sample to forget cannot be read.
        """

    @abstractmethod
    def everything(self) -> Split:
        """Index sets with nothing to forget: ``forget`` is empty, ``retain`` the whole training set."""

    @abstractmethod
    def load(self, role: str, ids: Tensor, split: Split, *, augment: int | None = None) -> Batch:
        """Load samples onto the model's device.

        Args:
            role: Whose samples.
            ids: int64 ``[B]``.
            split: The index sets of the request.
            augment: Key of the augmentation draw; ``None`` means none.
        """

    @abstractmethod
    def loss(self, batch: Batch, targets: Tensor | None = None) -> Tensor:
        """Per-sample training loss ``[B]``, against ``targets`` instead of the true ones if given."""

    @abstractmethod
    def predict(self, batch: Batch) -> Tensor:
        """Model outputs: logits ``[B, C]`` for classifiers."""

    @abstractmethod
    def wrong_target(self, batch: Batch, *, key: int, exclude_true: bool = True) -> Tensor:
        """A random other target per sample, a pure function of ``(key, sample id)``.

        Args:
            batch: The samples.
            key: Key of the draw.
            exclude_true: Never return the true target.
        """

    @abstractmethod
    def data_digest(self) -> str:
        """Digest of all data that a run may read."""

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next((t.device for t in self.model.parameters()), torch.device("cpu"))

    def training_digest(self) -> str:
        """Digest of the training set that index files refer to.

        Raises:
            CapabilityError: There are no training samples.
        """
        raise CapabilityError(f"the {self.name} task has no training samples that an index file could name")

    def with_surrogate(self, images: ImageSet) -> Task:
        """The same model and data with other surrogate images.

        Raises:
            CapabilityError: The family takes none.
        """
        del images
        raise CapabilityError(f"the {self.name} task takes no surrogate images")

    def observe(self, split: Split) -> Observed:
        """What the model as it is now says about every role that an evaluation reads; the model is left as found.

        Raises:
            CapabilityError: No evaluation is defined for this family.
        """
        del split
        raise CapabilityError(f"no evaluation is defined for the {self.name} task")

    def further_metrics(self, split: Split, seen: Observed) -> dict[str, Estimate]:
        """Figures of this family beside those of a classifier."""
        del split, seen
        return {}

    def describe(
        self, report: Report, split: Split, before: Observed, after: Observed | None, patch: Patch | None
    ) -> None:
        """Add what this family has to show to a report."""
        del report, split, before, after, patch

    def masters(self, wanted: Iterable[nn.Parameter]) -> list[nn.Parameter] | None:
        """Parameters to hold in float32 while others stay in half precision and the model computes in it.

        Args:
            wanted: Those that a space asks for.

        Returns:
            These and what else is needed for the same results; ``None`` means all.
        """
        del wanted
        return None

    def require(self, needs: frozenset[str], who: str) -> None:
        """Refuse a method whose needs the task cannot meet.

        Raises:
            CapabilityError: Names what is missing.
        """
        missing = sorted(needs - self.capabilities)
        if missing:
            raise CapabilityError(
                f"{who} needs {', '.join(missing)}; the {self.name} task offers {sorted(self.capabilities)}"
            )
