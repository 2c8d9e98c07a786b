"""A first run's report: what the kit found in a published checkpoint, and what the policy then did with it.

    python -m extras.first_run configs/pi05.yaml checkpoint=FOLDER [key=value ...]

writes  <root>/first_run/first_run.json, which it also prints, part by part: a run that fails shows how far it
        got. It holds the files' hashes, but no path. Beside it lie the episodes, as 04 writes them
cost    ten episodes of the first suite, one per task, on a validation init state

For whoever has published weights. The kit's makers have none, and such a report shows them what is wrong.
"""

import contextlib
import importlib
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import backbones
import common
from backbones import load_policy, published
from runtime import disk, load_config, refuse, stage
from sim.env import TaskEnv, tasks

evaluation = importlib.import_module("04_eval")


def files(cfg) -> dict:
    """What the checkpoint is, by its headers and its JSON files."""
    c = published.open_checkpoint(Path(cfg.checkpoint), cfg.model)
    policy = load_policy(
        cfg.checkpoint, model=cfg.model, suites=cfg.suites, backbone=cfg.backbone, read=False
    )
    return {
        "format": c.format["writer"],
        "found": [line.replace(str(c.folder), "FOLDER") for line in policy.found],
        "model": asdict(policy.cfg),
        "tensors": len(c.shapes),
        "files": sorted(str(path.relative_to(c.folder)) for path in c.folder.rglob("[!.]*")),
    }


def first_looks(cfg) -> dict:
    """Six chunks for one observation: seconds, and the actions (6 H, 7) as the environment gets them."""
    (suite, task), chunks, times = tasks(cfg)[0], [], []
    with contextlib.closing(TaskEnv(suite, task, cfg.image_size, cfg.render)) as env:
        env.reset(common.init_states("val")[0])
        obs, began = env.observe(), time.time()
    policy = evaluation.load_policy(cfg)
    for look in range(6):
        times.append(time.time() - began)
        chunks.append(backbones.propose(policy, obs, cfg, [common.stream(0, "first run", look)])[0])
    normalised = torch.cat(chunks)[:, : common.ACTION_DIM]
    actions = policy.unnormalise(normalised)
    return {
        "actions": {
            name: getattr(torch, name)(actions, 0).tolist() for name in ("mean", "std", "amin", "amax")
        },
        "beyond_1": (normalised.abs() > 1).float().mean().item(),
        "seconds": times,
        "instruction": obs["instruction"],
        "state": obs["state"].tolist(),
        "statistics": policy.norm_stats,
    }


def episodes(cfg) -> dict:
    """The success of 04's episodes; what they depend on, and the hashes of the checkpoint's files."""
    stage.execute(evaluation.main, cfg)
    summary, done, timing = (disk.read_json(cfg.folder / f"{n}.json") for n in ("summary", "done", "timing"))
    return summary | {
        "config": done["config"] | {"checkpoint": ""},
        "versions": done["versions"],
        "hashes": {Path(name).name: its for name, its in done["inputs"].items()},
        "timing": timing | {"command": "", "gpu": cfg.device == "cuda" and torch.cuda.get_device_name()},
    }


def main() -> None:
    given, report = sys.argv[1:], {}
    refuse(not given, "usage: python -m extras.first_run configs/NAME.yaml checkpoint=FOLDER [key=value ...]")
    few = ["name=first_run", "eval.group=val", "eval.n_init=1", "eval.videos=0"]
    cfg = load_config(evaluation.Config, [given[0], *few, *given[1:]])
    refuse(not cfg.checkpoint, "say which published checkpoint: checkpoint=FOLDER")
    if cfg.dry_run:
        return stage.execute(evaluation.main, cfg, backbones.preview)
    for part in (files, first_looks, episodes):
        report[part.__name__] = part(replace(cfg, suites=cfg.suites[:1]))
        print(json.dumps({part.__name__: report[part.__name__]}), flush=True)
    disk.write_json(cfg.run_dir / "first_run.json", report)


if __name__ == "__main__":
    stage.command_line(main)
