"""Faults that users elsewhere have met: environment, system's errors, paths, configs, numbers, origins.

Each test stands for a kind of fault. pytest tests/test_circumstances.py
"""

import contextlib
import errno
import fcntl
import importlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
from samples import run_stage

import backbones
import common
from backbones.policy import checked_stats
from runtime import config, disk, ranks, stage, workers
from runtime.config import HERE, load_config
from runtime.errors import UserError
from sim import env as sim_env

TRY = HERE / "checkpoints" / "try" / "pi05"
CONFIG = str(HERE / "configs" / "try.yaml")
dpo, sft, evaluation = (importlib.import_module(name) for name in ("03_dpo", "01_sft", "04_eval"))
NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def one_line(call, *words: str) -> str:
    """`call` ends in one line for the user, in which all words stand."""
    with pytest.raises(UserError) as error:
        call()
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said
    return said


# ------------------------------------------------------------------------------------------------ environment
@pytest.fixture
def launcher(monkeypatch):
    """Sets the variables of a launcher, and unsets the others."""

    def put(**variables: str) -> None:
        for name in NUMBERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize("world", ["", " ", "1"])
def test_a_process_that_is_alone_is_the_first_whatever_a_cluster_has_set(launcher, world):
    launcher(WORLD_SIZE=world, RANK="3", LOCAL_RANK="x", MASTER_PORT="")
    assert (ranks.size(), ranks.rank(), ranks.first(), ranks.place("cuda")) == (1, 0, True, "cuda:0")
    assert ranks.share([1, 2, 3]) == [1, 2, 3]
    ranks.join("cpu")


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE='two'"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE='0'"]),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29501"}, ["RANK=''"]),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29501"}, ["RANK='2'"]),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, ["WORLD_SIZE=2", "MASTER_PORT"]),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "29501"}, ["WORLD_SIZE=2", "MASTER_ADDR"]),
    ],
)
def test_a_launchers_variable_that_is_wrong_is_named_with_its_value(launcher, variables, words):
    launcher(**variables)
    one_line(lambda: ranks.join("cpu"), *words, "torchrun")


def test_a_rank_whose_others_never_come_does_not_wait_for_them(launcher, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    monkeypatch.setattr(ranks, "MEET", timedelta(seconds=1))
    began = time.time()
    one_line(lambda: ranks.join("cpu"), "WORLD_SIZE=2", "unset WORLD_SIZE to run one process")
    assert 1 <= time.time() - began < 60


@pytest.mark.parametrize("value", ["glfw", "disable", "0", "nonsense"])
def test_a_renderer_that_needs_a_screen_is_refused_by_its_name(monkeypatch, value):
    monkeypatch.setattr(sim_env, "GL", value)
    assert "install" not in one_line(sim_env.libraries.__wrapped__, f"MUJOCO_GL={value}", "unset")


@pytest.mark.parametrize(
    "text, missing",
    [
        ("'NoneType' object has no attribute 'glGetError'", True),
        ("'NoneType' object has no attribute 'eglQueryString'", True),
        ("libGL.so.1: cannot open shared object file", True),
        ("Unable to load EGL library", True),
        ("numpy.core.multiarray failed to import", False),
        ("The MUJOCO_EGL_DEVICE_ID environment variable must be an integer", False),
        ("cannot import name 'x' from 'scipy'", False),
    ],
)
def test_the_gl_library_is_to_be_installed_only_where_it_is_missing(text, missing):
    assert ("apt-get install" in sim_env.gl_remedy(ImportError(text), "something else")) == missing


LOOK = """
from sim.env import TaskEnv
from runtime import stage
def look():
    env = TaskEnv("libero_object", 1); env.reset(0); print(env.observe()["wrist"].mean() > 0)
stage.command_line(look)
"""


def look(**variables: str) -> subprocess.CompletedProcess:
    command, env = [sys.executable, "-c", LOOK], os.environ | variables
    return subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)


def test_numbers_of_devices_and_a_missing_home_do_not_matter():
    """A scheduler's GPU is not the renderer's, and a container's user has no home."""
    numbers = {"CUDA_VISIBLE_DEVICES": "1", "MUJOCO_EGL_DEVICE_ID": "0", "HOME": "", "MUJOCO_GL": "EGL "}
    result = look(**numbers, PYOPENGL_PLATFORM="glx")
    assert (result.stdout, result.stderr) == ("True\n", "")


def test_a_renderers_device_that_is_none_is_one_line():
    result = look(MUJOCO_EGL_DEVICE_ID="")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "unset MUJOCO_EGL_DEVICE_ID, which is ''" in result.stderr


