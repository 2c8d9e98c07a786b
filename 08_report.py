"""08 - One page about all that has run: the paper's claims beside it, tables, plots, rollouts. And an audit.

reads   of a run, for each backbone and seed, <run>/<backbone>/seed<k>/: {sft,dpo-*}/metrics.jsonl (01, 03),
        results{,-val}.json and eval-*/ (04), and tables of rows by 05 to 07 and extras/cells.py (*.json,
        */table.json). With results=FOLDER, each folder at or below it that holds a table.json, as the
        committed results do: table.json, training/, episodes/, videos/.
        configs/paper.yaml (the paper's claims), the files below results/ that it names, README.md (the card)
writes  <run>/report/, or FOLDER/report/: index.html; report.md and PNGs, the same for other readers;
        claims.json; of a run table.json, all its rows. A run's page contains all but its largest pictures.
        With readme=PATH, the tables between <!-- table:NAME --> and <!-- /table --> in that Markdown file,
        or in every one below that folder. With audit=FOLDER, only <run>/report/audit.md; the exit code is 1
        if the audit finds something.
cost    15 s; may be run at any time: it shows what is there
try     python 08_report.py configs/tiny.yaml results=results
        python 08_report.py configs/tiny.yaml results=results readme=results
        python 08_report.py configs/tiny.yaml audit=results/tiny_libero_object/episodes

Success rates and metrics come from files of earlier stages. Computed here, from these files, are intervals of
paired differences, tests between two files of episodes (report/audit.py), and differences of the paper's own
counts (report/claims.py).
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import common
from report import audit, episodes
from report.chapters import Experiment, write_audit, write_report
from report.page import fill_in
from report.tables import grouped, script
from runtime import BACKBONES, Place, disk, load_config, refuse, stage


@dataclass
class Config(common.PolicyConfig):
    section: ClassVar = "report"
    results: Place = ""  # folder of committed results to report on, instead of the run
    audit: Place = ""  # folder of episodes to audit, instead of a report
    readme: Place = ""  # Markdown file, or folder of them, whose marked tables are renewed


PAIRED = ["paired_with", "diff_vs_sft", "gained", "lost", "p_vs_sft", "paired_n", "deff"]  # of a comparison
NO_SETTING = {"seed", "videos", "threads", "log_every", "checkpoint_every"}  # keys in which seeds may differ


def of_run(cfg: Config, backbone: str) -> Experiment:
    """All seeds of one backbone of a run."""
    folder = cfg.run_dir / backbone
    experiment = Experiment(f"{cfg.name} {backbone}", [], episodes=folder)
    seeds = {int(p.name[4:]): p for p in folder.glob("seed*") if p.name[4:].isdecimal()}
    played = {}  # (seed, group, name) -> done.json and episodes of an evaluation
    for seed, seed_dir in sorted(seeds.items()):
        for group in ("test", "val"):
            for facts, rows, _ in episodes.finished(seed_dir, "eval-*", group):
                played[seed, group, facts["policy"]] = facts, rows
        for path in [*sorted(seed_dir.glob("*.json")), *sorted(seed_dir.glob("*/table.json"))]:
            table = disk.read_json(path)
            experiment.rows += [  # not those of an evaluation that is being redone
                row
                for row in map(completed, table if isinstance(table, list) else [])
                if script(row) != "04_eval.py" or (seed, row["group"], row["name"]) in played
            ]
        for path in sorted(seed_dir.glob("*/metrics.jsonl")):
            name = f"{path.parent.name}-{seed_dir.name}" if len(seeds) > 1 else path.parent.name
            experiment.training[name] = audit.read_lines(path)[0]
        experiment.drawn += [*sorted(seed_dir.glob("*.png")), *sorted(seed_dir.glob("*/*.png"))]
        experiment.videos += sorted(seed_dir.glob("eval-*/videos/*.gif"))
    experiment.rows += over_seeds(experiment.rows, played, cfg.run_dir)
    return experiment


def settings(facts: dict, run_dir: Path) -> Iterator[dict]:
    """The configs of an evaluation and of all that it was made from, as far as they must agree."""
    yield {key: value for key, value in facts["config"].items() if key not in NO_SETTING}
    for name in sorted(facts["inputs"], key=lambda name: Path(name).name):
        done = run_dir / name / "done.json"
        if done.is_file():
            yield from settings(disk.read_json(done), run_dir)


def over_seeds(rows: list[dict], played: dict, run_dir: Path) -> list[dict]:
    """Rows for several training seeds together: one for each evaluation, group and suite.

    Only where the settings differ in nothing but the seed. One policy under several noise seeds is not
    several trainings.
    """
    pooled = []
    alone = [
        row
        for row in rows
        if script(row) == "04_eval.py"
        and row["train_seeds"] == [row["noise_seed"]]
        and (row["noise_seed"], row["group"], row["name"]) in played
    ]
    for (name, group), evaluations in grouped(alone, "name", "group").items():
        seeds = sorted({row["noise_seed"] for row in evaluations})
        facts = [played[seed, group, name][0] for seed in seeds]
        if len({str(each["inputs"]) for each in facts}) < 2:
            continue
        if any(list(settings(each, run_dir)) != list(settings(facts[0], run_dir)) for each in facts):
            print(f"[08_report] {name}: no row of seeds {seeds} together: their settings differ")
            continue
        for (suite,), alike in grouped(evaluations, "suite").items():
            start = alike[0].get("paired_with")
            own, base = (
                [e for seed in seeds for e in played.get((seed, group, each), (None, []))[1]]
                for each in (name, start)
            )
            own = [episode for episode in own if episode["suite"] in suite.split()]
            row = {key: value for key, value in alike[0].items() if key not in ("noise_seed", *PAIRED)}
            pooled.append(row | {"train_seeds": seeds} | episodes.summarise(own))
            if all((r["noise_seed"], group, r.get("paired_with")) in played for r in alike):
                pooled[-1] |= {"paired_with": start} | episodes.paired(own, base)
    return pooled


def of_results(table: Path, top: Path) -> Experiment:
    """One folder of committed results."""
    folder, redrawn = table.parent, re.compile("success|differences|dpo")
    logs = [p for p in sorted(folder.glob("training/*.jsonl")) if p.stem.startswith(("sft", "dpo-"))]
    return Experiment(
        str(folder.relative_to(top)) if folder != top else folder.name,
        [completed(row) for row in disk.read_json(table)],
        {path.stem: audit.read_lines(path)[0] for path in logs},
        folder / "episodes" if (folder / "episodes").is_dir() else None,
        [path for path in sorted(folder.glob("*.png")) if not redrawn.match(path.name)],
        sorted(folder.glob("videos/*.gif")),
    )


def completed(row: dict) -> dict:
    """A row of a table.json with the keys that not every stage writes."""
    return {
        "suite": "",
        "name": row.get("policy", ""),
        "policy": "",
        "adapter": "none",
        "start": "final",
        "group": "test",
        "train_seeds": [],
        "blank_images": False,
        "crashes": 0,
        "ci95_tasks": None,
        "command": "",
        "commit": "",
        **row,
    }


def main(cfg: Config) -> None:
    top = Path(cfg.results) if cfg.results and not cfg.audit else cfg.run_dir
    refuse(
        cfg.readme and not Path(cfg.readme).exists(), f"readme={cfg.readme}: there is no such file or folder"
    )
    refuse(
        cfg.results and not cfg.audit and not any(top.rglob("table.json")),
        f"no table.json at or below {top}; name a folder of results, or leave results= out",
    )
    folder = top / "report"
    if cfg.dry_run:
        return print(f"[08_report] reads what there is of {cfg.audit or top}; writes {folder} {cfg.readme}")
    with disk.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if cfg.audit:
        sys.exit(0 if write_audit(Path(cfg.audit), folder) else 1)
    if cfg.results:
        experiments = [of_results(path, top) for path in top.rglob("table.json") if path.parent != folder]
        experiments.sort(key=lambda e: (not any(script(row) == "04_eval.py" for row in e.rows), e.title))
    else:
        experiments = [of_run(cfg, name) for name in BACKBONES if (cfg.run_dir / name).is_dir()]
        disk.write_json(folder / "table.json", [row for each in experiments for row in each.rows])
    tables = write_report(Path(cfg.results).name or cfg.name, experiments, folder, alone=not cfg.results)
    readme = Path(cfg.readme)
    if cfg.readme:
        for path in [readme] if readme.is_file() else sorted(readme.rglob("*.md")):
            disk.write_atomic(path, fill_in(disk.read_text(path), tables))


if __name__ == "__main__":
    stage.command_line(lambda: main(load_config(Config, sys.argv[1:])))
