"""Published formats with random weights: read, used, trained, refused. pytest tests/test_published.py"""

import importlib
import json
import shutil

import numpy as np
import published_files
import pytest
import torch
from safetensors.torch import load_file, save_file

import backbones
import common
from backbones.published import key_here
from runtime.config import HERE, load_config
from runtime.errors import UserError

WRITERS = {kind: getattr(published_files, f"write_{kind}") for kind in ("openvla", "lerobot", "openpi")}
MODEL = {
    "openvla": {"bos": 2, "eos": 1, "space": 4},
    "lerobot": {},
    "openpi": {},
}  # ids of the small tokenizer
dpo = importlib.import_module("03_dpo")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    """A folder of each format, with the tensors written."""
    made = {}
    for kind, write in WRITERS.items():
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = folder, write(folder)
    return made


def load(folder, kind: str, **model):
    return backbones.load_policy(folder, model=MODEL[kind] | model, suites=["libero_object"])


def observations(n: int = 2) -> dict:
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, n, 64, 64, 3), dtype=torch.uint8, generator=g)
    instructions = published_files.INSTRUCTIONS[:n]
    return {
        "agentview": images[0],
        "wrist": images[1],
        "state": torch.randn(n, 8, generator=g),
        "instruction": instructions,
    }


def sample(policy) -> torch.Tensor:
    noise = policy.noise(2, torch.Generator().manual_seed(0))
    return policy.unnormalise(policy.sample_actions(policy.encode(observations()), noise, 4))


@pytest.mark.parametrize("kind", WRITERS)
def test_every_tensor_arrives(kind, folders):
    folder, made = folders[kind]
    policy = load(folder, kind)
    own, used = policy.state_dict(), 0
    for key, tensor in made.items():
        name = key_here(key, policy.backbone, policy.cfg)
        if name is None:
            continue
        parts = [own[name.format(part)] for part in "qkv"] if "{}" in name else [own[name]]
        got = torch.cat(parts)
        assert got.dtype == torch.bfloat16 and torch.equal(got, tensor.reshape(got.shape)), key
        used += len(parts)
    assert used == len(own) and not any(t.is_meta for t in [*policy.parameters(), *policy.buffers()])
    assert not policy.training and policy.norm_stats["action"]["mean"] == pytest.approx(
        published_files.statistics(7)["mean"]
    )


@pytest.mark.parametrize("kind", WRITERS)
def test_it_acts_and_comes_back_from_the_kits_own_format(kind, folders, tmp_path):
    policy = load(folders[kind][0], kind).cast("float32")
    actions = sample(policy)
    assert actions.shape == (2, policy.horizon, 7) and actions.isfinite().all()
    policy.save(tmp_path)
    assert torch.equal(sample(backbones.load_policy(tmp_path)), actions)


@pytest.mark.parametrize("kind", WRITERS)
def test_in_bfloat16_it_does_nearly_the_same(kind, folders):
    exact, rough = load(folders[kind][0], kind).cast("float32"), load(folders[kind][0], kind).cast("bfloat16")
    chunk = torch.rand(2, exact.horizon, 7, generator=torch.Generator().manual_seed(2)) * 2 - 1
    draws = exact.draws(2, 4, torch.Generator().manual_seed(3), "stratified")
    mask = torch.ones(2, exact.horizon, dtype=torch.bool)
    want, got = (p.log_prob(p.encode(observations()), chunk, draws, mask, "velocity") for p in (exact, rough))
    assert got.dtype == torch.float32 and rough.encode(observations()).keys.dtype == torch.bfloat16
    assert torch.allclose(got, want, rtol=0.05) and not torch.equal(got, want)


def gradients_of_a_dpo_step(kind, recompute, folders) -> dict:
    policy = load(folders[kind][0], kind).cast("float32")
    common.attach_adapter(policy, "dora", 4, 8, policy.adapter_targets, 0)
    policy.recompute = recompute
    g = torch.Generator().manual_seed(4)
    pair = [torch.rand(2, policy.horizon, 7, generator=g) * 2 - 1 for _ in range(2)]
    draws, mask = policy.draws(2, 4, g, "stratified"), torch.ones(2, policy.horizon, dtype=torch.bool)
    with policy.reference():
        ref = dpo.log_probs(policy, observations(), *pair, mask, draws, "velocity")
    own = dpo.log_probs(policy, observations(), *pair, mask, draws, "velocity")
    loss, rewards = dpo.dpo_loss(*own, *ref, 0.1)
    assert (rewards["rewards/margins"] == 0).all()
    loss.backward()
    grads = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad and p.grad is not None}
    assert any(g.abs().sum() > 0 for g in grads.values())
    return grads


