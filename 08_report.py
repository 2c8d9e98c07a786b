"""08 - One page about all that has run: tables, plots, rollouts. And an audit of episodes.

reads   of a run, for each backbone and seed, <run>/<backbone>/seed<k>/: dpo-*/metrics.jsonl (03),
        results{,-val}.json and eval-*/ (04), and tables of rows by 05 to 07 and extras/cells.py (*.json,
        */table.json). With results=FOLDER, each folder at or below it that holds a table.json, as the
        committed results do: table.json, training/, episodes/, videos/; and the paper's claims
        (configs/paper.yaml), with the files below results/ that they name
writes  <run>/report/, or FOLDER/report/: index.html, and the same as report.md with PNGs. Of a run also
        table.json, which holds all its rows; its page contains its smaller pictures. With results= also
        claims.json.
        With readme=PATH, the tables between <!-- table:NAME --> and <!-- /table --> in that Markdown file,
        or in every one below that folder. With audit=FOLDER, only <run>/report/audit.md; the exit code is 1
        if the audit finds something.
cost    10 s; may be run at any time: it shows what is there
try     python 08_report.py configs/tiny.yaml results=results
        python 08_report.py configs/tiny.yaml results=results readme=results
        python 08_report.py configs/tiny.yaml audit=results/tiny_libero_object/episodes

A run's own report leaves the paper's claims out: the committed results alone judge them. Success rates and
metrics come from files of earlier stages. Computed here, from these files, are intervals of paired
differences, and tests between two files of episodes (report/audit.py).
"""

import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import common
from report import episodes
from report.chapters import Experiment, chapter, link_to, write_audit, write_report
from report.page import fill_in
from report.tables import script
from runtime import BACKBONES, HERE, Place, disk, load_config, refuse, stage


@dataclass
class Config(common.RunConfig):
    section: ClassVar = "report"
    results: Place = ""  # folder of committed results to report on, instead of the run
    audit: Place = ""  # folder of episodes to audit, instead of a report
    readme: Place = ""  # Markdown file, or folder of them, whose marked tables are renewed


ABSENT = {  # what a row has for the keys that not every stage writes
    "suite": "",
    "name": "",
    "policy": "",
    "adapter": "none",
    "start": "final",
    "group": "test",
    "train_seeds": [],
    "crashes": 0,
    "ci95_tasks": None,
    "command": "",
    "commit": "",
}


def of_run(cfg: Config, backbone: str) -> Experiment:
    """All seeds of one backbone of a run."""
    folder = cfg.run_dir / backbone
    experiment, now = Experiment(f"{cfg.name} {backbone}", [], episodes=folder), cache(stage.made_now)
    seed_dirs = [path for path in folder.glob("seed*") if path.name[4:].isdecimal()]
    for seed_dir in sorted(seed_dirs, key=lambda path: int(path.name[4:])):
        finished = {  # cell or not, group and name of the evaluations that are not being redone
            (pattern == "cell-*", group, facts.get("policy") or facts["cell"])
            for pattern in ("eval-*", "cell-*")
            for group in ("test", "val")
            for facts, _, _ in episodes.finished(seed_dir, pattern, group)
        }
        for path in [*sorted(seed_dir.glob("*.json")), *sorted(seed_dir.glob("*/table.json"))]:
            made_in = path.parent if path.name == "table.json" else path.with_suffix("")
            redone = made_in.is_dir() and not (made_in / "done.json").is_file()
            table = [] if redone or stage.out_of_date(made_in, now) else disk.read_json(path)
            experiment.rows += [
                ABSENT | row
                for row in (table if isinstance(table, list) else [])
                if "successes" not in row or ("hit_rate" in row, row["group"], row["name"]) in finished
            ]
        for path in sorted(seed_dir.glob("dpo-*/metrics.jsonl")):
            if not stage.out_of_date(path.parent, now):
                name = f"{path.parent.name}-{seed_dir.name}" if len(seed_dirs) > 1 else path.parent.name
                experiment.training[name] = disk.read_jsonl(path)
        videos = sorted(seed_dir.glob("eval-*/videos/*.gif"))
        experiment.videos += [path for path in videos if not stage.out_of_date(path.parents[1], now)]
    return experiment


def of_results(table: Path, top: Path) -> Experiment:
    """One folder of committed results."""
    folder, redrawn, rows = table.parent, re.compile("differences|dpo"), disk.read_json(table)
    refuse(
        not isinstance(rows, list)
        or not all(
            isinstance(row, dict)
            and ({"metric", "value"} <= row.keys() or {"successes", "n", "ci95"} <= row.keys())
            for row in rows
        ),
        f"{table} has other rows than this kit's tables; move it away, or name another folder",
    )
    return Experiment(
        str(folder.relative_to(top)) if folder != top else folder.name,
        [ABSENT | row for row in rows],
        {path.stem: disk.read_jsonl(path) for path in sorted(folder.glob("training/dpo-*.jsonl"))},
        folder / "episodes" if (folder / "episodes").is_dir() else None,
        [path for path in sorted(folder.glob("*.png")) if not redrawn.match(path.name)],
        sorted(folder.glob("videos/*.gif")),
    )


def main(cfg: Config) -> None:
    readme = Path(cfg.readme)
    refuse(not readme.exists(), f"readme={cfg.readme}: there is no such file or folder")
    top = Path(cfg.results) if cfg.results and not cfg.audit else cfg.run_dir
    tables = sorted(top.rglob("table.json"))
    refuse(
        top != cfg.run_dir and not tables,
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
        from report import claims  # a user's own run is no evidence about the paper

        blocks, named = claims.chapters(folder)
        experiments = sorted(
            (of_results(path, top) for path in tables if path.parent != folder),
            key=lambda e: (not any(script(row) == "04_eval.py" for row in e.rows), e.title),
        )
    else:
        claims_page = link_to(HERE / "results" / "claims.md", "results/claims.md", folder)
        blocks, named = [f"What this kit's own results say about the paper's claims: {claims_page}."], {}
        experiments = [of_run(cfg, name) for name in BACKBONES if (cfg.run_dir / name).is_dir()]
        disk.write_json(folder / "table.json", [row for each in experiments for row in each.rows])
    for experiment in experiments:
        its_blocks, its_tables = chapter(experiment, folder)
        blocks += its_blocks
        named |= its_tables
    write_report(Path(cfg.results).name or cfg.name, blocks, folder, alone=not cfg.results)
    pages = [readme] if readme.is_file() else readme.rglob("*.md")
    for path in pages if cfg.readme else []:
        if b"<!-- table:" in path.read_bytes():
            disk.write_atomic(path, fill_in(disk.read_text(path), named, path))


if __name__ == "__main__":
    stage.command_line(lambda: main(load_config(Config, sys.argv[1:])))
