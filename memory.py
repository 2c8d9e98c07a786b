"""What a stage will take, in memory and hours, before anything is loaded: `python 03_dpo.py configs/openvla_7b.yaml --dry-run`.

The policy is built on PyTorch's meta device, where tensors have a shape and no content. Weights, gradients and the optimiser's
state are counted off it; so are the activations, by running the stage's own forward pass there and adding up what autograd keeps.
With `recompute` the most that one layer keeps while the backward pass is at it comes on top; and the gradients of the prefix's
keys and values, which gather there until the pass reaches the prefix. Not in it: PyTorch itself (0.4 GB on a CPU, about 1 GB
with CUDA), the allocator's slack, kernels' workspaces, the data. Of DPO's step the image towers are counted as if they ran in it;
03 runs them once, and keeps the tokens of all pairs instead: hours are about a tenth too many, memory those tokens too little.

Hours are a roofline's: operations and bytes of weights of the linear layers and of attention, counted in the same way, against
a named GPU's rates. Training is bound by the first, acting on one observation by the second. Not in it: the simulator, and the
launching of kernels, which dominates eager code at batch 1. It says what the hardware allows, not what a first run will take.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import backbones
import common

SIMULATOR_GB = 2.4  # of one LIBERO process, measured
PYTORCH_GB = 0.6  # of a process that has loaded nothing else
GPU, FLOPS, BANDWIDTH = "H100", 989e12, 3.35e12  # NVIDIA's data sheet: dense bfloat16 per second, bytes per second
UTILISATION = 0.4  # of FLOPS, which well-run training reaches
INSTRUCTION = "put both the alphabet soup and the tomato sauce in the basket"  # one of the longest


def size(tensors) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def make_policy(cfg, trained: str) -> nn.Module:
    """The config's policy without content, in the dtype it would have. trained: "full", "lora", "dora" or "" (nothing)."""
    model = cfg.model
    if start := cfg.checkpoint or cfg.init_from:
        from backbones import published

        model = common.laid_over(published.sizes(Path(start)), cfg.model)
    words = None if "vocab_size" in model or not model else [INSTRUCTION]  # from scratch: about as many as LIBERO's
    with torch.device("meta"):
        policy = backbones.build(cfg.backbone, model, words)
        policy.cast("float32" if trained == "full" else cfg.dtype)
        policy.requires_grad_(trained == "full")
        if trained in ("lora", "dora"):
            targets = getattr(cfg, "targets", "") or policy.adapter_targets
            common.attach_adapter(policy, trained, cfg.rank, cfg.alpha, targets, cfg.seed)
    policy.recompute = getattr(cfg, "recompute", False)
    policy.tokenizer = backbones.build_tokenizer([INSTRUCTION])
    policy.norm_stats = {
        kind: {"q01": [-1.0] * n, "q99": [1.0] * n, "mean": [0.0] * n, "std": [1.0] * n}
        for kind, n in (("action", 7), ("state", 8))
    }
    return policy


def make_batch(policy, cfg, n: int, device: str) -> tuple[tuple, Tensor, Tensor]:
    """Prefix inputs of n observations, chunks (n, H, 7) and mask (n, H), on `device`."""
    image = torch.zeros(n, cfg.image_size, cfg.image_size, 3, dtype=torch.uint8)
    obs = {"agentview": image, "wrist": image, "state": torch.zeros(n, 8), "instruction": [INSTRUCTION] * n}
    inputs = tuple(None if x is None else x.to(device) for x in policy.inputs(obs))
    return (
        inputs,
        torch.zeros(n, policy.horizon, 7, device=device),
        torch.ones(n, policy.horizon, dtype=torch.bool, device=device),
    )


def sft_forward(policy, cfg, device: str = "meta") -> Tensor:
    """What 01_sft.py differentiates."""
    inputs, chunk, mask = make_batch(policy, cfg, cfg.batch_size, device)
    draws = policy.draws(len(chunk), cfg.draws, torch.Generator(), "beta")
    return policy.sft_loss(policy.prefix(*inputs), chunk, draws, mask)


def dpo_forward(policy, cfg, device: str = "meta") -> Tensor:
    """What 03_dpo.py differentiates: both chunks of each pair, behind one prefix or one each."""
    inputs, chunk, mask = make_batch(policy, cfg, cfg.batch_size, device)
    draws = policy.draws(len(chunk), cfg.draws, torch.Generator(), "stratified")
    if cfg.surrogate == "independent":
        terms = [policy.log_prob(policy.prefix(*inputs), chunk, draws, mask, "velocity") for _ in range(2)]
        return torch.cat(terms).sum()
    prefix = policy.prefix(*inputs).select(torch.arange(len(chunk), device=device).repeat(2))
    both = None if draws is None else draws.repeat(2)
    return policy.log_prob(prefix, chunk.repeat(2, 1, 1), both, mask.repeat(2, 1), "velocity").sum()


