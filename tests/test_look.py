"""What stands in a published folder is found, followed or refused before its weights are read.

lerobot's own outputs on variants of one folder (lerobot_variants.py), and imitations of what others write.
pytest tests/test_look.py
"""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import lerobot_variants as variants
import numpy as np
import published_files
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import backbones
import common
from backbones import published
from extras import preflight
from runtime import UserError, disk, stage
from runtime.config import HERE

FIXTURES = HERE / "tests" / "fixtures"
QUANTILE = FIXTURES / "lerobot061_quantile"
TASK = "pick up the milk and place it in the basket"
MODEL = {"bos": 2, "eos": 1, "space": 4}  # of the small tokenizer, for OpenVLA
sample = np.load(QUANTILE / "sample.npz")
theirs = np.load(QUANTILE / "variants.npz")
prefs = importlib.import_module("02_collect_prefs")
evaluation = importlib.import_module("04_eval")


@pytest.fixture
def folder(tmp_path) -> variants.Folder:  # lerobot's, to be changed
    return variants.Folder(variants.make("unchanged", tmp_path / "lerobot"))


def batch() -> dict:
    images = {c: sample[name][::-1, ::-1].copy() for c, name in (("agentview", "image"), ("wrist", "image2"))}
    return backbones.collate([images | {"state": sample["state"][0], "instruction": TASK}])


def outputs(policy) -> dict[str, np.ndarray]:  # as lerobot_variants.lerobot_on
    noise = torch.from_numpy(sample["noise"])[:, : policy.horizon]
    tokens, valid = policy.inputs(batch())[2:4]
    chunk = policy.sample_actions(policy.encode(batch()), noise)
    return {
        "tokens": tokens[valid].numpy(),
        "chunk": chunk[..., :7].numpy(),
        "actions": policy.unnormalise(chunk).numpy(),
    }


def look(path, **model):
    return backbones.load_policy(path, model=model, suites=["libero_object"], read=False)


# -------------------------------------------------------------------------------------- lerobot's own outputs
@pytest.mark.parametrize("name", variants.VARIANTS)
def test_it_does_what_lerobot_does(name, tmp_path):
    found = outputs(backbones.load_policy(variants.make(name, tmp_path / "lerobot")))
    assert np.array_equal(found["tokens"], theirs[f"{name}/tokens"])
    for key in ("chunk", "actions"):
        np.testing.assert_allclose(found[key], theirs[f"{name}/{key}"], atol=1e-5, rtol=0)


def test_the_sample_that_came_with_the_folder():
    found = outputs(backbones.load_policy(QUANTILE))
    assert np.array_equal(found["tokens"], sample["tokens"])
    for key in ("chunk", "actions"):
        np.testing.assert_allclose(found[key], sample[key], atol=1e-5, rtol=0)


def test_variants_differ_where_a_setting_shows():
    """So that a setting that is ignored can't pass."""
    same = {"unchanged", "statistics of step 5", "two empty cameras", "renamed cameras", "both embeddings"}
    for name in set(variants.VARIANTS) - same - {"shorter chunk"}:
        assert np.abs(theirs[f"{name}/actions"] - theirs["unchanged/actions"]).max() > 1e-3, name


# ------------------------------------------------------------------------------------- other writers' folders
def without_embed_tokens(tensors: dict) -> None:  # as lerobot <= 0.4.4, whose one embedding is called lm_head
    tensors[variants.HEAD] = tensors.pop(variants.EMBEDDING)


def test_a_folder_of_lerobot_before_0_5_has_the_padded_prompt(folder):
    folder.tensors(without_embed_tokens)
    policy = backbones.load_policy(folder.path)
    low, high = (policy.norm_stats["state"][q] for q in ("q01", "q99"))
    bins = [
        int(np.searchsorted(np.arange(-1, 1, 1 / 128), 2 * (x - a) / (b - a) - 1, side="right")) - 1
        for x, a, b in zip(sample["state"][0], low, high, strict=True)
    ]
    prompt = f"Task: {TASK}, State: {' '.join(map(str, bins + [128] * 24))};\nAction: "
    tokens, valid = policy.inputs(batch())[2:4]
    assert tokens[valid].tolist() == [2, *policy.tokenizer.encode(prompt, add_special_tokens=False).ids]
    assert "<= 0.4.4" in " ".join(policy.found) and "32 state numbers" in " ".join(policy.found)
    policy = backbones.load_policy(QUANTILE, model={"prompt_state_dims": 32})
    np.testing.assert_array_equal(
        outputs(policy)["chunk"], outputs(backbones.load_policy(folder.path))["chunk"]
    )


