"""The DPO'd policy in others' formats: written, read back, run by lerobot. pytest tests/test_export.py"""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import published_files
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import run_stage
from test_published import MODEL, WRITERS, load, sample
from torch import nn

import common
from backbones import build_tokenizer
from extras import export, first_run
from runtime import disk
from runtime.config import load_config
from runtime.errors import UserError

dpo = importlib.import_module("03_dpo")
KINDS = [(kind, adapter) for kind in WRITERS for adapter in ("lora", "dora")]


def write_base(kind: str, folder: Path, dtype: torch.dtype) -> Path:
    """A published folder; of float32 it has the attention matrices alone, so that it mixes dtypes."""
    folder.mkdir()
    WRITERS[kind](folder)
    for path in folder.glob("model*.safetensors"):
        tensors = load_file(path)
        wide = {key: t.to(dtype) if "_proj." in key else t for key, t in tensors.items()}
        save_file(wide, path, {"format": "pt", "made by": "a test"})
    (folder.parent / "blob").write_text("Ümlaut")
    (folder / "README.md").symlink_to(folder.parent / "blob")  # a hub's folder is full of links
    (folder / ".gitattributes").write_text("hidden")
    return folder


def write_adapter(policy, kind: str, folder: Path, targets: str = "") -> None:
    """An adapter as 03 saves it, away from the identity. `policy` has it from then on."""
    adapted = common.attach_adapter(policy, kind, 4, 8, targets or policy.adapter_targets, 0)
    g = torch.Generator().manual_seed(5)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.05, generator=g)
        if "magnitude" in name:
            p.data *= 1 + 0.1 * torch.rand(p.shape, generator=g)
    common.save_adapter(adapted, folder)


def arguments(kind: str, base: Path, adapters: Path, root: Path, *more: str) -> list[str]:
    backbone = "openvla" if kind == "openvla" else "pi05"
    places = [f"checkpoint={base}", f"adapters_from={adapters}", f"root={root}", f"backbone={backbone}"]
    return ["configs/micro.yaml", *places, f"model={json.dumps(MODEL[kind])}", *more]


def exported(kind: str, adapter: str, tmp_path: Path, dtype=torch.float32, targets: str = ""):
    """(base, export, the kit's policy with the adapter in float32) of a published folder."""
    base = write_base(kind, tmp_path / "base", dtype)
    policy = load(base, kind).cast("float32")
    write_adapter(policy, adapter, tmp_path / "adapters" / adapter, targets)
    argv = arguments(kind, base, tmp_path / "adapters", tmp_path / "runs", f"adapter={adapter}")
    run_stage("extras.export", *argv, after=export.show)
    policy = common.load_adapter(load(base, kind).cast("float32"), tmp_path / "adapters" / adapter)
    return base, load_config(export.Config, argv).folder, policy


def bytes_of(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor, read without safetensors."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    at = {key: [8 + size + place for place in its["data_offsets"]] for key, its in header.items()}
    return {key: content[begin:end] for key, (begin, end) in at.items()}


def adapted_in_files(folder: Path, targets: str) -> set[str]:
    keys = {key for path in folder.glob("model*.safetensors") for key in load_file(path)}
    wanted = {"attention": (".self_attn.", "language_model.", "gemma_expert.")}[targets]
    return {
        key
        for key in keys
        if wanted[0] in key and key.endswith(".weight") and any(word in key for word in wanted[1:])
    }


# ------------------------------------------------------------------------------------------------- the policy
@pytest.mark.parametrize("kind, adapter", KINDS)
def test_the_exported_folder_acts_as_the_kit_with_the_adapter(kind, adapter, tmp_path):
    base, folder, policy = exported(kind, adapter, tmp_path)
    theirs = load(folder / "policy", kind).cast("float32")
    own, before = policy.state_dict(), load(base, kind).cast("float32").state_dict()
    for key, tensor in theirs.state_dict().items():
        torch.testing.assert_close(tensor, own[key], atol=1e-6, rtol=0)
    torch.testing.assert_close(sample(theirs), sample(policy), atol=1e-5, rtol=0)
    moved = [key for key in own if not torch.equal(own[key], before[key])]
    assert len(moved) == (12 if kind == "openvla" else 16)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_bfloat16_file_is_off_by_its_rounding_alone(kind, tmp_path):
    _, folder, policy = exported(kind, "dora", tmp_path, torch.bfloat16)
    own = policy.state_dict()
    for key, tensor in load(folder / "policy", kind).state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, own[key].bfloat16()), key


