"""What a folder of evaluation episodes holds: tables recomputed from single episodes, and findings.

Reads every *.jsonl below the folder whose lines are episodes, in this kit's format (suite, task, init_state, seed, success,
steps, crash) or that of the paper's repository (suite, task_id, init_idx, seed, success, n_steps), and the summaries beside them:
the kit's summary.json and table.json, the repository's `per_suite` and `sft_baseline` files. It changes nothing there.

Findings are facts about files, with counts; what caused them can't be seen there, and is not said. A policy is a file's name
without seed and suite, so its episodes may lie in several files. A policy without `sft` in its name is paired with the one with
`sft` that shares most of its name.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
import stats

FEW = 100  # episodes below which an interval is wider than 20 points at a success rate of one half
NOISE = r"^eval-|libero_(spatial|object|goal|10|90|long10)|\d+x\d+|multiseed|seed\d+"  # in a file's name: no policy's
Key = tuple[str, str, int]  # policy, suite, seed
Place = tuple[int, int]  # task, init state


@dataclass(frozen=True)
class Episode:
    success: bool
    steps: int
    crash: bool
    file: str


@dataclass(frozen=True)
class Finding:
    kind: str  # duplicate, baseline, summary, missing, crash, few, unreadable
    where: str
    text: str


def policy_of(path: Path, folder: Path) -> str:
    """The policy that a file's place names: openvla_dpo_libero_goal_dora_seed42.jsonl is openvla_dpo_dora. A cell of 05 keeps
    its name, in which 0.92x4 is a threshold and a cap."""
    *folders, name = path.relative_to(folder).with_suffix("").parts
    parts = [part for part in folders if not re.fullmatch(r"seed\d+|episodes", part)]
    parts += [] if name == "episodes" else [name]  # the kit's: a folder per evaluation
    if parts and parts[-1].startswith("cell-"):
        return "/".join(parts)
    last = re.sub(r"[-_]{2,}", lambda m: m[0][0], re.sub(NOISE, "", parts[-1] if parts else name)).strip("-_")
    return "/".join([*parts[:-1], last or name])


def read_lines(path: Path) -> tuple[list[dict], int]:
    """Objects of a JSONL file, and how many lines are none. (disk.read_jsonl would mend the file; an audit leaves it.)"""
    rows, bad = [], 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            rows.append(row) if isinstance(row, dict) else None
            bad += not isinstance(row, dict)
        except ValueError:
            bad += bool(line.strip())
    return rows, bad


def normalised(row: dict, file: str) -> tuple[str, int, Place, Episode] | None:
    """(suite, seed, place, episode) of a line in either format; None if it lacks something."""
    try:
        public = "n_steps" in row
        place = (int(row["task_id" if public else "task"]), int(row["init_idx" if public else "init_state"]))
        steps = int(row["n_steps" if public else "steps"])
        episode = Episode(bool(row["success"]), steps, bool(row.get("crash")), file)
        return str(row["suite"]), int(row["seed"]), place, episode
    except (KeyError, TypeError, ValueError):
        return None


def read(folder: Path) -> tuple[dict[Key, dict[Place, Episode]], list[Finding]]:
    """All episodes below a folder by policy, suite and seed, and what was wrong with reading them."""
    cells, findings, twice = defaultdict(dict), [], defaultdict(int)
    for path in sorted(folder.rglob("*.jsonl")):
        rows, bad = read_lines(path)
        if not any("success" in row for row in rows):
            continue  # a training log, or something else
        file, policy = str(path.relative_to(folder)), policy_of(path, folder)
        for found in (normalised(row, file) for row in rows):
            if found is None:
                bad += 1
                continue
            suite, seed, place, episode = found
            twice[file] += place in cells[policy, suite, seed]
            cells[policy, suite, seed].setdefault(place, episode)
        if path.with_name("started.json").is_file() and not path.with_name("done.json").is_file():
            findings.append(Finding("missing", file, f"the stage that writes it has not finished: {len(rows)} episodes so far"))
        if bad:
            findings.append(Finding("unreadable", file, f"{bad} of its lines are no complete episode and were left out"))
    for file, n in twice.items():
        if n:
            findings.append(
                Finding("duplicate", file, f"{n} of its episodes (task, init state, seed) stand in an earlier line too")
            )
    return {key: cell for key, cell in cells.items() if cell}, findings


# --------------------------------------------------------------------------------------------------- findings
def same(a: dict[Place, Episode], b: dict[Place, Episode]) -> tuple[int, int, int]:
    """Episodes that both have; those with the same success and steps; successes among these (failures all last to the limit)."""
    common_places = a.keys() & b.keys()
    alike = [p for p in common_places if (a[p].success, a[p].steps) == (b[p].success, b[p].steps)]
    return len(common_places), len(alike), sum(a[p].success for p in alike)


def duplicates(cells: dict) -> tuple[list[Finding], set[Key]]:
    """Episodes that agree under two seeds or two policies, and the keys of those that should not count a second time."""
    findings, again = [], set()
    for x, y in itertools.combinations(sorted(cells), 2):
        both, alike, successes = same(cells[x], cells[y])
        one_policy = x[:2] == y[:2]
        if x[1] != y[1] or successes < 3 or not (one_policy or x[2] == y[2]):
            continue
        solved = sum(cells[x][p].success and cells[y][p].success for p in cells[x].keys() & cells[y].keys())
        if one_policy and successes >= 0.5 * solved:
            text = f"{alike} of {both} episodes have the same success and number of steps under seeds {x[2]} and {y[2]}"
            if alike == both == max(len(cells[x]), len(cells[y])):
                again.add(y)
                text += "; they count once below"
            findings.append(Finding("duplicate", f"{x[0]}, {x[1]}", text))
        elif alike == both == len(cells[x]):
            text = f"all {both} episodes of seed {x[2]} have the success and number of steps of {y[0]}"
            findings.append(Finding("duplicate", f"{x[0]}, {x[1]}", text))
    return findings, again


def incomplete(cells: dict) -> list[Finding]:
    """Episodes that the grid of tasks and init states lacks, and failures that did not last to the step limit."""
    findings, grids = [], defaultdict(lambda: (set(), set()))
    for (policy, suite, _), cell in cells.items():
        for task, init in cell:
            grids[policy, suite][0].add(task)
            grids[policy, suite][1].add(init)
    for (policy, suite, seed), cell in cells.items():
        tasks, inits = grids[policy, suite]
        lacking = sorted(set(itertools.product(tasks, inits)) - cell.keys())
        if lacking:
            shown = ", ".join(f"task {t} init state {i}" for t, i in lacking[:3]) + (", ..." if len(lacking) > 3 else "")
            text = f"{len(lacking)} of {len(tasks) * len(inits)} episodes (tasks x init states) are not there: {shown}"
            findings.append(Finding("missing", f"{policy}, {suite}, seed {seed}", text))
        failures = [e.steps for e in cell.values() if not e.success and not e.crash]
        early = sum(steps < max(failures) for steps in failures)
        if early:
            text = f"{early} of {len(failures)} failures ended before the others' {max(failures)} steps, and no crash is recorded"
            findings.append(Finding("crash", f"{policy}, {suite}, seed {seed}", text))
    return findings


def baseline_of(policy: str, policies: set[str]) -> str | None:
    """The `sft` policy that shares most words with this one's name, if this one is none itself; of a cell of 05 the one that
    looks as often and reuses nothing."""
    rule = r"(none|(chunk|prefix|patches)[\d.]+x\d+)"
    if cell := re.fullmatch(rf"(?P<run>(.*/)?cell-)(?P<of>.*?){rule}-(?P<look>k\d+-)[a-z]+\d+(?P<rest>(-at\d+)?(-val)?)", policy):
        plain = f"none-{cell['look']}euler10{cell['rest']}"
        if cell["of"] != "student-":
            own = f"{cell['run']}{cell['of']}{plain}"  # of the same weights
            return own if own in policies and own != policy else None
        fits = [
            p for p in policies if re.fullmatch(re.escape(cell["run"]) + "(.+-)?" + re.escape(plain), p) and "student" not in p
        ]
        return fits[0] if len(fits) == 1 else None  # its teacher's, where it is plain which that is
    words = set(re.split(r"[-_/]", policy))
    fits = {p: set(re.split(r"[-_/]", p)) - {"sft"} for p in policies if "sft" in re.split(r"[-_/]", p)}
    fits = {p: rest for p, rest in fits.items() if rest <= words}
    return None if "sft" in words or not fits else max(sorted(fits), key=lambda p: len(fits[p]))


def unpaired(cells: dict) -> list[Finding]:
    """Episodes whose baseline did not play them."""
    findings, policies = [], {policy for policy, _, _ in cells}
    for policy, suite in sorted({key[:2] for key in cells}):
        base = baseline_of(policy, policies)
        seeds = [seed for p, s, seed in cells if (p, s) == (policy, suite)]
        without = [seed for seed in seeds if base and (base, suite, seed) not in cells]
        if without:
            text = f"{base} has no episodes under seed{'s' * (len(without) > 1)} {', '.join(map(str, sorted(without)))}"
            findings.append(Finding("missing", f"{policy}, {suite}", f"{text}: they have no partner in a paired test"))
        for seed in [seed for seed in seeds if base and seed not in without]:
            n = len(cells[policy, suite, seed].keys() ^ cells[base, suite, seed].keys())
            if n:
                text = f"{n} episodes are in one of it and {base} only: they have no partner in a paired test"
                findings.append(Finding("missing", f"{policy}, {suite}, seed {seed}", text))
    return findings


def count(cells: dict, policy: str, suite: str, seeds=None) -> tuple[int, int, int]:
    """Successes, episodes that did not crash, and crashes."""
    found = [
        e
        for (p, s, seed), cell in cells.items()
        if (p, s) == (policy, suite) and (not seeds or seed in seeds)
        for e in cell.values()
    ]
    valid = [e for e in found if not e.crash]
    return sum(e.success for e in valid), len(valid), len(found) - len(valid)


WITHOUT_EPISODES = "a summary without episodes: its figures can't be recomputed"


def summaries(folder: Path, cells: dict) -> list[Finding]:
    """Summaries that say something else than the episodes, or whose episodes are not there."""
    findings, policies = [], {policy for policy, _, _ in cells}

    def compare(where: str, said: tuple, got: tuple, kind: str = "summary", what: str = "successes of episodes"):
        if said != got:
            text = f"it says {said[0]} of {said[1]} {what}, the episodes give {got[0]} of {got[1]}"
            findings.append(Finding(kind, where, text))

    for path in sorted(folder.rglob("*.json")):
        try:
            data = json.loads(path.read_text())
        except ValueError:
            findings.append(Finding("unreadable", str(path.relative_to(folder)), "not JSON"))
            continue
        where, beside = str(path.relative_to(folder)), path.with_suffix(".jsonl")
        if isinstance(data, dict) and "per_suite" in data:  # the repository's summary, beside <same name>.jsonl
            if not beside.is_file():
                findings.append(Finding("missing", where, WITHOUT_EPISODES))
                continue
            rows = [r for r in (normalised(row, "") for row in read_lines(beside)[0]) if r]
            for suite, facts in data["per_suite"].items():
                won = [episode.success for s, _, _, episode in rows if s == suite]
                compare(f"{where}, {suite}", (facts["success"], facts["trials"]), (sum(won), len(won)))
        elif isinstance(data, dict) and "sft_baseline" in data:  # the repository's merged seeds, with a baseline in percent
            base = next((p for p in sorted(policies) if "sft" in p and where.split("_")[0] in p), None)
            won, n, _ = count(cells, base, data["suite"]) if base else (0, 0, 0)
            if n and abs(100 * won / n - data["sft_baseline"]) > 0.05:
                rate = f"{100 * won / n:g} % ({won} of {n})"
                text = f"its SFT baseline is {data['sft_baseline']:g} %, the episodes of {base} give {rate}"
                findings.append(Finding("baseline", where, text))
        elif isinstance(data, dict) and {"successes", "n", "crashes"} <= data.keys():  # the kit's summary.json
            if not path.with_name("episodes.jsonl").is_file():
                findings.append(Finding("missing", where, WITHOUT_EPISODES))
                continue
            rows = [r for r in (normalised(row, "") for row in read_lines(path.with_name("episodes.jsonl"))[0]) if r]
            valid = [e.success for *_, e in rows if not e.crash]
            compare(where, (data["successes"], data["n"]), (sum(valid), len(valid)))
            compare(where, (data["crashes"], len(rows)), (len(rows) - len(valid), len(rows)), what="crashes in episodes")
        elif isinstance(data, list) and all(isinstance(row, dict) for row in data):  # the kit's table.json, beside episodes/
            findings += table_findings(where, path, data)
    return findings


def table_findings(where: str, path: Path, rows: list[dict]) -> list[Finding]:
    """Rows of a table.json against episodes/{eval,cell}-<name>.jsonl beside it: counts, and those of the paired difference."""
    findings = []
    for row in [row for row in rows if {"successes", "name", "suite", "train_seeds"} <= row.keys()]:
        suffix = "" if row.get("group", "test") == "test" else f"-{row['group']}"
        start = "sft" if row.get("start", "final") == "final" else f"sft-at{row['start']}"
        start += "".join(re.findall(r"-noise\d+", row["name"]))  # 04_eval.py: paired under the same noise
        kind, start = ("cell" if "hit_rate" in row else "eval"), row.get("paired_with", start)
        mine, base = (path.parent / "episodes" / f"{kind}-{name}{suffix}.jsonl" for name in (row["name"], start))
        if not mine.is_file():
            continue
        suites, seeds = row["suite"].split(), [row["noise_seed"]] if "noise_seed" in row else row["train_seeds"]
        a, b = (
            {(s, seed, p): e for s, seed, p, e in episodes_of(file) if s in suites and seed in seeds} for file in (mine, base)
        )
        valid = [e.success for e in a.values() if not e.crash]
        if (sum(valid), len(valid)) != (row["successes"], row["n"]):
            text = f"it says {row['successes']} of {row['n']} successes, the episodes give {sum(valid)} of {len(valid)}"
            findings.append(Finding("summary", f"{where}, {row['name']}{suffix}", text))
        if "gained" in row and b:
            both = [k for k in a.keys() & b.keys() if not a[k].crash and not b[k].crash]
            gained, lost = (sum(x[k].success > y[k].success for k in both) for x, y in ((a, b), (b, a)))
            if (gained, lost) != (row["gained"], row["lost"]):
                said = f"{row['gained']} gained and {row['lost']} lost"
                text = f"against {start} it says {said}, the episodes give {gained} and {lost}"
                findings.append(Finding("baseline", f"{where}, {row['name']}{suffix}", text))
    return findings


def episodes_of(file: Path):
    """Complete episodes of a file; none where there is no file."""
    rows = read_lines(file)[0] if file.is_file() else []
    return [found for found in (normalised(row, "") for row in rows) if found]


# ----------------------------------------------------------------------------------------------------- tables
def rates(cells: dict, again: set[Key]) -> list[dict]:
    """A row per policy and suite, all seeds together; those whose episodes only repeat another seed's count once."""
    rows = []
    for policy, suite in sorted({key[:2] for key in cells}):
        seeds = sorted(seed for p, s, seed in cells if (p, s) == (policy, suite))
        once = [seed for seed in seeds if (policy, suite, seed) not in again]
        won, n, crashes = count(cells, policy, suite, once)
        episodes = [(place, e.success) for seed in once for place, e in cells[policy, suite, seed].items() if not e.crash]
        tasks, won_each = np.array([task for (task, _), _ in episodes]), np.array([w for _, w in episodes], float)
        over_tasks = stats.cluster_bootstrap(won_each, tasks) if len(set(tasks)) > 1 else None
        deff = stats.design_effect(won_each, [place for place, _ in episodes], list(tasks))
        row = {"policy": policy, "suite": suite, "seeds": seeds, "episodes": count(cells, policy, suite)[1], "successes": won}
        rows.append(row | {"n": n, "crashes": crashes, "ci95": stats.wilson(won, n, deff), "ci95_tasks": over_tasks})
    return rows


