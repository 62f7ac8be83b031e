"""SRS-ME: null spaces, and a training step against plain forward and backward passes.

    OMP_NUM_THREADS=1 python benchmarks/srs_me.py [--batch B] [--repeat R] [--json FILE]

Null spaces: ten prompts of 77 states of width 768 with a common first token, the whole call, CPU seconds on one thread.

Step: a diffusers U-Net of a quarter of the widths of Stable Diffusion 1.x (54 million parameters; text states of width
192, null space of 115 directions) on latents of 32 x 32. "Plain" is one forward and backward of the mean squared error
at the same batch, with gradients for all parameters; "plain, K and V" for the cross-attention matrices only. Every
repetition runs all procedures one after the other, so that all meet the same load; ratios are medians over the
repetitions. "Published" makes the passes of the public code, two of them graded, with the shift added to the weights.

Memory: bytes that autograd keeps for the backward pass, and the tensors that a shift adds, counted, not sampled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.func import functional_call

from expunge.diffusion.correlation import correlation, shifted, teach
from expunge.diffusion.merge import merge
from expunge.diffusion.nullspace import component, null_space
from expunge.diffusion.selection import key_value, matrices
from expunge.diffusion.shift import Shift, attach, invariance, storage

TOKENS, LAM, BETA = 77, 1e-6, 1e-4


def states_of(prompts: int, width: int, seed: int = 0) -> Tensor:
    """Prompts whose first state is common, as a causal encoder makes them."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(prompts, TOKENS, width, generator=generator)
    states[:, 0] = states[0, 0].clone()
    return states


def make_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(80, 160, 320, 320),
        cross_attention_dim=192,
        attention_head_dim=8,
        norm_num_groups=16,
    ).eval()


def kept_bytes(run: Callable[[], Tensor], skip: set[int]) -> int:
    """Bytes that a graph holds, storages counted once, without the weights."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run()
    total = sum(seen.values())
    del loss
    return total


def null_spaces() -> dict[str, Any]:
    states = states_of(10, 768)
    null_space(states[:2])
    seconds = []
    for _ in range(5):
        start = time.process_time()
        basis = null_space(states)
        seconds.append(time.process_time() - start)
    print(f"null space of 10 x 77 x 768: {statistics.median(seconds):.2f} s, residual {basis.residual:.1e}")
    print(f"  {basis.capacity}")
    return {"null_space_seconds": statistics.median(seconds), "residual": basis.residual}


def casts() -> dict[str, float]:
    """What merging does to keys and values of protected prompts, at the widths of Stable Diffusion 1.x, relative."""
    generator = torch.Generator().manual_seed(1)
    states = states_of(4, 768)
    shapes = {f"w{i}": (rows, 768) for i, rows in enumerate((320, 640, 1280))}
    base = {n: 0.04 * torch.randn(s, generator=generator) for n, s in shapes.items()}
    basis = null_space(states)
    deltas = {n: torch.randn(s[0], len(basis.vectors), generator=generator).double() for n, s in shapes.items()}
    deltas = {n: 1e-3 * d @ basis.vectors for n, d in deltas.items()}
    found = {}
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        rounded = {n: w.to(dtype) for n, w in base.items()}
        moved = invariance(rounded, merge(rounded, {0: deltas}, [0]), {str(i): s for i, s in enumerate(states)})
        found[str(dtype).removeprefix("torch.")] = max(m.relative for m in moved.values())
    print("merged K and V of protected prompts move by", {n: f"{v:.1e}" for n, v in found.items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = null_spaces() | {"cast": casts()}

    unet = make_unet()
    weights, parameters = key_value(unet), list(unet.parameters())
    basis = null_space(states_of(1, 192))
    generator = torch.Generator().manual_seed(2)
    b = args.batch
    x, noise = (torch.randn(b, 4, 32, 32, generator=generator) for _ in range(2))
    t = torch.randint(0, 1000, (b,), generator=generator)
    null = states_of(1, 192).expand(b, -1, -1).contiguous()
    c = states_of(2, 192)[1:].expand(b, -1, -1).contiguous()
    own = component(basis.vectors, c[0])
    shifts = {"step": Shift.on(unet, basis.vectors, beta=BETA), "confined": Shift.on(unet, own, beta=BETA)}
    for shift in shifts.values():
        for omega in shift.omega.values():
            omega.data.normal_(0, 0.1, generator=generator)
    print(f"U-Net {sum(p.numel() for p in parameters) / 1e6:.1f} M, batch {b}, {len(basis.vectors)} directions")

    def eps(x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        return unet(x, t, states).sample

    def graded(*which: nn.Parameter) -> None:
        unet.requires_grad_(False)
        for p in which:
            p.requires_grad_(True)

    def plain(*which: nn.Parameter) -> Tensor:
        graded(*which)
        return (eps(x, t, c) - noise).square().mean()

    def step(name: str, lam: float = LAM) -> Tensor:
        graded()
        shift = shifts[name]
        with attach(unet, {"c": shift}) as attached:
            found = shifted(eps, attached.off(), x, t, c, null)
        return found.losses.mean() + lam * shift.l1() if lam else found.losses.mean()

    def published() -> Tensor:
        graded()
        shift = shifts["step"]
        changed = {n: w + shift.delta(n) for n, w in weights.items()}
        with attach(unet, {"c": shift}) as attached:
            teacher = teach(eps, attached.off(), x, t, c, null)
        named, blank = (functional_call(unet, changed, (x, t, s)).sample for s in (c, null))
        return correlation(named, blank, teacher).losses.mean() + LAM * shift.l1()

    runs: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: plain(*parameters),
        "plain, K and V": lambda: plain(*weights.values()),
        "step": lambda: step("step"),
        "step without l1": lambda: step("step", 0.0),
        "step, own component": lambda: step("confined"),
        "published": published,
    }
    seconds: dict[str, list[float]] = {n: [] for n in runs}
    for i in range(args.repeat + 1):
        for name, run in runs.items():
            start = time.process_time()
            run().backward()
            spent = time.process_time() - start
            for p in [*parameters, *(o for s in shifts.values() for o in s.omega.values())]:
                p.grad = None
            if i:  # the first round warms up
                seconds[name].append(spent)
    stored = {p.untyped_storage().data_ptr() for p in parameters}
    for name, run in runs.items():
        ratios = [x / y for x, y in zip(seconds[name], seconds["plain"], strict=True)]
        kept = kept_bytes(run, stored)
        results[name] = {
            "seconds": statistics.median(seconds[name]),
            "over_plain": statistics.median(ratios),
            "kept_bytes": kept,
        }
        cost = f"{statistics.median(seconds[name]):7.2f} s {statistics.median(ratios):6.3f}"
        print(f"{name:22} {cost} {kept / 1e6:8.1f} MB kept")
    held = 4 * sum(p.numel() for p in parameters)
    for name, shift in shifts.items():
        n = len(shift.vectors)
        extra = 4 * 4 * sum(o.numel() for o in shift.omega.values()) + 20 * shift.vectors.numel()
        sizes = storage(matrices(weights), n)
        print(f"{name}: {n} directions; coefficients, gradients, Adam and basis {extra / 1e6:.1f} MB", end=" ")
        print(f"beside {held / 1e6:.1f} MB of weights; {sizes}")
        results[f"{name} memory"] = {"extra": extra, "weights": held}
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
