"""Generated bad input at every door: configs, demonstrations, checkpoints, pairs, JSON. One line, nothing written or run.

pytest tests/test_bad_input.py: a sample, some hundred inputs. With LONG=1 ten times as many (bash tests/run.sh --long).
"""

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
import contrastive
import data
import disk
import runs
from report import audit

sft = importlib.import_module("01_sft")
KIT = Path(common.__file__).parent
STAGES = {section: importlib.import_module(script).Config for section, script in runs.STAGES.items()}
SIZE = {"width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
MODEL = {"vlm": SIZE, "expert": SIZE, "vision": VISION | {"image_size": 32, "patch_size": 16}, "horizon": 4, "flow_dim": 7}


def inputs(n: int):
    """n generated inputs of a test, the same in every run; ten times as many with LONG=1."""
    n *= 10 if os.environ.get("LONG") else 1
    quiet = list(HealthCheck)
    return settings(max_examples=n, derandomize=True, database=None, deadline=None, suppress_health_check=quiet)


def tree(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(folder: Path, read) -> str:
    """`read` says in one line what is wrong, and leaves the folder as it was."""
    before = tree(folder)
    with pytest.raises(common.UserError) as error:
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


# ---------------------------------------------------------------------------------------------------------------- configs
ANY = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2))
NEVER_A_NUMBER = st.sampled_from(["many", None, True, [1], {"a": 1}, math.nan, math.inf, -math.inf, "1e999", "", "0x", "--1"])
WRONG = {
    int: NEVER_A_NUMBER | st.floats(0.1, 0.9) | st.integers(max_value=-1) | st.integers(min_value=2**62 + 1),
    float: NEVER_A_NUMBER | st.floats(max_value=-0.01, allow_infinity=False) | st.integers(min_value=2**70),
    str: st.sampled_from([None, True, [1], {"a": 1}, "\0", []]),
    bool: st.sampled_from([1, 0.5, "yes please", None, [True]]),
    list[int]: st.sampled_from([5, "a", [1.5], ["a"], None, {"a": 1}, [True], [None], [-1]]),
    list[str]: st.sampled_from([5, "a", [None], [[1]], None, {"a": 1}, [True]]),
    dict: st.sampled_from([5, "a", [1], True]),
}
MAY_BE_NEGATIVE = {"threshold"}  # a cosine


@st.composite
def a_wrong_value(draw) -> tuple[str, dict]:
    """A stage, and a config with one value of a kind that its key does not take."""
    section = draw(st.sampled_from(list(STAGES)))
    hints = typing.get_type_hints(STAGES[section])
    key = draw(st.sampled_from([k for k in hints if k not in MAY_BE_NEGATIVE]))
    value = draw(WRONG[hints[key]])
    own = key not in typing.get_type_hints(common.RunConfig)
    return section, {section: {key: value}} if own else {key: value}


def load(folder: Path, section: str, content: str | bytes, *overrides: str):
    path = folder / "exp.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return refused(folder, lambda: common.load_config(STAGES[section], section, [str(path), *overrides]))


@inputs(150)
@given(a_wrong_value())
def test_a_config_with_a_wrong_value(case):
    section, config = case
    assert STAGES[section]().name == ""  # the defaults are fine
    with tempfile.TemporaryDirectory() as folder:
        load(Path(folder), section, yaml.safe_dump(config))


@inputs(30)
@given(st.sampled_from(list(STAGES)), st.text(min_size=1, max_size=12), st.booleans())
def test_a_config_with_an_unknown_key(section, key, inside):
    hints = typing.get_type_hints(STAGES[section])
    assume(key not in hints and key not in STAGES and key not in ("base", *backbones.BACKBONES))
    with tempfile.TemporaryDirectory() as folder:
        load(Path(folder), section, yaml.safe_dump({section: {key: 1}} if inside else {key: 1}))


