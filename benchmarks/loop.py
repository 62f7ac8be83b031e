"""Overhead of the training loop over a bare PyTorch loop that does the same passes on the same data.

    OMP_NUM_THREADS=1 python benchmarks/loop.py [--pairs N] [--json FILE]

ResNet-20, 32 x 32 images, batches of 64, one thread, CPU seconds (not wall time, so a busy machine disturbs it less).
Both sides take the steps of the same schedule: load, relabel, forward, backward, SGD with momentum and decay. Runs
alternate; the figure is the median over pairs of (library time per step) / (bare time per step), warm-up step left out.
The masked run has to pay for the projection of gradients, weights and momentum as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn import functional

from expunge import rng
from expunge.data.base import MemoryImages, Splits
from expunge.method import build_recipe
from expunge.models import ModelSpec, build_model
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.restore import as_found, freeze_norm_statistics
from expunge.run import unlearn
from expunge.tasks.classifier import ClassifierTask

LIMIT = 1.05
BATCH, FORGET, RETAIN = 64, 256, 512


def make_task() -> ClassifierTask:
    generator = torch.Generator().manual_seed(0)
    n = FORGET + RETAIN
    x = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images = MemoryImages(x, torch.arange(n) % 10, [str(c) for c in range(10)])
    return ClassifierTask(build_model(ModelSpec(name="resnet20")).eval(), Splits("synthetic", images, images))


def recipe(name: str, **settings: object) -> Recipe:
    return build_recipe({"method": name, "batch_size": BATCH, "optim": {"epochs": 1, "augment": False}, **settings})


def library(task: ClassifierTask, request: ForgetRequest, how: Recipe) -> tuple[float, float]:
    """CPU seconds per step after the first one, and of the whole run."""
    stamps: list[float] = []
    start = time.process_time()
    unlearn(task, request, how, on_step=lambda *_: stamps.append(time.process_time()))
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1), time.process_time() - start


def bare(task: ClassifierTask, request: ForgetRequest, how: Recipe) -> tuple[float, float]:
    """The same steps, written out."""
    assert how.objective is not None
    model, data, optim = task.model, task.data.train, how.optim
    split = task.split(request)
    with as_found(model):
        model.train()
        freeze_norm_statistics(model)
        stamps: list[float] = []
        start = time.process_time()
        optimizer = torch.optim.SGD(
            model.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
        )
        for step in how.objective.schedule.steps({r: len(split[r]) for r in ("forget", "retain")}, 0, 0):
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
            stamps.append(time.process_time())
        return (stamps[-1] - stamps[0]) / (len(stamps) - 1), time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng.seed_everything(0)
    task, request = make_task(), ForgetRequest.samples(range(FORGET))
    cases = {"plain": recipe("random_label"), "masked": recipe("salun"), "same twice": recipe("random_label")}
    rows = []
    for name, how in cases.items():
        ratios, ours, theirs, whole = [], [], [], []
        run = bare if name == "same twice" else library
        for number in range(args.pairs + 1):
            order = (run, bare) if number % 2 else (bare, run)
            first, second = (side(task, request, how) for side in order)
            mine, other = (first, second) if number % 2 else (second, first)
            if number:  # the first pair warms up
                ratios.append(mine[0] / other[0])
                ours.append(mine[0])
                theirs.append(other[0])
                whole.append(mine[1])
        row = {
            "case": name,
            "ratio": statistics.median(ratios),
            "low": sorted(ratios)[len(ratios) // 4],
            "high": sorted(ratios)[-1 - len(ratios) // 4],
            "step_ms": 1e3 * statistics.median(ours),
            "bare_ms": 1e3 * statistics.median(theirs),
            "run_s": statistics.median(whole),
        }
        rows.append(row)
        print(
            f"{name:10} ratio {row['ratio']:.3f} (quartiles {row['low']:.3f} to {row['high']:.3f})  "
            f"step {row['step_ms']:.1f} ms, bare {row['bare_ms']:.1f} ms; whole run {row['run_s']:.2f} s",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    bad = [r["case"] for r in rows if r["ratio"] > LIMIT]
    print(f"limit {LIMIT}: " + ("missed in " + ", ".join(bad) if bad else "met"))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