def test_a_renderer_without_a_driver_is_not_told_to_unset_what_is_not_set():
    result = look(__EGL_VENDOR_LIBRARY_FILENAMES="/none", MUJOCO_GL="egl")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "MUJOCO_EGL_DEVICE_ID" not in result.stderr and "libegl-mesa0" in result.stderr


def test_a_notebooks_backend_for_plots_does_not_matter():
    code = "import runtime; from report import plots; plots.canvas(1, 1)\n"
    code += "from sim.env import libraries; libraries()"
    env = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


OUT = [
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]
OUT += [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")]
OUT += [ValueError("Error: engine error: Could not allocate memory")]  # mujoco's


@pytest.mark.parametrize("error", OUT, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_is_one_line(error, capsys):
    def call():
        raise error

    with pytest.raises((SystemExit, type(error))) as ended:
        stage.command_line(call)
    said = capsys.readouterr().err
    assert (
        ended.type is SystemExit and ended.value.code == 2 and said.count("\n") == 1 and "batch_size" in said
    )


def test_another_error_of_a_library_keeps_its_traceback():
    def call():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError):
        stage.command_line(call)


# --------------------------------------------------------------------------------------- the system's errors
WRITE = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EACCES: "let this user write"}
WRITE |= {errno.EROFS: "read-only", errno.ENAMETOOLONG: "shorten", errno.ESTALE: "mount it again"}
WRITE |= {errno.ENOLCK: "lock", errno.ENOSYS: "lock", errno.ENOENT: "choose another root="}
READ = {errno.EACCES: "let this user read", errno.ESTALE: "mount it again", errno.EIO: "the disk fails"}


@pytest.mark.parametrize("number", WRITE)
def test_an_error_of_writing_has_its_own_remedy(number):
    def fail():
        with disk.writing(Path("x")):
            raise OSError(number, os.strerror(number))

    said = one_line(fail, "x cannot be written", WRITE[number])
    assert ("make room" in said) == (number in (errno.ENOSPC, errno.EDQUOT))