NO_YAML = ["a: [", "a: 1\n b: 2", "\t", "seed: 2020-99-99", "seed: !!int x", "seed: !!python/object/apply:os.system ['false']"]
NO_YAML += ["? [1]\n: 2", "seed: *nowhere", "seed: !!binary x", "[" * 5000, "{a: " * 3000, "- 1", "text", "5", "a: b: c", "\x07"]
NO_YAML += [
    b"\xff\xfe\x00",
    b"seed: \x80",
    "base: exp.yaml",
    "base: [1]",
    "base: ../exp.yaml",
    "base: /etc/passwd",
    "base: nowhere.yaml",
]


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
            common.load_config(STAGES["sft"], "sft", [str(path)])
        except common.UserError as error:
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
    ("sft", "sft: {grad_clip: 0}"),
    ("dpo", "dpo: {targets: '('}"),
    ("dpo", "dpo: {targets: '*'}"),
    ("dpo", "dpo: {beta: e-5}"),
    ("dpo", "dpo: {beta: 1e-}"),
    ("dpo", "dpo: {beta: '²'}"),
    ("dpo", "dpo: {beta: 0}"),
    ("dpo", "dpo: {beta: .inf}"),
    ("dpo", "dpo: {alpha: 0}"),
    ("eval", "eval: {dropout: 1, policy: dpo}"),
    ("sft", "device: gpu"),
]


@pytest.mark.parametrize(("section", "text"), SENSELESS, ids=[text for _, text in SENSELESS])
def test_a_config_that_makes_no_sense(section, text, tmp_path):
    load(tmp_path, section, text)


@pytest.mark.parametrize("override", ["steps", "=", "sft.steps=", "sft.steps=[", "sft.steps=2020-99-99", "x.steps=1", "sft.=1"])
def test_an_argument_that_is_none(override, tmp_path):
    load(tmp_path, "sft", "seed: 1", override)


@st.composite
def a_wrong_size(draw) -> dict:
    """A model section with one size that is none."""
    model = {key: dict(value) if isinstance(value, dict) else value for key, value in MODEL.items()}
    path = draw(
        st.sampled_from([(k, *s) for k, v in model.items() for s in ([(i,) for i in v] + [()] if isinstance(v, dict) else [()])])
    )
    within = model if len(path) == 1 else model[path[0]]
    kind = dict if isinstance(within[path[-1]], dict) else int
    within[path[-1]] = draw(WRONG[kind] | st.none() | (st.just(0) if kind is int else st.just([[1]])))
    return model


@inputs(40)
@given(a_wrong_size())
def test_a_model_with_a_wrong_size(model):
    with pytest.raises(common.UserError) as error:
        backbones.horizon("pi05", model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("backbone", "model"),
    [
        ("pi05", {"vlm": SIZE | {"head_dim": 15}, "expert": SIZE | {"head_dim": 15}}),
        ("pi05", {"vlm": SIZE | {"num_kv_heads": 3}, "expert": SIZE | {"num_kv_heads": 3}}),
        ("pi05", {"vision": MODEL["vision"] | {"num_attention_heads": 3}}),
        ("pi05", {"vision": MODEL["vision"] | {"patch_size": 64}}),
        ("pi05", {"flow_dim": 6}),
        ("pi05", {"cameras": []}),
        ("pi05", {"cameras": ["front"]}),
        ("pi05", {"normalisation": "none"}),
        ("openvla", {"llm": {"width": 30, "depth": 1, "mlp_dim": 4, "num_heads": 4}}),
        ("openvla", {"n_bins": 1}),
        ("openvla", {"prompt": "do {this}"}),
        ("openvla", {"prompt": "do {"}),
        ("openvla", {"towers": []}),
        ("openvla", {"space": 40000}),
    ],
)
def test_a_model_whose_sizes_do_not_fit(backbone, model):
    with pytest.raises(common.UserError) as error:
        backbones.horizon(backbone, model)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------- demonstrations
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

    def attribute(name, content):
        return lambda file: file["data"].attrs.__setitem__(name, content)

    steps = draw(st.sampled_from([[0, 4, 8, 13], [-1, 4, 8, 12], [0.5, 1, 2, 3], [], [0, 4], [[0, 4, 8, 12]], ["a"] * 4]))
    faults = [
        shape,
        not_finite,
        group,
        lambda file: file.__delitem__(f"{demo}/{key}"),
        lambda file: file.__delitem__(f"{demo}/obs"),
    ]
    faults += [lambda file: another(file, "obs/image_steps", np.array(steps, "S1" if steps == ["a"] * 4 else None))]
    faults += [lambda file: file.move(demo, "data/demo_x"), lambda file: file.__delitem__("data")]
    faults += [lambda file: file["data"].attrs.__delitem__("problem_info")]
    wrong = draw(st.sampled_from(["", "{", "[]", "5", "null", '{"language_instruction": 5}', '{"x": 1}', b"\xff", 3, [1, 2]]))
    faults += [attribute("problem_info", wrong)]
    faults += [lambda file: file[demo].attrs.__setitem__("init_state_id", draw(st.sampled_from(["x", [1, 2]])))]
    return draw(st.sampled_from(faults))


