"""How often the scripted expert solves each task when stage 00 records it, without images.

    python tests/bench/expert.py [suite ...] [n=10] [tasks=0,1,...] [out=FILE]     all tasks: 10 CPU minutes
    python tests/bench/expert.py plain=1 [...]     one try each, without noise on actions and waypoints

Plays every task from init states 0 to n-1. `first try` and `solved` (within max_tries) count the episodes
that reached the goal within the suite's step limit. `steps` is the mean step of the first success, `longest`
the latest. The last line is one JSON object. `out` keeps each row as soon as it is made, and reuses it while
the code stays the same.
"""

import importlib
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import common
from runtime import disk, stage
from runtime.config import HERE
from sim.env import TaskEnv

demos = importlib.import_module("00_demos")
SUITES = ["libero_object", "libero_spatial", "libero_goal", "libero_10"]
CODE = ("00_demos.py", "common.py", "sim/expert.py", "sim/grasps.py", "sim/env.py", "sim/osc.py")


def play(suite: str, task: int, n: int, cfg: demos.Config) -> dict:
    """One row of the table."""
    env = TaskEnv(suite, task)
    tries, steps = [], []
    for init_state in common.init_states("demos", n):
        outcomes, rows = demos.try_until_success(env, init_state, cfg, see=lambda *_: {})
        tries.append(outcomes)
        if rows:
            steps.append(rows["success_step"] + 1)
    others = {init_state: outcomes for init_state, outcomes in enumerate(tries) if outcomes != ["success"]}
    row = {"suite": suite, "task": task, "n": n, "first_try": n - len(others), "solved": len(steps)}
    row["steps"] = round(statistics.mean(steps), 1) if steps else None
    row |= {"longest": max(steps, default=None), "instruction": env.instruction, "not_at_first": others}
    env.close()
    return row


def main(*arguments: str) -> None:
    options = {"n": 10, "out": "", "plain": ""} | dict(a.split("=") for a in arguments if "=" in a)
    suites = [a for a in arguments if "=" not in a] or SUITES
    tasks = [int(t) for t in options.get("tasks", "0,1,2,3,4,5,6,7,8,9").split(",")]
    n = int(options["n"])
    out = Path(options["out"])
    code = {name: stage.source_hash(HERE / name) for name in CODE} | {"plain": options["plain"]}
    plain = {"action_noise": 0.0, "waypoint_jitter": 0.0, "max_tries": 1}
    cfg = demos.Config(**plain if options["plain"] else {})
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = disk.read_json(out) if out.is_file() else {}
    rows = kept["rows"] if kept.get("code") == code else []
    began = time.process_time()
    print("| suite | task | first try | solved | steps | longest | instruction |\n" + 7 * "|---" + "|")
    asked = []
    for suite, task in [(suite, task) for suite in suites for task in tasks]:
        row = next((row for row in rows if (row["suite"], row["task"], row["n"]) == (suite, task, n)), None)
        if row is None:
            row = play(suite, task, n, cfg)
            rows.append(row)
            if options["out"]:
                disk.write_atomic(out, json.dumps({"code": code, "rows": rows}, indent=1) + "\n")
        asked.append(row)
        cells = [suite, task, f"{row['first_try']}/{n}", f"{row['solved']}/{n}"]
        cells += [row["steps"], row["longest"], row["instruction"]]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    good = sum(row["solved"] >= 0.9 * row["n"] for row in asked)
    spent = time.process_time() - began
    print(f"{good} of {len(asked)} tasks solved in 90 % of their episodes; {spent:.0f} CPU s")
    print(json.dumps({"good": good, "rows": asked}))


if __name__ == "__main__":
    main(*sys.argv[1:])
