"""Number for number against fixtures that the original implementations made from random weights.

    python tests/parity.py tests/fixtures/pi05_tiny_public.safetensors [more fixtures of any size and seed]

Prints per output `name max_abs_diff tolerance ok|FAIL` and exits 0, or 1 when one fails. A fixture is a .safetensors of inputs
(in.*), outputs (out.*) and, for a model, its weights under the published names (sd.*), with a .json of sizes beside it.
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


# ---------------------------------------------------------------------------------------------------------------- pi-0.5
def pi05_policy(tensors: dict[str, Tensor], sizes: dict):
    """The fixture's weights in our model, through the key map that serves published checkpoints."""
    from backbones.pi05 import Pi05, Pi05Config, native_key

    cfg = Pi05Config(
        vocab_size=sizes["vocab"],
        horizon=sizes["horizon"],
        flow_dim=sizes["adim"],
        max_tokens=sizes["L"],
        **{part: sizes[part] for part in ("vlm", "expert", "vision")},
    )
    named = {native_key(key[3:]): value for key, value in tensors.items() if key.startswith("sd.")}
    named.pop(None, None)
    policy = Pi05(cfg)
    policy.load_weights(named, "fixture")
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
    yield "image_features_cam0", policy.image_features(x["in.images"][:, 0]), x["out.image_features_cam0"], 2e-5
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
        yield f"{key[4:]}_float32_t", policy.sample_actions(prefix, noise, times=openpi_times(steps)), x[key], 1e-5


def pi05_image(x: dict[str, Tensor], sizes: dict) -> Iterator[Row]:
    """Raw frames to the model's 224 pixels: openpi's uint8 result, and every 7th row and 5th column of lerobot's float one."""
    from backbones.pi05 import resize_lerobot, resize_openpi

    for key in (k for k in x if k.startswith("in.raw_")):
        name, turned = key.removeprefix("in.raw_"), x[key].flip(0, 1)  # LIBERO frames are shown turned by 180 degrees
        want = x[f"out.openpi_uint8_{name}"]
        yield f"openpi_uint8_{name}", torch.from_numpy(resize_openpi(turned.numpy(), want.shape[0]).copy()), want, 0
        ours = resize_lerobot(turned.permute(2, 0, 1)[None].float() / 255, want.shape[0])[0].permute(1, 2, 0) * 2 - 1
        yield f"lerobot_f32_{name}", ours[::7, ::5], x[f"out.lerobot_f32_{name}_probe"], 2e-6


# ------------------------------------------------------------------------------------------------------------------ main
KINDS = {"pi05": pi05, "pi05_image": pi05_image}  # kind of a fixture -> its comparisons


def kind_of(path: Path, tensors: dict[str, Tensor]) -> tuple[str, dict]:
    """The kind of model and its sizes; image fixtures have no JSON and are told by their tensors."""
    if path.with_suffix(".json").is_file():
        sizes = json.loads(path.with_suffix(".json").read_text()).get("config", {})
        return sizes.get("model", path.stem), sizes
    return ("pi05_image" if any(k.startswith("out.openpi_uint8") for k in tensors) else path.stem), {}


def compare(path: Path) -> Iterator[tuple[str, float, float, bool]]:
    """Name, largest absolute difference, tolerance and verdict of each output. NaN and other shapes fail."""
    tensors = load_file(path)
    kind, sizes = kind_of(path, tensors)
    if kind not in KINDS:
        yield f"{kind}: not supported yet", float("nan"), 0.0, False
        return
    for name, ours, theirs, tolerance in KINDS[kind](tensors, sizes):
        diff = (ours.double() - theirs.double()).abs().max().item() if ours.shape == theirs.shape else float("inf")
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
