"""Cells: success and latency with caches and with fewer denoise steps (the paper's inference section).

reads   <run>/<backbone>/seed<k>/sft/ (01); or `checkpoint`, published or a student of extras/distill.py
writes  <run>/<backbone>/seed<k>/cell-<name>[-val]/: episodes.jsonl, summary.json, done.json; beside the
        folder cells[-val].{json,md}, the table of all cells so far
cost    50 episodes, 2 to 10 s each on one core
try     python -m extras.cells configs/tiny.yaml start=final execute=2 cells.reuse=chunk cells.threshold=0.98
        python -m extras.cells configs/tiny.yaml start=final denoise_steps=2 cells.solver=midpoint

A cell is one setting of these keys, `execute` (actions carried out between two looks) and `denoise_steps`;
extras/caches.py says what is reused. Every cell is paired, episode by episode, with the one that looks as
often, reuses nothing and takes ten Euler steps.
Differs from the paper: an action is carried out once; the similarity check is part of the latency; a test
shows what a hit cannot see, and the table says it; a cell that only looks less often (execute=5, 10) is the
baseline that a cache has to beat.
"""

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import backbones
import common
from extras.caches import Actor, sees_on_a_hit
from report import episodes
from report.tables import listing
from runtime import disk, ranks, stage, workers
from runtime.config import Count
from runtime.errors import UserError
from sim.env import CRASHES, TaskEnv, carry_out, tasks


@dataclass
class Config(common.SceneConfig, common.ActingConfig):
    section: ClassVar = "cells"
    by_torchrun: ClassVar = True
    reuse: Literal["none", "chunk", "prefix", "patches"] = "none"
    threshold: Annotated[float, -1] = 0.98  # similarity that allows reuse; the paper: 0.92, 0.95, 0.98, 0.999
    cap: Count = 4  # looks in a row that may reuse
    relevant: Annotated[float, 0, 1] = 0.25  # patches: share of image tokens, the most attended, always anew
    solver: Literal["euler", "midpoint", "heun"] = "euler"  # the last two evaluate the flow twice a step
    group: Literal["val", "test"] = "val"  # init states: "val" (35-39, for every choice) or "test" (40-49)
    n_init: Count = 5  # init states per task

    @property
    def cell(self) -> str:
        """E.g. none-k5-euler10, chunk0.98x4-k2-euler10, student-none-k8-euler1."""
        kept = "" if self.reuse == "none" else f"{self.threshold:g}x{self.cap}"
        start = "" if self.start == "final" else f"-at{self.start}"
        weights = f"{Path(self.checkpoint).name}-" if self.checkpoint else ""
        return f"{weights}{self.reuse}{kept}-k{self.execute}-{self.solver}{self.denoise_steps}{start}"

    suffix = property(lambda self: "-val" if self.group == "val" else "")
    folder = property(lambda self: self.seed_dir / f"cell-{self.cell}{self.suffix}")

    def inputs(self) -> list[Path]:
        if self.blank_images:
            raise UserError("caches compare images, and black ones are all alike; set blank_images=false")
        if self.backbone != "pi05" and (self.reuse == "patches" or self.solver != "euler"):
            only = f"reuse={self.reuse} with solver={self.solver} needs pi05's layers or its flow"
            raise UserError(f"{only}; with {self.backbone} use reuse=chunk or prefix, and solver=euler")
        common.init_states(self.group, self.n_init)
        tasks(self)
        return self.sft_inputs()


# --------------------------------------------------------------------------------------------------- episodes
def play(env: TaskEnv, actor: Actor, init: int) -> dict:
    """One episode from init state `init`. Its seconds end up in timing.json, as wall times do."""
    began, crash = time.time(), ""
    try:
        env.reset(init)
        while not env.success and env.steps < env.max_steps:
            carry_out(env, actor(env.observe()))
    except CRASHES as error:  # the simulator diverged: neither success nor failure of the policy
        crash = type(error).__name__
    wall = 0.0 if crash else round(time.time() - began, 2)
    return {
        "suite": env.suite,
        "task": env.task_id,
        "init_state": init,
        "success": not crash and bool(env.success),
        "steps": env.steps,
        "crash": crash,
        "looks": actor.looks,
        "hits": round(actor.hits, 3),
        "wall_s": {"episode": wall} | actor.seconds,
    }


def evaluate(job: tuple[Config, Path, str, int]) -> None:
    """Worker: play the episodes of one task that played.jsonl lacks, and append a row for each."""
    cfg, folder, suite, task = job
    played = episodes.played(folder)
    missing = [
        init for init in common.init_states(cfg.group, cfg.n_init) if (suite, task, init) not in played
    ]
    if not missing:
        return
    policy = backbones.load_sft(cfg)
    with contextlib.closing(TaskEnv(suite, task, cfg.image_size, cfg.render)) as env:
        for init in missing:
            row = play(env, Actor(policy, cfg, (suite, task, init)), init)
            disk.append_jsonl(folder / "played.jsonl", row | {"seed": cfg.seed})


