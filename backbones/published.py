"""Other people's checkpoints, read without their code: format, sizes, statistics, tensors, tokenizer.

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

from backbones.policy import (
    DIMS,
    Policy,
    checked_stats,
    read_object,
    read_tokenizer,
)
from common import ACTION_DIM
from runtime import UserError, did_you_mean, disk, laid_over, one_line, refuse


# --------------------------------------------------------------------------------------- other people's files
@dataclass
class Checkpoint:  # none of its tensors is loaded
    folder: Path
    files: list[Path]
    shapes: dict[str, list[int]]  # of each key
    config: dict
    format: dict  # one of FORMATS

    def layers(self, prefix: str) -> int:  # how many of them, `prefix`0, 1, 2, ..., there are
        return len(
            {key.removeprefix(prefix).partition(".")[0] for key in self.shapes if key.startswith(prefix)}
        )


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """One line for whatever goes wrong with files that are not as their format demands."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        SafetensorError,
    ) as error:
        raise UserError(
            f"{path} is no checkpoint of OpenVLA or pi-0.5, or truncated or damaged ({one_line(error)});"
            " get it again"
        ) from error


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that an index names.

    Raises:
        UserError: there is none, a shard is missing, or the index names a file outside the folder.
    """
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_object(index)["weight_map"].values()))
        for name in names:
            refuse(
                Path(name).name != name,
                f"{index} names {name!r}, which is not in its folder; get the checkpoint again",
            )
            refuse(
                not (path / name).is_file(),
                f"{path} lacks the shard {name!r} of its index; get the checkpoint again",
            )
        return [path / name for name in names]
    there = sorted(file.name for file in path.glob("*"))
    if "model.safetensors" not in there:
        pickles = [name for name in there if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        refuse(
            "adapter_model.safetensors" in there,
            f"{path} holds an adapter alone; merge it into its base model first",
        )
        refuse(
            pickles,
            f"{path} holds {', '.join(pickles)}, a pickle, which nothing here opens;"
            " convert it to safetensors first",
        )
        refuse(True, f"{path} holds no model.safetensors and no {index.name}; is it a checkpoint's folder?")
    return [path / "model.safetensors"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Keys and shapes of all files, from their headers; the keys tell the format.

    Raises:
        UserError: a file is a git-LFS pointer, damaged or another model's.
    """
    folder, files, shapes = path if path.is_dir() else path.parent, weight_files(path), {}
    for file in files:
        with open(file, "rb") as f:
            refuse(
                f.read(7) == b"version",
                f"{file} is a git-LFS pointer, not the weights; run `git lfs pull` in its folder",
            )
        with reading(file), safe_open(file, "pt") as f:
            shapes |= {key: f.get_slice(key).get_shape() for key in f.keys()}  # noqa: SIM118 (not a dict)
    config = folder / "config.json"
    for its in FORMATS.values():
        if any(key.startswith(its["begins"]) for key in shapes):
            return Checkpoint(folder, files, shapes, read_object(config) if config.is_file() else {}, its)
    raise UserError(
        f"{folder} is no checkpoint of OpenVLA or pi-0.5 (it begins with {next(iter(shapes), 'nothing')});"
        " no other can be read"
    )


# ------------------------------------------------------------------------------------------------------ names
NAMES = {  # backbone -> beginnings of published keys, what stands for them here, what else is replaced
    "openvla": (
        ("language_model.model.", "language_model.", {}),
        (
            "vision_backbone.featurizer.",
            "vision.dino.",
            {
                "dino.blocks.": "dino.encoder.layer.",
                "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
                "pos_embed": "embeddings.position_embeddings",
                "cls_token": "embeddings.cls_token",
                "reg_token": "embeddings.register_tokens",
                "attn.qkv": "attention.{}_proj",  # {}: q, k or v, which timm keeps in one matrix
                "attn.proj": "attention.o_proj",
                "ls1.scale_factor": "layer_scale1.lambda1",
                "ls2.scale_factor": "layer_scale2.lambda1",
            },
        ),
        (
            "vision_backbone.fused_featurizer.",
            "vision.siglip.",
            {
                "siglip.blocks.": "siglip.encoder.layers.",
                "patch_embed.proj.": "embeddings.patch_embedding.",
                "pos_embed": "embeddings.position_embedding.weight",
                "attn.qkv": "self_attn.{}_proj",
                "attn.proj": "self_attn.out_proj",
                ".norm": ".layer_norm",
            },
        ),
    ),
    "pi05": (
        ("model.", "", {}),  # lerobot's
        ("paligemma_with_expert.paligemma.model.vision_tower.vision_model.", "vision_tower.", {}),
        ("paligemma_with_expert.paligemma.lm_head.", "language_model.embed_tokens.", {}),  # tied: one copy
        ("paligemma_with_expert.paligemma.model.", "", {}),
        ("paligemma_with_expert.gemma_expert.model.", "expert.", {}),
    ),
}


def key_here(key: str, backbone: str, cfg) -> str | None:
    """The name here of a tensor of published files; None where nothing reads it. cfg: the model's config."""
    # the towers' heads, and the action expert's, 263 million parameters
    if re.fullmatch(r".*featurizer\.(norm|attn_pool)\..*|.*gemma_expert\.lm_head\..*", key):
        return None
    for beginning, here, others in NAMES[backbone]:
        if key.startswith(beginning):
            key = here + key.removeprefix(beginning)
            for theirs, ours in others.items():
                key = key.replace(theirs, ours)
    block = re.match(r"vision\.(dino|siglip)\.encoder\.layers?\.(\d+)", key)
    return None if block and int(block[2]) >= getattr(cfg, block[1]).num_hidden_layers else key