@inputs(60)
@given(damage_of_demonstrations())
def test_demonstrations_that_are_none(damage):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task_00.hdf5"
        write_demonstrations(path, [0, 1])
        assert len(list(common.read_demos(path, 0))) == 2
        with h5py.File(path, "r+") as file:
            damage(file)
        refused(Path(folder), lambda: list(common.read_demos(path, 0)))


@inputs(15)
@given(st.floats(0, 0.99), st.binary(max_size=40))
def test_a_file_of_demonstrations_cut_short_or_something_else(part, instead):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task_00.hdf5"
        write_demonstrations(path, [0, 1])
        content = path.read_bytes()
        for wrong in (content[: int(part * len(content))], instead):
            path.write_bytes(wrong)
            refused(Path(folder), lambda: list(common.read_demos(path, 0)))


def test_demonstrations_that_do_not_go_together(tmp_path):
    cfg = sft.Config(name="x", root=str(tmp_path), holdout=0)
    folder = cfg.data_dir / "libero_object"
    write_demonstrations(folder / "task_00.hdf5", [0, 1])
    write_demonstrations(folder / "task_01.hdf5", [0, 1], size=16)
    assert "16" in refused(tmp_path, lambda: sft.load_data(cfg, 4))
    (folder / "task_01.hdf5").unlink()
    write_demonstrations(folder / "task_00.hdf5", [])
    assert "no demonstrations" in refused(tmp_path, lambda: sft.load_data(cfg, 4))


# ------------------------------------------------------------------------------------------------------------ checkpoints
@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    policy = backbones.build("pi05", MODEL, INSTRUCTIONS)
    policy.norm_stats = {k: {s: [0.5] * n for s in ("mean", "std", "q01", "q99")} for k, n in (("action", 7), ("state", 8))}
    folder = tmp_path_factory.mktemp("own")
    policy.save(folder)
    return folder


