"""An audit of a folder of evaluation episodes: recomputes tables from single episodes, and lists findings.

It reads every *.jsonl below the folder whose lines are episodes, in this kit's format (suite, task,
init_state, seed, success, steps, crash) or that of the paper's repository (suite, task_id, init_idx, seed,
success, n_steps), and each table.json whose rows count them. It changes nothing.

Findings are facts about files, with counts. Their causes cannot be seen in the files, so none are named. A
policy is a file's name without seed and suite, so its episodes may lie in several files. A policy without
`sft` in its name is paired with the `sft` policy whose name shares most words with its own. Cells of
extras/cells.py are not paired here: their tables name the cell that each is compared with.
"""

import functools
import itertools
import json
import re
from collections import defaultdict, namedtuple
from collections.abc import Iterable, Iterator
from pathlib import Path

from report import stats
from report.episodes import PROTOCOL, paired, place_of, summarise
from runtime import disk, refuse, stage

NOISE = r"^eval-|libero_(spatial|object|goal|10|90|long10)|\d+x\d+|multiseed|seed\d+"  # not the policy's name
Cells = dict[tuple[str, str, int], dict[tuple, dict]]  # (policy, suite, seed) -> place -> row
# kind: duplicate, table, missing, crash or unreadable
Finding = namedtuple("Finding", "kind where text")


# ---------------------------------------------------------------------------------------------------- reading
def policy_of(path: Path, folder: Path) -> str:
    """The policy that a file's place names: openvla_dpo_libero_goal_dora_seed42.jsonl is openvla_dpo_dora.

    A cell keeps its name, in which 0.92x4 is a threshold and a cap. Trainings that share a noise
    seed differ in their seed folder alone, so that name stays too.
    """
    parts = path.relative_to(folder).with_suffix("").parts  # the kit's runs have a folder for each evaluation
    no_name = "episodes|played" + r"|seed\d+" * ("-noise" not in "/".join(parts[-2:]))
    *folders, name = [p for p in parts if not re.fullmatch(no_name, p)] or [path.stem]
    if not name.startswith("cell-"):
        name = re.sub(r"[-_]{2,}", lambda m: m[0][0], re.sub(NOISE, "", name)).strip("-_") or name
    return "/".join([*folders, name])


def episode_of(line: str) -> dict | None:
    """A line of either format as a row of the kit's; None if it is no complete episode."""
    try:
        row = json.loads(line)
        keys = {"task": "task_id", "init_state": "init_idx", "steps": "n_steps"} if "n_steps" in row else {}
        return {
            **{key: int(row[keys.get(key, key)]) for key in ("task", "init_state", "seed", "steps")},
            "suite": str(row["suite"]),
            "success": {False: False, True: True}[row["success"]],  # no text
            "crash": bool(row.get("crash")),
        }
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def read(folder: Path) -> tuple[Cells, list[Finding]]:
    """All episodes below a folder, and faults of its files."""
    cells, findings, now = defaultdict(dict), [], functools.cache(stage.made_now)
    for path in sorted(folder.rglob("*.jsonl")):
        text, twice = path.read_bytes().decode(errors="replace"), 0
        # a hidden folder is what a stage was about to remove when it was killed; only episodes count steps
        if "/." in f"/{path.relative_to(folder)}" or 'steps"' not in text:
            continue
        older, done = stage.out_of_date(path.parent, now), path.with_name("done.json")
        used = disk.read_object(done).get("config", {}) if done.is_file() else {}
        protocol = str([used.get(key) for key in PROTOCOL])
        rows = [episode_of(line) for line in text.splitlines() if line.strip() and not older]
        for row in filter(None, rows):
            cell = cells[policy_of(path, folder), row["suite"], row["seed"]]
            twice += place_of(row) in cell
            cell.setdefault(place_of(row), row | {"protocol": protocol})
        bad = rows.count(None)
        begun = path.with_name("started.json").is_file() and not done.is_file()
        faults = [
            ("missing", older, "its weights were made anew since, so its episodes were left out"),
            ("missing", begun, f"its stage has not finished: {len(rows) - bad} episodes so far"),
            ("unreadable", bad, f"{bad} of its lines are no complete episode and were left out"),
            ("duplicate", twice, f"{twice} of its episodes (task, init state, seed) are there twice"),
        ]
        findings += [
            Finding(kind, str(path.relative_to(folder)), text) for kind, there, text in faults if there
        ]
    return dict(cells), findings


def together(cells: Cells, policy: str, suites: list[str]) -> list[dict]:
    """A policy's episodes on some suites, under all seeds."""
    return [
        row
        for (p, suite, _), cell in cells.items()
        if p == policy and suite in suites
        for row in cell.values()
    ]


# --------------------------------------------------------------------------------------------------- findings
def duplicates(cells: Cells) -> tuple[list[Finding], Cells]:
    """Episodes that agree under two seeds or two policies, and the cells that do not only repeat another."""
    findings, distinct = [], dict(cells)
    for x, y in itertools.combinations(sorted(cells), 2):
        one_policy = x[:2] == y[:2]
        if not one_policy and x[1:] != y[1:]:
            continue
        both = [(row, cells[y][place]) for place, row in cells[x].items() if place in cells[y]]
        alike = [a for a, b in both if (a["success"], a["steps"]) == (b["success"], b["steps"])]
        successes = sum(row["success"] for row in alike)  # failures all last to the limit: they prove nothing
        few = successes < max(3, sum(a["success"] and b["success"] for a, b in both) / 2)
        whole = len(alike) == len(both) == len(cells[x])
        if few or not (one_policy or whole):
            continue
        whose = f"under seeds {x[2]} and {y[2]}" if one_policy else f"as {y[0]}, seed {x[2]}"
        text = f"{len(alike)} of {len(both)} episodes have the same success and number of steps {whose}"
        if one_policy and whole and len(both) == len(cells[y]):
            distinct.pop(y, None)
            text += "; they count once below"
        findings.append(Finding("duplicate", f"{x[0]}, {x[1]}", text))
    return findings, distinct


