"""From a name or a folder to a policy: fresh weights, weights that 01 saved, or a published checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import torch

from backbones.policy import Policy, build_tokenizer, checked_stats, config_from, is_own, read_tokenizer
from runtime import BACKBONES, disk, laid_over, one_of, refuse


def policy_class(name: str) -> type[Policy]:
    """The class of a backbone; its module, and transformers with it, is imported now."""
    one_of("backbone", name, list(BACKBONES))
    if name == "pi05":
        from backbones.pi05 import Pi05 as Backbone
    else:
        from backbones.openvla import OpenVLA as Backbone
    return Backbone


def build(name: str, model: dict, instructions: Sequence[str] | None = None) -> Policy:
    """A policy with fresh weights. Sizes that `model` leaves out are the published checkpoint's.

    instructions: for training from scratch. The tokenizer knows their words, and so does vocab_size unless it
    is given.
    """
    cls, tokenizer = policy_class(name), None
    if instructions is not None:
        tokenizer = build_tokenizer(instructions)
        model = {"vocab_size": tokenizer.get_vocab_size()} | model
    policy = cls(config_from(model, cls.config_class, "model"))
    policy.tokenizer = tokenizer
    return policy


def horizon(name: str, model: dict) -> int:  # actions of a chunk, known before a policy is built
    return config_from(model, policy_class(name).config_class, "model").horizon


def weights_of(start: str) -> str:  # the file of the final weights, or of the snapshot at that step
    return "model.safetensors" if start == "final" else f"model-{start}.safetensors"


def load_policy(
    folder: str | Path,
    weights: str = "model.safetensors",
    model: dict | None = None,
    suites: Sequence[str] = (),
    backbone: str = "",
    read: bool = True,
) -> Policy:
    """The policy that `policy.save(folder)` wrote, or a published one, in evaluation mode.

    weights: another file of the folder, e.g. a snapshot of the training.
    model: keys that override the checkpoint's own.
    suites: whose statistics to take where a published checkpoint has several.
    backbone: which one it must be; empty = either.
    read: False for the same on the meta device, with tokenizer and statistics but no weights, which takes
        seconds and finds whatever is missing, damaged or not for this kit.
    """
    folder = Path(folder)

    def build_it(name: str, config: dict) -> Policy:  # keys of another backbone would only confuse
        refuse(backbone not in ("", name), f"{folder} is a checkpoint of {name}; set backbone={name}")
        return build(name, config)

    if not is_own(folder) and weights == "model.safetensors":
        from backbones import published

        return published.load(folder, build_it, model or {}, list(suites), read).eval()
    missing = [file for file in ("config.json", "norm_stats.json", weights) if not (folder / file).is_file()]
    refuse(
        missing,
        f"{folder} holds no {' and no '.join(missing)}, only"
        f" {sorted(path.name for path in folder.glob('*.safetensors'))}; set start= to what is there"
        " (model.safetensors is start=final), or run 01_sft.py, whose sft.snapshots names the steps to keep",
    )
    config = disk.read_object(folder / "config.json")
    name = config.pop("backbone")
    with torch.device("cpu" if read else "meta"):
        policy = build_it(name, laid_over(config, model or {}))
    if read:
        policy.load_weights([(folder / weights, disk.load_finite(folder / weights))])
    policy.norm_stats = checked_stats(
        disk.read_object(folder / "norm_stats.json"), f"{folder}/norm_stats.json"
    )
    if (folder / "tokenizer.json").is_file():
        policy.tokenizer = read_tokenizer(folder / "tokenizer.json")
    policy.found = [f"{folder} holds a policy of this kit"]
    return policy.eval()
