"""Checkpoints as others publish them, read without their code: whose it is, its sizes, statistics, tensors and tokenizer.

openvla   openvla/openvla-7b[-finetuned-libero-*], the Hugging Face folder; bf16 shards, statistics in config.json
lerobot   lerobot/pi05_*; statistics in the normaliser's file
openpi    pi-0.5 as converted by openpi's examples/convert_jax_model_to_pytorch.py, with its assets folder

Sizes are read off the tensors' shapes, so a checkpoint of few layers is one too; what shapes don't say (heads, the prompt) are
the published values, unless the config's `model` section says otherwise. Tensors go straight into the model, file after file,
in the file's dtype: the weights are in memory once. Nothing here was tried on a real published file: the key lists and
formats are those of the original code (tests/fixtures/keys-*.txt), and random checkpoints in them are what the tests read.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import backbones
import common
import disk
from common import UserError


# ----------------------------------------------------------------------------------------------------------------- files
@dataclass
class Checkpoint:
    """A folder's tensors, none of them loaded."""

    folder: Path
    files: dict[str, Path]  # key -> its file
    shapes: dict[str, list[int]]
    config: dict

    def shape(self, key: str) -> list[int]:
        if key not in self.shapes:
            raise UserError(f"{self.folder}: {key} is missing; a shard is not there, or it is another model's checkpoint")
        return self.shapes[key]

    def layers(self, prefix: str) -> int:
        """How many layers `prefix`0, 1, 2, ... there are."""
        return len({key.removeprefix(prefix).partition(".")[0] for key in self.shapes if key.startswith(prefix)})


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that an index names.

    Raises:
        UserError: none there, a shard missing, or an index that names a file outside the folder.
    """
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        named = backbones.read_object(index).get("weight_map")
        if not isinstance(named, dict) or not named or not all(isinstance(n, str) and "\0" not in n for n in named.values()):
            raise UserError(f"{index} has no weight_map that names files; get the checkpoint again")
        names = sorted(set(named.values()))
        if outside := [n for n in names if PurePosixPath(n).name != n]:
            raise UserError(f"{index} names {outside[0]!r}, which is not a file of its folder; get the checkpoint again")
        if absent := [n for n in names if not (path / n).is_file()]:
            raise UserError(f"{path} lacks the shard {absent[0]} that its index names; get the checkpoint again")
        return [path / n for n in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if (path / "adapter_model.safetensors").is_file():
        raise UserError(f"{path} holds an adapter alone; merge it into its base model first")
    if pickles := sorted(p.name for p in path.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")):
        raise UserError(f"{path} holds {pickles[0]}, a pickle, which is never opened here; convert it to safetensors first")
    raise UserError(f"{path} holds no model.safetensors and no model.safetensors.index.json; is it a checkpoint's folder?")


def open_checkpoint(path: Path) -> Checkpoint:
    """Keys and shapes of all files, from their headers.

    Raises:
        UserError: a file that is a git-LFS pointer, truncated or no safetensors file.
    """
    folder, files, shapes = path if path.is_dir() else path.parent, {}, {}
    for file in weight_files(path):
        with open(file, "rb") as f:
            if f.read(7) == b"version":
                raise UserError(f"{file} is a git-LFS pointer, not the weights; run `git lfs pull` in its folder")
        try:
            with safe_open(file, "pt") as f:
                for key in f.keys():  # noqa: SIM118 (not a dict)
                    files[key], shapes[key] = file, f.get_slice(key).get_shape()
        except SafetensorError as error:
            raise UserError(f"{file} is truncated or no safetensors file ({error}); get it again") from error
    config = folder / "config.json"
    return Checkpoint(folder, files, shapes, backbones.read_object(config) if config.is_file() else {})


# --------------------------------------------------------------------------------------------------------- OpenVLA's keys
OPENVLA_NAMES = (  # what a published key has -> what it has here; one after the other
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
BLOCK_NAMES = {  # the same inside a tower's blocks; {} stands for q, k, v, which timm keeps in one matrix
    "dino": (("attn.qkv", "attention.{}_proj"), ("attn.proj", "attention.o_proj"), ("ls1.scale_factor", "layer_scale1.lambda1"))
    + (("ls2.scale_factor", "layer_scale2.lambda1"),),
    "siglip": (("attn.qkv", "self_attn.{}_proj"), ("attn.proj", "self_attn.out_proj"), (".norm", ".layer_norm")),
}


def openvla_key(key: str, cfg) -> str | None:
    """The name here of a tensor of OpenVLA's files, None where nothing uses it: last block, norm and pooling of the towers."""
    for theirs, ours in OPENVLA_NAMES:
        key = key.replace(theirs, ours)
    for tower, names in BLOCK_NAMES.items():
        if key.startswith(f"vision.{tower}.encoder."):
            for theirs, ours in names:
                key = key.replace(theirs, ours)
            return key if int(key.split(".")[4]) < getattr(cfg, tower).num_hidden_layers else None
    return None if key.startswith(("vision.dino.norm.", "vision.siglip.norm.", "vision.siglip.attn_pool.")) else key


