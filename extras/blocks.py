"""A block of the look experiment (results/look/plan.md): one training seed, its pairs, and every arm.

    python -m extras.blocks SEED [ARM ...]        without arms: A to F

reads   configs/blocks.yaml, results/look/plan.md
writes  runs/blocks/ and runs/blocks_<arm>/, by the stages themselves; results/look/blocks/seed<k>.csv, a line
        per episode, and seed<k>.json: what each arm trained on, and how far it moved the held-out pairs
cost    an hour and a half on two idle cores for six arms; stopped at any moment, the same command goes on

All arms start from one snapshot and train on one set of pairs, and each plays the same 400 episodes. Every
fifth attempt with a pair is kept from all arms, to measure what they learned.
"""

import csv
import io
import subprocess
import sys
from pathlib import Path

import common
from runtime import HERE, disk, one_of, refuse, stage
from runtime.config import read_yaml

CONFIG, OUT = "configs/blocks.yaml", HERE / "results" / "look"
START = 2000  # the snapshot of 01 that all arms start from, chosen on validation states
# the paper's; its beta of 0.1 multiplies a mean over 8 x 7 numbers, ours a sum
PAPER = "dpo.beta=0.0017857 dpo.batch_size=1 dpo.steps=500 dpo.lr=5e-5 dpo.warmup=100"
ARMS = {  # arm -> what 03 is given beside the config; A is the snapshot itself
    "A": "",
    "B": f"dpo.sft_coef=0 {PAPER}",  # the paper's dose and loss
    "C": "dpo.sft_coef=0.25 dpo.contrast=0",  # the anchor alone
    "D": "dpo.sft_coef=0.25",  # contrast and anchor
    "E": "dpo.sft_coef=2",  # mostly anchor, as in tiny.yaml
    # filtered behaviour cloning; its "pairs" are twice the same chunk, so beta can't be auto: about that of C
    "F": "dpo.sft_coef=0.25 dpo.contrast=0 dpo.beta=0.5 held_out=0",
    "D-dora": "dpo.sft_coef=0.25 adapter=dora",
    "D-elbo": "dpo.sft_coef=0.25 surrogate=elbo",
    "D-exact": "dpo.sft_coef=0.25 surrogate=exact",
}
FIELDS = ("seed", "suite", "task", "init_state", "success", "steps", "crash", "right_place")


def run(script: str, *settings: str) -> None:
    command = [sys.executable, script, CONFIG, *settings, "overwrite=true"]
    print("\n$ python", *command[1:], flush=True)
    code = subprocess.run(command, cwd=HERE).returncode
    refuse(code, f"{script} stopped with code {code}; mend it, and give the same command again")


def trained_on(prefs: Path, held_out: int) -> list[int]:
    """Which play-outs of 02 may be trained on: all but those of attempts whose pairs 03 holds out."""
    with_pairs, tried = (
        [
            (row["suite"], row["task"], row["unit"])
            for row in disk.read_jsonl(prefs / f"{name}.jsonl", "suite task unit")
        ]
        for name in ("pairs", "tried")
    )
    held = list(dict.fromkeys(with_pairs))[::held_out] if held_out else []  # as common.read_pairs counts
    return [i for i, attempt in enumerate(tried) if attempt not in held]


def successes(prefs: Path, folder: Path, held_out: int) -> None:
    """Pairs that clone what worked: chosen and rejected are the first chunk of a successful play-out."""
    rows, tried = disk.read_jsonl(prefs / "tried.jsonl"), disk.load_tensors(prefs / "tried.safetensors")
    won = [i for i in trained_on(prefs, held_out) if rows[i]["success"]]
    tried |= {"chosen": tried["chunk"], "rejected": tried["chunk"]}
    keys = ("agentview", "wrist", "state", "chosen", "rejected", "mask")
    folder.mkdir(parents=True, exist_ok=True)
    disk.save_tensors(folder / "pairs.safetensors", {key: tried[key][won] for key in keys})
    disk.write_rows(folder / "pairs.jsonl", [rows[i] for i in won])


def collect(seed: int) -> None:
    """Write what a block has played on held-out states, and what its arms trained on."""
    about = {"block": seed, "plan": disk.sha256(OUT / "plan.md"), "commit": stage.git_commit()}
    table, trained = io.StringIO(), {}
    writer = csv.DictWriter(table, ("block", "arm", *FIELDS), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for arm in ARMS:
        folder = HERE / "runs" / ("blocks" if arm == "A" else f"blocks_{arm}") / "pi05" / f"seed{seed}"
        for path in folder.glob("dpo-*/done.json"):
            facts = disk.read_json(path)
            trained[arm] = {key: facts[key] for key in ("beta", "pairs", "delivered") if key in facts}
        for path in sorted(folder.glob("eval-*/episodes.jsonl")):
            for row in disk.read_jsonl(path):
                if row["init_state"] in common.INIT_GROUPS["test"]:
                    writer.writerow(row | {"block": seed, "arm": arm, "success": int(row["success"])})
    (OUT / "blocks").mkdir(exist_ok=True)
    disk.write_atomic(OUT / "blocks" / f"seed{seed}.csv", table.getvalue())
    disk.write_json(OUT / "blocks" / f"seed{seed}.json", about | {"arms": trained})


def main(seed: str, *arms: str) -> None:
    refuse(not seed.isdecimal(), f"the training seed must be a whole number, not {seed!r}")
    for arm in arms:
        one_of("arm", arm, list(ARMS))
    own, at, held_out = f"seed={seed}", f"start={START}", read_yaml(HERE / CONFIG)["held_out"]
    block = Path("runs/blocks/pi05", f"seed{seed}")
    prefs = block / f"prefs-branch-at{START}"
    run("00_demos.py")
    run("01_sft.py", own)
    run("02_collect_prefs.py", own, at)
    successes(HERE / prefs, HERE / block / "successes", held_out)
    for arm in arms or list(ARMS)[:6]:
        given, policy = [own, at], "policy=sft"
        if arm != "A":
            pairs = block / "successes" if arm == "F" else prefs
            given += [
                f"name=blocks_{arm}",
                f"checkpoint={block}/sft",
                f"pairs_from={pairs}",
                *ARMS[arm].split(),
            ]
            policy = "policy=dpo"
            run("03_dpo.py", *given)
        for noise in (0, 1000 + int(seed)):
            run("04_eval.py", *given, policy, f"eval.noise_seed={noise}")
        collect(int(seed))


if __name__ == "__main__":
    stage.command_line(lambda: main(*(sys.argv[1:] or [""])))
