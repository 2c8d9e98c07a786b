"""Other people's checkpoints, read without their code: format, sizes, settings, statistics, tensors, tokenizer.

openvla   openvla/openvla-7b[-finetuned-libero-*], the Hugging Face folder: bf16 shards, statistics in
          config.json
lerobot   lerobot/pi05_*: settings and statistics in the processors' files (policy_preprocessor.json,
          policy_postprocessor.json), which lerobot follows where config.json says something else
openpi    pi-0.5 as converted by openpi's examples/convert_jax_model_to_pytorch.py, with its assets folder

`look` comes first: it reads headers, JSON, statistics and the tokenizer, and refuses what would go wrong
before any weight is read. Sizes come from the shapes of the tensors, so a checkpoint of few layers can be
read too. What no file tells has the published values. The config's `model` section overrides everything.
Tensors go into the model file after file, in the file's dtype, so the weights are in memory once.
Not tried on a real published file. The key lists and formats are those of the original code
(tests/fixtures/keys-*.txt); the tests read random checkpoints in these formats, and folders that lerobot's
own code wrote.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
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
    shapes: dict[str, list[int]]  # of each key that is read
    config: dict
    kind: str  # one of FORMATS
    given: dict  # the config's `model` section, which overrides what the files say
    notes: list[str] = field(default_factory=list)  # for the user: what was found, and where

    format = property(lambda self: FORMATS[self.kind])

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
    there = sorted(file.name for file in path.glob("*"))
    parts = [name for name in there if re.match(OFT, name)]
    refuse(
        parts,
        f"{path} is an OpenVLA-OFT checkpoint (it has {', '.join(parts)}); this kit has OpenVLA without OFT's"
        " action head, chunks and second camera, and would fail every episode with it",
    )
    refuse(
        {"params", "_CHECKPOINT_METADATA"} & set(there) and "model.safetensors" not in there,
        f"{path} is one of openpi's JAX checkpoints; in openpi run `uv run"
        f" examples/convert_jax_model_to_pytorch.py --config_name pi05_libero --checkpoint_dir {path}"
        f" --output_path NEW`, then `cp -r {path}/assets NEW/`, and give NEW",
    )
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


def open_checkpoint(path: Path, given: dict) -> Checkpoint:
    """Keys and shapes of all files, from their headers; the keys tell the format. given: see Checkpoint.

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
    for kind, its in FORMATS.items():
        if any(key.startswith(its["begins"]) for key in shapes):
            config = read_object(config) if config.is_file() else {}
            return Checkpoint(folder, files, shapes, config, kind, given)
    raise UserError(
        f"{folder} is no checkpoint of OpenVLA or pi-0.5 (it begins with {next(iter(shapes), 'nothing')});"
        " no other can be read"
    )


