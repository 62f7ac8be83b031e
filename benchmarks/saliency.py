"""Cost of a saliency mask: set-up against one plain pass over the same forget set, and its size on disk.

    OMP_NUM_THREADS=1 python benchmarks/saliency.py [--repeats N] [--forget N] [--json FILE] [model ...]

Set-up is everything that opening the space does: digests, gradient pass, selection, copies of the base weights. The
plain pass is forward and backward over the same batches, nothing else. One thread, CPU seconds, alternating runs: the
median ratio over pairs, and the ratio of the fastest runs (other load only ever adds time). The fixed part (selection
and digests) shrinks beside the pass as the forget set grows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from expunge.context import Context
from expunge.data.base import MemoryImages, Splits
from expunge.models import ModelSpec, build_model
from expunge.request import ForgetRequest
from expunge.restore import as_found
from expunge.spaces.saliency import SaliencyMask
from expunge.tasks.classifier import ClassifierTask

LIMIT = 1.1


def make_context(name: str, n: int) -> Context:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n + 10, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images = MemoryImages(x, torch.arange(n + 10) % 10, [str(c) for c in range(10)])
    task = ClassifierTask(build_model(ModelSpec(name=name)).eval(), Splits("synthetic", images, images))
    return Context(task, task.split(ForgetRequest.samples(range(n))))


def plain(ctx: Context, batch_size: int) -> float:
    with as_found(ctx.model):
        ctx.model.eval()
        start = time.process_time()
        for batch in ctx.batches("forget", batch_size):
            ctx.task.loss(batch).sum().backward()
        return time.process_time() - start


def mask(ctx: Context, batch_size: int) -> tuple[float, int, int]:
    with as_found(ctx.model):
        start = time.process_time()
        opened = SaliencyMask(batch_size=batch_size).open(ctx)
        seconds = time.process_time() - start
        selection = opened.selection  # type: ignore[attr-defined]
        with tempfile.TemporaryDirectory() as folder:
            selection.save(Path(folder) / "mask.safetensors")
            return seconds, (Path(folder) / "mask.safetensors").stat().st_size, selection.numel


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet20", "resnet18_cifar"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--forget", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, bad = [], []
    for name in args.models:
        ctx = make_context(name, args.forget)
        plain(make_context(name, 32), 32)  # libraries initialise themselves
        pairs = []
        for number in range(args.repeats):
            if number % 2:
                pairs.append((plain(ctx, args.batch_size), *mask(ctx, args.batch_size)))
            else:
                setup, size, numel = mask(ctx, args.batch_size)
                pairs.append((plain(ctx, args.batch_size), setup, size, numel))
        ratio = statistics.median(m / p for p, m, _, _ in pairs)
        fastest = min(m for _, m, *_ in pairs) / min(p for p, *_ in pairs)
        size, numel = pairs[0][2:]
        allowed = numel / 8 + 4096
        rows.append({
            "model": name, "ratio": ratio, "fastest": fastest, "pass_s": statistics.median(p for p, *_ in pairs),
            "setup_s": statistics.median(m for _, m, *_ in pairs), "bytes": size, "allowed": allowed, "weights": numel,
        })  # fmt: skip
        print(
            f"{name:15} {numel:,} weights, {args.forget} samples: pass {rows[-1]['pass_s']:.2f} s, set-up "
            f"{rows[-1]['setup_s']:.2f} s, ratio {ratio:.3f} (fastest runs {fastest:.3f}); "
            f"file {size:,} bytes (limit {allowed:,.0f})",
            flush=True,
        )
        bad += [name] if ratio > LIMIT or size > allowed else []
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    print(f"limits {LIMIT} and N/8 + 4 kB: " + ("missed for " + ", ".join(bad) if bad else "met"))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
