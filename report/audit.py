"""An audit of a folder of evaluation episodes: recomputes tables from single episodes, and lists findings.

It reads every *.jsonl below the folder whose lines are episodes, in this kit's format (suite, task,
init_state, seed, success, steps, crash) or that of the paper's repository (suite, task_id, init_idx, seed,
success, n_steps). It also reads the summaries beside them: the kit's summary.json and table.json, the
repository's `per_suite` and `sft_baseline` files. It changes nothing.

Findings are facts about files, with counts. Their causes cannot be seen in the files, so none are named. A
policy is a file's name without seed and suite, so its episodes may lie in several files. A policy without
`sft` in its name is paired with the `sft` policy whose name shares most words with its own.
"""

import itertools
import json
import re
from collections import defaultdict, namedtuple
from collections.abc import Iterator
from pathlib import Path

from report import stats
from report.episodes import matched, paired, place_of, summarise
from runtime import disk, refuse

FEW = 100  # with fewer episodes an interval is wider than 20 points at a success rate of one half
NOISE = r"^eval-|libero_(spatial|object|goal|10|90|long10)|\d+x\d+|multiseed|seed\d+"  # not the policy's name
RATE = "it says {} of {} successes of episodes, the episodes give {} of {}"
# kind: duplicate, baseline, summary, missing, crash, few or unreadable
Finding = namedtuple("Finding", "kind where text")


# ---------------------------------------------------------------------------------------------------- reading
def policy_of(path: Path, folder: Path) -> str:
    """The policy that a file's place names: openvla_dpo_libero_goal_dora_seed42.jsonl is openvla_dpo_dora.

    A cell keeps its name, in which 0.92x4 is a threshold and a cap.
    """
    parts = path.relative_to(folder).with_suffix("").parts  # the kit's runs have a folder for each evaluation
    *folders, name = [p for p in parts if not re.fullmatch(r"seed\d+|episodes|played", p)] or [path.stem]
    if not name.startswith("cell-"):
        name = re.sub(r"[-_]{2,}", lambda m: m[0][0], re.sub(NOISE, "", name)).strip("-_") or name
    return "/".join([*folders, name])


def read_lines(path: Path) -> tuple[list[dict], int]:
    """The objects of a JSONL file, and the number of lines that are no objects."""
    rows = []
    for line in filter(str.strip, path.read_bytes().decode(errors="replace").splitlines()):
        try:
            rows.append(json.loads(line))
        except ValueError:
            rows.append(None)
    objects = [row for row in rows if isinstance(row, dict)]
    return objects, len(rows) - len(objects)


def parsed(line: dict) -> dict | None:
    """A line of either format as a row of the kit's; None if it lacks something."""
    keys = {"task": "task_id", "init_state": "init_idx", "steps": "n_steps"} if "n_steps" in line else {}
    try:
        return {
            **{key: int(line[keys.get(key, key)]) for key in ("task", "init_state", "seed", "steps")},
            "suite": str(line["suite"]),
            "success": bool(line["success"]),
            "crash": bool(line.get("crash")),
        }
    except (KeyError, TypeError, ValueError):
        return None


def episodes_of(file: Path) -> list[dict]:
    """The complete episodes of a file; none where there is no file."""
    return list(filter(None, map(parsed, read_lines(file)[0]))) if file.is_file() else []


def read(folder: Path) -> tuple[dict[tuple, dict[tuple, dict]], list[Finding]]:
    """All episodes below a folder: (policy, suite, seed) -> place -> row; and faults of its files."""
    cells, findings = defaultdict(dict), []
    for path in sorted(folder.rglob("*.jsonl")):
        lines, bad = read_lines(path)
        if not any("success" in line for line in lines):
            continue  # a training log, or something else
        rows, twice = list(filter(None, map(parsed, lines))), 0
        for row in rows:
            cell = cells[policy_of(path, folder), row["suite"], row["seed"]]
            twice += place_of(row) in cell
            cell.setdefault(place_of(row), row)
        bad += len(lines) - len(rows)
        begun = path.with_name("started.json").is_file() and not path.with_name("done.json").is_file()
        texts = {
            "missing": begun and f"the stage that writes it has not finished: {len(rows)} episodes so far",
            "unreadable": bad and f"{bad} of its lines are no complete episode and were left out",
            "duplicate": twice
            and f"{twice} of its episodes (task, init state, seed) are in an earlier line too",
        }
        findings += [
            Finding(kind, str(path.relative_to(folder)), text) for kind, text in texts.items() if text
        ]
    return dict(cells), findings