def compared(a: dict, b: dict) -> dict:
    """Paired comparison of two sets of episodes {(suite, seed, place): Episode}, on those that both have without a crash."""
    both = [k for k in a.keys() & b.keys() if not a[k].crash and not b[k].crash]
    test = stats.mcnemar([a[k].success for k in both], [b[k].success for k in both], [(k[0], k[2]) for k in both])
    gained, lost, n = test["only_a"], test["only_b"], len(both)
    row = {"paired_n": n, "gained": gained, "lost": lost, "diff": (gained - lost) / max(1, n), "p": test["p"]}
    return row | {
        "ci95": stats.paired_interval(gained, lost, n, test["deff"]),
        "wins": [sum(x[k].success for k in both) for x in (a, b)],
    }


def pairs(cells: dict, again: set[Key]) -> list[dict]:
    """Each policy against its baseline per suite, and over all suites where there are several; p Holm-corrected over the rows."""
    rows, policies = [], {policy for policy, _, _ in cells}
    flat = defaultdict(dict)
    for (policy, suite, seed), cell in cells.items():
        if (policy, suite, seed) not in again:
            flat[policy] |= {(suite, seed, place): e for place, e in cell.items()}
    for policy in sorted(policies):
        base = baseline_of(policy, policies)
        if base is None:
            continue
        suites = sorted({suite for suite, _, _ in flat[policy]})
        for suite in suites + ["all"] * (len(suites) > 1):
            mine = {k: e for k, e in flat[policy].items() if suite in ("all", k[0])}
            found = compared(mine, flat[base])
            if found["paired_n"]:
                rows.append({"policy": policy, "against": base, "suite": suite} | found)
    for row, p in zip(rows, stats.holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return rows


def audit(folder: Path) -> dict:
    """{"rates": rows, "pairs": rows, "findings": [Finding]} of a folder.

    Raises:
        UserError: it is no folder, or holds no episodes.
    """
    if not folder.is_dir():
        raise common.UserError(f"audit: {folder} is no folder")
    cells, findings = read(folder)
    if not cells:
        raise common.UserError(f"audit: no episodes (*.jsonl with a line per episode) below {folder}")
    found, again = duplicates(cells)
    findings += found + incomplete(cells) + unpaired(cells) + summaries(folder, cells)
    table = rates(cells, again)
    for row in [row for row in table if row["n"] + row["crashes"] < FEW]:
        low, high = row["ci95"]
        text = f"{row['n']} distinct episodes: the 95 % interval of its rate runs from {low:.0%} to {high:.0%}"
        findings.append(Finding("few", f"{row['policy']}, {row['suite']}", text))
    return {"rates": table, "pairs": pairs(cells, again), "findings": findings}
