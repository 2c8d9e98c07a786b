"""The files of checkpoints/, and configs/try.yaml, which uses them.

pytest tests/test_try.py
"""

import dataclasses
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from samples import run_stage

import backbones
import common
from runtime import disk
from runtime.config import HERE, load_config
from runtime.errors import UserError
from sim.demos import read_demos

TRY = HERE / "checkpoints" / "try"
CONFIG = str(HERE / "configs" / "try.yaml")
SHORT = ("dpo.steps=1", "dpo.batch_size=2", "dpo.beta=1")
dpo, evaluation = importlib.import_module("03_dpo"), importlib.import_module("04_eval")


def config(module, *arguments: str):
    return load_config(module.Config, [CONFIG, *arguments])


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(HERE)  # the config's paths begin there


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("backbone", ["pi05", "openvla"])
@torch.no_grad()
def test_an_adapter_on_its_policy_gives_the_margins_of_the_training_run(backbone, adapter):
    """margins.json: the float32 weights, adapter merged. Here: those in bfloat16, adapter on and off."""
    from peft import PeftModel

    cfg = config(dpo, f"backbone={backbone}", f"adapter={adapter}")
    policy = backbones.load_sft(cfg)
    pairs, _ = dpo.load_pairs(cfg, policy)
    PeftModel.from_pretrained(policy, str(cfg.adapter_dir)).eval()
    draws = policy.draws(20, 4, common.stream(0, "try"), "stratified")
    batch = dpo.batch_of(pairs, torch.arange(20))
    pi_w, pi_l = dpo.log_probs(policy, *batch, draws, "velocity")
    with policy.reference():
        ref_w, ref_l = dpo.log_probs(policy, *batch, draws, "velocity")
    got = (pi_w - ref_w) - (pi_l - ref_l)
    want = torch.tensor(disk.read_json(TRY / "margins.json")[f"{backbone} {adapter}"])
    assert got.shape == want.shape == (20,)
    assert (got - want).abs().max() < 0.05 * want.std()
    assert (want > 0).sum() >= 15  # it has been trained on these pairs


@pytest.mark.parametrize("backbone", ["pi05", "openvla"])
def test_pairs_are_whole(backbone):
    cfg = config(dpo, f"backbone={backbone}")
    pairs, rows = common.read_pairs(cfg.pairs_dir), disk.read_jsonl(cfg.pairs_dir / "pairs.jsonl")
    assert {len(value) for value in pairs.values()} == {20} == {len(rows)}
    assert {row["init_state"] for row in rows} <= set(common.init_states("prefs"))
    assert len({row["task"] for row in rows}) >= 9
    horizon = backbones.load_sft(cfg).horizon
    assert pairs["chosen"].shape == pairs["rejected"].shape == (20, horizon, 7)


def test_demonstrations_are_whole():
    demos = list(read_demos(TRY / "data" / "libero_object" / "task_00.hdf5", 0))
    assert [demo.init_state for demo in demos] == [0, 1] and demos[0].agentview[:].shape == (28, 64, 64, 3)


def test_the_repository_stays_small():
    sizes = [path.stat().st_size for path in (HERE / "checkpoints").rglob("*") if path.is_file()]
    assert sum(sizes) < 20e6 and max(sizes) < 5e6


def test_given_pairs_are_a_stages_inputs_and_the_first_margin_is_zero(tmp_path):
    arguments = [f"root={tmp_path}", *SHORT]
    run_stage("03_dpo", CONFIG, *arguments)
    folder = config(dpo, *arguments).folder
    inputs = disk.read_json(folder / "done.json")["inputs"]
    pairs = "checkpoints/try/pi05/prefs/pairs.safetensors"
    assert inputs[pairs] == disk.sha256(HERE / pairs)
    names = {name.rpartition("/")[2] for name in inputs}
    assert names >= {"pairs.jsonl", "model.safetensors", "norm_stats.json"}
    assert disk.read_jsonl(folder / "metrics.jsonl")[0]["rewards/margins"] == 0