@pytest.mark.parametrize("kind, adapter", KINDS)
def test_everything_but_the_adapted_matrices_is_copied_byte_for_byte(kind, adapter, tmp_path):
    base, folder, _ = exported(kind, adapter, tmp_path)
    files = {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()} - {".gitattributes"}
    assert files == {
        str(p.relative_to(folder / "policy")) for p in (folder / "policy").rglob("*") if p.is_file()
    }
    changed = set()
    for name in files:
        before, after = base / name, folder / "policy" / name
        assert not after.is_symlink()
        if not name.startswith("model") or not name.endswith(".safetensors"):
            assert before.read_bytes() == after.read_bytes(), name
            continue
        old, new = bytes_of(before), bytes_of(after)
        assert list(old) == list(new) and len(before.read_bytes()) == len(after.read_bytes())
        changed |= {key for key in old if old[key] != new[key]}
        with safe_open(before, "pt") as a, safe_open(after, "pt") as b:
            assert a.metadata() == b.metadata() == {"format": "pt", "made by": "a test"}
    assert changed == adapted_in_files(base, "attention")
    assert changed == set(disk.read_json(folder / "done.json")["changed"])


def test_a_part_of_a_matrix_that_holds_three(tmp_path):
    """timm keeps q, k and v in one matrix: the value rows alone change; plain peft has no such adapter."""
    targets = r"vision\.dino\.encoder\.layer\.\d+\.attention\.v_proj"
    base, folder, policy = exported("openvla", "lora", tmp_path, targets=targets)
    own, theirs = policy.state_dict(), load(folder / "policy", "openvla").state_dict()
    changed = disk.read_json(folder / "done.json")["changed"]
    assert changed == [f"vision_backbone.featurizer.blocks.{i}.attn.qkv.weight" for i in (0, 1)]
    for key in own:
        assert torch.equal(own[key].to(theirs[key].dtype), theirs[key])
    name = "vision.dino.encoder.layer.0.attention.{}_proj.weight"
    before = load(base, "openvla").state_dict()
    same = [torch.equal(before[name.format(part)], theirs[name.format(part)]) for part in "qkv"]
    assert same == [True, True, False] and not (folder / "adapter").exists()


def test_killed_and_repeated_it_gives_the_same_bytes(tmp_path, monkeypatch):
    base, folder, _ = exported("openvla", "lora", tmp_path)
    argv = arguments("openvla", base, tmp_path / "adapters", tmp_path / "again", "adapter=lora")
    whole, calls = export.overwrite, []

    def killed(*arguments):
        calls.append(whole(*arguments))
        raise KeyboardInterrupt  # between two shards

    monkeypatch.setattr(export, "overwrite", killed)
    with pytest.raises(KeyboardInterrupt):
        run_stage("extras.export", *argv)
    again = load_config(export.Config, argv).folder
    assert len(calls) == 1 and not (again / "done.json").exists()
    monkeypatch.setattr(export, "overwrite", whole)
    run_stage("extras.export", *argv)
    outputs = [disk.read_json(place / "done.json")["outputs"] for place in (folder, again)]
    assert outputs[0] == outputs[1] and len(outputs[0]) > 5


# ------------------------------------------------------------------------------------------------- plain peft
def original(shapes: dict[str, tuple]) -> nn.Module:
    """Modules under the published names: a linear layer wherever a matrix `weight` is."""
    root = nn.Module()
    for key, shape in shapes.items():
        module, _, name = key.rpartition(".")
        at = root
        for part in module.split(".")[:-1]:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        last = module.split(".")[-1]
        if name == "weight" and len(shape) == 2 and not hasattr(at, last):
            at.add_module(last, nn.Linear(*reversed(shape), bias=False))
    return root


