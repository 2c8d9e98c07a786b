"""The chapters of the report: blocks and tables of one experiment, and of all of them."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from urllib.parse import quote

from report import audit, claims, plots, tables
from report.page import PILLS, as_html, slug
from report.tables import script
from runtime import disk
from runtime.config import HERE

STAGES = {  # what may have run, by the script in a row's command
    "01_sft.py": "Supervised fine-tuning",
    "03_dpo.py": "DPO",
    "04_eval.py": "Success rates",
    "05_profile.py": "Anatomy of the latency",
    "extras.cells": "Caches and fewer denoise steps",
    "06_pretrain_head.py": "Contrastive head and retrieval",
    "07_validate.py": "Surrogate against exact likelihood",
}
TRAINING = {"01_sft.py": "sft", "03_dpo.py": "dpo-"}  # how the names of their logs begin
CELLS = "Caches, fewer looks and fewer denoise steps"
FEW = 24  # more metrics say nothing as bars; their stage draws them
CLIPS = 12


@dataclass
class Experiment:
    title: str
    rows: list[dict]  # of table.json: success rates and metrics
    training: dict[str, list[dict]] = field(default_factory=dict)  # metrics.jsonl of sft and of each dpo-*
    episodes: Path | None = None  # folder for the audit
    drawn: list[Path] = field(default_factory=list)  # plots that other stages made
    videos: list[Path] = field(default_factory=list)


def by_stage(rows: list[dict], key: str = "") -> list[tuple[str, str, list[dict]]]:
    """(stage, value of `key`, rows) of metrics, grouped and in order."""
    groups = defaultdict(list)
    for row in [row for row in rows if "metric" in row]:
        groups[script(row), row.get(key, "")].append(row)
    return [(*names, group) for names, group in sorted(groups.items())]


# ------------------------------------------------------------------------------------------------------ plots
def learning(experiment: Experiment, rows: list[dict]) -> list:
    """Evaluations on validation init states along the SFT training, and its log; or []."""
    rows = [row for row in split(rows)[0] if row["policy"] == "sft" and not row["blank_images"]]
    rows = [row for row in rows if row["suite"] == max((r["suite"] for r in rows), key=len)]  # all suites
    logs = [log for name, log in experiment.training.items() if name.startswith("sft") and log]
    return [rows, logs[0]] if len(rows) > 1 and logs else []


def dpo_curves(training: dict[str, list[dict]]) -> Iterator[tuple[str, str, dict]]:
    """(name, caption, logs by adapter) of every set of pairs that DPO was trained on."""
    curves = defaultdict(dict)
    for name in [name for name, rows in training.items() if name.startswith("dpo-") and rows]:
        _, adapter, variant = name.split("-", 2)
        curves[variant][adapter] = training[name]
    for variant, logs in sorted(curves.items()):
        recipe = re.split(r"-at\d|[-,] ?seed\d", variant)[0]
        start, seed = (re.search(key, variant) for key in (r"-at(\d+)", r"seed(\d+)"))
        policy = f"SFT step {start[1]}" if start else "the final SFT policy"
        caption = f"DPO's implicit rewards, {recipe} pairs, from {policy}"
        yield slug(variant), caption + (f", seed {seed[1]}" if seed else ""), logs


def figures(experiment: Experiment, groups: dict[str, list[dict]], folder: Path) -> list[str]:
    """All plots that the rows allow, as PNGs in `folder`, and those that other stages drew, as Markdown."""
    plain, cells = split(groups["test"])
    _, cells_val = split(groups["val"])
    paired, cells_paired = ([row for row in rows if "gained" in row] for rows in (plain, cells))
    against = "Difference to {}, on the same episodes"
    drawings = [  # name, caption, function, its arguments; nothing is drawn without arguments
        ("success", "Success on held-out init states", plots.success, [plain]),
        ("differences", against.format(tables.baseline(plain)), plots.forest, [paired]),
        ("differences-cells", against.format(tables.baseline(cells)), plots.forest, [cells_paired]),
        (
            "learning_curve",
            "What more training buys, on validation init states",
            plots.learning_curve,
            learning(experiment, groups["val"]),
        ),
        ("cells-val", f"{CELLS} on validation init states", plots.cells, [cells_val]),
        ("cells-test", f"{CELLS} on held-out init states", plots.cells, [cells]),
    ]
    for name, caption, logs in dpo_curves(experiment.training):
        drawings.append((f"dpo-{name}", caption, plots.dpo, [logs]))
    for stage, unit, rows in by_stage(experiment.rows, "unit"):
        if 1 < len(rows) <= FEW:
            name = f"{slug(stage.removesuffix('.py'))}-{slug(unit)}"
            drawings.append((name, f"{STAGES.get(stage, stage)}, {unit}", plots.metrics, [rows]))
    lines = []
    for name, caption, draw, arguments in drawings:
        if arguments and all(arguments):
            path = folder / f"{name}-{slug(experiment.title)}.png"
            plots.save(draw(*arguments), path)
            lines.append(f"![{caption}]({path.name})")
    return lines + [link_to(path, f"{path.parent.name}: {path.stem}", folder) for path in experiment.drawn]


def link_to(picture: Path, caption: str, folder: Path) -> str:
    return f"![{caption}]({quote(os.path.relpath(picture, folder))})"


def clips(videos: list[Path], folder: Path) -> list[str]:
    """Rollouts: of each suite a few successes and a few failures, in turn."""
    groups = defaultdict(list)
    for path in videos:
        groups[path.name.split("-")[0], path.stem.rpartition("-")[2]].append(path)
    in_turn = [path for i in range(CLIPS) for group in groups.values() for path in group[i : i + 1]]
    return [link_to(path, f"{path.parent.parent.name}: {path.stem}", folder) for path in in_turn[:CLIPS]]


# --------------------------------------------------------------------------------------------------- chapters
def split(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Evaluations of 04, and cells of extras/cells.py."""
    return [row for row in rows if "hit_rate" not in row], [row for row in rows if "hit_rate" in row]


