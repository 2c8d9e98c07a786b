"""What the tests of both backbones feed a policy with, and a file of demonstrations."""

import importlib
import json
from pathlib import Path

import h5py
import numpy as np
import torch

from runtime import stage
from runtime.config import load_config

INSTRUCTIONS = [
    "pick up the black bowl and place it on the plate",
    "open the drawer",
    "turn on the stove and put the moka pot on top of it",
]
SIZE = {"width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
FLOW_MODEL = {
    "vlm": SIZE,
    "expert": SIZE,
    "vision": VISION | {"image_size": 32, "patch_size": 16},
    "horizon": 4,
    "flow_dim": 7,
}
FLOW_MODEL |= {"state_token": True, "gate_bias": 1.0}  # pi05 at a size for tests
STATES = {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2}  # datasets of the state in a file of demonstrations


def stats(n: int, generator: np.random.Generator) -> dict:
    mean, std = generator.normal(size=n), generator.uniform(0.5, 2, size=n)
    return {
        k: v.tolist()
        for k, v in {"mean": mean, "std": std, "q01": mean - 2 * std, "q99": mean + 2 * std}.items()
    }


def observations(n: int = 3, size: int = 32) -> dict:
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, n, size, size, 3), dtype=torch.uint8, generator=g)
    instructions = [INSTRUCTIONS[i % 3] for i in range(n)]
    return {
        "agentview": images[0],
        "wrist": images[1],
        "state": torch.randn(n, 8, generator=g),
        "instruction": instructions,
    }


def part(obs: dict, rows: list[int]) -> dict:
    return {k: [v[i] for i in rows] if isinstance(v, list) else v[rows] for k, v in obs.items()}


def close(a, b, tolerance=2e-6):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def write_demonstrations(
    path: Path, init_states: list[int], steps: int = 13, every: int = 4, size: int = 32
) -> None:
    """A LIBERO HDF5 file as 00_demos.py writes it, of random numbers.

    Row s of a demonstration's actions has s / 100 in its first column, and so has the state: so a test can
    see which step something belongs to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    g = np.random.default_rng(len(init_states))
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": INSTRUCTIONS[0]})
        for i, init_state in enumerate(init_states):
            demo = data.create_group(f"demo_{i}")
            demo.attrs["init_state_id"] = init_state
            arrays = {"actions": g.uniform(-1, 1, (steps, 7)), "obs/image_steps": np.arange(0, steps, every)}
            arrays |= {f"obs/{key}": g.normal(size=(steps, n)) for key, n in STATES.items()}
            arrays["actions"][:, 0] = arrays["obs/ee_pos"][:, 0] = np.arange(steps) / 100
            images = (len(arrays["obs/image_steps"]), size, size, 3)
            arrays |= {
                f"obs/{key}": g.integers(0, 256, images, np.uint8)
                for key in ("agentview_rgb", "eye_in_hand_rgb")
            }
            for key, value in arrays.items():
                demo[key] = value


def run_stage(script: str, *argv: str, after=stage.nothing) -> None:
    """Run a stage in this process: run_stage("03_dpo", "configs/micro.yaml", "dpo.steps=1").

    after: as in stage.execute.
    """
    module = importlib.import_module(script)
    stage.execute(module.main, load_config(module.Config, list(argv)), after=after)
