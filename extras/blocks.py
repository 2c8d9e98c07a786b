"""A block of an experiment: one training seed, its pairs, and every arm.

    python -m extras.blocks SEED [ARM ...]                    flow policy, results/look/plan.md
    python -m extras.blocks autoregressive SEED [ARM ...]     results/autoregressive/plan.md
    python -m extras.blocks four_suites SEED [ARM ...]        results/four_suites/plan.md

reads   the experiment's config and plan.md
writes  runs/<config>/ and runs/<config>_<arm>/, by the stages themselves; beside the plan blocks/seed<k>.csv,
        a line per episode, and seed<k>.json: what each arm trained on, how far it moved the held-out pairs
cost    40 minutes on two idle cores for arms A to F; stopped at any moment, the same command goes on

All arms start from one snapshot and train on one set of pairs, and each plays the same episodes. Every fifth
attempt with a branch pair is kept from all arms, to measure what they learned. Without arms it makes those of
the plan's table. ipo, hinge, proximal, simpo, kto, nft and grpo belong to results/neighbours/plan.md. Those
that end in -text and -code take the pairs of the paper's text and of its public code. Those that end in -sum
have the paper's beta as its text has it.
"""

import csv
import importlib
import io
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import backbones
import common
from extras.losses import trained_on
from report import episodes
from runtime import HERE, disk, load_config, one_of, refuse, stage

dpo = importlib.import_module("03_dpo")

# the paper's dose. Its code multiplies a mean over 8 x 7 numbers by 0.1, its text a sum, as this kit does
PAPER = "dpo.sft_coef=0 dpo.beta=0.0017857 dpo.batch_size=1 dpo.steps=500 dpo.lr=5e-5 dpo.warmup=100"
TEXT = f"{PAPER} dpo.beta=0.1"
ANCHOR = "dpo.sft_coef=0.25"
LOOK = {  # arm -> what makes it from the snapshot: a script and its settings; "" = nothing
    "A": "",
    "B": f"03_dpo.py {PAPER}",  # the paper's dose and loss
    "C": f"03_dpo.py {ANCHOR} dpo.contrast=0",  # the anchor alone
    "D": f"03_dpo.py {ANCHOR}",  # contrast and anchor
    "E": "03_dpo.py dpo.sft_coef=2",  # mostly anchor, as in tiny.yaml
    # filtered behaviour cloning; no pairs, so beta can't be auto: about that of C
    "F": f"03_dpo.py {ANCHOR} dpo.contrast=0 dpo.beta=0.5 held_out=0",
    "B-sum": f"03_dpo.py {TEXT}",
    "D-dora": f"03_dpo.py {ANCHOR} adapter=dora",
    "D-elbo": f"03_dpo.py {ANCHOR} surrogate=elbo",
    "D-exact": f"03_dpo.py {ANCHOR} surrogate=exact",
    "C-exact": f"03_dpo.py {ANCHOR} dpo.contrast=0 surrogate=exact",
    **{f"{arm}-text": f"03_dpo.py {dose} pairs=episode" for arm, dose in (("B", PAPER), ("D", ANCHOR))},
    **{f"{arm}-code": f"03_dpo.py {dose} pairs=whole" for arm, dose in (("B", PAPER), ("D", ANCHOR))},
    **{loss: f"03_dpo.py {ANCHOR} dpo.loss={loss}" for loss in ("ipo", "hinge")},
    **{loss: f"extras.losses {ANCHOR} dpo.loss={loss}" for loss in ("proximal", "simpo", "kto", "nft")},
    "grpo": "extras.grpo grpo.max_steps=150",  # as 02's play-outs
}
RECIPES = {  # the paper's two, with fewer pairs: that of its text; that of its code (no noise, all chunks)
    "pairs=episode": "prefs.n_pairs=50 prefs.max_playouts=800",
    "pairs=whole": "prefs.n_pairs=600 prefs.max_playouts=800 prefs.noise_low=0 prefs.noise_high=0",
}
AUTOREGRESSIVE = {
    "A": "",
    "lora-paper": f"03_dpo.py {PAPER}",
    "dora-paper": f"03_dpo.py {PAPER} adapter=dora",
    "lora-anchor": f"03_dpo.py {ANCHOR}",
    "dora-anchor": f"03_dpo.py {ANCHOR} adapter=dora",
    "lora-sum": f"03_dpo.py {TEXT}",
    "dora-sum": f"03_dpo.py {TEXT} adapter=dora",
}
EXPERIMENTS = {  # -> its config, noise seeds under which each arm plays, number of planned arms, all arms
    "look": ("blocks", 2, 6, LOOK),
    "autoregressive": ("blocks_openvla", 1, 5, AUTOREGRESSIVE),  # greedy decoding has no noise
    "four_suites": ("blocks_4suite", 1, 3, {arm: LOOK[arm] for arm in "ACD"}),
}
RECORDED = ("beta", "pairs", "chunks", "playouts", "trained", "delivered", "commit")  # of an arm's training
FIELDS = ("seed", "suite", "task", "init_state", "success", "steps", "crash", "right_place")


