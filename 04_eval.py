"""04 - Success rates on LIBERO, with intervals and paired tests (paper's main table).

reads   <run>/<backbone>/seed<k>/sft/ (01) and, for policy=dpo, .../dpo-<adapter>-<recipe>/ (03)
writes  <run>/<backbone>/seed<k>/eval-<policy>[-val]/: episodes.jsonl (a line per episode), summary.json, videos/, done.json;
        <run>/<backbone>/seed<k>/results.{json,md}: all evaluations so far in one table, paired with the SFT policy
cost    2 to 5 s per episode and core
try     python 04_eval.py configs/tiny.yaml policy=dpo adapter=dora eval.group=val eval.n_init=5

An episode is decided by (suite, task, init state, seed): the policy's noise at its k-th look is drawn from these alone, so two
policies are compared on the same episodes, with the same noise, in any order and on any number of processes.
Differs from the paper: init states 40-49, which nothing was trained or chosen on (it uses 0-4, from which its pairs came);
Wilson intervals, exact McNemar tests; a crash of the simulator is a column of its own and not a failure.
Left out: rendering at every step (only when the policy looks), real robots.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import common
import memory
import ranks
import runs
import sim
import workers


@dataclass
class Config(common.RunConfig):
    policy: str = "sft"  # "sft" or "dpo" (the one of `adapter`, `pairs`, `start`)
    group: str = "test"  # init states: "test" (40-49, reported) or "val" (35-39, for every choice)
    n_init: int = 10  # init states per task
    videos: int = 0  # episodes per task of which a GIF is kept
    noise_seed: int = 0  # of the policy's noise; 0 = the training seed. Others give more episodes per initial state
    dropout: float = 0.0  # control: LoRA's dropout left on while the policy acts, as in the paper's public code (0.05)

    def __post_init__(self):
        super().__post_init__()
        common.at_least(self, videos=0, noise_seed=0, dropout=0)
        common.one_of("policy", self.policy, ("sft", "dpo"))
        common.one_of("eval.group", self.group, ("val", "test"))  # nothing else is for evaluation


def policy_name(cfg: Config) -> str:
    """Name of what is evaluated, e.g. sft, sft-at1500, sft-blank, dpo-lora-branch: its folder, without eval- or -val."""
    sft = "sft" if cfg.start == "final" else f"sft-at{cfg.start}"
    name = (cfg.variant("dpo").name if cfg.policy == "dpo" else sft) + ("-blank" if cfg.blank_images else "")
    return name + (f"-dropout{cfg.dropout:g}" if cfg.dropout else "") + (f"-noise{cfg.noise_seed}" if cfg.noise_seed else "")


def load_policy(cfg: Config):
    policy = common.load_sft(cfg)
    return common.load_adapter(policy, cfg.variant("dpo"), cfg.dropout) if cfg.policy == "dpo" else policy


# -------------------------------------------------------------------------------------------------------------- episodes
def episode(env, policy, cfg: Config, init: int, frames: list | None) -> dict:
    """One episode from init state `init`. `frames` collects what the policy saw."""
    began, k, seed = time.time(), 0, cfg.noise_seed or cfg.seed
    env.reset(init)
    while not env.success and env.steps < env.max_steps:
        obs = env.observe()
        if frames is not None:
            frames.append(np.concatenate([obs["agentview"], obs["wrist"]], axis=1))
        noise = common.stream(seed, "eval", env.suite, env.task_id, init, k)
        torch.manual_seed(noise.initial_seed())  # read by dropout alone, where it is on
        chunk = common.propose(policy, obs, cfg, [noise])[0]
        common.carry_out(env, np.asarray(policy.unnormalise(chunk))[: cfg.execute])
        k += 1
    return {"success": bool(env.success), "steps": env.steps, "crash": "", "wall_s": round(time.time() - began, 2)}


def evaluate(job: tuple):
    """Worker: episodes of one task; yields a row for each."""
    cfg, folder, suite, task, inits = job
    policy, env = load_policy(cfg), sim.TaskEnv(suite, task, cfg.image_size, cfg.render)
    for init in inits:
        frames = [] if init in common.init_states(cfg.group, cfg.n_init)[: cfg.videos] else None
        try:
            row = episode(env, policy, cfg, init, frames)
        except sim.CRASHES as error:  # the simulator diverged: neither success nor failure of the policy
            row = {"success": False, "steps": env.steps, "crash": type(error).__name__, "wall_s": 0.0}
        if frames:
            save_gif(
                folder / "videos" / f"{suite}-{task:02d}-init{init}-{'success' if row['success'] else 'failure'}.gif", frames
            )
        yield {"suite": suite, "task": task, "init_state": init, "seed": cfg.noise_seed or cfg.seed} | row
    env.close()


def save_gif(path: Path, frames: list) -> None:
    import imageio.v3 as imageio

    path.parent.mkdir(exist_ok=True)
    imageio.imwrite(path, np.stack(frames).repeat(2, axis=1).repeat(2, axis=2), duration=200, loop=0)


# ---------------------------------------------------------------------------------------------------------------- tables
def summarise(rows: list[dict]) -> dict:
    """Successes with intervals over all episodes that did not crash, and per task."""
    valid = [row for row in rows if not row["crash"]]
    wins = sum(row["success"] for row in valid)
    tasks = sorted({(row["suite"], row["task"]) for row in valid})
    of_task = [[row["success"] for row in valid if (row["suite"], row["task"]) == task] for task in tasks]
    clusters = np.concatenate([np.full(len(s), i) for i, s in enumerate(of_task)]) if tasks else np.zeros(0)
    return {
        "n": len(valid),
        "successes": wins,
        "crashes": len(rows) - len(valid),
        "ci95": common.wilson(wins, len(valid)),
        "ci95_tasks": common.cluster_bootstrap(np.concatenate(of_task).astype(float), clusters) if len(tasks) > 1 else (0.0, 1.0),
        "tasks": {f"{suite}/{task}": [sum(s), len(s)] for (suite, task), s in zip(tasks, of_task, strict=True)},
        "mean_steps": float(np.mean([row["steps"] for row in valid])) if valid else 0.0,
    }


def paired(rows: list[dict], base: list[dict]) -> dict:
    """Difference to a baseline on the episodes (suite, task, init state, seed) that both ran without a crash."""
    key = ("suite", "task", "init_state", "seed")
    theirs = {tuple(row[k] for k in key): row["success"] for row in base if not row["crash"]}
    both = [(row["success"], theirs[t]) for row in rows if not row["crash"] and (t := tuple(row[k] for k in key)) in theirs]
    test = common.mcnemar([a for a, _ in both], [b for _, b in both])
    difference = (test["only_a"] - test["only_b"]) / max(1, len(both))
    return {
        "diff_vs_sft": difference,
        "gained": test["only_a"],
        "lost": test["only_b"],
        "p_vs_sft": test["p"],
        "paired_n": len(both),
    }


# What the rows of a paired comparison must share:
PROTOCOL = ("suites", "image_size", "render", "execute", "denoise_steps", "noise_scale", "group", "start")


def results_table(cfg: Config) -> list[dict]:
    """A row per finished evaluation of this seed and group of init states, paired with the SFT policy it started from.

    Evaluations of weights that have been made anew since are left out.
    """

    def unchanged(name: str, made_from: str) -> bool:
        path = cfg.seed_dir.parents[1] / name / "done.json"
        return Path(name).is_file() or (path.is_file() and runs.read_json(path)["fingerprint"] == made_from)

    found = {}
    for done in sorted(cfg.seed_dir.glob("eval-*/done.json"), key=lambda p: ("dpo" in p.parent.name, p.parent.name)):
        facts = runs.read_json(done)
        current = all(unchanged(*each) for each in facts["inputs"].items())
        if facts["config"]["group"] == cfg.group and current:
            found[facts["policy"]] = (
                facts,
                runs.read_jsonl(done.parent / "episodes.jsonl"),
                runs.read_json(done.with_name("timing.json")),
            )
    rows = []
    for name, (facts, episodes, timing) in found.items():
        used = facts["config"]
        is_dpo, start = used["policy"] == "dpo", "sft" if used["start"] == "final" else f"sft-at{used['start']}"
        start += f"-noise{used['noise_seed']}" if used["noise_seed"] else ""
        row = {"suite": " ".join(used["suites"]), "backbone": cfg.backbone, "policy": used["policy"], "name": name}
        row |= {"adapter": used["adapter"] if is_dpo else "none", "pairs": used["pairs"] if is_dpo else "none"}
        row |= {"surrogate": used["surrogate"] if is_dpo else "none"}
        row |= {"start": used["start"], "blank_images": used["blank_images"], "group": cfg.group, "train_seeds": [used["seed"]]}
        row |= {"noise_seed": used["noise_seed"] or used["seed"]}
        row |= summarise(episodes) | {"command": timing["command"], "commit": timing["commit"]}
        base = found.get(start)
        if name != start and base and all(base[0]["config"][key] == used[key] for key in PROTOCOL):
            row |= paired(episodes, base[1])
        rows.append(row)
    return rows


def markdown(rows: list[dict]) -> str:
    """`over tasks`: the interval that a bootstrap of whole tasks gives. p: exact McNemar on the same episodes."""
    lines = ["| policy | success | 95 % interval | over tasks | crashes | against its SFT start | gained / lost | p |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in rows:
        (low, high), (tlow, thigh) = r["ci95"], r["ci95_tasks"]
        cells = [
            r["name"],
            f"{r['successes']} / {r['n']}",
            f"{low:.1%} to {high:.1%}",
            f"{tlow:.0%} to {thigh:.0%}",
            r["crashes"],
        ]
        if "diff_vs_sft" in r:
            cells += [f"{100 * r['diff_vs_sft']:+.1f} points", f"{r['gained']} / {r['lost']}", f"{r['p_vs_sft']:.2g}"]
        else:
            cells += ["", "", ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(cfg: Config) -> None:
    if cfg.dry_run:
        return memory.report(cfg, "eval")
    inits, tasks = common.init_states(cfg.group, cfg.n_init), sim.tasks(cfg)
    inputs = common.sft_inputs(cfg)
    if cfg.policy == "dpo":
        inputs.append(runs.require(cfg.variant("dpo"), "dpo", f" adapter={cfg.adapter} pairs={cfg.pairs} start={cfg.start}"))
    shared = f"suites tasks backbone seed image_size render blank_images execute denoise_steps noise_scale {common.SFT_KEYS}"
    shared += " adapter pairs surrogate" if cfg.policy == "dpo" else ""
    name = policy_name(cfg)
    folder = cfg.seed_dir / f"eval-{name}{'' if cfg.group == 'test' else '-' + cfg.group}"
    stage = runs.open_stage(__file__, cfg, folder, shared, inputs, ["sim.py", "osc.py", "workers.py", *cfg.policy_code])
    if stage is not None:
        path = stage.dir / "episodes.jsonl"
        done = {(row["suite"], row["task"], row["init_state"]) for row in runs.read_jsonl(path)}
        ranks.wait()  # all have read before any writes
        todo = [(s, t, [i for i in inits if (s, t, i) not in done]) for s, t in tasks]
        jobs = [(cfg, stage.dir, suite, task, rest) for suite, task, rest in todo if rest]
        total = len(inits) * len(todo)
        bar = common.progress(total=total, initial=len(done), desc=f"eval {name}", unit="episode")
        wins = sum(row["success"] for row in runs.read_jsonl(path))
        for _, row in workers.parallel(evaluate, ranks.share(jobs), cfg.workers):
            runs.append_jsonl(path, row)
            wins += row["success"]
            bar.update()
            bar.set_postfix(successes=f"{wins}/{bar.n}")
        ranks.wait()
        if not ranks.first():
            return
        rows = sorted(runs.read_jsonl(path), key=lambda r: (r["suite"], r["task"], r["init_state"]))
        walls = {f"{r['suite']}-{r['task']}-{r['init_state']}": r.pop("wall_s", None) for r in rows}
        runs.write_rows(path, rows)
        runs.write_json(stage.dir / "summary.json", {"policy": name, "seed": cfg.seed} | summarise(rows))
        stage.finish(policy=name)
        runs.write_json(stage.dir / "timing.json", runs.read_json(stage.dir / "timing.json") | {"episodes_s": walls})
    if not ranks.first():
        return
    rows = results_table(cfg)
    stem = "results" if cfg.group == "test" else f"results-{cfg.group}"
    runs.write_json(cfg.seed_dir / f"{stem}.json", rows)
    runs.write_atomic(cfg.seed_dir / f"{stem}.md", markdown(rows) + "\n")
    print(markdown(rows), flush=True)


if __name__ == "__main__":
    common.run(lambda: main(common.load_config(Config, "eval", sys.argv[1:])))
