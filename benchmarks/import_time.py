"""Time of ``import expunge`` in fresh interpreters: the median of ten, limit 0.3 s; no accelerator is touched.

python benchmarks/import_time.py
"""

import statistics
import subprocess
import sys

LIMIT = 0.3
CODE = """
import sys, time
start = time.perf_counter()
import expunge
seconds = time.perf_counter() - start
torch = sys.modules.get("torch")
assert torch is None or not torch.cuda.is_initialized()
print(seconds)
"""


def main() -> int:
    runs = [float(subprocess.check_output([sys.executable, "-c", CODE])) for _ in range(11)][1:]
    median = statistics.median(runs)
    print(f"import expunge: median {1000 * median:.1f} ms of {len(runs)} (slowest {1000 * max(runs):.1f} ms)")
    return int(median > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
