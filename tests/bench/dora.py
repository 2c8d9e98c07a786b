"""A training step with LoRA, with the kit's DoRA (dora.py) and with peft's own: time and peak memory.

    python tests/bench/dora.py [repeats]

Four linear layers of 1024 x 1024, one after the other, rank 32; forward, backward and AdamW on one thread.
The three take turns, so that other work of the machine disturbs all of them. Times are CPU times of this
process; ratios are medians over the rounds of DoRA / LoRA in the same round. Memory is the peak of all live
tensors during forward and backward, weights included; for pi-0.5 at its published size it is what a DPO step
takes (backbones/memory.py, on the meta device).
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
from backbones import memory

KINDS = ("lora", "dora", "peft's dora")
WIDTH, LAYERS, RANK, ALPHA = 1024, 4, 32, 64


def make_stack(kind: str, width: int = WIDTH, layers: int = LAYERS) -> nn.Module:
    """Linear layers with an adapter, B away from zero as after some training; equal values for all kinds."""
    torch.manual_seed(0)
    stack = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    if kind == "peft's dora":
        get_peft_model(stack, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=r"\d+", use_dora=True))
    else:
        common.attach_adapter(stack, kind, RANK, ALPHA, r"\d+", 0)
    for name, p in stack.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(p, std=0.01)
    return stack


def step(stack: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    stack(x).square().mean().backward()
    if optimizer:
        optimizer.step()


def peak(stack: nn.Module, x: torch.Tensor) -> int:
    """Bytes held at the worst moment of a step: weights, input, and the balance of the allocator."""
    stack.zero_grad()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step(stack, x)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return memory.size([*stack.parameters(), x]) + max(itertools.accumulate(sizes))


def bench(tokens: int, repeats: int) -> dict[str, dict]:
    stacks = {kind: make_stack(kind) for kind in KINDS}
    x = torch.randn(
        tokens, WIDTH, generator=common.stream(0, "bench")
    ).requires_grad_()  # some layer's output
    trained = {kind: [p for p in stack.parameters() if p.requires_grad] for kind, stack in stacks.items()}
    optimizers = {kind: torch.optim.AdamW(parameters, 1e-4) for kind, parameters in trained.items()}
    seconds = {kind: [] for kind in KINDS}
    for i in range(repeats + 2):
        for kind, stack in stacks.items():
            stack.zero_grad()
            began = time.process_time()
            step(stack, x, optimizers[kind])
            if i >= 2:  # warmed up
                seconds[kind].append(time.process_time() - began)
    peaks = {kind: peak(stack, x) for kind, stack in stacks.items()}
    return {
        kind: {
            "ms": 1e3 * statistics.median(seconds[kind]),
            "time_ratio": statistics.median(
                a / b for a, b in zip(seconds[kind], seconds["lora"], strict=True)
            ),
            "peak_mb": peaks[kind] / 1e6,
            "memory_ratio": peaks[kind] / peaks["lora"],
        }
        for kind in KINDS
    }


def kept_at_3b(recompute: bool) -> dict[str, float]:
    """GiB that a DPO step of pi-0.5 takes, batch 8, bfloat16, by adapter."""
    import importlib

    config = importlib.import_module("03_dpo").Config
    totals = {}
    for adapter in ("lora", "dora"):
        cfg = config(adapter=adapter, dtype="bfloat16", recompute=recompute, dry_run=True)
        totals[adapter] = sum(memory.estimate(cfg, "dpo")["parts"].values()) / 2**30
    return totals


def main(repeats: int) -> None:
    torch.set_num_threads(1)
    rows = {tokens: bench(tokens, repeats) for tokens in (128, 512)}
    print(
        f"| tokens | adapter | ms a step, median of {repeats} | time / LoRA | peak MB | memory / LoRA |\n"
        + 6 * "|---"
        + "|"
    )
    for tokens, row in rows.items():
        for kind, r in row.items():
            cells = f"{r['ms']:.1f} | {r['time_ratio']:.2f} | {r['peak_mb']:.1f} | {r['memory_ratio']:.3f}"
            print(f"| {tokens} | {kind} | {cells} |")
    whole = {recompute: kept_at_3b(recompute) for recompute in (True, False)}
    print("\n| pi-0.5, DPO step, 8 pairs, bfloat16 | LoRA GiB | DoRA GiB | ratio |\n|---|---|---|---|")
    for recompute, total in whole.items():
        cells = f"{total['lora']:.2f} | {total['dora']:.2f} | {total['dora'] / total['lora']:.3f}"
        print(f"| recompute {recompute} | {cells} |")
    print(json.dumps({"repeats": repeats, "stack": rows, "pi05_gib": whole}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