@pytest.mark.parametrize("kind", ["openvla", "lerobot"])
def test_a_dpo_step_gives_the_same_gradients_when_activations_are_recomputed(kind, folders):
    kept, again = (gradients_of_a_dpo_step(kind, recompute, folders) for recompute in (False, True))
    assert kept.keys() == again.keys() and all(torch.allclose(again[k], kept[k], atol=1e-7) for k in kept)


def test_switches_are_read_and_overridden(folders, tmp_path):
    cfg = load(folders["lerobot"][0], "lerobot").cfg
    assert (cfg.prompt, cfg.prompt_state_dims, cfg.normalisation, cfg.horizon, cfg.max_tokens) == (
        "lerobot",
        32,
        "mean_std",
        6,
        60,
    )
    assert load(folders["lerobot"][0], "lerobot", prompt_state_dims=8).cfg.prompt_state_dims == 8
    cfg = load(folders["openpi"][0], "openpi").cfg
    assert (cfg.prompt, cfg.normalisation, cfg.horizon, cfg.flow_dim, cfg.vision.image_size) == (
        "openpi",
        "quantile",
        10,
        32,
        16,
    )
    cfg = load(folders["openvla"][0], "openvla").cfg
    assert (cfg.vocab_size, cfg.llm.num_heads, cfg.dino.num_hidden_layers, cfg.image_size) == (832, 4, 2, 16)
    with pytest.raises(UserError, match="libero_object_no_noops"):
        backbones.load_policy(folders["openvla"][0], model=MODEL["openvla"])
    with pytest.raises(UserError, match="no q01"):
        policy = load(folders["lerobot"][0], "lerobot", normalisation="quantile")
        policy.normalise(np.zeros(7, np.float32))
    published_files.write_lerobot(tmp_path, normalization_mapping={"STATE": "MEAN_STD", "ACTION": "RANK"})
    with pytest.raises(UserError, match="normalises by"):
        load(tmp_path, "lerobot")


def test_a_gripper_from_0_to_1_is_no_liberos(tmp_path, monkeypatch):
    def from_0(n, named=published_files.statistics):
        made = named(n)
        for key in ("min", "q01"):
            made[key][6] = 0.0
        return made

    monkeypatch.setattr(published_files, "statistics", from_0)
    published_files.write_openpi(tmp_path)
    with pytest.raises(UserError, match=r"gripper commands from \[0"):
        load(tmp_path, "openpi")


def test_a_wrist_camera_may_have_the_name_of_other_sets(tmp_path):
    features = {"type": "VISUAL", "shape": [3, 16, 16]}
    names = [f"observation.images.{name}" for name in ("image", "wrist_image")]
    published_files.write_lerobot(tmp_path, input_features=dict.fromkeys(names, features))
    assert load(tmp_path, "lerobot").cfg.cameras == ["agentview", "wrist"]


def test_a_stage_starts_from_it(folders):
    cfg = common.StartConfig(
        checkpoint=str(folders["openvla"][0]), model=MODEL["openvla"], backbone="openvla", dtype="bfloat16"
    )
    policy = backbones.load_sft(cfg)
    assert policy.projector["fc1"].weight.dtype == torch.bfloat16 and not policy.training
    assert {p.name for p in cfg.sft_inputs()} >= {
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
    }
    for changes, words in (
        ({"start": "750"}, "set start= to what is there"),
        ({"backbone": "pi05"}, "backbone=openvla"),
        ({"checkpoint": "x"}, "no checkpoint"),
    ):
        changed = common.StartConfig(
            **{"checkpoint": cfg.checkpoint, "model": cfg.model, "backbone": "openvla"} | changes
        )
        with pytest.raises(UserError, match=words):
            changed.sft_inputs()
            backbones.load_sft(changed)


