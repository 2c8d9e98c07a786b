"""The paper's claims (configs/paper.yaml) beside its public logs and this kit's committed results.

Two fields of a row are computed. `setting` says how near the experiment is to the claim's: from configs.json
(the configs that 03 had), counts of pairs and rows of table.json, against the paper's settings. `verdict`
compares the claim's own number with the data. results/claims.md states the rule of both.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from report import audit, episodes, stats
from report.page import PILLS
from report.tables import grouped, joined, listing, number, p_value, percent, points, short, table
from runtime import HERE, disk, refuse

RESULTS = HERE / "results"
DELTA = 0.03  # a difference of success rates below 3 points is none, unless a row says another
FACTOR = 2.0  # settings that differ by more are different, and smaller policies than this are toys
ENOUGH = 3  # trainings, from which on an interval is over trainings


def read_paper(path: Path = HERE / "configs" / "paper.yaml") -> dict:
    return yaml.safe_load(path.read_text())


# ------------------------------------------------------------------------------------------- the public logs
def logged(logs: dict, policy: str, suites: list[str]) -> tuple[int, int]:
    """Successes and episodes of a policy in the public logs, over suites and seeds."""
    cells = [cell for suite in suites for cell in logs["counts"][policy][suite].values()]
    return sum(won for won, _ in cells), sum(n for _, n in cells)


def paired_logs(entry: dict, logs: dict) -> np.ndarray | None:
    """Gained, lost and n of the paired episodes that the logs have of a claim, if any."""
    counts = logs["paired"].get(entry.get("new"), {})
    return np.sum([counts[suite] for suite in entry["suites"]], axis=0) if counts and "base" in entry else None


def log_text(entry: dict, logs: dict) -> str:
    """What the public logs say about a claim: counts, their difference, and the words in its entry."""
    parts = [entry["text"]] if "text" in entry else []
    if (pairs := paired_logs(entry, logs)) is not None:
        gained, lost, n = map(int, pairs)
        interval = points((gained - lost) / n, stats.paired_interval(gained, lost, n))
        parts.insert(0, f"paired on {n} episodes: {interval}, {gained} gained and {lost} lost")
    if "new" in entry:
        won, n = logged(logs, entry["new"], entry["suites"])
        counts = f"{won}/{n}"
        if "base" in entry:
            base_won, base_n = logged(logs, entry["base"], entry["suites"])
            counts = f"{100 * (won / n - base_won / base_n):+.1f} points ({counts} against {base_won}/{base_n})"
        parts.insert(0, counts)
    return "; ".join(parts)


# ----------------------------------------------------------------------------------------- what was found here
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
    refuse(len({seed for seed, _ in trainings}) > 1, "episodes of two folders and fewer than three trainings")
    own, base = ([row for sides in trainings.values() for row in sides[i]] for i in range(2))
    test = episodes.paired(own, base)
    (low, high), share = stats.difference_interval(test), (test["gained"] + test["lost"]) / test["paired_n"]
    text = f"{points(test['diff_vs_sft'], (low, high))} for this training, {wins}, p = {p_value(test['p_vs_sft'])}"

    def power(d: float) -> float:
        return stats.paired_power(d, test["paired_n"], share, test["deff"])

    return Found(test["diff_vs_sft"], (low, high), text, (high - low) / 2 / stats.Z, math.inf, power)


def trainings_of(ours: dict) -> Trainings | None:
    """The episodes of `new` and `base`, files or lists of them, by file and seed; None if one is not there."""
    files = [[RESULTS / name for name in np.atleast_1d(ours[side])] for side in ("new", "base")]
    found = {}
    for i, pair in enumerate(zip(*files, strict=True)):
        if not all(path.is_file() for path in pair):
            return None
        for side, path in enumerate(pair):
            rows = [r for r in audit.episodes_of(path) if r["suite"] in ours.get("suites", [r["suite"]])]
            for (seed,), of_seed in grouped(rows, "seed").items():
                found.setdefault((i, seed), ([], []))[side].extend(of_seed)
    return {key: sides for key, sides in found.items() if all(sides)}


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


def figure(row: dict, key: str) -> Found:
    """One number of a row, with the row's interval."""
    interval = tuple(row["ci95"]) if row.get("ci95") and key == "value" else None
    bounds = "({:.4g} to {:.4g})".format(*interval) if interval else ""
    text = " ".join(filter(None, (number(row[key]), bounds, row.get("unit") or row.get("metric", key))))
    return Found(row[key], interval, text, row=row)


def find(ours: dict) -> Found | None:
    """What this kit has about a claim; None where a file is not there, or nothing is named."""
    row = look_up(ours) if "file" in ours else None
    if "new" in ours:
        trainings = trainings_of(ours)
        found = effect(trainings) if trainings else None
        return found and Found(**(vars(found) | {"row": row}))
    return figure(row, ours.get("key", "value")) if row else None


