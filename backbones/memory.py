"""What a stage will take, in memory and hours, before anything is loaded.

    python 03_dpo.py configs/openvla_7b.yaml --dry-run

The policy is built on PyTorch's meta device, where tensors have a shape and no content. Weights, gradients
and the optimizer's state are counted there. So are the activations: the stage's own forward pass runs there,
and what autograd keeps is added up. With `recompute` two things come on top: the most that one layer keeps
while the backward pass is in it, and the gradients of the prefix's keys and values, which gather until the
pass reaches the prefix.

Left out: PyTorch itself (0.4 GB on a CPU, about 1 GB with CUDA), the allocator's slack, the kernels'
workspaces, the data. The image towers are counted as part of every DPO step. But 03 runs them once and keeps
the tokens of all pairs: so the hours are about a tenth too many, and the memory lacks those tokens.

Hours follow the roofline model: operations and bytes of weights of the linear layers and of attention,
against a named GPU's rates. Operations limit training, bytes limit acting on one observation. Left out: the
simulator, and the time to launch kernels, which dominates eager code at batch 1. The hours say what the
hardware allows, not what a first run will take.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import common
from backbones.models import build
from backbones.policy import STATE_DIM, build_tokenizer
from backbones.published import sizes
from runtime.config import laid_over

SIMULATOR_GB = 2.4  # of one LIBERO process, measured
PYTORCH_GB = 0.6  # of a process that has loaded nothing else
GPU, FLOPS, BANDWIDTH = (
    "H100",
    989e12,
    3.35e12,
)  # NVIDIA's data sheet: dense bfloat16 per second, bytes per second
UTILISATION = 0.4  # share of FLOPS that well-run training reaches
INSTRUCTION = "put both the alphabet soup and the tomato sauce in the basket"  # one of the longest
SIMULATING = ("demos", "prefs", "eval", "cells")  # sections of stages whose workers each have a simulator
PIXELS = 64  # of images for counting; a policy resizes them


def size(tensors) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


# ------------------------------------------------------------------------------- a policy and a batch to count
def make_policy(cfg, trained: str) -> nn.Module:
    """The config's policy on the meta device, in its dtype. trained: "full", "lora", "dora" or "" (nothing)."""
    start = getattr(cfg, "checkpoint", "") or cfg.init_from
    model = laid_over(sizes(Path(start)), cfg.model) if start else cfg.model
    from_scratch = model and "vocab_size" not in model  # one instruction has about as many words as LIBERO's
    with torch.device("meta"):
        policy = build(cfg.backbone, model, [INSTRUCTION] if from_scratch else None)
        policy.cast("float32" if trained == "full" else cfg.dtype)
        policy.requires_grad_(trained == "full")
        if trained in ("lora", "dora"):
            targets = getattr(cfg, "targets", "") or policy.adapter_targets
            common.attach_adapter(policy, trained, cfg.rank, cfg.alpha, targets, cfg.seed)
    policy.recompute = getattr(cfg, "recompute", False)
    policy.tokenizer = build_tokenizer([INSTRUCTION])
    for kind, n in (("action", common.ACTION_DIM), ("state", STATE_DIM)):
        zeros, ones = [0.0] * n, [1.0] * n
        policy.norm_stats[kind] = {"q01": [-1.0] * n, "q99": ones, "mean": zeros, "std": ones}
    return policy


def make_batch(policy, n: int, device: str) -> tuple[tuple, Tensor, Tensor]:
    """Prefix inputs of n observations, chunks (n, H, 7) and mask (n, H), on `device`."""
    image = torch.zeros(n, PIXELS, PIXELS, 3, dtype=torch.uint8)
    obs = dict.fromkeys(common.CAMERAS, image)
    obs |= {"state": torch.zeros(n, STATE_DIM), "instruction": [INSTRUCTION] * n}
    inputs = tuple(None if x is None else x.to(device) for x in policy.inputs(obs))
    chunk = torch.zeros(n, policy.horizon, policy.action_dim, device=device)
    return inputs, chunk, torch.ones(n, policy.horizon, dtype=torch.bool, device=device)


