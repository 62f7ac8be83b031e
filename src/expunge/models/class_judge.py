"""Judges of generated images that any classifier of the training data can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from expunge import files
from expunge.digest import json_digest
from expunge.errors import CapabilityError, ConfigError, DataError
from expunge.models.head import find_head
from expunge.models.weights import load_weights, save_weights
from expunge.restore import evaluating

if TYPE_CHECKING:
    from expunge.data.base import Splits

AXIS = "class"
#: Best outputs beyond the classes that stay visible, so that the best one and the best five are exact.
OTHERS = 5
#: Training of the judge; a new number makes cached judges of the old kind unknown.
_VERSION, _EPOCHS = 1, 20


class ClassJudge:
    """Names the class of generated images, with a classifier as it is.

    A classifier may know more than the classes, as one of the 1,000 of ImageNet does. The best :data:`OTHERS` of its
    further outputs then follow the classes' own, in falling order: an image shows a class only if no other output, of
    all, is larger.

    Args:
        model: Maps images ``[N, C, H, W]`` to logits; used in eval mode, without gradients.
        classes: Names of the logits.
        channels: ``C``; for 1 the mean over the three channels of the given images is taken.
        normalize: Applied to images in [0, 1] before the model.
        axis: Name of the label axis.
        batch_size: Images at a time.
        outputs: Which outputs of the model the classes are; all, in their order, by default.

    Raises:
        ConfigError: Outputs that are not as many as the classes, occur twice or are negative.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        channels: int = 3,
        normalize: Callable[[Tensor], Tensor] | None = None,
        axis: str = AXIS,
        batch_size: int = 512,
        outputs: Sequence[int] | None = None,
    ) -> None:
        if outputs is not None and (
            len(outputs) != len(classes) or len(set(outputs)) < len(outputs) or min(outputs, default=-1) < 0
        ):
            raise ConfigError(f"judge: {len(classes)} classes need as many distinct outputs, got {list(outputs)}")
        self.model, self.channels, self.normalize, self.axis = model, channels, normalize, axis
        self.classes: dict[str, list[str]] = {axis: list(classes)}
        self.batch_size = batch_size
        self.outputs = None if outputs is None else list(outputs)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Logits ``[N, classes]`` of images ``[N, 3, H, W]`` in [0, 1], on the CPU; with further outputs behind them.

        Raises:
            DataError: Pixels are integers or the shape is another one.
            ConfigError: The model has fewer outputs than are named.
        """
        with evaluating(self.model):
            found = torch.cat([self.model(x).float().cpu() for x in self._prepared(images)])
        return {self.axis: found if self.outputs is None else self._among(found, self.outputs)}

    def _among(self, logits: Tensor, outputs: list[int]) -> Tensor:
        width = logits.shape[1]
        if max(outputs) >= width:
            raise ConfigError(f"judge: output {max(outputs)} of a model that has {width}")
        rest = torch.ones(width, dtype=torch.bool)
        rest[outputs] = False
        others = logits[:, rest]
        return torch.cat([logits[:, outputs], others.topk(min(OTHERS, others.shape[1])).values], 1)

    def features(self, images: Tensor) -> Tensor:
        """What the classifier's last linear layer sees, ``[N, D]``, on the CPU.

        Raises:
            CapabilityError: The classifier has no such layer.
        """
        width = len(self.classes[self.axis])
        if self.outputs is not None:  # the head is as wide as all outputs
            with evaluating(self.model):
                width = self.model(self._prepared(images[:1])[0]).shape[1]
        head = find_head(self.model, width)
        if head is None:
            raise CapabilityError(f"no head was found in {type(self.model).__name__}, so the judge offers no features")
        seen: list[Tensor] = []
        hook = self.model.get_submodule(head).register_forward_pre_hook(
            lambda _, args: seen.append(args[0].flatten(1).float().cpu())
        )
        try:
            self(images)
        finally:
            hook.remove()
        return torch.cat(seen)

    def _prepared(self, images: Tensor) -> list[Tensor]:
        if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
            raise DataError(
                f"the judge sees float images [N, 3, H, W] in [0, 1], not {images.dtype} {list(images.shape)}"
            )
        x = images.mean(1, keepdim=True) if self.channels == 1 else images
        some = next(self.model.parameters())
        x = x.to(some.device, some.dtype)
        return list((x if self.normalize is None else self.normalize(x)).split(self.batch_size))


def train_judge(data: Splits, seed: int = 0, *, cache: bool = True) -> ClassJudge:
    """A small network trained on labelled images: seconds for digits, where it names 98 % of the test images.

    Args:
        data: Its training images are learnt, forgotten classes included: the judge is no part of the model.
        seed: Seed of weights and batch order.
        cache: Keep the weights in the cache folder, under a digest of the data and of the training.
    """
    from expunge.models.small import SmallCNN
    from expunge.recipe import Optim
    from expunge.rng import preserved, seed_everything
    from expunge.tasks.classifier import ClassifierTask
    from expunge.train import fit

    channels = data.train.shape[0]
    with preserved():
        seed_everything(seed)
        model = SmallCNN(len(data.classes), channels)
    digest = json_digest({"judge": _VERSION, "data": data.train.digest, "seed": seed, "epochs": _EPOCHS})
    file = files.cache_dir() / "judges" / f"{digest[:32]}.safetensors"
    if cache and file.is_file():
        load_weights(model, file)
    else:
        optim = Optim(lr=0.05, epochs=_EPOCHS, lr_schedule="cosine", norm="train", weight_decay=5e-4)
        fit(ClassifierTask(model, data), optim=optim, batch_size=64, seed=seed)
        if cache:
            save_weights(model, file)
    return ClassJudge(model.eval(), data.classes, channels)
