"""Stage 08: the audit finds what was planted and nothing else, look-ups are true, the page is whole.

pytest tests/test_report.py
"""

import base64
import importlib
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from report import audit, episodes, page, stats, tables
from runtime import disk, stage
from runtime.config import HERE, load_config
from runtime.errors import UserError

report_stage, evaluation = importlib.import_module("08_report"), importlib.import_module("04_eval")
RESULTS = HERE / "results"
LIMIT = 300  # steps after which an episode has failed


# ---------------------------------------------------------------------------------------- folders of episodes
def outcomes(rate: float, seed: int, crashes: int = 0) -> list[dict]:
    """100 episodes of 10 tasks x 10 init states."""
    rng, rows = random.Random(seed), []
    for task, init in itertools.product(range(10), range(10)):
        success = rng.random() < rate
        row = {
            "task": task,
            "init": init,
            "success": success,
            "steps": rng.randint(80, 250) if success else LIMIT,
            "crash": "",
        }
        rows.append(
            row | ({"success": False, "steps": 31, "crash": "MujocoException"} if len(rows) < crashes else {})
        )
    return rows


def write_public(folder: Path, name: str, seed: int, rows: list[dict], suite: str = "libero_goal") -> None:
    """Episodes in the format of the paper's repository, which has no column for crashes."""
    lines = [
        {
            "suite": suite,
            "task_id": r["task"],
            "task": "words",
            "trial": r["init"],
            "seed": seed,
            "init_idx": r["init"],
        }
        | {"success": r["success"], "n_steps": r["steps"], "elapsed_s": 1.5 + i}
        for i, r in enumerate(rows)
    ]
    disk.write_rows(folder / f"{name}_seed{seed}.jsonl", lines)


def public_folder(folder: Path) -> Path:
    """Two policies, three seeds, nothing wrong."""
    folder.mkdir()
    for seed in (42, 1337, 2026):
        write_public(folder, "openvla_sft_libero_goal_5x10", seed, outcomes(0.6, seed))
        write_public(folder, "openvla_dpo_libero_goal_dora", seed, outcomes(0.7, seed + 1))
    return folder


def kit_folder(folder: Path) -> Path:
    """The kit's own format: episodes/ and the table.json made from it, with a crash."""
    (folder / "episodes").mkdir(parents=True)
    of = {"sft": outcomes(0.6, 1), "dpo-lora-branch": outcomes(0.7, 2, crashes=1)}
    for name, rows in of.items():
        lines = [{"suite": "libero_goal", "seed": 42, "init_state": r["init"]} | r for r in rows]
        disk.write_rows(folder / "episodes" / f"eval-{name}.jsonl", lines)
    valid = of["dpo-lora-branch"][1:], of["sft"][1:]
    gained, lost = (
        sum(a["success"] > b["success"] for a, b in zip(*both, strict=True)) for both in (valid, valid[::-1])
    )
    row = {"group": "test", "start": "final", "suite": "libero_goal", "train_seeds": [42]}
    sft = row | {"name": "sft", "n": 100, "successes": sum(r["success"] for r in of["sft"])}
    dpo = row | {"name": "dpo-lora-branch", "n": 99, "successes": sum(r["success"] for r in valid[0])}
    disk.write_json(folder / "table.json", [sft, dpo | {"gained": gained, "lost": lost}])
    return folder


def edit_lines(path: Path, change) -> None:
    disk.write_rows(path, [row for row in map(change, disk.read_jsonl(path)) if row is not None])