def together(cells: dict, policy: str, suite: str) -> dict:
    """The summary of a policy's episodes on a suite, under all seeds."""
    return summarise([row for key in cells if key[:2] == (policy, suite) for row in cells[key].values()])


# --------------------------------------------------------------------------------------------------- findings
def duplicates(cells: dict) -> tuple[list[Finding], dict]:
    """Episodes that agree under two seeds or two policies, and the cells that do not only repeat another."""
    findings, distinct = [], dict(cells)
    for x, y in itertools.combinations(sorted(cells), 2):
        (policy, suite, seed), one_policy = x, x[:2] == y[:2]
        if suite != y[1] or not (one_policy or seed == y[2]):
            continue
        both = [(row, cells[y][place]) for place, row in cells[x].items() if place in cells[y]]
        alike = [a for a, b in both if (a["success"], a["steps"]) == (b["success"], b["steps"])]
        successes = sum(row["success"] for row in alike)  # failures all last to the limit: they prove nothing
        whole, where = len(alike) == len(both) == len(cells[x]), f"{policy}, {suite}"
        if one_policy and successes >= max(3, sum(a["success"] and b["success"] for a, b in both) / 2):
            text = (
                f"{len(alike)} of {len(both)} episodes have the same success and number of steps "
                f"under seeds {seed} and {y[2]}"
            )
            if whole and len(both) == len(cells[y]):
                distinct.pop(y, None)
                text += "; they count once below"
            findings.append(Finding("duplicate", where, text))
        elif successes >= 3 and whole:
            text = f"all {len(both)} episodes of seed {seed} have the success and number of steps of {y[0]}"
            findings.append(Finding("duplicate", where, text))
    return findings, distinct


def incomplete(cells: dict) -> Iterator[Finding]:
    """Episodes that the grid of tasks and init states lacks, and failures that ended before the limit."""
    for (policy, suite, seed), cell in cells.items():
        where = f"{policy}, {suite}, seed {seed}"
        grid = [place for key, other in cells.items() if key[:2] == (policy, suite) for place in other]
        every = set(itertools.product(*map(set, zip(*grid, strict=True))))
        if lacking := sorted(every - cell.keys()):
            text = f"{len(lacking)} of {len(every)} episodes (tasks x init states) are not there; the first: "
            yield Finding("missing", where, text + "task {1} init state {2}".format(*lacking[0]))
        failures = [row["steps"] for row in cell.values() if not row["success"] and not row["crash"]]
        if early := sum(steps < max(failures) for steps in failures):
            text = f"{early} of {len(failures)} failures ended before the others' {max(failures)} steps"
            yield Finding("crash", where, f"{text}, and no crash is recorded")


CELL = re.compile(
    r"(?P<run>(.*/)?cell-)(?P<of>.*?)(none|(chunk|prefix|patches)[\d.]+x\d+)"
    r"-(?P<look>k\d+-)[a-z]+\d+(?P<rest>(-at\d+)?(-val)?)"
)


def baseline_of(policy: str, policies: set[str]) -> str | None:
    """The `sft` policy whose name shares most words with this one's, unless this one is an `sft` policy.

    A cell's baseline is the cell that looks as often and reuses nothing, with the same weights. A student's
    is its teacher's, if only one fits.
    """
    if cell := CELL.fullmatch(policy):
        weights = "(?!.*student)(.+-)?" if cell["of"] == "student-" else re.escape(cell["of"])
        plain = re.escape(cell["run"]) + weights + re.escape(f"none-{cell['look']}euler10{cell['rest']}")
        fits = [p for p in policies if re.fullmatch(plain, p) and p != policy]
        return fits[0] if len(fits) == 1 else None
    words = {p: set(re.split(r"[-_/]", p)) for p in sorted({*policies, policy})}
    fits = [p for p in words if "sft" in words[p] and words[p] - {"sft"} <= words[policy] - {"sft"}]
    return max(fits, key=lambda p: len(words[p]), default=None) if "sft" not in words[policy] else None


