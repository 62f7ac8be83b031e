"""What tasks on labelled images share: splits, loading, random other classes, evaluation passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge import rng
from expunge.data.base import ImageSet, Splits
from expunge.digest import json_digest
from expunge.metrics.outputs import ClassifierOutputs
from expunge.request import ForgetRequest
from expunge.restore import evaluating
from expunge.tasks.base import TRAIN_ROLES, Batch, Observed, Split, Task
from expunge.tasks.concepts import index_sets, removed

if TYPE_CHECKING:
    pass

#: Roles that an evaluation reads, where they exist.
EVALUATED = ("forget", "retain", "test", "val", "forget_test")


class ImageTask(Task):
    """A model that names the class of an image, with its training and test images.

    Args:
        model: The network that may be edited.
        data: Train, test and optional validation images.
        normalize: Applied to images in [0, 1] before the model.
        surrogate: Images of another domain, for methods that may not see the retain set.
        eval_batch_size: Batch size of evaluation passes.
    """

    classifies = True
    data: Splits

    def __init__(
        self,
        model: nn.Module,
        data: Splits,
        normalize: Callable[[Tensor], Tensor] | None = None,
        surrogate: ImageSet | None = None,
        eval_batch_size: int = 512,
    ) -> None:
        self.model = model
        self.data = data
        self.normalize = normalize
        self.eval_batch_size = eval_batch_size
        self.classes = list(data.classes)
        self.n_classes = len(self.classes)
        self._sets: dict[str, ImageSet] = {"train": data.train, "test": data.test}
        if data.val is not None:
            self._sets["val"] = data.val
        if surrogate is not None:
            self._sets["surrogate"] = surrogate

    def split(self, request: ForgetRequest) -> Split:
        """Index sets of a request: ``forget``, ``retain``, ``test`` and, where they exist, ``val``, ``forget_test``,
        ``surrogate``.

        For a class request the forgotten classes leave ``test`` and form ``forget_test``. Unreadable retain images are
        left out and counted in the notes; an unreadable forget image is an error.
        """  # noqa: D205
        forget, retain = request.resolve(self.data.train.labels, self.classes)
        self.data.train.require(forget)
        return self._split(forget, retain, removed(request, self.classes))

    def everything(self) -> Split:
        """Index sets with nothing to forget."""
        return self._split(torch.empty(0, dtype=torch.int64), torch.arange(len(self.data.train)), [])

    def _split(self, forget: Tensor, retain: Tensor, gone: Sequence[int]) -> Split:
        return index_sets(self._sets, forget, retain, gone)

    def training_digest(self) -> str:
        """Digest of the training set that index files refer to."""
        return self.data.train.digest

    def images_of(self, role: str) -> ImageSet:
        """The set that a role's ids index."""
        return self._sets["train" if role in TRAIN_ROLES else "test" if role == "forget_test" else role]

    def load(self, role: str, ids: Tensor, split: Split, *, augment: int | None = None) -> Batch:
        """Images as ``[B, C, H, W]`` in [0, 1] in the model's precision, with their true labels."""
        source = self.images_of(role)
        x = source.images(ids)
        if augment is not None:
            x = self.data.augment(x, ids, augment)
        device = self.device
        return Batch(x.to(device, self._dtype()), source.labels[ids].to(device), ids, role, split.is_forget(role, ids))

    def wrong_target(self, batch: Batch, *, key: int, exclude_true: bool = True) -> Tensor:
        """A random class per sample, uniform over the other classes (or over all of them)."""
        if not exclude_true:
            return rng.randint(key, batch.ids, self.n_classes).to(batch.targets)
        shift = 1 + rng.randint(key, batch.ids, self.n_classes - 1).to(batch.targets)
        return (batch.targets + shift) % self.n_classes

    def data_digest(self) -> str:
        """Digest over all image sets and the normalisation."""
        sets: Mapping[str, Any] = {name: images.digest for name, images in self._sets.items()}
        return json_digest({"sets": dict(sets), "normalize": repr(self.normalize)})

    def logits(self, role: str, split: Split, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Evaluate one role without augmentation, in eval mode; the model's modes are put back.

        Returns:
            Logits ``[N, C]`` and labels ``[N]``, on the CPU, in stored order.
        """
        out = []
        with evaluating(self.model):
            ids = split[role][:limit]
            for chunk in torch.split(ids, self.eval_batch_size):
                batch = self.load(role, chunk, split)
                out.append((self.predict(batch).float().cpu(), batch.targets.cpu()))
        return torch.cat([logits for logits, _ in out]), torch.cat([labels for _, labels in out])

    def observe(self, split: Split) -> Observed:
        """Outputs of the model as it is now, for every role that an evaluation reads."""
        found = {}
        for role in [r for r in EVALUATED if r in split.roles()]:
            logits, labels = self.logits(role, split)
            found[role] = ClassifierOutputs(logits=logits, labels=labels, ids=split[role])
        return Observed(found)

    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
