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

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backbones.policy import DIMS, checked_stats, is_own, read_object, read_tokenizer, saved_config
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

    def layers(self, prefix: str) -> int:
        """How many layers `prefix`0, 1, 2, ... there are."""
        return len(
            {key.removeprefix(prefix).partition(".")[0] for key in self.shapes if key.startswith(prefix)}
        )


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
        raise UserError(
            f"{path} holds {pickles[0]}, a pickle, which nothing here opens; convert it to safetensors first"
        )
    raise UserError(f"{path} holds no model.safetensors and no {index.name}; is it a checkpoint's folder?")


def shards(index: Path) -> list[Path]:
    names = sorted(set(read_object(index)["weight_map"].values()))
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names {name!r}, which is not in its folder; get the checkpoint again")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent} lacks the shard {name!r} of its index; get the checkpoint again")
    return [index.parent / name for name in names]


def open_checkpoint(path: Path) -> Checkpoint:
    """Keys and shapes of all files, from their headers.

    Raises:
        UserError: a file is a git-LFS pointer, truncated or no safetensors file.
    """
    folder, files, shapes = path if path.is_dir() else path.parent, {}, {}
    for file in weight_files(path):
        with open(file, "rb") as f:
            if f.read(7) == b"version":
                raise UserError(
                    f"{file} is a git-LFS pointer, not the weights; run `git lfs pull` in its folder"
                )
        try:
            with safe_open(file, "pt") as f:
                for key in f.keys():  # noqa: SIM118 (not a dict)
                    files[key], shapes[key] = file, f.get_slice(key).get_shape()
        except SafetensorError as error:
            raise UserError(f"{file} is truncated or no safetensors file ({error}); get it again") from error
    config = folder / "config.json"
    return Checkpoint(folder, files, shapes, read_object(config) if config.is_file() else {})


# --------------------------------------------------------------------------------------------- OpenVLA's keys
OPENVLA_NAMES = {  # beginning of a published key -> what to replace in it, one after the other
    "language_model.": (("language_model.model.", "language_model."),),
    "vision_backbone.featurizer.": (
        ("vision_backbone.featurizer.", "vision.dino."),
        ("dino.blocks.", "dino.encoder.layer."),
        ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
        ("pos_embed", "embeddings.position_embeddings"),
        ("cls_token", "embeddings.cls_token"),
        ("reg_token", "embeddings.register_tokens"),
        ("attn.qkv", "attention.{}_proj"),  # {}: q, k or v, which timm keeps in one matrix
        ("attn.proj", "attention.o_proj"),
        ("ls1.scale_factor", "layer_scale1.lambda1"),
        ("ls2.scale_factor", "layer_scale2.lambda1"),
    ),
    "vision_backbone.fused_featurizer.": (
        ("vision_backbone.fused_featurizer.", "vision.siglip."),
        ("siglip.blocks.", "siglip.encoder.layers."),
        ("patch_embed.proj.", "embeddings.patch_embedding."),
        ("pos_embed", "embeddings.position_embedding.weight"),
        ("attn.qkv", "self_attn.{}_proj"),
        ("attn.proj", "self_attn.out_proj"),
        (".norm", ".layer_norm"),
    ),
}
OPENVLA_UNREAD = r".*featurizer\.(norm|attn_pool)\..*"  # of the towers; and so is their last block


def openvla_key(key: str, cfg) -> str | None:
    """The name here of a tensor of OpenVLA's files; None where nothing reads it."""
    if re.fullmatch(OPENVLA_UNREAD, key):
        return None
    for beginning, names in OPENVLA_NAMES.items():
        for theirs, ours in names if key.startswith(beginning) else ():
            key = key.replace(theirs, ours)
    block = re.match(r"vision\.(dino|siglip)\.encoder\.layers?\.(\d+)", key)
    return None if block and int(block[2]) >= getattr(cfg, block[1]).num_hidden_layers else key