@pytest.mark.parametrize("kind, adapter", KINDS)
def test_plain_peft_loads_all_of_the_adapter(kind, adapter, tmp_path):
    base, folder, _ = exported(kind, adapter, tmp_path)
    tensors = {key: t for path in base.glob("model*.safetensors") for key, t in load_file(path).items()}
    model = original({key: tuple(t.shape) for key, t in tensors.items()})
    model.load_state_dict({key: t.float() for key, t in tensors.items()}, strict=False)
    adapted = PeftModel.from_pretrained(model, str(folder / "adapter"))
    layers = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    wanted = {key.removesuffix(".weight") for key in adapted_in_files(base, "attention")}
    assert {name.removeprefix("base_model.model.") for name in layers} == wanted
    assert len(layers) == (12 if kind == "openvla" else 16)
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    assert loaded.keys() == saved.keys() and len(saved) == len(wanted) * (3 if adapter == "dora" else 2)
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    merged = adapted.merge_and_unload().state_dict()
    written = {
        k: t for path in (folder / "policy").glob("model*.safetensors") for k, t in load_file(path).items()
    }
    for key in adapted_in_files(base, "attention"):
        torch.testing.assert_close(merged[key], written[key].float(), atol=1e-6, rtol=0)


OURS = published_files.FIXTURES / "lerobot061_quantile"  # written by lerobot 0.6.1
THEIRS = published_files.FIXTURES / "lerobot061_export"  # two adapters, what lerobot makes of their exports
SAMPLE = np.load(OURS / "sample.npz")