def unpaired(cells: dict) -> Iterator[Finding]:
    """Episodes whose baseline did not play them."""
    for (policy, suite, seed), cell in cells.items():
        base = baseline_of(policy, {policy for policy, _, _ in cells})
        theirs = cells.get((base, suite, seed), {})
        if base and (n := len(cell.keys() ^ theirs.keys())):
            some = f"{n} episodes of seed {seed} are in one of it and {base} only"
            text = some if theirs else f"{base} has no episodes under seed {seed}"
            yield Finding("missing", f"{policy}, {suite}", f"{text}: they have no partner in a paired test")


def summaries(folder: Path, cells: dict) -> Iterator[Finding]:
    """Summaries that disagree with the episodes, or whose episodes are not there."""
    for path in sorted(folder.rglob("*.json")):
        where = str(path.relative_to(folder))
        try:
            data = json.loads(disk.read_text(path))
        except ValueError:
            yield Finding("unreadable", where, "not JSON")
            continue
        if isinstance(data, list):
            yield from table_findings(where, path, data)
        elif isinstance(data, dict):
            yield from summary_findings(where, path, data)
            yield from baseline_findings(where, data, cells)


def disagreement(kind: str, where: str, keys: list[str], stated: dict, counted: dict, text: str):
    """A finding unless both have the same values; they fill the text's gaps."""
    values = [[side[key] for key in keys] for side in (stated, counted)]
    if values[0] != values[1]:
        yield Finding(kind, where, text.format(*values[0], *values[1]))


def summary_findings(where: str, path: Path, data: dict) -> Iterator[Finding]:
    """The repository's summary, by suite, or the kit's summary.json, against the episodes beside it."""
    is_kits, by_suite = data.keys() >= {"successes", "n", "crashes"}, data.get("per_suite", {})
    file = path.with_name("episodes.jsonl") if is_kits else path.with_suffix(".jsonl")
    if not file.is_file() and (is_kits or by_suite):
        yield Finding("missing", where, "a summary without episodes: its figures can't be recomputed")
        return
    rows = episodes_of(file)
    for suite, facts in by_suite.items():
        won = [row["success"] for row in rows if row["suite"] == suite]
        counted = {"success": sum(won), "trials": len(won)}
        yield from disagreement("summary", f"{where}, {suite}", list(counted), facts, counted, RATE)
    if is_kits:
        text = "it says {} of {} successes and {} crashes, the episodes give {} of {} and {}"
        yield from disagreement("summary", where, ["successes", "n", "crashes"], data, summarise(rows), text)


def baseline_findings(where: str, data: dict, cells: dict) -> Iterator[Finding]:
    """The repository's merged seeds, which state a baseline in percent."""
    named = sorted({policy for policy, _, _ in cells if "sft" in policy and where.split("_")[0] in policy})
    if "sft_baseline" in data and named:
        won, n = map(together(cells, named[0], data["suite"]).get, ("successes", "n"))
        if n and abs(100 * won / n - data["sft_baseline"]) > 0.05:
            counts = f"the episodes of {named[0]} give {100 * won / n:g} % ({won} of {n})"
            yield Finding("baseline", where, f"its SFT baseline is {data['sft_baseline']:g} %, {counts}")


