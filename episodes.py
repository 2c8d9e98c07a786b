"""Episodes on LIBERO, played, gathered, counted and compared: what every stage that reports success must do alike."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import common
import disk
import ranks
import runs
import sim
import stats
import workers


def play(env, init: int, look: Callable[[dict, int], np.ndarray]) -> dict:
    """One episode from init state `init`: look(obs, k) gives the actions (n, 7), env units, that follow the k-th look."""
    began, k = time.time(), 0
    try:
        env.reset(init)
        while not env.success and env.steps < env.max_steps:
            common.carry_out(env, look(env.observe(), k))
            k += 1
    except sim.CRASHES as error:  # the simulator diverged: neither success nor failure of the policy
        return {"success": False, "steps": env.steps, "crash": type(error).__name__, "wall_s": 0.0}
    return {"success": bool(env.success), "steps": env.steps, "crash": "", "wall_s": round(time.time() - began, 2)}


def gather(stage: runs.Stage, worker: Callable, cfg, tasks: list[tuple[str, int]], inits: list[int], title: str) -> list[dict]:
    """All rows of a stage, by task and init state. What episodes.jsonl lacks is played by `worker`, a generator of rows that
    takes (cfg, folder, suite, task, init states)."""
    path = stage.dir / "episodes.jsonl"
    rows = disk.read_jsonl(path, "suite task init_state success")
    done = {(row["suite"], row["task"], row["init_state"]) for row in rows}
    ranks.wait()  # all have read before any writes
    todo = [(s, t, [i for i in inits if (s, t, i) not in done]) for s, t in tasks]
    jobs = [(cfg, stage.dir, suite, task, rest) for suite, task, rest in todo if rest]
    bar = common.progress(total=len(inits) * len(todo), initial=len(done), desc=title, unit="episode")
    wins = sum(row["success"] for row in rows)
    for _, row in workers.parallel(worker, ranks.share(jobs), cfg.workers):
        disk.append_jsonl(path, row)
        wins += row["success"]
        bar.update()
        bar.set_postfix(successes=f"{wins}/{bar.n}")
    ranks.wait()
    return sorted(disk.read_jsonl(path), key=lambda r: (r["suite"], r["task"], r["init_state"]))


def finish(stage: runs.Stage, rows: list[dict], **facts) -> None:
    """The stage is done: its rows in order, the wall times beside them in timing.json."""
    timing = stage.dir / "timing.json"  # before the rows lose their times, so that a stop between loses none
    if not timing.is_file():
        walls = {f"{r['suite']}-{r['task']}-{r['init_state']}": r.get("wall_s") for r in rows}
        disk.write_json(timing, {"episodes_s": walls})
    rows = [{key: value for key, value in row.items() if key != "wall_s"} for row in rows]
    disk.write_rows(stage.dir / "episodes.jsonl", rows)
    disk.write_json(stage.dir / "summary.json", {"seed": stage.identity["config"]["seed"]} | facts | summarise(rows))
    stage.finish({"episodes_s": disk.read_json(timing)["episodes_s"]}, **facts)


def finished(seed_dir: Path, pattern: str, group: str) -> list[tuple[dict, list[dict], dict]]:
    """done.json, rows and timing.json of a seed's finished folders of episodes on a group of init states, by name. Those whose
    weights have been made anew since are left out."""
    run, found, hash_of = seed_dir.parents[1], [], functools.cache(disk.sha256)  # checkpoints may be large

    def unchanged(name: str, made_from: str) -> bool:
        path = run / name / "done.json"
        if path.is_file():
            return disk.read_json(path)["fingerprint"] == made_from
        files = [path for path in (Path(name), run / name) if path.is_file()]  # of a checkpoint; a student's lies in the run
        return any(hash_of(path) == made_from for path in files)

    for done in sorted(seed_dir.glob(f"{pattern}/done.json"), key=lambda p: p.parent.name):
        facts = disk.read_json(done)
        if facts["config"]["group"] == group and all(unchanged(*each) for each in facts["inputs"].items()):
            timing = disk.read_json(done.with_name("timing.json"))
            found.append((facts, disk.read_jsonl(done.with_name("episodes.jsonl")), timing))
    return found


def train_seeds(facts: dict) -> list[int]:
    """The seed of the training that made an evaluation's weights, by its done.json; of given weights, the evaluation's own."""
    trained = [found for name in facts["inputs"] if (found := re.fullmatch(r"[^/]+/seed(\d+)/(dpo|sft)(-.*)?", name))]
    trained.sort(key=lambda found: found[2] == "sft")  # DPO's, where there is one
    return [int(trained[0][1])] if trained else [facts["config"]["seed"]]


def summarise(rows: list[dict]) -> dict:
    """Successes with intervals over all episodes that did not crash, and per task."""
    valid = [row for row in rows if not row["crash"]]
    wins = sum(row["success"] for row in valid)
    tasks = sorted({(row["suite"], row["task"]) for row in valid})
    of_task = [[row["success"] for row in valid if (row["suite"], row["task"]) == task] for task in tasks]
    clusters = np.concatenate([np.full(len(s), i) for i, s in enumerate(of_task)]) if tasks else np.zeros(0)
    places = [(row["suite"], row["task"], row["init_state"]) for row in valid]
    deff = stats.design_effect([row["success"] for row in valid], places, [str(place[:2]) for place in places])
    return {
        "n": len(valid),
        "successes": wins,
        "crashes": len(rows) - len(valid),
        "ci95": stats.wilson(wins, len(valid), deff),
        "ci95_tasks": stats.cluster_bootstrap(np.concatenate(of_task).astype(float), clusters) if len(tasks) > 1 else (0.0, 1.0),
        "tasks": {f"{suite}/{task}": [sum(s), len(s)] for (suite, task), s in zip(tasks, of_task, strict=True)},
        "mean_steps": float(np.mean([row["steps"] for row in valid])) if valid else 0.0,
    }


def paired(rows: list[dict], base: list[dict]) -> dict:
    """Difference to a baseline on the episodes (suite, task, init state, seed) that both ran without a crash."""
    key = ("suite", "task", "init_state", "seed")
    theirs = {tuple(row[k] for k in key): row["success"] for row in base if not row["crash"]}
    both = [
        (row["success"], theirs[t], t[:3]) for row in rows if not row["crash"] and (t := tuple(row[k] for k in key)) in theirs
    ]
    test = stats.mcnemar([a for a, _, _ in both], [b for _, b, _ in both], [place for *_, place in both])
    difference = (test["only_a"] - test["only_b"]) / max(1, len(both))
    return {
        "diff_vs_sft": difference,
        "gained": test["only_a"],
        "lost": test["only_b"],
        "p_vs_sft": test["p"],
        "deff": test["deff"],
        "paired_n": len(both),
    }
