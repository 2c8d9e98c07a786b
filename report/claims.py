"""The paper's claims (configs/paper.yaml) beside its public logs and this kit's committed results.

Two fields of a row are computed. `setting` says how near the experiment is to the claim's: from configs.json
(the configs that 03 had), counts of pairs and rows of table.json, against the paper's settings. `verdict`
compares the claim's own number with the data. results/claims.md states the rule of both.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import yaml

from report import audit, episodes, stats
from report.page import PILLS
from report.tables import joined, listing, number, p_value, percent, points, table
from runtime import HERE, disk, refuse

RESULTS = HERE / "results"
DELTA = 0.03  # a difference of success rates below 3 points is none, unless a row says another
FACTOR = 2.0  # settings that differ by more are different, and smaller policies than this are toys
ENOUGH = 3  # trainings, from which on an interval is over trainings


def read_paper(path: Path = HERE / "configs" / "paper.yaml") -> dict:
    return yaml.safe_load(path.read_text())


# -------------------------------------------------------------------------------------------- the public logs
def logged(logs: dict, policy: str, suites: list[str]) -> tuple[int, int]:
    """Successes and episodes of a policy in the public logs, over suites and seeds."""
    cells = [cell for suite in suites for cell in logs["counts"][policy][suite].values()]
    return sum(won for won, _ in cells), sum(n for _, n in cells)


def paired_logs(entry: dict, logs: dict) -> np.ndarray | None:
    """Gained, lost and n of the paired episodes that the logs have of a claim, if any."""
    counts = logs["paired"].get(entry.get("new"), {})
    return (
        np.sum([counts[suite] for suite in entry["suites"]], axis=0) if counts and "base" in entry else None
    )


def log_text(entry: dict, logs: dict) -> str:
    """What the public logs say about a claim: counts, their difference, and the words in its entry."""
    parts = []
    if "new" in entry:
        policies = entry["new"], entry.get("base", entry["new"])
        new, base = (logged(logs, policy, entry["suites"]) for policy in policies)
        parts.append("{}/{}".format(*new))
        if "base" in entry:
            gap = f"{100 * (new[0] / new[1] - base[0] / base[1]):+.1f} points"
            parts = [f"{gap} ({parts[0]} against {base[0]}/{base[1]})"]
    if (pairs := paired_logs(entry, logs)) is not None:
        gained, lost, n = map(int, pairs)
        interval = points((gained - lost) / n, stats.paired_interval(gained, lost, n))
        parts.append(f"paired on {n} episodes: {interval}, {gained} gained and {lost} lost")
    return "; ".join([*parts, *filter(None, [entry.get("text")])])


# ---------------------------------------------------------------------------------------- what was found here
@dataclass
class Found:
    """A figure, or an effect on success rates, and what its experiment could have seen."""

    value: float
    interval: tuple[float, float] | None
    text: str
    error: float = math.nan  # standard error
    df: float = math.inf
    power: Callable[[float], float] | None = None  # of an effect
    row: dict | None = None  # of table.json, whose keys are facts


Trainings = dict[tuple, tuple[list[dict], list[dict]]]  # a training -> its episodes, and its baseline's


def effect(trainings: Trainings) -> Found:
    """The difference of paired success rates; over trainings where there are three or more."""
    tests = [audit.compared(*sides) for sides in trainings.values()]
    gains, counts = [test["diff"] for test in tests], [[*test["wins"], test["paired_n"]] for test in tests]
    wins = "{} against {} of {}".format(*np.sum(counts, axis=0))
    if len(gains) >= ENOUGH:
        df, error = len(gains) - 1, max(1e-9, float(np.std(gains, ddof=1) / np.sqrt(len(gains))))
        interval, mean = stats.t_interval(gains), float(np.mean(gains))
        text = f"{points(mean, interval)} over {len(gains)} trainings, {wins}"
        return Found(mean, interval, text, error, df, lambda d: stats.t_power(d / error, df))
    test = episodes.paired(*([row for sides in trainings.values() for row in sides[i]] for i in range(2)))
    (low, high), diff, n = stats.difference_interval(test), test["diff_vs_sft"], test["paired_n"]
    text = f"{points(diff, (low, high))} for this training, {wins}, p = {p_value(test['p_vs_sft'])}"
    seen = {"n": n, "discordance": (test["gained"] + test["lost"]) / n, "deff": test["deff"]}
    power = partial(stats.paired_power, **seen)
    return Found(diff, (low, high), text, (high - low) / 2 / stats.Z, math.inf, power)


def trainings_of(ours: dict, new: str = "new", base: str = "base") -> Trainings:
    """The episodes of two of the files (or lists of files) that a claim names, by training: file and seed."""
    found = defaultdict(lambda: ([], []))
    for side, name in enumerate((new, base)):
        for i, file in enumerate(np.atleast_1d(ours[name])):
            for row in audit.episodes_of(RESULTS / file):
                if row["suite"] in ours.get("suites", [row["suite"]]):
                    found[i, row["seed"]][side].append(row | {"seed": (i, row["seed"])})
    return {training: sides for training, sides in found.items() if all(sides)}


def look_up(ours: dict) -> dict | None:
    """The one row of the committed results that a claim names; None where its file is not there.

    Raises:
        UserError: the file is there, but not exactly one row fits.
    """
    path = RESULTS / ours["file"]
    if not path.is_file():
        return None
    rows = disk.read_json(path) if path.suffix == ".json" else audit.read_lines(path)[0]
    fits = [row for row in rows if all(row.get(key) == value for key, value in ours["where"].items())]
    found = f"{len(fits)} rows of {path} have {ours['where']}"
    refuse(len(fits) != 1, f"configs/paper.yaml: {found}; a claim needs one")
    return fits[0]


def find(ours: dict) -> Found | None:
    """What this kit has about a claim: an effect, or a row's figure. None where a file is not there."""
    row = look_up(ours) if "file" in ours else None
    if "new" in ours:
        trainings = trainings_of(ours)
        return replace(effect(trainings), row=row) if trainings else None
    if row is None:
        return None
    key = ours.get("key", "value")
    interval = tuple(row["ci95"]) if row.get("ci95") and key == "value" else None
    bounds = "({:.4g} to {:.4g})".format(*interval) if interval else ""
    text = " ".join(filter(None, (number(row[key]), bounds, row.get("unit") or row.get("metric", key))))
    return Found(row[key], interval, text, row=row)


