"""The blocks of the experiments (extras/blocks.py): F's data, the commands, what is written of a block."""

import importlib
import json
import shutil

import pytest
import torch

import backbones
import common
from extras import blocks, grpo, losses
from report import claims
from runtime import HERE, disk
from runtime.config import load_config
from runtime.errors import UserError

SCRIPTS = ("00_demos.py", "01_sft.py", "02_collect_prefs.py", "03_dpo.py", "04_eval.py")
KEYS = ("agentview", "wrist", "state", "mask")


def tensors(first: int, n: int, *chunks: str) -> dict:
    values = torch.arange(first, first + n, dtype=torch.float32)[:, None]
    return {key: values.clone() for key in (*KEYS, *chunks)}


def test_cloning_takes_the_successes_of_attempts_that_are_not_held_out(tmp_path):
    """Attempts with pairs: (0, 0), (0, 2), (1, 1). With held_out=2, the first and third are held."""
    pairs = [(0, 0), (0, 2), (0, 2), (1, 1)]
    tried = [(0, 0, True), (0, 1, True), (0, 2, False), (0, 2, True), (1, 0, True), (1, 1, True)]
    names = {"suite": "libero_object", "instruction": "look"}
    disk.write_rows(tmp_path / "pairs.jsonl", [names | {"task": t, "unit": u} for t, u in pairs])
    rows = [names | {"task": t, "unit": u, "success": s} for t, u, s in tried]
    disk.write_rows(tmp_path / "tried.jsonl", rows)
    disk.save_tensors(tmp_path / "tried.safetensors", tensors(0, 6, "chunk"))
    blocks.successes(tmp_path, tmp_path / "f", 2)
    made, rows = (
        disk.load_tensors(tmp_path / "f/pairs.safetensors"),
        disk.read_jsonl(tmp_path / "f/pairs.jsonl"),
    )
    assert made["chosen"][:, 0].tolist() == [1, 3, 4] and made["rejected"][:, 0].tolist() == [4, 1, 3]
    assert [(row["task"], row["unit"]) for row in rows] == [(0, 1), (0, 2), (1, 0)]


def test_03_takes_the_pairs_of_cloning(tmp_path):
    """Each chosen chunk is a success; 03 refuses pairs in which no two chunks differ."""
    source = HERE / "checkpoints" / "try" / "pi05" / "prefs"
    pairs, rows = disk.load_tensors(source / "pairs.safetensors"), disk.read_jsonl(source / "pairs.jsonl")
    names = ("agentview", "wrist", "state", "mask")
    disk.save_tensors(
        tmp_path / "tried.safetensors", {n: pairs[n] for n in names} | {"chunk": pairs["chosen"]}
    )
    disk.write_rows(tmp_path / "tried.jsonl", [row | {"success": True} for row in rows])
    disk.write_rows(tmp_path / "pairs.jsonl", rows)
    blocks.successes(tmp_path, tmp_path / "f", 0)
    cloned = common.read_pairs(tmp_path / "f")
    assert torch.equal(cloned["chosen"], pairs["chosen"])