@pytest.mark.parametrize("number", READ)
def test_an_error_of_reading_is_no_damage(number, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    (tmp_path / "x.json").write_text("{}")
    monkeypatch.setattr(Path, "read_text", fail)
    for read in (disk.read_json, disk.read_jsonl):
        said = one_line(lambda read=read: read(tmp_path / "x.json"), "x.json cannot be read", READ[number])
        assert "remove" not in said and "make room" not in said


def test_a_librarys_words_tell_the_error_too():
    text = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "make room" in disk.remedy(text, disk.WRITING, "?")
    assert disk.remedy(RuntimeError("a truncated file"), disk.READING, "?") == "?"


def test_a_file_that_is_not_there_is_not_damaged(tmp_path):
    """safetensors raises FileNotFoundError without a number."""
    assert "damaged" not in one_line(lambda: disk.load_tensors(tmp_path / "x.safetensors"), "it is not there")


def test_a_file_in_place_of_its_folder_is_one_line():
    file = TRY / "sft" / "model.safetensors"
    one_line(lambda: stage.checkpoint_files(str(file)), "no such folder", str(file))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_disk_without_locks_is_one_line(number, monkeypatch, tmp_path):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    cfg = sft.Config(name="x", root=str(tmp_path), init_from=str(TRY / "sft"))
    monkeypatch.setattr(sft.Config, "inputs", lambda self: [])
    one_line(lambda: stage.execute(sft.main, cfg), "can lock no file")
    one_line(lambda: disk.append_jsonl(tmp_path / "rows.jsonl", {}), "can lock no file")


def test_a_root_where_nothing_can_be_made_is_one_line(monkeypatch):
    monkeypatch.setattr(sft.Config, "inputs", lambda self: [])
    one_line(lambda: stage.execute(sft.main, sft.Config(name="x", root="/proc/x")), "/proc/x", "root=")


@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_files_get_the_umasks_mode(umask, tmp_path):
    before = os.umask(umask)
    try:
        disk.save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
        disk.save_checkpoint(tmp_path / "b.pt", {"x": torch.zeros(2)})
        disk.write_json(tmp_path / "c.json", {})
        policy = backbones.load_policy(TRY / "sft")
        common.save_adapter(common.attach_adapter(policy, "lora", 2, 2, policy.adapter_targets, 0), tmp_path)
    finally:
        os.umask(before)
    assert len(list(tmp_path.iterdir())) == 5
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


# ---------------------------------------------------------------------------------------------------- configs
def load(cls, *argv: str):
    return load_config(cls, [str(arg) for arg in argv])


def test_paths_of_a_yaml_begin_in_the_kit_and_those_of_the_command_line_where_one_stands(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(HERE)
    at_home, script = load(dpo.Config, CONFIG), Path(dpo.__file__)
    identity = stage.identity_of(script, at_home)["fingerprint"]
    assert at_home.checkpoint == "checkpoints/try/pi05/sft" and at_home.root == "runs"
    monkeypatch.chdir(tmp_path)
    elsewhere = load(dpo.Config, CONFIG, "pairs_from=mine")
    assert elsewhere.checkpoint == str(HERE / "checkpoints/try/pi05/sft")
    assert elsewhere.root == str(HERE / "runs") and elsewhere.pairs_from == str(tmp_path / "mine")
    assert load(dpo.Config, CONFIG, "pairs_from=").pairs_from == ""
    assert stage.identity_of(script, load(dpo.Config, CONFIG))["fingerprint"] == identity


def test_the_home_folder_has_its_short_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(sft.Config, CONFIG, "root=~/runs").root == str(tmp_path / "runs")
    one_line(lambda: load(sft.Config, CONFIG, "root=~nobody-of-that-name/x"), "home folder")


@pytest.mark.parametrize("text", ["1E-3", "1e-3", ".001", "1_0e-4", "+0.001", "1.0E-03"])
def test_a_number_may_be_spelt_as_python_reads_it(text, tmp_path):
    (tmp_path / "x.yaml").write_text(f"dpo: {{lr: {text}, beta: {text}}}")
    for cfg in (
        load(dpo.Config, tmp_path / "x.yaml"),
        load(dpo.Config, CONFIG, f"dpo.lr={text}", f"dpo.beta={text}"),
    ):
        assert cfg.lr == config.as_number(cfg.beta, float) == float(text)


def test_a_number_is_what_it_seems(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("seed: 010\nsft: {steps: 1_000, rank: 0x10, alpha: 0b11, snapshots: [08]}")
    cfg = load(sft.Config, path)
    assert (cfg.seed, cfg.steps, cfg.rank, cfg.alpha, cfg.snapshots) == (10, 1000, 16, 3, [8])
    path.write_text("seed: 1:30")  # 90 to YAML
    one_line(lambda: load(sft.Config, path), "seed", "1:30")


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2", "sft: {lr: 1, lr: 2}", "sft: {}\ndpo: {}\nsft: {}"])
def test_a_key_that_stands_twice_is_refused(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    one_line(lambda: load(sft.Config, tmp_path / "x.yaml"), "x.yaml", "stands twice")


def test_anchors_and_merged_keys_stay_what_they_are(tmp_path):
    text = "sft: &s {lr: 1e-4, steps: 3}\ndpo: {<<: *s, steps: 4}"
    (tmp_path / "x.yaml").write_text(text)
    cfg = load(dpo.Config, tmp_path / "x.yaml")
    assert (cfg.lr, cfg.steps) == (1e-4, 4)


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> Path:
    """A PYTHON that answers what run_all.sh asks, and runs no stage."""
    path = tmp_path_factory.mktemp("stub") / "python"
    path.write_text(f'#!/bin/bash\n[[ $1 == -c ]] && exec {sys.executable} "$@"\nexit 0\n')
    path.chmod(0o755)
    return path


def run_all(stub: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command, env = ["bash", str(HERE / "run_all.sh"), *arguments], os.environ | {"PYTHON": str(stub)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "text",
    [
        'base: "low.yaml"',
        "base: low.yaml\r\n",
        "{base: low.yaml}",
        "base: 'low.yaml'  # a comment\nx: &a 1\n".replace("x: &a 1\n", "seed: &a 1\nsft: {steps: *a}\n"),
        "? base\n: low.yaml",
        "stages: '03 08'\nadapters: >\n  dora\nname: low\n",
        'pi05:\n  stages: "03 08"\n  adapters: dora\n',
    ],
)
def test_run_all_reads_a_config_as_the_stages_do(text, stub, tmp_path):
    (tmp_path / "low.yaml").write_text("stages: 03 08  # these\nadapters: dora\n")
    (tmp_path / "my config.yaml").write_bytes(text.encode())
    result = run_all(stub, tmp_path, "my config.yaml")
    assert result.returncode == 0, result.stderr
    ran = [line.partition("$ ")[2] for line in result.stdout.splitlines() if "$ python 0" in line]
    assert ran == [
        "python 03_dpo.py my config.yaml adapter=dora overwrite=true",
        "python 08_report.py my config.yaml overwrite=true",
    ]


def test_run_all_hands_a_dry_run_on(stub, tmp_path):
    said = run_all(stub, tmp_path, "configs/try.yaml", "03 08", "--dry-run").stdout
    ran = [line for line in said.splitlines() if "$ python 0" in line]
    assert len(ran) == 2 and all(line.endswith(" --dry-run") for line in ran)


def test_a_report_does_not_stand_for_the_check_of_the_simulator(stub, tmp_path):
    (tmp_path / "runs" / "try" / "report").mkdir(parents=True)
    for made, checked in (("report", True), ("data", False)):
        (tmp_path / "runs" / "try" / made).mkdir(exist_ok=True)
        said = run_all(stub, tmp_path, "configs/try.yaml", "00", f"root={tmp_path / 'runs'}").stdout
        assert ("extras.preflight" in said) == checked


def test_each_backbone_has_the_adapters_of_its_own_section(stub, tmp_path):
    (tmp_path / "x.yaml").write_text("stages: '03'\nopenvla: {adapters: dora}\n")
    said = run_all(stub, tmp_path, "x.yaml", "backbones=both").stdout
    ran = [line.split()[6:8] for line in said.splitlines() if "$ python 0" in line]
    assert ran == [
        [f"backbone={b}", f"adapter={a}"]
        for b, a in [("pi05", "lora"), ("pi05", "dora"), ("openvla", "dora")]
    ], said


def test_another_start_leaves_the_final_policys_evaluation(stub, tmp_path):
    said = run_all(stub, tmp_path, "configs/tiny.yaml", "04 06", "start=500", "adapters=").stdout
    ran = [line.split("start=")[-1] for line in said.splitlines() if "$ python 0" in line]
    assert ran == ["final", "500", "final"]


def test_run_all_takes_stages_with_and_without_quotes(stub, tmp_path):
    for stages in (["03", "08"], ["03 08"]):
        said = run_all(stub, tmp_path, "configs/try.yaml", *stages, "adapters=lora").stdout
        assert [line.split()[4] for line in said.splitlines() if "$ python 0" in line] == [
            "03_dpo.py",
            "08_report.py",
        ]


def test_run_all_refuses_what_python_refuses(stub, tmp_path):
    (tmp_path / "x.yaml").write_text("stages: 03\nstages: 04")
    for arguments, word in (
        (["x.yaml"], "twice"),
        (["nowhere.yaml"], "no config file"),
        (["9"], "no stage 9"),
        (
            ["configs/tiny.yaml", "configs/try.yaml", "08"],
            "two configs, configs/tiny.yaml and configs/try.yaml",
        ),
    ):
        result = run_all(stub, tmp_path, *arguments)
        assert result.returncode == 2 and word in result.stderr and result.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------- numbers that can't train
def with_nan(folder: Path, name: str, key: str = "") -> Path:
    tensors = disk.load_tensors(folder / name)
    tensors[key or min(tensors)].view(-1)[0] = math.nan
    disk.save_tensors(folder / name, tensors, disk.facts_of(folder / name))
    return folder


def copied(tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(TRY / name, tmp_path / name))


def test_weights_that_are_not_finite_are_named_before_anything_begins(tmp_path):
    folder = with_nan(copied(tmp_path, "sft"), "model.safetensors", "action_in_proj.weight")
    one_line(lambda: backbones.load_policy(folder), "action_in_proj.weight", "not finite")
    folder = with_nan(copied(tmp_path, "lora"), "adapter_model.safetensors")
    one_line(lambda: common.load_adapter(backbones.load_policy(TRY / "sft"), folder), "not finite")


@pytest.mark.parametrize(
    "change",
    [
        {"std": [-1.0] * 7},
        {"q01": [2.0] * 7, "q99": [1.0] * 7},
        {"q10": [2.0] * 7, "q90": [1.0] * 7},
        {"q10": [math.nan] * 7, "q90": [1.0] * 7},
    ],
)
def test_statistics_that_turn_actions_round_are_refused(change):
    named = {"mean": [0.0] * 7, "std": [1.0] * 7, "q01": [-1.0] * 7, "q99": [1.0] * 7}
    assert checked_stats({"action": named}, "x")
    one_line(lambda: checked_stats({"action": named | change}, "x"), "action")


def other_pairs(tmp_path: Path, rows: slice) -> Path:
    folder = copied(tmp_path, "prefs")
    pairs = disk.load_tensors(folder / "pairs.safetensors")
    pairs["rejected"][rows] = pairs["chosen"][rows]
    disk.save_tensors(folder / "pairs.safetensors", pairs, disk.facts_of(folder / "pairs.safetensors"))
    return folder


def test_pairs_that_do_not_differ_teach_nothing(tmp_path, capsys):
    for name, rows in (("some", slice(3)), ("all", slice(None))):
        cfg = dpo.Config(pairs_from=str(other_pairs(tmp_path / name, rows)))
        if name == "all":
            one_line(lambda cfg=cfg: common.read_pairs(cfg.pairs_dir), "do not differ")
        else:
            assert common.read_pairs(cfg.pairs_dir)
    assert "in 3 of 20 pairs" in capsys.readouterr().out


@pytest.mark.parametrize("beta", ["1e8", "1e-9"])
def test_a_beta_that_the_pairs_make_absurd_is_refused_before_the_first_step(beta, tmp_path):
    given = [CONFIG, f"root={tmp_path}", f"dpo.beta={beta}", "dpo.steps=1"]
    one_line(lambda: run_stage("03_dpo", *given), f"dpo.beta={float(beta):.3g}", "dpo.beta=auto")


def test_a_reference_that_calls_all_pairs_alike_gives_no_beta(monkeypatch, tmp_path):
    monkeypatch.setattr(dpo, "log_probs", lambda p, o, chosen, *rest: (torch.ones(len(chosen)),) * 2)
    given = [CONFIG, f"root={tmp_path}", "dpo.steps=1"]
    assert "beta" not in one_line(lambda: run_stage("03_dpo", *given), "weights", "pairs")


def test_a_gradient_that_overflows_stops_the_training_and_nothing_of_it_is_logged(tmp_path):
    given = [CONFIG, f"root={tmp_path}", "dpo.lr=1", "dpo.warmup=0", "dpo.log_every=9"]
    one_line(lambda: run_stage("03_dpo", *given), "the gradient is", "at step", "lower dpo.lr")
    (log,) = tmp_path.rglob("metrics.jsonl")
    assert all(math.isfinite(value) for row in disk.read_jsonl(log) for value in row.values())


def test_a_policy_that_has_unlearned_what_it_could_is_warned_of(capsys):
    row = {"rewards/margins": 1.0, "rewards/margin_std": 1.0}
    early, late = ([row | {"rewards/chosen": reward}] * 2 for reward in (-0.5, -0.05))
    dpo.warn_about_scale(early + late, dpo.Config(), 0.1)  # the second half fell by 0.5
    assert capsys.readouterr().out == ""
    dpo.warn_about_scale(late + early, dpo.Config(), 0.1)
    assert "fell by 5: lower dpo.lr" in capsys.readouterr().out
    logs = HERE / "results" / "autoregressive" / "training"  # at the paper's dose: 6 of 100 episodes, from 33
    dpo.warn_about_scale(disk.read_jsonl(logs / "dpo-lora-paper-seed203.jsonl"), dpo.Config(), 0.1 / 56)
    assert "fell by 6.6" in capsys.readouterr().out
    dpo.warn_about_scale(disk.read_jsonl(logs / "dpo-lora-anchor-seed203.jsonl"), dpo.Config(), 0.0941)
    assert capsys.readouterr().out == ""
    small = {"rewards/margins": 0.0, "rewards/margin_std": 0.0, "rewards/chosen": 0.0}
    dpo.warn_about_scale([small], dpo.Config(contrast=0), 1.0)
    assert capsys.readouterr().out == "", "an anchor alone has no margins to raise"


def test_an_adapter_needs_weights_that_it_adapts(tmp_path):
    cfg = sft.Config(name="x", root=str(tmp_path), train="lora")
    one_line(cfg.inputs, "sft.train=lora adapts given weights", "init_from=")


def test_a_training_that_would_end_after_its_schedule_is_refused():
    one_line(lambda: sft.Config(steps=100, until=200), "sft.until=200 is beyond sft.steps=100")


def test_before_the_first_update_no_learning_rate_is_blamed():
    run = stage.Run(sft.Config(), Path(), {})
    said = one_line(lambda: run.check(torch.tensor(math.nan), 0), "the loss is nan at step 0", "weights")
    assert "lr" not in said
    one_line(lambda: run.check(math.inf, 3, "gradient"), "the gradient is inf at step 3", "lower sft.lr")


@pytest.mark.parametrize(
    "write", [disk.write_json, disk.append_jsonl, lambda p, row: disk.write_rows(p, [row])]
)
@pytest.mark.parametrize("value", [math.nan, -math.inf, [1.0, math.nan]])
def test_no_number_is_written_that_json_cannot_hold(write, value, tmp_path):
    path = tmp_path / "x.json"
    one_line(lambda: write(path, {"a": 1.0, "loss": value}), "x.json", "loss")
    assert not path.exists() or not path.read_text()


# ------------------------------------------------------------------------- things that do not belong together
@pytest.fixture(scope="module")
def policy():
    return backbones.load_policy(TRY / "sft")


def origin_of(policy) -> dict:
    return common.origin(policy, policy.adapter_targets)


def test_an_origin_does_not_depend_on_how_the_weights_were_saved(policy, tmp_path):
    policy.save(tmp_path / "one")
    tensors = disk.load_tensors(tmp_path / "one" / "model.safetensors")
    disk.save_tensors(
        tmp_path / "one" / "model.safetensors", {key: t.float() for key, t in reversed(tensors.items())}
    )
    again = backbones.load_policy(tmp_path / "one")
    assert origin_of(again) == origin_of(policy) == origin_of(again.cast("bfloat16"))


def test_one_weight_or_one_statistic_makes_another_origin(policy):
    other = backbones.load_policy(TRY / "sft")
    with torch.no_grad():
        other.expert.layers[1].self_attn.v_proj.weight[0, 0] += 0.01
    here, there = origin_of(policy), origin_of(other)
    assert here["base"] != there["base"] and here["statistics"] == there["statistics"]
    other.norm_stats["action"]["q01"][0] -= 1e-6
    assert origin_of(other)["statistics"] != here["statistics"]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_kits_adapters_fit_their_policy_and_no_other(kind, capsys, tmp_path):
    common.load_adapter(backbones.load_policy(TRY / "sft"), TRY / kind)
    assert capsys.readouterr().out == ""
    merged = common.load_adapter(backbones.load_policy(TRY / "sft"), TRY / kind)
    merged.save(tmp_path)
    for folder in (tmp_path, HERE / "checkpoints" / "tiny_libero_object"):
        one_line(
            lambda folder=folder: common.load_adapter(backbones.load_policy(folder), TRY / kind), "other"
        )
    moved = backbones.load_policy(TRY / "sft")
    moved.norm_stats["action"]["q99"][0] += 1
    one_line(lambda: common.load_adapter(moved, TRY / kind), "other statistics")


def test_pairs_and_adapters_of_other_settings_are_refused(policy, tmp_path):
    """The weights are the same, but images or units would be others."""
    adapted = common.attach_adapter(
        backbones.load_policy(TRY / "sft"), "lora", 2, 2, policy.adapter_targets, 0
    )
    common.save_adapter(adapted, tmp_path)
    common.load_adapter(backbones.load_policy(TRY / "sft"), tmp_path)
    other = backbones.load_policy(TRY / "sft", model={"normalisation": "mean_std"})
    one_line(lambda: common.load_adapter(other, tmp_path), "other settings", "normalisation")
    common.read_pairs(TRY / "prefs", backbones.load_policy(TRY / "sft"))
    one_line(lambda: common.read_pairs(TRY / "prefs", other), "other settings", "normalisation")


def test_an_adapter_that_says_nothing_of_its_policy_is_taken_with_a_warning(tmp_path, capsys):
    folder = copied(tmp_path, "lora")
    path = folder / "adapter_model.safetensors"
    disk.save_tensors(path, disk.load_tensors(path))
    common.load_adapter(backbones.load_policy(TRY / "sft"), folder)
    assert "does not say which policy" in capsys.readouterr().out


def test_a_trained_adapter_says_what_it_was_trained_on(tmp_path, policy):
    run_stage("03_dpo", CONFIG, f"root={tmp_path}", "dpo.steps=1", "dpo.beta=1", "dpo.batch_size=2")
    (path,) = tmp_path.rglob("adapter_model.safetensors")
    assert disk.facts_of(path) == origin_of(policy)


@pytest.mark.parametrize("targets", [".*q_proj.*", ".*q_proj"])
def test_targets_that_could_match_parts_of_an_adapter_make_the_same_origin(targets, policy, tmp_path):
    adapted = common.attach_adapter(backbones.load_policy(TRY / "sft"), "lora", 2, 2, targets, 0)
    common.save_adapter(adapted, tmp_path)
    assert disk.facts_of(tmp_path / "adapter_model.safetensors") == common.origin(policy, targets)


@pytest.mark.parametrize("key", ["bos", "vlm"])
def test_a_checkpoint_of_the_other_backbone_is_named_before_its_keys(key):
    load = backbones.load_policy
    for there, other in (("pi05", "openvla"), ("openvla", "pi05")):
        folder = TRY.parent / there / "sft"
        one_line(lambda f=folder, o=other: load(f, model={key: 1}, backbone=o), f"set backbone={there}")


def test_pairs_of_other_statistics_are_refused_by_07_too():
    validate = importlib.import_module("07_validate")
    four = HERE / "checkpoints" / "tiny_4suite" / "prefs"
    cfg = load(validate.Config, CONFIG, f"pairs_from={four}")
    one_line(lambda: validate.inputs_of(cfg, [0]), "other statistics")


def test_pairs_of_other_statistics_are_refused_and_those_of_other_weights_warned_of(capsys, policy):
    assert common.read_pairs(TRY / "prefs", policy) and capsys.readouterr().out == ""
    of_four = HERE / "checkpoints" / "tiny_4suite" / "prefs"
    one_line(lambda: common.read_pairs(of_four, policy), "other statistics")
    common.read_pairs(TRY / "prefs", backbones.load_policy(HERE / "checkpoints" / "tiny_libero_object"))
    assert "other weights" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- text, and what shows
def test_text_files_have_one_reader_which_takes_them_for_utf_8():
    """Whatever the locale. What the kernel writes, and a folder's name in YAML's escapes, is plain ASCII."""
    allowed = {"runtime/disk.py", "backbones/memory.py", "sim/env.py"}
    product = [p for p in (*HERE.glob("*.py"), *HERE.glob("*/*.py")) if p.parent.name != "tests"]
    for path in product:
        calls = r"(?<!disk)\.(?:read|write)_text\(|(?<![.\w])open\((?!.*(?:[rwa+]b\"|\.lock))"
        text = re.findall(calls, path.read_text(encoding="utf-8"))
        assert str(path.relative_to(HERE)) in allowed or not text, f"{path}: {text}"


def test_a_path_that_the_locale_cannot_spell_is_printed(tmp_path):
    code = "from runtime import stage; stage.command_line(lambda: print('root=\\u00e4\\u4e2d'))"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=env, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("root=\\xe4\\u4e2d\n", "")


def test_without_a_terminal_a_training_prints_a_line_from_time_to_time(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(workers, "LINE_S", 0.2)
    run = stage.Run(sft.Config(steps=8, log_every=1), tmp_path, {})
    run.parts, began = {}, time.time()
    for step in run.steps(0, 8):
        time.sleep(0.1)
        run.log(step, loss=0.5)
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= (time.time() - began) / 0.2 + 2
    assert all(line.startswith("sft: ") and " of 8 in " in line for line in lines)
    assert "loss=0.500" in lines[0] and "left" in lines[0]


def test_a_short_loop_prints_no_line(capsys):
    for _ in workers.progress(range(3), desc="x"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_single_long_job_is_seen_while_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(workers, "LINE_S", 0.5)
    began = time.time()
    workers.run(
        lambda job: time.sleep(3.5),
        [0],
        1,
        "eval sft",
        lambda: int(time.time() - began),
        9,
        lambda: "2 solved",
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2 and all(line.startswith("eval sft: ") for line in lines)
    assert all(" of 9 in " in line and "2 solved" in line for line in lines)


JOBS = """
import time
from runtime import stage, workers
def work(job):
    time.sleep(60)
if __name__ == "__main__":
    print("begun", flush=True)
    stage.command_line(lambda: workers.run(work, [1, 2], 2, "x", lambda: 0, 2))
"""


def test_ctrl_c_while_workers_import_says_nothing(tmp_path):
    (tmp_path / "jobs.py").write_text(JOBS)
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "start_new_session": True}
    env = os.environ | {"PYTHONPATH": str(HERE)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, tmp_path / "jobs.py"], env=env, **pipes, **heed)
    process.stdout.readline()
    parent, deadline = psutil.Process(process.pid), time.time() + 60
    while sum("spawn_main" in " ".join(child.cmdline()) for child in parent.children()) < 2:
        assert time.time() < deadline
        time.sleep(0.05)  # until both workers have begun; they import torch now
    os.killpg(process.pid, signal.SIGINT)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 130)


def test_elsewhere_than_on_linux_one_line_names_the_way():
    code = "import sys; sys.platform = 'win32'; import runtime"
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "Linux, not on win32" in result.stderr and "WSL2" in result.stderr


@pytest.mark.parametrize("script", ["01_sft.py", "04_eval.py"])
def test_help_lists_the_keys_of_a_stage(script):
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    result = subprocess.run(
        [sys.executable, HERE / script, "--help"], cwd="/", capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stderr == ""
    listed = [line.split(":")[0].strip() for line in result.stdout.splitlines()[1:]]
    assert set(listed) == set(vars(module.Config()))


def test_a_warning_about_beta_does_not_name_what_is_set_already(capsys):
    for late in (0.0, 100.0):
        rows = [{"rewards/margins": late, "rewards/margin_std": 0.0, "rewards/chosen": 0.0}]
        dpo.warn_about_scale(rows, dpo.Config(), 1.0)
        assert "warning" in (said := capsys.readouterr().out) and "beta" not in said
        dpo.warn_about_scale(rows, dpo.Config(beta="3"), 3.0)
        assert "dpo.beta=auto" in capsys.readouterr().out


def test_the_dry_run_of_the_report_says_what_it_would_do(tmp_path, capsys):
    report = importlib.import_module("08_report")
    report.main(load(report.Config, CONFIG, f"root={tmp_path}", "--dry-run"))
    assert f"writes {tmp_path}/try/report" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_demonstrations_are_read_where_files_cannot_be_locked(tmp_path):
    import h5py

    source = HERE / "checkpoints/try/data/libero_object/task_00.hdf5"
    path = Path(shutil.copyfile(source, tmp_path / "x.hdf5"))
    with h5py.File(path, "r+"):  # another program holds its lock
        code = "import sys, pathlib; from sim.demos import read_demos as read"
        code += f"; print(len([*read(pathlib.Path({str(path)!r}), 0)]))"
        result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert result.stdout == "2\n", result.stderr


def test_facts_of_a_file_have_one_order(tmp_path):
    with contextlib.suppress(FileNotFoundError):
        for name in "abcd":
            disk.save_tensors(
                tmp_path / name, {"x": torch.zeros(1)}, {str(i): json.dumps(i) for i in range(9)}
            )
    assert len({(tmp_path / name).read_bytes() for name in "abcd"}) == 1


# ------------------------------------------------------------------------------ what a stage would not notice
def made(name: str, **config) -> dict:
    """A done.json of a stage that names no files."""
    outputs = {"pairs.jsonl": "", "pairs.safetensors": ""} if name == "prefs" else {}
    return {"stage": name, "fingerprint": "", "inputs": {}, "config": config, "outputs": outputs}


def test_pairs_of_other_suites_or_tasks_are_refused(tmp_path):
    """03 trains on all pairs of the folder, so a record of other suites would be wrong."""
    folder = copied(tmp_path, "prefs")
    disk.write_json(folder / "done.json", made("prefs", suites=["libero_object"], tasks=[0]))
    given = (CONFIG, f"pairs_from={folder}", f"root={tmp_path / 'runs'}")
    assert load(dpo.Config, *given, "tasks=[0]").inputs()
    for other in ("tasks=[5]", "suites=[libero_goal]"):
        one_line(lambda other=other: load(dpo.Config, *given, "tasks=[0]", other).inputs(), "was made with")


def test_a_model_that_is_not_01s_is_refused(tmp_path):
    given = (CONFIG, f"root={tmp_path}", "checkpoint=")
    cfg = load(dpo.Config, *given)
    (cfg.seed_dir / "sft").mkdir(parents=True)
    disk.write_json(cfg.seed_dir / "sft" / "done.json", made("sft", model=cfg.model))
    assert cfg.sft_inputs()
    one_line(load(dpo.Config, *given, "model.prompt=lerobot").sft_inputs, "was made with model=")


def test_runs_inside_the_checkpoints_folder_are_refused(tmp_path):
    folder = copied(tmp_path, "sft")
    inside = load(dpo.Config, CONFIG, f"checkpoint={folder}", f"root={folder / 'runs'}")
    one_line(inside.sft_inputs, "lies in the checkpoint's folder")
    assert load(dpo.Config, CONFIG, f"checkpoint={folder}", f"root={tmp_path / 'runs'}").sft_inputs()


def test_text_files_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert disk.read_json(tmp_path / "x.json") == {"a": 1}


def test_help_names_the_script_that_was_called(monkeypatch, capsys):
    for called, name in (("extras/losses.py", "-m extras.losses"), ("03_dpo.py", "03_dpo.py")):
        monkeypatch.setattr(sys, "argv", [called])
        with pytest.raises(SystemExit):
            load(dpo.Config, "--help")
        assert f"usage: python {name} " in capsys.readouterr().out
