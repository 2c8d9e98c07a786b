"""What the other jobs cost: recording a demonstration, an SFT step against the machine's peak, surrogate against exact log p.

    python tests/bench/throughput.py [repeats=9]        about 2 CPU minutes

CPU seconds of this process, one thread, so that what else the machine does counts little; medians of the repeats.
demonstrations  00_demos.py's recording of tasks 0 and 5 of LIBERO-Object from init states 0 and 1, without files; tries included
SFT             01_sft.py's forward and backward pass and AdamW for configs/tiny.yaml: samples are observations, each scored under
                `draws` draws. Operations are counted by PyTorch (matrix products, attention, convolutions; the rest is not in
                it); the peak is the rate of a product of two 1024 x 1024 float32 matrices in the same process
log p           policy of checkpoints/try, its 20 pairs' 40 chunks: surrogate of 4 draws and exact trace along 20 midpoint steps
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
import data
import likelihood
import memory
import runs
import sim

demos, sft = importlib.import_module("00_demos"), importlib.import_module("01_sft")
KIT = runs.HERE
TINY, TRY = str(KIT / "configs" / "tiny.yaml"), KIT / "checkpoints" / "try" / "pi05"


def seconds(act: Callable, repeats: int) -> float:
    """Median CPU seconds of act(), after one call that does not count."""
    spent = []
    for _ in range(repeats + 1):
        began = time.process_time()
        act()
        spent.append(time.process_time() - began)
    return statistics.median(spent[1:])


def recording() -> dict:
    cfg = common.load_config(demos.Config, "demos", [TINY])
    spent, steps, looks, tries = [], 0, 0, 0
    for task in (0, 5):
        env = sim.TaskEnv("libero_object", task, cfg.image_size, cfg.render)
        env.reset(0)
        env.observe()  # the first observation makes the renderer
        for init in (0, 1):
            began = time.process_time()
            outcomes, rows = demos.try_until_success(env, init, 0, cfg)
            spent.append(time.process_time() - began)
            steps, looks, tries = steps + len(rows["actions"]), looks + len(rows["obs/image_steps"]), tries + len(outcomes)
        env.close()
    each = statistics.median(spent)
    about = {"n": len(spent), "steps": steps / len(spent), "looks": looks / len(spent), "tries": tries}
    return {"s_each": each, "per_minute_and_core": 60 / each} | about


def training(repeats: int) -> dict:
    cfg = common.load_config(sft.Config, "sft", [TINY])
    policy = memory.make_policy(cfg, "full").to_empty(device="cpu").train()
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.02)
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr)

    def step() -> None:
        memory.sft_forward(policy, cfg, "cpu").backward()
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        step()
    a = torch.randn(1024, 1024)
    peak, each = 2 * 1024**3 / seconds(lambda: a @ a, 3 * repeats), seconds(step, repeats)
    flops = counter.get_total_flops()
    found = {"ms": 1e3 * each, "samples_per_s": cfg.batch_size / each, "gflop": flops / 1e9, "peak_gflop_per_s": peak / 1e9}
    return found | {"bound_samples_per_s": cfg.batch_size * peak / flops, "of_peak": flops / each / peak, "n": repeats}


def log_probs(repeats: int) -> dict:
    policy, pairs = backbones.load_policy(TRY / "sft").eval(), data.read_pairs(TRY / "prefs")
    n, chunks = 2 * len(pairs["chosen"]), torch.cat([pairs["chosen"], pairs["rejected"]])
    obs = {key: pairs[key] for key in ("agentview", "wrist", "state", "instruction")}
    mask, draws = torch.ones(n, policy.horizon, dtype=torch.bool), policy.draws(n, 4, common.stream(0, "draws"), "stratified")
    times = likelihood.time_grid(20)
    with torch.no_grad():
        prefix = policy.encode(obs).select(torch.arange(n // 2).repeat(2))
        velocity = likelihood.velocity_of(policy, prefix)
        surrogate = seconds(lambda: policy.log_prob(prefix, chunks, draws, mask), repeats)
        exact = seconds(lambda: likelihood.ode_log_prob(velocity, policy.pad(chunks), likelihood.exact_trace, times), 1)
    return {"surrogate_ms": 1e3 * surrogate / n, "exact_ms": 1e3 * exact / n, "ratio": exact / surrogate, "n": n}


def main(repeats: int) -> None:
    torch.set_num_threads(1)
    r = recording()
    print("| demonstrations | CPU s each | per minute and core | steps | looks | tries |\n" + 6 * "|---" + "|")
    print(
        f"| {r['n']} | {r['s_each']:.2f} | {r['per_minute_and_core']:.0f} | {r['steps']:.0f} | {r['looks']:.0f} | {r['tries']} |"
    )
    t = training(repeats)
    print("\n| SFT step, ms | samples / s | 10^9 operations | peak, 10^9 / s | samples / s at the peak | of the peak |")
    print(6 * "|---" + "|")
    cells = [f"{t['ms']:.0f}", f"{t['samples_per_s']:.0f}", f"{t['gflop']:.1f}", f"{t['peak_gflop_per_s']:.0f}"]
    print(f"| {' | '.join(cells)} | {t['bound_samples_per_s']:.0f} | {t['of_peak']:.0%} |")
    p = log_probs(repeats)
    print("\n| log p of a chunk, n = 40 | CPU ms |\n|---|---|")
    print(f"| surrogate, 4 draws | {p['surrogate_ms']:.3g} |\n| exact | {p['exact_ms']:.4g} ({p['ratio']:.0f} times) |")
    print(json.dumps({"demonstrations": r, "sft": t, "log_p": p}))


if __name__ == "__main__":
    arguments = dict(a.split("=") for a in sys.argv[1:])
    main(int(arguments.get("repeats", 9)))
