"""The paper's claims (configs/paper.yaml) beside its public logs and this kit's committed results.

Two fields of a row are computed. `setting` says how near the experiment is to the claim's own. It compares
the paper's settings with configs.json (03's configs), the number of pairs, and rows of table.json. `verdict`
compares the claim's own number with the data. results/claims.md states the rule of both.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import yaml

from report import episodes, plots, power, stats
from report.page import PILLS
from report.tables import difference, joined, listing, number, p_value, points
from runtime import HERE, disk, refuse

RESULTS = HERE / "results"
DELTA = 0.03  # a difference of success rates below 3 points is none, unless a row says another
FACTOR = 2.0  # settings that differ by more are different, and smaller policies than this are toys
ENOUGH = 3  # trainings, from which on an interval is over trainings


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


def effect(trainings: dict[tuple, tuple[list[dict], list[dict]]]) -> Found:
    """The difference of paired success rates; over trainings where there are three or more.

    trainings: a training -> its episodes, and its baseline's.
    """
    tests = [episodes.paired(*sides) for sides in trainings.values()]
    gains = [test["diff_vs_sft"] for test in tests]
    wins = "{} against {} of {}".format(*np.sum([[*t["wins"], t["paired_n"]] for t in tests], axis=0))
    if len(gains) >= ENOUGH:
        df, error = len(gains) - 1, max(1e-9, float(np.std(gains, ddof=1) / np.sqrt(len(gains))))
        interval, mean = stats.t_interval(gains), float(np.mean(gains))
        text = f"{points(mean, interval)} over {len(gains)} trainings, {wins}"
        return Found(mean, interval, text, error, df, power.over_trainings(error, df))
    own, base = ([row for sides in trainings.values() for row in sides[side]] for side in (0, 1))
    test = episodes.paired(own, base)
    low, high = stats.difference_interval(test)
    which = "these two trainings" if len({file for file, _ in trainings}) > 1 else "this training"
    text = f"{difference(test)} for {which}, {wins}, p = {p_value(test['p_vs_sft'])}"
    discordance = (test["gained"] + test["lost"]) / test["paired_n"]
    seen = partial(power.paired_power, n=test["paired_n"], discordance=discordance, deff=test["deff"])
    return Found(test["diff_vs_sft"], (low, high), text, (high - low) / 2 / stats.Z, power=seen)


def trainings_of(ours: dict, new: str = "new", base: str = "base") -> dict:
    """The episodes of two of the files (or lists of files) that a claim names, by training and seed.

    Each file is a training, unless the claim's `trainings` say which files share one: their mean counts.
    """
    found, names = defaultdict(lambda: ([], [])), ours.get("trainings", range(99))
    for side, name in enumerate((new, base)):
        for i, (training, file) in enumerate(zip(names, np.atleast_1d(ours[name]), strict=False)):
            refuse(not (RESULTS / file).is_file(), f"a claim needs {RESULTS / file}, which is not there")
            for row in disk.read_jsonl(RESULTS / file):
                if row["suite"] in ours.get("suites", [row["suite"]]):
                    found[training, row["seed"]][side].append(row | {"seed": (i, row["seed"])})
    return {training: sides for training, sides in found.items() if all(sides)}


def look_up(ours: dict) -> dict:
    """The one row of the committed results that a claim names.

    Raises:
        UserError: not exactly one row fits.
    """
    path = RESULTS / ours["file"]
    rows = disk.read_json(path) if path.suffix == ".json" else disk.read_jsonl(path)
    fits = [row for row in rows if all(row.get(key) == value for key, value in ours["where"].items())]
    refuse(len(fits) != 1, f"{len(fits)} rows of {path} have {ours['where']}; a claim needs one")
    return fits[0]


def figure_of(row: dict, key: str) -> Found:
    """A row's figure, with its interval if it has one."""
    interval = tuple(row["ci95"]) if row.get("ci95") and key == "value" else None
    bounds = "({:.4g} to {:.4g})".format(*interval) if interval else ""
    text = " ".join(filter(None, (number(row[key]), bounds, row.get("unit") or row.get("metric", key))))
    return Found(row[key], interval, text)


