"""A few images with what the model called them before and after: to look at, not to measure by."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from expunge.errors import DataError

_PREFIX = "data:image/png;base64,"
#: Smallest side in pixels; smaller images are enlarged without smoothing, larger ones shrunk.
SIDE = 64


@dataclass(frozen=True)
class Picture:
    """One image.

    Args:
        image: PNG as a data URI.
        name: What it shows.
        before: What the untouched model calls it.
        after: What the model calls it after forgetting.
        forgotten: Whether it shows what was to be forgotten.

    Raises:
        DataError: ``image`` is no PNG data URI.
    """

    image: str
    name: str
    before: str
    after: str
    forgotten: bool

    def __post_init__(self) -> None:
        if not self.image.startswith(_PREFIX):
            raise DataError("a picture of a report is a PNG data URI")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :func:`dataclasses.asdict`."""
        return cls(**data)


def data_uri(image: Tensor, side: int = SIDE) -> str:
    """An image ``[C, H, W]`` in [0, 1] as a PNG data URI of about ``side`` pixels."""
    from PIL import Image

    x = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    x = x.expand(3, -1, -1) if len(x) == 1 else x
    picture = Image.fromarray(x.permute(1, 2, 0).numpy())
    factor = side // max(picture.size)
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    elif max(picture.size) > 2 * side:
        picture.thumbnail((2 * side, 2 * side))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return _PREFIX + base64.b64encode(out.getvalue()).decode("ascii")
