"""08 - One page of all that has run: the paper's claims against it, tables, plots, rollouts. And an audit of episode files.

reads   of a run, for each backbone and seed, <run>/<backbone>/seed<k>/: {sft,dpo-*}/metrics.jsonl (01, 03), results{,-val}.json
        and eval-*/ (04), what 05 to 07 put into tables of rows (*.json, */table.json). With results=FOLDER the same of each
        folder at or below it that holds a table.json, as the committed ones do: table.json, training/, episodes/, videos/.
        configs/paper.yaml, the paper's claims, and what it looks up below results/
writes  <run>/report/, or FOLDER/report/: index.html, one file with all in it; report.md and PNGs, the same for other readers;
        claims.json; of a run table.json, all its rows. With readme=FILE in that file the tables between <!-- table:NAME --> and
        <!-- /table -->. With audit=FOLDER nothing but <run>/report/audit.md, and exit code 1 where the audit finds something.
cost    10 s; may be run at any time, it shows what is there and says what is not
try     python 08_report.py configs/tiny.yaml results=results
        python 08_report.py configs/tiny.yaml audit=results/tiny_libero_object/episodes

Success rates and metrics stand in files of earlier stages. What is computed here, from these files: intervals of paired
differences, tests between two files of episodes (report/audit.py), and differences of the paper's own counts (report/claims.py).
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import common
import disk
import episodes
import stats
from backbones import BACKBONES
from report import audit, claims, plots
from report.page import (
    PILLS,
    Block,
    Image,
    Table,
    as_html,
    as_markdown,
    fill_in,
    number,
    p_value,
    percent,
    points,
    slug,
)


@dataclass
class Config(common.RunConfig):
    results: str = ""  # folder of committed results to report on, in place of the run
    audit: str = ""  # folder of episodes to audit, in place of a report
    readme: str = ""  # Markdown file whose marked tables are renewed


STAGES = {  # what may have run: trainings by the name of their log, the rest by the script in a row's command
    "01_sft.py": "supervised fine-tuning",
    "03_dpo.py": "DPO",
    "04_eval.py": "success rates",
    "05_profile.py": "anatomy of the latency",
    "05_cells.py": "caches and fewer denoise steps",
    "06_pretrain_head.py": "contrastive head and retrieval",
    "07_validate.py": "surrogate against exact likelihood",
}
TRAINING = {"01_sft.py": "sft", "03_dpo.py": "dpo-"}  # how their logs' names begin


# ------------------------------------------------------------------------------------------------- what has run, and its tables
@dataclass
class Experiment:
    title: str
    rows: list[dict]  # of table.json: success rates and metrics
    training: dict[str, list[dict]] = field(default_factory=dict)  # metrics.jsonl of sft and of each dpo-*
    episodes: Path | None = None  # folder for the audit
    drawn: list[Path] = field(default_factory=list)  # plots that other stages made
    videos: list[Path] = field(default_factory=list)


def of_run(cfg: Config, backbone: str) -> Experiment:
    """All seeds of one backbone of a run."""
    folder = replace(cfg, backbone=backbone).seed_dir.parent
    found = Experiment(f"{cfg.name} {backbone}", [], episodes=folder)
    seeds, played = (
        {int(path.name[4:]): path for path in folder.glob("seed*") if path.name[4:].isdecimal()},
        {},
    )
    for seed, seed_dir in sorted(seeds.items()):
        for group in ("test", "val"):
            for facts, rows, _ in episodes.finished(seed_dir, "eval-*", group):
                played[seed, group, facts["policy"]] = facts, rows
        for path in [*sorted(seed_dir.glob("*.json")), *sorted(seed_dir.glob("*/table.json"))]:
            table = disk.read_json(path)
            rows = (
                [completed(row) for row in table] if isinstance(table, list) else []
            )  # an evaluation may be being redone
            found.rows += [
                r for r in rows if script(r) != "04_eval.py" or (seed, r["group"], r["name"]) in played
            ]
        for path in sorted(seed_dir.glob("*/metrics.jsonl")):
            name = path.parent.name + (f", {seed_dir.name}" if len(seeds) > 1 else "")
            found.training[name] = audit.read_lines(path)[0]
        found.drawn += [*sorted(seed_dir.glob("*.png")), *sorted(seed_dir.glob("*/*.png"))]
        found.videos += sorted(seed_dir.glob("eval-*/videos/*.gif"))
    found.rows += over_seeds(found.rows, played, folder.parent)
    return found


PAIRED = (
    "paired_with",
    "diff_vs_sft",
    "gained",
    "lost",
    "p_vs_sft",
    "paired_n",
    "deff",
)  # keys of a row's comparison
# config keys in which several seeds of one experiment may differ
NO_SETTING = {"seed", "videos", "threads", "log_every", "checkpoint_every"}


def settings(facts: dict, run: Path):
    """The configs of an evaluation and of all that it was made from, but for what is none."""
    yield {key: value for key, value in facts["config"].items() if key not in NO_SETTING}
    for name in sorted(facts["inputs"], key=lambda name: Path(name).name):
        done = run / name / "done.json"
        if done.is_file():
            yield from settings(disk.read_json(done), run)


def over_seeds(rows: list[dict], played: dict, run: Path) -> list[dict]:
    """What several training seeds have, a row with the episodes of all of them: of each evaluation, group and suite. Only where
    the settings differ in nothing but the seed; one policy under several noise seeds is no several trainings.

    played: (seed, group, name) -> done.json and episodes of an evaluation.
    """
    groups, pooled = defaultdict(list), []
    for row in [
        row for row in rows if script(row) == "04_eval.py" and row["train_seeds"] == [row["noise_seed"]]
    ]:
        if (row["noise_seed"], row["group"], row["name"]) in played:
            groups[row["name"], row["group"]].append(row)
    for (name, group), of_name in groups.items():
        seeds = sorted({row["noise_seed"] for row in of_name})
        facts = [played[seed, group, name][0] for seed in seeds]
        if len({str(each["inputs"]) for each in facts}) < 2:
            continue
        if any(list(settings(each, run)) != list(settings(facts[0], run)) for each in facts):
            print(
                f"[08_report] {name}: seeds {seeds} were made with different settings, so they have no row together"
            )
            continue
        for suite in dict.fromkeys(row["suite"] for row in of_name):
            mine = [row for row in of_name if row["suite"] == suite]
            mine_all, base_all = (
                [
                    e
                    for seed in seeds
                    for e in played.get((seed, group, policy), ({}, []))[1]
                    if e["suite"] in suite.split()
                ]
                for policy in (name, mine[0].get("paired_with"))
            )
            row = {key: value for key, value in mine[0].items() if key not in ("noise_seed", *PAIRED)} | {
                "train_seeds": seeds
            }
            pooled.append(row | episodes.summarise(mine_all))
            if all(
                "paired_with" in row and (row["noise_seed"], group, row["paired_with"]) in played
                for row in mine
            ):
                pooled[-1] |= {"paired_with": mine[0]["paired_with"]} | episodes.paired(mine_all, base_all)
    return pooled


def of_results(table: Path, top: Path) -> Experiment:
    """One folder of committed results."""
    folder, drawn_here = table.parent, re.compile("success|differences|dpo|learning_curve")
    name = str(folder.relative_to(top)) if folder != top else folder.name
    found = Experiment(name, [completed(row) for row in disk.read_json(table)])
    logs = [path for path in sorted(folder.glob("training/*.jsonl")) if path.stem.startswith(("sft", "dpo-"))]
    found.training = {path.stem: audit.read_lines(path)[0] for path in logs}
    found.episodes = folder / "episodes" if (folder / "episodes").is_dir() else None
    found.drawn = [path for path in sorted(folder.glob("*.png")) if not drawn_here.match(path.name)]
    found.videos = sorted(folder.glob("videos/*.gif"))
    return found


def completed(row: dict) -> dict:
    """A row of a table.json with the keys that not every stage writes."""
    usual = {
        "suite": "",
        "name": row.get("policy", ""),
        "policy": "",
        "adapter": "none",
        "start": "final",
        "group": "test",
    }
    return (
        usual
        | {
            "train_seeds": [],
            "blank_images": False,
            "crashes": 0,
            "ci95_tasks": None,
            "command": "",
            "commit": "",
        }
        | row
    )


def success_table(rows: list[dict]) -> Table:
    """Success rates of one group of init states. `over tasks`: the interval of a bootstrap that draws whole tasks. Of several
    suites p is corrected for all rows of the table as well."""
    several = len({row["suite"] for row in rows}) > 1
    seeds = len({str(row["train_seeds"]) for row in rows}) > 1
    head = [
        "policy",
        *["suite"] * several,
        *["seeds"] * seeds,
        "success",
        "95 % interval",
        "over tasks",
        "crashes",
    ]
    table = Table(
        [*head, f"against {plots.baseline(rows)} (95 %)", "gained / lost", "p", *["p (Holm)"] * several], []
    )
    rows = sorted(rows, key=plots.by_suite)
    tested = [i for i, row in enumerate(rows) if "p_vs_sft" in row]
    corrected = dict(zip(tested, stats.holm([rows[i]["p_vs_sft"] for i in tested]), strict=True))
    for i, r in enumerate(rows):
        cells = [
            r["name"],
            *[plots.short(r["suite"])] * several,
            *[", ".join(map(str, r["train_seeds"]))] * seeds,
        ]
        cells += [f"{r['successes']} / {r['n']}", percent(r["ci95"])]
        cells += [percent(r["ci95_tasks"]) if r["ci95_tasks"] else "", r["crashes"]]
        if "diff_vs_sft" in r:
            cells += [
                claims.said_difference(r),
                f"{r.get('gained', '')} / {r.get('lost', '')}",
                p_value(r["p_vs_sft"]),
            ]
            cells += [p_value(corrected[i])] * several
        table.rows.append(cells + [""] * (len(table.head) - len(cells)))
    return table


def rates_table(rows: list[dict]) -> Table:
    """The audit's rates: all seeds of a policy and suite together."""
    table = Table(
        ["policy", "suite", "seeds", "episodes", "success", "95 % interval", "over tasks", "crashes"], []
    )
    for r in rows:
        over_tasks = percent(r["ci95_tasks"]) if r["ci95_tasks"] else ""
        cells = [
            r["policy"],
            r["suite"],
            ", ".join(map(str, r["seeds"])),
            r["episodes"],
            f"{r['successes']} / {r['n']}",
        ]
        table.rows.append([*cells, percent(r["ci95"]), over_tasks, r["crashes"]])
    return table


