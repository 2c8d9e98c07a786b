"""How often the scripted expert solves each task, as stage 00 records it (noise, waypoints, tries), without images.

    python tests/bench/expert.py [suite ...] [n=10] [tasks=0,1,...] [out=FILE]      40 tasks x 10 init states: 10 CPU minutes
    python tests/bench/expert.py plain=1 [...]          one try each, without noise on the actions and with waypoints as they are

Plays every task from init states 0 to n-1. `first try` and `solved` (within max_tries) are episodes of n whose goal was reached
within the suite's step limit; `steps` is the mean step of the first success, `longest` the latest. Last line: one JSON object.
out: rows are kept there as they are made, and not made again while the code is the same.
"""

import importlib
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import common
import disk
import runs
import sim

demos = importlib.import_module("00_demos")
CODE = ("00_demos.py", "common.py", "expert.py", "grasps.py", "sim.py", "osc.py")


def play(suite: str, task: int, n: int, cfg: demos.Config) -> dict:
    """One row of the table."""
    env, tries, steps = sim.TaskEnv(suite, task), [], []
    for init_state in common.init_states("demos", n):
        outcomes, rows = demos.try_until_success(env, init_state, 0, cfg, see=lambda *_: {})
        tries.append(outcomes)
        steps += [rows["success_step"] + 1] if rows else []
    env.close()
    others = {init_state: outcomes for init_state, outcomes in enumerate(tries) if outcomes != ["success"]}
    counts = {"suite": suite, "task": task, "n": n, "first_try": n - len(others), "solved": len(steps)}
    mean, longest = (round(statistics.mean(steps), 1), max(steps)) if steps else (None, None)
    return counts | {"steps": mean, "longest": longest, "instruction": env.instruction, "not_at_first": others}


def main(*arguments: str) -> None:
    options = {"n": 10, "out": "", "plain": ""} | dict(a.split("=") for a in arguments if "=" in a)
    suites = [a for a in arguments if "=" not in a] or ["libero_object", "libero_spatial", "libero_goal", "libero_10"]
    tasks = [int(t) for t in options.get("tasks", "0,1,2,3,4,5,6,7,8,9").split(",")]
    n, out = int(options["n"]), Path(options["out"])
    code = {name: runs.source_hash(runs.HERE / name) for name in CODE} | {"plain": options["plain"]}
    cfg = demos.Config(action_noise=0.0, waypoint_jitter=0.0, max_tries=1) if options["plain"] else demos.Config()
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = disk.read_json(out) if out.is_file() else {}
    rows, began = kept["rows"] if kept.get("code") == code else [], time.process_time()
    print("| suite | task | first try | solved | steps | longest | instruction |\n" + 7 * "|---" + "|")
    asked = []
    for suite, task in [(suite, task) for suite in suites for task in tasks]:
        row = next((row for row in rows if (row["suite"], row["task"], row["n"]) == (suite, task, n)), None)
        if row is None:
            rows.append(row := play(suite, task, n, cfg))
            if options["out"]:
                disk.write_atomic(out, json.dumps({"code": code, "rows": rows}, indent=1) + "\n")
        asked.append(row)
        cells = (f"{row['first_try']}/{n}", f"{row['solved']}/{n}", row["steps"], row["longest"], row["instruction"])
        print(f"| {suite} | {task} | " + " | ".join(map(str, cells)) + " |", flush=True)
    good = sum(row["solved"] >= 0.9 * row["n"] for row in asked)
    print(f"{good} of {len(asked)} tasks solved in 90 % of their episodes; {time.process_time() - began:.0f} CPU s")
    print(json.dumps({"good": good, "rows": asked}))


if __name__ == "__main__":
    main(*sys.argv[1:])
