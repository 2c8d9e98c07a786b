"""Throughput of the other jobs: recording demonstrations, SFT steps, surrogate and exact log-probabilities.

    python tests/bench/throughput.py [repeats=9]        about 2 CPU minutes
    python tests/bench/throughput.py processes=2        the SFT step alone, in two processes as 01_sft.py

Times are CPU seconds of this process in one thread, so other load on the machine matters little; medians over
the repeats.
demonstrations  what 00_demos.py does for tasks 0 and 5 of LIBERO-Object, init states 0 and 1, without writing
                files; failed tries included
SFT             (CPU seconds and peak of the first process, the others at work beside it)
                forward pass, backward pass and AdamW of 01_sft.py with configs/tiny.yaml. A sample is an
                observation, scored under `draws` draws. PyTorch counts the operations (matrix products,
                attention and convolutions only). The peak is the rate at which the same process multiplies
                two 1024 x 1024 float32 matrices.
log p           the policy of checkpoints/try and the 40 chunks of its 20 pairs: the surrogate with 4 draws,
                and the exact trace along 20 midpoint steps
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import backbones
import common
from backbones import likelihood, memory
from runtime import ranks
from runtime.config import HERE, load_config
from sim.env import TaskEnv

demos, sft = importlib.import_module("00_demos"), importlib.import_module("01_sft")
TINY = str(HERE / "configs" / "tiny.yaml")
TRY = HERE / "checkpoints" / "try" / "pi05"


def seconds(act: Callable, repeats: int) -> float:
    """Median CPU seconds of act(), after one call that does not count."""
    spent = []
    for _ in range(repeats + 1):
        began = time.process_time()
        act()
        spent.append(time.process_time() - began)
    return statistics.median(spent[1:])


def recording() -> dict:
    cfg = load_config(demos.Config, [TINY])
    spent = []
    steps = looks = tries = 0
    for task in (0, 5):
        env = TaskEnv("libero_object", task, cfg.image_size, cfg.render)
        env.reset(0)
        env.observe()  # the first observation makes the renderer
        for init in (0, 1):
            began = time.process_time()
            outcomes, rows = demos.try_until_success(env, init, cfg)
            spent.append(time.process_time() - began)
            steps += len(rows["actions"])
            looks += len(rows["obs/image_steps"])
            tries += len(outcomes)
        env.close()
    n, each = len(spent), statistics.median(spent)
    about = {"n": n, "steps": steps / n, "looks": looks / n, "tries": tries}
    return {"s_each": each, "per_minute_and_core": 60 / each} | about


def training(repeats: int) -> dict:
    cfg = load_config(sft.Config, [TINY])
    cfg.batch_size //= ranks.size()
    policy = memory.make_policy(cfg, "full").to_empty(device="cpu").train()
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.02)
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr)

    def step() -> None:
        memory.sft_forward(policy, cfg).backward()
        ranks.average_gradients(policy.parameters())
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        step()
    a = torch.randn(1024, 1024)
    peak = 2 * 1024**3 / seconds(lambda: a @ a, 3 * repeats)
    each = seconds(step, repeats)
    ranks.part()
    flops = counter.get_total_flops()
    return {
        "ms": 1e3 * each,
        "samples_per_s": cfg.batch_size / each,
        "gflop": flops / 1e9,
        "peak_gflop_per_s": peak / 1e9,
        "bound_samples_per_s": cfg.batch_size * peak / flops,
        "of_peak": flops / each / peak,
        "n": repeats,
    }


def log_probs(repeats: int) -> dict:
    policy = backbones.load_policy(TRY / "sft").eval()
    pairs = common.read_pairs(TRY / "prefs")
    chunks = torch.cat([pairs["chosen"], pairs["rejected"]])
    n = len(chunks)
    obs = {key: pairs[key] for key in ("agentview", "wrist", "state", "instruction")}
    mask = torch.ones(n, policy.horizon, dtype=torch.bool)
    draws = policy.draws(n, 4, common.stream(0, "draws"), "stratified")
    times = likelihood.time_grid(20)
    with torch.no_grad():
        prefix = policy.encode(obs).select(torch.arange(n // 2).repeat(2))
        velocity, padded = likelihood.velocity_of(policy, prefix), policy.pad(chunks)
        surrogate = seconds(lambda: policy.log_prob(prefix, chunks, draws, mask), repeats)
        exact = seconds(lambda: likelihood.ode_log_prob(velocity, padded, likelihood.exact_trace, times), 1)
    return {
        "surrogate_ms": 1e3 * surrogate / n,
        "exact_ms": 1e3 * exact / n,
        "ratio": exact / surrogate,
        "n": n,
    }


def main(repeats: int, processes: int) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        if ranks.size() == 1:
            ranks.launch(processes)
        ranks.join("cpu")
        t = training(repeats)
        return ranks.first() and print(json.dumps(t))
    r = recording()
    print(
        "| demonstrations | CPU s each | per minute and core | steps | looks | tries |\n" + 6 * "|---" + "|"
    )
    cells = [
        f"{r['s_each']:.2f}",
        f"{r['per_minute_and_core']:.0f}",
        f"{r['steps']:.0f}",
        f"{r['looks']:.0f}",
    ]
    print(f"| {r['n']} | {' | '.join(cells)} | {r['tries']} |")
    t = training(repeats)
    print("\n| SFT step, ms | samples / s | 10^9 operations | peak, 10^9 / s ", end="")
    print("| samples / s at the peak | of the peak |\n" + 6 * "|---" + "|")
    cells = [
        f"{t['ms']:.0f}",
        f"{t['samples_per_s']:.0f}",
        f"{t['gflop']:.1f}",
        f"{t['peak_gflop_per_s']:.0f}",
    ]
    print(f"| {' | '.join(cells)} | {t['bound_samples_per_s']:.0f} | {t['of_peak']:.0%} |")
    p = log_probs(repeats)
    print("\n| log p of a chunk, n = 40 | CPU ms |\n|---|---|")
    print(f"| surrogate, 4 draws | {p['surrogate_ms']:.3g} |")
    print(f"| exact | {p['exact_ms']:.4g} ({p['ratio']:.0f} times) |")
    print(json.dumps({"demonstrations": r, "sft": t, "log_p": p}))


if __name__ == "__main__":
    arguments = dict(a.split("=") for a in sys.argv[1:])
    main(int(arguments.get("repeats", 9)), int(arguments.get("processes", 1)))
