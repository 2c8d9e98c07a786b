"""A DPO step as 03_dpo.py computes it against the published order of evaluation, on the same values.

    python tests/bench/dpo_step.py [repeats]

Published order: a full forward pass, image towers and prefix included, for each of 4 draws x (chosen,
rejected) x (policy, reference), 16 in all, each over the batch of 8 pairs. Here: what no adapter touches is
computed once for all epochs, the rest of the prefix once each for policy and reference, and both chunks under
all draws are one batch of the expert. Both orders share the draws, so their values must agree. Times are CPU
times of this process on one thread, medians over rounds in which both take turns. The last row has the
expert's layers compiled, which needs a C++ compiler and a minute. At pi-0.5's published size operations are
counted on the meta device, forward (policy, reference) and backward apart.
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
from backbones import memory, pi05
from runtime.config import HERE

dpo = importlib.import_module("03_dpo")
PAIRS, DRAWS, BETA = 8, 4, 1.0
PARTS = ("forward", "backward")
EXPERT = r"expert\.layers\.\d+\.self_attn\.[qkvo]_proj"


def make_pairs(policy, image_size: int, device: str = "cpu") -> dict:
    """A batch of random pairs whose prompts are as long as LIBERO's."""
    g, shape = common.stream(0, "pairs"), (PAIRS, policy.horizon, 7)
    images = (PAIRS, image_size, image_size, 3)
    obs = {c: torch.randint(0, 256, images, generator=g, dtype=torch.uint8) for c in common.CAMERAS}
    obs |= {"state": torch.rand(PAIRS, 8, generator=g) * 2 - 1, "instruction": [memory.INSTRUCTION] * PAIRS}
    chunks = {c: torch.randn(shape, generator=g).to(device) for c in ("chosen", "rejected")}
    return chunks | {"obs": obs, "mask": torch.ones(shape[:2], dtype=torch.bool, device=device)}


def published(policy, obs: dict, chunk, mask, draws: common.Draws) -> torch.Tensor:
    """log p~ (B,) of one chunk, draw after draw, each with a prefix of its own."""
    k = len(draws.t)
    single = [common.Draws(draws.t[i : i + 1], draws.eps[i : i + 1]) for i in range(k)]
    return sum(policy.log_prob(policy.encode(obs), chunk, draw, mask) for draw in single) / k


def published_loss(policy, obs, chosen, rejected, mask, draws) -> torch.Tensor:
    with policy.reference():
        ref = [published(policy, obs, chunk, mask, draws) for chunk in (chosen, rejected)]
    pi = [published(policy, obs, chunk, mask, draws) for chunk in (chosen, rejected)]
    return dpo.dpo_loss(*pi, *ref, BETA)[0]


def kit_loss(policy, obs, chosen, rejected, mask, draws) -> torch.Tensor:
    with policy.reference():
        ref = dpo.log_probs(policy, obs, chosen, rejected, mask, draws, "velocity")
    return dpo.dpo_loss(*dpo.log_probs(policy, obs, chosen, rejected, mask, draws, "velocity"), *ref, BETA)[0]


def adapted(policy, targets: str):
    common.attach_adapter(policy, "lora", 32, 64, targets, 0)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)  # as after some training: the loss is not just ln 2
    return policy


def bench(targets: str, layer: Callable, repeats: int) -> dict:
    """Median milliseconds of forward and backward in both orders, and that loss and gradients agree."""
    pi05.expert_layer = layer
    policy = backbones.load_policy(HERE / "checkpoints" / "tiny_libero_object").requires_grad_(False)
    adapted(policy, targets or policy.adapter_targets)
    obs, *batch = dpo.batch_of(make_pairs(policy, 64), torch.arange(PAIRS))
    batch.append(policy.draws(PAIRS, DRAWS, common.stream(0, "draws"), "stratified"))
    orders = {"published": (published_loss, obs), "kit": (kit_loss, policy.begin(obs, PAIRS))}
    rows, results = {name: [] for name in orders}, {}
    for i in range(repeats + 1):
        for name, (loss_of, seen) in orders.items():
            policy.zero_grad()
            began = time.process_time()
            loss = loss_of(policy, seen, *batch)
            between = time.process_time()
            loss.backward()
            if i:  # warmed up
                rows[name].append((between - began, time.process_time() - between))
            results[name] = [
                loss.detach(),
                *(p.grad.clone() for p in policy.parameters() if p.grad is not None),
            ]
    for a, b in zip(results["published"], results["kit"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * max(1.0, a.abs().max().item()))
    both = zip(rows["published"], rows["kit"], strict=True)
    found = {
        f"{name}_{part}": 1e3 * statistics.median(r[i] for r in rows[name])
        for name in rows
        for i, part in enumerate(PARTS)
    }
    return found | {"ratio": statistics.median(sum(a) / sum(b) for a, b in both)}


def count(targets: str) -> dict:
    """Floating-point operations of a step of pi-0.5 at its published size, in both orders."""
    cfg = dpo.Config(adapter="lora", dtype="bfloat16", dry_run=True)
    policy = memory.make_policy(cfg, "")
    with torch.device("meta"):
        common.attach_adapter(policy, "lora", 32, 64, targets or policy.adapter_targets, 0)
    obs, *batch = dpo.batch_of(make_pairs(policy, 224, "meta"), torch.arange(PAIRS))
    batch.append(policy.draws(PAIRS, DRAWS, common.stream(0, "draws"), "stratified").to("meta"))
    found = {}
    for name, loss_of, seen in (
        ("published", published_loss, obs),
        ("kit", kit_loss, policy.begin(obs, PAIRS)),
    ):
        counters = [FlopCounterMode(display=False) for _ in PARTS]
        with counters[0]:
            loss = loss_of(policy, seen, *batch)
        with counters[1]:
            loss.backward()
        found |= {
            f"{name}_{part}": counter.get_total_flops() for part, counter in zip(PARTS, counters, strict=True)
        }
    kit, theirs = (sum(found[f"{name}_{part}"] for part in PARTS) for name in ("kit", "published"))
    return found | {"ratio": theirs / kit}


def main(repeats: int) -> None:
    torch.set_num_threads(1)
    layer, said = pi05.expert_layer, {}
    compiled = torch.compile(layer, dynamic=False)
    head = (
        "published: forward | backward | here: forward | backward | ratio of the sums |\n" + 6 * "|---" + "|"
    )
    tiny, counted = f"tiny policy, CPU ms a step, median of {repeats}", "pi-0.5, 10^12 operations a step"
    rows = {
        (tiny, "language model and expert"): lambda: bench("", layer, repeats),
        (tiny, "expert alone"): lambda: bench(EXPERT, layer, repeats),
        (tiny, "expert alone, its layers compiled by Torch in both orders"): lambda: bench(
            EXPERT, compiled, repeats
        ),
        (counted, "language model and expert"): lambda: count(""),
        (counted, "expert alone"): lambda: count(EXPERT),
    }
    for (title, where), measure in rows.items():
        if where == "language model and expert":
            print(f"\n| {title}; adapters in | {head}")
        r = said[f"{title.split(',')[0]}, {where}"] = measure()
        unit = 1e12 if title == counted else 1
        cells = [f"{r[f'{name}_{part}'] / unit:.4g}" for name in ("published", "kit") for part in PARTS]
        print(f"| {where} | {' | '.join(cells)} | {r['ratio']:.1f} |", flush=True)
    print()
    print(json.dumps({"repeats": repeats, "pairs": PAIRS, "draws": DRAWS} | said))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
