"""Random checkpoints in the published formats: every key of the original's list, few layers, small widths."""

import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import backbones

FIXTURES = Path(__file__).parent / "fixtures"
INSTRUCTIONS = ["pick up the milk and place it in the basket", "open the drawer"]
SMALL = {  # full size -> size here; every width of either model
    "openvla": {
        1024: 32,
        3072: 96,
        4096: 64,
        1152: 48,
        3456: 144,
        2304: 96,
        4304: 80,
        2176: 80,
        8704: 320,
        11008: 96,
        32064: 896,
        256: 4,
    }
    | {1: 1, 4: 4, 3: 3, 14: 8},
    "pi05": {
        1152: 48,
        4304: 80,
        2048: 64,
        16384: 96,
        256: 8,
        1024: 32,
        4096: 48,
        3072: 96,
        257152: 300,
        32: 32,
        3: 3,
        14: 8,
    },
}
LAYERS = {"openvla": 3, "pi05": 2}  # kept of each stack


def tensors(backbone: str) -> dict[str, torch.Tensor]:
    """Random bf16 tensors for the published keys of the first few layers."""
    g, small, found = torch.Generator().manual_seed(0), SMALL[backbone], {}
    listing = FIXTURES / {"openvla": "keys-openvla-7b.txt", "pi05": "keys-pi05.txt"}[backbone]
    for line in listing.read_text().splitlines():
        key, shape = line.split("\t")
        layer = re.search(r"\.(?:layers|blocks)\.(\d+)\.", key)
        tied = backbone == "pi05" and "embed_tokens" in key  # the files hold the copy called lm_head alone
        if not tied and (layer is None or int(layer[1]) < LAYERS[backbone]):
            shape = small_shape(backbone, key, json.loads(shape), small)
            found[key] = (torch.randn(shape, generator=g) * 0.1 + ("norm" in key)).to(torch.bfloat16)
    return found


def small_shape(backbone: str, key: str, shape: list[int], small: dict) -> list[int]:
    if backbone == "openvla":
        if (
            "featurizer.blocks" in key and "fused" not in key and "mlp" in key
        ):  # DINO's 4096 is 4 x 1024, not the Llama's
            return [{1024: 32, 4096: 128}[n] for n in shape]
        return [64 if "projector" in key and n == 4096 else small[n] for n in shape]
    expert, attention = "gemma_expert" in key, re.search(r"self_attn\.([qkvo])_proj", key)
    if attention and "vision" not in key:  # 8 heads of 8, one of keys and values
        width, rows = (32 if expert else 64), (64 if attention[1] in "qo" else 8)
        return [width, rows] if attention[1] == "o" else [rows, width]
    if "vision" in key and "position_embedding" in key:
        return [4, 48]
    return [small[n] for n in shape]


def statistics(n: int) -> dict:
    rng = np.random.default_rng(n)
    mean, std = rng.normal(size=n), rng.uniform(0.5, 2, size=n)
    named = {
        "mean": mean,
        "std": std,
        "q01": mean - 2 * std,
        "q99": mean + 2 * std,
        "min": mean - 3 * std,
        "max": mean + 3 * std,
    }
    return {key: value.tolist() for key, value in named.items()}


def write_tokenizer(folder: Path, words: int = 0) -> None:
    """words: so many, as PaliGemma's own, and one added for images, which no prompt and no weight has."""
    tokenizer = json.loads(backbones.build_tokenizer(INSTRUCTIONS).to_str())
    vocab = tokenizer["model"]["vocab"]
    vocab |= {f"<loc{i:04d}>": i for i in range(len(vocab), words)}
    if words:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": words, "content": "<image>", "special": True} | flags)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def full_size(backbone: str, device: str) -> dict[str, torch.Tensor]:
    """Random bf16 tensors for all published keys in their published shapes, drawn on the device.

    The functions write_* take them as `made`.
    """
    listing = FIXTURES / {"openvla": "keys-openvla-7b.txt", "pi05": "keys-pi05.txt"}[backbone]
    rows = [line.split("\t") for line in listing.read_text().splitlines()]
    rows = [
        (key, json.loads(shape)) for key, shape in rows if not (backbone == "pi05" and "embed_tokens" in key)
    ]
    normal = {"device": device, "dtype": torch.bfloat16}
    return {key: (0.02 * torch.randn(shape, **normal) + ("norm" in key)).cpu() for key, shape in rows}


def write_openvla(folder: Path, made: dict | None = None, heads: int = 4) -> dict[str, torch.Tensor]:
    """Two shards with an index, statistics in config.json."""
    made = made or tensors("openvla")
    names = {key: f"model-0000{1 + (i > len(made) // 2)}-of-00002.safetensors" for i, key in enumerate(made)}
    for name in sorted(set(names.values())):
        save_file({key: t for key, t in made.items() if names[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    action = statistics(7) | {"mask": [True] * 6 + [False]}
    config = {"model_type": "openvla", "n_action_bins": 256, "pad_to_multiple_of": 64}
    config |= {"text_config": {"num_attention_heads": heads}}
    config |= {
        "torch_dtype": "bfloat16",
        "norm_stats": {"libero_object_no_noops": {"action": action, "proprio": statistics(8)}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return made


def write_lerobot(folder: Path, made: dict | None = None, **config) -> dict[str, torch.Tensor]:
    """One file whose keys begin with model., statistics as tensors of the normaliser."""
    made = {f"model.{key}": t for key, t in (made or tensors("pi05")).items()}
    save_file(made, folder / "model.safetensors")
    modes = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    config = {
        "type": "pi05",
        "chunk_size": 6,
        "tokenizer_max_length": 60,
        "normalization_mapping": modes,
    } | config
    (folder / "config.json").write_text(json.dumps(config))
    stats = {"action": statistics(7), "observation.state": statistics(8)}
    named = {
        f"{kind}.{key}": torch.tensor(values)
        for kind, of in stats.items()
        for key, values in of.items()
        if key in ("mean", "std")
    }
    save_file(named, folder / "policy_preprocessor_step_5_normalizer_processor.safetensors")
    write_tokenizer(folder, words=300)
    return made


def write_openpi(folder: Path, made: dict | None = None) -> dict[str, torch.Tensor]:
    """One file, statistics in the assets folder."""
    made = made or tensors("pi05")
    save_file(made, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"action_dim": 32, "action_horizon": 10, "paligemma_variant": "gemma_2b"})
    )
    assets = folder / "assets" / "physical-intelligence" / "libero"
    assets.mkdir(parents=True)
    (assets / "norm_stats.json").write_text(
        json.dumps({"norm_stats": {"actions": statistics(7), "state": statistics(8)}})
    )
    write_tokenizer(folder, words=300)
    return made