def sft_forward(policy, cfg, device: str = "meta") -> Tensor:
    """What 01_sft.py differentiates."""
    inputs, chunk, mask = make_batch(policy, cfg.batch_size, device)
    draws = policy.draws(len(chunk), cfg.draws, torch.Generator(), "beta")
    return policy.sft_loss(policy.prefix(*inputs), chunk, draws, mask)


def dpo_forward(policy, cfg, device: str = "meta") -> Tensor:
    """What 03_dpo.py differentiates: both chunks of each pair, behind one prefix or one each."""
    inputs, chunk, mask = make_batch(policy, cfg.batch_size, device)
    draws = policy.draws(len(chunk), cfg.draws, torch.Generator(), "stratified")
    if cfg.surrogate == "independent":
        terms = [policy.log_prob(policy.prefix(*inputs), chunk, draws, mask, "velocity") for _ in range(2)]
        return torch.cat(terms).sum()
    prefix = policy.prefix(*inputs).select(torch.arange(len(chunk), device=device).repeat(2))
    both = None if draws is None else draws.repeat(2)
    return policy.log_prob(prefix, chunk.repeat(2, 1, 1), both, mask.repeat(2, 1), "velocity").sum()


FORWARD = {"sft": sft_forward, "dpo": dpo_forward}


# ----------------------------------------------------------------------------------------------------- memory
class FusedAttention(TorchFunctionMode):
    """Attention as CPUs and GPUs run it, which keeps one sum per row; the meta device's keeps all weights."""

    def __torch_function__(self, function, types, arguments=(), kwargs=None):
        options = kwargs or {}
        if function is not F.scaled_dot_product_attention or not arguments[0].is_meta:
            return function(*arguments, **options)
        q, k, v = arguments
        mask = options.get("attn_mask")
        if mask is not None and not mask.is_floating_point():
            mask = torch.zeros_like(mask, dtype=q.dtype)
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attention(q, k, v, 0.0, options.get("is_causal", False), attn_mask=mask)[0]


def kept_for_backward(policy, forward) -> int:
    """Bytes of the distinct storages that autograd keeps of forward(), weights apart."""
    weights = {t.untyped_storage()._cdata for t in [*policy.parameters(), *policy.buffers()]}
    kept, once, most = {}, {}, 0

    def keep(tensor: Tensor, where: dict) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            where[storage._cdata] = storage  # a reference, so that no other storage gets this address
        return tensor

    def saving(where: dict):
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: keep(tensor, where), lambda tensor: tensor
        )

    def counted(layer, *arguments):
        nonlocal most
        if policy.recompute:  # a layer that will run again keeps its arguments instead
            for leaf in tree_leaves(arguments):
                if isinstance(leaf, Tensor):
                    keep(leaf, kept)
            with saving(once):
                layer(*arguments)
            most = max(most, sum(storage.nbytes() for key, storage in once.items() if key not in kept))
            once.clear()
        return type(policy).run(policy, layer, *arguments)

    policy.run = counted
    with FusedAttention(), saving(kept):
        out = forward()
    del policy.run
    return sum(storage.nbytes() for storage in kept.values()) + most + size([out])


def estimate(cfg, stage: str) -> dict:
    """Bytes by part, and counts. stage: "sft", "dpo", or another one, which only runs the policy."""
    trained = {"sft": getattr(cfg, "train", ""), "dpo": getattr(cfg, "adapter", "")}.get(stage, "")
    policy = make_policy(cfg, trained)
    trainable = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    parts = {"weights": size(policy.parameters())}
    with torch.no_grad():
        prefix = policy.prefix(*make_batch(policy, 1, "meta")[0])
    of_one = size([prefix.keys, prefix.values])
    if trained:
        moments = 2 * size(trainable.values())
        parts |= {"gradients": size(trainable.values()), "AdamW's moments": moments}
        if stage == "sft":
            parts["averaged copy"] = parts["weights"]
        parts["activations"] = kept_for_backward(policy, lambda: FORWARD[stage](policy, cfg))
        if not all(name.startswith("expert.") for name in trainable):
            chunks = cfg.batch_size * (2 if stage == "dpo" else 1)
            parts["gradients of keys and values"] = chunks * of_one
    else:
        parts["keys and values"] = of_one
    if stage == "distill":
        parts["the student's weights"] = parts["weights"]
    return {
        "parts": parts,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "trainable": sum(p.numel() for p in trainable.values()),
        "adapted_layers": sum(name.endswith("weight") and "lora_A" in name for name in trainable),
    }


