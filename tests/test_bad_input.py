"""Bad input, generated: configs, demonstrations, checkpoints, pairs, JSON.

Each must give one line that says what is wrong. Nothing of it is executed, and nothing is written.
pytest tests/test_bad_input.py: some hundred inputs. With LONG=1 ten times as many (bash tests/run.sh --long).
"""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import typing
from pathlib import Path
from typing import Annotated, Literal

import h5py
import numpy as np
import published_files
import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from samples import INSTRUCTIONS, STATES, write_demonstrations

import backbones
import common
from runtime import config, disk, stage
from runtime.errors import UserError
from sim.demos import read_demos

MODULES = {
    section: importlib.import_module(command.removeprefix("-m ").removesuffix(".py"))
    for section, command in config.STAGES.items()
}
STAGES = {section: module.Config for section, module in MODULES.items()}
demos, sft, prefs, dpo, evaluation, *_ = MODULES.values()
head = MODULES["head"]
SIZE = {"width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VISION |= {"image_size": 32, "patch_size": 16}
MODEL = {"vlm": SIZE, "expert": SIZE, "vision": VISION, "horizon": 4, "flow_dim": 7}


def inputs(n: int):
    """n generated inputs of a test, the same in every run; ten times as many with LONG=1."""
    n *= 10 if os.environ.get("LONG") else 1
    always = {"derandomize": True, "database": None, "deadline": None}
    return settings(max_examples=n, suppress_health_check=list(HealthCheck), **always)


def tree(folder: Path) -> dict:
    """All that a folder holds."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(folder: Path, read) -> str:
    """`read` says in one line what is wrong, and leaves the folder as it was."""
    before = tree(folder)
    with pytest.raises(UserError) as error:
        read()
    text = str(error.value)
    assert text and "\n" not in text, text
    assert tree(folder) == before
    return text


class Bomb:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def bombs(folder: Path) -> list[bytes]:
    """What a pickle of various makes looks like."""
    torch.save({"weight": torch.zeros(2), "x": Bomb(folder / "executed")}, folder / "zip.pt")
    legacy = folder / "legacy.pt"
    torch.save({"x": Bomb(folder / "executed")}, legacy, _use_new_zipfile_serialization=False)
    made = [pickle.dumps(Bomb(folder / "executed")), (folder / "zip.pt").read_bytes(), legacy.read_bytes()]
    for path in folder.iterdir():
        path.unlink()
    return made


# ---------------------------------------------------------------------------------------------------- configs
ANY = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANY |= st.lists(st.integers(), max_size=2)
NO_NUMBERS = ["many", None, True, [1], {"a": 1}, math.nan, math.inf, -math.inf, "1e999", "", "0x", "--1"]
NO_LISTS = [5, "a", None, {"a": 1}, [None], [[1]], [True], ["a"], [-1], [1.5]]


def wrong(kind) -> st.SearchStrategy:
    """Values that a key of this type does not take."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    least, most = 0, config.LARGEST
    if origin is Literal:
        return st.sampled_from(["nonsense", None, True, 5, [1], {"a": 1}, ""])
    if origin is list:
        return st.sampled_from(NO_LISTS)
    if origin is Annotated:
        kind, least, most = (*arguments, most)[:3]
    if kind is str:
        return st.sampled_from([None, True, [1], {"a": 1}, "\0", [], *(["../x"] if least else [])])
    if kind is bool:
        return st.sampled_from([1, 0.5, "yes please", None, [True]])
    if kind is dict:
        return st.sampled_from([5, "a", [1], True])
    beyond = st.integers(max_value=math.ceil(least) - 1) | st.integers(min_value=math.floor(most) + 1)
    between = st.floats(0.1, 0.9) if kind is int else st.floats(max_value=least - 0.01, allow_infinity=False)
    return st.sampled_from(NO_NUMBERS) | beyond | between


def keys_of(section: str) -> dict:
    """Name -> type of the keys that a config may give to a stage: its own, and those that stages share."""
    hints = typing.get_type_hints(STAGES[section], include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(STAGES[section])} | config.shared_keys()


@st.composite
def a_wrong_value(draw) -> tuple[str, dict]:
    """A stage, and a config with one value of a kind that its key does not take."""
    section = draw(st.sampled_from(list(STAGES)))
    key, kind = draw(st.sampled_from(list(keys_of(section).items())))
    value = draw(wrong(kind))
    shared = key in config.shared_keys() and draw(st.booleans())
    return section, {key: value} if shared else {section: {key: value}}


def load(folder: Path, section: str, content: str | bytes, *overrides: str) -> str:
    """The line in which a stage refuses a config."""
    path = folder / "exp.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return refused(folder, lambda: config.load_config(STAGES[section], [str(path), *overrides]))


@inputs(150)
@given(a_wrong_value())
def test_a_config_with_a_wrong_value(case):
    section, content = case
    assert STAGES[section]().name == ""  # the defaults are fine
    with tempfile.TemporaryDirectory() as folder:
        load(Path(folder), section, yaml.safe_dump(content))


@inputs(30)
@given(st.sampled_from(list(STAGES)), st.text(min_size=1, max_size=12), st.booleans())
def test_a_config_with_an_unknown_key(section, key, inside):
    assume(key not in {"base", *keys_of(section), *STAGES, *config.BACKBONES})
    with tempfile.TemporaryDirectory() as folder:
        load(Path(folder), section, yaml.safe_dump({section: {key: 1}} if inside else {key: 1}))


NO_YAML = ["a: [", "a: 1\n b: 2", "\t", "a: b: c", "\x07", "- 1", "text", "5", "[" * 5000, "{a: " * 3000]
NO_YAML += ["? [1]\n: 2", "seed: *nowhere", "seed: 2020-99-99", "seed: !!int x", "seed: !!binary x"]
NO_YAML += ["seed: !!python/object/apply:os.system ['false']", b"\xff\xfe\x00", b"seed: \x80"]
NO_YAML += ["base: exp.yaml", "base: [1]", "base: ../exp.yaml", "base: /etc/passwd", "base: nowhere.yaml"]
NO_YAML += ["model: {a: 2020-01-01}", "model: {1: 2, a: 3}", "model: &x {a: *x}", "model: {a: .nan}"]
NO_YAML += ["pi05: {sft: 5}", "pi05: {model: 5}", "seed: 0x" + 5000 * "f", 'sft: {steps: "-5\\n"}']


@pytest.mark.parametrize("text", NO_YAML, ids=range(len(NO_YAML)))
def test_a_file_that_is_no_config(text, tmp_path):
    load(tmp_path, "sft", text)


def test_configs_that_are_laid_over_one_another_in_a_ring(tmp_path):
    (tmp_path / "a.yaml").write_text("base: exp.yaml")
    assert "base" in load(tmp_path, "sft", "base: a.yaml")


@inputs(30)
@given(st.binary(max_size=60))
def test_any_bytes_as_a_config_are_a_config_or_one_line(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "exp.yaml"
        path.write_bytes(content)
        try:
            config.load_config(STAGES["sft"], [str(path)])
        except UserError as error:
            assert "\n" not in str(error)


SENSELESS = [
    ("demos", "name: ../elsewhere"),
    ("demos", "name: a/b"),
    ("demos", "name: .."),
    ("sft", "suites: []"),
    ("sft", "suites: [libero_objects]"),
    ("eval", "start: ../../x"),
    ("eval", "start: 1e3x"),
    ("prefs", "backbone: ../x"),
    ("sft", "backbone: pi0"),
    ("eval", "image_size: 5000"),
    ("sft", "sft: {ema: 1.5}"),
    ("dpo", "dpo: {beta: e-5}"),
    ("dpo", "dpo: {beta: 1e-}"),
    ("dpo", "dpo: {beta: '²'}"),
    ("dpo", "dpo: {beta: 0}"),
    ("dpo", "dpo: {beta: .inf}"),
    ("dpo", "dpo: {alpha: 0}"),
    ("dpo", "{surrogate: independent, dpo: {weight: elbo}}"),
    ("dpo", "dpo: {contrast: 0, sft_coef: 0}"),
    ("dpo", "{backbone: openvla, dpo: {weight: noise}}"),
    ("sft", "device: gpu"),
]


@pytest.mark.parametrize(("section", "text"), SENSELESS, ids=[text for _, text in SENSELESS])
def test_a_config_that_makes_no_sense(section, text, tmp_path):
    load(tmp_path, section, text)


REFUSED = [  # before a stage writes anything
    (demos, {"n_init": 21}, "choose 1 to 20"),
    (demos, {"tasks": [10]}, "10"),
    (demos, {"suites": ["libero_90"]}, "the expert cannot do"),
    (demos, {"source": "nowhere"}, "nowhere"),
    (sft, {}, "run `python 00_demos.py CONFIG name=x"),
    (sft, {"model": {"horizon": 0}}, "model.horizon"),
    (sft, {"init_from": "nowhere"}, "no checkpoint nowhere"),
    (prefs, {}, "run `python 01_sft.py CONFIG name=x"),
    (prefs, {"n_init": 16}, "choose 1 to 15"),
    (prefs, {"start_seed": 7}, "seed=7"),
    (prefs, {"pairs": "episode", "candidates": 1}, "set prefs.candidates to 2 or more"),
    (prefs, {"pairs": "whole", "noise_scale": 0, "noise_low": 0, "noise_high": 0}, "some noise"),
    (prefs, {"checkpoint": "nowhere"}, "no checkpoint nowhere"),
    (dpo, {}, "run `python 01_sft.py CONFIG name=x"),
    (dpo, {"checkpoint": "TMP/policy"}, "run `python 02_collect_prefs.py CONFIG name=x"),
    (dpo, {"checkpoint": "TMP/policy"}, "checkpoint=TMP/policy` first"),
    (dpo, {"checkpoint": "TMP/policy", "pairs_from": "nowhere"}, "nowhere"),
    (head, {}, "run `python 00_demos.py CONFIG name=x"),
    (evaluation, {"n_init": 11}, "choose 1 to 10"),
    (evaluation, {"checkpoint": "TMP/policy", "tasks": [10]}, "10"),
    (evaluation, {"checkpoint": "TMP/policy", "policy": "dpo"}, "run `python 03_dpo.py CONFIG name=x"),
    (evaluation, {"checkpoint": "TMP/policy", "policy": "dpo", "adapters_from": "nowhere"}, "nowhere"),
]


@pytest.mark.parametrize(("module", "values", "line"), REFUSED)
def test_what_a_stage_refuses_before_it_writes(module, values, line, tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "model.safetensors").touch()
    values = {k: v.replace("TMP", str(tmp_path)) if isinstance(v, str) else v for k, v in values.items()}
    cfg = module.Config(name="x", root=str(tmp_path / "runs"), **values)
    assert line.replace("TMP", str(tmp_path)) in refused(tmp_path, lambda: stage.execute(module.main, cfg))


@pytest.mark.parametrize(
    "override",
    ["steps", "root=a #b", "=", "sft.steps=", "sft.steps=[", "sft.steps=2020-99-99", "x.steps=1", "sft.=1"],
)
def test_an_argument_that_is_none(override, tmp_path):
    load(tmp_path, "sft", "seed: 1", override)


@st.composite
def a_wrong_size(draw) -> dict:
    """A model section with one size that is none."""
    model = {key: dict(value) if isinstance(value, dict) else value for key, value in MODEL.items()}
    paths = [(key,) for key in model]
    paths += [(key, inner) for key, value in model.items() if isinstance(value, dict) for inner in value]
    path = draw(st.sampled_from(paths))
    within = model if len(path) == 1 else model[path[0]]
    kind = dict if isinstance(within[path[-1]], dict) else int
    within[path[-1]] = draw(wrong(kind) | st.none() | (st.just(0) if kind is int else st.just([[1]])))
    return model


@inputs(40)
@given(a_wrong_size())
def test_a_model_with_a_wrong_size(model):
    with pytest.raises(UserError) as error:
        backbones.horizon("pi05", model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("backbone", "model"),
    [
        ("pi05", {"vlm": SIZE | {"head_dim": 15}, "expert": SIZE | {"head_dim": 15}}),
        ("pi05", {"vlm": SIZE | {"num_kv_heads": 3}, "expert": SIZE | {"num_kv_heads": 3}}),
        ("pi05", {"vision": MODEL["vision"] | {"num_attention_heads": 3}}),
        ("pi05", {"vision": MODEL["vision"] | {"patch_size": 64}}),
        ("pi05", {"conv_stem": True, "vision": MODEL["vision"] | {"patch_size": 24, "image_size": 48}}),
        ("pi05", {"conv_stem": True, "vision": MODEL["vision"] | {"patch_size": 16, "image_size": 40}}),
        ("pi05", {"conv_stem": True, "vision": MODEL["vision"] | {"hidden_size": 20}}),
        ("openvla", {"conv_stem": True, "patch_size": 16, "image_size": 40}),
        ("pi05", {"prompt_state_dims": 7}),
        ("pi05", {"flow_dim": 6}),
        ("pi05", {"cameras": []}),
        ("pi05", {"cameras": ["front"]}),
        ("pi05", {"normalisation": "none"}),
        ("openvla", {"llm": {"width": 30, "depth": 1, "mlp_dim": 4, "num_heads": 4}}),
        ("openvla", {"n_bins": 1}),
        ("openvla", {"prompt": "do {this}"}),
        ("openvla", {"prompt": "do {"}),
        ("openvla", {"prompt": "an instruction is missing"}),
        ("openvla", {"prompt": "{{task}}"}),
        ("openvla", {"towers": []}),
        ("openvla", {"space": 40000}),
    ],
)
def test_a_model_whose_sizes_do_not_fit(backbone, model):
    with pytest.raises(UserError) as error:
        backbones.horizon(backbone, model)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------- demonstrations
NO_STEPS = [[0, 4, 8, 13], [-1, 4, 8, 12], [0.5, 1, 2, 3], [], [0, 4], [[0, 4, 8, 12]], ["a"] * 4]
NO_INFO = ["", "{", "[]", "5", "null", '{"language_instruction": 5}', '{"x": 1}', b"\xff", 3, [1, 2]]


@st.composite
def damage_of_demonstrations(draw):
    """A function that spoils an open HDF5 file."""
    demo = f"data/demo_{draw(st.integers(0, 1))}"
    columns = {"actions": 7} | {f"obs/{key}": n for key, n in STATES.items()}
    images = [f"obs/{key}" for key in ("agentview_rgb", "eye_in_hand_rgb")]
    key = draw(st.sampled_from([*columns, *images]))
    other = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = draw(st.sampled_from(["f8", "u1", "S3"]))
    row, value = draw(st.integers(0, 12)), draw(st.sampled_from([math.nan, math.inf, -math.inf]))

    def another(file, name, content):
        del file[f"{demo}/{name}"]
        file[f"{demo}/{name}"] = content

    def shape(file):
        assume(key in images or tuple(other) != (13, columns[key]))
        another(file, key, np.zeros(other, dtype))

    def not_finite(file):
        name = key if key in columns else "actions"
        file[f"{demo}/{name}"][row, 0] = value

    def group(file):
        del file[f"{demo}/{key}"]
        file.create_group(f"{demo}/{key}")

    def no_steps(file):
        steps = draw(st.sampled_from(NO_STEPS))
        another(file, "obs/image_steps", np.array(steps, "S1" if "a" in steps else None))

    def no_info(file):
        file["data"].attrs["problem_info"] = draw(st.sampled_from(NO_INFO))

    def no_init_state(file):
        file[demo].attrs["init_state_id"] = draw(st.sampled_from(["x", [1, 2]]))

    faults = [shape, not_finite, group, no_steps, no_info, no_init_state]
    faults += [lambda file: file.__delitem__(f"{demo}/{key}"), lambda file: file.__delitem__(f"{demo}/obs")]
    faults += [lambda file: file.move(demo, "data/demo_x"), lambda file: file.__delitem__("data")]
    faults += [lambda file: file["data"].attrs.__delitem__("problem_info")]
    return draw(st.sampled_from(faults))


@inputs(60)
@given(damage_of_demonstrations())
def test_demonstrations_that_are_none(damage):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task_00.hdf5"
        write_demonstrations(path, [0, 1])
        assert len(list(read_demos(path, 0))) == 2
        with h5py.File(path, "r+") as file:
            damage(file)
        refused(Path(folder), lambda: list(read_demos(path, 0)))


@inputs(15)
@given(st.floats(0, 0.99), st.binary(max_size=40))
def test_a_file_of_demonstrations_cut_short_or_something_else(part, instead):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task_00.hdf5"
        write_demonstrations(path, [0, 1])
        content = path.read_bytes()
        for wrong in (content[: int(part * len(content))], instead):
            path.write_bytes(wrong)
            refused(Path(folder), lambda: list(read_demos(path, 0)))


def test_demonstrations_that_do_not_go_together(tmp_path):
    cfg = sft.Config(name="x", root=str(tmp_path), holdout=0)
    folder = cfg.data_dir / "libero_object"
    write_demonstrations(folder / "task_00.hdf5", [0, 1])
    write_demonstrations(folder / "task_01.hdf5", [0, 1], size=16)
    assert "16" in refused(tmp_path, lambda: sft.load_data(cfg, 4))
    (folder / "task_01.hdf5").unlink()
    write_demonstrations(folder / "task_00.hdf5", [])
    assert "no demonstrations" in refused(tmp_path, lambda: sft.load_data(cfg, 4))


# ------------------------------------------------------------------------------------------------ checkpoints
@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    policy = backbones.build("pi05", MODEL, INSTRUCTIONS)
    policy.norm_stats = {
        k: {s: [0.5] * n for s in ("mean", "std", "q01", "q99")} for k, n in (("action", 7), ("state", 8))
    }
    folder = tmp_path_factory.mktemp("own")
    policy.save(folder)
    return folder


NO_OBJECTS = [b"[]", b"5", b"null", b"{", b"\xff", b"[" * 3000]
NO_STATISTICS = [None, "x", [], [0.5] * 6, [0.5] * 6 + ["x"], [math.nan] * 7, [[0.5]] * 7, {}]


@st.composite
def damage_of_a_checkpoint(draw):
    """A function that spoils a folder of the kit's."""
    names = ["model.safetensors", "config.json", "norm_stats.json"]
    name = draw(st.sampled_from(names))
    json_name = draw(st.sampled_from([*names[1:], "tokenizer.json"]))
    garbage = draw(st.binary(min_size=1, max_size=30) | st.sampled_from(NO_OBJECTS))
    part, at = draw(st.floats(0, 0.99)), draw(st.integers(0, 10**6))
    size, numbers = draw(wrong(int)), draw(st.sampled_from(NO_STATISTICS))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))

    def json_file(name, change):
        def rewrite(folder):
            content = json.loads((folder / name).read_text())
            change(content)
            (folder / name).write_text(json.dumps(content))

        return rewrite

    def cut(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(part * len(content))])

    def tensors(change):
        def rewrite(folder):
            content = load_file(folder / "model.safetensors")
            change(content, sorted(content)[at % len(content)])
            save_file(content, folder / "model.safetensors")

        return rewrite

    faults = [cut, lambda folder: (folder / name).unlink()]
    faults += [lambda folder: (folder / "model.safetensors").write_bytes(garbage)]
    faults += [lambda folder: (folder / json_name).write_bytes(garbage)]
    faults += [tensors(lambda content, key: content.pop(key))]
    faults += [tensors(lambda content, key: content.update({key: torch.zeros([7, *shape])}))]
    faults += [tensors(lambda content, key: content.update({key + "x": torch.zeros(2)}))]
    faults += [json_file("config.json", lambda content: content["expert"].update(width=size))]
    faults += [json_file("config.json", lambda content: content.update(horizon=size))]
    faults += [json_file("config.json", lambda content: content.update(backbone=numbers))]
    faults += [json_file("config.json", lambda content: content.pop("backbone"))]
    faults += [json_file("norm_stats.json", lambda content: content["action"].update(q01=numbers))]
    faults += [json_file("norm_stats.json", lambda content: content.update(state=numbers))]
    return draw(st.sampled_from(faults))


