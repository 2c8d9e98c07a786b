"""What --dry-run prints: memory (memory.py), and the least hours.

Hours follow the roofline model: operations and bytes of weights of the linear layers and of attention,
against a named GPU's rates. Operations limit training, bytes limit acting on one observation. Left out: the
simulator, and the time to launch kernels, which dominates eager code at batch 1. The image towers are counted
as part of every DPO step, though 03 runs them once: about a tenth too many. The hours say what the hardware
allows, not what a first run will take.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import common
from backbones import memory

GPU, FLOPS, BANDWIDTH = "H100", 989e12, 3.35e12  # data sheet: dense bfloat16 per second, bytes per second
UTILISATION = 0.4  # share of FLOPS that well-run training reaches


class Work(TorchFunctionMode):  # of linear layers and attention: operations, and bytes of weights read
    flops = bytes = 0

    def __torch_function__(self, function, types, arguments=(), kwargs=None):
        if function is F.linear:
            x, weight = arguments[:2]
            self.flops += 2 * x.numel() * weight.shape[0]
            self.bytes += weight.numel() * weight.element_size()
        if function is F.scaled_dot_product_attention:
            q, k = arguments[:2]
            self.flops += 4 * q.numel() * k.shape[-2]  # scores, then the sum of the values
        return function(*arguments, **(kwargs or {}))


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


def time_needed(cfg, stage: str) -> str:
    """One line: the least hours on the named GPU."""
    flops, read = work_of(cfg, stage)
    if stage in memory.FORWARD:
        return (
            f"{cfg.steps} steps x {flops / 1e12:.3g} TFLOP:"
            f" {cfg.steps * flops / FLOPS / UTILISATION / 3600:.2g} hours"
            f" on an {GPU} at {UTILISATION:.0%} of its peak"
        )
    seconds = max(flops / FLOPS / UTILISATION, read / BANDWIDTH)
    episodes = (
        len(cfg.tasks or range(10)) * cfg.n_init if stage != "prefs" else cfg.max_playouts / len(cfg.suites)
    )
    looks = episodes * sum(common.MAX_STEPS[suite] for suite in cfg.suites) / cfg.execute
    return (
        f"{looks:.0f} looks at most x {1000 * seconds:.2g} ms ({flops / 1e12:.2g} TFLOP, {read / 1e9:.2g} GB"
        f" of weights): {looks * seconds / 3600:.2g} hours on an {GPU} at best, the simulator apart"
    )


def report(cfg, stage: str) -> None:
    """Print the estimate of a stage, named by its section of the YAML."""
    if stage in memory.SIMULATING:
        print(f"{stage}: {memory.SIMULATOR_GB:.1f} GB of main memory for each of {cfg.workers} simulators")
    if stage == "demos":
        return
    counts = memory.estimate(cfg, stage)
    adapter = f"\nadapter in {counts['adapted_layers']} layers" if counts["adapted_layers"] else ""
    print(
        f"{stage}, {cfg.backbone}, {cfg.dtype}: {counts['parameters']:,} parameters,"
        f" {counts['trainable']:,} of them trained{adapter}"
    )
    rows = counts["parts"] | {"together": sum(counts["parts"].values())}
    many = f", in each of {cfg.workers} processes" if stage in memory.SIMULATING and cfg.workers > 1 else ""
    print(*(f"{part:>30}  {n / 2**30:9.3f} GiB" for part, n in rows.items()), sep="\n", end=f"{many}\n")
    if stage in (*memory.FORWARD, *memory.SIMULATING):
        print(time_needed(cfg, stage))
    if not (getattr(cfg, "checkpoint", "") or cfg.init_from or cfg.model):  # the published shapes
        print(
            f"to download: {counts['parameters'] * 2 / 1e9:.0f} GB in bfloat16;"
            " a checkpoint in float32 has twice that"
        )