def chapter(experiment: Experiment, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The blocks of one experiment, and its tables by the name that a marker in a README calls them."""
    rates = [row for row in experiment.rows if "successes" in row]
    key = itemgetter("name", "suite", "group")
    pooled = {key(row) for row in rates if len(row["train_seeds"]) > 1}
    single = [row for row in rates if key(row) in pooled and len(row["train_seeds"]) == 1]
    groups = {name: [r for r in rates if r["group"] == name and r not in single] for name in ("test", "val")}
    blocks, named = [f"## {experiment.title}"], {}

    def add(suffix: str, heading: str, table: Callable, rows: list[dict]) -> None:
        if rows:
            named[experiment.title + suffix] = table(rows)
            blocks.extend([f"### {heading}", named[experiment.title + suffix]])

    for group, words in (("test", "held-out init states (40-49)"), ("val", "validation init states (35-39)")):
        suffix, (plain, cells) = "/val" if group == "val" else "", split(groups[group])
        add(suffix, f"Success on {words}", tables.success_table, plain)
        add(f"{suffix}/cells", f"{CELLS} on {words}", tables.success_table, cells)
    add("/seeds", "Seed by seed", tables.success_table, [row for row in single if row["group"] == "test"])
    blocks.append("\n".join(figures(experiment, groups, folder)))
    for stage, _, rows in by_stage(experiment.rows):
        add(f"/{stage.removesuffix('.py')}", STAGES.get(stage, stage), tables.metrics_table, rows)
    if experiment.episodes and rates:
        audited = audit.audit(experiment.episodes)
        add("/pairs", "From single episodes, all seeds together", tables.pairs_table, audited["pairs"])
        blocks.append(findings_list(audited["findings"]) or "The audit of these episodes found nothing.")
    if not experiment.rows:
        blocks.append("Nothing has been evaluated yet.")
    commands = sorted({f"- `{row['command']}` at {row['commit'] or 'no commit'}" for row in experiment.rows})
    for heading, lines in (("Rollouts", clips(experiment.videos, folder)), ("Commands", commands)):
        if lines:
            blocks += [f"### {heading}", "\n".join(lines)]
    return list(filter(None, blocks)), named


def findings_list(findings: list[audit.Finding]) -> str:
    return "\n".join(f"- {finding.kind}: {finding.where}: {finding.text}" for finding in findings)


def what_has_run(experiments: list[Experiment]) -> str:
    logs = [name for experiment in experiments for name in experiment.training]
    stages = [script(row) for experiment in experiments for row in experiment.rows]
    lines = []
    for stage, words in STAGES.items():
        trained = sum(name.startswith(TRAINING.get(stage, "-")) for name in logs)
        counts = {"training log": trained, "row": stages.count(stage)}
        text = ", ".join(f"{n} {what}{'s' * (n > 1)}" for what, n in counts.items() if n)
        lines.append([f"`{stage}`", words, text or "not run"])
    return tables.table(["stage", "what it does", "what of it is here"], lines)


def card() -> list[str]:
    """The six main results: the table between <!-- card --> and <!-- /card --> in README.md."""
    marked = re.search(r"<!-- card -->(.*?)<!-- /card -->", (HERE / "README.md").read_text(), re.DOTALL)
    return ["## Six results", marked[1].strip()] if marked else []


# ------------------------------------------------------------------------------------------------------ files
def write_report(name: str, experiments: list[Experiment], folder: Path, alone: bool) -> dict[str, str]:
    """Write the report into `folder`; returns its tables by name. alone: as for as_html."""
    paper = claims.read_paper()
    logs, judged = paper["logs"], [claims.judged(claim, paper["logs"]) for claim in paper["claims"]]
    verdicts = [claim["verdict"] for claim in judged]
    counts = ", ".join(f"{verdict} {verdicts.count(verdict)}" for verdict in PILLS if verdict in verdicts)
    named = {
        "claims": claims.claims_table(judged),
        "public-logs": claims.logs_table(logs),
    }
    source = f"[the paper's repository]({logs['repository']}) at commit `{logs['commit'][:7]}`"
    blocks = [
        f"# CrossVLA kit: {name}",
        f"What this kit finds about [{paper['title']}](https://arxiv.org/abs/{paper['arxiv']}).",
        *card(),
        "## The paper's claims",
        f"By verdict: {counts}. *Here* means this kit's committed results, at its tiny size unless a row "
        "says otherwise. *Does not hold here* includes improvements that are not significant: they were not "
        "shown, which does not make them zero.",
        named["claims"],
        "## The paper's public logs",
        f"Counted in {source}, folder `{logs['folder']}`. A seed is the evaluation's, not the training's. "
        "Intervals count episodes that repeat another seed's once. Counts cannot tell whether seeds agree on "
        "an init state.",
        named["public-logs"],
        "## What has run",
        what_has_run(experiments),
    ]
    for experiment in experiments:
        more, tables_of_it = chapter(experiment, folder)
        blocks += more
        named |= tables_of_it
    disk.write_atomic(folder / "index.html", as_html(blocks, folder, alone))
    disk.write_atomic(folder / "report.md", "\n\n".join(blocks) + "\n")
    disk.write_json(folder / "claims.json", judged)
    print(f"claims: {counts}\nreport: {folder / 'index.html'}")
    return named


def write_audit(episodes: Path, folder: Path) -> bool:
    """Print the audit of a folder of episodes and keep it in `folder`; True if it found nothing."""
    audited = audit.audit(episodes)
    text = f"# Audit of {episodes}\n\n## Success rates\n\n{tables.rates_table(audited['rates'])}\n"
    if audited["pairs"]:
        text += f"\n## Paired with the SFT policy\n\n{tables.pairs_table(audited['pairs'])}\n"
    if audited["findings"]:
        text += f"\n## Findings\n\n{findings_list(audited['findings'])}\n"
        text += "\nFacts about files; this does not establish what caused them.\n"
    disk.write_atomic(folder / "audit.md", text)
    print(text, end="")
    return not audited["findings"]
