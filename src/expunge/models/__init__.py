"""Networks, their weights and their input normalisation."""

from __future__ import annotations

from expunge.models.build import MODEL_NAMES, ModelSpec, build_model
from expunge.models.normalize import MEAN_STD, Normalize
from expunge.models.weights import LoadReport, convert_pickle, load_weights, save_weights

__all__ = [
    "MEAN_STD",
    "MODEL_NAMES",
    "LoadReport",
    "ModelSpec",
    "Normalize",
    "build_model",
    "convert_pickle",
    "load_weights",
    "save_weights",
]