# ------------------------------------------------------------------------------------------------ wrong files
def without(folder, key: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors")


def rename_to_pi0(folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.action_time_mlp_in.weight"] = tensors["model.time_mlp_in.weight"].clone()
    save_file(tensors, folder / "model.safetensors")


def index_outside(folder) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only(folder, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"x")


def cut(folder) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


FAULTS = {
    "a shard is missing": (
        "openvla",
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        "00002-of-00002",
    ),
    "the index leads outside": ("openvla", index_outside, "elsewhere"),
    "shards beside a single file": (
        "openvla",
        lambda f: shutil.copy(f / "model-00001-of-00002.safetensors", f / "model.safetensors"),
        "which the original code reads, and shards",
    ),
    "statistics of another suite": (
        "openvla",
        lambda f: (f / "dataset_statistics.json").write_text('{"bridge": {}}'),
        "bridge",
    ),
    "no tokenizer": ("openvla", lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "no tokenizer but a page": (
        "openvla",
        lambda f: (f / "tokenizer.json").write_text("<html>"),
        "no tokenizer",
    ),
    "a tensor is missing": ("lerobot", lambda f: without(f, "model.time_mlp_out.bias"), "time_mlp_out.bias"),
    "a size is missing": (
        "lerobot",
        lambda f: without(f, "model.action_in_proj.weight"),
        "action_in_proj.weight",
    ),
    "pi-0": ("lerobot", rename_to_pi0, "pi-0 checkpoint"),
    "no statistics": ("lerobot", lambda f: next(f.glob("policy_pre*")).unlink(), "policy_preprocessor"),
    "a pickle": ("openpi", lambda f: only(f, "pytorch_model.bin"), "pickle"),
    "an adapter": ("openpi", lambda f: only(f, "adapter_model.safetensors"), "adapter"),
    "an adapter beside weights": (
        "openpi",
        lambda f: shutil.copy(f / "model.safetensors", f / "adapter_model.safetensors"),
        "adapter",
    ),
    "cut short": ("openpi", cut, "truncated"),
    "a git-LFS pointer": (
        "openpi",
        lambda f: (f / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        ),
        "git-LFS",
    ),
    "no assets": ("openpi", lambda f: next(f.rglob("norm_stats.json")).unlink(), "norm_stats.json"),
    "another model": (
        "openpi",
        lambda f: save_file({"bert.weight": torch.zeros(2)}, f / "model.safetensors"),
        "bert",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_checkpoints_are_refused_in_one_line(fault, tmp_path):
    kind, damage, words = FAULTS[fault]
    WRITERS[kind](tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        load(tmp_path, kind)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["openvla_7b", "openvla_7b_corrected"])
def test_openvla_is_greedy_in_play_outs_and_evaluations(name):
    """Only the chunks that are tried at a decision point are sampled."""
    arguments = [str(HERE / "configs" / f"{name}.yaml"), "device=cpu", "dtype=float32"]
    stages = {
        section: importlib.import_module(script)
        for section, script in (("prefs", "02_collect_prefs"), ("eval", "04_eval"))
    }
    cfgs = {section: load_config(module.Config, arguments) for section, module in stages.items()}
    assert [cfg.noise_scale for cfg in cfgs.values()] == [0, 0] and cfgs["prefs"].branch_scale > 0


def test_a_lora_that_openpis_converter_dropped_is_said(tmp_path, capsys):
    published_files.write_openpi(tmp_path)
    assert load(tmp_path, "openpi") and "LoRA" not in capsys.readouterr().out
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"paligemma_variant": "gemma_2b_lora"}))
    assert load(tmp_path, "openpi") and "trained with LoRA" in capsys.readouterr().out


def test_named_statistics_are_taken_or_refused_of_a_lerobot_folder_too(tmp_path):
    published_files.write_lerobot(tmp_path)
    own = load(tmp_path, "lerobot").norm_stats["action"]
    assets = tmp_path / "assets" / "mine"
    assets.mkdir(parents=True)
    stats = {key: published_files.statistics(n) for key, n in (("actions", 7), ("state", 8))}
    stats["actions"]["mean"] = [0.5] * 7
    (assets / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    assert load(tmp_path, "lerobot").norm_stats["action"] == own
    assert load(tmp_path, "lerobot", asset_id="mine").norm_stats["action"]["mean"] == [0.5] * 7
    with pytest.raises(UserError, match="has statistics of mine"):
        load(tmp_path, "lerobot", asset_id="nonsense")
