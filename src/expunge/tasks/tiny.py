"""Offline toys that train in a fraction of a second: for tests, examples and trying out a new part."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge import rng
from expunge.data.base import MemoryImages, Splits
from expunge.tasks.classifier import ClassifierTask

SIDE = 8
NAMES = ("ant", "bee", "cat", "dog", "elk", "fox")


class TinyCNN(nn.Module):
    """Two convolutions with batch norm, dropout, and a linear layer ``fc`` on pooled features; 1,340 parameters.

    Args:
        n_classes: Number of logits.
        dropout: Probability of the dropout before ``fc``.
    """

    def __init__(self, n_classes: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(16, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, 1, 8, 8]`` to logits ``[B, n_classes]``."""
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 2)
        x = functional.relu(self.bn2(self.conv2(x)))
        return self.fc(self.drop(x.mean(dim=(2, 3))))


def tiny_images(n_per_class: int, seed: int, stream: str, n_classes: int = 4, noise: float = 0.15) -> MemoryImages:
    """Noisy copies of one pattern per class.

    Args:
        n_per_class: Images of each class.
        seed: Seed of patterns and noise.
        stream: Name of the noise draw; sets with different names are independent and share the patterns.
        n_classes: At most six.
        noise: Standard deviation of the pixel noise.

    Returns:
        Images ``[n_classes * n_per_class, 1, 8, 8]`` in [0, 1], classes interleaved.
    """
    patterns = torch.rand((n_classes, 1, SIDE, SIDE), generator=_generator(seed, "tiny patterns"))
    labels = torch.arange(n_classes).repeat(n_per_class)
    draw = torch.randn((len(labels), 1, SIDE, SIDE), generator=_generator(seed, f"tiny {stream}"))
    return MemoryImages((patterns[labels] + noise * draw).clamp(0, 1), labels, NAMES[:n_classes])


def tiny_classifier(
    seed: int = 0,
    *,
    n_classes: int = 4,
    n_per_class: int = 40,
    dropout: float = 0.1,
    steps: int = 60,
    surrogate: bool = True,
) -> ClassifierTask:
    """A trained toy classifier with its data: 160 training and 80 test images of four classes by default.

    Args:
        seed: Seed of data, weights and training.
        n_classes: Classes, at most six.
        n_per_class: Training images per class; the test set has half as many.
        dropout: Dropout probability; 0 makes a step independent of how it is cut into micro-batches.
        steps: Training steps; 0 leaves the initial weights.
        surrogate: Whether the task also has images of another domain.

    Example:
        >>> from expunge.request import ForgetRequest
        >>> task = tiny_classifier()
        >>> logits, labels = task.logits("test", task.split(ForgetRequest.label("ant")))
        >>> bool((logits.argmax(1) == labels).float().mean() > 0.95)
        True
    """
    data = Splits(
        "tiny",
        tiny_images(n_per_class, seed, "train", n_classes),
        tiny_images(max(1, n_per_class // 2), seed, "test", n_classes),
    )
    other = tiny_images(max(1, n_per_class // 2), seed + 1, "surrogate", n_classes) if surrogate else None
    with rng.preserved():
        rng.seed_everything(seed)
        model = TinyCNN(n_classes, dropout)
        _train(model, data, seed, steps)
    return ClassifierTask(model.eval(), data, surrogate=other)


def _train(model: nn.Module, data: Splits, seed: int, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    model.train()
    for step in range(steps):
        ids = rng.permutation(rng.key(seed, "tiny order", step), len(data.train))[:64]
        loss = functional.cross_entropy(model(data.train.images(ids)), data.train.labels[ids])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(rng.key(seed, purpose) % 2**63)
