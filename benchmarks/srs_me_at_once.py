"""SRS-ME of several concepts: a step at once against steps one after the other, and what autograd keeps.

    OMP_NUM_THREADS=1 python benchmarks/srs_me_at_once.py [--steps N] [--repeat R] [--batch B] [--json FILE]

The bundled canvas pipeline through the one loop, prompts alone. Both ways take the very same steps (``weights =
'equal'``), one repetition after the other in one process; only the loop's steps are timed (CPU seconds, one thread),
and the first of each run is left out. "Kept" is the largest sum of bytes that autograd holds for backward passes,
storages counted once, without the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from expunge.config import RunConfig, Source, parse_config
from expunge.diffusion.concepts import erase_concepts
from expunge.experiment import make_task
from expunge.loop import Loop
from expunge.tasks.text_to_image import TextToImageTask

CONCEPTS = ("a ring", "a star", "a moon")


class Meter:
    """CPU seconds of the loop's steps, and bytes that autograd keeps, while it is entered."""

    def __init__(self) -> None:
        self.weights: set[int] = set()
        self.seconds: list[float] = []
        self.kept, self.live = 0, dict[int, int]()

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.live[storage.data_ptr()] = storage.nbytes()
            self.kept = max(self.kept, sum(self.live.values()))
        return tensor

    def run(self, task: TextToImageTask, settings: dict[str, Any], concepts: tuple[str, ...], count: bool) -> None:
        take, backward = Loop._take, torch.Tensor.backward

        def timed(loop: Loop, step: Any) -> Any:
            self.weights = {p.untyped_storage().data_ptr() for p in task.model.parameters()}  # of this run
            self.live.clear()
            start = time.process_time()
            found = take(loop, step)
            if loop.at.step:
                self.seconds.append(time.process_time() - start)
            return found

        def done(tensor: torch.Tensor, *args: Any, **options: Any) -> None:
            backward(tensor, *args, **options)
            self.live.clear()

        Loop._take = timed  # type: ignore[method-assign]
        torch.Tensor.backward = done  # type: ignore[assignment]
        try:
            if count:
                with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t):
                    erase_concepts(task, concepts, **settings)
            else:
                erase_concepts(task, concepts, **settings)
        finally:
            Loop._take, torch.Tensor.backward = take, backward  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = {
        "method": "srs_me",
        "images": "concept",
        "protect_others": False,
        "beta": 0.05,
        "threshold": None,
        "batch_size": args.batch,
        "optim": {"max_steps": args.steps, "epochs": 100},
    }
    body = {
        "name": "benchmark",
        "task": {"family": "text_to_image", "model": {"name": "canvas"}, "axis": "kind", "classes": ["x", "y"]},
        "request": {"concept": CONCEPTS[0]},
        "recipe": recipe,
    }
    config = parse_config(RunConfig, Source(body, "benchmark"))
    task, own = make_task(config.task), config.build_recipe()
    assert isinstance(task, TextToImageTask)
    assert own.objective is not None
    own = own.replace(objective={**own.objective.describe(), "sampling_steps": 2, "drawn": args.batch})
    results: dict[str, Any] = {}
    for n in (1, 2, 3):
        settings = {"recipe": own, "weights": "equal"}
        meters = {way: Meter() for way in ("separate", "at once")}
        ratios = []
        for number in range(args.repeat + 1):
            for way, meter in meters.items():
                meter.seconds.clear()
                meter.run(task, {**settings, "at_once": way == "at once"}, CONCEPTS[:n], count=number == 0)
            if number:
                steps = args.steps - 1
                ratios.append(sum(meters["at once"].seconds) / sum(meters["separate"].seconds))
                each = {w: sum(m.seconds) / steps for w, m in meters.items()}
        kept = {w: m.kept for w, m in meters.items()}
        results[str(n)] = {"ratio": statistics.median(ratios), "kept": kept, "seconds": each}
        print(
            f"{n} concepts: a step at once takes {statistics.median(ratios):.3f} of {n} separate steps "
            f"({each['at once']:.2f} s, {each['separate']:.2f} s); kept {kept['at once'] / 1e6:.2f} MB, "
            f"{kept['separate'] / 1e6:.2f} MB separately"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
