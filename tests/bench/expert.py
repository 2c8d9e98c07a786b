"""How often the scripted expert solves each task, as stage 00 records it (noise, waypoints, tries), without images.

    python tests/bench/expert.py [suite ...] [n=10] [tasks=0,1,...]      40 tasks x 10 init states: 10 CPU minutes

Plays every task from init states 0 to n-1. `first try` and `solved` (within max_tries) are episodes of n whose goal was reached
within the suite's step limit; `steps` is the mean step of the first success, `longest` the latest. Last line: one JSON object.
"""

import importlib
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import common
import sim

demos = importlib.import_module("00_demos")


def play(suite: str, task: int, n: int, cfg) -> dict:
    """One row of the table."""
    env, tries, steps = sim.TaskEnv(suite, task), [], []
    for init_state in common.init_states("demos", n):
        outcomes, rows = demos.try_until_success(env, init_state, 0, cfg, see=lambda *_: {})
        tries.append(outcomes)
        steps += [rows["success_step"] + 1] if rows else []
    env.close()
    missed = {init: outcomes for init, outcomes in enumerate(tries) if outcomes != ["success"]}
    counts = {"n": n, "first_try": n - len(missed), "solved": len(steps)}
    steps = {"steps": round(statistics.mean(steps), 1), "longest": max(steps)} if steps else {"steps": None, "longest": None}
    return {"suite": suite, "task": task, "instruction": env.instruction} | counts | steps | {"other_tries": missed}


def main(*arguments: str) -> None:
    options = {"n": "10"} | dict(a.split("=") for a in arguments if "=" in a)
    suites = [a for a in arguments if "=" not in a] or [s for s in common.MAX_STEPS if s != "libero_90"]
    tasks = [int(t) for t in options.get("tasks", "0,1,2,3,4,5,6,7,8,9").split(",")]
    print("| suite | task | first try | solved | steps | longest | instruction |\n" + 7 * "|---" + "|")
    rows, began = [], time.process_time()
    for suite, task in [(suite, task) for suite in suites for task in tasks]:
        rows.append(row := play(suite, task, int(options["n"]), demos.Config()))
        cells = (f"{row['first_try']}/{row['n']}", f"{row['solved']}/{row['n']}", row["steps"], row["longest"])
        print(f"| {suite} | {task} | " + " | ".join(map(str, cells)) + f" | {row['instruction']} |", flush=True)
    good = sum(row["solved"] >= 0.9 * row["n"] for row in rows)
    print(f"{good} of {len(rows)} tasks solved in 90 % of the episodes; {time.process_time() - began:.0f} CPU s")
    print(json.dumps({"good": good, "rows": rows}))


if __name__ == "__main__":
    main(*sys.argv[1:])
