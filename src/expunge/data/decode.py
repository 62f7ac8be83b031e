"""Safe image decoding with Pillow: sizes are checked before pixels are decoded, broken files are errors with a name.

Rules, the same for every source:

* Formats: JPEG, PNG, BMP, GIF, WebP, TIFF, PPM. Others (some of which start external programs) are refused.
* More than ``max_pixels`` pixels: refused before decoding.
* Animated or multi-page files: refused, because it is not clear which frame the label means.
* Palette, CMYK, 1-bit and other 8-bit images are converted to RGB (or grey for one channel) by Pillow's rules.
* Transparency is composited over white, so hidden colours under transparent pixels do not show.
* 16-bit grey is scaled by 255/65535 and rounded; wider integers beyond 16 bits and floating point are refused.
* EXIF orientation is not applied: pixels are used as stored.
* With ``size`` the image is resized so that the shorter side fits (bicubic), then cropped in the centre.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from expunge.errors import ConfigError, DataError

#: Changes whenever the rules above change the pixels; part of every cache key.
DECODE_VERSION = 1
MAX_PIXELS = 50_000_000
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")


def decode_image(
    data: bytes, *, where: str, channels: int = 3, size: int | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode one image file.

    Args:
        data: Bytes of the file.
        where: Name of the file or row, for messages.
        channels: 3 for RGB, 1 for grey.
        size: Side in pixels to resize and crop to, None to keep the size.
        max_pixels: Largest width x height that is decoded.

    Returns:
        uint8 array ``[C, H, W]``.

    Raises:
        DataError: Empty, truncated, unknown format, too large, animated, or of a kind the rules refuse.
        ConfigError: Another part of the program told Pillow to accept truncated files.
    """
    from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ConfigError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, so truncated images would pass; switch it off")
    if channels not in (1, 3):
        raise ConfigError(f"channels must be 1 or 3, got {channels}")
    if not data:
        raise DataError(f"{where}: the image has zero bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(f"{where}: {width} x {height} pixels, more than the {max_pixels} that are decoded")
            if getattr(image, "n_frames", 1) > 1:
                raise DataError(f"{where}: animated or multi-page image; save the frame that is meant as its own file")
            image.load()
            plain = _eight_bit(image, where, "RGB" if channels == 3 else "L")
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DataError(f"{where}: not a readable image: none of the formats {', '.join(FORMATS)}") from None
    except Exception as error:
        # Pillow's parsers raise many types on hostile input (OSError, SyntaxError, struct.error, bomb warnings ...).
        raise DataError(f"{where}: not a readable image: {type(error).__name__}: {error}") from error
    if size is not None:
        plain = ImageOps.fit(plain, (size, size), method=Image.Resampling.BICUBIC)
    pixels = np.asarray(plain, dtype=np.uint8)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _eight_bit(image: Any, where: str, mode: str) -> Any:
    from PIL import Image

    if image.mode == mode and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise DataError(
                f"{where}: integer pixels {values.min()}..{values.max()} do not fit 16 bits; rescale the file"
            )
        return Image.fromarray(np.rint(values * (255 / 65535)).astype(np.uint8)).convert(mode)
    if image.mode == "F":
        raise DataError(f"{where}: floating-point pixels have no fixed range; save the file with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        front = image.convert("RGBA")
        back = Image.new("RGBA", front.size, (255, 255, 255, 255))
        return Image.alpha_composite(back, front).convert(mode)
    return image.convert(mode)