def test_a_block_writes_every_held_out_episode_of_its_arms(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "HERE", tmp_path)
    cfg = load_config(common.AdapterConfig, ["configs/blocks.yaml", "seed=7"])
    (tmp_path / "results/look").mkdir(parents=True)
    (tmp_path / "results/look/plan.md").write_text("plan", encoding="utf-8")
    facts = {"beta": 2.0, "pairs": 9, "delivered": {"nats": 1.0}}
    made = {
        "A": "prefs-branch-at2000",
        "D": "dpo-lora-branch-at2000",
        "kto": "losses-kto-at2000/lora",
        "B-text": "dpo-lora-episode-at2000",
    }
    spent = {"A": {"playouts": 950}, "kto": {"playouts": 960}}  # DPO's own record has none
    text = tmp_path / "runs/blocks/pi05/seed7/prefs-episode-at2000/done.json"
    for arm, folder in made.items():
        seed_dir = tmp_path / "runs" / ("blocks" if arm == "A" else f"blocks_{arm}") / "pi05" / "seed7"
        row = {
            "suite": "libero_object",
            "task": 0,
            "success": True,
            "steps": 9,
            "crash": "",
            "right_place": 0.5,
        }
        policy, other = ("sft", "dpo") if arm == "A" else ("dpo", "sft")
        pairs = "episode" if arm == "B-text" else "branch"
        of_arm = {"adapter": "lora", "pairs": pairs, "surrogate": "paper"}
        for name, seed, init, *used in (
            ("eval-x", 7, 40, "test", "2000", False, policy, 0),
            ("eval-x-noise1007", 1007, 41, "test", "2000", False, policy, 1007),
            ("eval-x-val", 7, 35, "val", "2000", False, policy, 0),
            ("eval-final", 7, 40, "test", "final", False, policy, 0),  # in the same folder, not of the block
            ("eval-x-blank", 7, 40, "test", "2000", True, policy, 0),
            ("eval-x-noise9", 9, 42, "test", "2000", False, policy, 9),
            ("eval-y", 7, 43, "test", "2000", False, other, 0),
            ("eval-z-exact", 7, 44, "test", "2000", False, "dpo", 0),  # another training in an arm's folder
        ):
            (seed_dir / name).mkdir(parents=True)
            disk.write_rows(seed_dir / name / "episodes.jsonl", [row | {"seed": seed, "init_state": init}])
            keys = ("group", "start", "blank_images", "policy", "noise_seed")
            config = dict(zip(keys, used, strict=True)) | ({} if arm == "A" else of_arm)
            if name == "eval-z-exact":
                config["surrogate"] = "exact"
            disk.write_json(seed_dir / name / "done.json", {"config": config, "inputs": {}})
            disk.write_json(seed_dir / name / "timing.json", {})
        shutil.copytree(
            seed_dir / "eval-x", seed_dir / "eval-older"
        )  # of weights that have been made anew since
        older = disk.read_json(seed_dir / "eval-older" / "done.json") | {"inputs": {"older.json": "x"}}
        disk.write_json(seed_dir / "eval-older" / "done.json", older)
        (seed_dir.parents[1] / "older.json").write_text("made anew")
        (seed_dir / folder).mkdir(parents=True)
        config = {"config": of_arm | {"start": "2000", "blank_images": False}}
        disk.write_json(seed_dir / folder / "done.json", facts | config | {"more": 1} | spent.get(arm, {}))
        disk.write_json(seed_dir / folder / "timing.json", {"commit": "abc", "host": "x"})
        if arm != "A":
            disk.write_json(seed_dir / folder / "adapter_config.json", {})
        if arm == "D":  # beta 2; of four lines the last two count
            log = [{"rewards/chosen": reward, "rewards/rejected": -reward} for reward in (90, 90, 2, 6)]
            disk.write_rows(seed_dir / folder / "metrics.jsonl", log)
    text.parent.mkdir()
    disk.write_json(text, {"playouts": 800})
    in_d = tmp_path / "runs/blocks_D/pi05/seed7"
    for other in ({"surrogate": "exact"}, {"adapter": "dora"}):  # trained by hand in D's folder
        shutil.copytree(in_d / made["D"], also := in_d / f"dpo-{[*other.values()]}")
        done = disk.read_json(also / "done.json")
        disk.write_json(also / "done.json", done | {"beta": 99.0, "config": done["config"] | other})
    disk.write_json(tmp_path / "runs/blocks_B-text/pi05/seed7/delivered.json", {"nats": 3.0})
    killed = tmp_path / "runs" / "blocks_C" / "pi05" / "seed7"  # between its two evaluations
    shutil.copytree(seed_dir, killed)
    for name in ("eval-x-noise1007", "eval-older"):
        shutil.rmtree(killed / name)
    blocks.collect("look", cfg, blocks.LOOK, [0, 1007], {"A", "D"})
    with pytest.raises(UserError, match=r"the record has arm C, but .*blocks_C.* not all its episodes"):
        blocks.collect("look", cfg, blocks.LOOK, [0, 1007], {"A", "C"})
    out = tmp_path / "results/look/blocks"
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "results")
    plan = {"folder": "look/blocks", "primary": [["D", "A"]], "exploratory": []}
    arms, records = claims.read_blocks(plan)  # what the report makes of it
    assert not claims.read_blocks(plan | {"suite": "libero_10"})[0]
    assert claims.read_blocks(plan | {"suite": "libero_object"})[0] == arms
    without = claims.read_blocks(plan | {"primary": [["later", "A"]]})[0]  # no block has this plan's arm
    assert not any(without.values())
    assert {arm: list(of_arm) for arm, of_arm in arms.items()} == {arm: [7] for arm in made}
    assert {arm: [r["delivered"]["nats"] for r in of_arm] for arm, of_arm in records.items()} == {
        "D": [1.0],
        "kto": [1.0],
        "B-text": [3.0],  # on the block's pairs, not on its own
    }
    assert {arm: r["playouts"] for arm, (r,) in records.items()} == {"D": 950, "kto": 960, "B-text": 800}
    for arm in made:
        played = [(r["seed"], r["init_state"], r["success"]) for r in arms[arm][7]]
        assert played == [(7, 40, True), (1007, 41, True)]
    record = json.loads((out / "seed7.json").read_text(encoding="utf-8"))
    moved = {"trained": {"chosen": 2.0, "rejected": -2.0}}
    assert record["arms"]["D"] == facts | moved | {"playouts": 950, "commit": "abc"}
    assert record["arms"]["kto"]["trained"] == {}
    assert record["plan"] == disk.sha256(tmp_path / "results/look/plan.md") and record["playouts"] == 950