# -------------------------------------------------------------------------------------------------- the setting
def dpo_facts(config: dict, pairs: float) -> dict:
    """What a training with DPO is, from its config and the number of its pairs."""
    seen = config["steps"] * config["batch_size"]
    kept = ("backbone", "adapter", "suites", "pairs", "lr", "beta", "sft_coef")
    own = {key: config[key] for key in kept}
    own["beta"] = config["beta"] if config["beta"] == "auto" else float(config["beta"])
    return own | {"contrast": config.get("contrast", 1.0), "pairs seen": seen, "visits to a pair": seen / pairs}


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
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    if isinstance(one, list):
        return sorted(one) == sorted(other)
    return one == other or (one * other > 0 and 1 / FACTOR <= one / other <= FACTOR)


def setting(claim: dict, stated: dict, own: dict) -> tuple[str, list[str], str]:
    """(same, analogue, different or by construction; in what it differs; scale)."""
    absent = [key for key in stated if key not in own]
    refuse(absent, f"{claim['id']}: the results do not record {joined(absent)}")
    small = "parameters" in stated and own["parameters"] * FACTOR < stated["parameters"]
    other = [key for key in stated if key != "parameters" and not alike(own[key], stated[key])]
    text = [f"{key} {said(own[key])} (paper: {said(stated[key])})" for key in other]
    label = "different" if other else "analogue" if small else "same"
    return "by construction" if claim["kind"] == "identity" else label, text, "toy" if small else ""


def said(value) -> str:
    if isinstance(value, list):
        return short(" ".join(value))
    return value if isinstance(value, str) else f"{value:.3g}"


# -------------------------------------------------------------------------------------------------- the verdict
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
        ours = low >= claimed - claim.get("band", 0) and high <= claimed + claim.get("band", 0)
        apart = high < claimed - claim.get("band", 0) or low > claimed + claim.get("band", 0)
    elif kind == "equivalent":
        ours = stats.tost(found.value, found.error, found.df, delta) < 0.05
        apart = low > delta or high < -delta
    elif kind == "non-inferior":
        ours, apart = works and low > -delta, high < -delta
    elif found.interval is None:  # one number says nothing about another training
        return "inconclusive"
    else:
        low, high = (low, high) if kind == "gain" else (-high, -low)
        ours = low > claim.get("chance", 0)
        excluded = claimed is not None and high < min(delta, claimed / 2)
        apart = excluded and given and found.power is not None and found.power(claimed) >= 0.8
    return "supported" if ours else "contradicted" if apart else "inconclusive"


def judged(claim: dict, paper: dict) -> dict:
    """A claim as a row of text: what the paper says, its logs, our result, setting and verdict."""
    found = find(claim["ours"]) if "ours" in claim else None
    row = {key: claim.get(key, "") for key in ("id", "section", "line", "quote", "claim", "paper", "note", "command")}
    row |= {"logs": log_text(claim.get("logs", {}), paper["logs"]), "setting": "not run", "verdict": "not run"}
    row |= {"here": "", "differs": "", "scale": "", "detectable": "", "power": "", "would": "", "given": ""}
    if found is None:
        return row
    works = given = True
    if claim.get("dpo"):
        margin, given = delivered(claim, paper)
        theirs = f"the authors' logs end at {paper['settings']['logs.margin'][0]} or more"
        row["given"] = f"mean margin {margin:.2g}, {'delivered' if given else 'not delivered'} ({theirs})"
    if claim["kind"] == "non-inferior":
        arms = [trainings_of(claim["ours"] | {"new": claim["ours"][a], "base": claim["ours"]["start"]}) for a in ("new", "base")]
        works = any(effect(arm).interval[0] > 0 for arm in arms)
    beside = [f"{words} {number(look_up(each)['value'])}" for words, each in claim.get("beside", {}).items()]
    row |= {"here": "; ".join([found.text, *beside]), "verdict": verdict(claim, found, works, given)}
    if found.power:
        row["detectable"] = f"{100 * stats.detectable(found.power):.1f}"
        row["power"] = f"{found.power(claim['effect']):.0%}" if claim.get("effect") else ""
    if "folder" in claim["ours"]:
        row["setting"], differs, row["scale"] = setting(claim, paper_facts(claim, paper), our_facts(claim, found))
        row["differs"] = "; ".join(differs)
    if row["setting"] == "different":
        row |= {"would": row["verdict"], "verdict": "not judged"}
    pairs = paired_logs(claim.get("logs", {}), paper["logs"])
    if pairs is not None and found.power:
        gained, lost, n = map(int, pairs)
        d33 = stats.detectable(lambda d: stats.paired_power(d, n, (gained + lost) / n), 1 / 3)
        seen = "excludes" if found.interval[1] < d33 else "does not exclude"
        row["d33"] = f"{100 * d33:.1f} points" + f"; this interval {seen} it" * (row["setting"] != "different")
    return row


