"""03_dpo.py from a published checkpoint, at full size on a GPU: random weights in the published formats.

    python tests/bench/full_size.py FOLDER [lerobot openvla]

FOLDER takes 8 GB for lerobot's pi-0.5 and 15 for OpenVLA-7B. Each is written there with the original's full
key list. Then 03 runs 20 steps of DPO with LoRA on 16 random pairs of 256-pixel images, from its own command
line. Prints for each: seconds, peak of main memory, the losses; the first margin must be exactly 0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import published_files

import common
from runtime import disk, stage
from runtime.config import HERE
from runtime.errors import UserError, one_of

KINDS = {"lerobot": ("pi05", "configs/pi05.yaml", 10), "openvla": ("openvla", "configs/openvla_7b.yaml", 1)}
PAIRS, STEPS = 16, 20


def write_checkpoint(kind: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    made = published_files.full_size(KINDS[kind][0], "cuda" if torch.cuda.is_available() else "cpu")
    if kind == "lerobot":
        published_files.write_lerobot(folder, made, chunk_size=10, tokenizer_max_length=200)
    else:
        published_files.write_openvla(folder, made, heads=32)


def write_pairs(folder: Path, horizon: int) -> None:
    g, shape = common.stream(0, "pairs"), (PAIRS, horizon, 7)
    images = [torch.randint(0, 256, (PAIRS, 256, 256, 3), generator=g, dtype=torch.uint8) for _ in range(2)]
    chunks = [torch.rand(shape, generator=g) * 2 - 1 for _ in range(2)]
    pairs = dict(zip(("agentview", "wrist", "chosen", "rejected"), [*images, *chunks], strict=True))
    pairs |= {"state": torch.rand(PAIRS, 8, generator=g), "mask": torch.ones(shape[:2]) > 0}
    folder.mkdir(parents=True)
    disk.save_tensors(folder / "pairs.safetensors", pairs)
    disk.write_rows(folder / "pairs.jsonl", [{"instruction": published_files.INSTRUCTIONS[0]}] * PAIRS)


def main(arguments: list[str]) -> None:
    if not arguments:
        raise UserError("usage: python tests/bench/full_size.py FOLDER [lerobot openvla]")
    root = Path(arguments[0])
    for kind in arguments[1:] or KINDS:
        one_of("kind of checkpoint", kind, KINDS)
        if (root / kind).exists():
            raise UserError(f"{root / kind} is there already; remove it, or name another folder")
        backbone, config, horizon = KINDS[kind]
        checkpoint, pairs = root / kind, root / f"{kind}-pairs"
        write_checkpoint(kind, checkpoint)
        write_pairs(pairs, horizon)
        files = sum(path.stat().st_size for path in checkpoint.iterdir())
        began = time.perf_counter()
        command = [sys.executable, "03_dpo.py", config, f"checkpoint={checkpoint}", f"pairs_from={pairs}"]
        command += [f"root={root / 'runs'}", f"dpo.steps={STEPS}", "dpo.log_every=1", "dpo.warmup=1"]
        _, status, used = os.wait4(subprocess.Popen(command, cwd=HERE).pid, 0)
        took = time.perf_counter() - began
        assert status == 0, status
        (metrics,) = (root / "runs").rglob(f"{backbone}/*/dpo-*/metrics.jsonl")
        rows = disk.read_jsonl(metrics)
        assert rows[0]["rewards/margins"] == 0 and rows[-1]["step"] == STEPS, rows
        said = {"kind": kind, "gb": files / 1e9, "s": took, "losses": [round(row["loss"], 4) for row in rows]}
        said["peak_main_memory_gib"] = used.ru_maxrss / 2**20
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    stage.command_line(lambda: main(sys.argv[1:]))