# ------------------------------------------------------------------------------------------------------ names
OFT = r"(action_head|proprio_projector|noisy_action_projector|vision_backbone)--|lora_adapter$"  # its files
EMBEDDING = "language_model.embed_tokens.weight"
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

    processor = c.folder / "preprocessor_config.json"
    pixels = read_object(processor) if processor.is_file() else {}
    dino, llm = "vision_backbone.featurizer.", "language_model.model."
    rows, width = c.shapes[f"{llm}embed_tokens.weight"]
    patch = c.shapes[f"{dino}patch_embed.proj.weight"][-1]
    padding = c.config.get("pad_to_multiple_of", 64)
    c.notes.append(f"pixel statistics: {'preprocessor_config.json' if 'means' in pixels else 'ImageNet'}")
    return {f"pixel_{key}": pixels[key] for key in ("means", "stds") if key in pixels} | {
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
    head, embedding = f"{both}paligemma.lm_head.weight", f"{both}paligemma.model.{EMBEDDING}"
    if embedding in c.shapes and head in c.shapes:
        del c.shapes[head]
        c.notes.append("embedding: embed_tokens; lm_head is there too and is not read")
    vision = f"{both}paligemma.model.vision_tower.vision_model."
    if f"{vision}embeddings.patch_embedding.weight" not in c.shapes:  # transformers >= 5.6 has flattened it
        vision = vision.removesuffix("vision_model.")
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
        "vocab_size": c.shapes[embedding if embedding in c.shapes else head][0],
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


def openpi_model(c: Checkpoint) -> dict:
    if "action_horizon" not in c.config:
        c.notes.append("no config.json says the horizon: 10, as openpi's pi05_libero; else set model.horizon")
    return pi05_model(c, "") | {"horizon": c.config.get("action_horizon", 10)}


# ---------------------------------------------------------------------------------------- lerobot's processors
MODES = {
    "QUANTILES": "quantile",
    "QUANTILE10": "quantile10",
    "MEAN_STD": "mean_std",
    "MIN_MAX": "min_max",
    "IDENTITY": "identity",
}
PROMPT_STEP = "pi05_prepare_state_tokenizer_processor_step"
LIBERO_CAMERAS = {"observation.images.image": "agentview", "observation.images.image2": "wrist"}
STEPS = {  # of lerobot's processors, that this kit follows
    "rename_observations_processor",
    "to_batch_processor",
    "relative_actions_processor",
    "absolute_actions_processor",
    "normalizer_processor",
    "unnormalizer_processor",
    PROMPT_STEP,
    "tokenizer_processor",
    "device_processor",
}


def processor(c: Checkpoint, when: str) -> tuple[dict[str, dict], Path | None]:
    """lerobot's processor before ("pre") or behind ("post") the policy: the config of each step, and the file
    of its statistics (None: it has none).
    """
    path = c.folder / f"policy_{when}processor.json"
    listed = read_object(path)["steps"] if path.is_file() else []
    steps = {step.get("registry_name", step.get("class")): step.get("config", {}) for step in listed}
    unknown = steps.keys() - STEPS
    refuse(unknown, f"{path} has a step {', '.join(map(str, unknown))}, which this kit does not know")
    files = [c.folder / Path(step["state_file"]).name for step in listed if step.get("state_file")]
    files = files or sorted(c.folder.glob(f"policy_{when}processor*normalizer*.safetensors"))
    lost = [file.name for file in files if not file.is_file()]
    refuse(lost, f"{c.folder} lacks {', '.join(lost)}, the statistics that {path.name} names; get it again")
    return steps, next(iter(files), None)


def normaliser(c: Checkpoint, kind: str) -> tuple[str, float, Path | None]:
    """How lerobot normalises the "action" or the "state": the mode, its epsilon, the statistics' file."""
    steps, file = processor(c, "post" if kind == "action" else "pre")
    if not steps and file is None:  # an action is unnormalised as it was normalised
        steps, file = processor(c, "pre")
    its = steps.get("unnormalizer_processor", steps.get("normalizer_processor", {}))
    default = c.config.get("normalization_mapping", {"STATE": "QUANTILES", "ACTION": "QUANTILES"})
    modes = its.get("norm_map", default)
    mode = modes.get(kind.upper(), "IDENTITY")
    refuse(mode not in MODES, f"{c.folder} normalises the {kind} by {mode}; known: {', '.join(MODES)}")
    refuse(
        modes.get("VISUAL", "IDENTITY") != "IDENTITY",
        f"{c.folder} normalises images by {modes.get('VISUAL')}, which this kit does not",
    )
    return MODES[mode], float(its.get("eps", 1e-8)), file


def lerobot_cameras(c: Checkpoint, renamed: dict[str, str]) -> list[str]:
    """The cameras in the order of input_features. renamed: LIBERO's name -> lerobot's, of its rename_map.

    An empty camera is masked there, so it changes nothing.
    """
    theirs = {renamed.get(name, name): camera for name, camera in LIBERO_CAMERAS.items()}
    features = c.config.get("input_features") or {key: {"type": "VISUAL"} for key in theirs}
    wanted = [key for key, feature in features.items() if feature.get("type") == "VISUAL"]
    empty = [key for key in wanted if key.rpartition(".")[2].startswith("empty_camera_")]
    unknown = [key for key in wanted if key not in theirs and key not in empty]
    refuse(
        unknown and "cameras" not in c.given,
        f"{c.folder} wants the camera {', '.join(unknown)}, which LIBERO does not have under this name; say"
        " in the config what stands for its cameras, in their order: model: {cameras: [agentview, wrist]}",
    )
    if empty:
        c.notes.append(f"left out, as lerobot masks it: {', '.join(empty)}")
    return [theirs[key] for key in wanted if key in theirs]


def of_this_robot(c: Checkpoint) -> None:
    """UserError unless a lerobot folder's policy acts as LIBERO's robot does."""
    for kind, feature, where in (
        ("action", "action", "output_features"),
        ("state", "observation.state", "input_features"),
    ):
        shape = (c.config.get(where) or {}).get(feature, {}).get("shape", [DIMS[kind]])
        padded = [c.config.get(f"max_{kind}_dim", 32)]  # what lerobot writes where it was not told
        refuse(
            list(shape) not in ([DIMS[kind]], padded),
            f"{c.folder} is a policy of another robot: its {kind} has {shape[0]} numbers,"
            f" LIBERO's {DIMS[kind]}",
        )
    steps = processor(c, "pre")[0] | processor(c, "post")[0]
    refuse(
        c.config.get("use_relative_actions") or any(its.get("enabled") for its in steps.values()),
        f"{c.folder} has relative actions (use_relative_actions), which this kit does not: it would take"
        " them for LIBERO's",
    )
    refuse(
        c.config.get("type", "pi05") != "pi05",
        f"{c.folder} is a {c.config.get('type')} policy of lerobot; this kit has pi05",
    )
    periods = c.config.get("min_period", 4e-3), c.config.get("max_period", 4.0)
    refuse(periods != (4e-3, 4.0), f"{c.folder} has time periods {periods}; this kit has 0.004 and 4")


def lerobot_model(c: Checkpoint) -> dict:
    """lerobot's pi-0.5. Its prompt holds the state, which lerobot before 0.5 padded to max_state_dim.

    Only lerobot >= 0.5 writes embed_tokens, beside lm_head.
    """
    new = f"model.paligemma_with_expert.paligemma.model.{EMBEDDING}" in c.shapes
    sizes = pi05_model(c, "model.")
    of_this_robot(c)
    if normaliser(c, "action")[2] is None and list(c.folder.rglob("norm_stats.json")):
        c.notes.append(
            "no statistics of lerobot but openpi's norm_stats.json: taken for openpi's weights in lerobot's"
            " format (as lerobot/pi05_libero_base), with the settings that openpi trained pi05_libero with:"
            " prompt without state, 10 actions, quantiles; else set model.prompt and model.horizon"
        )
        return sizes
    steps = processor(c, "pre")[0]
    tokens, prompt = (steps.get(name, {}) for name in ("tokenizer_processor", PROMPT_STEP))
    padded = prompt.get("max_state_dim", c.config.get("max_state_dim", 32))
    c.notes.append(
        "written by lerobot >= 0.5 (embed_tokens is there): the prompt has 8 state numbers"
        if new
        else f"written by lerobot <= 0.4.4 (no embed_tokens): the prompt's state is padded to {padded} numbers"
    )
    return sizes | {
        "prompt": "lerobot",
        "prompt_state_dims": 8 if new else max(8, padded),
        "resize": "lerobot",
        "norm_eps": "lerobot",
        "normalisation": normaliser(c, "action")[0],
        "state_normalisation": normaliser(c, "state")[0],
        "max_tokens": tokens.get("max_length", c.config.get("tokenizer_max_length", 200)),
        "horizon": c.config.get("chunk_size", 50),
        "cameras": lerobot_cameras(c, steps.get("rename_observations_processor", {}).get("rename_map", {})),
    }


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
    stats = {}
    for kind, theirs in (("action", "action."), ("state", "observation.state.")):
        mode, eps, file = normaliser(c, kind)
        if file is None and mode != "identity":
            return openpi_stats(c, suites)
        tensors = disk.load_tensors(file) if file else {}
        named = {
            key.removeprefix(theirs): tensor.flatten().tolist()
            for key, tensor in tensors.items()
            if key.startswith(theirs)
        }
        stats[kind] = {"eps": eps} | first_numbers(c, kind, named)
        c.notes.append(f"{kind}: {mode}, epsilon {eps:g}, from {file.name if file else 'nothing'}")
    return stats


def first_numbers(c: Checkpoint, kind: str, named: dict[str, list]) -> dict[str, list]:
    """Statistics of LIBERO's robot without their padding; UserError where the rest is no padding."""
    n = DIMS[kind]
    named = {key: values for key, values in named.items() if values is not None and len(values) != 1}
    sizes = {sum(abs(v) > 1e-3 for v in values[n:]) + min(n, len(values)) for values in named.values()}
    refuse(
        sizes - {n},
        f"{c.folder} has statistics of another robot: its {kind} has {max(sizes, default=0)} numbers,"
        f" LIBERO's {n}",
    )
    return {key: values[:n] for key, values in named.items()}


def openpi_stats(c: Checkpoint, suites: list[str]) -> dict:
    found = {str(f.parent.relative_to(c.folder)): f for f in sorted(c.folder.rglob("norm_stats.json"))}
    ids = {name.removeprefix("assets/"): file for name, file in found.items()}
    chosen = c.given.get("asset_id") or next(iter(ids), "")
    refuse(
        not ids,
        f"{c.folder} lacks the statistics, assets/ASSET_ID/norm_stats.json: openpi's converter forgets them,"
        f" and lerobot's base policies have none; `cp -r JAX_CHECKPOINT/assets {c.folder}/` from the"
        " checkpoint that it was converted from (openpi's is gs://openpi-assets/checkpoints/pi05_libero)",
    )
    refuse(
        chosen not in ids or (len(ids) > 1 and not c.given.get("asset_id")),
        f"{c.folder} has statistics of {', '.join(ids)}; say in the config which to take:"
        f" model: {{asset_id: {next(iter(ids))}}}",
    )
    stats = disk.read_json(ids[chosen])
    stats = stats.get("norm_stats", stats)
    c.notes.append(f"statistics: {ids[chosen].relative_to(c.folder)}")
    return {
        kind: first_numbers(c, kind, stats[theirs]) for kind, theirs in (("action", "actions"), ("state", "state"))
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


def model_of(path: Path, given: dict) -> dict:
    """The `model` section that a published checkpoint amounts to, `given` laid over it."""
    with reading(path):
        c = open_checkpoint(path, given)
        return laid_over(c.format["model"](c), given)


def read_sentencepiece(path: Path):
    """PaliGemma's tokenizer from sentencepiece's file: a list of pieces, of which the frequent ones come first.

    Gemma's: pairs of pieces are merged, the most frequent first; unknown characters become bytes; blanks
    become "▁". The file is a protocol buffer, whose first field repeats: a piece (text, score, type).
    """
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
    from transformers.tokenization_utils_base import generate_merges

    data, at, kinds = path.read_bytes(), 0, {}  # kinds: piece -> its type

    def number() -> int:  # a varint
        nonlocal at
        value = shift = 0
        while True:
            at, byte = at + 1, data[at]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    with reading(path):
        while at < len(data) and data[at] == 0x0A:
            at += 1
            end = number() + at
            at += 1
            start = number() + at
            start, at = at, start
            text = data[start:at].decode()
            kinds[text] = data[end - 1] if end - at > 5 else 1
            at = end
    """The folder's tokenizer; UserError with the command that gets it."""
    sentences, name = c.folder / "paligemma_tokenizer.model", c.format["tokenizer"]
    get = f"`hf download {name} tokenizer.json --local-dir {c.folder}`"
    if c.format["backbone"] == "pi05":
        if sentences.is_file() and not (c.folder / "tokenizer.json").is_file():
            return read_sentencepiece(sentences)
        get = f"accept the licence of {name} on Hugging Face, then {get}; or `cp ~/.cache/openpi/big_vision/"
        get += f"paligemma_tokenizer.model {c.folder}/`, which openpi fetches without an account"
    refuse(not (c.folder / "tokenizer.json").is_file(), f"{c.folder} lacks tokenizer.json: {get}")
    return read_tokenizer(c.folder / "tokenizer.json", get)


def look(path: Path, build: Callable, given: dict, suites: list[str]) -> tuple[Checkpoint, Policy]:
    """The checkpoint, and its policy on the meta device: everything but the weights, which are not read.

    Raises:
        UserError: names what is missing (and how to get it), damaged, another model's or another robot's.
    """
    with reading(path):
        c = open_checkpoint(path, given)
        with torch.device("meta"):
            policy = build(c.format["backbone"], laid_over(c.format["model"](c), given))
            shapes = {key: torch.empty(shape) for key, shape in c.shapes.items()}
        policy.load_weights([(c.folder, renamed(shapes, policy.backbone, policy.cfg))])
        policy.norm_stats = checked_stats(c.format["stats"](c, suites), str(path))
        for kind in policy.norm_stats:
            policy.normalise(np.zeros(DIMS[kind], np.float32), kind)
    policy.tokenizer = tokenizer_of(c)
    policy.ids([], 0)
    return c, policy


def read_tensors(c: Checkpoint, file: Path) -> dict[str, Tensor]:  # of a file, those that are read
    return {key: tensor for key, tensor in disk.load_tensors(file).items() if key in c.shapes}


def load(path: Path, build: Callable, given: dict, suites: list[str]) -> Policy:
    """The policy of a published checkpoint. load.py has `build`, and says what `given` and `suites` are."""
    c, policy = look(path, build, given, suites)
    with reading(path):
        policy.load_weights(
            (
                (file, renamed(read_tensors(c, file), policy.backbone, policy.cfg))
                for file in c.files
            ),
            assign=True,
        )
    for module in policy.modules():  # SigLIP's; no file has them, and nothing here reads them
        if getattr(module, "position_ids", None) is not None:
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    return policy