def folder_of(cfg: common.AdapterConfig, arm: str) -> Path:
    return HERE / replace(cfg, name=cfg.name + f"_{arm}" * (arm != "A")).seed_dir


def pairs_of(cfg: common.AdapterConfig, how: str) -> Path:
    """Where the pairs of an arm are: its settings may name a recipe of their own."""
    return replace(cfg, **dict(word.split("=") for word in how.split() if word in RECIPES)).made_pairs


def run(script: str, *settings: str) -> None:
    script = ["-m", script] if script.startswith("extras.") else [script]
    print("\n$ python", *script, *settings, flush=True)
    code = subprocess.run([sys.executable, *script, *settings], cwd=HERE).returncode
    refuse(
        code,
        f"{script[-1]} stopped with code {code}; mend that, and give the same command again (a block goes on "
        "only at the commit that began it)",
    )


def successes(prefs: Path, folder: Path, held_out: int) -> None:
    """Pairs that clone what worked: chosen is the first chunk of a successful play-out.

    Rejected is that of another one: 03 wants a pair, but without contrast nothing is learned from it.
    """
    rows, tried = disk.read_jsonl(prefs / "tried.jsonl"), disk.load_tensors(prefs / "tried.safetensors")
    won = [i for i in trained_on(prefs, held_out) if rows[i]["success"]]
    kept = {key: tried[key][won] for key in ("agentview", "wrist", "state", "mask")} | {
        "chosen": tried["chunk"][won],
        "rejected": tried["chunk"][won].roll(1, 0),
    }
    folder.mkdir(parents=True, exist_ok=True)
    disk.save_tensors(folder / "pairs.safetensors", kept)
    disk.write_rows(folder / "pairs.jsonl", [rows[i] for i in won])