class FusedAttention(TorchFunctionMode):
    """On the meta device attention is the one that keeps all its weights; what runs on CPUs and GPUs keeps a row's sum."""

    def __torch_function__(self, function, types, arguments=(), kwargs=None):
        if function is not F.scaled_dot_product_attention or not arguments[0].is_meta:
            return function(*arguments, **(kwargs or {}))
        q, k, v = arguments
        mask, causal = (kwargs or {}).get("attn_mask"), (kwargs or {}).get("is_causal", False)
        mask = mask if mask is None or mask.is_floating_point() else torch.zeros_like(mask, dtype=q.dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)[0]


def kept_for_backward(policy, forward) -> int:
    """Bytes of the distinct storages that autograd keeps of forward(), weights apart."""
    weights = {t.untyped_storage()._cdata for t in [*policy.parameters(), *policy.buffers()]}
    kept, once, most = {}, {}, 0

    def keep(tensor: Tensor, where: dict) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            where[storage._cdata] = storage  # held, so that no other takes its place
        return tensor

    def counted(layer, *arguments):  # a layer that is run again keeps its arguments instead
        nonlocal most
        if policy.recompute:
            for leaf in tree_leaves(arguments):
                if isinstance(leaf, Tensor):
                    keep(leaf, kept)
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: keep(tensor, once), lambda tensor: tensor):
                layer(*arguments)
            most = max(most, sum(storage.nbytes() for which, storage in once.items() if which not in kept))
            once.clear()
        return type(policy).run(policy, layer, *arguments)

    policy.run = counted
    with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: keep(tensor, kept), lambda tensor: tensor):
        out = forward()
    del policy.run
    return sum(storage.nbytes() for storage in kept.values()) + most + size([out])


def estimate(cfg, stage: str) -> dict:
    """Bytes by part, and what there is to count. stage: "sft", "dpo", or another one, which only runs the policy."""
    trained = {"sft": getattr(cfg, "train", ""), "dpo": cfg.adapter}.get(stage, "")
    policy = make_policy(cfg, trained)
    trainable = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    parts = {"weights": size(policy.parameters())}
    if trained:
        forward = {"sft": sft_forward, "dpo": dpo_forward}[stage]
        parts |= {"gradients": size(trainable.values()), "AdamW's moments": 2 * size(trainable.values())}
        parts |= {"averaged copy": size(policy.parameters())} if stage == "sft" else {}
        parts["activations"] = kept_for_backward(policy, lambda: forward(policy, cfg))
    with torch.no_grad():
        inputs, _, _ = make_batch(policy, cfg, 1, "meta")
        prefix = policy.prefix(*inputs)
    of_one = size([prefix.keys, prefix.values])
    if not trained:
        parts["keys and values"] = of_one
    elif not all(name.startswith("expert.") for name in trainable):
        parts["gradients of keys and values"] = cfg.batch_size * {"sft": 1, "dpo": 2}[stage] * of_one
    layers = sum("lora_A" in name and name.endswith("weight") for name, _ in policy.named_parameters())
    counts = {"parameters": sum(p.numel() for p in policy.parameters()), "trainable": sum(p.numel() for p in trainable.values())}
    return {"parts": parts, "adapted_layers": layers} | counts


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
    """Operations of all steps, and how they come about."""
    policy = make_policy(cfg, cfg.train if stage == "sft" else cfg.adapter)
    with torch.no_grad(), Work() as work:
        {"sft": sft_forward, "dpo": dpo_forward}[stage](policy, cfg)
    full = stage == "sft" and cfg.train == "full"
    passes = {"forward": 1, "backward": 2 if full else 1, "again": int(cfg.recompute), "reference": int(stage == "dpo")}
    said = " + ".join(f"{n} {name}" for name, n in passes.items() if n)
    return cfg.steps * sum(passes.values()) * work.flops, f"{cfg.steps} steps x ({said}) x {work.flops / 1e12:.3g} TFLOP"


def work_of_a_look(cfg) -> tuple[float, float]:
    """Operations, and bytes of weights, from one observation to one chunk."""
    policy = make_policy(cfg, "")
    noise = policy.noise(1, torch.Generator())
    with torch.no_grad(), Work() as work:
        inputs, _, _ = make_batch(policy, cfg, 1, "meta")
        policy.sample_actions(policy.prefix(*inputs), noise.to("meta"), cfg.denoise_steps)
    return work.flops, work.bytes


def time_needed(cfg, stage: str) -> str:
    """One line: the least hours on the named GPU."""
    if stage in ("sft", "dpo"):
        flops, said = work_of_training(cfg, stage)
        return f"{said}: {flops / FLOPS / UTILISATION / 3600:.2g} hours on an {GPU} at {UTILISATION:.0%} of its peak"
    flops, read = work_of_a_look(cfg)
    seconds = max(flops / FLOPS / UTILISATION, read / BANDWIDTH)
    steps = [common.MAX_STEPS[suite] for suite in cfg.suites]
    episodes = cfg.max_playouts if stage == "prefs" else len(cfg.suites) * len(cfg.tasks or range(10)) * cfg.n_init
    looks = episodes * sum(steps) / len(steps) / cfg.execute
    said = f"{looks:.0f} looks at most x {1000 * seconds:.2g} ms ({flops / 1e12:.2g} TFLOP, {read / 1e9:.2g} GB of weights)"
    return f"{said}: {looks * seconds / 3600:.2g} hours on an {GPU} at best, the simulator apart"


