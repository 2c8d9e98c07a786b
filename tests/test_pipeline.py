"""The stages as a user runs them, on configs/micro.yaml and the real simulator: killed, resumed, edited.

pytest tests/test_pipeline.py
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from runtime import disk
from runtime.config import HERE

SEED_DIR = "runs/micro/pi05/seed42"
# script with its arguments, the folder it writes, and what shows it half-way: a file, with so many lines
STAGES = {
    "demos": (["00_demos.py"], "runs/micro/data", "started.json", None),
    "sft": (["01_sft.py"], f"{SEED_DIR}/sft", "checkpoint.pt", None),
    "prefs": (["02_collect_prefs.py"], f"{SEED_DIR}/prefs-episode", "units.jsonl", 1),
    "dpo": (["03_dpo.py"], f"{SEED_DIR}/dpo-lora-episode", "checkpoint.pt", None),
    "eval": (["04_eval.py", "policy=dpo"], f"{SEED_DIR}/eval-dpo-lora-episode", "played.jsonl", 1),
    "head": (["06_pretrain_head.py"], f"{SEED_DIR}/head", "heads/all-paper.safetensors", None),
}


def copy_of_the_kit(folder: Path) -> Path:
    """The sources in a folder of their own, so that runs and edits stay there."""
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "runs", "results", "tests", "__pycache__", ".*_cache", ".hypothesis"
    )
    return Path(shutil.copytree(HERE, folder, ignore=ignore))


def command(arguments: list[str], *more: str) -> list[str]:
    return [sys.executable, arguments[0], "configs/micro.yaml", *arguments[1:], *more]


def stage(kit: Path, name: str, *more: str, **variables: str) -> subprocess.CompletedProcess:
    env = os.environ | variables
    return subprocess.run(command(STAGES[name][0], *more), cwd=kit, env=env, capture_output=True, text=True)


def outputs(kit: Path, folder: str) -> dict:
    done = disk.read_json(kit / folder / "done.json")
    return {"outputs": done["outputs"], "fingerprint": done["fingerprint"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A copy of the kit in which every stage has run undisturbed."""
    kit = copy_of_the_kit(tmp_path_factory.mktemp("undisturbed") / "kit with a space")
    for name in STAGES:
        result = stage(kit, name, PYTHONPROFILEIMPORTTIME="1")
        assert result.returncode == 0, result.stdout + result.stderr
        imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
        assert "backbones.load" in imported or name == "demos"
        assert not imported & {f"backbones.{name}" for name in ("likelihood", "published", "openvla")}
    return kit


def half_way(folder: Path, marker: str, lines: int | None) -> bool:
    path = folder / marker
    return path.is_file() and (lines is None or path.read_text().count("\n") >= lines)


