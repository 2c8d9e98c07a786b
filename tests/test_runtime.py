"""Configs, files, identities, run folders and resuming: what runtime/ promises to every stage.

pytest tests/test_runtime.py
"""

import contextlib
import copy
import fcntl
import importlib
import inspect
import json
import re
import resource
import runpy
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

import backbones
import common
from report import episodes
from runtime import disk, stage, workers
from runtime.config import HERE, STAGES, Count, load_config
from runtime.errors import UserError
from sim.demos import demonstrations
from sim.env import tasks

MICRO = str(HERE / "configs" / "micro.yaml")
MODULES = {section: command.removesuffix(".py").removeprefix("-m ") for section, command in STAGES.items()}
MAKING = [section for section in STAGES if section != "report"]  # what has an identity


def module_of(section: str):
    return importlib.import_module(MODULES[section])


@dataclass
class Config(common.PolicyConfig):
    section: ClassVar = "sft"
    steps: Count = 3
    lr: float = 1e-3
    snapshots: list[int] = field(default_factory=list)
    warmup: int = 1
    log_every: Count = 1
    checkpoint_every: Count = 2

    def inputs(self) -> list[Path]:
        return []


# ---------------------------------------------------------------------------------------------------- configs
def load(folder: Path, text: str, *overrides: str):
    path = folder / "exp.yaml"
    path.write_text(text)
    return load_config(Config, [str(path), *overrides])


def test_config_casts_by_type_and_command_line_wins(tmp_path):
    text = "seed: 7\nsft: {lr: 5e-5, steps: 1e2, snapshots: [1, 2]}\ndpo: {beta: 2}"
    cfg = load(tmp_path, text, "sft.steps=9", "dpo.beta=1")
    assert (cfg.name, cfg.seed, cfg.lr, cfg.steps, cfg.snapshots) == ("exp", 7, 5e-5, 9, [1, 2])


@pytest.mark.parametrize(
    "text, override, hint",
    [
        ("sft: {stesp: 3}", None, "did you mean 'steps'"),
        ("sed: 3", None, "did you mean 'seed'"),
        ("sft: {lr: fast}", None, "must be float"),
        ("sft: {lr: .nan}", None, "float"),
        ("sft: {lr: -1}", None, "must be at least 0"),
        ("sft: {steps: 0}", None, "must be at least 1"),
        ("sft: {steps: 1.5}", None, "must be int"),
        ("sft: {steps: true}", None, "must be int"),
        ("sft: [1]", None, "key: value"),
        ("- a", None, "key: value"),
        ("a: [", None, "not valid YAML"),
        ("backbone: pi", None, "did you mean 'pi05'"),
        ("", "steps", "not key=value"),
        ("", "sfft.steps=1", "did you mean 'sft'"),
        # this stage has no such key, so it would be lost
        ("sft: {execute: 3}", None, "unknown key 'execute'"),
        ("", "sft.execute=3", "unknown key 'execute'"),
        ("", "seed=0", "must be at least 1"),  # 0 stands for "as `seed`" where a seed is an option
        ("", "workers=two", "must be int"),
        ("", "tasks=[0,0]", "each once"),
        ("suites: [libero_goal, libero_goal]", None, "each once"),
    ],
)
def test_bad_config_is_one_line_that_names_the_key(tmp_path, text, override, hint):
    with pytest.raises(UserError, match=hint) as error:
        load(tmp_path, text, *([override] if override else []))
    assert "\n" not in str(error.value)


def test_a_key_of_the_model_is_laid_over_the_configs(tmp_path):
    text = "model: {horizon: 4, vlm: {width: 8}}\npi05: {model: {max_tokens: 9}}"
    assert load(tmp_path, "", "model={horizon: 4}", "model.prompt=x").model == {"horizon": 4, "prompt": "x"}
    for given, changed in (
        ([], {}),
        (["model.horizon=16", "model.prompt=lerobot"], {"horizon": 16, "prompt": "lerobot"}),
    ):
        assert (
            load(tmp_path, text, *given).model
            == {"horizon": 4, "vlm": {"width": 8}, "max_tokens": 9} | changed
        )


@pytest.mark.parametrize("name", ["2026_11_30", "2026-11-30", "1.10", "010", "true"])
def test_a_name_is_text(name, tmp_path):
    assert load(tmp_path, "", f"name={name}").name == name


@pytest.mark.parametrize("name", ["2026_11_30", "010", "12:30"])
def test_in_a_yaml_too(name, tmp_path):
    assert load(tmp_path, f"name: {name}").name == name


def test_a_slash_at_the_end_makes_no_other_experiment(tmp_path):
    given, plain = (load(tmp_path, "", f"init_from={tmp_path}/sft{end}") for end in ("/", ""))
    assert given.init_from == plain.init_from == f"{tmp_path}/sft"