# ----------------------------------------------------------------------------------------------------- tables
# what a cell and its baseline must share, beside the weights
PROTOCOL = ("suites", "image_size", "render", "execute", "noise_scale")


def teacher(checkpoint: str) -> str:
    """The checkpoint that a student was made from, by its done.json; of any other checkpoint, itself."""
    done = Path(checkpoint) / "done.json"
    facts = disk.read_json(done) if done.is_file() else {"stage": ""}
    return facts["config"]["checkpoint"] if facts["stage"] in ("distill", "05_distill") else checkpoint


def cells_table(cfg: Config) -> list[dict]:
    """A row per finished cell, paired with the one that looks as often, reuses nothing, takes ten steps."""
    finished = episodes.finished(cfg.seed_dir, "cell-*", cfg.group)
    of_cell = {facts["cell"]: (facts["config"], played) for facts, played, _ in finished}
    rows = []
    for facts, played, timing in finished:
        used, seconds = facts["config"], timing["episodes_s"].values()
        steps, looks = (max(1, sum(row[key] for row in played)) for key in ("steps", "looks"))
        spent = {part: 1e3 * sum(s[part] for s in seconds) / steps for part in ("check", "encode", "act")}
        row = {
            "name": facts["cell"],
            "suite": " ".join(used["suites"]),
            "backbone": cfg.backbone,
            "policy": "sft",
            "group": cfg.group,
            "train_seeds": episodes.train_seeds(facts),
            "sees_on_a_hit": facts["sees_on_a_hit"],
            "hit_rate": sum(row["hits"] for row in played) / looks,
            "ms_per_step": sum(spent.values()),
            "ms_per_step_parts": spent,
            "command": timing["command"],
            "commit": timing["commit"],
        }
        rows.append(row | episodes.summarise(played))
        baseline = {"reuse": "none", "solver": "euler", "denoise_steps": 10, "execute": used["execute"]}
        baseline |= {"start": used["start"], "checkpoint": teacher(used["checkpoint"])}
        name = replace(cfg, **baseline).cell
        base, others = of_cell.get(name, (used, []))
        if others and name != facts["cell"] and all(base[key] == used[key] for key in PROTOCOL):
            rows[-1] |= {"paired_with": name} | episodes.paired(played, others)
    return rows


def cells_markdown(rows: list[dict]) -> str:
    """ms per step of the environment; `a hit sees`: what of a new observation reaches the actions then."""
    columns = {
        "cell": "{name}",
        "success": "{successes} / {n}",
        "95 % interval": "{ci95[0]:.0%} to {ci95[1]:.0%}",
        "hits": "{hit_rate:.0%}",
        "ms per step": "{ms_per_step:.2f}",
        "of it the check": "{ms_per_step_parts[check]:.2f}",
        "a hit sees": lambda row: (
            "" if row["name"].startswith("none") else " and ".join(row["sees_on_a_hit"]) or "nothing new"
        ),
        "over no reuse": lambda row: f"{100 * row['diff_vs_sft']:+.0f} points" if "gained" in row else "",
        "gained / lost": lambda row: "{gained} / {lost}".format_map(row) if "gained" in row else "",
        "p": lambda row: f"{row['p_vs_sft']:.2g}" if "gained" in row else "",
    }
    return listing(rows, columns)


def main(cfg: Config, run: stage.Run) -> dict:
    jobs = [(cfg, run.dir, suite, task) for suite, task in tasks(cfg)]
    total, title = len(jobs) * cfg.n_init, f"cell {cfg.cell}"
    workers.run(evaluate, ranks.share(jobs), cfg.workers, title, lambda: len(episodes.played(run.dir)), total)
    return episodes.finish(run, cell=cfg.cell, sees_on_a_hit=sees_on_a_hit(backbones.load_sft(cfg), cfg))


def show_table(cfg: Config) -> None:
    """All cells so far of this seed and group: cells.json, cells.md."""
    rows = cells_table(cfg)
    disk.write_json(cfg.seed_dir / f"cells{cfg.suffix}.json", rows)
    disk.write_atomic(cfg.seed_dir / f"cells{cfg.suffix}.md", cells_markdown(rows) + "\n")
    print(cells_markdown(rows), flush=True)


if __name__ == "__main__":
    stage.start(main, Config, dry_run=backbones.dry_run, after=show_table)
