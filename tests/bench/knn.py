"""Time and memory of the exact search of stage 06 against the number of frames, beside the plain matrix product.

    python tests/bench/knn.py [N ...]

Every frame asks for its 10 nearest among all others but those of its own episode (30 frames); 128 dimensions, one thread. The
product is blocked in the same way, and nobody looks at it. Time is CPU seconds; memory is what the process grows by beyond its
input. Of more than 20,000 frames 20,000 ask: the time of all is theirs times N / 20,000, since queries are independent.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from retrieval import nearest

ASKING = 20_000


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def product(queries: torch.Tensor, gallery: torch.Tensor, block: int = 2048) -> None:
    for q in queries.split(512):
        for g in gallery.split(block):
            q @ g.T


def measure(n: int) -> None:
    torch.set_num_threads(1)
    x = torch.nn.functional.normalize(torch.randn(n, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    episode, asking = torch.arange(n) // 30, min(n, ASKING)
    nearest(x[:512], x[:4096], 10)  # warm
    before = peak_mb()
    seconds = []
    for run in (lambda: product(x[:asking], x), lambda: nearest(x[:asking], x, 10, episode[:asking], episode)):
        began = time.process_time()
        run()
        seconds.append((time.process_time() - began) * n / asking)
    print(
        f"| {n:,} | {seconds[1]:.2f} | {seconds[0]:.2f} | {seconds[1] / seconds[0]:.2f} | {peak_mb() - before:.0f} |", flush=True
    )


def main(numbers: list[int]) -> None:
    print("| frames | search, CPU s | product, CPU s | ratio | memory beyond the input, MB |\n|---|---|---|---|---|", flush=True)
    for n in numbers:  # a process each, for its own peak
        subprocess.run([sys.executable, __file__, "measure", str(n)], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(int(sys.argv[2]))
    else:
        main([int(n) for n in sys.argv[1:]] or [1_000, 3_000, 10_000, 30_000, 100_000])