@st.composite
def damage_of_a_checkpoint(draw):
    """A function that spoils a folder of the kit's."""
    names = ["model.safetensors", "config.json", "norm_stats.json"]
    name = draw(st.sampled_from(names))
    json_name = draw(st.sampled_from([*names[1:], "tokenizer.json"]))
    garbage = draw(st.binary(min_size=1, max_size=30) | st.sampled_from([b"[]", b"5", b"null", b"{", b"\xff", b"[" * 3000]))
    part, at = draw(st.floats(0, 0.99)), draw(st.integers(0, 10**6))
    wrong = draw(WRONG[int].filter(lambda v: not isinstance(v, str) or "\0" not in v))
    number = draw(st.sampled_from([None, "x", [], [0.5] * 6, [0.5] * 6 + ["x"], [math.nan] * 7, [[0.5]] * 7, {}]))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))

    def rewrite(folder, file, change):
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    def cut(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(part * len(content))])

    def tensor(folder, change):
        tensors = load_file(folder / "model.safetensors")
        change(tensors, sorted(tensors)[at % len(tensors)])
        save_file(tensors, folder / "model.safetensors")

    return draw(
        st.sampled_from(
            [
                lambda folder: (folder / name).unlink(),
                cut,
                lambda folder: (folder / "model.safetensors").write_bytes(garbage),
                lambda folder: (folder / json_name).write_bytes(garbage),
                lambda folder: tensor(folder, lambda tensors, key: tensors.pop(key)),
                lambda folder: tensor(folder, lambda tensors, key: tensors.update({key: torch.zeros([7, *shape])})),
                lambda folder: tensor(folder, lambda tensors, key: tensors.update({key + "x": torch.zeros(2)})),
                lambda folder: rewrite(folder, "config.json", lambda c: c["expert"].update(width=wrong)),
                lambda folder: rewrite(folder, "config.json", lambda c: c.update(horizon=wrong)),
                lambda folder: rewrite(folder, "config.json", lambda c: c.update(backbone=number)),
                lambda folder: rewrite(folder, "config.json", lambda c: c.pop("backbone")),
                lambda folder: rewrite(folder, "norm_stats.json", lambda c: c["action"].update(q01=number)),
                lambda folder: rewrite(folder, "norm_stats.json", lambda c: c.update(state=number)),
            ]
        )
    )


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
    policy.unnormalise(torch.zeros(1, policy.horizon, 7))  # where statistics that a file may lack are asked for
    return policy


@st.composite
def damage_of_a_published_checkpoint(draw):
    at, value = draw(st.integers(0, 10**6)), draw(st.sampled_from([None, "x", [], {}, 5, [1], {"a": 1}, -1, 0, 1.5, [None]]))
    place = draw(st.sampled_from(["../x.safetensors", "/etc/passwd", "a/../../b", "sub/x", "..", "", ".", "\0", None, 5, ["x"]]))
    dims, garbage = draw(st.integers(0, 3)), draw(st.binary(min_size=1, max_size=30))

    def stats(folder):  # in OpenVLA's config.json, openpi's norm_stats.json, lerobot's tensors
        if found := list(folder.glob("policy_pre*.safetensors")):
            save_file({key: t.flatten()[: at % 5] for key, t in load_file(found[0]).items()}, found[0])
            return
        path = next(folder.rglob("norm_stats.json"), folder / "config.json")
        content = json.loads(path.read_text())
        named = content["norm_stats"]
        first = next(iter(named))
        within = [(content, "norm_stats"), (named, first), (named[first].get("action", named[first]), "q01")][at % 3]
        within[0][within[1]] = value
        path.write_text(json.dumps(content))

    def shape(folder):
        path = sorted(p for p in folder.glob("model*.safetensors"))[0]
        tensors = load_file(path)
        key = sorted(tensors)[at % len(tensors)]
        # What no policy reads may have any shape: the expert's words, the last block of a tower read before it, its norm
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
    """In place of weights, of a training's state, of pairs, of an adapter, of a head."""
    (tmp_path / "bombs").mkdir()
    for i, bomb in enumerate(bombs(tmp_path / "bombs")):
        there = tmp_path / str(i)
        folder = Path(shutil.copytree(own, there / "policy"))
        for name in ("model.safetensors", "checkpoint.pt", "pairs.safetensors", "adapter_model.safetensors", "pytorch_model.bin"):
            (folder / name).write_bytes(bomb)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
        refused(there, lambda folder=folder: backbones.load_policy(folder))
        refused(there, lambda folder=folder: disk.load_checkpoint(folder / "checkpoint.pt"))
        refused(there, lambda folder=folder: data.read_pairs(folder))
        refused(there, lambda folder=folder: contrastive.load_head(str(folder / "model.safetensors")))
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
        except common.UserError as error:
            assert "damaged" in str(error) and "\n" not in str(error)


def test_actions_that_are_not_finite(own):
    policy = backbones.load_policy(own)
    with torch.no_grad():
        policy.action_out_proj.bias[0] = math.nan
    images = {c: np.zeros((32, 32, 3), np.uint8) for c in ("agentview", "wrist")}
    obs = images | {"state": np.zeros(8, np.float32), "instruction": INSTRUCTIONS[0]}
    with pytest.raises(common.UserError, match="not finite"):
        common.propose(policy, obs, common.RunConfig(execute=2), [common.stream(0, "x")])


