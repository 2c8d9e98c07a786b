"""The blocks of the look experiment (extras/blocks.py): F's data, and what is written of a block."""

import json

import pytest
import torch

from extras import blocks
from report import claims
from runtime import disk
from runtime.errors import UserError

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
    assert made["chosen"][:, 0].tolist() == made["rejected"][:, 0].tolist() == [1, 3, 4]
    assert [(row["task"], row["unit"]) for row in rows] == [(0, 1), (0, 2), (1, 0)]


def test_a_block_writes_every_held_out_episode_of_its_arms(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "HERE", tmp_path)
    monkeypatch.setattr(blocks, "OUT", tmp_path / "out")
    (tmp_path / "out/blocks").mkdir(parents=True)
    (tmp_path / "out/plan.md").write_text("plan", encoding="utf-8")
    facts = {"beta": 2.0, "pairs": 9, "delivered": {"nats": 1.0}}
    for arm, folder in (("A", "blocks"), ("D", "blocks_D")):
        seed_dir = tmp_path / "runs" / folder / "pi05" / "seed7"
        row = {
            "suite": "libero_object",
            "task": 0,
            "success": True,
            "steps": 9,
            "crash": "",
            "right_place": 0.5,
        }
        for name, seed, init in (("eval-x", 7, 40), ("eval-x-noise1007", 1007, 41), ("eval-x-val", 7, 35)):
            (seed_dir / name).mkdir(parents=True)
            disk.write_rows(seed_dir / name / "episodes.jsonl", [row | {"seed": seed, "init_state": init}])
        if arm == "D":
            (seed_dir / "dpo-lora").mkdir()
            disk.write_json(seed_dir / "dpo-lora/done.json", facts | {"more": 1})
    blocks.collect(7)
    arms, nats = claims.read_blocks(tmp_path / "out/blocks")  # what the report makes of it
    assert {arm: list(of_arm) for arm, of_arm in arms.items()} == {"A": [7], "D": [7]} and nats["D"] == [1.0]
    for arm in "AD":
        assert [(r["seed"], r["init_state"], r["success"]) for r in arms[arm][7]] == [
            (7, 40, True),
            (1007, 41, True),
        ]
    record = json.loads((tmp_path / "out/blocks/seed7.json").read_text(encoding="utf-8"))
    assert record["arms"] == {"D": facts} and record["plan"] == disk.sha256(tmp_path / "out/plan.md")


@pytest.mark.parametrize("words", [[""], ["x"], ["7", "G"]])
def test_bad_words_are_named(words):
    with pytest.raises(UserError):
        blocks.main(*words)