def seen() -> dict:
    images = {"agentview": SAMPLE["image"], "wrist": SAMPLE["image2"]}  # as rendered, upside down
    obs = {camera: torch.from_numpy(image[::-1, ::-1].copy())[None] for camera, image in images.items()}
    return obs | {
        "state": torch.from_numpy(SAMPLE["state"]),
        "instruction": [published_files.INSTRUCTIONS[0]],
    }


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_lerobot_runs_the_export_as_the_kit_runs_the_adapter(adapter, tmp_path):
    """tests/lerobot_export.py ran lerobot's own policy on both parts of the export and kept its outputs."""
    obs, outputs = seen(), np.load(THEIRS / "outputs.npz")
    base = load(OURS, "lerobot", prompt_state_dims=8)
    policy = common.load_adapter(load(OURS, "lerobot", prompt_state_dims=8), THEIRS / adapter)
    noise = torch.from_numpy(SAMPLE["noise"])
    before, after = (p.sample_actions(p.encode(obs), noise, 10)[..., :7] for p in (base, policy))
    torch.testing.assert_close(before, torch.from_numpy(outputs["base_chunk"]), atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 1e-2
    for part in ("policy", "adapter"):
        theirs = torch.from_numpy(outputs[f"{adapter}_{part}_chunk"])
        torch.testing.assert_close(after, theirs, atol=1e-5, rtol=0)
        actions = torch.from_numpy(outputs[f"{adapter}_{part}_actions"])
        torch.testing.assert_close(policy.unnormalise(after), actions, atol=1e-5, rtol=0)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_lerobot_loaded_every_key_of_the_adapter(adapter, tmp_path):
    argv = arguments("lerobot", OURS, THEIRS, tmp_path, f"adapter={adapter}")
    run_stage("extras.export", *argv)
    saved = load_file(load_config(export.Config, argv).folder / "adapter" / "adapter_model.safetensors")
    facts = disk.read_json(THEIRS / "facts.json")[f"{adapter}_adapter"]
    assert facts["layers"] == 16 and facts["keys"] == sorted(saved)
    assert len(saved) == 16 * (3 if adapter == "dora" else 2)
    sums = [saved[key].double().abs().sum().item() for key in facts["keys"]]
    assert facts["sums"] == pytest.approx(sums, abs=1e-3)
    policy = load(load_config(export.Config, argv).folder / "policy", "lerobot", prompt_state_dims=8)
    chunk = policy.sample_actions(policy.encode(seen()), torch.from_numpy(SAMPLE["noise"]), 10)[..., :7]
    theirs = torch.from_numpy(np.load(THEIRS / "outputs.npz")[f"{adapter}_policy_chunk"])
    torch.testing.assert_close(chunk, theirs, atol=1e-5, rtol=0)


def test_the_adapters_settings_are_those_of_any_peft(tmp_path):
    base, folder, _ = exported("lerobot", "dora", tmp_path)
    settings = disk.read_json(folder / "adapter" / "adapter_config.json")
    assert settings["base_model_name_or_path"] == str(base)
    known = {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_alpha", "peft_type", "r"}
    assert settings.keys() == known | {"target_modules", "use_dora"}  # all of them are in peft 0.11
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 4, 8)
    # lerobot asks the adapter's folder for the policy's config, and the processors
    assert disk.read_json(folder / "adapter" / "config.json")["use_peft"] is True
    assert len(list((folder / "adapter").glob("policy_preprocessor*.safetensors"))) == 1


# --------------------------------------------------------------------------------------------------- refusals
def refused(argv: list[str], words: str, folder: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        run_stage("extras.export", *argv)
    assert "\n" not in str(error.value) and not (folder / "done.json").exists()


def test_what_has_no_foreign_format_is_refused(tmp_path):
    tiny = "checkpoints/try/pi05/sft"
    argv = ["configs/micro.yaml", f"root={tmp_path}", "adapters_from=checkpoints/try/pi05"]
    folder = load_config(export.Config, argv).folder
    for checkpoint in ("", tiny):
        refused([*argv, f"checkpoint={checkpoint}"], "the kit's own format, which no other code", folder)
    refused([*argv, "checkpoint=/nowhere"], "no checkpoint /nowhere", folder)
    assert not folder.exists()


DAMAGE = {
    "half of the layers are lost": lambda t: {k: v for k, v in t.items() if "language_model" not in k},
    "a key is renamed": lambda t: {k.replace("expert.layers.0", "expert.layer.0"): v for k, v in t.items()},
    "another rank": lambda t: {k: v[:2] if "lora_A" in k else v for k, v in t.items()},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_adapter_that_does_not_fit_is_refused(damage, tmp_path):
    base = write_base("lerobot", tmp_path / "base", torch.float32)
    write_adapter(load(base, "lerobot").cast("float32"), "lora", tmp_path / "adapters" / "lora")
    path = tmp_path / "adapters" / "lora" / "adapter_model.safetensors"
    save_file(DAMAGE[damage](load_file(path)), path)
    argv = arguments("lerobot", base, tmp_path / "adapters", tmp_path / "runs")
    folder = load_config(export.Config, argv).folder
    refused(argv, "adapter of (this|another) policy", folder)
    assert not (folder / "policy").exists() and not (folder / "adapter").exists()


@pytest.mark.parametrize("more", [{"alpha_pattern": {"q_proj": 4}}, {"bias": "lora_only"}])
def test_settings_that_go_by_the_kits_names_are_refused(more, tmp_path):
    base = write_base("lerobot", tmp_path / "base", torch.float32)
    folder = tmp_path / "adapters" / "lora"
    write_adapter(load(base, "lerobot").cast("float32"), "lora", folder)
    disk.write_json(folder / export.SETTINGS, disk.read_json(folder / export.SETTINGS) | more)
    argv = arguments("lerobot", base, tmp_path / "adapters", tmp_path / "runs")
    refused(argv, "only plain LoRA and DoRA can be exported", load_config(export.Config, argv).folder)


# --------------------------------------------------------------------------------------------- the evaluation
@pytest.mark.parametrize(
    "kind, words",
    [
        ("lerobot", ["lerobot[libero,peft]==0.4.4", "lerobot-eval --policy.path={}/policy", "{}/adapter"]),
        (
            "openpi",
            ["--policy.config=pi05_libero --policy.dir={}/policy", "--args.task-suite-name libero_object"],
        ),
        (
            "openvla",
            ["run_libero_eval.py", "--pretrained_checkpoint {}/policy --task_suite_name libero_object"],
        ),
    ],
)
def test_the_commands_are_printed(kind, words, tmp_path, capsys):
    _, folder, _ = exported(kind, "lora", tmp_path)
    said = capsys.readouterr().out
    for word in words:
        assert word.format(folder) in said


def test_the_version_follows_the_files(tmp_path, capsys):
    cfg = load_config(export.Config, arguments("lerobot", OURS, tmp_path, tmp_path))
    cfg.folder.mkdir(parents=True)
    disk.write_json(cfg.folder / "done.json", {"inputs": {}})
    export.show(cfg)
    said = capsys.readouterr().out
    assert "lerobot[pi,libero,peft]==0.6.1" in said
    assert said.count(" --policy.n_action_steps=10 --policy.num_inference_steps=10\n") == 2


def test_the_command_has_the_folders_renamed_cameras_and_none_is_printed_without_statistics(tmp_path, capsys):
    shutil.copytree(OURS, folder := tmp_path / "policy")
    cfg = load_config(export.Config, arguments("lerobot", folder, tmp_path, tmp_path))
    cfg.folder.mkdir(parents=True)
    disk.write_json(cfg.folder / "done.json", {"inputs": {}})
    pre = folder / "policy_preprocessor.json"
    made, config = disk.read_object(pre), disk.read_object(folder / "config.json")
    (step,) = (s for s in made["steps"] if s["registry_name"] == "rename_observations_processor")
    image, image2, wrist = (f"observation.images.{name}" for name in ("image", "image2", "wrist_image"))
    base, left = "observation.images.base", "observation.images.left"
    for its, renamed, names in (  # lerobot's LIBERO gives image and image2
        ((base, left), {image: base, image2: left}, {image: base, image2: left}),
        ((image, wrist), {}, {image: image, image2: wrist}),
        ((base, left), {image: base, wrist: left}, {image: base, image2: left}),
        ((image, image2), {}, None),
    ):
        features = config["input_features"]
        (shape, *_) = (f for f in features.values() if f["type"] == "VISUAL")
        others = {key: f for key, f in features.items() if f["type"] != "VISUAL"}
        changed = config | {"input_features": dict.fromkeys(its, shape) | others}
        disk.write_json(folder / "config.json", changed)
        step["config"]["rename_map"] = renamed
        disk.write_json(pre, made)
        export.show(replace(cfg, suites=["libero_object", "libero_object_swap"]))
        said = capsys.readouterr().out
        assert said.count("--env.task=libero_object --") == 2 and "swap" not in said
        assert (f"--rename_map='{json.dumps(names)}'" if names else "=10\n") in said
        assert ("rename_map" in said) == bool(names)
    for path in [*folder.glob("policy_*.safetensors")]:
        path.unlink()
    export.show(cfg)  # its statistics are named, and not there
    assert "would score 0 %" in capsys.readouterr().out
    for path in (pre, folder / "policy_postprocessor.json"):
        made = disk.read_object(path)
        for step in made["steps"]:
            step.pop("state_file", "")
        disk.write_json(path, made)
    (folder / "norm_stats.json").write_text("{}")
    export.show(cfg)
    said = capsys.readouterr().out
    assert "would score 0 %" in said and "lerobot-eval" not in said
    for path in folder.glob("policy_*"):  # weights of lerobot 0.6.1 alone, with openpi's statistics
        path.unlink()
    export.show(cfg)
    said = capsys.readouterr().out
    assert "would score 0 %" in said and "lerobot-eval" not in said


def test_eval_info_is_lerobots(tmp_path):
    """Against lerobot's own bookkeeping, written out: lists per task, means over episodes."""
    outcomes = {("libero_object", 0): [1, 0], ("libero_object", 2): [1, 1, 0], ("libero_goal", 1): [0]}
    rows = [
        {"suite": suite, "task": task, "init_state": 40 + i, "success": bool(win), "crash": ""}
        for (suite, task), wins in outcomes.items()
        for i, win in enumerate(wins)
    ]
    rows.append(rows[0] | {"init_state": 49, "success": False, "crash": "Diverged"})
    info = export.eval_info(rows, 12.0)
    assert info.keys() == {"per_task", "per_group", "overall"}
    assert [(t["task_group"], t["task_id"]) for t in info["per_task"]] == sorted(outcomes)
    for task in info["per_task"]:
        wins = outcomes[task["task_group"], task["task_id"]]
        assert task["metrics"]["successes"] == [bool(win) for win in wins]
        assert task["metrics"]["sum_rewards"] == task["metrics"]["max_rewards"] == [float(w) for w in wins]
    overall, group = info["overall"], info["per_group"]["libero_object"]
    assert (overall["n_episodes"], group["n_episodes"]) == (6, 5)
    assert overall["pc_success"] == pytest.approx(50) and group["pc_success"] == pytest.approx(60)
    assert overall["avg_sum_reward"] == overall["avg_max_reward"] == pytest.approx(0.5)
    assert (overall["eval_s"], overall["eval_ep_s"]) == (12.0, 2.0)


def test_eval_info_appears_once_04_has_played(tmp_path):
    base, folder, _ = exported("lerobot", "lora", tmp_path)
    assert not (folder / "eval_info.json").exists()
    played = folder.with_name(folder.name.replace("export-", "eval-"))
    row = {"suite": "libero_object", "task": 3, "init_state": 40, "success": True, "steps": 9, "crash": ""}
    played.mkdir()
    disk.write_json(played / "timing.json", {"episodes_s": {"a": 2.5, "b": None}})
    disk.write_rows(played / "episodes.jsonl", [row])
    argv = arguments("lerobot", base, tmp_path / "adapters", tmp_path / "runs", "adapter=lora")
    inputs = disk.read_json(folder / "done.json")["inputs"]
    weights = next(name for name in inputs if name.endswith("adapter_model.safetensors"))
    for of_adapter in ("0" * 64, inputs[weights]):  # another adapter's episodes, then its own
        assert not (folder / "eval_info.json").exists()
        facts = {"config": {"group": "test"}, "inputs": inputs | {weights: of_adapter}}
        disk.write_json(played / "done.json", facts)
        run_stage("extras.export", *argv, after=export.show)  # the export itself is done already
    info = disk.read_json(folder / "eval_info.json")
    assert info["overall"]["pc_success"] == 100 and info["overall"]["eval_s"] == 2.5


# ---------------------------------------------------------------------------------------------- the first run
def test_a_first_run_reports_what_it_found(tmp_path, monkeypatch, capsys):
    """One real episode, on one task; a whole report has ten."""
    base = write_base("lerobot", tmp_path / "base", torch.float32)
    words = "pick up the black bowl between the plate and the ramekin and place it on the plate"
    (base / "tokenizer.json").write_text(build_tokenizer([words]).to_str())
    small = ["device=cpu", "dtype=float32", "image_size=32", "render=fast", "execute=6", "denoise_steps=1"]
    argv = [
        "first_run",
        "configs/pi05.yaml",
        f"checkpoint={base}",
        f"root={tmp_path}",
        "workers=1",
        "tasks=[0]",
    ]
    monkeypatch.setattr(first_run.sys, "argv", [*argv, *small, "--dry-run"])
    first_run.main()
    assert "eval-sft-val" in capsys.readouterr().out and not (tmp_path / "first_run").exists()
    monkeypatch.setattr(first_run.sys, "argv", [*argv, *small])
    first_run.main()
    report = disk.read_json(tmp_path / "first_run" / "first_run.json")
    said = capsys.readouterr().out
    printed = [json.loads(line) for line in said.splitlines() if line[0] == "{"]
    assert printed == [{part: report[part]} for part in ("files", "first_looks", "episodes")]
    assert str(tmp_path) not in json.dumps(report), "an owner may not want to show where the files lie"
    files, looks, episodes = report["files"], report["first_looks"], report["episodes"]
    assert files["format"] == "lerobot" and files["model"]["normalisation"] == "mean_std"
    assert episodes["hashes"]["model.safetensors"] == disk.sha256(base / "model.safetensors")
    assert (episodes["n"], episodes["successes"], episodes["mean_steps"]) == (1, 0, 220)
    assert episodes["config"]["suites"] == ["libero_spatial"] and episodes["versions"]["torch"]
    assert looks["seconds"] == sorted(looks["seconds"]) and len(looks["actions"]["mean"]) == 7
    assert looks["state"][2] == pytest.approx(0.9, abs=0.5) and "bowl" in looks["instruction"]
    policy = load(base, "lerobot").cast("float32")
    assert looks["statistics"] == policy.norm_stats and 0 < looks["beyond_1"] < 1