def pairs_table(rows: list[dict]) -> Table:
    """The audit's paired comparisons; the last column corrects p for all rows of the table."""
    table = Table(
        [
            "policy",
            "against",
            "suite",
            "pairs",
            "successes",
            "difference (95 %)",
            "gained / lost",
            "p",
            "p (Holm)",
        ],
        [],
    )
    for r in rows:
        cells = [
            r["policy"],
            r["against"],
            r["suite"],
            r["paired_n"],
            f"{r['wins'][0]} against {r['wins'][1]}",
        ]
        cells += [
            points(r["diff"], r["ci95"]),
            f"{r['gained']} / {r['lost']}",
            p_value(r["p"]),
            p_value(r["p_holm"]),
        ]
        table.rows.append(cells)
    return table


def metrics_table(rows: list[dict]) -> Table:
    table = Table(["metric", "value", "95 % interval", "unit", "n"], [])
    for name, r in zip(metric_names(rows), rows, strict=True):
        interval = f"{number(r['ci95'][0])} to {number(r['ci95'][1])}" if r.get("ci95") else ""
        table.rows.append([name, number(r["value"]), interval, r.get("unit", ""), r.get("n", "")])
    return table


def metric_names(rows: list[dict]) -> list[str]:
    """What tells the rows of metrics apart, in words: the metric, and every key in which they differ."""
    keys = {key for row in rows for key in row} - {
        "metric",
        "value",
        "unit",
        "n",
        "ci95",
        "command",
        "commit",
    }
    varies = [key for key in ["metric", *sorted(keys)] if len({str(row.get(key)) for row in rows}) > 1] or [
        "metric"
    ]
    return [
        " ".join(str(row[key]) for key in varies if row.get(key) not in (None, "", "none")).replace("_", " ")
        for row in rows
    ]