def test_a_backbones_section_holds_for_it_alone(tmp_path):
    text = "seed: 1\nsft: {steps: 5, lr: 1e-4}\npi05: {sft: {steps: 6}, dtype: bfloat16}\n"
    text += "openvla: {sft: {steps: 7}, nonsense: 1}"
    cfg = load(tmp_path, text)
    assert (cfg.backbone, cfg.steps, cfg.lr, cfg.dtype, cfg.seed) == ("pi05", 6, 1e-4, "bfloat16", 1)
    assert load(tmp_path, text, "sft.steps=8").steps == 8  # the command line wins
    with pytest.raises(UserError, match="nonsense"):
        load(tmp_path, text, "backbone=openvla")
    with pytest.raises(UserError, match="key: value"):
        load(tmp_path, "pi05: [1]")


def test_a_config_laid_over_another(tmp_path):
    (tmp_path / "below.yaml").write_text("seed: 1\nsft: {steps: 5, lr: 1e-4}\npi05: {sft: {lr: 2e-4}}")
    cfg = load(tmp_path, "base: below.yaml\ndtype: bfloat16\nsft: {steps: 6}")
    assert (cfg.seed, cfg.steps, cfg.lr, cfg.dtype, cfg.name) == (1, 6, 2e-4, "bfloat16", "exp")
    (tmp_path / "below.yaml").write_text("pi05: {seed: 1, sft: {steps: 5, lr: 2e-4}}")
    child = "base: below.yaml\nseed: 2\nsft: {steps: 6}\npi05: {sft: {steps: 7}}\nopenvla: {seed: 3}"
    cfg = load(tmp_path, child)  # a file wins over its base, also over the base's section of the backbone
    assert (cfg.seed, cfg.steps, cfg.lr) == (2, 7, 2e-4)
    assert load(tmp_path, child, "backbone=openvla").seed == 3
    assert load(tmp_path, "base: below.yaml\nsft:").steps == 5, "an empty section changes nothing"
    with pytest.raises(UserError, match="unknown key 'base'"):
        load(tmp_path, "pi05: {base: below.yaml}")
    for base in ("exp.yaml", "[1]", "nowhere.yaml"):
        with pytest.raises(UserError, match=r"base|no config file"):
            load(tmp_path, f"base: {base}")


def test_missing_config_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        load_config(Config, ["configs/tinny.yaml"])


def test_a_shared_key_is_checked_by_every_stage_and_read_by_those_that_have_it(tmp_path):
    demos = importlib.import_module("00_demos")
    (tmp_path / "exp.yaml").write_text("seed: 7\nexecute: 3\n")
    cfg = load_config(demos.Config, [str(tmp_path / "exp.yaml"), "device=cpu"])
    assert not hasattr(cfg, "seed") and not hasattr(cfg, "execute") and not hasattr(cfg, "device")
    (tmp_path / "exp.yaml").write_text("seed: many")
    with pytest.raises(UserError, match="seed"):
        load_config(demos.Config, [str(tmp_path / "exp.yaml")])


def keys_read(code) -> set[str]:
    """The attributes of `cfg` in the source of a module or a function."""
    return set(re.findall(r"(?<![.\w])cfg\.([a-z]\w*)", inspect.getsource(code)))


@pytest.mark.parametrize("section", STAGES)
def test_a_stage_has_every_key_that_it_reads(section):
    module = module_of(section)
    keys = keys_read(module)
    for helper in (backbones.load_sft, backbones.propose, demonstrations, tasks):
        if f"{helper.__name__}(" in inspect.getsource(module):
            keys |= keys_read(helper)
    assert keys and not keys - set(dir(module.Config()))


