"""Which weights and statistics an adapter, or pairs, were made with: told by their file, and compared."""

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

import torch

from runtime import disk, refuse, warn

SETTINGS = (  # of both backbones: what goes into a policy, and in which units
    *("prompt", "prompt_state_dims", "cameras", "state_token", "resize"),
    *("image_pipeline", "pixel_means", "pixel_stds"),
    *("normalisation", "state_normalisation", "norm_eps"),
)


def origin(policy, targets: str) -> dict[str, str]:
    """What an adapter, or pairs, belong to: hashes of the adapted layers' weights and of the statistics, and
    the settings that say what goes into the policy and in which units.

    The hashes are the same in other files, shards and precisions: the weights count rounded to bfloat16.
    """
    digest = hashlib.sha256()
    modules = {n.removesuffix(".base_layer"): m for n, m in policy.named_modules()}  # below an adapter too
    adapted = re.compile(targets).fullmatch
    for name, layer in sorted((n, m) for n, m in modules.items() if "lora_" not in n and adapted(n)):
        weight = layer.weight.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(weight.shape)} ".encode() + weight.view(torch.uint8).numpy().tobytes())
    statistics = hashlib.sha256(json.dumps(policy.norm_stats, sort_keys=True, default=list).encode())
    settings = {key: value for key, value in asdict(policy.cfg).items() if key in SETTINGS}
    return {
        "targets": targets,
        "base": digest.hexdigest(),
        "statistics": statistics.hexdigest(),
        "model": json.dumps(settings),
    }


def same_origin(policy, path: Path) -> None:
    """UserError unless an adapter, or pairs, were made with these weights and statistics, as their file says.

    One that says nothing of it is taken, with a warning; so are pairs of other weights, in the same units.
    """
    theirs = disk.facts_of(path)
    if not theirs:
        return warn(f"{path} does not say which policy it was made with: nobody can tell if it fits this one")
    ours, made = origin(policy, theirs["targets"]), f"{path} was made with other"
    refuse(ours["statistics"] != theirs["statistics"], f"{made} statistics; take the policy it was made with")
    settings = json.loads(theirs.get("model", "{}"))  # older files lack it
    other = [key for key, value in json.loads(ours["model"]).items() if settings.get(key, value) != value]
    refuse(other, f"{made} settings of the policy ({', '.join(other)}); set `model:` as it was then")
    if ours["base"] != theirs["base"]:
        its = "set checkpoint= and start= to its own policy, with nothing merged in"
        refuse(path.name == "adapter_model.safetensors", f"{made} weights than these; {its}")
        warn(f"{made} weights: DPO expects pairs of the policy that it trains; 02 collects them")