def table_findings(where: str, path: Path, rows: list) -> Iterator[Finding]:
    """Rows of a table.json against episodes/{eval,cell}-<name>.jsonl beside it."""
    needed = {"successes", "name", "suite", "train_seeds"}
    for row in [row for row in rows if isinstance(row, dict) and needed <= row.keys()]:
        suffix = "" if row.get("group", "test") == "test" else f"-{row['group']}"
        start = "sft" if row.get("start", "final") == "final" else f"sft-at{row['start']}"
        start += "".join(re.findall(r"-noise\d+", row["name"]))  # 04 pairs policies under the same noise
        start, kind = row.get("paired_with", start), "cell" if "hit_rate" in row else "eval"
        files = [path.parent / "episodes" / f"{kind}-{name}{suffix}.jsonl" for name in (row["name"], start)]
        if not files[0].is_file():
            continue
        seeds = [row["noise_seed"]] if "noise_seed" in row else row["train_seeds"]
        own, base = (
            [e for e in episodes_of(file) if e["suite"] in row["suite"].split() and e["seed"] in seeds]
            for file in files
        )
        at = f"{where}, {row['name']}{suffix}"
        yield from disagreement("summary", at, ["successes", "n"], row, summarise(own), RATE)
        if base and "gained" in row:
            text = f"against {start} it says {{}} gained and {{}} lost, the episodes give {{}} and {{}}"
            yield from disagreement("baseline", at, ["gained", "lost"], row, paired(own, base), text)


# ----------------------------------------------------------------------------------------------------- tables
def rates(cells: dict, distinct: dict) -> Iterator[dict]:
    """A row per policy and suite, all seeds together. Only the distinct episodes count in its rate."""
    for policy, suite in sorted({key[:2] for key in cells}):
        summary = together(distinct, policy, suite)
        yield {
            "policy": policy,
            "suite": suite,
            "seeds": sorted(seed for p, s, seed in cells if (p, s) == (policy, suite)),
            "episodes": together(cells, policy, suite)["n"],
            **{key: summary[key] for key in ("successes", "n", "crashes", "ci95")},
            "ci95_tasks": summary["ci95_tasks"] if len(summary["tasks"]) > 1 else None,
        }


def compared(rows: list[dict], base: list[dict]) -> dict:
    """Paired comparison of two policies on the episodes that match."""
    test, both = paired(rows, base), matched(rows, base)
    return {
        **{key: test[key] for key in ("paired_n", "gained", "lost")},
        "diff": test["diff_vs_sft"],
        "p": test["p_vs_sft"],
        "ci95": stats.difference_interval(test),
        "wins": [sum(episode[side] for episode in both) for side in (1, 2)],
    }


def pairs(cells: dict) -> list[dict]:
    """Each policy against its baseline, per suite and over all suites; Holm's correction covers all rows."""
    rows, episodes = [], defaultdict(list)
    for (policy, _, _), cell in cells.items():
        episodes[policy] += cell.values()
    for policy in sorted(episodes):
        base = baseline_of(policy, set(episodes))
        suites = sorted({row["suite"] for row in episodes[policy]})
        for suite in suites if len(suites) == 1 else [*suites, "all"]:
            own = [row for row in episodes[policy] if suite in ("all", row["suite"])]
            rows.append(
                {"policy": policy, "against": base, "suite": suite} | compared(own, episodes.get(base, []))
            )
    rows = [row for row in rows if row["paired_n"]]
    return [row | {"p_holm": p} for row, p in zip(rows, stats.holm([row["p"] for row in rows]), strict=True)]


def audit(folder: Path) -> dict:
    """{"rates": rows, "pairs": rows, "findings": [Finding]} of a folder.

    Raises:
        UserError: it holds no episodes.
    """
    cells, findings = read(folder)
    refuse(not cells, f"audit: no episodes (*.jsonl with a line per episode) below {folder}")
    repeated, distinct = duplicates(cells)
    table = list(rates(cells, distinct))
    few = "{} distinct episodes: the 95 % interval of its rate runs from {:.0%} to {:.0%}"
    findings += [
        *repeated,
        *incomplete(cells),
        *unpaired(cells),
        *summaries(folder, cells),
        *(
            Finding("few", f"{row['policy']}, {row['suite']}", few.format(row["n"], *row["ci95"]))
            for row in table
            if row["n"] + row["crashes"] < FEW
        ),
    ]
    return {"rates": table, "pairs": pairs(distinct), "findings": findings}
