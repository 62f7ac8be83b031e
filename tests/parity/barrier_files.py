"""Golden files of BARRIER: locate them, rebuild their models, compare under their own tolerances."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("EXPUNGE_SHARED", ROOT.parent / "shared")) / "parity" / "barrier"
FOLDER = SHARED if SHARED.is_dir() else Path(__file__).parent / "data" / "barrier"


def cases(pattern: str, variant: str = "*") -> list:
    found = sorted(FOLDER.glob(f"{pattern}__{variant}.json"))
    if not found and FOLDER != SHARED:
        return [pytest.param(None, id=pattern, marks=pytest.mark.skip(reason="only in the shared folder"))]
    assert found, f"no golden files {pattern}__{variant} in {FOLDER}"
    return [pytest.param(p, id=p.stem) for p in found]


class Graph(nn.Module):
    """A model described by a list of modules and a list of operations."""

    def __init__(self, description: dict) -> None:
        super().__init__()
        self.graph = description["graph"]
        self.inputs = description["inputs"]
        for entry in description["modules"]:
            if not entry["name"]:
                continue
            parent_name, _, leaf = entry["name"].rpartition(".")
            parent = self.get_submodule(parent_name)
            kind = getattr(nn, entry["type"], None)
            if entry["type"] in ("Sequential", "ModuleList") or kind is None:
                kind = kind or type(entry["type"], (nn.Module,), {})
                child = kind()
            else:
                child = kind(**entry["args"])
            parent.add_module(leaf, child)

    def forward(self, *values: Tensor) -> Tensor:
        env = dict(zip(self.inputs, values, strict=True))
        for op in self.graph:
            args = [env[n] for n in op["in"]]
            if op["op"] == "output":
                return args[0]
            env[op["out"]] = getattr(self, f"_{op['op']}")(op, *args)
        raise AssertionError("the graph has no output")

    def _call(self, op: dict, x: Tensor) -> Tensor:
        return self.get_submodule(op["module"])(x)

    def _relu(self, op: dict, x: Tensor) -> Tensor:
        return x.clamp_min(0) if x.dtype == torch.float64 else torch.relu(x)

    def _gap(self, op: dict, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def _add(self, op: dict, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def _mean_tokens(self, op: dict, x: Tensor) -> Tensor:
        return x.mean(1)

    def _cat(self, op: dict, *parts: Tensor) -> Tensor:
        return torch.cat(parts, 1)

    def _attention(self, op: dict, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (op["heads"], -1)).transpose(1, 2)

        q, k, v = split(q), split(k), split(v)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)


class Case:
    """One golden file pair."""

    def __init__(self, path: Path) -> None:
        self.meta = json.loads(path.read_text())
        self.tensors = load_file(path.with_suffix(".safetensors"))
        self.hyper, self.replay = self.meta["hyper"], self.meta["replay"]
        self.checked = 0

    def model(self, dtype: torch.dtype = torch.float64, prefix: str = "init.") -> Graph:
        model = Graph(self.meta["model"])
        types = {"": self.meta["model"]["name"]}
        model.__class__ = type(types[""], (Graph,), {})
        state = {n[len(prefix) :]: t for n, t in self.tensors.items() if n.startswith(prefix)}
        own = model.state_dict()
        assert set(state) <= set(own)
        missing = {n for n in set(own) - set(state) if not n.endswith("num_batches_tracked")}
        assert not missing, missing
        for name, value in state.items():
            own[name].copy_(value)
        return model.to(dtype)

    def batches(self, role: str, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, ...]]:
        names = self.meta["model"]["inputs"]
        return [tuple(self.tensors[b[n]].to(dtype) for n in names) for b in self.replay.get(role, [])]

    def expect(self, name: str, got: Tensor | float, rows: Tensor | None = None) -> None:
        entry, want = self.meta["expected"][name], self.tensors[name]
        got = (torch.tensor(got, dtype=torch.float64) if isinstance(got, float) else got).detach()
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        if rows is not None:
            got, want = got[rows], want[rows]
        self.checked += 1
        if not want.numel():
            return
        rtol = self.meta["tolerance"]["rtol"][entry["group"]]
        got, want = got.double(), want.double()
        finite = torch.isfinite(want)
        assert torch.equal(finite, torch.isfinite(got)), name
        limit = entry.get("atol", 0.0) + rtol * float(want[finite].abs().max()) if finite.any() else 0.0
        worst = float((got - want)[finite].abs().max()) if finite.any() else 0.0
        assert worst <= limit, f"{name}: off by {worst:.3e}, allowed {limit:.3e}"

    def has(self, name: str) -> bool:
        return name in self.tensors

    def finish(self, skipped: tuple[str, ...] = ()) -> None:
        """Every expected tensor was compared, apart from those named."""
        names = [n for n in self.meta["expected"] if not any(s in n for s in skipped)]
        assert self.checked >= len(names), f"compared {self.checked} of {len(names)}"