@pytest.mark.parametrize("path", sorted((HERE / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_one_for_every_stage(path):
    if path.stem == "paper":  # the paper's claims, for the report
        return
    for section in STAGES:
        cfg = load_config(module_of(section).Config, [str(path), "device=cpu"])
        assert cfg.name == ("tiny_grid" if path.stem == "tiny_exact" else path.stem)  # it adds to its run


# ------------------------------------------------------------------------------------------------------ files
def test_a_line_that_a_kill_has_cut_does_not_count_and_the_next_one_takes_its_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    disk.append_jsonl(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"a": 2')
    cut = path.read_bytes()
    assert disk.read_jsonl(path, "a") == [{"a": 1}] and path.read_bytes() == cut, "reading writes nothing"
    disk.append_jsonl(path, {"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


@pytest.mark.parametrize(
    "text", ['{"a": 1}\nnonsense\n{"a": 2}\n', '{"a": 1}\n\n{"a": 2}\n', '{"b": 1}\n', "[1]\n"]
)
def test_a_damaged_line_that_is_not_the_last_is_one_error_line(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"rows\.jsonl is damaged .*remove its folder") as error:
        disk.read_jsonl(path, "a")
    assert "\n" not in str(error.value) and path.read_text() == text


def test_a_writer_waits_for_another_one(tmp_path):
    """So that none of them takes the other's line for one that a kill has cut."""
    path = tmp_path / "rows.jsonl"
    with ThreadPoolExecutor(1) as pool, open(path, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write('{"a": ')
        other.flush()
        writing = pool.submit(disk.append_jsonl, path, {"a": 2})
        time.sleep(0.3)
        assert not writing.done()
        other.write("1}\n")
        other.close()
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'


@contextlib.contextmanager
def room_for(n: int):
    """No file of this process may grow beyond n bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_line_without_room_is_no_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    disk.append_jsonl(path, {"a": 1})
    with room_for(path.stat().st_size + 5), pytest.raises(UserError, match="make room"):
        disk.append_jsonl(path, {"a": 2})
    assert disk.read_jsonl(path) == [{"a": 1}]
    disk.append_jsonl(path, {"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path, tensors = tmp_path / "file", {"x": torch.zeros(1000)}
    writers = [lambda: disk.write_json(path, "x" * 1000), lambda: disk.write_rows(path, [{"x": "x" * 1000}])]
    writers += [lambda: disk.save_tensors(path, tensors), lambda: disk.save_checkpoint(path, tensors)]
    for write in writers:
        path.write_text("old")
        with room_for(100), pytest.raises(UserError, match=f"{path} cannot be written"):
            write()
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
        write()
        assert path.stat().st_size >= 1000 and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, capsys):
    nowhere = tmp_path / "no" / "such" / "folder.json"
    for write, path in ((disk.append_jsonl, Path("/dev/full")), (disk.write_json, nowhere)):
        with pytest.raises(UserError, match=f"{path} cannot be written") as error:
            write(path, {"a": 1})
        assert "\n" not in str(error.value)
    for call in (lambda: Path("/dev/full").write_text("x"), lambda: Path("/dev/full/runs").mkdir()):
        with pytest.raises(SystemExit) as end:  # a library's own file
            stage.command_line(call)
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
        assert "root=" in said and ("make room" in said) == ("No space" in said)


# ----------------------------------------------------------------------------------------------- command line
def test_an_error_for_the_user_is_one_line_and_exit_code_2(capsys):
    def refuse():
        raise UserError("this is wrong;\ndo that")

    with pytest.raises(SystemExit) as end:
        stage.command_line(refuse)
    assert end.value.code == 2 and capsys.readouterr().err == "error: this is wrong; do that\n"


def test_a_mistake_in_the_code_shows_where(tmp_path):
    with pytest.raises(FileNotFoundError):
        stage.command_line(lambda: (tmp_path / "nowhere").read_text())
    with pytest.raises(KeyError):
        stage.command_line(lambda: {}["x"])


def test_ctrl_c_is_exit_code_130_without_a_word(capsys):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        stage.command_line(interrupt)
    assert end.value.code == 130 and capsys.readouterr() == ("", "")


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage, "PACKAGES", ("torch", "no-such-package"))
    cfg = Config(name="exp", root=str(tmp_path))
    cfg_type = placed(cfg, "sft")
    with pytest.raises(SystemExit):
        stage.command_line(lambda: stage.execute(nothing, cfg_type))
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "no-such-package is not installed; run: pip install" in said
    assert not (tmp_path / "exp").exists()


# --------------------------------------------------------------------------------------------------- identity
KIT = {  # what a script imports: here, in a function, two imports away, from a room, by a backbone
    "09_stage.py": "import near\nfrom room import part\ndef f():\n    import lazy\n",
    "near.py": "import far\nfrom runtime import disk\nfrom report import stats, tables\n",
    "far.py": "x = 1\n",
    "lazy.py": "from backbones import build\n",
    "room/__init__.py": "",
    "room/part.py": "from room.deep import y\nfrom runtime.seeds import stream\nimport runtime.disk\n",
    "room/deep.py": "y = 1\n",
    "backbones/__init__.py": "def build():\n    from backbones.pi05 import A\n    import backbones.openvla\n",
    "backbones/pi05.py": "A = 1\n",
    "backbones/openvla.py": "import backbones.openvla_images\n",
    "backbones/openvla_images.py": "",
    "runtime/__init__.py": "",
    "runtime/disk.py": "",
    "runtime/seeds.py": "",
    "report/__init__.py": "",
    "report/stats.py": "",
    "report/tables.py": "import lonely\n",
    "lonely.py": "",
}
NOT_PI05 = ("backbones/openvla.py", "backbones/openvla_images.py")
FREE = (
    *NOT_PI05,
    "runtime/__init__.py",
    "runtime/disk.py",
    "report/__init__.py",
    "report/tables.py",
    "lonely.py",
)


@pytest.fixture
def kit(tmp_path, monkeypatch) -> Path:
    """A small kit: the script 09_stage.py and what it imports."""
    for name, text in KIT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(stage, "HERE", tmp_path)
    stage.imports.cache_clear()
    yield tmp_path
    stage.imports.cache_clear()


def identity(kit: Path, **keys) -> str:
    stage.imports.cache_clear()  # which is for the life of a process
    cfg = placed(Config(name="exp", root=str(kit / "runs"), **keys), "sft")
    return stage.identity_of(kit / "09_stage.py", cfg)["fingerprint"]


@pytest.mark.parametrize("name", KIT)
def test_editing_what_a_script_imports_changes_its_identity(kit, name):
    before = identity(kit), identity(kit, backbone="openvla")
    with open(kit / name, "a") as file:
        file.write("\n# a comment\n")
    assert (identity(kit), identity(kit, backbone="openvla")) == before
    with open(kit / name, "a") as file:
        file.write("\nnew = 1\n")
    assert (identity(kit) != before[0]) == (name not in FREE)
    free = set(FREE) - {*NOT_PI05} | {"backbones/pi05.py"}
    assert (identity(kit, backbone="openvla") != before[1]) == (name not in free)


def test_an_import_that_is_new_counts(kit):
    before = identity(kit)
    (kit / "far.py").write_text("def g():\n    from lonely import *\n")
    after = identity(kit)
    (kit / "lonely.py").write_text("z = 1\n")
    assert len({before, after, identity(kit)}) == 3


def test_comments_docstrings_and_layout_are_no_code(tmp_path):
    one = 'def f(x):\n    """Doc."""\n    return x + 1\n'
    same = '# a comment\ndef f(x):\n    """Other words."""\n\n    return (x + 1)  # why\n'
    other = 'def f(x):\n    """Doc."""\n    return x + 2\n'
    hashes = []
    for code in (one, same, other):
        (tmp_path / "code.py").write_text(code)
        hashes.append(stage.source_hash(tmp_path / "code.py"))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("section", MAKING)
def test_no_file_of_a_stage_imports_by_a_name_that_it_computes(section):
    """The identity could not see it."""
    module = module_of(section)
    files = stage.code_of(Path(module.__file__), module.Config())
    names = [str(path.relative_to(HERE)) for path in files]
    own = str(Path(module.__file__).relative_to(HERE))
    assert {"common.py", "dora.py", "runtime/seeds.py", own} <= {*names}
    left_out = [name for name in names if name.startswith(("runtime", "report", "backbones/openvla"))]
    assert left_out == ["report/stats.py"] * (section == "head") + ["runtime/seeds.py"]  # 06 writes intervals
    for path in files:  # but for stages, which have numbers for names: `imports` reads them
        text = re.sub(r'importlib\.import_module\("[0-9a-z_]+"\)', "", path.read_text())
        assert not re.search(r"\b(import_module|__import__)\b", text), path.name


def fingerprint_with(section: str, monkeypatch, **keys) -> str:
    module = module_of(section)
    monkeypatch.setattr(module.Config, "inputs", lambda self: [])
    cfg = load_config(module.Config, [MICRO])
    for key, value in keys.items():
        setattr(cfg, key, value)
    return stage.identity_of(Path(module.__file__), cfg)["fingerprint"]


@pytest.mark.parametrize("section", MAKING)
def test_every_key_of_a_stage_counts_but_those_that_say_where_and_how_fast(section, monkeypatch):
    more = {"policy": "dpo"} if section == "eval" else {}
    before = fingerprint_with(section, monkeypatch, **more)
    keys = vars(load_config(module_of(section).Config, [MICRO])).keys()
    of_place = {"name", "root", "stages", "adapters", "workers", "dry_run", "overwrite"}
    counted_by_input = {"start_seed", "pairs_from", "adapters_from"}
    assert len(keys - of_place - counted_by_input) > 3
    for key in keys:
        other = fingerprint_with(
            section, monkeypatch, **more | {key: "dpo?" if key == "policy" else "another"}
        )
        assert (other != before) == (key not in of_place | counted_by_input), key


@pytest.mark.parametrize("key", ["adapter", "pairs", "surrogate", "held_out"])
def test_an_evaluation_of_the_sft_policy_does_not_depend_on_dpo(key, monkeypatch):
    sft, dpo = (fingerprint_with("eval", monkeypatch, policy=policy) for policy in ("sft", "dpo"))
    assert fingerprint_with("eval", monkeypatch, policy="sft", **{key: "another"}) == sft
    assert fingerprint_with("eval", monkeypatch, policy="dpo", **{key: "another"}) != dpo


def test_a_key_that_is_left_out_counts_by_the_input_that_it_names(tmp_path):
    profile = importlib.import_module("05_profile")
    names = []
    for seed in (42, 43):
        folder = tmp_path / "micro" / "pi05" / f"seed{seed}" / "sft"
        folder.mkdir(parents=True)
        disk.write_json(folder / "done.json", {"stage": "01_sft", "fingerprint": "the same", "inputs": {}})
        cfg = load_config(profile.Config, [MICRO, f"root={tmp_path}", f"start_seed={seed}"])
        names.append(stage.identity_of(Path(profile.__file__), cfg)["inputs"])
    assert names == [{f"pi05/seed{seed}/sft": "the same"} for seed in (42, 43)]


# ------------------------------------------------------------------------------------------------ run folders
def placed(cfg, folder: str, *inputs: Path):
    """The config of a stage that reads `inputs` and writes `folder` of its run."""
    cfg = copy.copy(cfg)
    members = {"folder": cfg.run_dir / folder, "inputs": lambda self: list(inputs)}
    cfg.__class__ = type("Config", (type(cfg),), members)
    return cfg


class Killed(BaseException):
    pass


def nothing(cfg, run) -> None:
    """A stage's main."""


def write(cfg, run) -> dict:
    """A stage's main: it makes a file and a video."""
    for name in ("model.bin", "videos/a.gif"):
        (run.dir / name).parent.mkdir(exist_ok=True)
        (run.dir / name).write_text("x")
    return {"fact": 1}


def make(root: Path, folder: str, *inputs: Path, main=write, **keys) -> Path:
    """Run a stage; returns its folder."""
    cfg = placed(Config(name="exp", root=str(root), **keys), folder, *inputs)
    stage.execute(main, cfg)
    return cfg.folder


def test_a_stage_is_skipped_resumed_refused_and_redone(tmp_path, capsys):
    def die(cfg, run):
        (run.dir / "half").write_text("x")
        run.lock.close()  # as the system does where a process ends
        raise Killed

    with pytest.raises(Killed):
        make(tmp_path, "sft", main=die)
    assert capsys.readouterr().out == ""
    folder = make(tmp_path, "sft")
    assert "goes on in" in capsys.readouterr().out
    assert (folder / "half").exists() and disk.read_json(folder / "done.json")["fact"] == 1
    make(tmp_path, "sft", workers=7, main=die)  # workers never change a result, and main is not called
    assert "already done" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^.*config steps 3 -> 4; add overwrite=true to replace it$"):
        make(tmp_path, "sft", steps=4)
    assert (folder / "half").exists()
    make(tmp_path, "sft", steps=4, overwrite=True)
    assert "redone, because of: config steps 3 -> 4" in capsys.readouterr().out
    assert not (folder / "half").exists()
    assert disk.read_json(folder / "done.json")["config"]["steps"] == 4


def test_what_a_kill_right_after_the_end_has_left_goes_with_the_next_start(tmp_path):
    folder = make(tmp_path, "eval")
    for left in ("started.json", "played.jsonl", "checkpoint.pt"):
        (folder / left).write_text("{}")
    make(tmp_path, "eval")
    assert {path.name for path in folder.iterdir()} == {"done.json", "timing.json", "model.bin", "videos"}


def test_two_runs_at_once_are_one(tmp_path):
    def again(cfg, run):
        with pytest.raises(UserError, match="another process is at work"):
            make(tmp_path, "sft")
        return write(cfg, run)

    assert (make(tmp_path, "sft", main=again) / "done.json").is_file()


def test_a_table_of_what_is_there_is_made_every_time(tmp_path):
    shown = []
    for _ in range(2):
        stage.execute(write, placed(Config(name="exp", root=str(tmp_path)), "sft"), after=shown.append)
    assert len(shown) == 2


def test_an_edit_while_a_stage_runs_does_not_pass_for_one_version(tmp_path, monkeypatch):
    def edit(cfg, run):
        monkeypatch.setattr(stage, "source_hash", lambda path: "edited")

    with pytest.raises(UserError, match=r"\.py was edited while the stage ran.*run it again"):
        make(tmp_path, "sft", main=edit)
    assert not (tmp_path / "exp" / "sft" / "done.json").exists()


def test_files_that_no_stage_has_signed_are_not_removed(tmp_path):
    precious = tmp_path / "exp" / "sft" / "precious.hdf5"
    precious.parent.mkdir(parents=True)
    precious.write_text("x")
    for overwrite in (False, True):  # run_all.sh always says true
        with pytest.raises(UserError, match=r"no done.json of the stage that made them; move them away"):
            make(tmp_path, "sft", overwrite=overwrite)
    assert precious.exists()


def test_a_kill_while_an_old_folder_is_removed_leaves_nothing_behind(tmp_path, monkeypatch):
    sft = make(tmp_path, "sft")
    for killed_at in (0, 1):
        calls = []

        def rmtree(path, ignore_errors=False, calls=calls, at=killed_at, real=shutil.rmtree):
            calls.append(path)
            return sys.exit(9) if len(calls) > at else real(path, ignore_errors)

        monkeypatch.setattr(stage.shutil, "rmtree", rmtree)
        with pytest.raises(SystemExit):
            make(tmp_path, "sft", steps=9 + killed_at, overwrite=True)
        assert len(calls) == killed_at + 1
        monkeypatch.undo()
        make(tmp_path, "sft", steps=20 + killed_at, overwrite=True)
        assert {path.name for path in sft.parent.iterdir()} == {".sft.lock", "sft"}


def test_processes_share_a_cpu_and_not_a_gpu(tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(stage.ranks, "launch", launched.append)
    for device in ("cuda", "cpu"):
        cfg = placed(Config(name=device, root=str(tmp_path), device=device), "sft")
        cfg.processes = 2
        stage.execute(write, cfg)
        assert (cfg.folder / "done.json").is_file()
    assert launched == [2]


def test_what_was_made_from_an_older_input_is_refused(tmp_path):
    sft = make(tmp_path, "sft")
    dpo = make(tmp_path, "dpo", sft)
    make(tmp_path, "eval", sft, dpo)
    make(tmp_path, "sft", steps=9, overwrite=True)
    with pytest.raises(
        UserError, match=r"dpo was made from another sft; run `python -m extras.test_runtime CONFIG` again"
    ):
        make(tmp_path, "eval", sft, dpo)


def test_what_was_made_from_an_older_checkpoint_is_refused(tmp_path):
    weights = tmp_path / "model.safetensors"  # outside the run
    weights.write_bytes(b"one")
    dpo = make(tmp_path, "dpo", weights)
    make(tmp_path, "eval", weights, dpo)
    weights.write_bytes(b"another")
    with pytest.raises(UserError, match=r"dpo was made from another .*model\.safetensors"):
        make(tmp_path, "eval", weights, dpo)


def test_a_stages_folder_is_known_as_a_checkpoint_by_what_it_made(tmp_path):
    """Not by how long it took: weights that were trained again, bit for bit, are the same checkpoint."""
    weights = {"weight": torch.zeros(1)}
    made = make(tmp_path, "sft", main=lambda cfg, run: save_file(weights, run.dir / "model.safetensors"))
    assert (made / "timing.json").is_file()
    assert [path.name for path in stage.checkpoint_files(str(made))] == ["model.safetensors"]
    (made / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds none of the files"):
        stage.checkpoint_files(str(made))


def test_an_output_that_is_gone_is_noticed_and_the_remedy_helps(tmp_path):
    sft = make(tmp_path, "sft")
    (sft / "videos" / "a.gif").unlink()  # nobody reads it
    make(tmp_path, "dpo", sft)
    (sft / "model.bin").unlink()
    with pytest.raises(
        UserError,
        match=r"model\.bin is missing; run `python -m extras.test_runtime CONFIG` again, with overwrite=true",
    ):
        make(tmp_path, "eval", sft)
    with pytest.raises(UserError, match=r"model\.bin is missing; add overwrite=true"):
        make(tmp_path, "sft")
    make(tmp_path, "sft", overwrite=True)
    make(tmp_path, "eval", sft)


def test_an_output_that_was_edited_is_noticed_by_who_reads_it(tmp_path):
    sft = make(tmp_path, "sft")
    (sft / "model.bin").write_text("y")
    with pytest.raises(UserError, match=r"model\.bin is damaged, or was edited; remove"):
        make(tmp_path, "dpo", sft)


def test_done_json_holds_the_hash_of_every_file_and_nothing_else_is_left(tmp_path):
    def main(cfg, run):
        for name in ("a.txt", "checkpoint.pt", "played.jsonl", ".b.txt.7.tmp"):
            (run.dir / name).write_text("x")
        (run.dir / ".somebodys_folder").mkdir()
        run.times["steps_s"] = 2

    folder = make(tmp_path, "sft", main=main)
    done = json.loads((folder / "done.json").read_text())
    assert done["outputs"] == {"a.txt": disk.sha256(folder / "a.txt")}
    left = {"a.txt", "done.json", "timing.json", ".somebodys_folder"}
    assert {path.name for path in folder.iterdir()} == left
    assert disk.read_json(folder / "timing.json")["steps_s"] == 2


def test_missing_input_names_the_stage_to_run(tmp_path):
    with pytest.raises(UserError, match=r"run `python 01_sft\.py CONFIG seed=3` first"):
        stage.require(tmp_path / "sft", "sft", " seed=3")


def test_a_stage_that_cannot_be_shared_says_so_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it with python, not with torchrun"):
        make(tmp_path, "sft")
    cfg = placed(Config(name="exp", root=str(tmp_path)), "sft")
    type(cfg).by_torchrun, type(cfg).batch_size = True, 3
    with pytest.raises(
        UserError, match=r"sft\.batch_size=3 can't be split over 2 processes; make it a multiple"
    ):
        stage.execute(nothing, cfg)
    assert not (tmp_path / "exp").exists()


# --------------------------------------------------------------------------------------------------- resuming
def training(die_at: int):
    """A stage's main: a training of two weights that is killed at one of its steps, or at none."""

    def main(cfg, run):
        model = torch.nn.Linear(2, 1)
        for parameter in model.parameters():
            torch.nn.init.ones_(parameter)
        free = torch.nn.ParameterList([model.bias])
        optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
        first = run.resume(model=model, free=free, optimizer=optimizer)
        for step in run.steps(first, cfg.steps):
            loss = model(torch.randn(8, 2, generator=common.stream(1, "x", step))).square().mean()
            run.check(loss, step)
            loss.backward()
            lr = run.set_learning_rate(optimizer, step)
            optimizer.step()
            optimizer.zero_grad()
            run.log(step, loss=loss.item(), lr=lr)
            if step == die_at:
                run.lock.close()
                raise Killed
        run.save("model.safetensors", model.state_dict())

    return main


@pytest.mark.parametrize("die_at", range(5))
def test_a_training_killed_after_any_step_gives_the_same_bits(tmp_path, die_at):
    whole = make(tmp_path, "whole", main=training(-1), steps=5)
    with pytest.raises(Killed):
        make(tmp_path, "killed", main=training(die_at), steps=5)
    killed = make(tmp_path, "killed", main=training(-1), steps=5)
    assert len(disk.read_jsonl(whole / "metrics.jsonl")) == 5
    done = [disk.read_json(folder / "done.json")["outputs"] for folder in (whole, killed)]
    assert done[0] == done[1] and done[0].keys() == {"metrics.jsonl", "model.safetensors"}


def test_a_loss_that_is_not_finite_is_one_line_with_a_remedy():
    run = stage.Run(Config(), Path(), {})
    with pytest.raises(UserError, match=r"the loss is nan at step 7: lower sft\.lr"):
        run.check(torch.tensor(float("nan")), 7)


# -------------------------------------------------------------------------------------------------- --dry-run
def dry_run(script: str, root: Path, monkeypatch, capsys) -> str:
    """What a script prints with --dry-run."""
    given = f"init_from={HERE / 'checkpoints/tiny_libero_object'}"
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", [script, MICRO, "--dry-run", f"root={root / 'runs'}", given])
    runpy.run_path(str(HERE / script), run_name="__main__")  # SystemExit where it fails
    return capsys.readouterr().out


@pytest.mark.parametrize("script", [command for command in STAGES.values() if command.endswith(".py")])
def test_a_dry_run_writes_nothing(script, tmp_path, monkeypatch, capsys):
    said = dry_run(script, tmp_path, monkeypatch, capsys)
    assert f"[{Path(script).stem}] " in said or script == "08_report.py"
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_what_is_missing(tmp_path, monkeypatch, capsys):
    said = dry_run("03_dpo.py", tmp_path, monkeypatch, capsys)
    assert "could not begin yet: " in said and "run `python 01_sft.py" in said


def test_a_dry_run_says_what_is_there(tmp_path, capsys):
    cfg = placed(Config(name="exp", root=str(tmp_path), dry_run=True), "sft", tmp_path / "weights")
    stage.execute(nothing, cfg)
    said = capsys.readouterr().out
    assert f"reads {tmp_path / 'weights'}" in said and "which is not finished" in said
    make(tmp_path, "sft")
    stage.execute(nothing, cfg)
    assert "which is finished already" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- workers
WORK = """
import os, time
from runtime.errors import UserError
def work(job):
    path, kind = job
    path.write_text(str(os.getpid()))
    if kind == "hangs":
        time.sleep(600)
    while kind != "hangs" and not sum(len(p.read_text()) > 0 for p in path.parent.iterdir()) == 2:
        time.sleep(0.05)
    if kind == "refuses":
        raise UserError("no more of this")
    if kind == "fails":
        raise ValueError("planted")
"""


@pytest.mark.parametrize("kind, error", [("refuses", UserError), ("fails", ValueError)])
def test_an_error_ends_the_other_workers_at_once(kind, error, tmp_path, monkeypatch):
    (tmp_path / "jobs_of_a_test.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    work, out = importlib.import_module("jobs_of_a_test").work, tmp_path / "out"
    out.mkdir()
    jobs, began = [(out / "a", "hangs"), (out / "b", kind)], time.time()
    with pytest.raises(error) as caught:
        workers.run(work, jobs, 2, "work", lambda: 0, 2)
    assert time.time() - began < 120
    assert not any(Path("/proc", path.read_text()).exists() for path, _ in jobs)
    assert kind == "refuses" or "in work" in str(caught.value.__cause__), "the worker's traceback"


def test_jobs_whose_files_are_there_are_not_done_again(tmp_path):
    jobs = {tmp_path / name: name for name in "abc"}
    (tmp_path / "b").touch()
    done = []
    workers.run_missing(lambda name: done.append(name) or (tmp_path / name).touch(), jobs, 1, "jobs")
    assert done == ["a", "c"]
    workers.run_missing(done.append, jobs, 1, "jobs")
    assert done == ["a", "c"]


def test_one_worker_works_here_on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []
        workers.run(lambda job: seen.append((job, torch.get_num_threads())), [1, 2], 1, "", lambda: 0, 2)
        assert seen == [(1, 1), (2, 1)]
    finally:
        torch.set_num_threads(threads)


def test_a_long_loop_without_a_terminal_prints_lines_to_its_end(monkeypatch, capsys):
    monkeypatch.setattr(workers, "LINE_S", 0)
    done = []
    workers.run(done.append, range(3), 1, "work", lambda: len(done), 3)
    assert "work: 3 of 3" in capsys.readouterr().out
    list(workers.progress(range(2), total=2, desc="again"))
    assert "again: 2 of 2" in capsys.readouterr().out


# ----------------------------------------------------------------------------- what an attack on it has found
def test_a_stage_never_removes_its_own_input(tmp_path):
    (weights := make(tmp_path, "sft") / "weights").mkdir()
    (weights / "model.safetensors").write_text("x")
    with pytest.raises(UserError, match=r"lies in .*, which this stage would replace"):
        make(tmp_path, "sft", weights / "model.safetensors", overwrite=True)
    assert (weights / "model.safetensors").is_file()
    make(tmp_path, "dpo")  # nor its own done.json, where it refuses to be redone
    with pytest.raises(UserError, match="would replace"):
        make(tmp_path, "dpo", tmp_path / "exp/dpo/done.json", overwrite=True)
    assert (tmp_path / "exp/dpo/done.json").is_file()


def test_a_folder_that_is_a_link_is_one_true_line(tmp_path):
    (tmp_path / "exp").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "exp/sft").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link or a file"):
        make(tmp_path, "sft", overwrite=True)


@pytest.mark.parametrize("name", ["model-4.safetensors", "metrics.jsonl"])
def test_a_damaged_file_of_an_interrupted_stage_is_not_signed(tmp_path, name):
    def main(cfg, run):
        (run.dir / name).write_text("no tensor\n")

    with pytest.raises(UserError, match=f"{name} (is damaged|cannot be read)"):
        make(tmp_path, "sft", main=main)
    assert not (tmp_path / "exp/sft/done.json").exists()


def test_a_start_that_made_nothing_does_not_block_the_corrected_command(tmp_path):
    def refuse(cfg, run):
        run.lock.close()
        raise UserError("no such layer")

    with pytest.raises(UserError, match="no such layer"):
        make(tmp_path, "sft", main=refuse, steps=7)
    assert (make(tmp_path, "sft", steps=8) / "done.json").is_file()


def test_a_row_that_stands_twice_is_an_episode_once(tmp_path):
    row = {"suite": "s", "task": 0, "init_state": 1, "success": True, "steps": 3, "crash": "", "wall_s": 1.0}
    disk.write_rows(tmp_path / "played.jsonl", [row, row, row | {"init_state": 2}])
    run = stage.Run(Config(), tmp_path, {"config": {"seed": 1}})
    episodes.finish(run)
    assert [r["init_state"] for r in disk.read_jsonl(tmp_path / "episodes.jsonl")] == [1, 2]


def test_the_backbone_is_no_key_of_one_section(tmp_path):
    for text, override in (("sft: {backbone: openvla}", []), ("", ["sft.backbone=openvla"])):
        with pytest.raises(UserError, match="at the top level"):
            load(tmp_path, text, *override)


def test_the_checkpoint_maker_removes_nothing_without_a_run(tmp_path):
    maker = importlib.import_module("write_checkpoints")
    with pytest.raises(UserError, match="give the folder of a finished run"):
        maker.main(tmp_path)
    assert (HERE / "checkpoints/try/pi05/sft").is_dir()