# ------------------------------------------------------------------------------------------------ the setting
def dpo_facts(config: dict, pairs: float) -> dict:
    """What a training with DPO is, from its config and the number of its pairs."""
    seen = config["steps"] * config["batch_size"]
    kept = ("backbone", "adapter", "suites", "pairs", "lr", "beta", "sft_coef")
    own = {key: config[key] for key in kept}
    own["beta"] = config["beta"] if config["beta"] == "auto" else float(config["beta"])
    return own | {
        "contrast": config.get("contrast", 1.0),
        "pairs seen": seen,
        "visits to a pair": seen / pairs,
    }


def paper_facts(claim: dict, paper: dict) -> dict:
    """The claim's own setting: what its entry says and, for DPO, the paper's settings."""
    stated = claim.get("paper_setting", {})
    if not claim.get("dpo"):
        return stated
    settings = {key.removeprefix("dpo."): value for key, (value, _) in paper["settings"].items()}
    return dpo_facts(settings | stated, settings["logs.n_pairs"]) | {"parameters": stated["parameters"]}


def our_facts(claim: dict, found: Found) -> dict:
    """The same of the experiment: its stored config, a row's keys and, for DPO, a count of its pairs."""
    folder, name = RESULTS / claim["ours"]["folder"], claim["ours"]["config"]
    config = disk.read_json(folder / "configs.json")[name]
    if not claim.get("dpo"):
        return config | (found.row or {})
    units = f"prefs-{name.split('-', 2)[2]}-units"
    files = [f for f in folder.glob("training/*.jsonl") if f.stem.partition("-seed")[0] == units]
    refuse(not files, f"{folder}: no {units}*.jsonl, so the pairs cannot be counted")
    pairs = np.mean([sum(len(row["pairs"]) for row in audit.read_lines(file)[0]) for file in files])
    return config | dpo_facts(config, float(pairs))


def alike(one, other) -> bool:
    """Equal in kind, and within a factor of two."""
    if isinstance(one, str | list) or isinstance(other, str | list):
        return one == other
    return one == other or (one * other > 0 and 1 / FACTOR <= one / other <= FACTOR)


