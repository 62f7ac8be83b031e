"""Expunge: make trained models forget, with a patch, the evidence and exact undo.

>>> import expunge
>>> request = expunge.ForgetRequest.label(0)
>>> request.title
'class 0'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from expunge import _compat

_compat.install()

__version__ = "0.1.0"

#: Public names and where they live; loaded on first use so that the import stays light.
_PUBLIC = {
    "ClassifierTask": "expunge.tasks.classifier",
    "ClipSpec": "expunge.models.clip",
    "ClipTask": "expunge.tasks.clip",
    "DataSpec": "expunge.data",
    "ForgetRequest": "expunge.request",
    "Manifest": "expunge.patch",
    "ModelSpec": "expunge.models",
    "Normalize": "expunge.models.normalize",
    "Optim": "expunge.recipe",
    "Patch": "expunge.patch",
    "Recipe": "expunge.recipe",
    "Report": "expunge.report.model",
    "apply": "expunge.patch",
    "build_model": "expunge.models",
    "build_recipe": "expunge.method",
    "evaluate": "expunge.evaluation",
    "fit": "expunge.train",
    "load_clip": "expunge.models.clip",
    "load_data": "expunge.data",
    "revert": "expunge.patch",
    "stack": "expunge.patch",
    "unlearn": "expunge.run",
}

__all__ = [
    "ClassifierTask",
    "ClipSpec",
    "ClipTask",
    "DataSpec",
    "ForgetRequest",
    "Manifest",
    "ModelSpec",
    "Normalize",
    "Optim",
    "Patch",
    "Recipe",
    "Report",
    "__version__",
    "apply",
    "build_model",
    "build_recipe",
    "evaluate",
    "fit",
    "load_clip",
    "load_data",
    "revert",
    "stack",
    "unlearn",
]

if TYPE_CHECKING:
    from expunge.data import DataSpec, load_data
    from expunge.evaluation import evaluate
    from expunge.method import build_recipe
    from expunge.models import ModelSpec, build_model
    from expunge.models.clip import ClipSpec, load_clip
    from expunge.models.normalize import Normalize
    from expunge.patch import Manifest, Patch, revert, stack
    from expunge.patch.apply import apply
    from expunge.recipe import Optim, Recipe
    from expunge.report.model import Report
    from expunge.request import ForgetRequest
    from expunge.run import unlearn
    from expunge.tasks.classifier import ClassifierTask
    from expunge.tasks.clip import ClipTask
    from expunge.train import fit


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    from expunge.errors import did_you_mean

    raise AttributeError(f"module 'expunge' has no attribute {name!r}{did_you_mean(name, _PUBLIC)}")


def __dir__() -> list[str]:
    return sorted(__all__)
