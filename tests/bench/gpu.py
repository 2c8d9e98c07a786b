"""What the published sizes take on a GPU, against the estimate of --dry-run: DPO steps and looks.

    python tests/bench/gpu.py [configs/pi05.yaml ...]

Random weights in the published shapes, bfloat16: neither time nor memory depends on their values. A DPO step
is that of 03_dpo.py on as many random pairs as the config's batch has, after what no adapter touches has been
computed once. Memory is the peak of what PyTorch's allocator gave out. Times are wall times between
synchronisations, medians. Of a look also the time in which the GPU runs a kernel. Work is counted on the meta
device (backbones/memory.py); its share of the peak is that of the GPU's data sheet, for the GPUs in
05_profile.py.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import work

import common
from backbones import memory
from runtime import stage
from runtime.config import load_config

dpo, profile = importlib.import_module("03_dpo"), importlib.import_module("05_profile")
DEVICE, STEPS, LOOKS, WARM = "cuda", 5, 20, 2
VARIANTS = [("lora", False), ("lora", True), ("dora", False), ("dora", True)]  # adapter, recompute


def random_pairs(policy, n: int) -> dict:
    shape, g = (n, policy.horizon, 7), common.stream(0, "pairs")
    chunks = {c: torch.rand(shape, generator=g) * 2 - 1 for c in ("chosen", "rejected")}
    return chunks | {"obs": profile.observations(n, 224), "mask": torch.ones(shape[:2]) > 0}


def seconds(function) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def bench_dpo(config: str, adapter: str, recompute: bool) -> dict:
    """Milliseconds and peak memory of a DPO step, and the first step's margins, which must be exactly 0."""
    cfg = load_config(dpo.Config, [config, f"adapter={adapter}", f"dpo.recompute={recompute}"])
    said = memory.estimate(replace(cfg, dry_run=True), "dpo")
    flops, _ = work.work_of(replace(cfg, dry_run=True), "dpo")
    policy = profile.random_policy(replace(cfg, device=DEVICE)).requires_grad_(False)
    common.attach_adapter(policy, adapter, cfg.rank, cfg.alpha, policy.adapter_targets, cfg.seed)
    policy.recompute = recompute
    trainable = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=cfg.lr)
    pairs = random_pairs(policy, cfg.batch_size)
    begun, batch = (
        policy.begin(pairs["obs"], cfg.batch_size),
        dpo.batch_of(pairs, torch.arange(cfg.batch_size)),
    )
    margins, times = [], []

    def step() -> None:
        draws = dpo.draw(policy, cfg, cfg.batch_size, common.stream(0, "dpo", len(times)))
        with policy.reference():
            ref = dpo.score(policy, cfg, begun, *batch[1:], draws, ("ref", 0))
        pi = dpo.score(policy, cfg, begun, *batch[1:], draws, ("pi", 0))
        loss, rewards = dpo.dpo_loss(*pi, *ref, float(cfg.beta))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        margins.append(rewards["rewards/margins"].abs().max().item())

    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM + STEPS):
        times.append(seconds(step))
    assert margins[0] == 0 and margins[-1] > 0, margins
    found = {
        "said_gib": sum(said["parts"].values()) / 2**30,
        "gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    return found | {
        "ms": 1e3 * statistics.median(times[WARM:]),
        "tflop": flops / 1e12,
        "pairs": cfg.batch_size,
    }


def bench_looks(config: str) -> dict:
    """Milliseconds and peak memory of a look; its kernels and their own ms, and those of a denoise step."""
    cfg = load_config(profile.Config, [config])
    said = memory.estimate(replace(cfg, dry_run=True), "eval")
    flops, read = work.work_of(replace(cfg, dry_run=True), "eval")
    policy = profile.random_policy(replace(cfg, device=DEVICE))
    obs, noise = profile.observations(1, cfg.image_size), policy.noise(1, common.stream(0, "noise"))
    torch.cuda.reset_peak_memory_stats()

    def timed(steps: int) -> float:
        return 1e3 * statistics.median(
            [seconds(lambda: profile.look(policy, obs, noise, steps)) for _ in range(WARM + LOOKS)][WARM:]
        )

    found = {"ms": timed(cfg.denoise_steps), "gib": torch.cuda.max_memory_allocated() / 2**30}
    found |= {"said_gib": sum(said["parts"].values()) / 2**30, "tflop": flops / 1e12, "read_gb": read / 1e9}
    kernels = {
        steps: busy(lambda n=steps: profile.look(policy, obs, noise, n)) for steps in (cfg.denoise_steps, 1)
    }
    found["kernels"], found["busy_ms"] = kernels[cfg.denoise_steps]
    if policy.backbone == "pi05":
        others = cfg.denoise_steps - 1
        one = (found["ms"] - timed(1), *(a - b for a, b in zip(*kernels.values(), strict=True)))
        found |= {
            f"step_{key}": value / others
            for key, value in zip(("ms", "kernels", "busy_ms"), one, strict=True)
        }
    return found


def busy(look) -> tuple[int, float]:
    """Kernels of a look, and the milliseconds in which the GPU runs one."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as found:
        look()
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(events), sum(e.device_time for e in events) / 1e3


def main(configs: list[str]) -> None:
    name = torch.cuda.get_device_name()
    peak = next((rates for gpu, rates in profile.GPUS.items() if gpu in name), None)
    rows = {"gpu": name, "torch": torch.__version__, "dpo": {}, "looks": {}}
    print(f"{name}, torch {torch.__version__}\n")
    print(
        "| DPO step | GiB, --dry-run | GiB, measured | ms | 10^12 operations | of the peak |\n"
        "|---|---|---|---|---|---|"
    )
    for config in configs:
        for adapter, recompute in VARIANTS:
            what = f"{Path(config).stem}, {adapter}{', recompute' * recompute}"
            r = rows["dpo"][what] = bench_dpo(config, adapter, recompute)
            share = f"{r['tflop'] * 1e15 / r['ms'] / peak[0]:.0%}" if peak else ""
            cells = [
                what,
                f"{r['said_gib']:.1f}",
                f"{r['gib']:.1f}",
                f"{r['ms']:.0f}",
                f"{r['tflop']:.3g}",
                share,
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
            torch.cuda.empty_cache()
    print(
        "\n| a look | GiB, --dry-run | GiB, measured | ms | GPU busy, ms | kernels"
        " | a denoise step: ms | busy | kernels |"
    )
    print("|---" * 9 + "|")
    for config in configs:
        r = rows["looks"][Path(config).stem] = bench_looks(config)
        cells = [
            Path(config).stem,
            f"{r['said_gib']:.1f}",
            f"{r['gib']:.1f}",
            f"{r['ms']:.1f}",
            f"{r['busy_ms']:.1f}",
        ]
        cells += [
            str(r["kernels"]),
            *(f"{r[f'step_{k}']:.3g}" if "step_ms" in r else "" for k in ("ms", "busy_ms", "kernels")),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        torch.cuda.empty_cache()
    print(f"\n{json.dumps(rows)}")


if __name__ == "__main__":
    stage.command_line(lambda: main(sys.argv[1:] or ["configs/pi05.yaml", "configs/openvla_7b.yaml"]))
