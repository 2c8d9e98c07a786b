"""Operations and bytes of a training step and of a look, and the GPU that the benchmarks name.

Until commit 8852e1c this was backbones/cost.py, and --dry-run printed hours with it. They were too short by a
factor of 2 to 37, since eager code waits for Python (results/profile/h100).
"""

import importlib

import torch

from backbones import memory

GPU, FLOPS, BANDWIDTH = "H100", 989e12, 3.35e12  # data sheet: dense bfloat16 per second, bytes per second
UTILISATION = 0.4  # share of FLOPS that well-run training reaches
Work = importlib.import_module("05_profile").Work


def work_of(cfg, stage: str) -> tuple[int, int]:
    """Operations, and bytes of weights, of a training step with all its passes, or of a look: from one
    observation to one chunk.
    """
    trained = getattr(cfg, memory.TRAINED.get(stage, ""), "")
    policy = memory.make_policy(cfg, trained)
    with torch.no_grad(), Work() as work:
        if trained:
            memory.FORWARD[stage](policy, cfg)
        else:
            prefix = policy.encode(memory.make_batch(policy, 1)[0])
            policy.sample_actions(prefix, policy.noise(1, torch.Generator()).to("meta"), cfg.denoise_steps)
    # behind the forward pass: the gradients of values, those of weights, the pass again, the reference
    others = [bool(trained), trained == "full", trained and cfg.recompute, stage == "dpo"]
    return (1 + others.count(True)) * work.flops, work.bytes
