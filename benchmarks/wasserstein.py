"""Exact W1 between two clouds: assignment against SciPy's linear programme, in one process.

Wall-clock time on one thread; run ``python benchmarks/wasserstein.py [--points N] [--dims D] [--repeats R]``.
Both have to give the same number; the target is 20 times the speed at 500 points.
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

import numpy as np

from expunge.analysis import w1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, nargs="+", default=[50, 100, 200, 500])
    parser.add_argument("--dims", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lp-repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rng, rows = np.random.default_rng(0), []
    for solver in ("assignment", "lp"):  # imports are not part of the measurement
        w1(rng.normal(size=(4, 2)), rng.normal(size=(4, 2)), solver=solver)
    for n in args.points:
        x, y = rng.normal(size=(n, args.dims)), rng.normal(0.3, 1.0, size=(n, args.dims))
        seconds, values = {}, {}
        for solver, repeats in (("assignment", args.repeats), ("lp", args.lp_repeats)):
            taken = []
            for _ in range(repeats):
                start = time.perf_counter()
                values[solver] = w1(x, y, solver=solver)
                taken.append(time.perf_counter() - start)
            seconds[solver] = statistics.median(taken)
        off = abs(values["assignment"] - values["lp"]) / values["lp"]
        row = {"points": n, "seconds": seconds, "speedup": seconds["lp"] / seconds["assignment"], "relative": off}
        rows.append(row)
        print(
            f"{n:5d} points: assignment {1e3 * seconds['assignment']:8.2f} ms | linear programme {seconds['lp']:8.3f} s"
            f" | {row['speedup']:7.1f}x | off by {off:.1e}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"dims": args.dims, "rows": rows}, indent=1))
    met = all(r["relative"] < 1e-9 and (r["points"] < 500 or r["speedup"] >= 20) for r in rows)
    print("target (20x at 500 points, same number): " + ("met" if met else "missed"))
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
