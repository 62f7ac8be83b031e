"""Fault 11: broken, hostile and unusual images, and who may skip them."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from expunge.data import DataSpec, load_data
from expunge.data.decode import decode_image
from expunge.data.encoded import Decoding, EncodedImages, Source
from expunge.errors import ConfigError, DataError


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(h: int = 16, w: int = 16, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (h, w, channels), dtype=np.uint8)


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few hundred bytes that claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_modes_are_converted_by_the_documented_rules():
    rgb = noise()
    assert np.array_equal(decode_image(encode(Image.fromarray(rgb)), where="x"), rgb.transpose(2, 0, 1))

    grey16 = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    got = decode_image(encode(Image.fromarray(grey16)), where="x", channels=1)
    assert np.array_equal(got[0], np.arange(256).reshape(16, 16))

    clear = np.dstack([rgb, np.zeros((16, 16), np.uint8)])
    assert (decode_image(encode(Image.fromarray(clear, "RGBA")), where="x") == 255).all()
    solid = np.dstack([rgb, np.full((16, 16), 255, np.uint8)])
    assert np.array_equal(decode_image(encode(Image.fromarray(solid, "RGBA")), where="x"), rgb.transpose(2, 0, 1))

    cmyk = Image.fromarray(np.full((8, 8, 4), 0, np.uint8), "CMYK")
    assert (decode_image(encode(cmyk, "TIFF"), where="x") == 255).all()

    palette = Image.fromarray(rgb).quantize(16)
    want = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode_image(encode(palette), where="x"), want)

    bilevel = Image.fromarray((rgb[:, :, 0] > 127).astype(np.uint8) * 255).convert("1")
    assert set(decode_image(encode(bilevel), where="x", channels=1).ravel().tolist()) == {0, 255}


def test_resize_crops_the_centre():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    assert (decode_image(encode(Image.fromarray(wide)), where="x", size=8) == 200).all()


BAD_IMAGES = {
    "zero bytes": (b"", "zero bytes"),
    "text": (b"this is not an image", "not a readable image"),
    "truncated jpeg": (encode(Image.fromarray(noise(64, 64)), "JPEG")[:900], "truncated|not a readable"),
    "truncated png": (encode(Image.fromarray(noise(64, 64)))[:900], "not a readable image"),
    "bomb": (bomb(), "pixels|Bomb"),
    "below pillow's own limit": (bomb(8000), "more than the 50000000"),
    "animated": (
        encode(
            Image.fromarray(noise()), "GIF", save_all=True, append_images=[Image.fromarray(255 - noise())], duration=10
        ),
        "animated",
    ),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "not a readable image"),
    "float": (encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
    "32-bit": (encode(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "do not fit 16 bits"),
}


@pytest.mark.parametrize("how", list(BAD_IMAGES))
def test_bad_images_are_named(how):
    data, message = BAD_IMAGES[how]
    with pytest.raises(DataError, match=message) as caught:
        decode_image(data, where="train/cat/7.jpg")
    assert "train/cat/7.jpg" in str(caught.value)


def test_pixel_cap_acts_before_decoding(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded before the cap was checked"))
    with pytest.raises(DataError, match="more than the 100"):
        decode_image(encode(Image.new("RGB", (11, 10))), where="x", max_pixels=100)


def test_tolerance_for_truncation_elsewhere_is_noticed(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ConfigError, match="LOAD_TRUNCATED_IMAGES"):
        decode_image(encode(Image.fromarray(noise())), where="x")


def image_set(bad_rows: set[int], n: int = 10, **rules) -> EncodedImages:
    good = encode(Image.fromarray(noise()))
    sources = [Source(f"img{i}.png", lambda i=i: b"" if i in bad_rows else good) for i in range(n)]
    return EncodedImages(sources, torch.arange(n) % 2, ["a", "b"], Decoding(**rules))


@pytest.mark.parametrize("form", ["in_memory", "cached", "scan"])
def test_retain_side_may_skip_but_the_forget_side_never(tmp_path, monkeypatch, form):
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path))
    images = getattr(image_set({3}, on_bad="skip", max_bad=0.1), form)()
    assert list(images.unreadable) == [3]
    assert images.readable().tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    images.require(torch.tensor([0, 1, 2]))
    with pytest.raises(DataError, match=r"1 of the 2 required images cannot be read: img3\.png"):
        images.require(torch.tensor([2, 3]))
    with pytest.raises(DataError, match=r"img3\.png"):
        images.images(torch.tensor([3]))
    part = images.subset(torch.tensor([5, 3]))
    assert list(part.unreadable) == [1]
    with pytest.raises(DataError, match=r"img3\.png"):
        part.require(torch.tensor([1]))


def test_policy_raise_and_the_cap_on_skipping(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"img3\.png .*zero bytes"):
        image_set({3}).in_memory()
    with pytest.raises(DataError, match=r"img3\.png"):
        image_set({3}).require(torch.tensor([3]))
    for form in ("in_memory", "cached", "scan"):
        with pytest.raises(DataError, match="2 of 10 images cannot be read"):
            getattr(image_set({3, 4}, on_bad="skip", max_bad=0.1), form)()
    image_set({3, 4}, on_bad="skip", max_bad=0.2).cached()
    with pytest.raises(DataError, match="2 of 10 images cannot be read"):
        image_set({3, 4}, on_bad="skip", max_bad=0.1).cached()


def test_bad_file_in_a_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                (tmp_path / part / name / f"{i}.jpg").write_bytes(encode(Image.fromarray(noise()), "JPEG"))
    bad = tmp_path / "train" / "dog" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(DataError, match=r"dog/1\.jpg"):
        load_data(DataSpec(name="folder", path=str(tmp_path)))
    lazy = load_data(DataSpec(name="folder", path=str(tmp_path), in_memory=False, on_bad="skip", max_bad=0.5))
    assert list(lazy.train.unreadable) == [4]
