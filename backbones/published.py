"""Other people's checkpoints, read without their code: settings, statistics, tensors, tokenizer.

openvla   openvla/openvla-7b[-finetuned-libero-*], the Hugging Face folder: bf16 shards, statistics in
          config.json
lerobot   lerobot/pi05_*: settings and statistics in the processors' files (policy_preprocessor.json,
          policy_postprocessor.json), which lerobot follows where config.json says something else
openpi    pi-0.5 as converted by openpi's examples/convert_jax_model_to_pytorch.py, with its assets folder

`load` reads headers, JSON, statistics and the tokenizer first, and refuses what would go wrong before it
reads any weight. Sizes come from the shapes of the tensors, so a checkpoint of few layers can be read too.
What no file says has the published values. The config's `model` section overrides everything. Tensors go into
the model file after file, in the file's dtype, so the weights are in memory once.
Not tried on a real published file. The key lists and formats are those of the original code
(tests/fixtures/keys-*.txt); the tests read random checkpoints in these formats, and a folder that lerobot's
own code wrote.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from backbones.policy import DIMS, Policy, checked_stats, read_tokenizer
from common import ACTION_DIM, LAYOUTS
from runtime import UserError, did_you_mean, disk, laid_over, one_line, refuse, warn


# --------------------------------------------------------------------------------------- other people's files
@dataclass
class Checkpoint:  # none of its tensors is loaded
    folder: Path
    files: list[Path]
    shapes: dict[str, list[int]]  # of each key that is read
    config: dict
    format: dict  # one of FORMATS
    given: dict  # the config's `model` section, which overrides what the files say
    notes: list[str] = field(default_factory=list)  # for the user: what was found, and where

    def layers(self, prefix: str) -> int:  # how many of them, `prefix`0, 1, 2, ..., there are
        return len(
            {key.removeprefix(prefix).partition(".")[0] for key in self.shapes if key.startswith(prefix)}
        )


reading = partial(  # one line for whatever goes wrong with files that are not as their format demands
    disk.reading,
    otherwise="get it again",
    wrong="is no checkpoint of OpenVLA or pi-0.5, or truncated or damaged",
)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that an index names.

    Raises:
        UserError: there is none, a shard is missing, or the index names a file outside the folder.
    """
    there = sorted(file.name for file in path.glob("*"))
    oft = [
        name
        for name in there
        if re.match(OFT, name)
        or (name == "modeling_prismatic.py" and "NUM_ACTIONS_CHUNK" in disk.read_text(path / name))
    ]
    refuse(
        oft,
        f"{path} is an OpenVLA-OFT checkpoint (it has {', '.join(oft)}); OFT's action head, chunks and second"
        " camera are not in this kit, and without them every episode fails; take one of openvla/openvla-7b*",
    )
    refuse(
        {"params", "_CHECKPOINT_METADATA", "manifest.ocdbt"} & set(there)
        and "model.safetensors" not in there,
        f"{path} is one of openpi's JAX checkpoints; in openpi run `uv run"
        f" examples/convert_jax_model_to_pytorch.py --config_name pi05_libero --checkpoint_dir {path}"
        f" --output_path NEW`, then `cp -r {path}/assets NEW/`, and give NEW",
    )
    refuse(
        "adapter_model.safetensors" in there,
        f"{path} holds an adapter, adapter_model.safetensors; merge it into its base model first, or take it"
        " out of the folder if it is merged",
    )
    index = path / "model.safetensors.index.json"
    refuse(
        index.is_file() and "model.safetensors" in there,
        f"{path} holds model.safetensors, which the original code reads, and shards with {index.name}; move"
        " away what is not the checkpoint",
    )
    if index.is_file():
        names = sorted(set(disk.read_object(index)["weight_map"].values()))
        for name in names:  # one outside the folder is not `there` either
            refuse(
                name not in there, f"{path} lacks the shard {name!r} of its index; get the checkpoint again"
            )
        return [path / name for name in names]
    absent = "model.safetensors" not in there
    pickles = [name for name in there if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    refuse(
        absent and pickles,
        f"{path} holds {', '.join(pickles)}, a pickle, which nothing here opens;"
        " convert it to safetensors first",
    )
    refuse(absent, f"{path} holds no model.safetensors and no {index.name}; is it a checkpoint's folder?")
    return [path / "model.safetensors"]


def open_checkpoint(folder: Path, given: dict | None = None) -> Checkpoint:
    """Keys and shapes of all files, from their headers; the keys tell the format. given: see Checkpoint.

    Raises:
        UserError: a file is a git-LFS pointer, damaged or another model's.
    """
    files, shapes = weight_files(folder), {}
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
            config = disk.read_object(config) if config.is_file() else {}
            return Checkpoint(folder, files, shapes, config, its, given or {})
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

    dino, llm = "vision_backbone.featurizer.", "language_model.model."
    rows, width = c.shapes[f"{llm}embed_tokens.weight"]
    patch = c.shapes[f"{dino}patch_embed.proj.weight"][-1]
    padding = c.config.get("pad_to_multiple_of", 64)
    return pixel_statistics(c) | {
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


def pixel_statistics(c: Checkpoint) -> dict:
    """Of preprocessor_config.json, whose tvf_normalize_params win over its means and stds, as in OpenVLA."""
    path = c.folder / "preprocessor_config.json"
    its = {"means": [], "stds": []} | (disk.read_object(path) if path.is_file() else {})
    towers = [{"mean": m, "std": s} for m, s in zip(its["means"], its["stds"], strict=True)]
    towers = its.get("tvf_normalize_params") or towers
    c.notes.append(f"pixel statistics: {path.name if towers else 'of ImageNet'}")
    return {f"pixel_{k}s": [tower[k] for tower in towers] for k in ("mean", "std") if towers}


def pi05_model(c: Checkpoint, prefix: str) -> dict:  # prefix: "model." in lerobot's files
    refuse(
        f"{prefix}action_time_mlp_in.weight" in c.shapes,
        f"{c.folder} is a pi-0 checkpoint (it has action_time_mlp_in); this kit has pi-0.5",
    )
    both = f"{prefix}paligemma_with_expert."
    head, embedding = f"{both}paligemma.lm_head.weight", f"{both}paligemma.model.{EMBEDDING}"
    if embedding in c.shapes and head in c.shapes:
        del c.shapes[head]  # lerobot >= 0.5 has both, and reads the text with embed_tokens
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
    horizon = c.config.get("action_horizon", 10)
    c.notes.append(
        f"taken for openpi's pi05_libero: prompt without state, {horizon} actions; if it was trained with"
        " discrete_state_input, set model.prompt=lerobot, which is this prompt"
    )
    if "lora" in f"{c.config.get('paligemma_variant')} {c.config.get('action_expert_variant')}":
        warn(
            f"{c.folder} was trained with LoRA, which openpi's converter drops (openpi #958); merge it before"
        )
    return pi05_model(c, "") | {"horizon": horizon}


# --------------------------------------------------------------------------------------- lerobot's processors
MODES = {
    "QUANTILES": "quantile",
    "QUANTILE10": "quantile10",
    "MEAN_STD": "mean_std",
    "MIN_MAX": "min_max",
    "IDENTITY": "identity",
}
PUBLISHED_MODES = {"STATE": "QUANTILES", "ACTION": "QUANTILES"}  # lerobot's own defaults
PROMPT_STEP = "pi05_prepare_state_tokenizer_processor_step"
LIBERO_CAMERAS = {  # the last one is what other LIBERO sets call the second
    "observation.images.image": "agentview",
    "observation.images.image2": "wrist",
    "observation.images.wrist_image": "wrist",
}
STEPS = {  # of lerobot's processors; this kit does the same, or refuses what it does not
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


def processor(c: Checkpoint, when: str) -> dict[str, dict]:
    """lerobot's steps before ("pre") or behind ("post") the policy: name -> settings and `state_file`."""
    path = c.folder / f"policy_{when}processor.json"
    listed = disk.read_object(path)["steps"] if path.is_file() else []
    steps = {step.get("registry_name", step.get("class")): step | step.get("config", {}) for step in listed}
    refuse(
        steps.keys() - STEPS, f"{path} has the step {[*(steps.keys() - STEPS)]}, which this kit does not know"
    )
    return steps


def normaliser(c: Checkpoint, kind: str) -> tuple[str, float, Path | None]:
    """How lerobot normalises the "state", and the "action" on its way back: mode, epsilon, and the file of
    the statistics, which may be missing (None: there never was one).
    """
    when = "post" if kind == "action" and list(c.folder.glob("policy_postprocessor*")) else "pre"
    steps, pattern = processor(c, when), f"policy_{when}processor*normalizer*.safetensors"
    its = steps.get("unnormalizer_processor", steps.get("normalizer_processor", {}))
    name = its.get("state_file") if its else next((f.name for f in sorted(c.folder.glob(pattern))), None)
    modes = its.get("norm_map", c.config.get("normalization_mapping", PUBLISHED_MODES))
    mode, only = modes.get(kind.upper(), "IDENTITY"), its.get("normalize_observation_keys")
    refuse(
        mode not in MODES or modes.get("VISUAL", "IDENTITY") != "IDENTITY" or only is not None,
        f"{c.folder} normalises by {modes} (of observations: {only or 'all'}); this kit knows"
        f" {', '.join(MODES)} for STATE and ACTION, and IDENTITY alone for VISUAL",
    )
    return MODES[mode], float(its.get("eps", 1e-8)), name and c.folder / Path(name).name


def lerobot_cameras(c: Checkpoint) -> dict[str, str]:
    """Name -> camera, in the order of input_features. Empty cameras are masked there, and change nothing."""
    renamed = processor(c, "pre").get("rename_observations_processor", {}).get("rename_map", {})
    theirs = {renamed.get(name, name): camera for name, camera in LIBERO_CAMERAS.items()}
    features = c.config.get("input_features") or {key: {"type": "VISUAL"} for key in [*theirs][:2]}
    wanted = [key for key, its in features.items() if its["type"] == "VISUAL" and "empty_camera_" not in key]
    unknown = ", ".join(key for key in wanted if key not in theirs)
    refuse(
        unknown and "cameras" not in c.given,
        f"{c.folder} has the camera {unknown}; LIBERO's are {', '.join(LIBERO_CAMERAS)}. Say in the config"
        " what stands for its cameras, in their order: model: {cameras: [agentview, wrist]}",
    )
    return dict(zip(wanted, c.given.get("cameras") or [theirs[key] for key in wanted], strict=False))


def check_robot(c: Checkpoint) -> None:
    """UserError unless a lerobot folder's policy acts as LIBERO's robot does, and embeds time as openpi's."""
    features = (c.config.get("output_features") or {}) | (c.config.get("input_features") or {})
    for kind, name in (("action", "action"), ("state", "observation.state")):
        shape = features.get(name, {}).get("shape", [DIMS[kind]])
        refuse(
            shape not in ([DIMS[kind]], [c.config.get(f"max_{kind}_dim", 32)]),  # padded: no data set told it
            f"{c.folder} is another robot's policy: its {kind} has {shape} numbers, LIBERO's {DIMS[kind]}",
        )
    periods = [c.config.get("min_period", 4e-3), c.config.get("max_period", 4.0)]
    refuse(
        periods != [4e-3, 4.0],
        f"{c.folder} embeds time with periods of {periods}; here they are always openpi's, 0.004 to 4",
    )
    refuse(
        c.config.get("use_relative_actions")
        or any(its.get("enabled") for its in (processor(c, "pre") | processor(c, "post")).values()),
        f"{c.folder} has relative actions (use_relative_actions), which this kit would take for LIBERO's;"
        " train it with use_relative_actions=false",
    )


def lerobot_model(c: Checkpoint) -> dict:
    """lerobot's pi-0.5. Its prompt holds the state, which lerobot before 0.5 padded to max_state_dim numbers.

    Only lerobot >= 0.5 writes embed_tokens, beside lm_head.
    """
    new = f"model.paligemma_with_expert.paligemma.model.{EMBEDDING}" in c.shapes
    sizes, steps, dims = pi05_model(c, "model."), processor(c, "pre"), DIMS["state"]
    check_robot(c)
    mode, _, file = normaliser(c, "action")
    if file is None and mode != "identity" and (steps or not new) and list(c.folder.rglob("norm_stats.json")):
        return sizes  # openpi's weights: settings as openpi's
    if not new:
        dims = max(dims, steps.get(PROMPT_STEP, {}).get("max_state_dim", 32))
    c.notes.append(
        f"written by lerobot {'>= 0.5 (it has' if new else '<= 0.4.4 (it has no'} embed_tokens):"
        f" the prompt has {dims} state numbers"
    )
    return sizes | {
        "prompt": "lerobot",
        "prompt_state_dims": dims,
        "resize": "lerobot",
        "norm_eps": "lerobot",
        "normalisation": mode,
        "state_normalisation": normaliser(c, "state")[0],
        "max_tokens": steps.get("tokenizer_processor", {}).get(
            "max_length", c.config.get("tokenizer_max_length", 200)
        ),
        "horizon": c.config.get("chunk_size", 50),
        "cameras": [*lerobot_cameras(c).values()],
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
    """norm_stats of one suite from config.json or dataset_statistics.json; no mask: normalise everything.

    Where the file has none for a layout, this returns its suite's.
    """
    for name in [of + end for of in (suite, LAYOUTS.get(suite, suite)) for end in ("", "_no_noops")]:
        if name in published:
            return {"action": {"mask": [True] * ACTION_DIM} | published[name]["action"]}
    raise UserError(f"the checkpoint has no statistics of {suite!r}; {did_you_mean(suite, published)}")


def lerobot_stats(c: Checkpoint, suites: list[str]) -> dict:
    stats = {}
    for kind, theirs in (("action", "action."), ("state", "observation.state.")):
        mode, eps, file = normaliser(c, kind)
        if c.given.get("asset_id") or (mode != "identity" and not (file and file.is_file())):
            return openpi_stats(c, suites)
        tensors = disk.load_finite(file) if mode != "identity" else {}
        named = {
            key.removeprefix(theirs): tensor.flatten().tolist()
            for key, tensor in tensors.items()
            if key.startswith(theirs) and key != f"{theirs}count"
        }
        stats[kind] = {"eps": eps} | unpadded(c, kind, named)
        c.notes.append(
            f"{kind}: {mode}, epsilon {eps:g}, statistics from {file.name if tensors else 'nowhere'}"
        )
    return stats


def unpadded(c: Checkpoint, kind: str, named: dict[str, list | None]) -> dict[str, list]:
    """The statistics of LIBERO's robot without their padding; UserError where there is more than padding."""
    n, named = DIMS[kind], {key: values for key, values in named.items() if values is not None}
    sizes = {min(n, len(values)) + sum(abs(v) > 1e-3 for v in values[n:]) for values in named.values()}
    refuse(
        sizes - {n},
        f"{c.folder} has another robot's statistics: its {kind} has {[*(sizes - {n})]} numbers, LIBERO's {n}",
    )
    low = named.get("min", named.get("q01", []))
    refuse(
        kind == "action" and low and low[6] >= 0,
        f"{c.folder} has gripper commands from {low[6:]} on; LIBERO's open at -1 and close at 1",
    )
    return {key: values[:n] for key, values in named.items()}


def openpi_stats(c: Checkpoint, suites: list[str]) -> dict:
    files = {
        str(file.parent.relative_to(c.folder)).removeprefix("assets/"): file
        for file in sorted(c.folder.rglob("norm_stats.json"))
    }
    refuse(not files, f"{c.folder} lacks the statistics, {c.format['statistics'].format(c.folder)}")
    first = next(iter(files))
    chosen = c.given.get("asset_id", first if len(files) == 1 else None)
    refuse(
        chosen not in files,
        f"{c.folder} has statistics of {', '.join(files)}; say in the config whose to take, such as"
        f" model: {{asset_id: {first}}}",
    )
    stats = disk.read_object(files[chosen])
    stats = stats.get("norm_stats", stats)
    c.notes.append(f"statistics: openpi's {files[chosen].relative_to(c.folder)}{c.format['of openpi']}")
    return {"action": unpadded(c, "action", stats["actions"]), "state": unpadded(c, "state", stats["state"])}


# ---------------------------------------------------------------------------------------------------- loading
LIBERO_STATS = "gs://openpi-assets/checkpoints/pi05_libero/assets"
PALIGEMMA = (
    "accept the licence of google/paligemma-3b-pt-224 on its Hugging Face page, `hf auth login`, `hf download"
    " google/paligemma-3b-pt-224 tokenizer.json --local-dir {0}`; or, if you have run openpi: `cp"
    " ~/.cache/openpi/big_vision/paligemma_tokenizer.model {0}/`"
)
FORMATS = {
    "openvla": {
        "writer": "OpenVLA",
        "backbone": "openvla",
        "begins": "vision_backbone.",  # some key begins with this
        "model": openvla_model,  # Checkpoint -> the `model` section that it amounts to
        "stats": openvla_stats,  # Checkpoint, suites -> norm_stats
        "tokenizers": ["tokenizer.json"],  # the first that is there
        "get": "`hf download openvla/openvla-7b tokenizer.json --local-dir {0}`",
    },
    "lerobot": {
        "writer": "lerobot",
        "backbone": "pi05",
        "begins": "model.paligemma_with_expert.",
        "model": lerobot_model,
        "stats": lerobot_stats,
        "of openpi": ". lerobot/pi05_libero_base, which comes without statistics, is openpi's pi05_libero in"
        " lerobot's format: openpi trained it on a prompt without state, 10 actions and quantiles. If this is"
        " another one, set model.prompt, model.horizon, model.normalisation",
        "statistics": "policy_preprocessor*normalizer*.safetensors (lerobot/pi05_base has none: fine-tune it"
        " first, or take lerobot/pi05_libero_finetuned) or openpi's norm_stats.json (for"
        f" lerobot/pi05_libero_base: `gsutil cp -r {LIBERO_STATS} {{0}}/`)",
        "tokenizers": ["tokenizer.json", "paligemma_tokenizer.model", "tokenizer.model"],
        "get": PALIGEMMA,
    },
    "openpi": {
        "writer": "openpi",
        "backbone": "pi05",
        "begins": "paligemma_with_expert.",
        "model": openpi_model,
        "stats": openpi_stats,
        "of openpi": "",
        "statistics": "assets/ASSET_ID/norm_stats.json, which openpi's converter forgets: `cp -r"
        " JAX_CHECKPOINT/assets {0}/`; those of openpi's pi05_libero:"
        f" `gsutil cp -r {LIBERO_STATS} {{0}}/`",
        "tokenizers": ["tokenizer.json", "paligemma_tokenizer.model", "tokenizer.model"],
        "get": PALIGEMMA,
    },
}


def read_sentencepiece(path: Path, remedy: str):
    """PaliGemma's tokenizer from sentencepiece's own file, as openpi keeps it."""
    from transformers import GemmaTokenizer
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    try:
        return GemmaTokenizer(
            **SentencePieceExtractor(str(path)).extract(GemmaTokenizer.model)
        ).backend_tokenizer
    except ImportError as error:
        raise UserError(f"{path} needs two more packages: pip install -e '.[tokenizer]'") from error
    except Exception as error:  # protobuf and tokenizers raise nothing more special
        raise UserError(f"{path} is no tokenizer ({one_line(error)}); {remedy}") from error


def tokenizer_of(c: Checkpoint):
    """The folder's tokenizer; UserError with the command that gets it."""
    remedy, names = c.format["get"].format(c.folder), c.format["tokenizers"]
    there = [c.folder / name for name in names if (c.folder / name).is_file()]
    refuse(not there, f"{c.folder} lacks {names[0]}: {remedy}")
    return (read_tokenizer if there[0].suffix == ".json" else read_sentencepiece)(there[0], remedy)


def load(path: Path, build: Callable, given: dict, suites: list[str], read: bool) -> Policy:
    """The policy of a published checkpoint. load.py has `build`, and says what the others are.

    Without `read` it is on the meta device, and its weights are not read. With it, the same is done first.

    Raises:
        UserError: names what is missing (and how to get it), damaged, another model's or another robot's.
    """
    with reading(path):
        c = open_checkpoint(path, given)
        with torch.device("meta"):
            policy = build(c.format["backbone"], laid_over(c.format["model"](c), given))
            empty = {key: torch.empty(shape) for key, shape in c.shapes.items()}
        policy.load_weights([(c.folder, renamed(empty, policy.backbone, policy.cfg))])
        policy.norm_stats = checked_stats(c.format["stats"](c, suites), str(path))
    policy.tokenizer = tokenizer_of(c)
    policy.ids([], 0)
    for kind in policy.norm_stats:
        policy.normalise(np.zeros(DIMS[kind], np.float32), kind)
    policy.found = [
        f"{path} is a checkpoint of {c.format['writer']} for {policy.backbone}",
        *c.notes,
        f"prompt: {policy.cfg.prompt}; cameras: {', '.join(policy.cfg.cameras)}; {policy.horizon} actions",
    ]
    if not read:
        return policy
    with reading(path):
        loaded = ((f, {k: t for k, t in disk.load_finite(f).items() if k in c.shapes}) for f in c.files)
        policy.load_weights(((f, renamed(t, policy.backbone, policy.cfg)) for f, t in loaded), assign=True)
    return policy