def script(row: dict) -> str:
    """The stage that made a row: the script in its command."""
    return next((Path(word).name for word in row["command"].split() if word.endswith(".py")), "")


def title(stage: str) -> str:
    words = STAGES.get(stage, stage)
    return words[:1].upper() + words[1:]


def by_stage(rows: list[dict], key: str = "") -> dict[tuple[str, str], list[dict]]:
    """Metrics grouped by the stage that made them, and by `key` where one is given."""
    groups = defaultdict(list)
    for row in [row for row in rows if "metric" in row]:
        groups[script(row), row.get(key, "")].append(row)
    return groups


def findings_list(findings: list[audit.Finding]) -> str:
    return "\n".join(f"- {found.kind}: {found.where}: {found.text}" for found in findings)


# ------------------------------------------------------------------------------------------------------------------ the page
def images(experiment: Experiment, groups: dict[str, list[dict]], folder: Path) -> list[Image]:
    """All plots for which there are rows; the PNGs go to `folder`, named after the experiment."""
    made, held_out = [], groups["test"]

    def add(name: str, alt: str, draw, *arguments):
        path = folder / f"{name}-{slug(experiment.title)}.png"
        made.append(Image(path.name, alt, *plots.dressed(draw, *arguments, path=path)))

    if evaluated := [row for row in held_out if "hit_rate" not in row]:
        add("success", "Success on held-out init states", plots.success, evaluated)
    for name, reused in (("differences", False), ("differences-cells", True)):
        if rows := [row for row in held_out if "gained" in row and ("hit_rate" in row) == reused]:
            add(name, f"Difference to {plots.baseline(rows)}, on the same episodes", plots.forest, rows)
    curve = [row for row in groups["val"] if row["policy"] == "sft" and not row["blank_images"]]
    curve = [
        row for row in curve if script(row) != "05_cells.py"
    ]  # its cells reuse, look or solve in other ways
    curve = [
        row for row in curve if row["suite"] == max((r["suite"] for r in curve), key=len)
    ]  # of all suites
    losses = next((rows for name, rows in experiment.training.items() if name.startswith("sft") and rows), [])
    if len(curve) > 1 and losses:
        add(
            "learning_curve",
            "What more training buys, on validation init states",
            plots.learning_curve,
            curve,
            losses,
        )
    for group, words in (("val", "validation"), ("test", "held-out")):
        if many := [row for row in groups[group] if "hit_rate" in row]:
            add(
                f"cells-{group}",
                f"Caches, fewer looks and fewer denoise steps, on {words} init states",
                plots.cells,
                many,
            )
    variants = defaultdict(dict)  # by pairs and start, then by adapter
    for name, rows in experiment.training.items():
        if name.startswith("dpo-") and rows:
            _, adapter, variant = name.split("-", 2)
            variants[variant][adapter] = rows
    for variant, curves in sorted(variants.items()):
        recipe = re.split(r"-at\d|[-,] ?seed\d", variant)[0]
        start, seed = (
            found[1] if (found := re.search(key, variant)) else "" for key in (r"-at(\d+)", r"seed(\d+)")
        )
        words = f"DPO's implicit rewards, {recipe} pairs, from {f'SFT step {start}' if start else 'the final SFT policy'}"
        words += f", seed {seed}" * bool(seed)
        add(f"dpo-{slug(variant)}", words, plots.dpo, curves)
    for (stage, unit), rows in sorted(by_stage(experiment.rows, "unit").items()):
        if 1 < len(rows) <= 24:  # more say nothing as bars; their stage draws them
            add(
                f"{slug(stage.removesuffix('.py'))}-{slug(unit)}",
                f"{title(stage)}, {unit}",
                plots.metrics,
                rows,
                metric_names(rows),
            )
    for path in experiment.drawn:
        name, content = (
            "-".join(path.absolute().parts[-3:]),
            path.read_bytes(),
        )  # folders of several stages and seeds
        (folder / name).write_bytes(content)
        made.append(Image(name, f"{path.parent.name}: {path.stem}", content))
    return made