# ------------------------------------------------------------------------------------------------------ hours
class Work(TorchFunctionMode):
    """Counts what linear layers and attention do: operations, and bytes of weights read."""

    def __init__(self):
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_function__(self, function, types, arguments=(), kwargs=None):
        if function is F.linear:
            x, weight = arguments[:2]
            self.flops += 2 * x.numel() * weight.shape[0]
            self.bytes += weight.numel() * weight.element_size()
        if function is F.scaled_dot_product_attention:
            q, k = arguments[:2]
            self.flops += 4 * q.numel() * k.shape[-2]  # scores, then the sum of the values
        return function(*arguments, **(kwargs or {}))


def work_of_training(cfg, stage: str) -> tuple[float, str]:
    """Operations of all steps, and the sum that gives them."""
    policy = make_policy(cfg, cfg.train if stage == "sft" else cfg.adapter)
    with torch.no_grad(), Work() as work:
        FORWARD[stage](policy, cfg)
    full = stage == "sft" and cfg.train == "full"  # otherwise no gradients of the weights, half the pass
    passes = {"forward": 1, "backward": 2 if full else 1, "again": int(cfg.recompute)}
    passes["reference"] = int(stage == "dpo")
    terms = " + ".join(f"{n} {name}" for name, n in passes.items() if n)
    of_one = f"{work.flops / 1e12:.3g} TFLOP"
    return cfg.steps * sum(passes.values()) * work.flops, f"{cfg.steps} steps x ({terms}) x {of_one}"


def work_of_a_look(cfg) -> tuple[float, float]:
    """Operations, and bytes of weights, from one observation to one chunk."""
    policy = make_policy(cfg, "")
    noise = policy.noise(1, torch.Generator()).to("meta")
    with torch.no_grad(), Work() as work:
        prefix = policy.prefix(*make_batch(policy, 1, "meta")[0])
        policy.sample_actions(prefix, noise, cfg.denoise_steps)
    return work.flops, work.bytes


def time_needed(cfg, stage: str) -> str:
    """One line: the least hours on the named GPU."""
    if stage in FORWARD:
        flops, terms = work_of_training(cfg, stage)
        hours = flops / FLOPS / UTILISATION / 3600
        return f"{terms}: {hours:.2g} hours on an {GPU} at {UTILISATION:.0%} of its peak"
    flops, read = work_of_a_look(cfg)
    seconds = max(flops / FLOPS / UTILISATION, read / BANDWIDTH)
    steps = [common.MAX_STEPS[suite] for suite in cfg.suites]
    tasks = len(cfg.suites) * len(cfg.tasks or range(10))
    episodes = cfg.max_playouts if stage == "prefs" else tasks * cfg.n_init
    looks = episodes * sum(steps) / len(steps) / cfg.execute
    work = f"{flops / 1e12:.2g} TFLOP, {read / 1e9:.2g} GB of weights"
    terms = f"{looks:.0f} looks at most x {1000 * seconds:.2g} ms ({work})"
    hours = looks * seconds / 3600
    return f"{terms}: {hours:.2g} hours on an {GPU} at best, without the simulator"


def report(cfg, stage: str) -> None:
    """Print the estimate of a stage, named by its section of the YAML."""
    if stage in SIMULATING:
        print(f"{stage}: {SIMULATOR_GB:.1f} GB of main memory for each of {cfg.workers} simulators")
    if stage == "demos":
        return
    counts = estimate(cfg, stage)
    parameters = f"{counts['parameters']:,} parameters, {counts['trainable']:,} of them trained"
    print(f"{stage}, {cfg.backbone}, {cfg.dtype}: {parameters}")
    if counts["adapted_layers"]:
        print(f"adapter in {counts['adapted_layers']} layers")
    for part, n in counts["parts"].items():
        print(f"{part:>30}  {n / 2**30:9.3f} GiB")
    many = f", in each of {cfg.workers} processes" if stage in SIMULATING and cfg.workers > 1 else ""
    print(f"{'together':>30}  {sum(counts['parts'].values()) / 2**30:9.3f} GiB{many}")
    if stage in (*FORWARD, *SIMULATING):
        print(time_needed(cfg, stage))
    if not (getattr(cfg, "checkpoint", "") or cfg.init_from or cfg.model):  # the published shapes
        download = f"{counts['parameters'] * 2 / 1e9:.0f} GB in bfloat16"
        print(f"to download: {download}; a checkpoint in float32 has twice that")


