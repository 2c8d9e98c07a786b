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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import common
import disk
import episodes
import memory
import ranks
import runs
import sim


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
        common.at_most(self, dropout=0.99)
        common.one_of("policy", self.policy, ("sft", "dpo"))
        common.one_of("eval.group", self.group, ("val", "test"))  # nothing else is for evaluation
        if self.dropout and (self.policy, self.adapter) != ("dpo", "lora"):
            raise common.UserError("eval.dropout is for policy=dpo adapter=lora: nothing else drops anything while acting")


def policy_name(cfg: Config) -> str:
    """Name of what is evaluated, e.g. sft, sft-at1500, sft-blank, dpo-lora-branch: its folder, without eval- or -val."""
    sft = "sft" if cfg.start == "final" else f"sft-at{cfg.start}"
    name = (cfg.variant("dpo").name if cfg.policy == "dpo" else sft) + ("-blank" if cfg.blank_images else "")
    return name + (f"-dropout{cfg.dropout:g}" if cfg.dropout else "") + (f"-noise{cfg.noise_seed}" if cfg.noise_seed else "")


def load_policy(cfg: Config):
    policy = common.load_sft(cfg)
    return common.load_adapter(policy, cfg.source("dpo"), cfg.dropout) if cfg.policy == "dpo" else policy


# -------------------------------------------------------------------------------------------------------------- episodes
def look(policy, cfg: Config, where: tuple, frames: list | None, obs: dict, k: int) -> np.ndarray:
    """The actions that follow the k-th look of the episode `where` (suite, task, init state). `frames` collects what is seen."""
    if frames is not None:
        frames.append(np.concatenate([obs["agentview"], obs["wrist"]], axis=1))
    noise = common.stream(cfg.noise_seed or cfg.seed, "eval", *where, k)
    torch.manual_seed(noise.initial_seed())  # read by dropout alone, where it is on
    chunk = common.propose(policy, obs, cfg, [noise])[0]
    return np.asarray(policy.unnormalise(chunk))[: cfg.execute]


def evaluate(job: tuple):
    """Worker: episodes of one task; yields a row for each."""
    cfg, folder, suite, task, inits = job
    policy, env = load_policy(cfg), sim.TaskEnv(suite, task, cfg.image_size, cfg.render)
    for init in inits:
        frames = [] if init in common.init_states(cfg.group, cfg.n_init)[: cfg.videos] else None
        row = episodes.play(env, init, partial(look, policy, cfg, (suite, task, init), frames))
        if frames:
            outcome = "success" if row["success"] else "failure"
            save_gif(folder / "videos" / f"{suite}-{task:02d}-init{init}-{outcome}.gif", frames)
        yield {"suite": suite, "task": task, "init_state": init, "seed": cfg.noise_seed or cfg.seed} | row
    env.close()


def save_gif(path: Path, frames: list) -> None:
    import imageio.v3 as imageio

    path.parent.mkdir(exist_ok=True)
    images = np.stack(frames).repeat(2, axis=1).repeat(2, axis=2)
    disk.write_atomic(path, imageio.imwrite("<bytes>", images, extension=".gif", duration=200, loop=0))


# ---------------------------------------------------------------------------------------------------------------- tables
# What the rows of a paired comparison must share:
PROTOCOL = ("suites", "image_size", "render", "execute", "denoise_steps", "noise_scale", "group", "start")


def results_table(cfg: Config) -> list[dict]:
    """A row per finished evaluation of this seed and group of init states, paired with the SFT policy it started from; of several
    suites one for each beside. Evaluations of weights that have been made anew since are left out."""
    found = {
        facts["policy"]: (facts, played, timing) for facts, played, timing in episodes.finished(cfg.seed_dir, "eval-*", cfg.group)
    }
    found = dict(sorted(found.items(), key=lambda item: ("dpo" in item[0], item[0])))
    rows = []
    for name, (facts, played, timing) in found.items():
        used = facts["config"]
        is_dpo, start = used["policy"] == "dpo", "sft" if used["start"] == "final" else f"sft-at{used['start']}"
        start += "-blank" if is_dpo and used["blank_images"] else ""
        start += f"-noise{used['noise_seed']}" if used["noise_seed"] else ""
        row = {"backbone": cfg.backbone, "policy": used["policy"], "name": name}
        row |= {"adapter": used["adapter"] if is_dpo else "none", "pairs": used["pairs"] if is_dpo else "none"}
        row |= {"surrogate": used["surrogate"] if is_dpo else "none"}
        row |= {"start": used["start"], "blank_images": used["blank_images"], "group": cfg.group}
        row |= {"train_seeds": episodes.train_seeds(facts), "noise_seed": used["noise_seed"] or used["seed"]}
        row |= {"command": timing["command"], "commit": timing["commit"]}
        base = found.get(start)
        same_weights = base and base[0]["inputs"].items() <= facts["inputs"].items()  # not another start_seed's
        is_paired = name != start and same_weights and all(base[0]["config"][key] == used[key] for key in PROTOCOL)
        for suites in [used["suites"], *([s] for s in used["suites"] if len(used["suites"]) > 1)]:
            mine = [episode for episode in played if episode["suite"] in suites]
            rows.append(row | {"suite": " ".join(suites)} | episodes.summarise(mine))
            if is_paired:
                rows[-1] |= {"paired_with": start} | episodes.paired(mine, base[1])
    return rows


def markdown(rows: list[dict]) -> str:
    """`over tasks`: the interval that a bootstrap of whole tasks gives. p: exact McNemar on the same episodes."""
    lines = ["| policy | suite | success | 95 % interval | over tasks | crashes | against its SFT start | gained / lost | p |"]
    lines.append("|---" * 9 + "|")
    for r in rows:
        (low, high), (tlow, thigh) = r["ci95"], r["ci95_tasks"]
        cells = [
            r["name"],
            r["suite"].replace(" ", ", "),
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
        inputs += common.given_or_made(cfg, "dpo")
    shared = f"suites tasks backbone seed image_size render blank_images execute denoise_steps noise_scale {common.SFT_KEYS}"
    shared += " adapter pairs surrogate" if cfg.policy == "dpo" else ""
    name = policy_name(cfg)
    folder = cfg.seed_dir / f"eval-{name}{'' if cfg.group == 'test' else '-' + cfg.group}"
    code = ["sim.py", "osc.py", "workers.py", "episodes.py", "stats.py", *cfg.policy_code]
    stage = runs.open_stage(__file__, cfg, folder, shared, inputs, code)
    if stage is not None:
        rows = episodes.gather(stage, evaluate, cfg, tasks, inits, f"eval {name}")
        if not ranks.first():
            return
        episodes.finish(stage, rows, policy=name)
    if not ranks.first():
        return
    rows = results_table(cfg)
    stem = "results" if cfg.group == "test" else f"results-{cfg.group}"
    disk.write_json(cfg.seed_dir / f"{stem}.json", rows)
    disk.write_atomic(cfg.seed_dir / f"{stem}.md", markdown(rows) + "\n")
    print(markdown(rows), flush=True)


if __name__ == "__main__":
    common.run(lambda: main(common.load_config(Config, "eval", sys.argv[1:])))
