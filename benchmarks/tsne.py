"""Joint t-SNE of several models: 5,000 embeddings of 64 numbers in two dimensions.

Wall-clock time; run ``OMP_NUM_THREADS=2 python benchmarks/tsne.py [--samples N] [--models M] [--engine opentsne]``.
The target is one minute on two cores.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from expunge.analysis import Embedding, tsne


def model(name: str, samples: int, dims: int, classes: int) -> Embedding:
    """Class clouds around random centres, a little different in every model."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, dims, generator=generator)
    labels = torch.arange(samples) % classes
    noise = torch.Generator().manual_seed(sum(name.encode()))
    return Embedding(
        name=name,
        features=(centres[labels] + 0.7 * torch.randn(samples, dims, generator=noise)).relu(),
        labels=labels,
        ids=torch.arange(samples),
        forget=labels == 0,
        prototypes=centres,
        classes=tuple(str(c) for c in range(classes)),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=5000, help="of all models together")
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--dims", type=int, default=64)
    parser.add_argument("--engine", default="sklearn")
    args = parser.parse_args()
    models = [model(f"m{k}", args.samples // args.models, args.dims, 10) for k in range(args.models)]
    tsne([model("warm", 60, 4, 2)], perplexity=5, engine=args.engine, iterations=250)
    start, used = time.perf_counter(), time.process_time()
    tsne(models, engine=args.engine)
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    print(f"{args.engine}, {args.samples} x {args.dims}, {args.models} models: {seconds:.1f} s (CPU {cpu:.1f} s)")
    print("target (60 s): " + ("met" if seconds < 60 else "missed"))
    return int(seconds >= 60)


if __name__ == "__main__":
    sys.exit(main())
