"""05 - Success and latency of caches and of fewer denoise steps, one cell at a time (paper's inference section).

reads   <run>/<backbone>/seed<k>/sft/ (01); or a published checkpoint, or a student of 05_distill.py
writes  <run>/<backbone>/seed<k>/cell-<name>[-val]/: episodes.jsonl, summary.json, done.json; beside it
        cells[-val].{json,md}, the table of all cells so far
cost    50 episodes, 2 to 10 s each on one core
try     python 05_cells.py configs/tiny.yaml start=final execute=2 cells.reuse=chunk cells.threshold=0.98
        python 05_cells.py configs/tiny.yaml start=final denoise_steps=2 cells.solver=midpoint

A cell is what these keys, `execute` (actions carried out between two looks) and `denoise_steps` describe; caches.py says what is
reused. Every cell is paired, episode by episode, with the one that looks as often, reuses nothing and takes ten Euler steps.
Differs from the paper: an action is executed once; the similarity check is part of the latency; what a hit cannot see is tested
and stands in the table; a cell that merely looks less often (execute=5, 10) is the baseline that a cache has to beat.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import caches
import common
import disk
import episodes
import memory
import ranks
import runs
import sim


@dataclass
class Config(common.RunConfig):
    reuse: str = "none"  # "none" | "chunk" | "prefix" | "patches"
    threshold: float = 0.98  # similarity from which on something is reused; the paper: 0.92, 0.95, 0.98, 0.999
    cap: int = 4  # looks in a row that may reuse
    relevant: float = 0.25  # patches: share of the image tokens, those most attended to, that are never reused
    solver: str = "euler"  # "euler" | "midpoint" | "heun"; the last two evaluate the flow twice a step
    group: str = "val"  # init states: "val" (35-39, for every choice) or "test" (40-49, reported)
    n_init: int = 5  # init states per task

    def __post_init__(self):
        super().__post_init__()
        common.at_least(self, threshold=-1, cap=1, relevant=0, n_init=1)
        choices = {"reuse": caches.REUSE, "solver": caches.SOLVERS, "group": ("val", "test")}
        for key, known in choices.items():
            common.one_of(f"cells.{key}", getattr(self, key), known)


def cell_name(cfg: Config) -> str:
    """E.g. none-k5-euler10, chunk0.98x4-k2-euler10, student-none-k8-euler1: its folder, without cell- or -val."""
    kept = "" if cfg.reuse == "none" else f"{cfg.threshold:g}x{cfg.cap}"
    name = f"{cfg.reuse}{kept}-k{cfg.execute}-{cfg.solver}{cfg.denoise_steps}{'' if cfg.start == 'final' else f'-at{cfg.start}'}"
    return f"{Path(cfg.checkpoint).name}-{name}" if cfg.checkpoint else name


def play(job: tuple):
    """Worker: episodes of one task in a cell; yields a row for each. Seconds go where wall times go, to timing.json."""
    cfg, _, suite, task, inits = job
    policy, env = common.load_sft(cfg), sim.TaskEnv(suite, task, cfg.image_size, cfg.render)
    for init in inits:
        actor = caches.Actor(policy, cfg, (suite, task, init))
        row = episodes.play(env, init, actor)
        row |= {"looks": actor.looks, "hits": round(actor.hits, 3), "wall_s": {"episode": row["wall_s"]} | actor.seconds}
        yield {"suite": suite, "task": task, "init_state": init, "seed": cfg.seed} | row
    env.close()


PROTOCOL = ("suites", "image_size", "render", "execute", "noise_scale")  # what the two of a pair share, beside the weights
NO_REUSE = {"reuse": "none", "solver": "euler", "denoise_steps": 10}


def teacher(checkpoint: str) -> str:
    """The checkpoint that a student was made from, by its done.json; of any other, itself."""
    done = Path(checkpoint) / "done.json"
    facts = disk.read_json(done) if done.is_file() else {"stage": ""}
    return facts["config"]["checkpoint"] if facts["stage"] == "05_distill" else checkpoint


def cells_table(cfg: Config) -> list[dict]:
    """A row per finished cell, paired with the one that reuses nothing and looks as often, in ten Euler steps."""
    cells, rows = episodes.finished(cfg.seed_dir, "cell-*", cfg.group), []
    found = {facts["cell"]: (facts, played, timing) for facts, played, timing in cells}
    for name, (facts, played, timing) in found.items():
        seconds, steps = list(timing["episodes_s"].values()), sum(row["steps"] for row in played)
        spent = {part: 1e3 * sum(s[part] for s in seconds) / max(1, steps) for part in ("check", "encode", "act")}
        row = {"name": name, "suite": " ".join(facts["config"]["suites"]), "backbone": cfg.backbone, "policy": "sft"}
        row |= {"group": cfg.group, "train_seeds": episodes.train_seeds(facts), "sees_on_a_hit": facts["sees_on_a_hit"]}
        row |= {"hit_rate": sum(r["hits"] for r in played) / max(1, sum(r["looks"] for r in played))}
        row |= {"ms_per_step": sum(spent.values()), "ms_per_step_parts": spent} | episodes.summarise(played)
        row |= {"command": timing["command"], "commit": timing["commit"]}
        mine = facts["config"]
        same = {key: mine[key] for key in ("execute", "start")} | {"checkpoint": teacher(mine["checkpoint"])}
        base = cell_name(replace(cfg, **NO_REUSE, **same))
        if base in found and base != name and all(found[base][0]["config"][key] == mine[key] for key in PROTOCOL):
            row |= {"paired_with": base} | episodes.paired(played, found[base][1])
        rows.append(row)
    return rows


def cells_markdown(rows: list[dict]) -> str:
    """ms per step of the environment; `a hit sees`: what of a new observation reaches the actions then."""
    head = (
        "cell | success | 95 % interval | hits | ms per step | of it the check | a hit sees | over no reuse | gained / lost | p"
    )
    lines = [f"| {head} |", "|---" * 10 + "|"]
    for r in rows:
        sees = "" if r["name"].startswith("none") else " and ".join(r["sees_on_a_hit"]) or "nothing new"
        cells = [r["name"], f"{r['successes']} / {r['n']}", "{:.0%} to {:.0%}".format(*r["ci95"]), f"{r['hit_rate']:.0%}"]
        cells += [f"{r['ms_per_step']:.2f}", f"{r['ms_per_step_parts']['check']:.2f}", sees]
        if "gained" in r:
            cells += [f"{100 * r['diff_vs_sft']:+.0f} points", f"{r['gained']} / {r['lost']}", f"{r['p_vs_sft']:.2g}"]
        lines.append("| " + " | ".join(cells) + " |" * (11 - len(cells)))
    return "\n".join(lines)


def main(cfg: Config) -> None:
    if cfg.dry_run:
        return memory.report(cfg, "eval")
    if cfg.blank_images:
        raise common.UserError("caches compare images, and black ones are all alike; set blank_images=false")
    tasks, inits, suffix = sim.tasks(cfg), common.init_states(cfg.group, cfg.n_init), "-val" if cfg.group == "val" else ""
    shared = f"suites tasks backbone seed image_size render execute denoise_steps noise_scale {common.SFT_KEYS}"
    code = ["sim.py", "osc.py", "workers.py", "episodes.py", "stats.py", "caches.py", *cfg.policy_code]
    folder = cfg.seed_dir / f"cell-{cell_name(cfg)}{suffix}"
    stage = runs.open_stage(__file__, cfg, folder, shared, common.sft_inputs(cfg), code)
    if stage is not None:
        rows = episodes.gather(stage, play, cfg, tasks, inits, cell_name(cfg))
        if ranks.first():
            sees = caches.sees_on_a_hit(common.load_sft(cfg), cfg)
            episodes.finish(stage, rows, cell=cell_name(cfg), sees_on_a_hit=sees)
    if ranks.first():
        rows = cells_table(cfg)
        disk.write_json(cfg.seed_dir / f"cells{suffix}.json", rows)
        disk.write_atomic(cfg.seed_dir / f"cells{suffix}.md", cells_markdown(rows) + "\n")
        print(cells_markdown(rows), flush=True)


if __name__ == "__main__":
    common.run(lambda: main(common.load_config(Config, "cells", sys.argv[1:])))