def test_embed_tokens_alone_is_an_embedding(folder):
    folder.tensors(lambda tensors: tensors.pop(variants.HEAD))
    np.testing.assert_array_equal(
        outputs(backbones.load_policy(folder.path))["actions"],
        outputs(backbones.load_policy(QUANTILE))["actions"],
    )


def test_both_spellings_of_siglips_keys(folder):
    def flattened(tensors):
        for key in [key for key in tensors if ".vision_model." in key]:
            tensors[key.replace(".vision_model.", ".")] = tensors.pop(key)

    folder.tensors(flattened)
    np.testing.assert_array_equal(
        outputs(backbones.load_policy(folder.path))["actions"],
        outputs(backbones.load_policy(QUANTILE))["actions"],
    )


def norm_stats(n: int = 32) -> dict:  # openpi's, padded to n
    tensors = load_file(next(QUANTILE.glob("policy_post*.safetensors")))
    return {
        "norm_stats": {
            kind: {
                key: tensors[f"{key_of}.{key}"].tolist()
                + [0.0] * max(0, n - tensors[f"{key_of}.{key}"].numel())
                for key in ("mean", "std", "q01", "q99")
            }
            for kind, key_of in (("actions", "action"), ("state", "observation.state"))
        }
    }


def test_openpis_statistics_stand_in_for_lost_ones(folder):
    """The processors name files that are gone: the folder's settings are lerobot's."""
    for path in folder.path.glob("policy_*.safetensors"):
        path.unlink()
    (folder.path / "norm_stats.json").write_text(json.dumps(norm_stats()))
    policy = backbones.load_policy(folder.path)
    np.testing.assert_allclose(outputs(policy)["actions"], sample["actions"], atol=1e-5, rtol=0)
    assert "pi05_libero_base" in " ".join(policy.found) and "norm_stats.json" in " ".join(policy.found)