def edit_json(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    disk.write_json(path, data)


DORA = "openvla_dpo_libero_goal_dora_seed{}"
SFT = "openvla_sft_libero_goal_5x10_seed{}"


def duplicate_seeds(f):  # the same episodes under another seed, with other wall times
    shutil.copy(f / f"{DORA.format(42)}.jsonl", f / f"{DORA.format(1337)}.jsonl")
    edit_lines(
        f / f"{DORA.format(1337)}.jsonl", lambda row: row | {"seed": 1337, "elapsed_s": row["elapsed_s"] + 7}
    )


def copied_policy(f):
    shutil.copy(f / f"{SFT.format(42)}.jsonl", f / f"{DORA.format(42)}.jsonl")


def repeated_lines(f):
    path = f / f"{DORA.format(42)}.jsonl"
    first = path.read_text().splitlines()[0]
    path.with_name("openvla_dpo_libero_goal_dora_5x10_seed42.jsonl").write_text(f"{first}\n")


def dropped_crashes(f):  # four failures left out of the episodes
    path, dropped = f / f"{DORA.format(2026)}.jsonl", iter(range(100))
    edit_lines(path, lambda row: None if not row["success"] and next(dropped) < 4 else row)


def crash_as_failure(f):
    first = iter([True])
    edit_lines(
        f / f"{DORA.format(42)}.jsonl",
        lambda r: r | {"n_steps": 57} if not r["success"] and next(first, 0) else r,
    )


def baseline_without_a_seed(f):
    (f / f"{SFT.format(2026)}.jsonl").unlink()


def cut_line(f):
    path = f / f"{DORA.format(42)}.jsonl"
    path.write_text(path.read_text() + '{"suite": "libero_goal", "task_id": 3')


def success_as_text(f):
    path = f / f"{DORA.format(42)}.jsonl"
    edit_lines(path, lambda row: row | {"success": str(row["success"])})


PLANTED = {  # what is done to a clean folder: the kinds of finding that must come of it, and words of one
    duplicate_seeds: (
        {"duplicate"},
        "100 of 100 episodes have the same success and number of steps under seeds 42 and 1337",
    ),
    copied_policy: (
        {"duplicate"},
        "100 of 100 episodes have the same success and number of steps as openvla_sft, seed 42",
    ),
    repeated_lines: ({"duplicate"}, "1 of its episodes"),
    dropped_crashes: ({"missing"}, "4 of 100 episodes (tasks x init states) are not there"),
    crash_as_failure: ({"crash"}, "ended before the others' 300 steps"),
    baseline_without_a_seed: ({"missing"}, "100 episodes are of it or openvla_sft only"),
    cut_line: ({"unreadable"}, "1 of its lines"),
    success_as_text: ({"unreadable"}, "100 of its lines"),
}


@pytest.mark.parametrize("make", [public_folder, kit_folder], ids=["public format", "kit's format"])
def test_the_audit_is_silent_on_a_clean_folder(make, tmp_path):
    assert audit.audit(make(tmp_path / "clean"))["findings"] == []


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_the_audit_finds_a_planted_defect_and_nothing_else(plant, tmp_path):
    folder = public_folder(tmp_path / "episodes")
    plant(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    findings = audit.audit(folder)["findings"]
    kinds, words = PLANTED[plant]
    assert {found.kind for found in findings} == kinds, findings
    assert any(words in found.text for found in findings), findings
    assert {path: path.read_bytes() for path in folder.iterdir()} == before, "an audit changes nothing"


def test_the_audit_checks_the_kits_tables(tmp_path):
    folder = kit_folder(tmp_path / "kit")
    edit_json(folder / "table.json", lambda rows: rows[1].update(gained=rows[1]["gained"] + 2))
    assert [found.kind for found in audit.audit(folder)["findings"]] == ["table"]
    edit_json(folder / "table.json", lambda rows: rows[0].update(successes=rows[0]["successes"] + 1))
    assert [found.kind for found in audit.audit(folder)["findings"]] == ["table", "table"]
    edit_json(folder / "table.json", lambda rows: [row.pop("group") for row in rows])
    assert [found.kind for found in audit.audit(folder)["findings"]] == ["table", "table"]


@pytest.mark.parametrize(
    "foreign", ['{"successes": 5}', "[3]", '[{"successes": 31}]', '[{"metric": "loss"}]']
)
def test_a_table_of_another_program_is_named_by_the_report_and_no_matter_to_the_audit(foreign, tmp_path):
    folder = public_folder(tmp_path / "episodes")
    (folder / "table.json").write_text(foreign)
    assert audit.audit(folder)["findings"] == []
    with pytest.raises(UserError, match=r"table\.json has other rows"):
        report_stage.of_results(folder / "table.json", tmp_path)


def test_the_audit_leaves_out_what_a_killed_stage_was_about_to_remove(tmp_path):
    folder = public_folder(tmp_path / "episodes")
    shutil.copytree(folder, folder / ".eval-sft.old")
    assert audit.audit(folder)["findings"] == []


def test_a_cell_keeps_its_name():
    folder, names = Path("x"), [f"cell-tiny_libero_object-chunk{t}x4-k2-euler10-val" for t in (0.92, 0.95)]
    assert [audit.policy_of(folder / "episodes" / f"{name}.jsonl", folder) for name in names] == names
    assert audit.policy_of(folder / "seed42" / names[0] / "episodes.jsonl", folder) == names[0]
    assert (
        audit.policy_of(folder / "openvla_dpo_libero_goal_dora_5x10_seed42.jsonl", folder)
        == "openvla_dpo_dora"
    )


def test_a_policy_is_paired_with_the_sft_policy_that_it_started_from_and_a_cell_with_none():
    cells = {
        (policy, "libero_object", 42): {}
        for policy in (
            "tiny/sft",
            "tiny/sft-at750",
            "tiny/dpo-lora-at750",
            "tiny/dpo-lora",
            "tiny/cell-none-k2",
        )
    }
    assert audit.baseline_of("tiny/dpo-lora", cells) == "tiny/sft"
    assert audit.baseline_of("tiny/dpo-lora-at750", cells) == "tiny/sft-at750"
    assert audit.baseline_of("tiny/sft-at750", cells) is None
    late = {key: cell for key, cell in cells.items() if key[0] != "tiny/sft-at750"}
    for policy in ("dpo-lora-at750", "dpo-lora-blank", "dpo-lora-noise1042"):
        assert audit.baseline_of(f"tiny/{policy}", late) is None, "the other start, or other images or noise"
    assert audit.baseline_of("tiny/cell-none-k2", cells) is None, "its table names what it is compared with"


def test_what_02_tried_is_no_episode(tmp_path):
    folder = public_folder(tmp_path / "episodes")
    tried = {"suite": "libero_goal", "task": 0, "unit": 0, "init_state": 20, "success": True}
    disk.write_rows(folder / "tried.jsonl", [tried])
    assert audit.audit(folder)["findings"] == []


def test_episodes_that_agree_under_two_seeds_count_once(tmp_path):
    folder = public_folder(tmp_path / "episodes")
    n = {row["policy"]: row["n"] for row in audit.audit(folder)["rates"]}
    duplicate_seeds(folder)
    found = audit.audit(folder)
    once = {row["policy"]: (row["episodes"], row["n"]) for row in found["rates"]}
    assert n == {"openvla_sft": 300, "openvla_dpo_dora": 300}
    assert once == {"openvla_sft": (300, 300), "openvla_dpo_dora": (300, 200)}
    assert [row["paired_n"] for row in found["pairs"]] == [200]


def test_the_audit_recomputes_the_committed_table():
    found = audit.audit(RESULTS / "tiny_libero_object" / "episodes")
    rows = disk.read_json(RESULTS / "tiny_libero_object" / "table.json")
    table = {row["name"] + "-val" * (row["group"] == "val"): row for row in rows}
    assert not found["findings"] and len(found["rates"]) == len(table) and found["pairs"]
    for row in found["rates"]:
        assert (row["successes"], row["n"]) == (table[row["policy"]]["successes"], table[row["policy"]]["n"])
    for row in found["pairs"]:
        want = table[row["policy"]]
        assert (row["gained"], row["lost"], row["paired_n"]) == (
            want["gained"],
            want["lost"],
            want["paired_n"],
        )
        assert row["p_vs_sft"] == pytest.approx(want["p_vs_sft"])
        assert row["diff_vs_sft"] == pytest.approx(want["diff_vs_sft"])
        most = min(1, len(found["pairs"]) * row["p_vs_sft"])
        assert row["p_vs_sft"] <= row["p_holm"] <= most + 1e-12


def test_a_folder_without_episodes_is_one_line(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="audit: "):
            audit.audit(folder)


# ------------------------------------------------------------------------------------------------- statistics
def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([]) == []


def interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    return stats.difference_interval({"gained": gained, "lost": lost, "paired_n": n})


@pytest.mark.parametrize("up, down", [(0.1, 0.1), (0.02, 0.02), (0.3, 0.1), (0.0, 0.05)])
def test_the_paired_interval_covers_the_truth(up, down):
    """Its coverage, summed over all outcomes of 40 paired episodes."""
    n, covered = 40, 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            ways = math.comb(n, gained) * math.comb(n - gained, lost)
            low, high = interval(gained, lost, n)
            same = 1 - up - down
            covered += (
                ways * up**gained * down**lost * same ** (n - gained - lost) * (low <= up - down <= high)
            )
    assert covered >= 0.94
    low, high = interval(7, 3, 40)
    assert interval(3, 7, 40) == pytest.approx((-high, -low)) and low < 0.1 < high


# ----------------------------------------------------------------------------------------------------- claims
PAPER = yaml.safe_load((HERE / "configs" / "paper.yaml").read_bytes())


# -------------------------------------------------------------------------------------------- README's tables
TABLES = {"one": tables.table(["a", "b|c"], [[1, "x|y"]]), "two": tables.table(["z"], [])}
MARKED = "before\n<!-- table:one -->\nold\n<!-- /table -->\nbetween\n<!-- table:two --><!-- /table -->\nafter"


def test_marked_tables_are_renewed_and_the_rest_stays():
    once = page.fill_in(MARKED, TABLES, HERE)
    assert page.fill_in(once, TABLES, HERE) == once and "old" not in once
    outside = re.sub(r"(<!-- table:\S+ -->).*?(<!-- /table -->)", r"\1\2", once, flags=re.DOTALL)
    assert outside == MARKED.replace("\nold\n", "")
    assert "| a | b\\|c |\n| --- | --- |\n| 1 | x\\|y |" in once


@pytest.mark.parametrize(
    "text, words",
    [
        ("<!-- table:onne --><!-- /table -->", "did you mean 'one'"),
        ("<!-- table:one -->", "needs its"),
        ("<!-- /table --><!-- table:one -->", "needs its"),
        ("<!-- table:one --><!-- table:two --><!-- /table --><!-- /table -->", "needs its"),
    ],
)
def test_a_wrong_marker_is_one_line(text, words):
    with pytest.raises(UserError, match=words):
        page.fill_in(text, TABLES, HERE)


# --------------------------------------------------------------------------------------------------- the page
@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The report of all committed results, in a copy of them whose marked tables are renewed."""
    folder = tmp_path_factory.mktemp("report") / "results"
    shutil.copytree(RESULTS, folder, ignore=shutil.ignore_patterns("report"))
    arguments = [str(HERE / "configs" / "tiny.yaml"), f"results={folder}", f"readme={folder}"]
    report_stage.main(load_config(report_stage.Config, arguments))
    return folder / "report"


class Seen(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.sources, self.links, self.ids, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.sources += [attributes[key] for key in ("src", "srcset") if attributes.get(key)]
        self.links += [attributes["href"]] if tag == "a" else []
        self.ids += [attributes["id"]] if "id" in attributes else []


def test_the_page_is_small_and_whole(report):
    """At most 3 MB. It contains the plots that the report draws, and links to files that are there."""
    text = (report / "index.html").read_text()
    assert len(text) < 3_000_000
    seen = Seen(text)
    contained = [source for source in seen.sources if source.startswith("data:")]
    assert len(contained) >= 10
    for source in contained:
        kind, data = re.fullmatch(r"data:image/(png|gif);base64,(.+)", source).groups()
        assert base64.b64decode(data).startswith({"png": b"\x89PNG", "gif": b"GIF8"}[kind])
    linked = [source for source in seen.sources if source not in contained]
    assert len(linked) >= 10 and all((report / source).is_file() for source in linked)
    assert all(link[1:] in seen.ids for link in seen.links if link.startswith("#"))
    assert len(set(seen.ids)) == len(seen.ids) and seen.tags.count("table") >= 6


def test_the_card_is_the_same_on_page_readme_and_claims(report):
    """It is made from the results: the README's is what the committed files give."""
    readme, text = (HERE / "README.md").read_text(), (report / "report.md").read_text()
    card = readme.partition("<!-- table:card -->")[2].partition("<!-- /table -->")[0].strip()
    assert card.count("\n") >= 7 and text.index(card) < text.index("## The paper's claims")
    assert card in (RESULTS / "claims.md").read_text()


def test_the_page_says_all_that_the_results_hold(report):
    text = (report / "report.md").read_text()
    for path in RESULTS.rglob("table.json"):
        chapter = text.partition(f"\n## {path.parent.relative_to(RESULTS)}\n")[2].partition("\n## ")[0]
        for row in disk.read_json(path):
            figure = (
                f"| {row['successes']} / {row['n']} |" if "successes" in row else tables.number(row["value"])
            )
            assert figure in chapter, (path, row)
    judged = disk.read_json(report / "claims.json")
    assert [claim["id"] for claim in judged] == [claim["id"] for claim in [*PAPER["claims"], *PAPER["also"]]]
    for image in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (report / image).is_file()


def test_marked_tables_are_those_of_the_committed_results(report):
    renewed = "python 08_report.py configs/tiny.yaml results=results readme=results"
    pages = [path for path in sorted(RESULTS.rglob("*.md")) if "report" not in path.parts]
    assert sum("<!-- table:" in path.read_text() for path in pages) >= 5
    for path in pages:
        text = (report.parent / path.relative_to(RESULTS)).read_text()
        assert text == path.read_text(), f"{path}: run {renewed}"


def test_a_run_is_reported_as_far_as_it_has_come(tmp_path):
    cfg = load_config(report_stage.Config, [str(HERE / "configs" / "tiny.yaml"), f"root={tmp_path}"])
    report_stage.main(cfg)
    text = (tmp_path / "tiny" / "report" / "report.md").read_text()
    assert "Nothing" not in text and "## tiny" not in text, "no backbone has run"
    claims_page = re.search(r"\[results/claims.md\]\((.*?)\)", text)[1]
    assert (tmp_path / "tiny" / "report" / claims_page).resolve() == RESULTS / "claims.md"
    rows = disk.read_json(RESULTS / "tiny_libero_object" / "table.json")
    rows = [row for row in rows if row["name"] in ("sft", "sft-at750") and row["group"] == "test"]
    for seed in (42, 1337):
        folder = tmp_path / "tiny" / "pi05" / f"seed{seed}"
        (folder / "profile").mkdir(parents=True)
        disk.write_json(folder / "profile" / "done.json", {"inputs": {}})
        disk.write_json(folder / "results.json", [row | {"train_seeds": [seed]} for row in rows])
        metrics = [
            {"metric": f"{part}_ms", "value": v, "unit": "ms", "n": 9, "ci95": [v - 1, v + 1]}
            for part, v in (("a", 3.5), ("b", 8))
        ]
        disk.write_json(
            folder / "profile" / "table.json",
            [m | {"command": "python 05_profile.py x", "commit": ""} for m in metrics],
        )
        for row in rows:
            (made := folder / f"eval-{row['name']}").mkdir()
            source = RESULTS / "tiny_libero_object" / "episodes" / f"eval-{row['name']}.jsonl"
            disk.write_rows(
                made / "episodes.jsonl", [episode | {"seed": seed} for episode in disk.read_jsonl(source)]
            )
            facts = {"config": {"group": "test", "seed": seed}, "inputs": {}, "policy": row["name"]}
            disk.write_json(made / "done.json", facts)
            disk.write_json(made / "timing.json", {})
    (folder / "eval-sft" / "videos").mkdir()
    (folder / "eval-sft" / "videos" / "libero_object-00-init40-success.gif").write_bytes(b"GIF89a")
    report_stage.main(cfg)
    text = (tmp_path / "tiny" / "report" / "report.md").read_text()
    assert text.count("### Anatomy of the latency") == 1 and text.count("| a ms | 3.5 |") == 2
    assert "under seeds 42 and 1337" in text, "the copied seed is found"
    seen = Seen((tmp_path / "tiny" / "report" / "index.html").read_text())
    assert sum(source.startswith("data:image/gif") for source in seen.sources) == 1
    assert len(disk.read_json(tmp_path / "tiny" / "report" / "table.json")) == 8


def episode(suite: str, task: int, init: int, seed: int = 42, success: bool = True) -> dict:
    row = {"suite": suite, "task": task, "init_state": init, "seed": seed}
    return row | {"success": success, "steps": 9, "crash": ""}


def evaluate(monkeypatch, cfg, rows: list[dict], inputs: list[Path]) -> None:
    """A finished evaluation with these episodes, as 04 leaves it."""

    def play(cfg, run):
        disk.write_rows(run.dir / "played.jsonl", rows)
        return episodes.finish(run, policy=cfg.policy_name)

    monkeypatch.setattr(sys, "argv", ["04_eval.py"])
    monkeypatch.setattr(evaluation.Config, "inputs", lambda self: inputs)
    stage.execute(play, cfg)


def test_every_suite_has_a_row_and_all_seeds_together_have_one(tmp_path, monkeypatch):
    suites, played = ["libero_goal", "libero_10"], {}
    for seed, policy in itertools.product((42, 1337), ("sft", "dpo")):
        cfg = evaluation.Config(root=str(tmp_path), name="x", seed=seed, suites=suites, policy=policy)
        (weights := cfg.seed_dir / "sft").mkdir(parents=True, exist_ok=True)
        facts = {"fingerprint": str(seed), "inputs": {}, "stage": "01_sft", "config": {"seed": seed}}
        disk.write_json(weights / "done.json", facts)
        rows = [
            {"suite": suite, "seed": seed, "task": r["task"], "init_state": 40 + r["init"], "steps": 9}
            | {"crash": "", "success": r["success"]}
            for i, suite in enumerate(suites)
            for r in outcomes(0.5, seed + 10 * i + (policy == "dpo"))
        ]
        for row in rows:
            played[policy, row["suite"], seed, row["task"], row["init_state"]] = row["success"]
        evaluate(monkeypatch, cfg, rows, [weights])
        disk.write_json(cfg.seed_dir / "results.json", evaluation.results_table(cfg))
    report_cfg = report_stage.Config(root=str(tmp_path), name="x", suites=suites)
    rows = [row for row in report_stage.of_run(report_cfg, "pi05").rows if row["policy"] == "dpo"]
    assert len(rows) == 3 * 2, "two suites and both, under two seeds"
    together = audit.audit(tmp_path / "x" / "pi05")["pairs"]
    assert len(together) == 3
    for row in together:
        of_suite = suites if row["suite"] == "all" else [row["suite"]]
        mine = {k[1:]: won for k, won in played.items() if k[0] == "dpo" and k[1] in of_suite}
        base = {k[1:]: won for k, won in played.items() if k[0] == "sft" and k[1] in of_suite}
        assert row["wins"] == [sum(mine.values()), sum(base.values())]
        assert row["paired_n"] == len(mine) == 200 * len(of_suite)
        gained, lost = (sum(won - base[k] == d for k, won in mine.items()) for d in (1, -1))
        assert (row["gained"], row["lost"]) == (gained, lost)
    report_stage.main(report_cfg)
    text = (tmp_path / "x" / "report" / "report.md").read_text()
    by_seed, pooled = text.split("### Success, all seeds together")
    assert by_seed.count("| dpo-lora-branch |") == 6 and "p (Holm)" in by_seed
    assert re.findall(r"\| dpo-lora-branch \| ([\w ]+) \|", by_seed)[::2] == ["Goal", "Long", "2 suites"]
    assert pooled.count("| dpo-lora-branch | libero_goal | 42, 1337 | 200 |") == 1
    holm = stats.holm([row["p_vs_sft"] for row in together])
    assert all(f"| {tables.p_value(p)} |" in pooled for p in holm)
    assert all(
        tables.script({"command": f"python {where}04_eval.py x"}) == "04_eval.py"
        for where in ("", "./", "/a b/")
    )


def test_an_evaluation_that_is_being_redone_has_no_row(tmp_path, monkeypatch):
    cfg = evaluation.Config(root=str(tmp_path), name="x")
    cfg.seed_dir.mkdir(parents=True)
    places = [{"suite": "libero_object", "seed": 42, "task": 0, "init_state": i} for i in range(40, 50)]
    rows = [place | {"steps": 9, "crash": "", "success": True} for place in places]
    evaluate(monkeypatch, cfg, rows, [])
    disk.write_json(cfg.seed_dir / "results.json", evaluation.results_table(cfg))
    report_cfg = report_stage.Config(root=str(tmp_path), name="x")
    assert len(report_stage.of_run(report_cfg, "pi05").rows) == 1
    (cfg.folder / "done.json").unlink()
    assert report_stage.of_run(report_cfg, "pi05").rows == []


def test_an_evaluation_by_another_script_has_its_row(tmp_path, monkeypatch):
    cfg = evaluation.Config(root=str(tmp_path), name="x")
    cfg.seed_dir.mkdir(parents=True)
    evaluate(monkeypatch, cfg, [episode("libero_object", 0, init) for init in range(40, 50)], [])
    rows = [row | {"command": "python sweep.py"} for row in evaluation.results_table(cfg)]
    disk.write_json(cfg.seed_dir / "results.json", rows)
    assert len(report_stage.of_run(report_stage.Config(root=str(tmp_path), name="x"), "pi05").rows) == 1


def test_a_report_needs_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_config(report_stage.Config, ["configs/pi05.yaml"]).name == "pi05"


def test_tables_of_a_folder_that_is_being_redone_are_not_shown(tmp_path):
    report_cfg = report_stage.Config(root=str(tmp_path), name="x")
    metric = {"metric": "a", "value": 1, "unit": "ms", "command": "python 07_validate.py x", "commit": ""}
    (folder := tmp_path / "x" / "pi05" / "seed42" / "validate-branch").mkdir(parents=True)
    disk.write_json(folder.with_suffix(".json"), [metric])
    assert report_stage.of_run(report_cfg, "pi05").rows == []
    disk.write_json(folder / "done.json", {"inputs": {}})
    assert len(report_stage.of_run(report_cfg, "pi05").rows) == 1


def test_episodes_of_another_protocol_or_simulator_have_no_partner(tmp_path, monkeypatch):
    rows = [episode("libero_object", 0, init) for init in range(40, 50)]
    cfgs = [
        evaluation.Config(root=str(tmp_path), name="x", policy=policy, execute=execute)
        for policy, execute in (("sft", 8), ("dpo", 4))
    ]
    for cfg in cfgs:
        evaluate(monkeypatch, cfg, rows, [])
    assert not audit.audit(tmp_path / "x" / "pi05")["pairs"]
    same = replace(cfgs[1], execute=8, overwrite=True)
    evaluate(monkeypatch, same, rows, [])
    assert audit.audit(tmp_path / "x" / "pi05")["pairs"][0]["paired_n"] == 10
    paired = [row for row in evaluation.results_table(same) if "gained" in row]
    assert len(paired) == 1
    done = disk.read_json(same.folder / "done.json")
    for part in ("versions", "source"):
        other = done | {part: done[part] | {"mujoco": "3.4"}}
        disk.write_json(same.folder / "done.json", other)
        assert not [row for row in evaluation.results_table(same) if "gained" in row]


def test_what_was_measured_on_older_weights_is_left_out_everywhere(tmp_path, monkeypatch):
    cfg = evaluation.Config(root=str(tmp_path), name="x")
    (weights := cfg.seed_dir / "sft").mkdir(parents=True)
    made = {"stage": "01_sft", "inputs": {}, "config": {"seed": 42}}
    disk.write_json(weights / "done.json", made | {"fingerprint": "first"})
    rows = [episode("libero_object", 0, init) for init in range(40, 50)]
    evaluate(monkeypatch, cfg, rows, [weights])
    disk.write_json(cfg.seed_dir / "results.json", evaluation.results_table(cfg))
    metric = {"metric": "a", "value": 1, "unit": "ms", "command": "python 05_profile.py x", "commit": ""}
    for made_in in ("profile", "validate-branch"):
        (cfg.seed_dir / made_in).mkdir()
        disk.write_json(cfg.seed_dir / made_in / "done.json", {"inputs": {"pi05/seed42/sft": "first"}})
    (dpo := cfg.seed_dir / "dpo-lora-branch").mkdir()
    disk.write_json(dpo / "done.json", {"inputs": {"pi05/seed42/sft": "first"}})
    disk.write_rows(dpo / "metrics.jsonl", [{"step": 1}])
    (cfg.folder / "videos").mkdir()
    (cfg.folder / "videos" / "x.gif").touch()
    disk.write_json(cfg.seed_dir / "profile" / "table.json", [metric])
    disk.write_json(cfg.seed_dir / "validate-branch.json", [metric])
    report_cfg = report_stage.Config(root=str(tmp_path), name="x")
    assert len(report_stage.of_run(report_cfg, "pi05").rows) == 3
    assert not audit.audit(tmp_path / "x")["findings"]
    disk.write_json(weights / "done.json", made | {"fingerprint": "second"})
    assert report_stage.of_run(report_cfg, "pi05").rows == []
    cells, (found,) = audit.read(tmp_path / "x")
    assert not cells and "made anew since" in found.text
    assert (
        not report_stage.of_run(report_cfg, "pi05").training
        and not report_stage.of_run(report_cfg, "pi05").videos
    )
    shutil.rmtree(weights)  # to save space: then nothing is newer
    assert report_stage.of_run(report_cfg, "pi05").training and report_stage.of_run(report_cfg, "pi05").videos
    assert len(report_stage.of_run(report_cfg, "pi05").rows) == 3
    shutil.copytree(cfg.folder, tmp_path / "copy")
    assert not audit.audit(tmp_path / "copy")["findings"]


def test_trainings_under_one_noise_seed_stay_apart(tmp_path):
    for seed, wins in ((42, 3), (43, 6)):
        (folder := tmp_path / f"seed{seed}" / "eval-sft-noise1").mkdir(parents=True)
        rows = [episode("libero_object", 0, 40 + i, seed=1, success=i < wins) for i in range(10)]
        disk.write_rows(folder / "episodes.jsonl", rows)
    rates = {row["policy"]: (row["successes"], row["n"]) for row in audit.audit(tmp_path)["rates"]}
    assert rates == {"seed42/sft-noise1": (3, 10), "seed43/sft-noise1": (6, 10)}


def test_a_task_is_one_task_in_any_layout():
    """Intervals over tasks: what one layout of a task does, the other one mostly does as well."""
    own = [episode("libero_object", task, init, success=task < 5) for task in range(10) for init in (40, 41)]
    both = own + [row | {"suite": "libero_object_swap"} for row in own]
    assert episodes.summarise(both)["ci95_tasks"] == pytest.approx(episodes.summarise(own)["ci95_tasks"])
    other = own + [row | {"suite": "libero_goal"} for row in own]
    assert episodes.summarise(other)["ci95_tasks"][0] > episodes.summarise(own)["ci95_tasks"][0]


def test_a_comparison_says_of_how_many_episodes_it_is(tmp_path, monkeypatch):
    for policy, tasks in (("sft", [0]), ("dpo", [0, 1])):
        cfg = evaluation.Config(root=str(tmp_path), name="x", policy=policy, tasks=tasks)
        rows = [episode("libero_object", task, 40, success=policy == "dpo") for task in tasks]
        evaluate(monkeypatch, cfg, rows, [])
    table = evaluation.results_table(cfg)
    assert "1 / 0 of 1" in tables.listing(table, evaluation.RESULTS)
    evaluate(monkeypatch, replace(cfg, tasks=[2], overwrite=True), [episode("libero_object", 2, 40)], [])
    assert not [row for row in evaluation.results_table(cfg) if "p_vs_sft" in row], "nothing in common"


def test_a_policy_that_sees_nothing_is_paired_with_one_that_does_not_either(tmp_path, monkeypatch):
    for policy, blank in itertools.product(("sft", "dpo"), (False, True)):
        cfg = evaluation.Config(root=str(tmp_path), name="x", policy=policy, blank_images=blank)
        rows = [
            {
                "suite": "libero_object",
                "seed": 42,
                "task": 0,
                "init_state": 40,
                "steps": 9,
                "crash": "",
                "success": True,
            }
        ]
        evaluate(monkeypatch, cfg, rows, [])
    against = {row["name"]: row.get("paired_with") for row in evaluation.results_table(cfg)}
    blind = {"sft-blank": "sft", "dpo-lora-branch-blank": "sft-blank"}
    assert against == {"sft": None, "dpo-lora-branch": "sft"} | blind


def test_an_evaluation_that_is_still_at_work_is_named(tmp_path):
    folder = tmp_path / "eval-sft"
    folder.mkdir()
    shutil.copy(RESULTS / "tiny_blank" / "episodes" / "eval-sft-blank.jsonl", folder / "episodes.jsonl")
    disk.write_json(folder / "started.json", {})
    (found,) = audit.audit(tmp_path)["findings"]
    assert (found.kind, found.where) == (
        "missing",
        "eval-sft/episodes.jsonl",
    ) and "100 episodes so far" in found.text
    disk.write_json(folder / "done.json", {})
    assert audit.audit(tmp_path)["findings"] == []


def test_pages_without_a_marker_stay_as_they_are(tmp_path, monkeypatch):
    for name, content in (("a.md", b"x\r\n\xff"), ("b.md", b"<!-- table:nobody --><!-- /table -->")):
        (tmp_path / name).write_bytes(content)
    cfg = report_stage.Config(root=str(tmp_path), name="x", readme=str(tmp_path / "a.md"))
    report_stage.main(cfg)
    assert (tmp_path / "a.md").read_bytes() == b"x\r\n\xff"
    with pytest.raises(UserError, match=r"b\.md: no table is called 'nobody'"):
        report_stage.main(replace(cfg, readme=str(tmp_path)))


def test_a_readme_that_is_not_there_is_refused(tmp_path):
    shutil.copy(RESULTS / "tiny_blank" / "episodes" / "eval-sft-blank.jsonl", tmp_path / "sft.jsonl")
    cfg = report_stage.Config(root=str(tmp_path), results=str(RESULTS))
    with pytest.raises(UserError, match="there is no such file"):
        report_stage.main(replace(cfg, readme=str(tmp_path / "none.md")))
    with pytest.raises(SystemExit):
        report_stage.main(
            replace(cfg, results=str(tmp_path), audit=str(tmp_path))
        )  # an audit needs no table.json


def test_an_audit_by_command(tmp_path, capsys):
    arguments = [str(HERE / "configs" / "tiny.yaml"), f"root={tmp_path / 'runs'}"]
    for plant, code in ((None, 0), (duplicate_seeds, 1)):
        folder = public_folder(tmp_path / f"episodes{code}")
        if plant:
            plant(folder)
        with pytest.raises(SystemExit) as done:
            report_stage.main(load_config(report_stage.Config, [*arguments, f"audit={folder}"]))
        said = capsys.readouterr().out
        assert (
            done.value.code == code
            and ("found nothing" in said) != bool(plant)
            and "openvla_dpo_dora" in said
        )


# ----------------------------------------------------------------------------------------------- in a browser
PROBE = """<script>
addEventListener("error", event => console.error("uncaught " + event.message));
addEventListener("load", () => {
  const heads = [...document.querySelector("table:not(.cards)").querySelectorAll("th")];
  const column = 3, body = heads[0].closest("table").tBodies[0];  // "k / n"
  const cells = () => [...body.rows].map(row => parseFloat(row.cells[column].innerText));
  heads[column].click();
  const up = cells();
  heads[column].click();
  const pictures = [...document.images];
  parent.postMessage({width: innerWidth, up, down: cells(), images: pictures.length,
    broken: pictures.filter(image => !image.complete || !image.naturalWidth).length,
    overflow: document.documentElement.scrollWidth - innerWidth}, "*");
});
</script>"""
FRAMES = """<!doctype html><iframe src="probed.html" width="1280" height="800"></iframe>
<iframe src="probed.html" width="390" height="844"></iframe><pre id="said"></pre><script>
const said = [];
addEventListener("message", event => {
  said.push(event.data);
  document.getElementById("said").textContent = JSON.stringify(said);
});
</script>"""


def test_the_page_in_a_browser(report, tmp_path):
    """At a laptop's and a phone's width: no error, all images appear, tables sort, nothing overflows."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("Chromium is not installed (Debian, Ubuntu: apt-get install chromium)")
    text = (report / "index.html").read_text()
    (report / "probed.html").write_text(text.replace("</body>", PROBE + "</body>"))
    (report / "frames.html").write_text(FRAMES)
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=20000",
    ]
    command = [
        browser,
        *flags,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        f"file://{report / 'frames.html'}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert "CONSOLE" not in result.stderr, result.stderr
    found = json.loads(re.search(r'<pre id="said">(.*?)</pre>', result.stdout)[1])
    assert sorted(one["width"] for one in found) == [390, 1280]
    for one in found:
        assert one["images"] >= 5 and one["broken"] == 0 and one["overflow"] <= 0, one
        assert (
            one["up"] == sorted(one["up"])
            and one["down"] == sorted(one["down"], reverse=True)
            and len(set(one["up"])) > 3
        )