def incomplete(cells: Cells) -> Iterator[Finding]:
    """Episodes that the grid of tasks and init states lacks, failures that ended before the limit, and
    episodes whose baseline did not play them.
    """
    for (policy, suite, seed), cell in cells.items():
        where = f"{policy}, {suite}, seed {seed}"
        grid = map(place_of, together(cells, policy, [suite]))
        every = set(itertools.product(*map(set, zip(*grid, strict=True))))
        if lacking := sorted(every - cell.keys()):
            text = f"{len(lacking)} of {len(every)} episodes (tasks x init states) are not there; the first: "
            yield Finding("missing", where, text + "task {1} init state {2}".format(*lacking[0]))
        failures = [row["steps"] for row in cell.values() if not row["success"] and not row["crash"]]
        if early := sum(steps < max(failures) for steps in failures):
            text = f"{early} of {len(failures)} failures ended before the others' {max(failures)} steps"
            yield Finding("crash", where, f"{text}, and no crash is recorded")
        base = baseline_of(policy, cells)
        if base and (alone := len(cell.keys() ^ cells.get((base, suite, seed), {}).keys())):
            text = f"{alone} episodes are of it or {base} only and have no partner in a paired test"
            yield Finding("missing", where, text)


def baseline_of(policy: str, cells: Iterable[tuple]) -> str | None:
    """The `sft` policy whose name shares most words with this one's, unless this one is one or is a cell."""
    words = {p: set(re.split(r"[-_/]", p)) for p in sorted({policy, *(p for p, _, _ in cells)})}
    if words[policy] & {"sft", "cell"}:
        return None
    alike = {p: {w for w in words[p] if re.fullmatch(r"at\d+|blank|noise\d+", w)} for p in words}
    fits = [p for p in words if "sft" in words[p] and words[p] - {"sft"} <= words[policy]]
    fits = [p for p in fits if alike[p] == alike[policy]]
    return max(fits, key=lambda p: len(words[p]), default=None)


COUNTED = {  # keys of a row of table.json, and what is said if the episodes give others
    ("successes", "n"): "it says {} of {} successes of episodes, the episodes give {} of {}",
    ("gained", "lost"): "it says {} gained and {} lost, the episodes give {} and {}",
}


def tables(folder: Path, cells: Cells) -> Iterator[Finding]:
    """Rows of a table.json that disagree with the episodes of the same name in its folder.

    A row without such episodes is not checked.
    """
    for path in sorted(folder.rglob("table.json")):
        needed = {"successes", "name", "suite", "train_seeds"}
        for row in [row for row in disk.read_json(path) if isinstance(row, dict) and needed <= row.keys()]:
            kind, group = "cell-" if "hit_rate" in row else "", "-val" if row.get("group") == "val" else ""
            name = "/".join([*path.parent.relative_to(folder).parts, f"{kind}{{}}{group}"])
            policy = name.format(row["name"])
            base = name.format(row["paired_with"]) if "paired_with" in row else baseline_of(policy, cells)
            seeds = [row["noise_seed"]] if "noise_seed" in row else row["train_seeds"]
            played = {key: cell for key, cell in cells.items() if key[2] in seeds}
            own, theirs = (together(played, each, row["suite"].split()) for each in (policy, base))
            counted = (summarise(own) if own else {}) | (paired(own, theirs) if own and theirs else {})
            for keys, text in COUNTED.items():
                stated, found = ([side.get(key) for key in keys] for side in (row, counted))
                if stated != found and None not in (*stated, *found):
                    yield Finding(
                        "table",
                        f"{path.relative_to(folder)}, {row['name']}{group}",
                        text.format(*stated, *found),
                    )


# ----------------------------------------------------------------------------------------------------- tables
def pairs(cells: Cells) -> list[dict]:
    """Each policy against its baseline, per suite and over all suites; Holm's correction covers all rows."""
    rows = []
    for policy in sorted({policy for policy, _, _ in cells}):
        base = baseline_of(policy, cells)
        suites = sorted({suite for own, suite, _ in cells if own == policy})
        for chosen in dict.fromkeys([*((suite,) for suite in suites), tuple(suites)]):
            test = paired(together(cells, policy, chosen), together(cells, base, chosen))
            rows.append(
                {"policy": policy, "against": base, "suite": chosen[0] if len(chosen) == 1 else "all"} | test
            )
    rows = [row for row in rows if row["paired_n"]]
    corrected = stats.holm([row["p_vs_sft"] for row in rows])
    return [row | {"p_holm": p} for row, p in zip(rows, corrected, strict=True)]


def audit(folder: Path) -> dict:
    """{"rates": rows, "pairs": rows, "findings": [Finding]} of a folder.

    Raises:
        UserError: it holds no episodes.
    """
    cells, findings = read(folder)
    refuse(not cells, f"audit: no episodes (*.jsonl with a line per episode) below {folder}")
    repeated, distinct = duplicates(cells)
    findings += [*repeated, *incomplete(cells), *tables(folder, cells)]
    rates = [  # only distinct episodes count in a rate
        {
            "policy": policy,
            "suite": suite,
            "seeds": sorted(seed for p, s, seed in cells if (p, s) == (policy, suite)),
            "episodes": len(together(cells, policy, [suite])),
            **summarise(together(distinct, policy, [suite])),
        }
        for policy, suite in sorted({key[:2] for key in cells})
    ]
    return {"rates": rates, "pairs": pairs(distinct), "findings": findings}