@inputs(40)
@given(damage_of_a_checkpoint())
def test_a_checkpoint_that_is_none(own, damage):
    with tempfile.TemporaryDirectory() as there:
        folder = Path(shutil.copytree(own, Path(there) / "policy"))
        damage(folder)
        refused(Path(there), lambda: backbones.load_policy(folder))


def test_statistics_without_a_key_are_none(own, tmp_path):
    folder = Path(shutil.copytree(own, tmp_path / "policy"))
    stats = json.loads((folder / "norm_stats.json").read_text())
    (folder / "norm_stats.json").write_text(json.dumps(stats | {"state": {}}))
    assert "state" in refused(tmp_path, lambda: backbones.load_policy(folder))


@pytest.fixture(scope="module", params=["openvla", "lerobot", "openpi"])
def published(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    getattr(published_files, f"write_{request.param}")(folder)
    load_published(folder)  # as it is, it is one
    return folder


def load_published(folder: Path):
    model = {"bos": 2, "eos": 1, "space": 4} if (folder / "model.safetensors.index.json").is_file() else {}
    policy = backbones.load_policy(folder, model=model, suites=["libero_object"])
    policy.unnormalise(torch.zeros(1, policy.horizon, 7))  # needs statistics that a file may lack
    return policy


NO_VALUES = [None, "x", [], {}, 5, [1], {"a": 1}, -1, 0, 1.5, [None]]
NO_PLACES = ["../x.safetensors", "/etc/passwd", "a/../../b", "sub/x", "..", "", ".", "\0", None, 5, ["x"]]


@st.composite
def damage_of_a_published_checkpoint(draw):
    at = draw(st.integers(0, 10**6))
    value, place = draw(st.sampled_from(NO_VALUES)), draw(st.sampled_from(NO_PLACES))
    dims, garbage = draw(st.integers(0, 3)), draw(st.binary(min_size=1, max_size=30))

    def stats(folder):  # in OpenVLA's config.json, openpi's norm_stats.json, lerobot's tensors
        if found := list(folder.glob("policy_pre*.safetensors")):
            save_file({key: t.flatten()[: at % 5] for key, t in load_file(found[0]).items()}, found[0])
            return
        path = next(folder.rglob("norm_stats.json"), folder / "config.json")
        content = json.loads(path.read_text())
        named = content["norm_stats"]
        first = next(iter(named))
        places = [(content, "norm_stats"), (named, first), (named[first].get("action", named[first]), "q01")]
        within, key = places[at % 3]
        within[key] = value
        path.write_text(json.dumps(content))

    def shape(folder):
        path = sorted(p for p in folder.glob("model*.safetensors"))[0]
        tensors = load_file(path)
        key = sorted(tensors)[at % len(tensors)]
        # No policy reads these, so they may have any shape: the expert's words, the last block of a tower
        # that is read before it, and that tower's norm.
        assume(not re.search(r"gemma_expert\.lm_head|featurizer\.(blocks\.2|norm)\.", key))
        tensors[key] = torch.zeros([3] * (dims if dims != tensors[key].ndim else 4))
        save_file(tensors, path)

    def index(folder):
        path = folder / "model.safetensors.index.json"
        names = {"weight_map": dict.fromkeys("ab", place)}
        path.write_text(json.dumps(draw(st.sampled_from([names, {"weight_map": value}, value, {}]))))

    def header(folder):
        path = sorted(folder.glob("model*.safetensors"))[-1]
        path.write_bytes(garbage + path.read_bytes()[len(garbage) :])

    return draw(st.sampled_from([stats, shape, index, header]))


@inputs(15)
@given(damage_of_a_published_checkpoint())
def test_a_published_checkpoint_that_is_none(published, damage):
    with tempfile.TemporaryDirectory() as there:
        folder = Path(shutil.copytree(published, Path(there) / "policy"))
        damage(folder)
        refused(Path(there), lambda: load_published(folder))


def test_no_pickle_is_ever_opened(own, tmp_path):
    """In place of weights, of a training's state, of pairs, of an adapter."""
    (tmp_path / "bombs").mkdir()
    for i, bomb in enumerate(bombs(tmp_path / "bombs")):
        there = tmp_path / str(i)
        folder = Path(shutil.copytree(own, there / "policy"))
        names = ["model.safetensors", "pairs.safetensors", "adapter_model.safetensors"]
        for name in [*names, "checkpoint.pt", "pytorch_model.bin"]:
            (folder / name).write_bytes(bomb)
        adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
        refused(there, lambda folder=folder: backbones.load_policy(folder))
        refused(there, lambda folder=folder: disk.load_checkpoint(folder / "checkpoint.pt"))
        refused(there, lambda folder=folder: common.read_pairs(folder))
        refused(there, lambda folder=folder: disk.load_tensors(folder / "model.safetensors"))
        refused(there, lambda folder=folder: common.load_adapter(backbones.load_policy(own), folder))
        (folder / "config.json").write_text("{}")
        refused(there, lambda folder=folder: backbones.load_policy(folder))
        (folder / "model.safetensors").unlink()
        (folder / "adapter_model.safetensors").unlink()
        assert "pickle" in refused(there, lambda folder=folder: backbones.load_policy(folder))
        refused(there, lambda folder=folder: common.load_adapter(backbones.load_policy(own), folder))
    assert not (tmp_path / "bombs" / "executed").exists()


@inputs(20)
@given(st.floats(0.02, 0.98), st.booleans(), st.integers(0, 7))
def test_the_state_of_a_training_cut_short_or_with_a_bit_flipped(place, cut, bit):
    """Or it reads as it was written: some bits of a zip file mean nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        state = {"step": 3, "policy": {"w": torch.arange(500.0)}}
        disk.save_checkpoint(path, state)
        content = bytearray(path.read_bytes())
        at = int(place * len(content))
        if cut:
            path.write_bytes(content[:at])
        else:
            content[at] ^= 1 << bit
            path.write_bytes(content)
        try:
            found = disk.load_checkpoint(path)
            assert not cut and found["step"] == 3 and torch.equal(found["policy"]["w"], state["policy"]["w"])
        except UserError as error:
            assert "damaged" in str(error) and "\n" not in str(error)


def test_actions_that_are_not_finite(own):
    policy = backbones.load_policy(own)
    with torch.no_grad():
        policy.action_out_proj.bias[0] = math.nan
    images = {c: np.zeros((32, 32, 3), np.uint8) for c in ("agentview", "wrist")}
    obs = images | {"state": np.zeros(8, np.float32), "instruction": INSTRUCTIONS[0]}
    with pytest.raises(UserError, match="not finite"):
        backbones.propose(policy, obs, evaluation.Config(execute=2), [common.stream(0, "x")])


# --------------------------------------------------------------------------------------------- pairs and JSON
def write_pairs(folder: Path, change) -> None:
    g = common.stream(0, "pairs")
    tensors = {
        c: torch.randint(0, 256, (4, 8, 8, 3), generator=g, dtype=torch.uint8) for c in ("agentview", "wrist")
    }
    tensors |= {c: torch.randn(4, 5, 7, generator=g) for c in ("chosen", "rejected")}
    tensors |= {"state": torch.randn(4, 8, generator=g), "mask": torch.ones(4, 5, dtype=torch.bool)}
    rows = [{"instruction": "open the drawer"} for _ in range(4)]
    change(tensors, rows)
    disk.save_tensors(folder / "pairs.safetensors", tensors)
    disk.write_rows(folder / "pairs.jsonl", rows)


KEYS = ["agentview", "wrist", "state", "chosen", "rejected", "mask"]
FAULTS = ["missing", "shape", "not finite", "fewer rows", "more rows", "no instruction", "empty", "dtype"]


@inputs(40)
@given(st.sampled_from(KEYS), st.sampled_from(FAULTS), st.lists(st.integers(0, 5), max_size=4))
def test_pairs_that_are_none(key, fault, shape):
    def change(tensors, rows):
        if fault == "missing":
            del tensors[key]
        elif fault == "shape":
            assume(tuple(shape) != tuple(tensors[key].shape))
            tensors[key] = torch.zeros(shape, dtype=tensors[key].dtype)
        elif fault == "not finite":
            tensors["chosen"][1, 2, 3] = math.nan
        elif fault == "fewer rows":
            rows.pop()
        elif fault == "more rows":
            rows.append(rows[0])
        elif fault == "no instruction":
            rows[2] = {"instructions": 3}
        elif fault == "empty":
            tensors.update({k: t[:0] for k, t in tensors.items()})
            rows.clear()
        else:
            tensors["mask"] = tensors["mask"].float()

    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder), change)
        refused(Path(folder), lambda: common.read_pairs(Path(folder)))
        write_pairs(Path(folder), lambda tensors, rows: None)
        assert len(common.read_pairs(Path(folder))["instruction"]) == 4


GOOD_LINE = b'{"suite": "s", "task": 1}'
BAD_LINES = [b"[1]", b"5", b"null", b'"a"', b"{", b"nonsense", b"", b"\xff\xfe", b'{"suite": 1}', b"[" * 3000]
BAD_LINES += [b"{'suite': 1, 'task': 2}"]


@inputs(40)
@given(st.lists(st.just(GOOD_LINE), max_size=3), st.sampled_from(BAD_LINES), st.integers(0, 3))
def test_lines_that_are_no_rows(good, bad, at):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(b"".join(line + b"\n" for line in [*good[:at], bad, *good[at:]]))
        refused(Path(folder), lambda: disk.read_jsonl(path, "suite task"))


PARTS = ("stage", "fingerprint", "inputs", "outputs", "config", "versions")


@inputs(60)
@given(st.recursive(ANY, lambda inner: st.dictionaries(st.sampled_from(PARTS), inner, max_size=6)))
def test_a_folder_whose_done_json_is_none(content):
    kinds = {"stage": str, "fingerprint": str, "inputs": dict}
    nothing = {key: {} for key in ("config", "inputs", "source", "versions")}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "sft"
        folder.mkdir()
        (folder / "done.json").write_text(json.dumps(content))

        def read():
            stage.difference(stage.read_identity(folder / "done.json"), nothing)
            stage.fingerprint_of(folder, Path(root))

        if isinstance(content, dict) and all(isinstance(content.get(k), kind) for k, kind in kinds.items()):
            with contextlib.suppress(UserError):  # it may be one
                read()
        else:
            refused(Path(root), read)


def test_a_damaged_file_among_the_inputs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sft.Config, "inputs", lambda self: [])
    cfg = sft.Config(name="x", root=str(tmp_path))
    stage.execute(lambda cfg, run: run.save("model.safetensors", {"x": torch.zeros(9)}), cfg)
    stage.fingerprint_of(cfg.folder, cfg.run_dir)
    path = cfg.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    named = refused(tmp_path, lambda: stage.fingerprint_of(cfg.folder, cfg.run_dir))
    assert "model.safetensors is damaged" in named


# -------------------------------------------------------------------------------------------------- a command
CASES = [
    ("01_sft.py", "sft: {steps: .nan}"),
    ("03_dpo.py", "model: {horizon: ten}"),
    ("04_eval.py", "seed: !!python/name:os.system"),
]


@pytest.mark.parametrize(("script", "text"), CASES if os.environ.get("LONG") else CASES[:1])
def test_a_command_with_bad_input_ends_with_2_and_one_line(script, text, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    result = subprocess.run(
        [sys.executable, config.HERE / script, "bad.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (
        2,
        "",
        1,
    ) and result.stderr.startswith("error: ")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]