def openvla_tensors(tensors: dict[str, Tensor], cfg) -> dict[str, Tensor]:
    """OpenVLA's published tensors under the names here: q, k, v apart, without those that nothing reads."""
    named = {}
    for key, tensor in tensors.items():
        name = openvla_key(key, cfg)
        if name == "vision.siglip.embeddings.position_embedding.weight":
            tensor = tensor[0]
        if name is not None and "{}" in name:
            named |= {name.format(part): t for part, t in zip("qkv", tensor.chunk(3), strict=True)}
        elif name is not None:
            named[name] = tensor
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

    def tower(prefix: str) -> dict:
        return {
            "hidden_size": c.shapes[f"{prefix}pos_embed"][2],
            "num_hidden_layers": c.layers(f"{prefix}blocks.") - 1,  # nothing reads the last block's output
            "num_attention_heads": 16,
            "intermediate_size": c.shapes[f"{prefix}blocks.0.mlp.fc1.weight"][0],
        }

    dino, llm = "vision_backbone.featurizer.", "language_model.model."
    rows, width = c.shapes[f"{llm}embed_tokens.weight"]
    patch = c.shapes[f"{dino}patch_embed.proj.weight"][-1]
    padding = c.config.get("pad_to_multiple_of", 64)
    return {
        "vocab_size": rows - padding,
        "vocab_padding": padding,
        "n_bins": c.config.get("n_action_bins", 256),
        "image_size": patch * math.isqrt(c.shapes[f"{dino}pos_embed"][1]),
        "patch_size": patch,
        "dino": tower(dino),
        "siglip": tower("vision_backbone.fused_featurizer."),
        "llm": {
            "width": width,
            "depth": c.layers(f"{llm}layers."),
            "mlp_dim": c.shapes[f"{llm}layers.0.mlp.gate_proj.weight"][0],
            "num_heads": c.config.get("text_config", {}).get("num_attention_heads", width // 128),
        },
    }


def pi05_model(c: Checkpoint, prefix: str) -> dict:
    """Sizes of pi-0.5. prefix: "model." in lerobot's files."""
    if f"{prefix}action_time_mlp_in.weight" in c.shapes:
        raise UserError(f"{c.folder} is a pi-0 checkpoint (it has action_time_mlp_in); this kit has pi-0.5")
    both = f"{prefix}paligemma_with_expert."
    vision = f"{both}paligemma.model.vision_tower.vision_model."
    patches, hidden = c.shapes[f"{vision}embeddings.position_embedding.weight"]
    patch = c.shapes[f"{vision}embeddings.patch_embedding.weight"][-1]
    return {
        "vlm": gemma_size(c, f"{both}paligemma.model.language_model."),
        "expert": gemma_size(c, f"{both}gemma_expert.model."),
        "vision": {
            "hidden_size": hidden,
            "num_hidden_layers": c.layers(f"{vision}encoder.layers."),
            "num_attention_heads": 16,
            "intermediate_size": c.shapes[f"{vision}encoder.layers.0.mlp.fc1.weight"][0],
            "image_size": patch * math.isqrt(patches),
            "patch_size": patch,
        },
        "vocab_size": c.shapes[f"{both}paligemma.lm_head.weight"][0],
        "flow_dim": c.shapes[f"{prefix}action_in_proj.weight"][1],
    }


def gemma_size(c: Checkpoint, stack: str) -> dict:
    """Sizes of one of pi-0.5's two Gemmas, which have 8 heads."""
    queries, width = c.shapes[f"{stack}layers.0.self_attn.q_proj.weight"]
    return {
        "width": width,
        "depth": c.layers(f"{stack}layers."),
        "mlp_dim": c.shapes[f"{stack}layers.0.mlp.gate_proj.weight"][0],
        "num_heads": 8,
        "num_kv_heads": c.shapes[f"{stack}layers.0.self_attn.k_proj.weight"][0] // (queries // 8),
        "head_dim": queries // 8,
    }


def lerobot_model(c: Checkpoint) -> dict:
    """lerobot's pi-0.5. Its prompt holds the state, which lerobot before 0.5 padded to 32 dimensions.

    The published ones were made with such a version.
    """
    modes = {c.config.get("normalization_mapping", {}).get(kind, "QUANTILES") for kind in ("STATE", "ACTION")}
    known = {"QUANTILES": "quantile", "MEAN_STD": "mean_std"}
    if len(modes) > 1 or not modes <= known.keys():
        raise UserError(
            f"{c.folder}/config.json normalises by {sorted(modes)}; known: one of {', '.join(known)} for both"
        )
    return pi05_model(c, "model.") | {
        "prompt": "lerobot",
        "prompt_state_dims": 32,
        "resize": "lerobot",
        "norm_eps": "lerobot",
        "normalisation": known[modes.pop()],
        "max_tokens": c.config.get("tokenizer_max_length", 200),
        "horizon": c.config.get("chunk_size", 50),
    }


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
    """norm_stats of one suite from config.json or dataset_statistics.json; no mask: normalise everything."""
    for name in (suite, f"{suite}_no_noops"):
        if name in published:
            return {"action": {"mask": [True] * ACTION_DIM} | published[name]["action"]}
    raise UserError(f"the checkpoint has no statistics of {suite!r}; {did_you_mean(suite, published)}")


def lerobot_stats(c: Checkpoint, suites: list[str]) -> dict:
    files = sorted(c.folder.glob("policy_preprocessor*normalizer*.safetensors"))
    if not files:
        raise UserError(
            f"{c.folder} holds no policy_preprocessor*normalizer*.safetensors, the statistics;"
            " get the whole folder"
        )
    stats = {"action": {}, "state": {}}
    for key, tensor in disk.load_tensors(files[0]).items():
        feature, _, name = key.removeprefix("observation.").partition(".")
        if feature in stats:
            stats[feature][name] = tensor.flatten().tolist()[: DIMS[feature]]
    return stats


def openpi_stats(c: Checkpoint, suites: list[str]) -> dict:
    files = sorted(c.folder.rglob("norm_stats.json"))
    if len(files) != 1:
        raise UserError(
            f"{c.folder} holds {len(files)} files norm_stats.json instead of one;"
            " copy openpi's assets folder into it"
        )
    stats = disk.read_json(files[0])
    stats = stats.get("norm_stats", stats)
    return {
        kind: {key: values[: DIMS[kind]] for key, values in stats[theirs].items() if values is not None}
        for kind, theirs in (("action", "actions"), ("state", "state"))
    }


# ---------------------------------------------------------------------------------------------------- loading
FORMATS = {
    "openvla": {
        "backbone": "openvla",
        "begins": "vision_backbone.",  # some key begins with this
        "model": openvla_model,  # Checkpoint -> the `model` section that it amounts to
        "stats": openvla_stats,  # Checkpoint, suites -> norm_stats
        "tensors": openvla_tensors,  # tensors of a file, model config -> tensors under the names here
        "tokenizer": "openvla/openvla-7b",  # the repository that publishes it
    },
    "lerobot": {
        "backbone": "pi05",
        "begins": "model.paligemma_with_expert.",
        "model": lerobot_model,
        "stats": lerobot_stats,
        "tensors": pi05_tensors,
        "tokenizer": "google/paligemma-3b-pt-224",
    },
    "openpi": {
        "backbone": "pi05",
        "begins": "paligemma_with_expert.",
        "model": openpi_model,
        "stats": openpi_stats,
        "tensors": pi05_tensors,
        "tokenizer": "google/paligemma-3b-pt-224",
    },
}


def format_of(c: Checkpoint) -> dict:
    """Whose checkpoint it is, by its keys."""
    for its in FORMATS.values():
        if any(key.startswith(its["begins"]) for key in c.shapes):
            return its
    first = next(iter(c.shapes), "nothing")
    raise UserError(
        f"{c.folder} is no checkpoint of OpenVLA or pi-0.5 (it begins with {first}); no other can be read"
    )


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """One line for whatever goes wrong with files that are not as their format demands."""
    damage = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
    try:
        yield
    except (*damage, SafetensorError) as error:
        raise UserError(
            f"{path} is no checkpoint of OpenVLA or pi-0.5, or damaged ({one_line(error)}); get it again"
        ) from error


def sizes(path: Path) -> dict:
    """The `model` section that a published checkpoint amounts to, or that the kit's own folder has."""
    if is_own(path):
        return saved_config(path)[1]
    with reading(path):
        c = open_checkpoint(path)
        return format_of(c)["model"](c)


def load(path: Path, model: dict, suites: list[str], build: Callable):
    """The policy of a published checkpoint, in evaluation mode.

    model: overrides what its files say.  suites: whose statistics.  build: models.build.

    Raises:
        UserError: names the first key or file that is missing, damaged or another model's.
    """

    def renamed(file: Path) -> dict[str, Tensor]:
        with safe_open(file, "pt") as f:
            tensors = {key: f.get_tensor(key) for key, its_file in c.files.items() if its_file == file}
        return its["tensors"](tensors, policy.cfg)

    with reading(path):
        c = open_checkpoint(path)
        its = format_of(c)
        with torch.device("meta"):
            policy = build(its["backbone"], laid_over(its["model"](c), model))
        policy.load_weights(((file, renamed(file)) for file in dict.fromkeys(c.files.values())), assign=True)
        for module in policy.modules():  # SigLIP's; no file has them, and nothing here reads them
            if getattr(module, "position_ids", None) is not None:
                module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
        policy.norm_stats = checked_stats(its["stats"](c, suites), str(path))
    tokenizer = c.folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise UserError(f"{c.folder} holds no tokenizer.json; put that of {its['tokenizer']} there")
    policy.tokenizer = read_tokenizer(tokenizer)
    return policy.eval()
