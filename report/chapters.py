"""The chapters of the report: blocks and tables of one experiment, and of all of them."""

import itertools
import math
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from report import audit, plots, tables
from report.page import as_html, slug
from report.tables import grouped, script
from runtime import disk

HEADINGS = {  # headings of the tables of metrics, by the script in a row's command
    "03_dpo.py": "DPO",
    "05_profile.py": "Anatomy of the latency",
    "06_pretrain_head.py": "Contrastive head and retrieval",
    "07_validate.py": "Surrogate against exact likelihood",
}
CELLS = "Caches, fewer looks and fewer denoise steps"
GROUPS = {"test": "held-out init states (40-49)", "val": "validation init states (35-39)"}
CLIPS = 12


@dataclass
class Experiment:
    title: str
    rows: list[dict]  # of table.json: success rates and metrics
    training: dict[str, list[dict]] = field(
        default_factory=dict
    )  # logs of DPO: dpo-<adapter>-<pairs> -> rows
    episodes: Path | None = None  # folder for the audit
    drawn: list[Path] = field(default_factory=list)  # plots that other stages made
    videos: list[Path] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------ plots
def figures(experiment: Experiment, paired: list[dict], folder: Path) -> str:
    """Plots of paired rows and of DPO, as PNGs in `folder`, and those of other stages, as Markdown."""
    lines, curves = [], defaultdict(dict)
    for name, rows in experiment.training.items():
        _, adapter, pairs = name.split("-", 2)
        curves[pairs][adapter] = rows
    plain, cells = split(paired)
    against = "Difference to {}, on the same episodes"
    drawings = [  # name, caption, function, what it draws
        ("differences", against.format(tables.baseline(plain)), plots.forest, plain),
        ("differences-cells", against.format(tables.baseline(cells)), plots.forest, cells),
        *(
            (f"dpo-{slug(pairs)}", f"DPO's implicit rewards, pairs: {pairs}", plots.dpo, logs)
            for pairs, logs in sorted(curves.items())
        ),
    ]
    for name, caption, draw, data in drawings:
        if data:
            path = folder / f"{name}-{slug(experiment.title)}.png"
            plots.save(draw(data), path)
            lines.append(f"![{caption}]({path.name})")
    lines += ["!" + link_to(path, f"{path.parent.name}: {path.stem}", folder) for path in experiment.drawn]
    return "\n".join(lines)


def link_to(path: Path, words: str, folder: Path) -> str:
    return f"[{words}]({quote(os.path.relpath(path, folder))})"


# --------------------------------------------------------------------------------------------------- chapters
def split(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Evaluations of 04, and cells of extras/cells.py."""
    return [row for row in rows if "hit_rate" not in row], [row for row in rows if "hit_rate" in row]


def chapter(experiment: Experiment, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The blocks of one experiment, and its tables by the name that a marker in a README calls them."""
    title, rates = experiment.title, [row for row in experiment.rows if "successes" in row]
    shown = {}  # of each group the rows for several trainings together, where there are any
    for group in GROUPS:
        rows = [row for row in rates if row["group"] == group]
        shown[group] = [row for row in rows if len(row["train_seeds"]) > 1] or rows
    (plain, cells), (val, val_cells) = map(split, shown.values())
    single = [row for row in rates if row["group"] == "test" and row not in shown["test"]]
    success = [  # suffix of the table's name, heading, rows
        ("", f"Success on {GROUPS['test']}", plain),
        ("/cells", f"{CELLS} on {GROUPS['test']}", cells),
        ("/val", f"Success on {GROUPS['val']}", val),
        ("/val/cells", f"{CELLS} on {GROUPS['val']}", val_cells),
        ("/seeds", "Seed by seed", single),
    ]
    metrics = [row | {"script": script(row)} for row in experiment.rows if "metric" in row]
    parts = [  # the same with texts
        *((suffix, heading, tables.success_table(rows)) for suffix, heading, rows in success if rows),
        ("", "", figures(experiment, [row for row in shown["test"] if "gained" in row], folder)),
        *(
            (f"/{stage.removesuffix('.py')}", HEADINGS.get(stage, stage), tables.metrics_table(rows))
            for (stage,), rows in sorted(grouped(metrics, "script").items())
        ),
    ]
    if experiment.episodes and rates:
        found = audit.audit(experiment.episodes)
        if len({str(row["train_seeds"]) for row in rates}) > 1:
            parts.append(("/together", "Success, all seeds together", tables.rates_table(found["rates"])))
        if found["pairs"]:
            parts.append(("/pairs", "Compared, all seeds together", tables.pairs_table(found["pairs"])))
        parts.append(("", "", findings_list(found["findings"])))
    clips = [
        "!" + link_to(path, f"{path.parent.parent.name}: {path.stem}", folder)
        for path in experiment.videos[:: math.ceil(len(experiment.videos) / CLIPS) or 1]  # of all tasks
    ]
    commands = {f"- `{row['command']}` at {row['commit'] or 'no commit'}" for row in experiment.rows}
    parts += [
        ("", "Rollouts", "\n".join(clips)),
        ("", "Commands", "\n".join(sorted(commands)) or "Nothing has been evaluated yet."),
    ]
    headed = [([f"### {heading}"] if heading else []) + [text] for _, heading, text in parts if text]
    named = {title + suffix: text for suffix, _, text in parts if text.startswith("| ")}
    return [f"## {title}", *itertools.chain(*headed)], named


def findings_list(findings: list[audit.Finding]) -> str:
    return (
        "\n".join(map("- {0.kind}: {0.where}: {0.text}".format, findings))
        or "The audit of these episodes found nothing."
    )


# ------------------------------------------------------------------------------------------------------ files
def write_report(name: str, blocks: list[str], folder: Path, alone: bool) -> None:
    """Write the blocks into `folder`, as a page and as Markdown. alone: as for as_html."""
    text = "\n\n".join([f"# CrossVLA kit: {name}", *blocks]) + "\n"
    disk.write_atomic(folder / "index.html", as_html(text, folder, alone))
    disk.write_atomic(folder / "report.md", text)
    print(f"report: {folder / 'index.html'}")


def write_audit(episodes: Path, folder: Path) -> bool:
    """Print the audit of a folder of episodes and keep it in `folder`; True if it found nothing."""
    found = audit.audit(episodes)
    text = "\n\n".join(
        [
            f"# Audit of {episodes}",
            "## Success rates",
            tables.rates_table(found["rates"]),
            "## Paired with the SFT policy",
            tables.pairs_table(found["pairs"]) if found["pairs"] else "Nothing is paired.",
            "## Findings",
            findings_list(found["findings"]),
            "Findings are facts about files; this does not establish what caused them.\n",
        ]
    )
    disk.write_atomic(folder / "audit.md", text)
    print(text, end="")
    return not found["findings"]
