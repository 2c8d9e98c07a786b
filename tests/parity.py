"""Number for number against fixtures that the original implementations made from random weights.

    python tests/parity.py tests/fixtures/pi05_tiny_public.safetensors [more fixtures of any size and seed]

Prints per output `name max_abs_diff tolerance ok|FAIL` and exits 0, or 1 when one fails. A fixture is a
.safetensors file of inputs (in.*), outputs (out.*) and, for a model, its weights under the published names
(sd.*), with a .json of sizes beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Row = tuple[str, Tensor, Tensor, float]  # name, ours, theirs, tolerance


# ----------------------------------------------------------------------------------------------------- pi-0.5
def pi05_policy(tensors: dict[str, Tensor], sizes: dict):
    """The fixture's weights in our model, through the key map that serves published checkpoints."""
    from backbones.pi05 import GemmaSize, Pi05, Pi05Config, VisionSize
    from backbones.published import renamed

    cfg = Pi05Config(
        vocab_size=sizes["vocab"],
        horizon=sizes["horizon"],
        flow_dim=sizes["adim"],
        max_tokens=sizes["L"],
        vlm=GemmaSize(**sizes["vlm"]),
        expert=GemmaSize(**sizes["expert"]),
        vision=VisionSize(**sizes["vision"]),
    )
    theirs = {key[3:]: value for key, value in tensors.items() if key.startswith("sd.")}
    policy = Pi05(cfg)
    policy.load_weights([("fixture", renamed(theirs, "pi05", cfg))])
    return policy.eval()


def openpi_times(steps: int) -> list[float]:
    """openpi's sequence of t: accumulated in float32 while t >= -dt / 2."""
    t, dt, times = torch.tensor(1.0), torch.tensor(-1.0 / steps), []
    while t >= -dt / 2:
        times.append(t.item())
        t = t + dt
    return times


@torch.no_grad()
def pi05(x: dict[str, Tensor], sizes: dict) -> Iterator[Row]:
    from common import Draws

    policy = pi05_policy(x, sizes)
    yield (
        "image_features_cam0",
        policy.image_features(x["in.images"][:, 0]),
        x["out.image_features_cam0"],
        2e-5,
    )
    embs, valid = policy.embed_prefix(x["in.images"], x["in.image_masks"], x["in.tokens"], x["in.token_mask"])
    yield "prefix_embs", embs, x["out.prefix_embs"], 2e-5
    yield "prefix_pad_mask", valid, x["out.prefix_pad_mask"], 0
    prefix, hidden = policy.prefill(embs, valid, to_end=True)
    yield "prefix_last_hidden", hidden[valid], x["out.prefix_last_hidden"][valid], 2e-5
    yield "prefix_k_layer0", prefix.keys[:, 0, 0][valid], x["out.prefix_k_layer0"][:, 0][valid], 2e-5
    yield "adarms_cond", policy.time_condition(x["in.time"]), x["out.adarms_cond"], 2e-5
    yield "suffix_embs", policy.action_in_proj(x["in.x_t"]), x["out.suffix_embs"], 2e-5
    yield "velocity", policy.velocity(prefix, x["in.x_t"], x["in.time"]), x["out.velocity"], 2e-5
    chunk, noise, t = x["in.actions"], x["in.noise"], x["in.time"]
    x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * chunk
    error = (noise - chunk - policy.velocity(prefix, x_t, t)).square()
    yield "loss_elementwise", error, x["out.loss_elementwise"], 1e-4
    yield "loss_mean", error.mean()[None], x["out.loss_mean"].flatten(), 1e-4
    real = x["out.loss_elementwise"][..., :7].mean()  # ours counts the real dimensions only
    yield "sft_loss", policy.sft_loss(prefix, chunk, Draws(t[None], noise[None])), real, 1e-4
    for key in (k for k in x if k.startswith("out.sample_actions_")):
        steps = int(key.rpartition("_")[2])
        yield key[4:], policy.sample_actions(prefix, noise, steps), x[key], 2e-4
        yield (
            f"{key[4:]}_float32_t",
            policy.sample_actions(prefix, noise, times=openpi_times(steps)),
            x[key],
            1e-5,
        )