# -------------------------------------------------------------------------------------------------------- pairs and JSON
def write_pairs(folder: Path, change) -> None:
    g = common.stream(0, "pairs")
    tensors = {c: torch.randint(0, 256, (4, 8, 8, 3), generator=g, dtype=torch.uint8) for c in ("agentview", "wrist")}
    tensors |= {c: torch.randn(4, 5, 7, generator=g) for c in ("chosen", "rejected")}
    tensors |= {"state": torch.randn(4, 8, generator=g), "mask": torch.ones(4, 5, dtype=torch.bool)}
    rows = [{"instruction": "open the drawer"} for _ in range(4)]
    change(tensors, rows)
    disk.save_tensors(folder / "pairs.safetensors", tensors)
    disk.write_rows(folder / "pairs.jsonl", rows)


@inputs(40)
@given(
    st.sampled_from(["agentview", "wrist", "state", "chosen", "rejected", "mask"]),
    st.sampled_from(["missing", "shape", "not finite", "fewer rows", "more rows", "no instruction", "empty", "dtype"]),
    st.lists(st.integers(0, 5), max_size=4),
)
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
        refused(Path(folder), lambda: data.read_pairs(Path(folder)))
        write_pairs(Path(folder), lambda tensors, rows: None)
        assert len(data.read_pairs(Path(folder))["instruction"]) == 4


BAD_LINES = [
    b"[1]",
    b"5",
    b"null",
    b'"a"',
    b"{",
    b"nonsense",
    b"",
    b"\xff\xfe",
    b'{"suite": 1}',
    b"[" * 3000,
    b"{'suite': 1, 'task': 2}",
]


@inputs(40)
@given(st.lists(st.just(b'{"suite": "s", "task": 1}'), max_size=3), st.sampled_from(BAD_LINES), st.integers(0, 3))
def test_lines_that_are_no_rows(good, bad, at):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(b"".join(line + b"\n" for line in [*good[:at], bad, *good[at:]]))
        refused(Path(folder), lambda: disk.read_jsonl(path, "suite task"))
        audit.audit(Path(folder)) if any(b"success" in line for line in good) else None


@inputs(40)
@given(
    st.recursive(ANY, lambda inner: st.dictionaries(st.sampled_from(["stage", "fingerprint", "inputs", "x"]), inner, max_size=4))
)
def test_a_folder_whose_done_json_is_none(content):
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "sft"
        folder.mkdir()
        (folder / "done.json").write_text(json.dumps(content))
        is_one = isinstance(content, dict) and all(isinstance(content.get(k), v) for k, v in runs.IDENTITY.items())
        assume(not is_one)
        refused(Path(root), lambda: runs.fingerprint_of(folder, Path(root)))


def test_a_damaged_file_among_the_inputs_is_named(tmp_path):
    cfg = sft.Config(name="x", root=str(tmp_path))
    stage = runs.open_stage("01_sft.py", cfg, tmp_path / "x" / "sft", "seed", [], [])
    path = stage.dir / "model.safetensors"
    disk.save_tensors(path, {"x": torch.zeros(9)})
    stage.finish()
    runs.fingerprint_of(stage.dir, tmp_path / "x")
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert "model.safetensors is damaged" in refused(tmp_path, lambda: runs.fingerprint_of(stage.dir, tmp_path / "x"))


# --------------------------------------------------------------------------------------------------------------- a command
CASES = [
    ("01_sft.py", "sft: {steps: .nan}"),
    ("03_dpo.py", "model: {horizon: ten}"),
    ("04_eval.py", "seed: !!python/name:os.system"),
]


@pytest.mark.parametrize(("script", "text"), CASES if os.environ.get("LONG") else CASES[:1])
def test_a_command_with_bad_input_ends_with_2_and_one_line(script, text, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    result = subprocess.run([sys.executable, KIT / script, "bad.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1) and result.stderr.startswith("error: ")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]
