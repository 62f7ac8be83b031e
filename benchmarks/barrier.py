"""Cost of the interval protection on one CPU core, in the three set-ups of the published measurements.

    OMP_NUM_THREADS=1 python benchmarks/barrier.py [mlp] [conv] [conv_channels] [text]

Every set-up runs in its own process. CPU seconds count, not wall time. ``gemm`` is one (o x d)(d x d) product per
protected layer, timed in the same process; the published step is given for comparison, recorded on another core.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Literal

RECORDED = {  # set-up CPU s, extra peak MB, step CPU ms
    "mlp": (5.0, 370, 157),
    "conv": (60.0, 3200, 16.5),
    "conv_channels": (60.0, 3200, 16.5),
    "text": (23.6, 950, 381),
}


def build(kind: str):
    import torch
    from torch import nn

    torch.manual_seed(0)
    if kind == "mlp":
        model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
        return model, torch.randn(10_000, 1024).split(500), "Linear"
    if kind.startswith("conv"):
        layers: list[nn.Module] = []
        for c, o in ((3, 64), (64, 64), (64, 128), (128, 256), (256, 256)):
            layers += [nn.Conv2d(c, o, 3, padding=1, bias=False), nn.ReLU()]
        return nn.Sequential(*layers), torch.randn(512, 3, 32, 32).split(32), "Conv2d"

    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = [320] * 5 + [640] * 5 + [1280] * 6
            self.blocks = nn.ModuleList(nn.ModuleDict({"to_k": nn.Linear(768, w, bias=False)}) for w in widths)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [block["to_k"](x) for block in self.blocks]  # type: ignore[index, operator]

    return Projections(), torch.randn(200, 77, 768).split(20), "to_k"


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(kind: str) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    from expunge.protections.interval.collect import CollectSettings, collect
    from expunge.protections.interval.loss import PenaltySettings
    from expunge.protections.interval.loss import build as build_penalty
    from expunge.protections.interval.match import find

    model, batches, target = build(kind)
    with torch.no_grad():
        model(batches[0])
    import scipy.linalg  # noqa: F401  (imports are not set-up)

    before = peak_mb()
    start = time.process_time()
    layers = find(model, [target]).layers
    conv: Literal["patches", "channels"] = "channels" if kind == "conv_channels" else "patches"
    stats = collect(model, layers, model, lambda: batches, CollectSettings(conv=conv))
    if kind == "conv_channels":  # the rows of the published code; its penalty is not defined for every tap
        nothing = dict.fromkeys(("step_ms", "step_min_ms", "gemm_ms", "loss"), float("nan"))
        return {"setup_s": time.process_time() - start, "before_mb": before, "extra_mb": peak_mb() - before, **nothing}
    penalty = build_penalty(layers, stats, PenaltySettings())
    del stats
    setup = time.process_time() - start
    peak = peak_mb()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 1e-3 * torch.randn(p.shape, generator=generator)
    steps = []
    for i in range(23):
        model.zero_grad(set_to_none=True)
        start = time.process_time()
        loss = penalty()
        loss.backward()
        if i >= 3:
            steps.append((time.process_time() - start) * 1e3)
    pairs = [(layer.drift(layer.module.weight, None)[0], layer.form.H) for layer in penalty.layers.values()]  # type: ignore[attr-defined]
    gemm = []
    for i in range(13):
        start = time.process_time()
        for drift, form in pairs:
            torch.bmm(drift, form)
        if i >= 3:
            gemm.append((time.process_time() - start) * 1e3)
    return {
        "setup_s": setup, "before_mb": before, "extra_mb": peak - before, "step_ms": statistics.median(steps),
        "step_min_ms": min(steps), "gemm_ms": statistics.median(gemm), "loss": float(loss.detach()),
    }  # fmt: skip


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        print(json.dumps(measure(sys.argv[2])))
        return
    print(
        f"{'set-up':13} {'CPU s':>7} {'x':>5} {'+MB':>6} {'x':>6} {'step ms':>8} {'x':>5} {'gemm ms':>8} {'ratio':>6}"
    )
    for kind in sys.argv[1:] or RECORDED:
        out = subprocess.run([sys.executable, __file__, "--one", kind], check=True, capture_output=True, text=True)
        r = json.loads(out.stdout)
        s, m, t = RECORDED[kind]
        print(
            f"{kind:13} {r['setup_s']:7.2f} {s / r['setup_s']:5.1f} "
            f"{r['extra_mb']:6.0f} {m / max(r['extra_mb'], 1):6.1f} {r['step_ms']:8.2f} {t / r['step_ms']:5.1f} "
            f"{r['gemm_ms']:8.2f} {r['step_ms'] / r['gemm_ms']:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