def test_without_given_pairs_those_of_02_are_needed(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        run_stage("03_dpo", CONFIG, f"root={tmp_path}", "pairs_from=nowhere")
    with pytest.raises(UserError, match=r"run `python 02_collect_prefs\.py"):
        run_stage("03_dpo", CONFIG, f"root={tmp_path}", "pairs_from=")
    assert not list(tmp_path.rglob("*.json"))


def test_an_adapter_is_evaluated_on_the_weights_it_was_trained_on(tmp_path):
    run_stage("03_dpo", CONFIG, f"root={tmp_path}", *SHORT)
    arguments = [f"root={tmp_path}", "policy=dpo", "adapters_from="]
    cfg = config(evaluation, *arguments)
    assert cfg.adapter_inputs() == [cfg.made_adapter] and cfg.made_adapter in cfg.inputs()
    other = config(evaluation, *arguments, "checkpoint=checkpoints/tiny_libero_object")
    with pytest.raises(UserError, match="was not made from checkpoints/tiny_libero_object/"):
        other.inputs()


def test_an_adapter_that_is_not_given_is_that_of_03(tmp_path):
    given = config(evaluation, f"root={tmp_path}", "policy=dpo", "adapter=dora")
    files = {path.name for path in given.adapter_inputs()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"} and given.adapter_dir.name == "dora"
    assert disk.read_json(given.adapter_dir / "adapter_config.json")["use_dora"]
    with pytest.raises(UserError, match=r"run `python 03_dpo\.py"):
        config(evaluation, f"root={tmp_path}", "policy=dpo", "adapters_from=").inputs()


def scripts(*arguments: str) -> list[str]:
    """What run_all.sh would run."""
    run = ["bash", "run_all.sh", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder, "python")  # answers what run_all.sh asks of the config, and runs no stage
        stub.write_text(f'#!/bin/bash\n[[ $1 != -c ]] || exec "{sys.executable}" "$@"\n', encoding="utf-8")
        stub.chmod(0o755)
        echo = os.environ | {"PYTHON": str(stub)}
        said = subprocess.run(run, capture_output=True, text=True, env=echo, check=True).stdout
    return [line.split()[4] for line in said.splitlines() if "] $ python 0" in line]


def test_a_config_names_the_stages_where_the_command_line_does_not():
    stages = ["03_dpo.py", *["04_eval.py"] * 3, "05_profile.py", "07_validate.py", "08_report.py"]
    assert scripts("configs/try.yaml") == stages
    both = ["02_collect_prefs.py", "03_dpo.py", "03_dpo.py"]
    assert scripts("configs/try.yaml", "02 03", "adapters=lora dora") == both
    assert scripts("03") == ["03_dpo.py", "03_dpo.py"]
    assert {name[:2] for name in scripts()} == {"00", "01", "02", "03", "04", "08"}
    blank = ["00_demos.py", "01_sft.py", "04_eval.py", "04_eval.py"]
    assert scripts("configs/tiny_blank.yaml", "00 01 04", "adapters=") == blank
    of_base = {name[:2] for name in scripts("configs/tiny_exact.yaml")}
    assert of_base == {"02", "03", "04", "08"}


@pytest.mark.parametrize("backbone, other", [("pi05", "openvla"), ("openvla", "pi05")])
def test_pairs_of_another_policy_are_refused(backbone, other, tmp_path):
    given = f"pairs_from={TRY / other / 'prefs'}"
    with pytest.raises(UserError, match="they are another policy's"):
        run_stage("03_dpo", CONFIG, f"root={tmp_path}", f"backbone={backbone}", given)


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path):
    sft = importlib.import_module("01_sft")
    run_stage("00_demos", CONFIG, f"root={tmp_path}")
    cfg = config(sft, f"root={tmp_path}", "backbone=openvla", f"init_from={TRY / 'pi05' / 'sft'}")
    with pytest.raises(UserError, match="is a checkpoint of pi05; set backbone=pi05"):
        sft.make_policy(dataclasses.replace(cfg, model={}))