def test_every_arm_is_measured_on_the_blocks_own_pairs(tmp_path):
    """An untrained adapter moves nothing; that of the kit moves the pairs as 03 says."""
    start = HERE / "checkpoints" / "try" / "pi05"
    words = ["configs/try.yaml", f"checkpoint={start / 'sft'}", f"pairs_from={start / 'prefs'}", "held_out=5"]
    cfg = load_config(blocks.dpo.Config, words)
    policy = backbones.load_sft(cfg)
    _, held = blocks.dpo.load_pairs(cfg, policy)
    adapted = common.attach_adapter(policy, "lora", 4, 4, policy.adapter_targets, 0)
    common.save_adapter(adapted, tmp_path)
    n = len(held["mask"])
    assert blocks.delivered(cfg, tmp_path) == {"nats": 0, "std": 0, "pairs": n} and n > 2
    policy = backbones.load_sft(cfg)
    common.load_adapter(policy, start / "lora", trainable=True)
    assert blocks.delivered(cfg, start / "lora") == blocks.dpo.delivered(policy, held, cfg.batch_size)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """What a block runs, as (config, words): the config that the script makes of them. Nothing is run."""
    configs = {script: importlib.import_module(script.removesuffix(".py")).Config for script in SCRIPTS}
    configs |= {"extras.losses": losses.Config, "extras.grpo": grpo.Config}
    ran = []

    def run(*words):
        ran.append((load_config(configs[words[0]], words[1:]), words))
        if words[0].startswith("extras."):
            (tmp_path / ran[-1][0].folder).mkdir(parents=True)
            disk.write_json(tmp_path / ran[-1][0].folder / "adapter_config.json", {})

    monkeypatch.setattr(blocks, "HERE", tmp_path)
    monkeypatch.setattr(blocks, "run", run)
    monkeypatch.setattr(blocks, "successes", lambda *_: None)
    monkeypatch.setattr(blocks, "collect", lambda *_: None)
    monkeypatch.setattr(blocks, "delivered", lambda *_: {"nats": 0.5})
    return ran


def test_each_arm_is_played_with_the_adapter_that_was_trained_for_it(commands):
    blocks.main("7", *blocks.LOOK)
    blocks.main("autoregressive", "7")
    blocks.main("four_suites", "7")
    assert len(commands) == 3 * 3 + 3 * len(blocks.LOOK) - 1 + 4 + 2 * 5 - 1 + 2 * 3 - 1
    folders = [cfg.folder for cfg, _ in commands]
    twice = {folder.name for folder in folders if folders.count(folder) > 1}
    assert twice == {"prefs-episode-at2000", "prefs-whole-at2000"}, "but for these, two write one folder"
    trained = None
    for cfg, words in commands:
        if words[0] == "03_dpo.py":
            assert cfg.pairs_dir in folders or cfg.pairs_dir.name == "successes"
            assert cfg.pairs in cfg.pairs_dir.name or cfg.pairs_dir.name == "successes"
        if words[0] == "04_eval.py" and cfg.policy == "dpo":
            assert cfg.adapter_dir == trained
        trained = cfg.folder if words[0] in ("03_dpo.py", "extras.losses", "extras.grpo") else trained


