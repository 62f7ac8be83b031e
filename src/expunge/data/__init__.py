"""Image data: bundled, downloaded, folders, Parquet and Hugging Face sets behind one interface."""

from __future__ import annotations

from expunge.data.augment import AUGMENT, Augment, crop_flip
from expunge.data.base import ImageSet, MemoryImages, Splits
from expunge.data.load import load_data
from expunge.data.spec import DataSpec

__all__ = ["AUGMENT", "Augment", "DataSpec", "ImageSet", "MemoryImages", "Splits", "crop_flip", "load_data"]