def clips(videos: list[Path], most: int = 12) -> list[Image]:
    """Rollouts: of each suite a few successes and a few failures, in turn."""
    groups = defaultdict(list)
    for path in videos:
        groups[path.name.split("-")[0], path.stem.rpartition("-")[2]].append(path)
    in_turn = [path for rank in range(most) for group in groups.values() for path in group[rank : rank + 1]]
    return [
        Image(path.name, f"{path.parent.parent.name}: {path.stem}", path.read_bytes(), clip=True)
        for path in in_turn[:most]
    ]


def chapter(experiment: Experiment, folder: Path) -> tuple[list[Block], dict[str, Table]]:
    """The page's blocks on one experiment, and its tables by the name that a README calls them."""
    name, rates = experiment.title, [row for row in experiment.rows if "successes" in row]
    many = {
        (row["name"], row["suite"], row["group"]) for row in rates if len(row["train_seeds"]) > 1
    }  # seeds in one row
    single = [r for r in rates if (r["name"], r["suite"], r["group"]) in many and len(r["train_seeds"]) == 1]
    groups = {
        group: [row for row in rates if row["group"] == group and row not in single]
        for group in ("test", "val")
    }
    blocks, tables = [f"## {name}"], {}

    def add(heading: str, suffix: str, table: Table):
        tables[name + suffix] = table
        blocks.extend([f"### {heading}", table])

    for group, words, suffix in (
        ("test", "held-out init states (40-49)", ""),
        ("val", "validation init states (35-39)", "/val"),
    ):
        for reused, what, more in (
            (False, "Success", ""),
            (True, "Caches, fewer looks and fewer denoise steps", "/cells"),
        ):
            if rows := [row for row in groups[group] if ("hit_rate" in row) == reused]:
                add(f"{what} on {words}", suffix + more, success_table(rows))
    if single:
        add("Seed by seed", "/seeds", success_table([row for row in single if row["group"] == "test"]))
    blocks.append(images(experiment, groups, folder))
    for (stage, _), rows in sorted(by_stage(experiment.rows).items()):
        add(title(stage), f"/{stage.removesuffix('.py')}", metrics_table(rows))
    if experiment.episodes and rates:
        found = audit.audit(experiment.episodes)
        if found["pairs"]:
            add("From single episodes, all seeds together", "/pairs", pairs_table(found["pairs"]))
        blocks.append(findings_list(found["findings"]) or "The audit of these episodes found nothing.")
    if not experiment.rows:
        blocks.append("Nothing has been evaluated yet.")
    if shown := clips(experiment.videos):
        blocks += ["### Rollouts", shown]
    commands = sorted({f"- `{row['command']}` at {row['commit'] or 'no commit'}" for row in experiment.rows})
    return blocks + (["### Commands", "\n".join(commands)] if commands else []), tables