def test_a_block_that_was_made_elsewhere_is_not_overwritten(commands, tmp_path):
    record = tmp_path / "results/look/blocks/seed7.json"
    record.parent.mkdir(parents=True)
    (record.parents[1] / "plan.md").write_text("a plan", encoding="utf-8")
    disk.write_json(record, {"arms": {"B": {}}, "plan": disk.sha256(record.parents[1] / "plan.md")})
    record.with_suffix(".csv").write_text("arm\nA\nB\nB\n", encoding="utf-8")
    for folder, seed in (("blocks", "07"), ("blocks_B", "7")):
        with pytest.raises(UserError, match=f"is there, but .*runs/{folder}/pi05/seed7.* is not"):
            blocks.main(seed, "kto")
        assert not commands
        (tmp_path / "runs" / folder / "pi05/seed7").mkdir(parents=True)
    blocks.main("7", "kto")
    assert commands
    commands.clear()
    (record.parents[1] / "plan.md").write_text("another", encoding="utf-8")
    with pytest.raises(UserError, match="follows another plan"):
        blocks.main("7", "kto")
    assert not commands


def test_a_block_goes_on_whatever_arms_it_began_with(commands, tmp_path, monkeypatch):
    """kept: the recorded arms that this call does not make, and A only where it is recorded."""
    kept = []
    monkeypatch.setattr(blocks, "collect", lambda *words: kept.append(words[-1]))
    record = tmp_path / "results/look/blocks/seed7.json"
    record.parent.mkdir(parents=True)
    (record.parents[1] / "plan.md").write_text("a plan", encoding="utf-8")
    disk.write_json(record, {"arms": {}, "plan": disk.sha256(record.parents[1] / "plan.md")})
    record.with_suffix(".csv").write_text("arm\nB\nC\nkto\n", encoding="utf-8")
    for arm in ("", "_B", "_C", "_kto"):
        (tmp_path / f"runs/blocks{arm}/pi05/seed7").mkdir(parents=True)
    blocks.main("7", "B", "C")
    assert kept == [{"kto"}] * 2


def test_arms_share_their_start_and_pairs_and_play_the_same_noise(commands):
    blocks.main("7")
    trained = [words for _, words in commands if words[0] == "03_dpo.py"]
    played = [words for _, words in commands if words[0] == "04_eval.py"]
    assert len(trained) == 5 and len(played) == 12, "A to F, each under two noise seeds"
    assert all("checkpoint=runs/blocks/pi05/seed7/sft" in words for words in trained)
    pairs = [[word for word in words if word.startswith("pairs_from=")] for words in trained]
    assert pairs == [["pairs_from=runs/blocks/pi05/seed7/prefs-branch-at2000"]] * 4 + [
        ["pairs_from=runs/blocks/pi05/seed7/successes"]
    ]
    assert [words[-1] for words in played] == ["eval.noise_seed=0", "eval.noise_seed=1007"] * 6


def test_greedy_decoding_is_played_once(commands):
    blocks.main("autoregressive", "201", "A", "dora-paper")
    assert [words[0] for _, words in commands[3:]] == ["04_eval.py", "03_dpo.py", "04_eval.py"]
    cfg = commands[-1][0]
    assert (cfg.backbone, cfg.noise_scale, cfg.adapter, cfg.held_out, cfg.start) == (
        "openvla",
        0,
        "dora",
        5,
        "1500",
    )


@pytest.mark.parametrize(
    "words", [[""], ["--help"], ["7", "G"], ["autoregressive"], ["autoregressive", "7", "B"]]
)
def test_bad_words_are_named(words, commands):
    with pytest.raises(UserError):
        blocks.main(*words)
    assert not commands
