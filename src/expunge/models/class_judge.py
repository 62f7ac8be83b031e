"""Judges of generated images that any classifier of the training data can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from expunge import files
from expunge.digest import json_digest
from expunge.errors import CapabilityError, DataError
from expunge.models.head import find_head
from expunge.models.weights import load_weights, save_weights
from expunge.restore import evaluating

if TYPE_CHECKING:
    from expunge.data.base import Splits

AXIS = "class"
#: Training of the judge; a new number makes cached judges of the old kind unknown.
_VERSION, _EPOCHS = 1, 20


class ClassJudge:
    """Names the class of generated images, with a classifier as it is.

    Args:
        model: Maps images ``[N, C, H, W]`` to logits; used in eval mode, without gradients.
        classes: Names of the logits.
        channels: ``C``; for 1 the mean over the three channels of the given images is taken.
        normalize: Applied to images in [0, 1] before the model.
        axis: Name of the label axis.
        batch_size: Images at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        channels: int = 3,
        normalize: Callable[[Tensor], Tensor] | None = None,
        axis: str = AXIS,
        batch_size: int = 512,
    ) -> None:
        self.model, self.channels, self.normalize, self.axis = model, channels, normalize, axis
        self.classes: dict[str, list[str]] = {axis: list(classes)}
        self.batch_size = batch_size

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Logits ``[N, classes]`` of images ``[N, 3, H, W]`` in [0, 1], on the CPU.

        Raises:
            DataError: Pixels are integers or the shape is another one.
        """
        with evaluating(self.model):
            found = [self.model(x).float().cpu() for x in self._prepared(images)]
        return {self.axis: torch.cat(found)}

    def features(self, images: Tensor) -> Tensor:
        """What the classifier's last linear layer sees, ``[N, D]``, on the CPU.

        Raises:
            CapabilityError: The classifier has no such layer.
        """
        head = find_head(self.model, len(self.classes[self.axis]))
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
