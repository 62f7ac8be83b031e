"""Image classifiers: any ``nn.Module`` from images ``[B, C, H, W]`` in [0, 1] to logits ``[B, C]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge import rng
from expunge.data.base import ImageSet, Splits
from expunge.digest import json_digest
from expunge.errors import CapabilityError, RequestError
from expunge.models.head import check_head, find_head
from expunge.registry import Info, registry
from expunge.request import ForgetRequest, Label, class_numbers
from expunge.restore import evaluating
from expunge.tasks.base import TRAIN_ROLES, Batch, Split, Task


@registry.register("task", "classifier", Info("Image classifiers with a cross-entropy loss."))
class ClassifierTask(Task):
    """A classifier with its training and test images.

    Args:
        model: Maps normalised images to logits.
        data: Train, test and optional validation images.
        normalize: Applied to images in [0, 1] before the model.
        surrogate: Images of another domain, for methods that may not see the retain set.
        eval_batch_size: Batch size of evaluation passes.
        head: Name of the module whose inputs are the features; found by itself for models that end in a linear layer.

    Example:
        >>> from expunge.data import DataSpec, load_data
        >>> from expunge.models import ModelSpec, build_model
        >>> model = build_model(ModelSpec(name="mlp", input_shape=(1, 8, 8)))
        >>> task = ClassifierTask(model, load_data(DataSpec(name="digits")))
        >>> len(task.split(ForgetRequest.label(0))["forget"])
        134
    """

    name = "classifier"
    optional_capabilities = frozenset({"surrogate", "val", "forget_test", "features"})

    def __init__(
        self,
        model: nn.Module,
        data: Splits,
        normalize: Callable[[Tensor], Tensor] | None = None,
        surrogate: ImageSet | None = None,
        eval_batch_size: int = 512,
        head: str | None = None,
    ) -> None:
        self.model = model
        self.data = data
        self.normalize = normalize
        self.eval_batch_size = eval_batch_size
        self.classes = list(data.classes)
        self.n_classes = len(self.classes)
        self.head = find_head(model, self.n_classes) if head is None else check_head(model, head)
        has = {"surrogate": surrogate is not None, "features": self.head is not None}
        self.capabilities = frozenset(name for name, given in has.items() if given)
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
        gone = class_numbers(request.what.classes, self.classes) if isinstance(request.what, Label) else []
        return self._split(forget, retain, gone)

    def everything(self) -> Split:
        """Index sets with nothing to forget."""
        return self._split(torch.empty(0, dtype=torch.int64), torch.arange(len(self.data.train)), [])

    def with_surrogate(self, images: ImageSet) -> ClassifierTask:
        """The same model and data with other surrogate images."""
        return ClassifierTask(self.model, self.data, self.normalize, images, self.eval_batch_size, self.head)

    def _split(self, forget: Tensor, retain: Tensor, gone: list[int]) -> Split:
        notes = []
        readable = self.data.train.readable()
        if len(readable) < len(self.data.train):
            kept = retain[torch.isin(retain, readable)]
            if len(kept) < len(retain):
                notes.append(f"{len(retain) - len(kept)} unreadable images were left out of the retain set")
            retain = kept
        indices: dict[str, Tensor] = {"forget": forget, "retain": retain}
        for role, images in self._sets.items():
            if role != "train":
                indices[role] = images.readable()
        if gone:
            of_class = torch.isin(self.data.test.labels[indices["test"]], torch.tensor(gone))
            indices["forget_test"] = indices["test"][of_class]
            indices["test"] = indices["test"][~of_class]
        empty = [r for r, ids in indices.items() if not len(ids) and r != "forget"]
        if empty:
            raise RequestError(f"after this request no sample is left in: {', '.join(empty)}")
        return Split(indices, tuple(notes), tuple(sorted(gone)))

    def load(self, role: str, ids: Tensor, split: Split, *, augment: int | None = None) -> Batch:
        """Images as ``[B, C, H, W]`` in [0, 1] in the model's precision, with their true labels."""
        source = self._sets["train" if role in TRAIN_ROLES else "test" if role == "forget_test" else role]
        x = source.images(ids)
        if augment is not None:
            x = self.data.augment(x, ids, augment)
        device = self.device
        return Batch(x.to(device, self._dtype()), source.labels[ids].to(device), ids, role, split.is_forget(role, ids))

    def predict(self, batch: Batch) -> Tensor:
        """Logits ``[B, C]``."""
        x = batch.inputs if self.normalize is None else self.normalize(batch.inputs)
        return self.model(x)

    def represent(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features ``[B, D]`` (inputs of the head, flattened) and logits ``[B, C]``, from one forward pass.

        Raises:
            CapabilityError: The model has no head that could be found, or the forward pass does without it; name it by
                ``head``.
        """
        if self.head is None:
            raise CapabilityError(
                f"no linear layer of {self.n_classes} outputs was found in {type(self.model).__name__}; name the "
                "module that takes the features by `head`"
            )
        seen: list[Tensor] = []
        hook = self.model.get_submodule(self.head).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            logits = self.predict(batch)
        finally:
            hook.remove()
        if not seen:
            raise CapabilityError(
                f"the head '{self.head}' takes no part in the forward pass; name the module that takes the features by "
                "`head`"
            )
        return seen[-1].flatten(1), logits

    def loss(self, batch: Batch, targets: Tensor | None = None) -> Tensor:
        """Cross-entropy per sample ``[B]``; ``targets`` may be class numbers or probabilities ``[B, C]``."""
        return functional.cross_entropy(
            self.predict(batch), batch.targets if targets is None else targets, reduction="none"
        )

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

    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
