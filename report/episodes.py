"""Rows of episodes on LIBERO: what a run has played, how they are counted, and how two policies are compared.

A row: suite, task, init_state, seed, success, steps, crash (the simulator's error, or ""), and more.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common import LAYOUTS, init_states
from report import stats
from report.tables import grouped
from runtime import disk, ranks, stage, workers

Place = tuple[str, int, int]  # suite, task, init state


def place_of(row: dict) -> Place:
    return row["suite"], row["task"], row["init_state"]


def played(run_dir: Path) -> set[Place]:
    """The episodes that a run has played so far."""
    return set(map(place_of, disk.read_jsonl(run_dir / "played.jsonl", "suite task init_state success")))


def play_all(run, play_task: Callable, tasks: list[tuple[str, int]], title: str, **facts) -> dict:
    """Play the episodes of all tasks (suite, number), each process its share, and `finish`.

    play_task: what a worker does with (cfg, folder, suite, task, init states that are not played yet).
    """
    inits, done = init_states(run.cfg.group, run.cfg.n_init), played(run.dir)
    missing = {task: [init for init in inits if (*task, init) not in done] for task in tasks}
    workers.run(
        play_task,
        [(run.cfg, run.dir, *task, missing[task]) for task in ranks.share(tasks) if missing[task]],
        run.cfg.workers,
        title,
        lambda: len(played(run.dir)),
        len(tasks) * run.cfg.n_init,
        lambda: f"{sum(row['success'] for row in disk.read_jsonl(run.dir / 'played.jsonl'))} solved",
    )
    return finish(run, **facts)


def finish(run, **facts) -> dict:
    """Write episodes.jsonl and summary.json from played.jsonl, once every process has played its share.

    Wall times go to timing.json, so that episodes.jsonl is the same on every machine. Returns `facts`.
    """
    ranks.wait()
    if not ranks.first():
        return facts
    played_rows = {place_of(row): row for row in disk.read_jsonl(run.dir / "played.jsonl")}
    rows = [played_rows[place] for place in sorted(played_rows)]
    run.times["episodes_s"] = {"{}-{}-{}".format(*place_of(row)): row.pop("wall_s", None) for row in rows}
    disk.write_rows(run.dir / "episodes.jsonl", rows)
    disk.write_json(
        run.dir / "summary.json", {"seed": run.identity["config"]["seed"]} | facts | summarise(rows)
    )
    return facts


def finished(seed_dir: Path, pattern: str, group: str) -> list[tuple[dict, list[dict], dict]]:
    """done.json, rows and timing.json of a seed's finished folders of episodes on a group of init states.

    The folders come in order of their names. Leaves out those whose weights have been made anew since.
    """
    evaluations, now = [], functools.cache(stage.made_now)
    for done in sorted(seed_dir.glob(f"{pattern}/done.json"), key=lambda p: p.parent.name):
        facts = disk.read_object(done)
        if facts.get("config", {}).get("group") == group and not stage.out_of_date(done.parent, now):
            rows = disk.read_jsonl(done.with_name("episodes.jsonl"))
            evaluations.append((facts, rows, disk.read_json(done.with_name("timing.json"))))
    return evaluations


def train_seeds(facts: dict) -> list[int]:
    """The seed of the training that made an evaluation's weights, from its done.json.

    Given weights name no training; for them it is the evaluation's own seed.
    """
    matches = [re.fullmatch(r"[^/]+/seed(\d+)/(dpo|sft)(-.*)?", name) for name in facts["inputs"]]
    seeds = {match[2]: int(match[1]) for match in reversed(matches) if match}
    return [seeds.get("dpo", seeds.get("sft", facts["config"]["seed"]))]


def summarise(rows: list[dict]) -> dict:
    """Successes with intervals over all episodes that did not crash, and per task."""
    valid = [row for row in rows if not row["crash"]]
    wins = sum(row["success"] for row in valid)
    of_task = sorted(grouped(valid, "suite", "task").items())
    places = [place_of(row) for row in valid]
    deff = stats.design_effect([row["success"] for row in valid], places, [str(p[:2]) for p in places])
    right = [row["right_place"] for row in valid if "right_place" in row]  # a share of four chunks, see 04
    tasks = np.array([f"{LAYOUTS.get(suite, suite)}/{task}" for suite, task, _ in places])  # in any layout
    successes = np.array([row["success"] for row in valid], float)
    return {
        "n": len(valid),
        "successes": wins,
        "crashes": len(rows) - len(valid),
        "ci95": stats.wilson(wins, len(valid), deff),
        "ci95_tasks": stats.share_over_clusters(successes, tasks) if len({*tasks}) > 1 else (0.0, 1.0),
        "tasks": {f"{s}/{t}": [sum(row["success"] for row in of), len(of)] for (s, t), of in of_task},
        "mean_steps": float(np.mean([row["steps"] for row in valid])) if valid else 0.0,
    } | ({"right_place": float(np.mean(right)), "looks": len(right)} if right else {})


PROTOCOL = ("image_size", "render", "execute", "noise_scale", "model", "dtype")  # what paired episodes share


def comparable(facts: dict, base: dict, protocol: tuple[str, ...], inputs: dict) -> bool:
    """Whether an evaluation and its baseline, by their done.json, share the config keys of a protocol, their
    code, and their weights. inputs: what the evaluated policy was made from.
    """
    return (
        base["inputs"].items() <= inputs.items()  # not another start_seed's
        and all(base["config"].get(key) == facts["config"].get(key) for key in protocol)
        and all(base.get(key) == facts.get(key) for key in ("versions", "source"))
    )


def paired(rows: list[dict], base: list[dict]) -> dict:
    """Difference to a baseline on the episodes that both played, with one seed and no crash."""
    own, theirs = (
        {
            (place_of(row), row["seed"], row.get("protocol")): row["success"]
            for row in side
            if not row["crash"]
        }
        for side in (rows, base)
    )
    both = [key for key in own if key in theirs]
    wins = [[side[key] for key in both] for side in (own, theirs)]
    test = stats.mcnemar(*wins, [place for place, *_ in both])
    return {
        "diff_vs_sft": (test["only_a"] - test["only_b"]) / max(1, len(both)),
        "gained": test["only_a"],
        "lost": test["only_b"],
        "p_vs_sft": test["p"],
        "deff": test["deff"],
        "paired_n": len(both),
        "wins": list(map(sum, wins)),  # of the two, among these episodes
    }
