"""What comes with the kit: the files of checkpoints/, and configs/try.yaml, which uses them.

pytest tests/test_try.py
"""

import dataclasses
import importlib
import os
import subprocess

import pytest
import torch

import backbones
import common
import disk
import runs

TRY = runs.HERE / "checkpoints" / "try"
dpo = importlib.import_module("03_dpo")


def config(kind: type, section: str, *arguments: str):
    return common.load_config(kind, section, [str(runs.HERE / "configs" / "try.yaml"), *arguments])


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(runs.HERE)  # the config's paths begin there


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("backbone", ["pi05", "openvla"])
@torch.no_grad()
def test_an_adapter_on_its_policy_gives_the_log_ratios_of_the_training_run(backbone, adapter):
    """margins.json: the float32 weights, adapter merged. Here: those in bfloat16, adapter switched on and off."""
    from peft import PeftModel

    cfg = config(dpo.Config, "dpo", f"backbone={backbone}", f"adapter={adapter}")
    policy, pairs = common.load_sft(cfg), dpo.load_pairs(cfg)
    PeftModel.from_pretrained(policy, str(cfg.source("dpo"))).eval()
    draws = policy.draws(20, 4, common.stream(0, "try"), "stratified")
    batch = dpo.batch_of(pairs, torch.arange(20))
    pi_w, pi_l = dpo.log_probs(policy, *batch, draws, "velocity")
    with policy.reference():
        ref_w, ref_l = dpo.log_probs(policy, *batch, draws, "velocity")
    got, want = (pi_w - ref_w) - (pi_l - ref_l), torch.tensor(disk.read_json(TRY / "margins.json")[f"{backbone} {adapter}"])
    assert got.shape == want.shape == (20,)
    assert (got - want).abs().max() < 0.05 * want.std(), (got - want).abs().max() / want.std()
    assert (want > 0).sum() >= 15  # it has been trained on these pairs


@pytest.mark.parametrize("backbone", ["pi05", "openvla"])
def test_pairs_and_demonstrations_are_whole(backbone):
    cfg = config(dpo.Config, "dpo", f"backbone={backbone}")
    pairs, rows = dpo.load_pairs(cfg), disk.read_jsonl(cfg.source("prefs") / "pairs.jsonl")
    assert {len(value) for value in pairs.values()} == {20} == {len(rows)}
    assert {row["init_state"] for row in rows} <= set(common.init_states("prefs")) and len({row["task"] for row in rows}) >= 9
    horizon = backbones.config_of(cfg.checkpoint)["horizon"]
    assert pairs["chosen"].shape == pairs["rejected"].shape == (20, horizon, 7)
    demos = list(common.read_demos(TRY / "data" / "libero_object" / "task_00.hdf5", 0))
    assert [demo.init_state for demo in demos] == [0, 1] and demos[0].agentview.shape[1:] == (64, 64, 3)