def what_has_run(experiments: list[Experiment]) -> Table:
    table = Table(["stage", "what it does", "what of it is here"], [])
    for stage, words in STAGES.items():
        logs = sum(name.startswith(TRAINING.get(stage, "-")) for e in experiments for name in e.training)
        rows = sum(script(row) == stage for e in experiments for row in e.rows)
        counted = [f"{n} {what}{'s' * (n > 1)}" for n, what in ((logs, "training log"), (rows, "row")) if n]
        table.rows.append([f"`{stage}`", words, ", ".join(counted) or "not run"])
    return table


def report(cfg: Config, experiments: list[Experiment], folder: Path) -> dict[str, Table]:
    """Write the report into `folder`; returns its tables by name."""
    paper = claims.read_paper()
    logs, judged = paper["logs"], [claims.judged(claim, paper["logs"]) for claim in paper["claims"]]
    counts = ", ".join(
        f"{verdict} {n}" for verdict in PILLS if (n := sum(c["verdict"] == verdict for c in judged))
    )
    tables = {"claims": claims.claims_table(judged), "public-logs": claims.logs_table(logs)}
    source = f"[the paper's repository]({logs['repository']}) at commit `{logs['commit'][:7]}`, folder `{logs['folder']}`"
    blocks = [
        f"# CrossVLA kit: {Path(cfg.results).name or cfg.name}",
        f"[{paper['title']}](https://arxiv.org/abs/{paper['arxiv']}), and what this kit finds of it. Its claims: {counts}.",
        "## The paper's claims",
        "*Here* is the kit's tiny size where a row says nothing else, in its committed results. An improvement that is not "
        "significant is counted as *does not hold here*: it was not shown, which does not make it zero.",
        tables["claims"],
        "## The paper's public logs",
        f"Counted in {source}. A seed is the evaluation's, not the training's. Intervals are of the distinct episodes: "
        "those that repeat another seed's count once; whether seeds agree on an init state cannot be told from counts.",
        tables["public-logs"],
        "## What has run",
        what_has_run(experiments),
    ]
    for experiment in experiments:
        found, named = chapter(experiment, folder)
        blocks, tables = blocks + found, tables | named
    disk.write_atomic(folder / "index.html", as_html(blocks))
    disk.write_atomic(folder / "report.md", as_markdown(blocks))
    disk.write_json(folder / "claims.json", judged)
    print(f"claims: {counts}\nreport: {folder / 'index.html'}")
    return tables


