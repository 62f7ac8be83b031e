"""The 8 x 8 digits that come with scikit-learn (UCI optical recognition of handwritten digits): no download."""

from __future__ import annotations

import torch

from expunge.data.base import MemoryImages, Splits
from expunge.data.splitting import stratified

TEST_FRACTION = 0.25


def load_digits_splits(seed: int = 0) -> Splits:
    """Return 1,797 grey 8 x 8 digits, a quarter of each class held out as the test set.

    Args:
        seed: Seed of the train/test split.

    Returns:
        Splits with images ``[N, 1, 8, 8]`` in [0, 1] (the sixteen grey levels divided by 16) and classes "0" to "9".
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = (torch.from_numpy(raw.images).float() / 16).unsqueeze(1)
    labels = torch.from_numpy(raw.target).long()
    everything = MemoryImages(x, labels, [str(d) for d in range(10)])
    train, test = stratified(labels, TEST_FRACTION, seed, "digits test split")
    return Splits(
        name="digits",
        train=everything.subset(train),
        test=everything.subset(test),
        source=f"scikit-learn digits (UCI), 75/25 stratified split, seed {seed}",
    )
