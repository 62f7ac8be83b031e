"""Time and memory of the text-to-image methods on a pipeline of full size, randomly initialised: nothing to download.

    python benchmarks/full_size.py --device cuda --dtype bfloat16 --steps 10 -o docs/results/sd14_full_size_cuda.json
    OMP_NUM_THREADS=2 python benchmarks/full_size.py --steps 2 --sampling 3 -o docs/results/sd14_full_size_cpu.json
    python benchmarks/full_size.py --tiny --methods srs_me,uce      # seconds: the script itself

The networks have the shapes of Stable Diffusion 1.4, prompts are cut by a tokenizer of the package and filled up to 77
tokens, and images are noise in latent space: what a step costs depends on none of their values. Every method goes
through ``unlearn``, and "plain" is one forward and backward pass of the mean squared error with gradients for all
weights of the U-Net (or for keys and values of cross-attention), without an optimiser.

Each runs in a process of its own, so that its peak is its own. Memory is counted from just before the pipeline was
built: on a GPU what torch allocated there, on the CPU the resident set. Both come with what ``plan`` predicts. Times
are those of whole steps, medians without the first one: wall clock on a GPU, process time on a CPU, which others may
share. With ``--repeat`` each process also times plain passes, for ratios within one process. ``--precision`` is that of
the passes, ``--dtype`` that of the loaded pipeline.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

METHODS = ("srs_me", "cie", "esd", "uce", "ablating_concepts", "forget_me_not", "salun")
PLAIN = ("plain", "plain_kv")
#: Blocks above a megabyte go back to the system when they are freed, so that the resident set tells what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
#: Threads that wait take no process time.
QUIET = {"OMP_WAIT_POLICY": "PASSIVE"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="by default what goes with the dtype")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--methods", default=",".join((*PLAIN, *METHODS)))
    parser.add_argument("--side", type=int, help="latent cells along one side; 64 by default")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sampling", type=int, help="sampling steps of ESD; by default its own 50")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing of the U-Net")
    parser.add_argument("--confined", action="store_true", help="FMN and SalUn on cross-attention, to spare memory")
    parser.add_argument("--repeat", type=int, default=1, help="plain passes that each process times, after one first")
    parser.add_argument("--tiny", action="store_true", help="the tiny pipeline of the tests")
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.precision = args.precision or {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[args.dtype]
    args.side = args.side or (8 if args.tiny else 64)
    unknown = [m for m in args.methods.split(",") if m not in (*PLAIN, *METHODS)]
    if unknown:
        parser.error(f"unknown method {unknown[0]!r}; there are {', '.join((*PLAIN, *METHODS))}")
    return args


def main() -> None:
    args = arguments()
    if args.worker:
        print(json.dumps(Worker(args).measure(args.worker)))
        return
    found = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "settings": {n: v for n, v in vars(args).items() if n not in ("output", "worker", "methods")},
        "runs": {},
    }
    for method in args.methods.split(","):
        hidden = {} if args.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--worker", method],
            env={**MALLOC, **QUIET, **os.environ, **hidden},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        run = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.returncode}
        found |= run.pop("shared", {})
        found["runs"][method] = run
        print(line(method, run), flush=True)
        if args.output:
            args.output.write_text(json.dumps(found, indent=1) + "\n")


def line(method: str, run: dict[str, Any]) -> str:
    if "failed" in run:
        return f"{method:18} failed with exit code {run['failed']}"
    gb = {n: v / 1e9 for n, v in run.items() if isinstance(v, int | float)}
    text = f"{method:18} pipeline {gb['pipeline']:.2f} GB, peak {gb['peak']:.2f}"
    if "predicted" in run:
        text += f" (predicted {gb['predicted']:.2f})"
    if "seconds" in run:
        text += f", step {run['seconds']:.2f} s"
    if "over_plain" in run:
        text += f" = {run['over_plain']:.2f} plain, {run['over_plain_kv']:.2f} plain K and V"
    if "patch_bytes" in run:
        text += (
            f", patch {run['patch_bytes'] / 1e6:.1f} MB of {run['tensors']} tensors, all {run['total_seconds']:.0f} s"
        )
    return text


def typical(stamps: list[float]) -> float:
    """Median time between two."""
    return statistics.median(b - a for a, b in itertools.pairwise(stamps))


class Memory:
    """What is in use beyond what was there at first, and the most since the last reset."""

    def __init__(self, device: str) -> None:
        self.device, self.first = device, 0
        self.first = self.now()

    def now(self) -> int:
        import torch

        if self.device == "cuda":
            return torch.cuda.memory_allocated() - self.first
        return _status("VmRSS") - self.first

    def reset(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif (clear := Path("/proc/self/clear_refs")).exists():
            clear.write_text("5")

    def peak(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated() - self.first if self.device == "cuda" else self.host_peak()

    def host_peak(self) -> int:
        most = _status("VmHWM") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most - (self.first if self.device == "cpu" else 0)


def _status(key: str) -> int:
    file = Path("/proc/self/status")
    rows = file.read_text().splitlines() if file.exists() else []
    return next((1024 * int(r.split()[1]) for r in rows if r.startswith(f"{key}:")), 0)


class Worker:
    """One method in a process of its own."""

    def __init__(self, args: argparse.Namespace) -> None:
        import diffusers
        import torch
        import transformers

        self.args = args
        warm_up(args.device)
        self.memory = Memory(args.device)
        self.host = Memory("cpu")
        self.shape, self.task = build(args)
        parts = [self.task.parts.unet, self.task.parts.text_encoder, self.task.parts.vae]
        self.pipeline = sum(p.nbytes for part in parts for p in part.parameters())
        name = torch.cuda.get_device_name() if args.device == "cuda" else None
        self.shared = {
            "gpu": name,
            "threads": torch.get_num_threads(),
            "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers)},
            "weights": [sum(p.numel() for p in part.parameters()) for part in parts],
        }

    def measure(self, method: str) -> dict[str, Any]:
        self.memory.reset()
        self.host.reset()
        run = {"pipeline": self.pipeline} | (self.plain(method) if method in PLAIN else self.unlearn(method))
        return run | {"host_peak": self.host.host_peak(), "shared": self.shared} if "host_peak" not in run else run

    def plain(self, which: str) -> dict[str, Any]:
        self.task.model.to(self.args.device)
        seconds = self.passes(which)
        return {"seconds": seconds, "peak": self.memory.peak()}

    def passes(self, which: str) -> float:
        """Median seconds of a plain forward and backward pass, after one to warm up."""
        import torch

        from expunge.diffusion.selection import key_value

        task, unet = self.task, self.task.unet
        weights = list(unet.parameters() if which == "plain" else key_value(unet).values())
        task.model.requires_grad_(False)
        for p in weights:
            p.requires_grad_(True)
        x = torch.randn(self.args.batch, *task.latent_shape, device=task.device)
        t = torch.full((self.args.batch,), 500, device=task.device)
        states = task.conditions(["a picture"] * self.args.batch)
        half = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.args.precision]

        def once() -> None:
            with torch.autocast(self.args.device, dtype=half, enabled=half is not None):
                loss = (task.eps(x, t, states) - x).square().mean()
            loss.backward()
            unet.zero_grad(set_to_none=True)

        stamps = [self.clock()]
        for _ in range(self.args.repeat + 1):
            once()
            stamps.append(self.clock())
        return typical(stamps[1:] if self.args.repeat else stamps)

    def clock(self) -> float:
        """Seconds: on the wall once the GPU has finished, else of this process."""
        import torch

        if self.args.device != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def unlearn(self, method: str) -> dict[str, Any]:
        from expunge.diffusion.plan import plan
        from expunge.request import ForgetRequest
        from expunge.run import unlearn

        recipe, request = recipe_of(method, self.args), ForgetRequest.label("circle")
        split = self.task.split(request)
        stamps: list[float] = []

        start = self.clock()
        patch = unlearn(
            self.task, request, recipe, allow_no_effect=True, on_step=lambda *_: stamps.append(self.clock())
        )
        total = self.clock() - start
        run: dict[str, Any] = {"peak": self.memory.peak(), "host_peak": self.host.host_peak()}
        found = plan(
            recipe,
            self.shape,
            sizes={r: len(split[r]) for r in ("forget", "retain")},
            protected=0 if self.args.tiny else len(self.task.classes) - 1,
            stored=4 if self.args.dtype == "float32" else 2,
            side=self.args.side,
            checkpointing=self.args.checkpointing,
            on_cpu=self.args.device == "cpu",
        )
        predicted = found.peak + (found.host if self.args.device == "cpu" else 0)
        run |= {"predicted": predicted, "plan": dict(found.memory), "plan_host": found.host, "total_seconds": total}
        run |= {"tensors": len(patch), "patch_bytes": sum(c.nbytes for c in patch.changes.values())}
        if len(stamps) > 1:
            run["seconds"] = typical(stamps)
            if self.args.repeat:
                self.task.model.to(self.args.device)
                run |= {f"over_{which}": run["seconds"] / self.passes(which) for which in PLAIN}
        return run | {"shared": self.shared}


def recipe_of(method: str, args: argparse.Namespace) -> Any:
    """The method with its own settings, but for batch, steps, precision, and pictures that are not moved about."""
    from expunge.method import build_recipe

    settings: dict[str, Any] = {"batch_size": args.batch} if method != "uce" else {}
    if method in ("srs_me", "cie"):
        settings["threshold"] = None
    if method == "srs_me" and args.tiny:  # 64 directions are too few to protect seven classes
        settings["protect_others"] = False
    if method == "esd" and args.sampling:
        settings["inference_steps"] = args.sampling
    if method == "ablating_concepts":
        settings["profile"] = "style"
    if method == "forget_me_not" and args.confined:
        settings["parameters"] = "cross-attn-all"
    recipe = build_recipe({"method": method, **settings})
    if method == "salun" and args.confined:
        recipe = recipe.replace(space={**recipe.space.describe(), "targets": ["unet.*.attn2.*"]})
    return recipe.replace(optim={"max_steps": args.steps, "precision": args.precision, "augment": False})


def warm_up(device: str) -> None:
    """What libraries load and keep when they are first used is no memory of a method."""
    import accelerate  # noqa: F401
    import scipy.linalg  # noqa: F401
    import torch

    from expunge.tasks.tiny_text_to_image import tiny_text_to_image

    task = tiny_text_to_image()
    task.model.to(device)
    x = torch.zeros(1, *task.latent_shape, device=device)
    task.eps(x, torch.zeros(1, dtype=torch.int64, device=device), task.conditions(["a"])).sum().backward()


def build(args: argparse.Namespace) -> tuple[Any, Any]:
    """Shape and task."""
    import torch

    from expunge.data.canvas import canvas
    from expunge.diffusion.process import draw_noise
    from expunge.diffusion.shapes import SHAPES, Shape
    from expunge.models.quiet import quiet
    from expunge.tasks.text_to_image import TextToImageTask
    from expunge.tasks.tiny_text_to_image import tiny_parts

    class Noise(TextToImageTask):
        """Latents of images are noise: nothing is encoded."""

        def latents(self, role: str) -> Any:
            return lambda ids, device: draw_noise(0, ids, self.latent_shape)

    parts = tiny_parts()
    if args.tiny:
        weights = sum(p.numel() for p in parts.vae.parameters())
        shape = Shape("tiny", dict(parts.unet.config), (parts.text_encoder.config.to_dict(),), weights, parts.factor)
    else:
        shape, parts = SHAPES["sd-1"], full_parts(SHAPES["sd-1"], parts)
    with quiet():
        for part in (parts.unet, parts.text_encoder):
            part.to(getattr(torch, args.dtype))
    side = args.side * parts.factor
    return shape, Noise(parts, canvas(48, 48, side=side), side=side, gradient_checkpointing=args.checkpointing)


def full_parts(shape: Any, small: Any) -> Any:
    """Parts of full size with random weights, beside the tokenizer and the sampler of small ones."""
    import diffusers
    import torch
    import transformers

    from expunge.models.pipelines import Parts, check_parts

    words = small.tokenizer
    words.model_max_length = shape.tokens
    tokens = {n: getattr(words, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    unet: Any = diffusers.UNet2DConditionModel(**shape.unet)
    text: Any = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**shape.text[0], **tokens}))
    vae: Any = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    parts = Parts(unet.eval(), text.eval(), words, vae.eval(), small.scheduler, name=shape.name)
    check_parts(parts)
    return parts


if __name__ == "__main__":
    main()
