"""A folder of generated images: files that say what drew them, and the list of all."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.data.decode import decode_image
from expunge.diffusion.asks import Ask
from expunge.digest import json_digest
from expunge.errors import ArtifactError, ConfigError, DataError
from expunge.files import atomic_write
from expunge.patch.patch import current_versions
from expunge.run import differences

MANIFEST = "generated.json"
FORMAT = 1
#: Text entry of each PNG: digest of the ask and of the facts.
_STAMP = "expunge"


class ImageFolder:
    """Images of one model, drawn in one way, with their list.

    Args:
        root: Made if it does not exist.
        asks: What shall be in it; asks that are in it already stay.
        facts: JSON values that the images depend on beside the asks.

    Raises:
        ConfigError: No facts; or other facts, or another ask of the same name, in the folder: the keys that differ are
            named.
        ArtifactError: The folder's list is not readable.
    """

    def __init__(self, root: Path, asks: Sequence[Ask], facts: Mapping[str, Any] | None) -> None:
        if not facts:
            raise ConfigError(
                "images in a folder need facts that say what drew them: digest of the model, sampler, steps"
            )
        own = json.loads(json.dumps(dict(facts), allow_nan=False))
        mine = {a.name: json.loads(json.dumps(asdict(a))) for a in asks}
        entries, known = mine, _manifest(root / MANIFEST)
        if known is not None:
            differing = differences(known["facts"], own) or _other_asks(known["images"], mine)
            if differing:
                found = "; ".join(differing[:5])
                raise ConfigError(f"{root} holds images drawn otherwise: {found}. Choose another folder or remove it")
            entries = known["images"] | mine
        if known is None or known["images"] != entries:
            body = {"format": FORMAT, "facts": own, "versions": current_versions(), "images": entries}
            atomic_write(root / MANIFEST, json.dumps(body, indent=1))
        self.root = root
        self._stamps = {name: json_digest([own, entry]) for name, entry in mine.items()}

    def path(self, ask: Ask) -> Path:
        """Where the image of an ask is or will be."""
        return self.root / ask.name

    def has(self, ask: Ask) -> bool:
        """Whether the file is there, whole, and drawn for this ask by what the facts say."""
        from PIL import Image

        try:
            data = self.path(ask).read_bytes()
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                if image.info.get(_STAMP) != self._stamps[ask.name]:
                    return False
                image.verify()  # the checksum of every chunk, which loading leaves out
            decode_image(data, where=ask.name)
        except (OSError, DataError, SyntaxError, ValueError):
            return False
        return True

    def put(self, ask: Ask, image: Tensor) -> None:
        """Write an image, uint8 ``[3, H, W]``, whole or not at all."""
        atomic_write(self.path(ask), png_bytes(image, {_STAMP: self._stamps[ask.name]}))


def recorded(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Ask]]:
    """Facts and asks of a folder of images, in the order of its list.

    Raises:
        ArtifactError: No readable list.
    """
    found = _manifest(Path(folder) / MANIFEST)
    if found is None:
        raise ArtifactError(f"{folder}: no {MANIFEST}; this is no folder of generated images")
    return found["facts"], [Ask(**entry) for entry in found["images"].values()]


def load_images(paths: Sequence[Path]) -> Tensor:
    """PNG files as uint8 ``[N, 3, H, W]``.

    Raises:
        DataError: A broken file, or images of different sizes.
    """
    images = [torch.from_numpy(decode_image(p.read_bytes(), where=str(p))) for p in paths]
    sizes = {tuple(i.shape): p for i, p in zip(images, paths, strict=True)}
    if len(sizes) > 1:
        raise DataError(f"images of different sizes: {', '.join(f'{p.name} {list(s)}' for s, p in sizes.items())}")
    return torch.stack(images)


def png_bytes(image: Tensor, texts: Mapping[str, str] | None = None) -> bytes:
    """A uint8 image ``[3, H, W]`` as PNG, with text entries."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for name, text in (texts or {}).items():
        info.add_text(name, text)
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def _manifest(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
        if found["format"] != FORMAT or not isinstance(found["facts"], dict):
            raise ValueError("another format")
        for name, entry in found["images"].items():
            if Ask(**entry).name != name:
                raise ValueError(f"{name} is another image's name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, DataError) as error:
        raise ArtifactError(f"{path}: not a list of generated images ({error}); remove the folder") from None
    return {"facts": found["facts"], "images": found["images"]}


def _other_asks(known: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    return [d for name in own if name in known for d in differences(known[name], own[name], name)]