def pi05_image(x: dict[str, Tensor], sizes: dict) -> Iterator[Row]:
    """Raw frames to the model's 224 pixels: openpi's uint8 result, and a part of lerobot's float one.

    Of lerobot's every 7th row and every 5th column.
    """
    from backbones.pi05 import resize_lerobot, resize_openpi

    for key in (k for k in x if k.startswith("in.raw_")):
        # LIBERO frames are shown turned by 180 degrees
        name, turned = (
            key.removeprefix("in.raw_"),
            x[key].flip(0, 1),
        )
        want = x[f"out.openpi_uint8_{name}"]
        yield (
            f"openpi_uint8_{name}",
            torch.from_numpy(resize_openpi(turned.numpy(), want.shape[0]).copy()),
            want,
            0,
        )
        ours = (
            resize_lerobot(turned.permute(2, 0, 1)[None].float() / 255, want.shape[0])[0].permute(1, 2, 0) * 2
            - 1
        )
        yield f"lerobot_f32_{name}", ours[::7, ::5], x[f"out.lerobot_f32_{name}_probe"], 2e-6


# ---------------------------------------------------------------------------------------------------- OpenVLA
def openvla_policy(tensors: dict[str, Tensor], sizes: dict):
    """The fixture's weights in our model, through the key map that serves published checkpoints."""
    from backbones.openvla import OpenVLA, OpenVLAConfig
    from backbones.policy import DecoderSize, TowerSize
    from backbones.published import renamed, suite_stats

    def tower(size: dict) -> TowerSize:
        width = size["embed_dim"]
        return TowerSize(width, size["depth"] - 1, size["num_heads"], int(width * size["mlp_ratio"]))

    text = sizes["text_config"]
    cfg = OpenVLAConfig(
        vocab_size=sizes["action_vocab_size"],
        vocab_padding=sizes["pad_to_multiple_of"],
        llm=DecoderSize(
            *(
                text[k]
                for k in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
            )
        ),
        dino=tower(sizes["dino"]),
        siglip=tower(sizes["siglip"]),
        image_size=sizes["image_sizes"][0],
        patch_size=sizes["dino"]["patch_size"],
        n_bins=sizes["n_action_bins"],
        image_pipeline="none",  # the fixture's images come from the processor alone
    )
    policy = OpenVLA(cfg)
    published = {key[3:]: value.float() for key, value in tensors.items() if key.startswith("sd.")}
    policy.load_weights([("fixture", renamed(published, "openvla", cfg))])
    policy.norm_stats = suite_stats(sizes["norm_stats"], sizes["unnorm_key"])
    return policy.eval()


@torch.no_grad()
def openvla(x: dict[str, Tensor], sizes: dict) -> Iterator[Row]:
    policy = openvla_policy(x, sizes)
    cfg, ids, mask = policy.cfg, x["in.input_ids"], x["in.attention_mask"]
    yield "pixel_values", policy.pixels(x["in.image_uint8"]), x["in.pixel_values"], 1e-6
    features = policy.patch_features(x["in.pixel_values"])
    yield "patch_features", features, x["out.patch_features"], 5e-5
    yield "projector_features", policy.project(features), x["out.projector_features"], 5e-5
    images = x["in.pixel_values"][:, None]
    embs, valid = policy.embed_prefix(images, ids, mask)
    hidden = policy.prefill(embs, valid, to_end=True)[1]
    logits = policy.language_model.lm_head(hidden)
    end = cfg.action_end
    yield "last_hidden_prelm", hidden[valid], x["out.last_hidden_prelm"][valid], 5e-5
    yield (
        "logits_action_vocab",
        logits[..., end - cfg.n_bins : end][valid],
        x["out.logits_action_vocab"][valid],
        5e-5,
    )
    yield "logits_probe", logits[..., ::997][valid], x["out.logits_probe"][valid], 5e-5

    # The same through the cached prefix, as the stages use it: prompts without "▁", action tokens behind it
    labels = x["in.labels"]
    prompt = mask & (labels == -100) & (ids != cfg.space)
    prefix = policy.prefill(*policy.embed_prefix(images, ids.where(prompt, cfg.eos), prompt))[0]
    taught = labels[(labels != -100) & (labels != cfg.eos)].view(len(ids), -1)
    space = torch.full((len(ids), 1), cfg.space)
    last = policy.follow(prefix.layers(), policy.surroundings(prefix.valid, 1), space)[0]
    yield "logits_full_last", last[0, -1], x["out.logits_full_last"], 5e-5
    # the two highest tokens share a centre
    chunk = policy.decode_actions(taught).where(taught != end - cfg.n_bins, 1.0)
    chunk = chunk.view(len(ids), 1, -1)
    yield "loss", policy.sft_loss(prefix, chunk)[None], x["out.loss"], 1e-5
    tokens = x["in.single_prompt_ids"].expand(2, -1)
    prefix = policy.prefill(*policy.embed_prefix(images, tokens, torch.ones_like(tokens, dtype=torch.bool)))[
        0
    ]
    chosen = policy.generate(prefix, torch.zeros(2, cfg.horizon, 7, cfg.n_bins))
    yield "action_token_ids", chosen, x["out.action_token_ids"], 0
    actions = policy.between_quantiles(policy.decode_actions(x["out.action_token_ids"]).numpy())
    yield "actions", torch.from_numpy(actions), x["out.actions"], 1e-9
    yield "encode_token_ids", policy.encode_actions(x["in.encode_actions"]), x["out.encode_token_ids"], 0
    yield (
        "decode_normalized",
        policy.decode_actions(x["in.decode_token_ids"]),
        x["out.decode_normalized"],
        1e-12,
    )


