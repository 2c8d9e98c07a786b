"""What a stage will take of memory, before anything is loaded.

    python 03_dpo.py configs/openvla_7b.yaml --dry-run

The policy is built on PyTorch's meta device, where tensors have a shape and no content. Weights, gradients
and the optimizer's state are counted there. So are the activations: a forward pass like the stage's runs
there, and what autograd keeps is added up. The prefix's keys and values also have gradients, which pile up
until the backward pass reaches them. With `recompute` the backward pass runs one layer at a time again, and
the layer that keeps most is counted.

Left out: PyTorch itself (0.4 GB on a CPU, about 1 GB with CUDA), the allocator's slack, the kernels'
workspaces, the data. The image towers are counted as part of every DPO step. But 03 runs them once and keeps
the tokens of all pairs, which are not counted. Activations are those of the whole batch, which several
processes share. surrogate=exact needs more than is said: it keeps 2 x ode_steps passes and their derivatives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import common
from backbones.load import build, load_policy, weights_of
from backbones.policy import DIMS, build_tokenizer

INSTRUCTION = "put both the alphabet soup and the tomato sauce in the basket"  # one of the longest


def size(tensors) -> int:  # bytes
    return sum(t.numel() * t.element_size() for t in tensors)


# ------------------------------------------------------------------------------ a policy and a batch to count
def make_policy(cfg, trained: str) -> nn.Module:
    """The config's policy on the meta device. trained: "full", "lora", "dora" or "" (nothing)."""
    checkpoint, model = getattr(cfg, "checkpoint", ""), cfg.model
    from_scratch = model and "vocab_size" not in model  # one instruction has about as many words as LIBERO's
    with torch.device("meta"):
        if start := checkpoint or cfg.init_from:
            weights = weights_of(cfg.start if checkpoint else "final")
            policy = load_policy(start, weights, model, cfg.suites, read=False).train()
        else:
            policy = build(cfg.backbone, model, [INSTRUCTION] if from_scratch else None)
        policy.cast("float32" if trained == "full" else cfg.dtype)
        policy.requires_grad_(trained == "full")
        if trained in ("lora", "dora"):
            common.attach_adapter(
                policy,
                trained,
                cfg.rank,
                cfg.alpha,
                policy.adapter_targets,
                cfg.seed,
            )
    policy.recompute = getattr(cfg, "recompute", False)
    policy.tokenizer = policy.tokenizer or build_tokenizer([INSTRUCTION])
    policy.norm_stats = policy.norm_stats or {
        kind: dict.fromkeys(("q01", "min", "mean"), [-1.0] * n)
        | dict.fromkeys(("q99", "max", "std"), [1.0] * n)
        for kind, n in DIMS.items()
    }
    return policy


def make_batch(policy, n: int) -> tuple[dict, Tensor, Tensor]:
    # n observations, chunks (n, H, 7) and mask (n, H); the policy resizes the images
    return (
        dict.fromkeys(common.CAMERAS, torch.zeros(n, 64, 64, 3, dtype=torch.uint8))
        | {"state": torch.zeros(n, DIMS["state"]), "instruction": [INSTRUCTION] * n},
        torch.zeros(n, policy.horizon, common.ACTION_DIM),
        torch.ones(n, policy.horizon, dtype=torch.bool),
    )


def sft_forward(policy, cfg) -> Tensor:  # what 01_sft.py differentiates, and grpo: a chunk per observation
    obs, chunk, _ = make_batch(policy, cfg.batch_size)
    return policy.sft_loss(
        policy.encode(obs), chunk, policy.draws(len(chunk), cfg.draws, torch.Generator(), "beta")
    )


def dpo_forward(policy, cfg) -> Tensor:
    """What 03_dpo.py differentiates: both chunks of each pair, behind one prefix or one each."""
    obs, chunk, mask = make_batch(policy, cfg.batch_size)
    draws = policy.draws(len(chunk), cfg.draws, torch.Generator(), "stratified")
    if cfg.surrogate == "independent":
        return torch.cat(
            [policy.log_prob(policy.encode(obs), chunk, draws, mask, "velocity") for _ in range(2)]
        ).sum()
    prefix = policy.encode(obs).select(torch.arange(len(chunk)).repeat(2))
    draws = None if draws is None else draws.repeat(2)
    return policy.log_prob(prefix, chunk.repeat(2, 1, 1), draws, mask.repeat(2, 1), "velocity").sum()


