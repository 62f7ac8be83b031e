"""Membership attack: published SVC against its binned form and the exact best threshold.

CPU time on one thread, simulated confidences; run ``python benchmarks/mia.py [--samples N] [--json FILE]``.
The binned form has to give the SVC's figure inside the SVC's interval at 50 times the speed. The best threshold is
another attack (it resolves confidences near 1, which the SVC's kernel cannot), so its figure is shown beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from expunge.metrics.membership import AttackSets, mia, mia_svc, mia_threshold

CASES = {
    "overfitted": (8.0, 5.0),
    "mild": (6.0, 5.0),
    "hard task": (4.0, 3.0),
    "strong leak": (12.0, 4.0),
    "no leak": (5, 5),
}


def confidences(rng: np.random.Generator, n: int, scale: float) -> np.ndarray:
    return 1 / (1 + np.exp(-rng.normal(scale, 0.45 * scale, n)))


def timed(function, sets: AttackSets, repeats: int) -> tuple:
    start = time.process_time()
    for _ in range(repeats):
        estimate = function(sets)
    return estimate, (time.process_time() - start) / repeats


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000, help="members, and as many non-members")
    parser.add_argument("--forget", type=int, default=4_500)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rng, rows = np.random.default_rng(0), []
    mia(AttackSets(*(rng.random(64) for _ in range(3))))  # imports are not part of the measurement
    for name, (member, other) in CASES.items():
        sets = AttackSets(
            confidences(rng, args.samples, member),
            confidences(rng, args.samples, other),
            confidences(rng, args.forget, (member + other) / 2),
        )
        full, t_full = timed(mia_svc, sets, 1)
        fast, t_fast = timed(mia, sets, 5)
        cut, t_cut = timed(mia_threshold, sets, 3)
        rows.append(
            {
                "case": name,
                "svc": full.to_dict(),
                "binned": fast.to_dict(),
                "threshold": cut.to_dict(),
                "seconds": {"svc": t_full, "binned": t_fast, "threshold": t_cut},
                "speedup": {"binned": t_full / t_fast, "threshold": t_full / t_cut},
                "same_figure": full.low <= fast.value <= full.high,
            }
        )
        print(
            f"{name:12s} SVC {full} {t_full:6.2f} s | binned {fast} {t_fast * 1e3:5.0f} ms ({t_full / t_fast:.0f}x)"
            f" | threshold {cut} {t_cut * 1e3:4.0f} ms ({t_full / t_cut:.0f}x)"
        )
    if args.json:
        args.json.write_text(json.dumps({"samples": args.samples, "forget": args.forget, "rows": rows}, indent=1))
    bad = [r["case"] for r in rows if not r["same_figure"] or r["speedup"]["binned"] < 50]
    print("target (50x, same figure inside the interval): " + ("missed in " + ", ".join(bad) if bad else "met"))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
