"""Small surrogate sets for the tests."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from expunge.data.spec import SurrogateSpec
from expunge.data.surrogate import Surrogate, load_surrogate

GREY, COLOUR = (1, 8, 8), (3, 12, 10)


def load(shape=GREY, **fields) -> Surrogate:
    return load_surrogate(SurrogateSpec(**fields), shape)


def png(seed: int, size: tuple[int, int] = (10, 14), channels: int = 3) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(stream, "PNG")
    return stream.getvalue()


def image_folder(root: Path, per_class: int = 6) -> Path:
    """Classes of unequal size; images of unequal size, some grey."""
    for label, name in enumerate(("cat", "dog", "fox")):
        (root / name).mkdir(parents=True)
        for i in range(per_class + 2 * label):
            channels = 1 if i == 0 else 3
            (root / name / f"{name}{i}.png").write_bytes(png(100 * label + i, (9 + i, 14), channels))
    return root
