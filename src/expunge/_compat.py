"""Let a CUDA-built torchvision import beside a CPU-only torch.

The registry's Linux torchvision links CUDA. Beside a CPU torch its compiled operators cannot load, and torchvision
then fails while registering fake kernels for operators that do not exist. The import hook below declares the missing
operator schemas and imports again, and only if that very failure happens: with a healthy or absent torchvision it
does nothing, and torch itself is not imported here.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_MISSING_OP = re.compile(r"operator torchvision::(\w+) does not exist")
_MAX_ROUNDS = 16
declared: list[Any] = []  # torch.library handles; they must outlive the import


class _TolerantLoader(importlib.abc.Loader):
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        for _ in range(_MAX_ROUNDS):
            try:
                self._inner.exec_module(module)
                return
            except RuntimeError as error:
                missing = _MISSING_OP.search(str(error))
                if missing is None:
                    raise
            for name in [n for n in sys.modules if n.startswith("torchvision.")]:
                del sys.modules[name]
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing.group(1)}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            declared.append(library)
        raise ImportError("torchvision does not import beside this torch; install matching builds of both")


class _TorchvisionFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _TolerantLoader(spec.loader)
        return spec


def install() -> None:
    """Put the hook in place; harmless when called twice or after torchvision was imported."""
    if "torchvision" in sys.modules or any(isinstance(f, _TorchvisionFinder) for f in sys.meta_path):
        return
    sys.meta_path.insert(0, _TorchvisionFinder())