def openvla_image(x: dict[str, Tensor], sizes: dict) -> Iterator[Row]:
    """Frames from TensorFlow's pipeline, step by step.

    Its JPEG decoder is not PIL's: they differ by 17 grey levels at most, by 1.5 on average.
    """
    from backbones.openvla_images import center_crop, jpeg, resize_lanczos3

    turned = x["in.agentview_uint8"].flip(0, 1).contiguous()  # LIBERO frames are shown turned by 180 degrees
    read = torch.from_numpy(jpeg(turned.numpy()).copy())
    yield "rot180_jpeg", read, x["out.rot180_jpeg"], 17
    yield "rot180_jpeg_mean", (read.double() - x["out.rot180_jpeg"]).abs().mean(), torch.tensor(0.0), 1.5
    small = torch.from_numpy(resize_lanczos3(x["out.rot180_jpeg"].numpy(), 224))
    yield "lanczos224", small, x["out.lanczos224"], 1
    yield "lanczos224_share_off", (small != x["out.lanczos224"]).double().mean(), torch.tensor(0.0), 1e-4
    yield (
        "center_crop224",
        torch.from_numpy(center_crop(x["out.lanczos224"].numpy())),
        x["out.center_crop224"],
        0,
    )


# ------------------------------------------------------------------------------------------------------- main
KINDS = {
    "pi05": pi05,
    "pi05_image": pi05_image,
    "openvla": openvla,
    "openvla_image": openvla_image,
}  # fixture -> comparisons


def kind_of(path: Path, tensors: dict[str, Tensor]) -> tuple[str, dict]:
    """The kind of model and its sizes; image fixtures have no JSON and are told by their tensors."""
    if path.with_suffix(".json").is_file():
        sizes = json.loads(path.with_suffix(".json").read_text()).get("config", {})
        return sizes.get("model", sizes.get("model_type", path.stem)), sizes
    marks = {"out.openpi_uint8": "pi05_image", "out.lanczos224": "openvla_image"}
    return next(
        (kind for mark, kind in marks.items() if any(k.startswith(mark) for k in tensors)), path.stem
    ), {}


def compare(path: Path) -> Iterator[tuple[str, float, float, bool]]:
    """Name, largest absolute difference, tolerance and verdict of each output. NaN and other shapes fail."""
    tensors = load_file(path)
    kind, sizes = kind_of(path, tensors)
    if kind not in KINDS:
        yield f"{kind}: not supported yet", float("nan"), 0.0, False
        return
    for name, ours, theirs, tolerance in KINDS[kind](tensors, sizes):
        diff = (
            (ours.double() - theirs.double()).abs().max().item()
            if ours.shape == theirs.shape
            else float("inf")
        )
        yield name, diff, tolerance, diff <= tolerance


def main(paths: list[str]) -> int:
    failed = not paths
    for path in paths:
        print(f"# {path}")
        for name, diff, tolerance, ok in compare(Path(path)):
            print(f"{name} {diff:.3e} {tolerance:.0e} {'ok' if ok else 'FAIL'}")
            failed |= not ok
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