def test_the_repository_stays_small():
    files = [path for path in (runs.HERE / "checkpoints").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6 and max(path.stat().st_size for path in files) < 5e6


def test_given_pairs_are_a_stages_inputs_and_the_first_margin_is_zero(tmp_path):
    arguments = [f"root={tmp_path}", "dpo.steps=1", "dpo.batch_size=2", "dpo.beta=1"]
    cfg = config(dpo.Config, "dpo", *arguments)
    dpo.main(cfg)
    done = disk.read_json(cfg.variant("dpo") / "done.json")
    assert done["inputs"]["checkpoints/try/pi05/prefs/pairs.safetensors"] == disk.sha256(TRY / "pi05/prefs/pairs.safetensors")
    assert {name.rpartition("/")[2] for name in done["inputs"]} >= {"pairs.jsonl", "model.safetensors", "norm_stats.json"}
    assert disk.read_jsonl(cfg.variant("dpo") / "metrics.jsonl")[0]["rewards/margins"] == 0
    with pytest.raises(common.UserError, match="no checkpoint nowhere"):
        dpo.main(config(dpo.Config, "dpo", *arguments, "pairs_from=nowhere"))
    with pytest.raises(common.UserError, match="run `python 02_collect_prefs"):  # without the key, 02's as ever
        dpo.main(config(dpo.Config, "dpo", *arguments, "pairs_from="))


def test_an_adapter_is_evaluated_on_the_weights_it_was_trained_on(tmp_path):
    evaluation, arguments = importlib.import_module("04_eval"), [f"root={tmp_path}", "policy=dpo", "adapters_from="]
    dpo.main(config(dpo.Config, "dpo", f"root={tmp_path}", "dpo.steps=1", "dpo.batch_size=2", "dpo.beta=1"))
    same = config(evaluation.Config, "eval", *arguments)
    assert common.given_or_made(same, "dpo") == [same.variant("dpo")]
    other = config(evaluation.Config, "eval", *arguments, "checkpoint=checkpoints/tiny_libero_object")
    with pytest.raises(common.UserError, match="was not made from checkpoints/tiny_libero_object/"):
        common.given_or_made(other, "dpo")


def test_an_adapter_that_is_not_given_is_that_of_03(tmp_path):
    evaluation = importlib.import_module("04_eval")
    given = config(evaluation.Config, "eval", f"root={tmp_path}", "policy=dpo", "adapter=dora")
    assert {path.name for path in common.given_or_made(given, "dpo")} == {"adapter_config.json", "adapter_model.safetensors"}
    assert given.source("dpo").name == "dora" and disk.read_json(given.source("dpo") / "adapter_config.json")["use_dora"]
    with pytest.raises(common.UserError, match="run `python 03_dpo"):
        common.given_or_made(config(evaluation.Config, "eval", f"root={tmp_path}", "policy=dpo", "adapters_from="), "dpo")


def scripts(*arguments: str) -> list[str]:
    """What run_all.sh would run."""
    run = ["bash", "run_all.sh", *arguments]
    said = subprocess.run(run, capture_output=True, text=True, env=os.environ | {"PYTHON": "echo"}, check=True).stdout
    return [line.split()[4] for line in said.splitlines() if "] $ python 0" in line]


def test_a_config_names_the_stages_where_the_command_line_does_not():
    stages = ["03_dpo.py", *["04_eval.py"] * 3, "05_profile.py", "07_validate.py", "08_report.py"]
    assert scripts("configs/try.yaml") == stages
    assert scripts("configs/try.yaml", "02 03", "adapters=lora dora") == ["02_collect_prefs.py", "03_dpo.py", "03_dpo.py"]
    assert scripts("03") == ["03_dpo.py", "03_dpo.py"]
    assert {name[:2] for name in scripts()} == {"00", "01", "02", "03", "04", "08"}
    assert scripts("configs/tiny_blank.yaml", "00 01 04", "adapters=") == ["00_demos.py", "01_sft.py", "04_eval.py", "04_eval.py"]
    assert {name[:2] for name in scripts("configs/tiny_exact.yaml")} == {"02", "03", "04", "08"}, "those of its base"


def test_what_belongs_to_another_policy_is_refused(tmp_path):
    others = {"pi05": "openvla", "openvla": "pi05"}
    for backbone, other in others.items():
        arguments = (f"root={tmp_path}", f"backbone={backbone}", f"pairs_from={TRY / other / 'prefs'}")
        with pytest.raises(common.UserError, match="they are another policy's"):
            dpo.main(config(dpo.Config, "dpo", *arguments))
    sft = importlib.import_module("01_sft")
    cfg = config(sft.Config, "sft", f"root={tmp_path}", "backbone=openvla", f"sft.init_from={TRY / 'pi05' / 'sft'}")
    demos = importlib.import_module("00_demos")
    demos.main(config(demos.Config, "demos", f"root={tmp_path}"))
    with pytest.raises(common.UserError, match="is a checkpoint of pi05; set backbone=pi05"):
        sft.main(dataclasses.replace(cfg, model={}))
    assert "backbones/published.py" in cfg.policy_code and "backbones/published.py" not in sft.Config().policy_code
