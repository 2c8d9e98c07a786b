"""What stages hand on as data, checked at the door: demonstrations (from 00 to 01 and 06), preference pairs (02 to 03 and 07)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from disk import UserError, load_tensors, one_line, read_jsonl


@dataclass
class Demo:
    """One demonstration. Images are turned by 180 degrees to what policies see; frame i belongs to step image_steps[i]."""

    task: int
    number: int  # its number in the file
    init_state: int  # LIBERO init state it starts from; -1 where the file does not say (the official ones)
    instruction: str
    actions: np.ndarray  # (T, 7) env units
    state: np.ndarray  # (T, 8) eef_pos, axis-angle, gripper_qpos
    image_steps: np.ndarray  # (N,)
    agentview: np.ndarray  # (N, S, S, 3) uint8
    wrist: np.ndarray  # (N, S, S, 3) uint8


def read_demos(path: Path, task: int) -> Iterator[Demo]:
    """Demonstrations of one LIBERO HDF5 file: the official ones (an image every step) and this kit's (obs/image_steps).

    Raises:
        UserError: not an HDF5 file, truncated, keys missing, or values that are not finite.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            info = json.loads(file["data"].attrs["problem_info"])
            names = sorted(file["data"], key=lambda n: int(n.rpartition("_")[2]))
            for name in names:
                group = file["data"][name]
                obs, actions = group["obs"], group["actions"][()].astype(np.float32)
                state = np.concatenate([obs["ee_pos"][()], obs["ee_ori"][()], obs["gripper_states"][()]], axis=1)
                steps = obs["image_steps"][()] if "image_steps" in obs else np.arange(len(actions))
                images = [obs[key][()][:, ::-1, ::-1] for key in ("agentview_rgb", "eye_in_hand_rgb")]
                if not (np.isfinite(actions).all() and np.isfinite(state).all()):
                    raise UserError(f"{path}: {name} has values that are not finite; record it again with 00_demos.py")
                shapes = actions.shape[1:] == (7,) and state.shape == (len(actions), 8) and len(steps) > 0
                size = images[0].shape[1]
                shapes &= all(i.shape == (len(steps), size, size, 3) and i.dtype == np.uint8 for i in images)
                if not shapes or steps.dtype.kind not in "iu" or steps.min() < 0 or steps.max() >= len(actions):
                    raise UserError(f"{path}: {name} has unexpected shapes; is this a LIBERO demonstration file?")
                number, init = int(name.rpartition("_")[2]), int(group.attrs.get("init_state_id", -1))
                instruction = info["language_instruction"]
                instruction = instruction if isinstance(instruction, str) else " ".join(instruction)
                yield Demo(task, number, init, instruction, actions, state.astype(np.float32), steps, *images)
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:  # h5py's, of all kinds
        why = one_line(error)
        raise UserError(f"{path} is not a complete LIBERO HDF5 file ({why}); record it again with 00_demos.py") from error


def check_pairs(pairs: dict, policy) -> None:
    """UserError unless the chunks are as long as the policy's: another one's are in other units as well."""
    h, horizon = pairs["chosen"].shape[1], policy.horizon
    if h != horizon:
        raise UserError(
            f"the pairs have chunks of {h} actions, the policy of {horizon}: they are another policy's, see pairs_from"
        )


def read_pairs(folder: Path) -> dict:
    """The preference pairs of 02_collect_prefs.py: pairs.safetensors, and `instruction`, a list of N strings.

    Raises:
        UserError: something is missing, not finite, or of another shape than the rest.
    """
    path = folder / "pairs.safetensors"
    pairs = load_tensors(path)
    if absent := [key for key in ("agentview", "wrist", "state", "chosen", "rejected", "mask") if key not in pairs]:
        raise UserError(f"{path} lacks {absent[0]}; remove its folder and run 02_collect_prefs.py again")
    pairs["instruction"] = [row["instruction"] for row in read_jsonl(folder / "pairs.jsonl", "instruction")]
    n, h, *_ = *pairs["mask"].shape, 0, 0
    size = pairs["agentview"].shape[2:3]
    image, chunk = (n, *size, *size, 3), (n, h, 7)
    shapes = {"agentview": image, "wrist": image, "state": (n, 8), "chosen": chunk, "rejected": chunk, "mask": (n, h)}
    wrong = [key for key, shape in shapes.items() if pairs[key].shape != shape or not pairs[key].isfinite().all()]
    if wrong or n == 0 or len(pairs["instruction"]) != n or pairs["mask"].dtype != torch.bool:
        what = f"{wrong[0]} has" if wrong else "mask and instructions have"
        raise UserError(f"{path}: {what} another shape than the rest, or no finite values; run 02_collect_prefs.py again")
    return pairs