def renamed(tensors: dict[str, Tensor], backbone: str, cfg) -> dict[str, Tensor]:
    """Published tensors under the names here: q, k, v apart, without those that nothing reads."""
    named = {}
    for key, tensor in tensors.items():
        name = key_here(key, backbone, cfg)
        if name is not None:
            tensor = tensor[0] if name == "vision.siglip.embeddings.position_embedding.weight" else tensor
            parts = tensor.chunk(3) if "{}" in name else [tensor]
            named |= {name.format(part): t for part, t in zip("qkv", parts, strict=False)}
    return named


# ----------------------------------------------------------------------------------------- sizes and switches
def openvla_model(c: Checkpoint) -> dict:  # the `model` section that it amounts to
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


def pi05_model(c: Checkpoint, prefix: str) -> dict:  # prefix: "model." in lerobot's files
    refuse(
        f"{prefix}action_time_mlp_in.weight" in c.shapes,
        f"{c.folder} is a pi-0 checkpoint (it has action_time_mlp_in); this kit has pi-0.5",
    )
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


def gemma_size(c: Checkpoint, stack: str) -> dict:  # of one of pi-0.5's two Gemmas, which have 8 heads
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
    refuse(
        len(modes) > 1 or not modes <= known.keys(),
        f"{c.folder}/config.json normalises by {sorted(modes)}; known: one of {', '.join(known)} for both",
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
    stats = [suite_stats(published, suite) for suite in suites]
    refuse(
        not suites,
        f"{c.folder} has statistics of {', '.join(published) or 'no suite'}; say whose are wanted (suites)",
    )
    refuse(
        any(other != stats[0] for other in stats),
        f"{c.folder} normalises {', '.join(suites)} differently; run one suite at a time",
    )
    return stats[0]


def suite_stats(published: dict, suite: str) -> dict:
    """norm_stats of one suite from config.json or dataset_statistics.json; no mask: normalise everything."""
    for name in (suite, f"{suite}_no_noops"):
        if name in published:
            return {"action": {"mask": [True] * ACTION_DIM} | published[name]["action"]}
    raise UserError(f"the checkpoint has no statistics of {suite!r}; {did_you_mean(suite, published)}")


def lerobot_stats(c: Checkpoint, suites: list[str]) -> dict:
    files = sorted(c.folder.glob("policy_preprocessor*normalizer*.safetensors"))
    refuse(
        not files,
        f"{c.folder} holds no policy_preprocessor*normalizer*.safetensors, the statistics;"
        " get the whole folder",
    )
    tensors = disk.load_finite(files[0])
    return {
        kind: {
            key.removeprefix(theirs): tensor.flatten().tolist()[: DIMS[kind]]
            for key, tensor in tensors.items()
            if key.startswith(theirs)
        }
        for kind, theirs in (("action", "action."), ("state", "observation.state."))
    }


def openpi_stats(c: Checkpoint, suites: list[str]) -> dict:
    files = sorted(c.folder.rglob("norm_stats.json"))
    refuse(
        len(files) != 1,
        f"{c.folder} holds {len(files)} files norm_stats.json instead of one;"
        " copy openpi's assets folder into it",
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
        "tokenizer": "openvla/openvla-7b",  # the repository that publishes it
    },
    "lerobot": {
        "backbone": "pi05",
        "begins": "model.paligemma_with_expert.",
        "model": lerobot_model,
        "stats": lerobot_stats,
        "tokenizer": "google/paligemma-3b-pt-224",
    },
    "openpi": {
        "backbone": "pi05",
        "begins": "paligemma_with_expert.",
        "model": openpi_model,
        "stats": openpi_stats,
        "tokenizer": "google/paligemma-3b-pt-224",
    },
}


def model_of(path: Path) -> dict:
    """The `model` section that a published checkpoint amounts to."""
    with reading(path):
        c = open_checkpoint(path)
        return c.format["model"](c)


def load(path: Path, build: Callable, model: dict, suites: list[str], backbone: str) -> Policy:
    """The policy of a published checkpoint. load.py has `build`, and says what the rest is.

    Raises:
        UserError: names the first key or file that is missing, damaged or another model's.
    """
    with reading(path):
        c = open_checkpoint(path)
        name = c.format["backbone"]
        refuse(backbone not in ("", name), f"{path} is a checkpoint of {name}; set backbone={name}")
        with torch.device("meta"):
            policy = build(name, laid_over(c.format["model"](c), model))
        policy.load_weights(
            ((file, renamed(disk.load_finite(file), name, policy.cfg)) for file in c.files), assign=True
        )
        for module in policy.modules():  # SigLIP's; no file has them, and nothing here reads them
            if getattr(module, "position_ids", None) is not None:
                module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
        policy.norm_stats = checked_stats(c.format["stats"](c, suites), str(path))
    policy.tokenizer = read_tokenizer(
        c.folder / "tokenizer.json", f"put that of {c.format['tokenizer']} there"
    )
    return policy