# ------------------------------------------------------------------------------------- an experiment in blocks
def read_blocks(folder: Path) -> tuple[dict[str, dict], dict[str, list[float]]]:
    """Episodes by arm and block (one training each), and the nats that each arm's training delivered.

    folder: *.jsonl or *.csv with block, arm, task, layout, init, noise and success in each line, or with
    block, arm and nats: the mean difference of log-ratios, without beta, on held-out pairs of the block.

    Raises:
        UserError: an episode is there twice.
    """
    arms, nats = defaultdict(lambda: defaultdict(dict)), defaultdict(list)
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.csv")]):
        is_csv = path.suffix == ".csv"
        lines = csv.DictReader(path.read_text().splitlines()) if is_csv else audit.read_lines(path)[0]
        for line in lines:
            if "nats" in line:
                nats[line["arm"]].append(float(line["nats"]))
                continue
            place = {"suite": line["layout"], "task": int(line["task"]), "init_state": int(line["init"])}
            won = str(line["success"]).lower() in ("true", "1")
            row = place | {"seed": int(line["noise"]), "success": won, "crash": line.get("crash") or ""}
            of_block, key = arms[line["arm"]][int(line["block"])], (*place.values(), row["seed"])
            refuse(key in of_block, f"{path}: arm {line['arm']}, block {line['block']}: {key} is there twice")
            of_block[key] = row
    return {arm: {b: list(rows.values()) for b, rows in blocks.items()} for arm, blocks in arms.items()}, nats


def contrasts(plan: dict) -> list[dict]:
    """The plan's comparisons of arms, each over the blocks that both have; Holm covers its primaries."""
    arms, nats = read_blocks(RESULTS / plan["folder"])
    rows = []
    for kind in ("primary", "exploratory"):
        for new, base in plan.get(kind, []):
            blocks = sorted(arms.get(new, {}).keys() & arms.get(base, {}).keys())
            short_of = f"{plan['folder']}: {new} and {base} share {len(blocks)} blocks; {ENOUGH} are needed"
            refuse(kind == "primary" and len(blocks) < ENOUGH, short_of)
            if len(blocks) >= ENOUGH:
                found = effect({(0, b): (arms[new][b], arms[base][b]) for b in blocks})
                p = stats.t_test(found.value, found.error, found.df)
                rows.append({"new": new, "base": base, "kind": kind, "blocks": len(blocks), "found": found, "p": p})
    corrected = iter(stats.holm([row["p"] for row in rows if row["kind"] == "primary"]))
    for row in rows:
        row["p_holm"] = next(corrected) if row["kind"] == "primary" else None
        sure = row["p_holm"] is not None and row["p_holm"] < 0.05
        row["verdict"] = ("gain" if row["found"].value > 0 else "loss") if sure else "inconclusive"
        row["nats"] = nats.get(row["new"], [])
    return rows


def contrasts_table(plan: dict) -> str:
    if not any((RESULTS / plan["folder"]).glob("*")):
        return "Not run yet."
    return listing(
        contrasts(plan),
        {
            "comparison": "{new} - {base}, {kind}",
            "blocks": "{blocks}",
            "effect (95 %)": lambda row: points(row["found"].value, row["found"].interval),
            "p": lambda row: p_value(row["p"]),
            "p (Holm)": lambda row: p_value(row["p_holm"]) if row["p_holm"] is not None else "",
            "detectable": lambda row: f"{100 * stats.detectable(row['found'].power):.1f}",
            "delivered, nats": lambda row: f"{np.mean(row['nats']):.3g}" if row["nats"] else "",
            "outcome": "{verdict}",
        },
    )


# ------------------------------------------------------------------------------------------------------- tables
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


def details(claims: list[dict]) -> str:
    """Each claim in the paper's words, and all that its row of the table rests on."""
    lines = {
        "Its public logs": "logs",
        "Setting": "setting",
        "It differs in": "differs",
        "If that did not count": "would",
        "Treatment": "given",
        "What a third of the power of the authors' paired episodes could see": "d33",
        "Note": "note",
    }
    parts = []
    for row in claims:
        said = [f"- {words}: {row[key]}." for words, key in lines.items() if row.get(key)]
        where = f"section {row['section']}, line {row['line']}"
        command = f"- `{row['command']}`" if row["command"] else ""
        parts.append("\n".join([f"**{row['id']}** ({where})\n", f"> {row['quote']}\n", *said, command]).rstrip())
    return "\n\n".join(parts)


def also_table(claims: list[dict]) -> str:
    columns = {"question": "{claim}", "here (95 % interval)": "{here}", "outcome": "{verdict}"}
    return listing(claims, columns | {"detectable, points": "{detectable}", "command": "`{command}`"})


def card(entries: list[dict], rows: dict[str, dict]) -> str:
    """The results at a glance. entries: a question, its scope and its price, and the row that answers it."""

    def outcome(row: dict) -> str:
        return " ".join(filter(None, [row["setting"] if row["setting"] == "different" else "", row["verdict"]]))
    lines = [entry | rows[entry["row"]] for entry in entries]
    return listing(
        lines,
        {
            "question": "{question}",
            "paper": "{paper}",
            "scope, scale": lambda row: f"{row['scope']}; {row['scale']}" if row["scale"] else row["scope"],
            "compute": "{compute}",
            "outcome": lambda row: f"{outcome(row)}: {row['here']}",
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
