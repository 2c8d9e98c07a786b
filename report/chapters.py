"""The chapters of the report: blocks and tables of one experiment, and of all of them."""

import itertools
import math
import os
from collections import defaultdict
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from urllib.parse import quote

from report import audit, claims, plots, tables
from report.page import as_html, slug
from report.tables import grouped, script
from runtime import disk

STAGES = {  # headings of the tables of metrics, by the script in a row's command
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
    training: dict[str, list[dict]] = field(default_factory=dict)  # metrics.jsonl of sft and of each dpo-*
    episodes: Path | None = None  # folder for the audit
    drawn: list[Path] = field(default_factory=list)  # plots that other stages made
    videos: list[Path] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------ plots
def dpo_curves(training: dict[str, list[dict]]) -> list[tuple[str, dict]]:
    """(pairs, logs by adapter) of every set of pairs that DPO was trained on."""
    curves = defaultdict(dict)
    for name in [name for name, rows in training.items() if name.startswith("dpo-") and rows]:
        _, adapter, pairs = name.split("-", 2)
        curves[pairs][adapter] = training[name]
    return sorted(curves.items())


def figures(experiment: Experiment, groups: dict[str, list[dict]], folder: Path) -> str:
    """All plots that the rows allow, as PNGs in `folder`, and those that other stages drew, as Markdown."""
    plain, cells = ([row for row in rows if "gained" in row] for rows in split(groups["test"]))
    against = "Difference to {}, on the same episodes"
    drawings = [  # name, caption, function, its arguments; nothing is drawn without arguments
        ("success", "Success on held-out init states", plots.success, [split(groups["test"])[0]]),
        ("differences", against.format(tables.baseline(plain)), plots.forest, [plain]),
        ("differences-cells", against.format(tables.baseline(cells)), plots.forest, [cells]),
        *(
            (f"dpo-{slug(pairs)}", f"DPO's implicit rewards, pairs: {pairs}", plots.dpo, [logs])
            for pairs, logs in dpo_curves(experiment.training)
        ),
    ]
    lines = []
    for name, caption, draw, arguments in drawings:
        if arguments and all(arguments):
            path = folder / f"{name}-{slug(experiment.title)}.png"
            plots.save(draw(*arguments), path)
            lines.append(f"![{caption}]({path.name})")
    lines += [link_to(path, f"{path.parent.name}: {path.stem}", folder) for path in experiment.drawn]
    return "\n".join(lines)


def link_to(picture: Path, caption: str, folder: Path) -> str:
    return f"![{caption}]({quote(os.path.relpath(picture, folder))})"


# --------------------------------------------------------------------------------------------------- chapters
def split(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Evaluations of 04, and cells of extras/cells.py."""
    return [row for row in rows if "hit_rate" not in row], [row for row in rows if "hit_rate" in row]


def chapter(experiment: Experiment, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The blocks of one experiment, and its tables by the name that a marker in a README calls them."""
    title, rates = experiment.title, [row for row in experiment.rows if "successes" in row]
    key = itemgetter("name", "suite", "group")
    pooled = {key(row) for row in rates if len(row["train_seeds"]) > 1}
    single = [row for row in rates if key(row) in pooled and len(row["train_seeds"]) == 1]
    groups = {name: [r for r in rates if r["group"] == name and r not in single] for name in GROUPS}
    (plain, cells), (val, val_cells) = map(split, groups.values())
    success = [  # suffix of the table's name, heading, rows
        ("", f"Success on {GROUPS['test']}", plain),
        ("/cells", f"{CELLS} on {GROUPS['test']}", cells),
        ("/val", f"Success on {GROUPS['val']}", val),
        ("/val/cells", f"{CELLS} on {GROUPS['val']}", val_cells),
        ("/seeds", "Seed by seed", [row for row in single if row["group"] == "test"]),
    ]
    metrics = [row | {"script": script(row)} for row in experiment.rows if "metric" in row]
    parts = [  # the same with texts
        *((suffix, heading, tables.success_table(rows)) for suffix, heading, rows in success if rows),
        ("", "", figures(experiment, groups, folder)),
        *(
            (f"/{stage.removesuffix('.py')}", STAGES.get(stage, stage), tables.metrics_table(rows))
            for (stage,), rows in sorted(grouped(metrics, "script").items())
        ),
    ]
    if experiment.episodes and rates:
        audited = audit.audit(experiment.episodes)
        repeated = any("gained" in row for row in rates if len(row["train_seeds"]) > 1)
        if audited["pairs"] and not repeated:
            parts.append(
                ("/pairs", "From single episodes, all seeds together", tables.pairs_table(audited["pairs"]))
            )
        parts.append(("", "", findings_list(audited["findings"])))
    videos = experiment.videos[:: math.ceil(len(experiment.videos) / CLIPS) or 1]  # spread over the tasks
    clips = [link_to(path, f"{path.parent.parent.name}: {path.stem}", folder) for path in videos]
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
def write_report(name: str, experiments: list[Experiment], folder: Path, alone: bool) -> dict[str, str]:
    """Write the report into `folder`; returns its tables by name. alone: as for as_html."""
    paper = claims.read_paper()
    logs, every = (
        paper["logs"],
        {c["id"]: claims.judged(c, paper) for c in [*paper["claims"], *paper["also"]]},
    )
    rows = [every[claim["id"]] for claim in paper["claims"]]
    named = {
        "card": claims.card(paper["card"], every),
        "verdicts": claims.tally(rows),
        "claims": claims.claims_table(rows),
        "details": claims.details(rows),
        "also": claims.also_table([every[claim["id"]] for claim in paper["also"]]),
        "blocks": claims.contrasts_table(paper["blocks"]),
        "limitations": "\n".join(map('- Line {0[0]}: "{0[1]}"'.format, paper["limitations"])),
        "public-logs": claims.logs_table(logs),
    }
    blocks = [
        f"# CrossVLA kit: {name}",
        f"What this kit finds about [{paper['title']}](https://arxiv.org/abs/{paper['arxiv']}).",
        "## At a glance",
        named["card"],
        "## The paper's claims",
        f"{named['verdicts']} *Here* means this kit's committed results. *Setting* says how near they are to "
        "the claim's. Where it is different, the claim is not judged. results/claims.md has the rule.",
        named["claims"],
        "## Claim by claim",
        named["details"],
        "## Limitations that the authors state",
        named["limitations"],
        "## Also measured",
        named["also"],
        "## The paper's public logs",
        f"Counted in [the paper's repository]({logs['repository']}) at commit `{logs['commit'][:7]}`, folder "
        f"`{logs['folder']}`. A seed is the evaluation's, not the training's. "
        "Intervals count episodes that repeat another seed's once. Counts cannot tell whether seeds agree on "
        "an init state.",
        named["public-logs"],
    ]
    for experiment in experiments:
        more, its_tables = chapter(experiment, folder)
        blocks += more
        named |= its_tables
    text = "\n\n".join(blocks) + "\n"
    disk.write_atomic(folder / "index.html", as_html(text, folder, alone))
    disk.write_atomic(folder / "report.md", text)
    disk.write_json(folder / "claims.json", list(every.values()))
    print(f"{named['verdicts']}\nreport: {folder / 'index.html'}")
    return named


def write_audit(episodes: Path, folder: Path) -> bool:
    """Print the audit of a folder of episodes and keep it in `folder`; True if it found nothing."""
    audited = audit.audit(episodes)
    parts = {
        "Success rates": tables.rates_table(audited["rates"]),
        "Paired with the SFT policy": audited["pairs"] and tables.pairs_table(audited["pairs"]),
        "Findings": audited["findings"]
        and findings_list(audited["findings"])
        + "\n\nFacts about files; this does not establish what caused them.",
    }
    text = "\n".join(
        [f"# Audit of {episodes}\n", *(f"## {name}\n\n{part}\n" for name, part in parts.items() if part)]
    )
    disk.write_atomic(folder / "audit.md", text)
    print(text, end="")
    return not audited["findings"]