def log_ratios(log: list[dict], beta: float) -> dict:
    """Score under the policy minus score under the reference, of chunks trained on: second half of 03's log.

    Empty for a loss that does not log it. The scores are the surrogate's; the paper's are no nats.
    """
    late = [row for row in log[len(log) // 2 :] if "rewards/chosen" in row]
    sides = ("chosen", "rejected") if late else ()
    return {side: sum(row[f"rewards/{side}"] for row in late) / len(late) / beta for side in sides}


def delivered(cfg: dpo.Config, folder: Path) -> dict:
    """What an arm moved on the block's held-out branch pairs (03_dpo.py), whatever it was trained on."""
    policy = backbones.load_sft(cfg)
    _, held = dpo.load_pairs(cfg, policy)
    common.load_adapter(policy, folder, trainable=True)
    return dpo.delivered(policy, held, cfg.batch_size)


def collect(name: str, cfg: common.AdapterConfig, arms: dict, noises: list[int], kept: set[str]) -> None:
    """Write what a block has played on held-out states, and what its arms trained on.

    kept: recorded arms, which may not leave the record.
    """
    out, seed, table, trained = HERE / "results" / name, cfg.seed, io.StringIO(), {}
    writer = csv.DictWriter(table, ("block", "arm", *FIELDS), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for arm in arms:
        folder = folder_of(cfg, arm)
        own = {"start": cfg.start, "blank_images": False} | dict(  # others may have used its folder too
            word.split("=")
            for word in f"adapter=lora pairs=branch surrogate=paper {arms[arm]}".split() * (arm != "A")
            if word.startswith(("adapter=", "pairs=", "surrogate="))
        )
        played = {
            facts["config"]["noise_seed"]: rows
            for facts, rows, _ in episodes.finished(folder, "eval-*", "test")
            if (own | {"policy": "sft" if arm == "A" else "dpo"}).items() <= facts["config"].items()
        }
        if not {*noises} <= played.keys():  # not yet under all noise seeds
            refuse(arm in kept, f"the record has arm {arm}, but {folder} not all its episodes: name it too")
            continue
        for path in folder.rglob("done.json"):
            if (  # 03 or an extra has trained here
                path.with_name("adapter_config.json").is_file()
                and own.items() <= disk.read_json(path)["config"].items()
            ):
                facts = {
                    "playouts": disk.read_json(HERE / pairs_of(cfg, arms[arm]) / "done.json")["playouts"],
                    **disk.read_json(path),  # with those that the arm has played itself
                    **disk.read_json(path.with_name("timing.json")),
                }
                facts["trained"] = log_ratios(
                    disk.read_jsonl(path.with_name("metrics.jsonl")), facts.get("beta")
                )
                # blocks before 105 have 03's own, if any
                if (measured := folder / "delivered.json").is_file():
                    facts["delivered"] = disk.read_json(measured)
                trained[arm] = {key: facts[key] for key in RECORDED if key in facts}
        for row in itertools.chain(*(played[noise] for noise in noises)):
            writer.writerow(row | {"block": seed, "arm": arm, "success": int(row["success"])})
    (out / "blocks").mkdir(exist_ok=True)
    disk.write_atomic(out / "blocks" / f"seed{seed}.csv", table.getvalue())
    disk.write_json(
        out / "blocks" / f"seed{seed}.json",
        {
            "block": seed,
            "plan": disk.sha256(out / "plan.md"),
            "playouts": disk.read_json(HERE / cfg.made_pairs / "done.json")["playouts"],
            "arms": trained,
        },
    )


def main(*words: str) -> None:
    words = words if words[0] in EXPERIMENTS else ("look", *words)
    name, seed, named = words[0], "".join(words[1:2]), words[2:]
    config, n, planned, arms = EXPERIMENTS[name]
    refuse(
        not seed.isdecimal(), "usage: python -m extras.blocks [autoregressive | four_suites] SEED [ARM ...]"
    )
    for arm in named:
        one_of("arm", arm, list(arms))
    block = f"configs/{config}.yaml", f"seed={seed}"
    cfg = load_config(common.AdapterConfig, [*block])
    record = HERE / "results" / name / "blocks" / f"seed{cfg.seed}.json"
    recorded = (
        sorted(
            {line["arm"] for line in csv.DictReader(disk.read_text(record.with_suffix(".csv")).splitlines())}
        )
        if record.is_file()
        else []
    )
    refuse(
        recorded and disk.read_json(record)["plan"] != disk.sha256(HERE / "results" / name / "plan.md"),
        f"{record} follows another plan.md than today's: put that back",
    )
    lost = [str(folder_of(cfg, arm)) for arm in sorted({"A", *recorded}) if not folder_of(cfg, arm).is_dir()]
    refuse(  # all arms start in A's folder
        recorded and lost,
        f"{record} is there, but {', '.join(lost)} is not: what is made now would overwrite the record; "
        "take another seed, or delete the record and its .csv",
    )
    for script in ("00_demos.py", "01_sft.py", "02_collect_prefs.py"):
        run(script, *block)
    successes(HERE / cfg.made_pairs, HERE / cfg.seed_dir / "successes", cfg.held_out)
    made, noises = named or [*arms][:planned], [0, 1000 + cfg.seed][:n]
    for arm in made:
        given, policy = block, "policy=sft"
        if arm != "A":
            script, *settings = arms[arm].split()
            for recipe in RECIPES.keys() & {*settings}:
                run("02_collect_prefs.py", *block, recipe, *RECIPES[recipe].split())
            pairs = cfg.seed_dir / "successes" if arm == "F" else pairs_of(cfg, arms[arm])
            own = f"name={cfg.name}_{arm}", f"checkpoint={cfg.seed_dir}/sft", f"pairs_from={pairs}"
            given, policy = (*block, *own, *settings), "policy=dpo"
            run(script, *given)
            found = folder_of(cfg, arm).glob("*/*/adapter_config.json")  # by an extra, where 04 does not look
            given += tuple(f"adapters_from={path.parents[1].relative_to(HERE)}" for path in found)
            for path in folder_of(cfg, arm).rglob("adapter_config.json"):
                moved = delivered(load_config(dpo.Config, [*block]), path.parent)
                disk.write_json(folder_of(cfg, arm) / "delivered.json", moved)
        for noise in noises:
            run("04_eval.py", *given, policy, f"eval.noise_seed={noise}")
        collect(name, cfg, arms, noises, {*recorded} - {*made})


if __name__ == "__main__":
    stage.command_line(lambda: main(*(sys.argv[1:] or [""])))
