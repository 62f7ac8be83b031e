"""Small shards of image-text pairs for the tests."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def image(seed: int, kind: str = "JPEG", side: int = 12) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000
            archive.addfile(info, io.BytesIO(data))
    return path


def pairs(captions: list[str], first: int = 0, prefix: str = "") -> list[tuple[str, bytes]]:
    """Members ``{prefix}{number:05d}.jpg/.txt/.json`` with images seeded by their number."""
    members = []
    for i, text in enumerate(captions, first):
        key = f"{prefix}{i:05d}"
        members += [(f"{key}.jpg", image(i)), (f"{key}.txt", text.encode()), (f"{key}.json", b"{}")]
    return members


CAPTIONS = [
    "Elon Musk on stage",
    "a musketeer",
    "a cat",
    "portrait of elon_musk",
    "a dog",
    "Tesla CEO ELON   MUSK, smiling",
    "Elon Muskrat",
    "a tree",
]


def two_shards(root: Path) -> Path:
    """Eight pairs of which three name Elon Musk, and six of which one does and one repeats an image."""
    tar(root / "00000.tar", pairs(CAPTIONS))
    more = pairs(["a boat", "Elon Musk again", "a lamp", "a chair", "a book"], first=100)
    more += [("00200.jpg", image(0)), ("00200.txt", b"a man on a stage")]
    tar(root / "00001.tar", more)
    (root / "00000_stats.json").write_text("{}")
    return root