def openvla_tensors(tensors: dict[str, Tensor], cfg) -> dict[str, Tensor]:
    """OpenVLA's published tensors under the names here: q, k, v apart, unused ones left out."""
    named = {}
    for key, tensor in tensors.items():
        name = openvla_key(key, cfg)
        if name is not None and "{}" in name:
            named |= {name.format(part): t for part, t in zip("qkv", tensor.chunk(3), strict=True)}
        elif name is not None:
            named[name] = tensor[0] if name == "vision.siglip.embeddings.position_embedding.weight" else tensor
    return named


# ----------------------------------------------------------------------------------------------------------- pi-0.5's keys
PI05_PREFIXES = (  # key of the published file -> key here; the first match counts
    ("paligemma_with_expert.paligemma.model.vision_tower.vision_model.", "vision_tower."),
    ("paligemma_with_expert.paligemma.lm_head.", "language_model.embed_tokens."),  # tied: the files hold only this copy
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


# ------------------------------------------------------------------------------------------------------ sizes and switches
def openvla_model(c: Checkpoint) -> dict:
    """The `model` section that an OpenVLA checkpoint amounts to."""
    rows, width = c.shape("language_model.model.embed_tokens.weight")
    towers = {}
    for name, prefix in (("dino", "vision_backbone.featurizer."), ("siglip", "vision_backbone.fused_featurizer.")):
        _, patches, hidden = c.shape(f"{prefix}pos_embed")
        towers[name] = {
            "hidden_size": hidden,
            "num_hidden_layers": c.layers(f"{prefix}blocks.") - 1,  # nobody reads the last block's output
            "num_attention_heads": 16,
            "intermediate_size": c.shape(f"{prefix}blocks.0.mlp.fc1.weight")[0],
        }
    patch = c.shape("vision_backbone.featurizer.patch_embed.proj.weight")[-1]
    padding = c.config.get("pad_to_multiple_of", 64)
    llm = {"width": width, "depth": c.layers("language_model.model.layers.")}
    llm |= {"mlp_dim": c.shape("language_model.model.layers.0.mlp.gate_proj.weight")[0]}
    llm |= {"num_heads": c.config.get("text_config", {}).get("num_attention_heads", width // 128)}
    sizes = {"vocab_size": rows - padding, "vocab_padding": padding, "n_bins": c.config.get("n_action_bins", 256)}
    return sizes | {"llm": llm, "image_size": patch * math.isqrt(patches), "patch_size": patch} | towers


def pi05_sizes(c: Checkpoint, prefix: str) -> dict:
    """Sizes of pi-0.5. prefix: "model." in lerobot's files."""
    if f"{prefix}action_time_mlp_in.weight" in c.shapes:
        raise UserError(f"{c.folder} is a pi-0 checkpoint (it has action_time_mlp_in); this kit has pi-0.5")
    paligemma, expert = (f"{prefix}paligemma_with_expert.{part}" for part in ("paligemma.model.", "gemma_expert.model."))
    vision = f"{paligemma}vision_tower.vision_model."

    def gemma(stack: str) -> dict:
        queries, width = c.shape(f"{stack}layers.0.self_attn.q_proj.weight")
        dim, keys = queries // 8, c.shape(f"{stack}layers.0.self_attn.k_proj.weight")[0]
        size = {
            "width": width,
            "depth": c.layers(f"{stack}layers."),
            "mlp_dim": c.shape(f"{stack}layers.0.mlp.gate_proj.weight")[0],
        }
        return size | {"num_heads": 8, "num_kv_heads": keys // dim, "head_dim": dim}

    patches, hidden = c.shape(f"{vision}embeddings.position_embedding.weight")
    patch = c.shape(f"{vision}embeddings.patch_embedding.weight")[-1]
    tower = {"hidden_size": hidden, "num_hidden_layers": c.layers(f"{vision}encoder.layers."), "num_attention_heads": 16}
    tower |= {"intermediate_size": c.shape(f"{vision}encoder.layers.0.mlp.fc1.weight")[0]}
    tower |= {"image_size": patch * math.isqrt(patches), "patch_size": patch}
    sizes = {"vlm": gemma(f"{paligemma}language_model."), "expert": gemma(expert), "vision": tower}
    vocab = c.shape(f"{prefix}paligemma_with_expert.paligemma.lm_head.weight")[0]
    return sizes | {"vocab_size": vocab, "flow_dim": c.shape(f"{prefix}action_in_proj.weight")[1]}


def lerobot_model(c: Checkpoint) -> dict:
    """lerobot's pi-0.5: state in the prompt, padded to 32 dimensions by the lerobot that made the published ones (before 0.5)."""
    modes = {c.config.get("normalization_mapping", {}).get(kind, "QUANTILES") for kind in ("STATE", "ACTION")}
    known = {"QUANTILES": "quantile", "MEAN_STD": "mean_std"}
    if len(modes) > 1 or not modes <= known.keys():
        raise UserError(f"{c.folder}/config.json normalises by {sorted(modes)}; known: one of {', '.join(known)} for both")
    switches = {"prompt": "lerobot", "prompt_state_dims": 32, "resize": "lerobot", "norm_eps": "lerobot"}
    switches |= {"normalisation": known[modes.pop()], "max_tokens": c.config.get("tokenizer_max_length", 200)}
    return pi05_sizes(c, "model.") | switches | {"horizon": c.config.get("chunk_size", 50)}


def openpi_model(c: Checkpoint) -> dict:
    return pi05_sizes(c, "") | {"horizon": c.config.get("action_horizon", 10)}


# -------------------------------------------------------------------------------------------------------------- statistics
def suite_stats(published: dict, suite: str) -> dict:
    """norm_stats of one suite from OpenVLA's config.json or dataset_statistics.json. Without a mask all is normalised."""
    for name in (suite, f"{suite}_no_noops"):
        if name in published:
            return {"action": {"mask": [True] * common.ACTION_DIM} | published[name]["action"]}
    raise UserError(f"the checkpoint has no statistics of {suite!r}; {common.did_you_mean(suite, published)}")


def openvla_stats(c: Checkpoint, suites: list[str]) -> dict:
    own = c.folder / "dataset_statistics.json"  # of a fine-tuning run: counts more than what the config has
    published = disk.read_json(own) if own.is_file() else c.config.get("norm_stats", {})
    if not suites:
        raise UserError(f"{c.folder} has statistics of {', '.join(published) or 'no suite'}; say whose are wanted (suites)")
    first, *others = (suite_stats(published, suite) for suite in suites)
    if any(other != first for other in others):
        raise UserError(f"{c.folder} normalises {', '.join(suites)} differently; run one suite at a time")
    return first


def lerobot_stats(c: Checkpoint, suites: list[str]) -> dict:
    found = sorted(c.folder.glob("policy_preprocessor*normalizer*.safetensors"))
    if not found:
        raise UserError(f"{c.folder} holds no policy_preprocessor*normalizer*.safetensors, the statistics; get the whole folder")
    tensors = disk.load_tensors(found[0])
    named = {"action": ("action.", 7), "state": ("observation.state.", 8)}
    return {
        kind: {key.removeprefix(prefix): t.flatten().tolist()[:n] for key, t in tensors.items() if key.startswith(prefix)}
        for kind, (prefix, n) in named.items()
    }


def openpi_stats(c: Checkpoint, suites: list[str]) -> dict:
    found = sorted(c.folder.rglob("norm_stats.json"))
    if len(found) != 1:
        raise UserError(
            f"{c.folder} holds {len(found)} files norm_stats.json instead of one; copy openpi's assets folder into it"
        )
    stats = disk.read_json(found[0])
    stats = stats.get("norm_stats", stats)
    return {
        kind: {key: values[:n] for key, values in stats[theirs].items() if values is not None}
        for kind, theirs, n in (("action", "actions", 7), ("state", "state", 8))
    }


# ------------------------------------------------------------------------------------------------------------------ loading
FORMATS = {  # backbone, its model section, its statistics, its tensors
    "openvla": ("openvla", openvla_model, openvla_stats, openvla_tensors),
    "lerobot": ("pi05", lerobot_model, lerobot_stats, pi05_tensors),
    "openpi": ("pi05", openpi_model, openpi_stats, pi05_tensors),
}


def format_of(c: Checkpoint) -> str:
    """Whose checkpoint it is, by its keys."""
    marks = {"openvla": "vision_backbone.", "lerobot": "model.paligemma_with_expert.", "openpi": "paligemma_with_expert."}
    for kind, prefix in marks.items():
        if any(key.startswith(prefix) for key in c.shapes):
            return kind
    first = next(iter(c.shapes), "nothing")
    raise UserError(f"{c.folder} is no checkpoint of OpenVLA or pi-0.5 (it begins with {first}); other models are not supported")


def fill(policy, c: Checkpoint, native) -> None:
    """The tensors of all files into a policy on the meta device, in the files' dtype."""
    own = {key: tensor.shape for key, tensor in policy.state_dict().items()}
    missing = dict.fromkeys(own)
    for file in dict.fromkeys(c.files.values()):
        with safe_open(file, "pt") as f:
            tensors = native({key: f.get_tensor(key) for key, its in c.files.items() if its == file}, policy.cfg)
        for key, tensor in tensors.items():
            if key not in own:
                raise UserError(f"{file}: {key} is unknown; it is another model's file")
            if tensor.shape != own[key]:
                shapes = f"{tuple(tensor.shape)} in the file, {tuple(own[key])} by the other sizes"
                raise UserError(f"{file}: {key} has shape {shapes}; the checkpoint is damaged, or `model:` contradicts it")
            missing.pop(key, None)
        policy.load_state_dict({key: t.contiguous() for key, t in tensors.items()}, strict=False, assign=True)
    if missing:
        raise UserError(
            f"{c.folder}: {next(iter(missing))} is missing; a shard is not there, or it is another model's checkpoint"
        )
    for module in policy.modules():  # SigLIP's, not part of any file and not read here
        if getattr(module, "position_ids", None) is not None:
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]


def sizes(path: Path) -> dict:
    """The `model` section that a published checkpoint amounts to, or that the kit's own folder has."""
    if backbones.is_own(path):
        return backbones.config_of(path)
    with reading(path):
        c = open_checkpoint(path)
        return FORMATS[format_of(c)][1](c)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Files that are not built as their format is: whatever is stumbled over, in one line."""
    try:
        yield
    except (
        AttributeError,
        IndexError,
        KeyError,
        RuntimeError,
        SafetensorError,
        TypeError,
        ValueError,
        ZeroDivisionError,
    ) as error:
        why = disk.one_line(error)
        raise UserError(f"{path} is no checkpoint of OpenVLA or pi-0.5, or a damaged one ({why}); get it again") from error


def load(path: str | Path, model: dict, suites: list[str]):
    """The policy of a published checkpoint, in eval mode. model: overrides what its files say; suites: whose statistics.

    Raises:
        UserError: whatever is missing, damaged or another model's, with the first key or file concerned.
    """
    with reading(path):
        c = open_checkpoint(Path(path))
        backbone, shapes, stats, native = FORMATS[format_of(c)]
        with torch.device("meta"):
            policy = backbones.build(backbone, common.laid_over(shapes(c), model))
        fill(policy, c, native)
        policy.norm_stats = backbones.checked_stats(stats(c, suites), str(path))
    words = c.folder / "tokenizer.json"
    if not words.is_file():
        source = "google/paligemma-3b-pt-224" if backbone == "pi05" else "openvla/openvla-7b"
        raise UserError(f"{c.folder} holds no tokenizer.json; put that of {source} there")
    policy.tokenizer = backbones.read_tokenizer(words)
    return policy.eval()