def report(cfg, stage: str) -> None:
    """Print the estimate."""
    if stage in ("demos", "prefs", "eval"):
        print(f"{stage}: {SIMULATOR_GB:.1f} GB of main memory for each of {cfg.workers} simulators")
    if stage == "demos":
        return
    found = estimate(cfg, stage)
    print(f"{stage}, {cfg.backbone}, {cfg.dtype}: {found['parameters']:,} parameters, {found['trainable']:,} of them trained")
    if found["adapted_layers"]:
        print(f"adapter in {found['adapted_layers']} layers")
    processes = cfg.workers if stage in ("prefs", "eval") else 1
    for part, n in found["parts"].items():
        print(f"{part:>30}  {n / 2**30:9.3f} GiB")
    total = sum(found["parts"].values())
    print(f"{'together':>30}  {total / 2**30:9.3f} GiB{f', in each of {processes} processes' if processes > 1 else ''}")
    if stage in ("sft", "dpo", "prefs", "eval"):
        print(time_needed(cfg, stage))
    if not (cfg.checkpoint or cfg.init_from or cfg.model):  # the published shapes
        print(f"to download: {found['parameters'] * 2 / 1e9:.0f} GB in bfloat16; a checkpoint in float32 has twice that")


# ------------------------------------------------------------------------------------------------ what there is beforehand
def free_memory(device: str) -> int:
    """Bytes that may still be taken: of the GPU, or of main memory by the system's count and the container's limit."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    free, groups = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        if (groups / limit).is_file() and (most := (groups / limit).read_text().strip()).isdigit():
            counts = dict(line.split() for line in (groups / limit).with_name("memory.stat").read_text().splitlines())
            cache = int(counts.get("inactive_file", 0))  # of files, given back when it is needed
            free = min(free, int(most) - int((groups / used).read_text()) + cache)
    return free


def memory_needed(cfgs: dict) -> dict[str, tuple[int, int]]:
    """Bytes by stage, from the config of each: of main memory, and of the GPU where the config is for one."""
    found = {}
    for stage, cfg in cfgs.items():
        model = 0 if stage == "demos" or (stage == "sft" and cfg.checkpoint) else sum(estimate(cfg, stage)["parts"].values())
        processes = cfg.workers if stage in ("demos", "prefs", "eval") else 1
        simulator = SIMULATOR_GB if stage in ("demos", "prefs", "eval") else PYTORCH_GB
        on_gpu = processes * model * (cfg.device == "cuda")
        found[stage] = int(processes * (simulator * 1e9 + model) - on_gpu), on_gpu
    return found


def check_memory(cfgs: dict) -> tuple[bool, str]:
    """Whether the hungriest stage fits, as preflight.py says it."""
    needs, said, fits = memory_needed(cfgs), [], True
    for i, device in enumerate(dict.fromkeys(["cpu", cfgs["eval"].device])):
        stage = max(needs, key=lambda name: needs[name][i])
        need, free = needs[stage][i], free_memory(device)
        fits &= need <= free
        what = "main memory" if device == "cpu" else "GPU memory"
        said.append(f"{stage} takes {need / 2**30:.1f} GiB of {what}, {free / 2**30:.1f} are free")
    remedy = "" if fits else "; lower workers or the stage's batch_size, or set its recompute (see --dry-run)"
    return fits, "; ".join(said) + remedy


def disk_needed(cfgs: dict) -> int:
    """Bytes of a run folder at its fullest, nothing compressed: demonstrations while their parts are merged, pairs while theirs
    are, weights, a training's state while the next one is written."""
    demos, sft, prefs = cfgs["demos"], cfgs["sft"], cfgs["prefs"]
    frame, tasks = 2 * 3 * demos.image_size**2, len(demos.suites) * len(demos.tasks or range(10))
    frames = tasks * demos.n_init * demos.demos_per_init * 120 / demos.frame_every  # of 120 steps, about the mean
    total = 0 if demos.source else 2 * frames * frame
    total += 2 * prefs.n_pairs * frame
    if not sft.checkpoint:
        weights = estimate(sft, "sft")["parts"]["weights"]
        total += (1 + len(sft.snapshots)) * weights + 2 * 4 * weights  # policy, average and two moments, twice
    return int(total) + 50 * 10**6  # videos, logs, the report


def check_disk(cfgs: dict) -> tuple[bool, str]:
    """Whether the disk under `root` takes a run, as preflight.py says it."""
    root = Path(cfgs["demos"].root).absolute()
    there = next(folder for folder in (root, *root.parents) if folder.is_dir())
    need, free = disk_needed(cfgs), shutil.disk_usage(there).free
    said = f"a run takes {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free in {there}"
    return need <= free, said if need <= free else f"{said}; make room, or name another disk with root="