# ------------------------------------------------------------------------------------------------ the setting
def dpo_facts(config: dict, pairs: float) -> dict:
    """What a training with DPO is, from its config and the number of its pairs."""
    kept = ("backbone", "adapter", "suites", "pairs", "lr", "beta", "sft_coef")
    seen = config["steps"] * config["batch_size"]
    beta = config["beta"] if config["beta"] == "auto" else float(config["beta"])
    own = {key: config[key] for key in kept} | {"beta": beta, "contrast": config.get("contrast", 1.0)}
    return own | {"pairs seen": seen, "visits to a pair": seen / pairs}


def paper_facts(claim: dict, paper: dict) -> dict:
    """The claim's own setting: what its entry says and, for DPO, the paper's settings."""
    stated = claim.get("paper_setting", {})
    if not claim.get("dpo"):
        return stated
    settings = {key.removeprefix("dpo."): value for key, (value, _) in paper["settings"].items()}
    return dpo_facts(settings | stated, settings["logs.n_pairs"]) | {"parameters": stated["parameters"]}


def training_logs(ours: dict, name: str) -> list[list[dict]]:
    """The rows of each committed log of this name, one for each seed."""
    files = sorted((RESULTS / ours["folder"]).glob("training/*.jsonl"))
    logs = [disk.read_jsonl(file) for file in files if file.stem.partition("-seed")[0] == name]
    refuse(not logs, f"a claim needs {RESULTS / ours['folder']}/training/{name}*.jsonl, which is not there")
    return logs


def our_facts(claim: dict, row: dict) -> dict:
    """The same of the experiment: its stored config, a row's keys and, for DPO, a count of its pairs."""
    name = claim["ours"]["config"]
    config = disk.read_json(RESULTS / claim["ours"]["folder"] / "configs.json")[name]
    if not claim.get("dpo"):
        return config | row
    logs = training_logs(claim["ours"], f"prefs-{name.split('-', 2)[2]}-units")
    pairs = [sum(len(unit["pairs"]) for unit in log) for log in logs]
    return config | dpo_facts(config, float(np.mean(pairs)))


def alike(one, other) -> bool:
    """Equal, or numbers within a factor of two."""
    words = isinstance(one, str | list) or isinstance(other, str | list)
    return one == other or (not words and one * other > 0 and 1 / FACTOR <= one / other <= FACTOR)


def setting(claim: dict, stated: dict, own: dict) -> tuple[str, str, str]:
    """(same, analogue, different or by construction; in what it differs; scale)."""
    absent = [key for key in stated if key not in own]
    refuse(absent, f"{claim['id']}: the results do not record {joined(absent)}")
    small = "parameters" in stated and own["parameters"] * FACTOR < stated["parameters"]
    other = [key for key in stated if key != "parameters" and not alike(own[key], stated[key])]
    text = "; ".join(f"{key} {as_text(own[key])} (paper: {as_text(stated[key])})" for key in other)
    label = "different" if other else "analogue" if small else "same"
    return "by construction" if claim["kind"] == "identity" else label, text, "toy" if small else ""


def as_text(value) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ", ".join(np.atleast_1d(value))


