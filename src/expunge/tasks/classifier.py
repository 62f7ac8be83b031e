"""Image classifiers: any ``nn.Module`` from images ``[B, C, H, W]`` in [0, 1] to logits ``[B, C]``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from expunge.data.base import ImageSet, Splits
from expunge.errors import CapabilityError
from expunge.models.head import check_head, find_head
from expunge.registry import Info, registry
from expunge.tasks.base import Batch
from expunge.tasks.images import ImageTask


@registry.register("task", "classifier", Info("Image classifiers with a cross-entropy loss."))
class ClassifierTask(ImageTask):
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
        >>> from expunge.request import ForgetRequest
        >>> model = build_model(ModelSpec(name="mlp", input_shape=(1, 8, 8)))
        >>> task = ClassifierTask(model, load_data(DataSpec(name="digits")))
        >>> len(task.split(ForgetRequest.label(0))["forget"])
        134
    """

    name = "classifier"
    capabilities = frozenset({"logits"})
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
        super().__init__(model, data, normalize, surrogate, eval_batch_size)
        self.head = find_head(model, self.n_classes) if head is None else check_head(model, head)
        has = {"surrogate": surrogate is not None, "features": self.head is not None}
        self.capabilities = frozenset({"logits", *(name for name, given in has.items() if given)})

    def with_surrogate(self, images: ImageSet) -> ClassifierTask:
        """The same model and data with other surrogate images."""
        return ClassifierTask(self.model, self.data, self.normalize, images, self.eval_batch_size, self.head)

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