def setting(claim: dict, stated: dict, own: dict) -> tuple[str, str, str]:
    """(same, analogue, different or by construction; in what it differs; scale)."""
    absent = [key for key in stated if key not in own]
    refuse(absent, f"{claim['id']}: the results do not record {joined(absent)}")
    small = "parameters" in stated and own["parameters"] * FACTOR < stated["parameters"]
    other = [key for key in stated if key != "parameters" and not alike(own[key], stated[key])]
    text = "; ".join(f"{key} {said(own[key])} (paper: {said(stated[key])})" for key in other)
    label = "different" if other else "analogue" if small else "same"
    return "by construction" if claim["kind"] == "identity" else label, text, "toy" if small else ""


def said(value) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ", ".join(np.atleast_1d(value))


# ------------------------------------------------------------------------------------------------ the verdict
def delivered(claim: dict, paper: dict) -> tuple[float, bool]:
    """DPO's margin in the second half of the training, and whether the authors' own logs end near it."""
    ours, margins = claim["ours"], []
    for path in sorted((RESULTS / ours["folder"]).glob("training/*.jsonl")):
        if path.stem.partition("-seed")[0] == ours["config"]:
            rows = audit.read_lines(path)[0]
            margins += [row["rewards/margins"] for row in rows[len(rows) // 2 :]]
    margin = float(np.mean(margins)) if margins else 0.0
    return margin, margin * FACTOR >= paper["settings"]["logs.margin"][0]


def verdict(claim: dict, found: Found, works: bool = True, given: bool = True) -> str:
    """supported, contradicted or inconclusive, by the claim's kind and number.

    works: the treatment itself is shown to work, which a claim of non-inferiority needs.
    given: the treatment was delivered, without which nothing contradicts a claim of a gain.
    """
    kind, claimed, delta = claim["kind"], claim.get("effect"), claim.get("delta", DELTA)
    low, high = found.interval or (found.value, found.value)
    if kind in ("share", "identity"):  # a number, within the claim's own band
        below, above = claimed - claim.get("band", 0), claimed + claim.get("band", 0)
        ours, apart = below <= low and high <= above, high < below or low > above
    elif kind == "equivalent":
        ours = stats.tost(found.value, found.error, found.df, delta) < 0.05
        apart = low > delta or high < -delta
    elif kind == "non-inferior":
        ours, apart = works and low > -delta, high < -delta
    else:  # a gain or a loss; one number without an interval says nothing about another training
        low, high = (low, high) if kind == "gain" else (-high, -low)
        ours = found.interval is not None and low > claim.get("chance", 0)
        seen = claimed is not None and found.power is not None and found.power(claimed) >= 0.8
        apart = seen and given and high < min(delta, claimed / 2)
    return "supported" if ours else "contradicted" if apart else "inconclusive"


WORDS = ("id", "section", "line", "quote", "claim", "paper", "note", "command")
BLANK = dict.fromkeys(("here", "differs", "scale", "detectable", "power", "would", "given", "d33"), "")


def judged(claim: dict, paper: dict) -> dict:
    """A claim as a row of text: what the paper says, its logs, our result, setting and verdict."""
    found, ours, logs = find(claim.get("ours", {})), claim.get("ours", {}), claim.get("logs", {})
    row = {key: claim.get(key, "") for key in WORDS} | BLANK | {"logs": log_text(logs, paper["logs"])}
    if found is None:
        return row | {"setting": "not run", "verdict": "not run"}
    works = given = True
    if claim.get("dpo"):
        margin, given = delivered(claim, paper)
        theirs = f"the authors' logs end at {paper['settings']['logs.margin'][0]} or more"
        row["given"] = f"mean margin {margin:.2g}, {'delivered' if given else 'not delivered'} ({theirs})"
    if claim["kind"] == "non-inferior":
        arms = [effect(trainings_of(ours, arm, "start")) for arm in ("new", "base")]
        works = any(arm.interval[0] > 0 for arm in arms)
    beside = [f"{words} {number(look_up(each)['value'])}" for words, each in claim.get("beside", {}).items()]
    row |= {"here": "; ".join([found.text, *beside]), "setting": ""}
    row["verdict"] = row["would"] = verdict(claim, found, works, given)
    if "folder" in ours:
        facts = setting(claim, paper_facts(claim, paper), our_facts(claim, found))
        row |= dict(zip(("setting", "differs", "scale"), facts, strict=True))
    different = row["setting"] == "different"
    row |= {"verdict": "not judged"} if different else {"would": ""}
    if found.power:
        row["detectable"] = f"{100 * stats.detectable(found.power):.1f}"
        row["power"] = f"{found.power(claim['effect']):.0%}" if claim.get("effect") else ""
    if (pairs := paired_logs(logs, paper["logs"])) is not None:
        gained, lost, n = map(int, pairs)
        d33 = stats.detectable(lambda d: stats.paired_power(d, n, (gained + lost) / n), 1 / 3)
        seen = "excludes" if found.interval[1] < d33 else "does not exclude"
        row["d33"] = f"{100 * d33:.1f} points" + ("" if different else f"; this interval {seen} it")
    return row


# ------------------------------------------------------------------------------------ an experiment in blocks
def read_blocks(folder: Path) -> tuple[dict, dict]:
    """Episodes by arm and block (one training each), and the nats that each arm's trainings delivered.

    folder: what extras/blocks.py writes. Nats are the mean difference of log-ratios, without beta, on
    held-out pairs of the block.

    Raises:
        UserError: an episode is there twice.
    """
    arms, nats = defaultdict(lambda: defaultdict(list)), defaultdict(list)
    for path in sorted(folder.glob("*.csv")):
        for line in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
            numbers = {key: int(line[key]) for key in ("task", "init_state", "seed")}
            row = {"suite": line["suite"], "success": line["success"] == "1", "crash": line["crash"]}
            arms[line["arm"]][int(line["block"])].append(row | numbers)
        for arm, facts in disk.read_json(path.with_suffix(".json"))["arms"].items():
            nats[arm] += [facts["delivered"]["nats"]] if "delivered" in facts else []
    for arm, blocks in arms.items():
        for block, rows in blocks.items():
            keys = {(episodes.place_of(row), row["seed"]) for row in rows}
            refuse(len(keys) < len(rows), f"{folder}: arm {arm}, block {block}: an episode is there twice")
    return arms, nats


def contrasts(plan: dict) -> list[dict]:
    """The plan's comparisons of arms, each over the blocks that both have; Holm covers its primary ones.

    No test is made before the plan's number of blocks is there. Until then only the spread of the effects is
    used, for what the whole experiment could detect.
    """
    (arms, nats), rows = read_blocks(RESULTS / plan["folder"]), []
    for new, base in [*plan["primary"], *plan["exploratory"]]:
        blocks = sorted(arms[new].keys() & arms[base].keys())
        if len(blocks) < ENOUGH:
            continue
        found = effect({block: (arms[new][block], arms[base][block]) for block in blocks})
        whole = found.error * np.sqrt(len(blocks) / plan["blocks"])  # the standard error of all blocks
        power = partial(lambda d, error: stats.t_power(d / error, plan["blocks"] - 1), error=whole)
        row = {"new": new, "base": base, "blocks": len(blocks), "detectable": stats.detectable(power)}
        complete = len(blocks) >= plan["blocks"]
        p = stats.t_test(found.value, found.error, found.df) if complete else None
        rows.append(row | {"found": found if complete else None, "nats": nats[new], "p": p, "p_holm": None})
    primary = [row for row in rows if [row["new"], row["base"]] in plan["primary"]]
    if len(primary) == len(plan["primary"]) and all(row["found"] for row in primary):
        for row, p in zip(primary, stats.holm([row["p"] for row in primary]), strict=True):
            row["p_holm"] = p
    return rows


def outcome(row: dict) -> str:
    """Of a comparison of arms, in the plan's words. Only a primary one concludes anything."""
    if row["p_holm"] is None:
        return "exploratory" if row["found"] else "not complete"
    found = row["found"]
    if row["p_holm"] < 0.05:
        return "supported" if found.value > 0 else "harmful"
    return (
        "no effect of interest"
        if stats.tost(found.value, found.error, found.df, DELTA) < 0.05
        else "inconclusive"
    )


def contrasts_table(plan: dict) -> str:
    rows = contrasts(plan)
    if not rows:
        return f"Not run yet: fewer than {ENOUGH} of {plan['blocks']} blocks."
    return listing(
        rows,
        {
            "comparison": "{new} - {base}",
            "blocks": lambda row: f"{row['blocks']} of {plan['blocks']}",
            "effect (95 %)": lambda row: (
                points(row["found"].value, row["found"].interval) if row["found"] else ""
            ),
            "p": lambda row: "" if row["p"] is None else p_value(row["p"]),
            "p (Holm)": lambda row: "" if row["p_holm"] is None else p_value(row["p_holm"]),
            "detectable, points": lambda row: f"{100 * row['detectable']:.1f}",
            "delivered, nats": lambda row: f"{np.mean(row['nats']):.3g}" if row["nats"] else "",
            "outcome": outcome,
        },
    )


# ----------------------------------------------------------------------------------------------------- tables
def tally(claims: list[dict]) -> str:
    verdicts = [claim["verdict"] for claim in claims]
    counts = [f"{verdict} {verdicts.count(verdict)}" for verdict in PILLS if verdict in verdicts]
    return f"By verdict: {', '.join(counts)}."


def claims_table(claims: list[dict]) -> str:
    return listing(
        claims,
        {
            "section": "{section}",
            "claim": "{claim}",
            "paper": "{paper}",
            "here (95 % interval)": "{here}",
            "setting": "{setting}",
            "verdict": "{verdict}",
            "scale": "{scale}",
            "detectable, points": "{detectable}",
            "power for the claim": "{power}",
        },
    )


DETAILS = {
    "logs": "Its public logs",
    "setting": "Setting",
    "differs": "It differs in",
    "would": "If it did not differ",
    "given": "Treatment",
    "d33": "Effect that the authors' paired episodes had a third of a chance to show",
    "note": "Note",
}


def details(claims: list[dict]) -> str:
    """Each claim in the paper's words, with everything that its row in the table is based on."""
    parts = []
    for row in claims:
        lines = [f"- {words}: {row[key]}." for key, words in DETAILS.items() if row[key]]
        lines += [f"- `{row['command']}`"] * bool(row["command"])
        parts += ["**{id}** (section {section}, line {line})\n\n> {quote}".format_map(row), "\n".join(lines)]
    return "\n\n".join(parts)


def also_table(claims: list[dict]) -> str:
    columns = {"question": "{claim}", "here (95 % interval)": "{here}", "outcome": "{verdict}"}
    return listing(claims, columns | {"detectable, points": "{detectable}", "command": "`{command}`"})


def card(entries: list[dict], rows: dict[str, dict]) -> str:
    """The results at a glance. entries: a question, its scope and its price, and the row that answers it."""
    return listing(
        [rows[entry["row"]] | entry for entry in entries],
        {
            "question": "{question}",
            "paper": "{paper}",
            "scope": lambda row: f"{row['scope']}{', toy' * bool(row['scale'])}",
            "compute": "{compute}",
            "outcome": lambda row: (
                f"{'different setting, ' * bool(row['would'])}{row['verdict']}: "
                + row["here"].partition("; ")[0]
            ),
        },
    )


def logs_table(logs: dict) -> str:
    """The public logs beside the paper's tables. Intervals count episodes that repeat another seed's once."""
    rows = []
    for policy, suite in [(p, suite) for p, suites in logs["counts"].items() for suite in suites]:
        cells, (won, n) = logs["counts"][policy][suite], logged(logs, policy, [suite])
        repeated, paper = (logs[key].get(policy, {}).get(suite) for key in ("same", "paper"))
        once = [cell for seed, cell in cells.items() if seed not in (repeated or [])]
        distinct = sum(k for _, k in once)
        rows.append(
            {
                "policy": policy,
                "suite": suite,
                "successes by seed": ", ".join(f"{seed}: {w}/{k}" for seed, (w, k) in cells.items()),
                "together": f"{won} / {n}",
                "rate": f"{100 * won / n:.1f} %",
                "paper's table": "" if paper is None else f"{paper} %",
                "distinct": distinct,
                "95 % interval": percent(stats.wilson(sum(w for w, _ in once), distinct)),
            }
        )
    return table(list(rows[0]), [list(row.values()) for row in rows])