# --------------------------------------------------------------------- extras/preflight.py: is there enough?
def free_memory(device: str) -> int:
    """Free bytes of the GPU, or of main memory: the system's count, or what the container's limit leaves."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    free, groups = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    old = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    for limit, used in (("memory.max", "memory.current"), old):
        if (groups / limit).is_file() and (most := (groups / limit).read_text().strip()).isdigit():
            stat = (groups / limit).with_name("memory.stat").read_text()
            counts = dict(line.split() for line in stat.splitlines())
            cache = int(counts.get("inactive_file", 0))  # of files; the system frees it when it is needed
            free = min(free, int(most) - int((groups / used).read_text()) + cache)
    return free


def memory_needed(cfgs: dict) -> dict[str, tuple[int, int]]:
    """Stage -> bytes of main memory, and of the GPU where its config uses one."""
    needs = {}
    for stage, cfg in cfgs.items():
        model = 0
        if stage != "demos" and not (stage == "sft" and cfgs["dpo"].checkpoint):  # then there is no SFT
            model = sum(estimate(cfg, stage)["parts"].values())
        processes = cfg.workers if stage in SIMULATING else 1
        program = 1e9 * (SIMULATOR_GB if stage in SIMULATING else PYTORCH_GB)
        on_gpu = processes * model if getattr(cfg, "device", "cpu") == "cuda" else 0
        needs[stage] = int(processes * (program + model) - on_gpu), on_gpu
    return needs


def check_memory(cfgs: dict) -> tuple[bool, str]:
    """Whether the stage that takes most fits, and a line for preflight.py."""
    needs, words, fits = memory_needed(cfgs), [], True
    for i, device in enumerate(dict.fromkeys(["cpu", cfgs["eval"].device])):
        stage = max(needs, key=lambda name: needs[name][i])
        need, free = needs[stage][i], free_memory(device)
        fits &= need <= free
        what = "main memory" if device == "cpu" else "GPU memory"
        words.append(f"{stage} takes {need / 2**30:.1f} GiB of {what}, {free / 2**30:.1f} are free")
    remedy = "" if fits else "; lower workers or the stage's batch_size, or set its recompute (see --dry-run)"
    return fits, "; ".join(words) + remedy


def disk_needed(cfgs: dict) -> int:
    """Bytes of a run folder at its fullest, nothing compressed: demonstrations and pairs while their parts
    are merged, weights, and two states of a training while the second is written.
    """
    demos, sft, prefs = cfgs["demos"], cfgs["sft"], cfgs["prefs"]
    frame = 2 * 3 * demos.image_size**2
    episodes = len(demos.suites) * len(demos.tasks or range(10)) * demos.n_init * demos.demos_per_init
    total = 2 * prefs.n_pairs * frame + 50 * 10**6  # pairs; videos, logs, the report
    if not demos.source:
        total += 2 * frame * episodes * 120 / demos.frame_every  # 120 steps: about the mean
    if not cfgs["dpo"].checkpoint:
        weights = estimate(sft, "sft")["parts"]["weights"]
        total += (
            1 + len(sft.snapshots)
        ) * weights + 2 * 4 * weights  # policy, average and two moments, twice
    return int(total)


def check_disk(cfgs: dict) -> tuple[bool, str]:
    """Whether the disk under `root` takes a run, and a line for preflight.py."""
    root = Path(cfgs["demos"].root).absolute()
    there = next(folder for folder in (root, *root.parents) if folder.is_dir())
    need, free = disk_needed(cfgs), shutil.disk_usage(there).free
    words = f"a run takes {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free in {there}"
    if need > free:
        words += "; make room, or name another disk with root="
    return need <= free, words
