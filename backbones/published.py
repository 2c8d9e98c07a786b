"""Checkpoints as others publish them, read without their code: format, sizes, statistics, tensors, tokenizer.

openvla   openvla/openvla-7b[-finetuned-libero-*], the Hugging Face folder: bf16 shards, statistics in
          config.json
lerobot   lerobot/pi05_*: statistics in the normaliser's file
openpi    pi-0.5 as converted by openpi's examples/convert_jax_model_to_pytorch.py, with its assets folder

Sizes come from the shapes of the tensors, so a checkpoint of few layers can be read too. Shapes do not tell
the heads or the prompt: these have the published values, unless the config's `model` section overrides them.
Tensors go into the model file after file, in the file's dtype, so the weights are in memory once.
Not tried on a real published file. The key lists and formats are those of the original code
(tests/fixtures/keys-*.txt); the tests read random checkpoints in these formats.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backbones.policy import STATE_DIM, checked_stats, config_of, is_own, read_object, read_tokenizer
from common import ACTION_DIM
from runtime import disk
from runtime.config import laid_over
from runtime.errors import UserError, did_you_mean, one_line


# ------------------------------------------------------------------------------------------------------ files
@dataclass
class Checkpoint:
    """A folder's tensors, none of them loaded."""

    folder: Path
    files: dict[str, Path]  # key -> its file
    shapes: dict[str, list[int]]
    config: dict

    def shape(self, key: str) -> list[int]:
        if key not in self.shapes:
            why = "a shard is not there, or it is another model's checkpoint"
            raise UserError(f"{self.folder}: {key} is missing; {why}")
        return self.shapes[key]

    def layers(self, prefix: str) -> int:
        """How many layers `prefix`0, 1, 2, ... there are."""
        return len(
            {key.removeprefix(prefix).partition(".")[0] for key in self.shapes if key.startswith(prefix)}
        )

    def tensors(self, file: Path) -> dict[str, Tensor]:
        """The tensors of one file."""
        with safe_open(file, "pt") as f:
            return {key: f.get_tensor(key) for key, its in self.files.items() if its == file}


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that an index names.

    Raises:
        UserError: there is none, a shard is missing, or the index names a file outside the folder.
    """
    index = path / "model.safetensors.index.json"
    if path.is_file():
        return [path]
    if index.is_file():
        return shards(index)
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if (path / "adapter_model.safetensors").is_file():
        raise UserError(f"{path} holds an adapter alone; merge it into its base model first")
    pickles = sorted(p.name for p in path.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        never = "a pickle, which is never opened here"
        raise UserError(f"{path} holds {pickles[0]}, {never}; convert it to safetensors first")
    raise UserError(f"{path} holds no model.safetensors and no {index.name}; is it a checkpoint's folder?")


def shards(index: Path) -> list[Path]:
    named = read_object(index).get("weight_map")
    names = set(named.values()) if isinstance(named, dict) else set()
    if not names or not all(isinstance(name, str) and "\0" not in name for name in names):
        raise UserError(f"{index} has no weight_map that names files; get the checkpoint again")
    for name in sorted(names):
        if PurePosixPath(name).name != name:
            raise UserError(f"{index} names {name!r}, which is not in its folder; get the checkpoint again")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent} lacks the shard {name} of its index; get the checkpoint again")
    return [index.parent / name for name in sorted(names)]


def open_checkpoint(path: Path) -> Checkpoint:
    """Keys and shapes of all files, from their headers.

    Raises:
        UserError: a file is a git-LFS pointer, truncated or no safetensors file.
    """
    folder, files, shapes = path if path.is_dir() else path.parent, {}, {}
    for file in weight_files(path):
        with open(file, "rb") as f:
            if f.read(7) == b"version":
                pointer = "is a git-LFS pointer, not the weights"
                raise UserError(f"{file} {pointer}; run `git lfs pull` in its folder")
        try:
            with safe_open(file, "pt") as f:
                for key in f.keys():  # noqa: SIM118 (not a dict)
                    files[key] = file
                    shapes[key] = f.get_slice(key).get_shape()
        except SafetensorError as error:
            raise UserError(f"{file} is truncated or no safetensors file ({error}); get it again") from error
    config = folder / "config.json"
    return Checkpoint(folder, files, shapes, read_object(config) if config.is_file() else {})


# --------------------------------------------------------------------------------------------- OpenVLA's keys
OPENVLA_NAMES = (  # part of a published key -> the same part here; applied one after the other
    ("vision_backbone.featurizer.", "vision.dino."),
    ("vision_backbone.fused_featurizer.", "vision.siglip."),
    ("language_model.model.", "language_model."),
    ("dino.blocks.", "dino.encoder.layer."),
    ("siglip.blocks.", "siglip.encoder.layers."),
    ("dino.patch_embed.proj.", "dino.embeddings.patch_embeddings.projection."),
    ("siglip.patch_embed.proj.", "siglip.embeddings.patch_embedding."),
    ("dino.pos_embed", "dino.embeddings.position_embeddings"),
    ("siglip.pos_embed", "siglip.embeddings.position_embedding.weight"),
    ("dino.cls_token", "dino.embeddings.cls_token"),
    ("dino.reg_token", "dino.embeddings.register_tokens"),
)
BLOCK_NAMES = {  # within a tower's blocks; {} stands for q, k, v, which timm keeps in one matrix
    "dino": (
        ("attn.qkv", "attention.{}_proj"),
        ("attn.proj", "attention.o_proj"),
        ("ls1.scale_factor", "layer_scale1.lambda1"),
        ("ls2.scale_factor", "layer_scale2.lambda1"),
    ),
    "siglip": (
        ("attn.qkv", "self_attn.{}_proj"),
        ("attn.proj", "self_attn.out_proj"),
        (".norm", ".layer_norm"),
    ),
}


def openvla_key(key: str, cfg) -> str | None:
    """The name here of a tensor of OpenVLA's files; None for the towers' last block, norm and pooling.

    Nothing reads the output of these.
    """
    for theirs, ours in OPENVLA_NAMES:
        key = key.replace(theirs, ours)
    for tower, names in BLOCK_NAMES.items():
        if key.startswith(f"vision.{tower}.encoder."):
            for theirs, ours in names:
                key = key.replace(theirs, ours)
            return key if int(key.split(".")[4]) < getattr(cfg, tower).num_hidden_layers else None
    unread = ("vision.dino.norm.", "vision.siglip.norm.", "vision.siglip.attn_pool.")
    return None if key.startswith(unread) else key


def openvla_tensors(tensors: dict[str, Tensor], cfg) -> dict[str, Tensor]:
    """OpenVLA's published tensors under the names here: q, k, v apart, without those that nothing reads."""
    named = {}
    for key, tensor in tensors.items():
        name = openvla_key(key, cfg)
        if name is None:
            continue
        if name == "vision.siglip.embeddings.position_embedding.weight":
            tensor = tensor[0]
        parts = zip("qkv", tensor.chunk(3), strict=True) if "{}" in name else [("", tensor)]
        named |= {name.format(part): t for part, t in parts}
    return named