# ------------------------------------------------------------------------------------------------ the verdict
def treatment(claim: dict, paper: dict) -> tuple[str, bool]:
    """DPO's margin in the second half of the training, and whether the authors' own logs end near it."""
    logs = training_logs(claim["ours"], claim["ours"]["config"])
    margins = [row["rewards/margins"] for rows in logs for row in rows[len(rows) // 2 :]]
    margin, theirs = float(np.mean(margins)), paper["settings"]["logs.margin"][0]
    given = margin * FACTOR >= theirs
    return (
        f"mean margin {margin:.3g}, {'delivered' if given else 'not delivered'} "
        f"(asked: half of {theirs}, with which the authors' logs of OpenVLA end, or more)"
    ), given


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
        ours = power.tost(found.value, found.error, found.df, delta) < 0.05
        apart = low > delta or high < -delta
    elif kind == "non-inferior":
        ours, apart = works and low > -delta, high < -delta
    else:  # a gain or a loss; one number without an interval says nothing about another training
        low, high = (low, high) if kind == "gain" else (-high, -low)
        ours = found.interval is not None and low > claim.get("chance", 0)
        seen = claimed is not None and found.power is not None and found.power(claimed) >= 0.8
        apart = seen and given and high < min(delta, claimed / 2)
    return "supported" if ours else "contradicted" if apart else "inconclusive"


WORDS = ("id", "section", "line", "quote", "claim", "paper", "logs", "d33", "note", "command")
COMPUTED = ("here", "setting", "verdict", "differs", "scale", "detectable", "power", "would", "given")


def judged(claim: dict, paper: dict) -> dict:
    """A claim as a row of text: what the paper says, its logs, our result, setting and verdict."""
    ours = claim.get("ours", {})
    row = {key: claim.get(key, "") for key in WORDS} | dict.fromkeys(COMPUTED, "")
    if not ours:
        return row | {"setting": "not run", "verdict": "not run"}
    one = look_up(ours) if "file" in ours else {}
    found = effect(trainings_of(ours)) if "new" in ours else figure_of(one, ours.get("key", "value"))
    beside = [f"{words} {number(look_up(each)['value'])}" for words, each in claim.get("beside", {}).items()]
    row["here"] = "; ".join([found.text, *beside])
    works = given = True
    if claim.get("dpo"):
        row["given"], given = treatment(claim, paper)
    if claim["kind"] == "non-inferior":
        arms = [effect(trainings_of(ours, arm, "start")) for arm in ("new", "base")]
        works = any(arm.interval[0] > 0 for arm in arms)
    row["verdict"] = verdict(claim, found, works, given)
    if "folder" in ours:
        stated, own = paper_facts(claim, paper), our_facts(claim, one)
        row["setting"], row["differs"], row["scale"] = setting(claim, stated, own)
    if row["setting"] == "different":
        row |= {"verdict": "not judged", "would": row["verdict"]}
    elif row["setting"] == "by construction":  # nothing that an experiment could have refuted
        row["verdict"] = row["setting"]
    if found.power:
        row["detectable"] = f"{100 * power.detectable(found.power):.1f}"
        row["power"] = f"{found.power(claim['effect']):.0%}" if claim.get("effect") else ""
    return row


# ------------------------------------------------------------------------------------ an experiment in blocks
def read_blocks(plan: dict) -> tuple[dict, dict]:
    """Episodes by arm and block (one training each), and the records of each arm's trainings.

    Episodes are of the plan's own blocks alone: those of the arms that it compares with others.
    plan: an entry of `blocks` in configs/paper.yaml; it may name one suite, whose episodes alone are read.
    Its folder is what extras/blocks.py writes. A record has `playouts`, the arm's own or its block's, and may
    have `delivered`: the mean difference of log-ratios in nats, without beta, on held-out pairs.
    """
    arms, records = defaultdict(lambda: defaultdict(list)), defaultdict(list)
    for path in sorted(
        path
        for path in (RESULTS / plan["folder"]).glob("*.csv")
        if path.with_suffix(".json").is_file()  # written after it: a kill may come between
    ):
        for line in csv.DictReader(disk.read_text(path).splitlines()):
            if line["suite"] != plan.get("suite", line["suite"]):
                continue
            numbers = {key: int(line[key]) for key in ("task", "init_state", "seed")}
            arms[line["arm"]][int(line["block"])].append(line | numbers | {"success": line["success"] == "1"})
        block = disk.read_json(path.with_suffix(".json"))
        for arm, facts in block["arms"].items():
            records[arm].append(block | facts)
    own = {block for new, _ in [*plan["primary"], *plan["exploratory"]] for block in arms.get(new, ())}
    return defaultdict(
        dict,
        {
            arm: {block: rows for block, rows in blocks.items() if block in own}
            for arm, blocks in arms.items()
        },
    ), records


def arms_of(plan: dict) -> set[str]:
    return {arm for pair in [*plan["primary"], *plan["exploratory"]] for arm in pair}


def contrasts(plan: dict) -> list[dict]:
    """The plan's comparisons of arms, each over the blocks that both have; Holm covers its primary ones.

    No test is made before the plan's number of blocks is there. Until then only the spread of the effects is
    used, for what the whole experiment could detect.
    """
    (arms, _), rows = read_blocks(plan), []
    for new, base in [*plan["primary"], *plan["exploratory"]]:
        blocks = sorted(arms[new].keys() & arms[base].keys())
        if len(blocks) < ENOUGH:
            continue
        found, first = (
            effect({block: (arms[new][block], arms[base][block]) for block in some})
            for some in (blocks, blocks[:ENOUGH])
        )
        whole, planned = (  # the standard error of all blocks, by those so far and by the first three
            some.error * np.sqrt((some.df + 1) / plan["blocks"]) for some in (found, first)
        )
        complete = len(blocks) == plan["blocks"]  # over more it is not the plan's test
        rows += [
            {
                "new": new,
                "base": base,
                "blocks": len(blocks),
                "detectable": power.detectable(power.over_trainings(whole, plan["blocks"] - 1)),
                "foreseen": power.detectable(power.over_trainings(planned, plan["blocks"] - 1)),
                "found": found if complete else None,
                # a plan that tests nothing gives intervals alone
                "p": power.t_test(found.value, found.error, found.df)
                if complete and plan["primary"]
                else None,
                "p_holm": None,
                "primary": [new, base] in plan["primary"],
            }
        ]
    primary = [row for row in rows if row["found"] and row["primary"]]
    if len(primary) == len(plan["primary"]):
        for row, p in zip(primary, stats.holm([row["p"] for row in primary]), strict=True):
            row["p_holm"] = p
    return rows


def outcome(row: dict) -> str:
    """Of a comparison of arms, in the plan's words. Only a primary one concludes anything."""
    found = row["found"]
    if not found or (row["primary"] and row["p_holm"] is None):  # all primary ones are tested together
        return "not complete"
    near = power.tost(found.value, found.error, found.df, DELTA) < 0.05
    if row["p_holm"] is None:
        return "exploratory" + ", equivalent within 3 points" * bool(near)
    if row["p_holm"] < 0.05:
        return "supported" if found.value > 0 else "harmful"
    return "no effect of interest" if near else "inconclusive"


def effects_plot(plan: dict, path: Path) -> str:
    """Draw what each arm of a plan does to the success of arm A, block by block; returns Markdown."""
    arms, _ = read_blocks(plan)
    effects = {
        arm: [episodes.paired(arms[arm][block], arms["A"][block])["diff_vs_sft"] for block in both]
        for arm in sorted(arms_of(plan) & arms.keys() - {"A"})
        if (both := [block for block in arms[arm] if block in arms["A"]])
    }
    plots.save(plots.blocks(effects), path)
    return f"![{plan['title']}: points against A]({path.parent.name}/{path.name})\n\n"


def arms_table(plan: dict) -> str:
    """A line for each arm, over the blocks of the plan's own: episodes, and what its training recorded.

    "(of 2)": the mean is over two blocks, or for right place episodes, since the others have no such figure.
    """
    arms, records = read_blocks(plan)

    def mean(values: list[float], form: str = "{:.3g}", of: int = 0) -> str:
        text = form + (f" (of {len(values)})" if len(values) < of else "")
        return text.format(np.mean(values)) if values else ""

    recorded = {  # of all suites
        **{
            f"trained, {side}": lambda row, side=side: mean(
                [each["trained"][side] for each in row["records"] if each.get("trained")], of=row["blocks"]
            )
            for side in ("chosen", "rejected")
        },
        "delivered, nats": lambda row: mean(
            [each["delivered"]["nats"] for each in row["records"] if "delivered" in each], of=row["blocks"]
        ),
        "play-outs": lambda row: mean([each["playouts"] for each in row["records"]], "{:.0f}"),
    }
    return listing(
        [
            {
                "arm": arm,
                "blocks": len(arms[arm]),
                "played": [row for rows in arms[arm].values() for row in rows if not row["crash"]],
                "records": [record for record in records[arm] if record["block"] in arms[arm]],
            }
            for arm in sorted(arms_of(plan) & arms.keys())
            if arms[arm]
        ],
        {
            "arm": "{arm}",
            "blocks": "{blocks}",
            "success": lambda row: "{} of {}".format(
                sum(each["success"] for each in row["played"]), len(row["played"])
            ),
            "right place": lambda row: mean(
                [float(each["right_place"]) for each in row["played"] if each["right_place"]],
                "{:.1%}",
                of=len(row["played"]),
            ),
        }
        | ({} if "suite" in plan else recorded),
    )


def contrasts_table(plan: dict, path: Path) -> str:
    """Tables of a plan, with its title; comparisons and a plot once three blocks are complete."""
    rows = contrasts(plan)
    compared = rows and effects_plot(plan, path) + listing(
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
            "... by the first three": lambda row: f"{100 * row['foreseen']:.1f}",
            "outcome": outcome,
        },
    )
    return "\n\n".join(
        (
            f"### {plan['title']}",
            f"`python -m extras.blocks {plan['command']}`",
            compared or f"Fewer than {ENOUGH} blocks: nothing is compared.",
            arms_table(plan),
        )
    )


# ----------------------------------------------------------------------------------------------------- tables
COLUMNS = {
    "section": "{section}",
    "claim": "{claim}",
    "paper": "{paper}",
    "here (95 % interval)": "{here}",
    "setting": "{setting}",
    "verdict": "{verdict}",
    "scale": "{scale}",
    "detectable, points": "{detectable}",
    "power for the claim": "{power}",
}
DETAILS = {
    "logs": "- Its public logs: {logs}.",
    "setting": "- Setting: {setting}.",
    "differs": "- It differs in: {differs}.",
    "would": "- If it did not differ: {would}.",
    "given": "- Treatment: {given}.",
    "d33": "- Effect that the authors' paired episodes had a third of a chance to show: {d33}.",
    "note": "- Note: {note}.",
    "command": "- `{command}`",
}


def details(claims: list[dict]) -> str:
    """Each claim in the paper's words, with everything that its row in the table is based on."""
    head = "**{id}** (section {section}, line {line})\n\n> {quote}\n\n"
    return "\n\n".join(
        head.format_map(row) + "\n".join(line.format_map(row) for key, line in DETAILS.items() if row[key])
        for row in claims
    )


def card_row(entry: dict, every: dict, paper: dict) -> dict:
    """A result at a glance: a claim's, or that of two arms of an experiment whose blocks are complete."""
    if "row" in entry:
        row = every[entry["row"]]
        found = row["here"].partition("; ")[0]
        told = f"{'different setting, ' if row['would'] else ''}{row['verdict']}: {found}"
        return row | entry | {"outcome": told}
    rows = contrasts(paper["blocks"][entry["blocks"]])
    row = next((row for row in rows if [row["new"], row["base"]] == entry["arms"] and row["found"]), None)
    return entry | {"outcome": f"{outcome(row)}: {row['found'].text}" if row else "not complete"}


# ----------------------------------------------------------------------------------------------- the chapters
def chapters(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The report's chapters about the paper, and their tables by name. Writes claims.json into `folder`."""
    paper = yaml.safe_load((HERE / "configs" / "paper.yaml").read_bytes())
    every = {claim["id"]: judged(claim, paper) for claim in [*paper["claims"], *paper["also"]]}
    rows = [every[claim["id"]] for claim in paper["claims"]]
    verdicts = [row["verdict"] for row in rows]
    counts = [f"{verdict} {verdicts.count(verdict)}" for verdict in PILLS if verdict in verdicts]
    named = {
        "card": listing(
            [card_row(entry, every, paper) for entry in paper["card"]],
            {key: f"{{{key}}}" for key in ("question", "paper", "scope", "compute", "outcome")},
        ),
        "verdicts": f"By verdict: {', '.join(counts)}.",
        "claims": listing(rows, COLUMNS),
        "details": details(rows),
        "also": listing(
            [every[claim["id"]] for claim in paper["also"]],
            {
                "question": "{claim}",
                "here (95 % interval)": "{here}",
                "outcome": "{verdict}",
                "detectable, points": "{detectable}",
                "command": "`{command}`",
            },
        ),
        "blocks": "\n\n".join(
            contrasts_table(plan, folder / f"blocks-{name}.png") for name, plan in paper["blocks"].items()
        ),
        "limitations": "\n".join(map('- Line {0[0]}: "{0[1]}"'.format, paper["limitations"])),
    }
    disk.write_json(folder / "claims.json", list(every.values()))
    print(named["verdicts"])
    blocks = [
        f"What this kit finds about [{paper['title']}](https://arxiv.org/abs/{paper['arxiv']}).",
        "## At a glance",
        named["card"],
        "## The paper's claims",
        f"{named['verdicts']} *Here* means this kit's committed results. *Setting* says how near they are to "
        "the claim's. Where it is different, the claim is not judged. results/claims.md has the rule and the "
        "paper's public logs.",
        named["claims"],
        "## Claim by claim",
        named["details"],
        "## Limitations that the authors state",
        named["limitations"],
        "## Also measured",
        named["also"],
    ]
    return blocks, named
