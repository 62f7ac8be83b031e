"""Golden files of SCAR: rebuild their networks, data and steps, and compare under each file's own tolerance."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from expunge.data.base import MemoryImages, Splits
from expunge.request import ForgetRequest
from expunge.schedule import FORWARD_ONLY, Replay
from expunge.tasks.classifier import ClassifierTask

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("EXPUNGE_SHARED", ROOT.parent / "shared")) / "parity" / "scar"
FOLDER = SHARED if SHARED.is_dir() else Path(__file__).parent / "data" / "scar"
DTYPES = {"float64": torch.float64, "float32": torch.float32}
ROLES = ("forget", "retain", "surrogate")


def paths(*methods: str) -> list[Path]:
    found = [p for p in sorted(FOLDER.glob("*.json")) if json.loads(p.read_text())["method"] in methods]
    assert found, f"no golden files for {methods} in {FOLDER}"
    return found


def cases(*methods: str) -> list:
    """One parameter per file."""
    return [pytest.param(p, id=p.stem) for p in paths(*methods)]


def runs(*methods: str) -> list:
    """One parameter per file and precision, also where single precision is comparable at step 0 only."""
    found = []
    for p in paths(*methods):
        tolerance = json.loads(p.read_text())["tolerance"]
        for dt in DTYPES:
            if tolerance.get(dt) or (dt == "float32" and tolerance.get("float32_step0")):
                found.append(pytest.param(p, dt, id=f"{p.stem}-{dt}"))
    return found


class Images(MemoryImages):
    """Inputs of any range, as the files have them; vectors arrive as ``[B, 1, 1, d]``."""

    def __init__(self, x: Tensor, labels: Tensor, n_classes: int) -> None:
        x = x if x.ndim == 4 else x[:, None, None, :]
        super().__init__(torch.zeros_like(x), labels.long(), [str(c) for c in range(n_classes)])
        self.x = x.contiguous()


class Net(nn.Module):
    """``body`` up to the features, then the linear layer ``fc``."""

    def __init__(self, meta: dict[str, Any]) -> None:
        super().__init__()
        layers: list[nn.Module] = [] if len(meta["input_shape"]) == 3 else [nn.Flatten()]
        body = nn.Module()
        for layer in meta["features"]:
            op, made = layer["op"], None
            if op == "linear":
                made = nn.Linear(layer["in"], layer["out"])
            elif op == "conv2d":
                made = nn.Conv2d(
                    layer["in"], layer["out"], layer["kernel"], layer["stride"], layer["padding"], bias=False
                )
            elif op == "batchnorm2d":
                made = nn.BatchNorm2d(layer["channels"], eps=layer["eps"], momentum=layer["momentum"])
            if made is not None:
                name = layer.get("prefix") or layer["weight"].removesuffix(".weight")
                body.add_module(name.removeprefix("body."), made)
                layers.append(made)
            else:
                layers.append({"relu": nn.ReLU, "flatten": nn.Flatten, "global_avgpool": _Pool}[op]())
        self.body = body
        self.steps: list[Callable[[Tensor], Tensor]] = list(layers)
        self.fc = nn.Linear(meta["head"]["in"], meta["head"]["out"])

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return self.fc(x)


class _Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class Case:
    """One golden file pair, compared in one precision."""

    def __init__(self, path: Path, dt: str = "float64") -> None:
        self.meta = json.loads(path.read_text())
        self.tensors = load_file(path.with_suffix(".safetensors"))
        self.hyper, self.replay = self.meta["hyper"], self.meta["replay"]
        self.semantics: dict[str, Any] = self.hyper.get("semantics", {})
        self.variant = self.meta["variant"]
        self.dt, self.dtype = dt, DTYPES[dt]
        self.checked: set[str] = set()

    def input(self, name: str) -> Tensor:
        """An input, floating point ones in this precision."""
        value = self.tensors[f"input.{name}"]
        return value.to(self.dtype) if value.is_floating_point() else value

    # -- network and data ------------------------------------------------------------------------------------------

    def model(self) -> Net:
        net = Net(self.meta["model"])
        net.load_state_dict({n[5:]: t for n, t in self.tensors.items() if n.startswith("init.")})
        return net.to(self.dtype)

    def batches(self, role: str) -> list[tuple[Tensor, Tensor]]:
        """Inputs and labels of every recorded batch of a role (labels of surrogates are 0)."""
        found = []
        for names in self.replay["batches"].get(role, []):
            x = self.tensors[names[0]]
            found.append((x, self.tensors[names[1]] if len(names) > 1 else torch.zeros(len(x), dtype=torch.int64)))
        return found

    @property
    def removed(self) -> list[int]:
        return list(self.hyper.get("removed_classes", []))

    def request(self) -> ForgetRequest:
        """The class that leaves, or the recorded forget samples."""
        if self.removed:
            return ForgetRequest.label(*self.removed)
        return ForgetRequest.samples(range(sum(len(x) for x, _ in self.batches("forget"))))

    def task(self, kind: type[ClassifierTask] = ClassifierTask) -> ClassifierTask:
        """The network with all recorded samples: forget batches first, then retain batches, in order."""
        n = self.hyper["num_classes"]
        forget, retain, surrogate = (self.batches(r) for r in ROLES)
        if not retain:  # such a method never looks at the other set, but there has to be one
            other = next(c for c in range(n) if c not in self.removed)
            retain = [(torch.zeros_like(forget[0][0][:1]), torch.tensor([other]))]
        parts = forget + retain
        train = Images(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]), n)
        extra = None
        if surrogate:
            extra = Images(torch.cat([x for x, _ in surrogate]), torch.cat([y for _, y in surrogate]), n)
        return kind(self.model(), Splits("golden", train, train), surrogate=extra)

    def positions(self, role: str) -> list[tuple[int, ...]]:
        """Positions of every batch within its role."""
        found, start = [], 0
        for x, _ in self.batches(role):
            found.append(tuple(range(start, start + len(x))))
            start += len(x)
        return found

    def schedule(self) -> Replay:
        """The recorded steps; pairs that were forwarded and thrown away follow the step they come after."""
        where = {r: self.positions(r) for r in ROLES}
        if "steps" not in self.replay:
            role = next(r for r in ("surrogate", "forget", "retain") if self._leads(r))
            one = tuple({role: ids} for ids in where[role])
            return Replay(epochs=tuple(one for _ in range(self.hyper["epochs"])))
        epochs: dict[int, list[dict[str, tuple[int, ...]]]] = {}
        for step in self.replay["steps"]:
            rows = epochs.setdefault(step["epoch"], [])
            rows.append({r: where[r][step[r]] for r in ROLES if r in step})
            for idle in self.replay.get("forward_only", []):
                if idle["after_step"] == step["step"]:
                    rows.append({**{r: where[r][idle[r]] for r in ROLES if r in idle}, FORWARD_ONLY: ()})
        return Replay(epochs=tuple(tuple(e) for _, e in sorted(epochs.items())))

    def _leads(self, role: str) -> bool:
        wanted = {"SCAR_self": "surrogate", "FineTuning": "retain"}.get(self.meta["method"], "forget")
        return role == wanted

    # -- comparison ------------------------------------------------------------------------------------------------

    def limit(self, name: str) -> float:
        """Tolerance of a tensor in this precision."""
        group = self.meta["tolerance"][self.dt] or self.meta["tolerance"][f"{self.dt}_step0"]
        if "grad" in name:
            return float(group["gradients"])
        return float(group["weights" if ".after." in name or ".final." in name else "values"])

    def close(self, got: Tensor, name: str) -> None:
        """Compare with ``expected.NAME`` by the rule of the files."""
        full = f"expected.{name}"
        want = self.tensors[full]
        self.checked.add(full)
        got = got.detach()
        assert got.shape == want.shape, f"{full}: shape {list(got.shape)}, expected {list(want.shape)}"
        if not want.is_floating_point():
            assert torch.equal(got.to(want.dtype), want), f"{full}: {got.tolist()} expected {want.tolist()}"
            return
        got, want = got.double(), want.double()
        odd = ~torch.isfinite(want)
        assert torch.equal(torch.nan_to_num(got[odd], nan=7.5), torch.nan_to_num(want[odd], nan=7.5)), full
        got, want = got[~odd], want[~odd]
        if not len(want.flatten()):
            return
        scale = max(float(want.abs().max()), 1e-6)
        if ".after." in full or ".final." in full:
            start = self.tensors["init." + name.split(".after.")[-1].split("final.")[-1]].double()
            scale = max(float((want - start[~odd]).abs().max()), 1e-4)
        elif ".grad." in full:
            step = full.split(".grad.")[0]
            others = [t for n, t in self.tensors.items() if n.startswith(f"{step}.grad.")]
            scale = max(scale, 1e-3 * max(float(t.abs().max()) for t in others))
        off = float((got - want).abs().max())
        limit = self.limit(full) * scale
        assert off <= limit, f"{full}: off by {off:.2e}, allowed {limit:.2e}"

    def names(self, prefix: str = "") -> list[str]:
        """Expected tensors, without ``expected.``."""
        return [n[9:] for n in self.tensors if n.startswith(f"expected.{prefix}")]

    def finish(self, *skip: str) -> None:
        """Every expected tensor was compared, but those whose name holds one of ``skip``.

        Where single precision is comparable at step 0 only, nothing later is asked for.
        """
        early = self.meta["tolerance"].get(self.dt) is None
        missing = [
            n
            for n in self.tensors
            if n.startswith("expected.")
            and n not in self.checked
            and not any(s in n for s in skip)
            and not (early and not n.startswith("expected.step0."))
            and not (early and ".after." in n)
        ]
        assert not missing, f"not compared: {missing[:8]} ({len(missing)} in all)"
