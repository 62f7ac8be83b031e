"""Checkpoints: one safetensors file that holds all of a run's state, so that a killed run resumes bit-exactly."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.errors import ArtifactError
from expunge.files import atomic_save_safetensors, read_safetensors

_KEY = "expunge_checkpoint"


@dataclass
class Position:
    """Where a run stands: the next step to take."""

    epoch: int = 0
    index: int = 0
    step: int = 0
    micro_batch: int | None = None
    skipped: int = 0


def save(
    path: Path,
    *,
    position: Position,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Tensor],
    space: Mapping[str, Tensor],
    notes: list[str],
    identity: str,
    scaler: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint atomically; the previous one stays until the new one is complete."""
    tensors = {f"param.{n}": p.detach() for n, p in parameters.items()}
    tensors |= {f"buffer.{n}": b.detach() for n, b in buffers.items()}
    tensors |= {f"state.{n}": t for n, t in state.items()}
    tensors |= {f"space.{n}": t for n, t in space.items()}
    scalars: dict[str, float | int] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optim.{key}.{name}"] = value.detach()
            elif value is not None:
                scalars[f"{key}.{name}"] = value
    tensors["rng.torch"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors |= {f"rng.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    np_state = np.random.get_state(legacy=False)
    header = {
        "position": vars(position),
        "scalars": scalars,
        "state": list(state),
        "python_rng": _python_state(),
        "numpy_rng": json.loads(json.dumps(np_state, default=lambda a: np.asarray(a).tolist())),
        "notes": notes,
        "identity": identity,
        "scaler": scaler,
    }
    atomic_save_safetensors(path, tensors, {_KEY: json.dumps(header)})


@torch.no_grad()
def load(
    path: Path,
    *,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    identity: str,
) -> tuple[Position, dict[str, Tensor], dict[str, Tensor], list[str], dict[str, Any] | None]:
    """Restore a run's state in place.

    Returns:
        Position, objective state, space state, notes and loss-scaler state.

    Raises:
        ArtifactError: Broken file, or the checkpoint of another run.
    """
    tensors, meta = read_safetensors(path, allow_nonfinite=True)
    try:
        header = json.loads(meta[_KEY])
    except (KeyError, json.JSONDecodeError):
        raise ArtifactError(f"{path}: a safetensors file, but not a checkpoint") from None
    if header["identity"] != identity:
        raise ArtifactError(f"{path}: this checkpoint belongs to another run (other settings, data or base model)")
    for kind, targets in (("param", parameters), ("buffer", buffers)):
        for name, target in targets.items():
            target.copy_(tensors[f"{kind}.{name}"])
    for name, parameter in parameters.items():
        own = {k.split(".")[1]: t for k, t in tensors.items() if k.startswith("optim.") and k.split(".", 2)[2] == name}
        numbers = {k.split(".")[0]: v for k, v in header["scalars"].items() if k.split(".", 1)[1] == name}
        if own or numbers:
            moved = {k: t if k == "step" else t.to(parameter.device) for k, t in own.items()}
            optimizer.state[parameter] = {**moved, **numbers}
    torch.set_rng_state(tensors["rng.torch"])
    if torch.cuda.is_initialized():
        torch.cuda.set_rng_state_all([tensors[k] for k in sorted(tensors) if k.startswith("rng.cuda.")])
    version, internal, gauss = header["python_rng"]
    random.setstate((version, tuple(internal), gauss))
    np_state = header["numpy_rng"]
    np_state["state"]["key"] = np.asarray(np_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(np_state)
    pick = {p: {k.removeprefix(p): t for k, t in tensors.items() if k.startswith(p)} for p in ("state.", "space.")}
    return Position(**header["position"]), pick["state."], pick["space."], header["notes"], header["scaler"]


def objective_state(path: Path, identity: str) -> dict[str, Tensor]:
    """The objective's state alone, if the checkpoint is that of this run: what need not be prepared once more.

    Raises:
        ArtifactError: Broken file.
    """
    _, meta = read_safetensors(path, names=())
    try:
        header = json.loads(meta[_KEY])
        names = header["state"] if header["identity"] == identity else []
    except (KeyError, json.JSONDecodeError):
        return {}  # the loop, which restores everything, refuses it and says why
    tensors, _ = read_safetensors(path, names=[f"state.{n}" for n in names], allow_nonfinite=True)
    return {n.removeprefix("state."): t for n, t in tensors.items()}


def _python_state() -> list[Any]:
    version, internal, gauss = random.getstate()
    return [version, list(internal), gauss]