def audited(folder: Path, out: Path) -> bool:
    """Print the audit of a folder and keep it in `out`; True if it found nothing."""
    found = audit.audit(folder)
    blocks = [f"# Audit of {folder}", "## Success rates", rates_table(found["rates"])]
    if found["pairs"]:
        blocks += ["## Paired with the SFT policy", pairs_table(found["pairs"])]
    if found["findings"]:
        blocks += [
            "## Findings",
            findings_list(found["findings"]),
            "Facts about files; what caused them is not established here.",
        ]
    disk.write_atomic(out / "audit.md", as_markdown(blocks))
    print(as_markdown(blocks), end="")
    return not found["findings"]


def main(cfg: Config) -> None:
    if cfg.dry_run:
        return
    run = Path(cfg.root) / cfg.name
    top = Path(cfg.results) if cfg.results and not cfg.audit else run
    if cfg.readme and not Path(cfg.readme).is_file():
        raise common.UserError(f"readme={cfg.readme}: there is no such file")
    if cfg.results and not cfg.audit and not any(top.rglob("table.json")):
        raise common.UserError(
            f"no table.json at or below {top}; name a folder of results, or leave results= out"
        )
    folder = top / "report"
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.audit:
        sys.exit(0 if audited(Path(cfg.audit), folder) else 1)
    if cfg.results:
        experiments = [of_results(path, top) for path in top.rglob("table.json") if path.parent != folder]
        experiments.sort(key=lambda e: (not any(script(row) == "04_eval.py" for row in e.rows), e.title))
    else:
        experiments = [of_run(cfg, b) for b in BACKBONES if replace(cfg, backbone=b).seed_dir.parent.is_dir()]
        disk.write_json(folder / "table.json", [row for experiment in experiments for row in experiment.rows])
    tables = report(cfg, experiments, folder)
    if cfg.readme:
        path = Path(cfg.readme)
        disk.write_atomic(path, fill_in(path.read_text(), tables))


if __name__ == "__main__":
    common.run(lambda: main(common.load_config(Config, "report", sys.argv[1:])))
