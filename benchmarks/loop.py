"""Overhead of the training loop over a bare PyTorch loop that does the same passes on the same data.

    OMP_NUM_THREADS=1 python benchmarks/loop.py [--steps N] [--json FILE]

ResNet-20, 32 x 32 images, batches of 64, one thread, CPU seconds (not wall time, so a busy machine disturbs it less).
Both sides load, relabel, forward, backward, take an SGD step with momentum and decay and read the loss. Every step of
the library is followed by a bare one on a copy of the network, so both meet the same load of the machine; the figure is
the median over pairs of (library step) / (bare step). The masked run has to pay for the projection of gradients,
weights and momentum as well. The last case pairs bare steps with bare steps: how far it is from 1 is the error.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn import functional

from expunge.data.base import MemoryImages, Splits
from expunge.method import build_recipe
from expunge.models import ModelSpec, build_model
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.restore import freeze_norm_statistics
from expunge.run import unlearn
from expunge.tasks.classifier import ClassifierTask

LIMIT = 1.05
BATCH, FORGET, WARM_UP = 64, 256, 3


def make_task(steps: int) -> ClassifierTask:
    generator = torch.Generator().manual_seed(0)
    n = BATCH * (steps + WARM_UP)
    x = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images = MemoryImages(x, torch.arange(n) % 10, [str(c) for c in range(10)])
    return ClassifierTask(build_model(ModelSpec(name="resnet20")).eval(), Splits("synthetic", images, images))


def recipe(name: str) -> Recipe:
    # untrained weights and frozen statistics: at a usual rate the loss would overflow, and NaN is slow
    return build_recipe({"method": name, "batch_size": BATCH, "optim": {"lr": 1e-6, "epochs": 1, "augment": False}})


def bare(task: ClassifierTask, request: ForgetRequest, how: Recipe) -> Iterator[float]:
    """The same steps on a copy of the network, written out; yields the CPU seconds of each."""
    assert how.objective is not None
    model, data, optim = copy.deepcopy(task.model), task.data.train, how.optim
    split = task.split(request)
    model.train()
    freeze_norm_statistics(model)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
    )
    for step in how.objective.schedule.steps({r: len(split[r]) for r in ("forget", "retain")}, 0, 0):
        start = time.process_time()
        for role, positions in step.items():
            ids = split[role][positions]
            x, y = data.images(ids), data.labels[ids]
            if role == "forget":
                y = torch.randint(0, 10, y.shape)
            optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            loss.item()
        yield time.process_time() - start


def library(task: ClassifierTask, request: ForgetRequest, how: Recipe) -> list[tuple[float, float]]:
    """CPU seconds of every library step and of the bare step after it."""
    pairs: list[tuple[float, float]] = []
    other, mark = bare(task, request, how), time.process_time()

    def on_step(*_: object) -> None:
        nonlocal mark
        ours = time.process_time() - mark
        pairs.append((ours, next(other)))
        mark = time.process_time()

    unlearn(task, request, how, on_step=on_step)
    return pairs


def control(task: ClassifierTask, request: ForgetRequest, how: Recipe) -> list[tuple[float, float]]:
    """Bare steps against bare steps."""
    return list(zip(bare(task, request, how), bare(task, request, how), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    task, request = make_task(args.steps), ForgetRequest.samples(range(FORGET))
    cases = {"plain": (library, "random_label"), "masked": (library, "salun"), "bare": (control, "random_label")}
    rows = []
    for name, (side, method) in cases.items():
        pairs = side(task, request, recipe(method))[WARM_UP:]
        ratios = sorted(a / b for a, b in pairs)
        row = {
            "case": name,
            "ratio": statistics.median(ratios),
            "low": ratios[len(ratios) // 4],
            "high": ratios[-1 - len(ratios) // 4],
            "step_ms": 1e3 * statistics.median(a for a, _ in pairs),
            "bare_ms": 1e3 * statistics.median(b for _, b in pairs),
        }
        rows.append(row)
        print(
            f"{name:7} ratio {row['ratio']:.3f} (quartiles {row['low']:.3f} to {row['high']:.3f}, {len(pairs)} pairs)  "
            f"step {row['step_ms']:.1f} ms, bare {row['bare_ms']:.1f} ms",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    bad = [str(r["case"]) for r in rows if float(r["ratio"]) > LIMIT]
    print(f"limit {LIMIT}: " + ("missed in " + ", ".join(bad) if bad else "met"))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