FORWARD = {"sft": sft_forward, "dpo": dpo_forward, "grpo": sft_forward}
# the config key that says what a stage trains
TRAINED = {"sft": "train", "dpo": "adapter", "grpo": "adapter"}


# ----------------------------------------------------------------------------------------------------- memory
class FusedAttention(TorchFunctionMode):
    """Attention as CPUs and GPUs run it, which keeps one sum per row; the meta device's keeps all weights."""

    def __torch_function__(self, function, types, arguments=(), kwargs=None):
        options = kwargs or {}
        if function is not F.scaled_dot_product_attention or not arguments[0].is_meta:
            return function(*arguments, **options)
        mask, causal = options.get("attn_mask"), options.get("is_causal", False)
        if mask is not None and not mask.is_floating_point():
            mask = torch.zeros_like(mask, dtype=arguments[0].dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *arguments, 0.0, causal, attn_mask=mask
        )[0]


def kept_for_backward(policy, forward) -> int:
    """Bytes of the distinct storages that autograd keeps of forward(), weights apart."""
    weights = {t.untyped_storage()._cdata for t in [*policy.parameters(), *policy.buffers()]}
    kept, once, peaks = {}, {}, [0]

    def keep(tensor: Tensor, where: dict) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            where[storage._cdata] = storage  # a reference, so that no other storage gets this address
        return tensor

    def counted(layer, *arguments):
        if policy.recompute:  # a layer that will run again keeps its arguments instead
            for tensor in [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]:
                keep(tensor, kept)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: keep(t, once), lambda t: t):
                layer(*arguments)
            peaks.append(sum(storage.nbytes() for key, storage in once.items() if key not in kept))
            once.clear()
        return type(policy).run(policy, layer, *arguments)

    policy.run = counted
    with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(lambda t: keep(t, kept), lambda t: t):
        out = forward()
    del policy.run
    return sum(storage.nbytes() for storage in kept.values()) + max(peaks) + size([out])


def estimate(cfg, stage: str) -> dict:
    """Bytes by part, and counts. stage: "sft", "dpo", "grpo", or one that only runs the policy."""
    policy = make_policy(cfg, getattr(cfg, TRAINED.get(stage, ""), ""))
    trainable = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    with torch.no_grad():
        prefix = policy.encode(make_batch(policy, 1)[0])
    weights, gradients = size(policy.parameters()), size(trainable.values())
    of_one, chunks = size([prefix.keys, prefix.values]), 2 if stage == "dpo" else 1
    parts = {
        "weights": weights,
        "gradients": gradients,
        "AdamW's moments": 2 * gradients,
        "averaged copy": weights if stage == "sft" else 0,
        "activations": kept_for_backward(policy, lambda: FORWARD[stage](policy, cfg)) if trainable else 0,
        "gradients of keys and values": chunks * cfg.batch_size * of_one if trainable else 0,
        "keys and values": 0 if trainable else of_one,
        "the student's weights": weights if stage == "distill" else 0,
    }
    return {
        "parts": {part: n for part, n in parts.items() if n},
        "parameters": sum(p.numel() for p in policy.parameters()),
        "trainable": sum(p.numel() for p in trainable.values()),
        "adapted_layers": sum("lora_A" in name for name in trainable),
    }


def report(cfg, stage: str) -> None:
    """Print what one process of a stage takes, named by its section of the YAML, for --dry-run."""
    counts = estimate(cfg, stage)
    print(
        f"{stage}, {cfg.backbone}, {cfg.dtype}, in each process: {counts['parameters']:,} parameters,"
        f" {counts['trainable']:,} of them trained"
    )
    if counts["adapted_layers"]:
        print(f"adapter in {counts['adapted_layers']} layers")
    for part, n in (counts["parts"] | {"together": sum(counts["parts"].values())}).items():
        print(f"{part:>30}  {n / 2**30:9.3f} GiB")