# ---------------------------------------------------------------------------------------------- pi-0.5's keys
PI05_PREFIXES = (  # beginning of a published key -> beginning of the key here; the first match counts
    ("paligemma_with_expert.paligemma.model.vision_tower.vision_model.", "vision_tower."),
    ("paligemma_with_expert.paligemma.lm_head.", "language_model.embed_tokens."),  # tied: the only copy
    ("paligemma_with_expert.paligemma.model.", ""),
    ("paligemma_with_expert.gemma_expert.lm_head.", None),  # 263 million parameters that nothing uses
    ("paligemma_with_expert.gemma_expert.model.", "expert."),
)


def pi05_key(key: str) -> str | None:
    """The name here of a tensor of openpi's or lerobot's pi-0.5 files; None where nothing uses it."""
    key = key.removeprefix("model.")  # lerobot's
    for theirs, ours in PI05_PREFIXES:
        if key.startswith(theirs):
            return None if ours is None else ours + key.removeprefix(theirs)
    return key


def pi05_tensors(tensors: dict[str, Tensor], cfg) -> dict[str, Tensor]:
    named = {pi05_key(key): tensor for key, tensor in tensors.items()}
    return {key: tensor for key, tensor in named.items() if key is not None}


# ----------------------------------------------------------------------------------------- sizes and switches
def openvla_model(c: Checkpoint) -> dict:
    """The `model` section that an OpenVLA checkpoint amounts to."""
    llm, featurizers = "language_model.model.", {"dino": "featurizer.", "siglip": "fused_featurizer."}
    rows, width = c.shape(f"{llm}embed_tokens.weight")
    patch = c.shape("vision_backbone.featurizer.patch_embed.proj.weight")[-1]
    padding = c.config.get("pad_to_multiple_of", 64)
    model = {"vocab_size": rows - padding, "vocab_padding": padding, "patch_size": patch}
    model["n_bins"] = c.config.get("n_action_bins", 256)
    model["llm"] = {
        "width": width,
        "depth": c.layers(f"{llm}layers."),
        "mlp_dim": c.shape(f"{llm}layers.0.mlp.gate_proj.weight")[0],
        "num_heads": c.config.get("text_config", {}).get("num_attention_heads", width // 128),
    }
    for name, featurizer in featurizers.items():
        prefix = f"vision_backbone.{featurizer}"
        _, patches, hidden = c.shape(f"{prefix}pos_embed")
        model["image_size"] = patch * math.isqrt(patches)
        model[name] = {
            "hidden_size": hidden,
            "num_hidden_layers": c.layers(f"{prefix}blocks.") - 1,  # nothing reads the last block's output
            "num_attention_heads": 16,
            "intermediate_size": c.shape(f"{prefix}blocks.0.mlp.fc1.weight")[0],
        }
    return model


def pi05_model(c: Checkpoint, prefix: str) -> dict:
    """Sizes of pi-0.5. prefix: "model." in lerobot's files."""
    if f"{prefix}action_time_mlp_in.weight" in c.shapes:
        raise UserError(f"{c.folder} is a pi-0 checkpoint (it has action_time_mlp_in); this kit has pi-0.5")
    both = f"{prefix}paligemma_with_expert."
    vision = f"{both}paligemma.model.vision_tower.vision_model."
    patches, hidden = c.shape(f"{vision}embeddings.position_embedding.weight")
    patch = c.shape(f"{vision}embeddings.patch_embedding.weight")[-1]
    tower = {
        "hidden_size": hidden,
        "num_hidden_layers": c.layers(f"{vision}encoder.layers."),
        "num_attention_heads": 16,
        "intermediate_size": c.shape(f"{vision}encoder.layers.0.mlp.fc1.weight")[0],
        "image_size": patch * math.isqrt(patches),
        "patch_size": patch,
    }
    return {
        "vlm": gemma_size(c, f"{both}paligemma.model.language_model."),
        "expert": gemma_size(c, f"{both}gemma_expert.model."),
        "vision": tower,
        "vocab_size": c.shape(f"{both}paligemma.lm_head.weight")[0],
        "flow_dim": c.shape(f"{prefix}action_in_proj.weight")[1],
    }


def gemma_size(c: Checkpoint, stack: str) -> dict:
    """Sizes of one of pi-0.5's two Gemmas, which have 8 heads."""
    queries, width = c.shape(f"{stack}layers.0.self_attn.q_proj.weight")
    return {
        "width": width,
        "depth": c.layers(f"{stack}layers."),
        "mlp_dim": c.shape(f"{stack}layers.0.mlp.gate_proj.weight")[0],
        "num_heads": 8,
        "num_kv_heads": c.shape(f"{stack}layers.0.self_attn.k_proj.weight")[0] // (queries // 8),
        "head_dim": queries // 8,
    }


def lerobot_model(c: Checkpoint) -> dict:
    """lerobot's pi-0.5: the prompt holds the state, padded to 32 dimensions before version 0.5.

    The published ones were made with an earlier version.
    """
    modes = {c.config.get("normalization_mapping", {}).get(kind, "QUANTILES") for kind in ("STATE", "ACTION")}
    known = {"QUANTILES": "quantile", "MEAN_STD": "mean_std"}
    if len(modes) > 1 or not modes <= known.keys():
        choices = f"known: one of {', '.join(known)} for both"
        raise UserError(f"{c.folder}/config.json normalises by {sorted(modes)}; {choices}")
    switches = {"prompt": "lerobot", "prompt_state_dims": 32, "resize": "lerobot", "norm_eps": "lerobot"}
    switches |= {"normalisation": known[modes.pop()], "horizon": c.config.get("chunk_size", 50)}
    return pi05_model(c, "model.") | switches | {"max_tokens": c.config.get("tokenizer_max_length", 200)}


def openpi_model(c: Checkpoint) -> dict:
    return pi05_model(c, "") | {"horizon": c.config.get("action_horizon", 10)}


# ------------------------------------------------------------------------------------------------- statistics
def openvla_stats(c: Checkpoint, suites: list[str]) -> dict:
    own = c.folder / "dataset_statistics.json"  # a fine-tuning run writes it; it overrides config.json
    published = disk.read_json(own) if own.is_file() else c.config.get("norm_stats", {})
    if not suites:
        there = ", ".join(published) or "no suite"
        raise UserError(f"{c.folder} has statistics of {there}; say whose are wanted (suites)")
    first, *others = [suite_stats(published, suite) for suite in suites]
    if any(other != first for other in others):
        raise UserError(f"{c.folder} normalises {', '.join(suites)} differently; run one suite at a time")
    return first


def suite_stats(published: dict, suite: str) -> dict:
    """norm_stats of one suite from OpenVLA's config.json or dataset_statistics.json.

    Without a mask every dimension is normalised.
    """
    for name in (suite, f"{suite}_no_noops"):
        if name in published:
            return {"action": {"mask": [True] * ACTION_DIM} | published[name]["action"]}
    raise UserError(f"the checkpoint has no statistics of {suite!r}; {did_you_mean(suite, published)}")


def lerobot_stats(c: Checkpoint, suites: list[str]) -> dict:
    files = sorted(c.folder.glob("policy_preprocessor*normalizer*.safetensors"))
    if not files:
        absent = "policy_preprocessor*normalizer*.safetensors, the statistics"
        raise UserError(f"{c.folder} holds no {absent}; get the whole folder")
    stats = {"action": {}, "state": {}}
    for key, tensor in disk.load_tensors(files[0]).items():
        feature, _, name = key.rpartition(".")
        if feature == "action":
            stats["action"][name] = tensor.flatten().tolist()[:ACTION_DIM]
        if feature == "observation.state":
            stats["state"][name] = tensor.flatten().tolist()[:STATE_DIM]
    return stats


def openpi_stats(c: Checkpoint, suites: list[str]) -> dict:
    files = sorted(c.folder.rglob("norm_stats.json"))
    if len(files) != 1:
        found = f"{len(files)} files norm_stats.json instead of one"
        raise UserError(f"{c.folder} holds {found}; copy openpi's assets folder into it")
    stats = disk.read_json(files[0])
    stats = stats.get("norm_stats", stats)
    return {
        kind: {key: values[:n] for key, values in stats[theirs].items() if values is not None}
        for kind, theirs, n in (("action", "actions", ACTION_DIM), ("state", "state", STATE_DIM))
    }


# ---------------------------------------------------------------------------------------------------- loading
@dataclass(frozen=True)
class Format:
    backbone: str
    begins: str  # some key begins with this
    model: Callable[[Checkpoint], dict]  # the `model` section that a checkpoint amounts to
    stats: Callable[[Checkpoint, list[str]], dict]  # norm_stats of some suites
    tensors: Callable[
        [dict[str, Tensor], object], dict[str, Tensor]
    ]  # tensors of a file under the names here
    tokenizer: str  # the repository that publishes it


FORMATS = (
    Format(
        backbone="openvla",
        begins="vision_backbone.",
        model=openvla_model,
        stats=openvla_stats,
        tensors=openvla_tensors,
        tokenizer="openvla/openvla-7b",
    ),
    Format(
        backbone="pi05",
        begins="model.paligemma_with_expert.",
        model=lerobot_model,
        stats=lerobot_stats,
        tensors=pi05_tensors,
        tokenizer="google/paligemma-3b-pt-224",
    ),
    Format(
        backbone="pi05",
        begins="paligemma_with_expert.",
        model=openpi_model,
        stats=openpi_stats,
        tensors=pi05_tensors,
        tokenizer="google/paligemma-3b-pt-224",
    ),
)


def format_of(c: Checkpoint) -> Format:
    """Whose checkpoint it is, by its keys."""
    for known in FORMATS:
        if any(key.startswith(known.begins) for key in c.shapes):
            return known
    begins = f"it begins with {next(iter(c.shapes), 'nothing')}"
    raise UserError(f"{c.folder} is no checkpoint of OpenVLA or pi-0.5 ({begins}); no other can be read")


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """One line for whatever goes wrong with files that are not as their format demands."""
    damage = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
    try:
        yield
    except (*damage, SafetensorError) as error:
        what = f"is no checkpoint of OpenVLA or pi-0.5, or a damaged one ({one_line(error)})"
        raise UserError(f"{path} {what}; get it again") from error


def sizes(path: Path) -> dict:
    """The `model` section that a published checkpoint amounts to, or that the kit's own folder has."""
    if is_own(path):
        return config_of(path)
    with reading(path):
        c = open_checkpoint(path)
        return format_of(c).model(c)


def load(path: Path, model: dict, suites: list[str], build: Callable):
    """The policy of a published checkpoint, in evaluation mode.

    model: overrides what its files say.  suites: whose statistics.  build: models.build.

    Raises:
        UserError: names the first key or file that is missing, damaged or another model's.
    """
    with reading(path):
        c = open_checkpoint(path)
        its = format_of(c)
        with torch.device("meta"):
            policy = build(its.backbone, laid_over(its.model(c), model))
        named = ((file, its.tensors(c.tensors(file), policy.cfg)) for file in dict.fromkeys(c.files.values()))
        policy.load_weights(named, assign=True)
        for module in policy.modules():  # SigLIP's; no file has them, and nothing here reads them
            if getattr(module, "position_ids", None) is not None:
                module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
        policy.norm_stats = checked_stats(its.stats(c, suites), str(path))
    tokenizer = c.folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise UserError(f"{c.folder} holds no tokenizer.json; put that of {its.tokenizer} there")
    policy.tokenizer = read_tokenizer(tokenizer)
    return policy.eval()