@pytest.mark.parametrize("name", STAGES)
def test_killed_half_way_and_run_again_gives_the_same_files(name, finished, tmp_path):
    arguments, folder, marker, lines = STAGES[name]
    kit = copy_of_the_kit(tmp_path / "kit with a space")
    shutil.copytree(finished / "runs", kit / "runs")
    shutil.rmtree(kit / folder)
    process = subprocess.Popen(
        command(arguments), cwd=kit, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not half_way(kit / folder, marker, lines):
        assert process.poll() is None, "the stage ended before it could be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (kit / folder / "done.json").exists()
    result = stage(kit, name)
    assert result.returncode == 0 and "goes on" in result.stdout, result.stdout + result.stderr
    assert outputs(kit, folder) == outputs(finished, folder)


def test_an_edited_script_is_rerun_with_what_depends_on_it_and_nothing_else(finished, tmp_path):
    kit = copy_of_the_kit(tmp_path / "kit with a space")
    shutil.copytree(finished / "runs", kit / "runs")
    script = kit / "03_dpo.py"
    text = script.read_text()
    script.write_text(text + "\n# a comment changes nothing\n")
    assert "already done" in stage(kit, "dpo").stdout
    assert "beta * (pi_w - ref_w)" in text
    script.write_text(text.replace("beta * (pi_w - ref_w)", "beta * 1.5 * (pi_w - ref_w)"))
    refused = stage(kit, "dpo")
    assert refused.returncode == 2 and "source 03_dpo.py; add overwrite=true" in refused.stderr
    run = ["bash", "run_all.sh", "configs/micro.yaml", "00 01 02 03 04 08", "adapters=lora"]
    environment = os.environ | {"PYTHON": sys.executable}
    result = subprocess.run(run, cwd=kit, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    redone = [line.split(",")[0] for line in result.stdout.splitlines() if "] redone, because of" in line]
    assert redone == ["[03_dpo] redone", "[04_eval] redone"], result.stdout
    for untouched in ("00_demos", "01_sft", "02_collect_prefs"):
        assert f"[{untouched}] already done" in result.stdout
    report = kit / "runs" / "micro" / "report"
    assert {path.name for path in report.iterdir()} >= {
        "index.html",
        "table.json",
        "differences-micro-pi05.png",
    }
    names = [row["name"] for row in disk.read_json(report / "table.json") if "successes" in row]
    assert names == ["sft", "dpo-lora-episode"] and str(report.relative_to(kit)) in result.stdout
    folder = STAGES["dpo"][1]
    assert outputs(kit, folder)["outputs"] != outputs(finished, folder)["outputs"]


def torchrun(kit: Path, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run([*run, *arguments], cwd=kit, capture_output=True, text=True)


TRAINED = {
    "dpo": "adapter_model.safetensors",
    "sft": "model.safetensors",
}


def test_two_ranks_train_what_one_process_trains(finished, tmp_path):
    kit = copy_of_the_kit(tmp_path / "kit")
    shutil.copytree(finished / "runs", kit / "runs")
    for name, file in TRAINED.items():
        folder = STAGES[name][1]
        shutil.rmtree(kit / folder)
        result = torchrun(kit, STAGES[name][0][0], "configs/micro.yaml")
        assert result.returncode == 0 and "done in" in result.stdout, result.stdout + result.stderr
        got, want = load_file(kit / folder / file), load_file(finished / folder / file)
        assert got.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(got[key], want[key], atol=1e-5, rtol=0)
        logs = [disk.read_jsonl(root / folder / "metrics.jsonl") for root in (kit, finished)]
        assert len(logs[0]) == len(logs[1]) > 0
        for ours, alone in zip(*logs, strict=True):
            assert ours == pytest.approx(alone, rel=1e-2, abs=1e-4)


def test_a_stage_that_starts_its_own_processes(finished, tmp_path):
    """Equal to torchrun's to the last bit. `until` ends with the snapshot of the whole schedule.

    A kill of the first process ends the other, and the same command goes on to the same bits.
    """
    kit, folder = copy_of_the_kit(tmp_path / "kit"), STAGES["sft"][1]
    shutil.copytree(finished / "runs", kit / "runs")
    shutil.rmtree(kit / folder)
    assert torchrun(kit, "01_sft.py", "configs/micro.yaml").returncode == 0
    want = load_file(kit / folder / "model-4.safetensors")
    shutil.rmtree(kit / folder)
    own = command(["01_sft.py"], "processes=2", "sft.until=4", "sft.checkpoint_every=1")
    process = subprocess.Popen(own, cwd=kit, stderr=subprocess.DEVNULL)
    while not half_way(kit / folder, "checkpoint.pt", None):
        assert process.poll() is None, "the stage ended before it could be killed"
        time.sleep(0.002)
    (other,) = [p for p in psutil.Process(process.pid).children() if "01_sft.py" in p.cmdline()]
    process.kill()
    process.wait()
    other.wait(timeout=60)
    result = subprocess.run(own, cwd=kit, capture_output=True, text=True)
    assert result.returncode == 0 and "goes on" in result.stdout, result.stderr
    got = load_file(kit / folder / "model.safetensors")
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    assert [row["step"] for row in disk.read_jsonl(kit / folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_four_ranks_play_the_episodes_of_one_process(finished, tmp_path):
    """Of two tasks, so that two of the four have nothing to play."""
    played = []
    for processes in (1, 4):
        kit = copy_of_the_kit(tmp_path / f"kit{processes}")
        shutil.copytree(finished / SEED_DIR / "sft", kit / SEED_DIR / "sft")
        arguments = ["04_eval.py", "configs/micro.yaml", "tasks=[0, 3]", "eval.n_init=1", "eval.videos=0"]
        if processes > 1:
            result = torchrun(kit, *arguments, processes=processes)
        else:
            result = subprocess.run([sys.executable, *arguments], cwd=kit, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        played.append(outputs(kit, f"{SEED_DIR}/eval-sft"))
        rows = disk.read_jsonl(kit / SEED_DIR / "eval-sft" / "episodes.jsonl")
        assert [(row["task"], row["init_state"]) for row in rows] == [(0, 40), (3, 40)]
    assert played[0] == played[1]