def test_pi05_libero_base_runs_with_openpis_settings(folder):
    """No statistics were ever written: openpi's weights in lerobot's format."""
    for name, step in ((variants.PRE, "normalizer"), (variants.POST, "unnormalizer")):
        folder.edit(
            name,
            lambda c, step=step: [s.pop("state_file", "") for s in c["steps"] if step in s["registry_name"]],
        )
    for path in folder.path.glob("policy_*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match=r"lacks the statistics.*gsutil cp -r gs://openpi-assets"):
        look(folder.path)
    (folder.path / "norm_stats.json").write_text(json.dumps(norm_stats()))
    policy = look(folder.path)
    cfg, words = policy.cfg, " ".join(policy.found)
    assert (cfg.prompt, cfg.horizon, cfg.normalisation, cfg.resize) == ("openpi", 10, "quantile", "openpi")
    assert "prompt without state, 10 actions and quantiles" in words and "pi05_libero_base" in words
    assert look(folder.path, prompt="lerobot", horizon=50).horizon == 50


def add_assets(folder: Path, name: str, shift: float) -> None:
    stats = norm_stats(7)
    stats["norm_stats"]["actions"]["q01"][0] += shift
    (folder / "assets" / name).mkdir(parents=True)
    (folder / "assets" / name / "norm_stats.json").write_text(json.dumps(stats))


@pytest.mark.parametrize("numbers", ["3", "dpo", "03 4"])
def test_stages_that_are_none_are_named(numbers, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["preflight", "configs/try.yaml", numbers, "--config-only"])
    with pytest.raises(UserError, match="two digits"):
        preflight.main()


def test_two_asset_ids_are_a_choice(tmp_path):
    published_files.write_openpi(tmp_path)
    shutil.rmtree(tmp_path / "assets")
    add_assets(tmp_path, "physical-intelligence/libero", 0)
    add_assets(tmp_path, "mine", 1)
    with pytest.raises(UserError, match=r"mine, physical-intelligence/libero.*asset_id: mine"):
        look(tmp_path)
    with pytest.raises(UserError, match="has statistics of mine"):
        look(tmp_path, asset_id="other")
    first = [
        look(tmp_path, asset_id=name).norm_stats["action"]["q01"][0]
        for name in ("mine", "physical-intelligence/libero")
    ]
    assert first[0] == first[1] + 1


def test_openpis_prompt_with_state(tmp_path):
    """discrete_state_input, which no file of a conversion tells."""
    published_files.write_openpi(tmp_path)
    assert "discrete_state_input" in " ".join(look(tmp_path).found)
    policy = look(tmp_path, prompt="lerobot")
    assert policy.prompt("a_b\n", np.zeros(8)) == f"Task: a b, State: {' '.join(['128'] * 8)};\nAction: "


def test_a_folder_of_openpis_training_has_no_config(tmp_path):
    published_files.write_openpi(tmp_path)
    (tmp_path / "config.json").unlink()
    assert look(tmp_path).horizon == 10 and look(tmp_path, horizon=20).horizon == 20


# ------------------------------------------------------------------------------------------------- tokenizers
@pytest.mark.parametrize("name", ["paligemma_tokenizer.model", "tokenizer.model"])
def test_a_sentencepiece_tokenizer_gives_sentencepieces_tokens(name, tmp_path):
    """The ids are those of sentencepiece 0.2.3 itself, on a tiny tokenizer with PaliGemma's settings."""
    pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    made = published_files.tensors("pi05")
    made = {k: torch.cat([t, t])[:480] if "lm_head" in k else t for k, t in made.items()}
    published_files.write_openpi(tmp_path, made)
    (tmp_path / "tokenizer.json").unlink()
    shutil.copy(FIXTURES / "sentencepiece" / "tokenizer.model", tmp_path / name)
    policy = backbones.load_policy(tmp_path)
    wanted = json.loads((FIXTURES / "sentencepiece" / "tokens.json").read_text())
    assert policy.ids([*wanted], 2) == [[2, *ids] for ids in wanted.values()]
    policy.save(tmp_path / "own")
    assert backbones.load_policy(tmp_path / "own").ids([*wanted], 2) == [[2, *i] for i in wanted.values()]


def test_a_sentencepiece_tokenizer_without_its_packages(tmp_path, monkeypatch):
    published_files.write_openpi(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    shutil.copy(FIXTURES / "sentencepiece" / "tokenizer.model", tmp_path / "paligemma_tokenizer.model")
    from transformers import utils

    for name in ("sentencepiece", "protobuf"):
        monkeypatch.setitem(
            utils.import_utils.BACKENDS_MAPPING, name, (lambda: False, "{0} is not installed")
        )
    with pytest.raises(UserError, match=r"pip install -e '\.\[tokenizer\]'"):
        look(tmp_path)


# ---------------------------------------------------------------------------------------------------- OpenVLA
@pytest.mark.parametrize("cached", [True, False])
def test_pixel_statistics_are_the_files(cached, tmp_path):
    published_files.write_openvla(tmp_path)
    rounded = [[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]], [[0.25, 0.2236328125, 0.5], [0.5] * 3]
    means, stds = ([[0.485, 0.456, 0.406], [0.5] * 3], [[0.229, 0.224, 0.225], [0.5] * 3])
    config = {"means": means, "stds": stds, "image_resize_strategy": "resize-naive"}
    params = [{"inplace": False, "mean": m, "std": s} for m, s in zip(*rounded, strict=True)]
    config |= {"tvf_normalize_params": params} if cached else {"means": rounded[0], "stds": rounded[1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    policy = look(tmp_path, **MODEL, image_pipeline="none")
    image = torch.full((1, 16, 16, 3), 128, dtype=torch.uint8)
    wanted = (128 / 255 - np.array(rounded[0])) / np.array(rounded[1])
    np.testing.assert_allclose(policy.pixels(image)[0, :, 3, 3], wanted.flatten(), atol=1e-6)
    assert "preprocessor_config.json" in " ".join(policy.found)
    config["tvf_normalize_params"] = [{"mean": [0.5] * 3, "std": [0.5, 0.0, 0.5]}] * 2
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="pixel_stds"):
        look(tmp_path, **MODEL)


def test_pixel_statistics_without_a_file_are_imagenets(tmp_path):
    published_files.write_openvla(tmp_path)
    assert look(tmp_path, **MODEL).cfg.pixel_means[0] == [0.485, 0.456, 0.406]


# --------------------------------------------------------------------------------------- refused, by its name
def six_joints(f: variants.Folder) -> None:
    f.edit("config", lambda c: c["output_features"]["action"].update(shape=[6]))


def six_in_the_statistics(f: variants.Folder) -> None:
    for path in f.path.glob("policy_*.safetensors"):
        save_file({k: t[:6] if k.startswith("action.q") else t for k, t in load_file(path).items()}, path)


def camera(f: variants.Folder) -> None:
    new = {"observation.images.left_wrist_0_rgb": {"type": "VISUAL", "shape": [3, 224, 224]}}
    f.edit("config", lambda c: c["input_features"].update(new))


def step(f: variants.Folder) -> None:
    f.edit(variants.PRE, lambda c: c["steps"].append({"registry_name": "crop_processor", "config": {}}))


LEROBOT = {
    "another robot": (six_joints, r"another robot's policy: its action has \[6\] numbers, LIBERO's 7"),
    "another robot's state": (
        lambda f: f.edit("config", lambda c: c["input_features"]["observation.state"].update(shape=[14])),
        r"its state has \[14\] numbers",
    ),
    "another robot's statistics": (six_in_the_statistics, r"its action has \[6\] numbers"),
    "relative actions": (
        lambda f: f.edit("config", lambda c: c.update(use_relative_actions=True)),
        "relative actions",
    ),
    "another sense of time": (
        lambda f: f.edit("config", lambda c: c.update(min_period=0.04)),
        r"embeds time with periods of \[0.04, 4.0\]",
    ),
    "relative by a step": (
        lambda f: f.step(variants.POST, "absolute_actions_processor", enabled=True),
        "relative actions",
    ),
    "a camera that LIBERO lacks": (camera, "left_wrist_0_rgb"),
    "a step that is not known": (step, "crop_processor"),
    "normalised images": (
        lambda f: f.normalise(norm_map=variants.modes("QUANTILES", "QUANTILES") | {"VISUAL": "MEAN_STD"}),
        "VISUAL",
    ),
    "an unknown mode": (lambda f: f.normalise(norm_map=variants.modes("LOG", "LOG")), "LOG"),
    "half of the observations": (
        lambda f: f.step(variants.PRE, "normalizer_processor", normalize_observation_keys=[]),
        "normalises by",
    ),
    "lost statistics": (
        lambda f: [path.unlink() for path in f.path.glob("policy_*.safetensors")],
        "lacks the statistics, policy_preprocessor",
    ),
    "no tokenizer": (
        lambda f: (f.path / "tokenizer.json").unlink(),
        r"accept the licence of google/paligemma-3b-pt-224.*`hf download google/paligemma-3b-pt-224"
        r" tokenizer\.json --local-dir ",
    ),
}


@pytest.mark.parametrize("fault", LEROBOT)
def test_what_the_kit_can_not_do_is_refused_by_its_name(fault, folder):
    change, words = LEROBOT[fault]
    change(folder)
    with pytest.raises(UserError, match=words) as error:
        look(folder.path)
    assert "\n" not in str(error.value)


def test_a_camera_can_be_given_a_name(folder):
    camera(folder)
    assert look(folder.path, cameras=["wrist", "agentview"]).cfg.cameras == ["wrist", "agentview"]


OTHERS = {
    "OFT's parts": ("openvla", "action_head--10000_checkpoint.pt", "OpenVLA-OFT"),
    "OFT's adapter": ("openvla", "lora_adapter/adapter_config.json", "OpenVLA-OFT"),
    "JAX": ("openpi", "params/_METADATA", r"JAX.*convert_jax_model_to_pytorch\.py.*cp -r"),
    "JAX's parameters": ("openpi", "manifest.ocdbt", "JAX"),
}


@pytest.mark.parametrize("fault", OTHERS)
def test_another_codes_folder_is_named(fault, tmp_path):
    kind, name, words = OTHERS[fault]
    if kind == "openvla":  # OFT has OpenVLA's keys too
        published_files.write_openvla(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=words):
        look(tmp_path)


def test_openvlas_vision_backbone_file_alone_is_oft(tmp_path):
    published_files.write_openvla(tmp_path)
    (tmp_path / "vision_backbone--5000_checkpoint.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"vision_backbone--5000_checkpoint\.pt"):
        look(tmp_path)


def test_oft_with_tokens_is_told_by_its_code(tmp_path):
    """It has neither a head nor other keys, but its code decodes chunks."""
    published_files.write_openvla(tmp_path)
    code = tmp_path / "modeling_prismatic.py"
    code.write_text("class OpenVLAForActionPrediction: ...")  # OpenVLA's own file
    look(tmp_path, **MODEL)
    code.write_text("from prismatic.vla.constants import ACTION_DIM, NUM_ACTIONS_CHUNK")
    with pytest.raises(UserError, match=r"OpenVLA-OFT.*modeling_prismatic\.py"):
        look(tmp_path, **MODEL)


def test_padding_that_a_tokenizers_file_prescribes_changes_nothing(folder):
    wanted = look(folder.path).tokenize([TASK])
    folder.edit(
        "tokenizer",
        lambda c: c.update(
            truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
            padding={
                **{"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None},
                **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
            },
        ),
    )
    for ours, its in zip(look(folder.path).tokenize([TASK]), wanted, strict=True):
        assert torch.equal(ours, its)


# ------------------------------------------------------------------------------------------------- the stages
def test_no_weight_is_read(folder, monkeypatch):
    def only_statistics(path):
        assert "normalizer" in path.name, path
        return load_file(path)

    class NoTensor:
        """safetensors' open file, which gives names and shapes alone."""

        def __init__(self, path, framework):
            self.opened, self.path = safe_open(path, framework), path

        def __enter__(self):
            self.file = self.opened.__enter__()
            return self

        def __exit__(self, *error):
            self.opened.__exit__(*error)

        def __getattr__(self, name):
            assert name != "get_tensor", f"{self.path} was read"
            return getattr(self.file, name)

    monkeypatch.setattr(published, "safe_open", NoTensor)
    monkeypatch.setattr(disk, "load_tensors", only_statistics)
    policy = look(folder.path)
    assert all(p.is_meta for p in policy.parameters()) and policy.norm_stats and policy.tokenizer
    with pytest.raises(AssertionError, match=r"model\.safetensors"):
        backbones.load_policy(folder.path)


def start(root: Path, path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(HERE / "02_collect_prefs.py"), str(HERE / "configs" / "pi05.yaml")]
    command += [f"root={root}", f"checkpoint={path}", "device=cpu", "dtype=float32", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE)


def test_a_stage_begins_with_a_look(folder, tmp_path):
    (folder.path / "tokenizer.json").unlink()
    result = start(tmp_path / "runs", folder.path)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "licence" in result.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("dry", [False, True])
def test_a_checkpoint_that_is_nowhere(dry, tmp_path):
    cfg = prefs.Config(root=str(tmp_path / "runs"), name="x", checkpoint=str(tmp_path / "no"), dry_run=dry)
    with pytest.raises(
        UserError, match=r"no checkpoint .*`hf download lerobot/pi05_libero_finetuned --local"
    ):
        stage.execute(prefs.main, cfg, backbones.preview)
    assert not (tmp_path / "runs").exists()
    given = [str(HERE / "configs" / "pi05.yaml"), f"checkpoint={tmp_path / 'no'}", "device=cpu"]
    with pytest.raises(UserError, match="no checkpoint"):
        preflight.print_config(given, ["02", "03", "04", "08"])


def test_the_config_check_says_what_was_found(folder, capsys):
    given = [str(HERE / "configs" / "pi05.yaml"), f"checkpoint={folder.path}", "device=cpu"]
    preflight.print_config(given, ["02", "04"])
    said = capsys.readouterr().out
    assert said.count(f"{folder.path} is a checkpoint of lerobot for pi05") == 1
    for words in ("lerobot >= 0.5", "8 state numbers", "cameras: agentview, wrist", "50 actions"):
        assert words in said
    for words in ("action: quantile, epsilon 1e-08", "policy_preprocessor_step_3_normalizer_processor"):
        assert words in said


def test_a_wrong_backbone_and_too_long_an_execution_are_seen_first(folder):
    with pytest.raises(UserError, match="set backbone=pi05"):
        backbones.preview(common.ActingConfig(checkpoint=str(folder.path), backbone="openvla"), "eval")
    with pytest.raises(UserError, match="execute=60 must be at most 50"):
        backbones.preview(common.ActingConfig(checkpoint=str(folder.path), execute=60), "eval")


@pytest.mark.parametrize("steps", [10, 3])
def test_n_action_steps_is_the_default_of_execute(steps, folder):
    folder.edit("config", lambda c: c.update(n_action_steps=steps))
    for config in (prefs.Config, evaluation.Config):
        assert config(checkpoint=str(folder.path)).execute == steps
        assert config(checkpoint=str(folder.path), execute=5).execute == 5
        assert (
            config().execute == config(checkpoint=str(HERE / "checkpoints/tiny_libero_object")).execute == 8
        )


def test_num_inference_steps_is_the_default_of_denoise_steps(folder):
    folder.edit("config", lambda c: c.update(num_inference_steps=3))
    assert evaluation.Config(checkpoint=str(folder.path)).denoise_steps == 3
    assert evaluation.Config(checkpoint=str(folder.path), denoise_steps=5).denoise_steps == 5
    assert evaluation.Config().denoise_steps == 10


@pytest.mark.parametrize("content", ["[]", '{"n_action_steps": "x"}', '{"n_action_steps": 0}', "{"])
def test_n_action_steps_that_is_none(content, folder):
    (folder.path / "config.json").write_text(content)
    with pytest.raises(UserError):
        prefs.Config(checkpoint=str(folder.path))
