"""02 - Preference pairs from the policy's own rollouts (paper sec. 3, collection of preferences).

reads   <run>/<backbone>/seed<k>/sft/ (01)
writes  <run>/<backbone>/seed<k>/prefs-<recipe>[-at<start>]/: pairs.safetensors (images, state, chunks, masks),
        pairs.jsonl (one line each: where the pair is from), units.jsonl (every attempt, also those that gave no pair), done.json
cost    a play-out is an episode of 2 to 5 s on one core; see README for a pair
try     python 02_collect_prefs.py configs/tiny.yaml pairs=episode prefs.n_pairs=20

A pair is one observation, a chosen and a rejected chunk, and the mask of the actions that were executed of both.
`pairs: episode` is the paper's recipe as its text can be read: K episodes from one initial state, with noise on the executed
actions ramping from 0.1 to 0.4; the first chunk of a successful and of a failed one share the first observation. Stored are the
chunk as executed (noise added, clipped), which is what training uses since it earned the label, and the one that was proposed.
`pairs: whole` is a control, what the paper's public code does for OpenVLA: the same two episodes to their ends, every chunk of
them scored under the *first* observation.
`pairs: branch` is what DPO's derivation asks for: at decision points of a failed episode the simulator's state is restored, other
chunks are sampled from the same observation and played out to the end by the policy *with the same later noise*. A policy that
acts greedily (noise_scale 0) still tries other chunks (branch_scale).
Differs from the paper: init states 20-34, which no demonstration and no evaluation uses; fail-against-fail is not a pair.
Left out: learned reward models, relabelling.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import common
import disk
import memory
import ranks
import runs
import sim
import workers


@dataclass
class Config(common.RunConfig):
    n_pairs: int = 60  # aim, spread evenly over the tasks
    n_init: int = 15  # init states used, of the 15 in group "prefs"
    max_playouts: int = 300  # budget of episodes for all tasks; a task that only ever succeeds gives no pair
    candidates: int = 4  # episode: K, the episodes played from one init state
    noise_low: float = 0.1  # episode: standard deviation of the action noise of the first candidate ...
    noise_high: float = 0.4  # ... and of the last
    branches: int = 3  # branch: decision points per failed episode
    tries: int = 2  # branch: other chunks tried at a decision point, at most; a third seldom helps where two did not
    branch_scale: float = 1.0  # branch: noise_scale of the chunks that are tried; all else is played with noise_scale
    max_steps: int = 0  # play-outs end here at the latest; 0 = the suite's own limit
    last_decision: int = 6  # branch: decision points are drawn from the first so many of an episode, up to about the grasp

    def __post_init__(self):
        super().__post_init__()
        common.at_least(self, n_pairs=1, max_playouts=1, candidates=1, noise_low=0, noise_high=0, branches=1, tries=1)
        common.at_least(self, max_steps=0, last_decision=1, branch_scale=0)


# -------------------------------------------------------------------------------------------------------------- play-outs
@dataclass
class Decision:
    """A point at which the policy looked: state of the simulator, observation, the chunks proposed and executed (normalised)."""

    number: int
    state: object
    obs: dict
    proposed: np.ndarray  # (H, 7)
    executed: np.ndarray  # (H, 7) equals proposed but for noise and clipping
    n: int  # actions executed


def play(env, policy, cfg: Config, source: tuple, k: int = 0, chunk: torch.Tensor | None = None, sigma: float = 0.0) -> list:
    """Play on from decision k to the end of the episode; the first chunk may be given. Returns the decisions made.

    The policy's noise at decision k is a function of (seed, source, k): play-outs from one
    source differ only in what they are given.
    """
    made = []
    while not env.success and env.steps < env.max_steps:
        state, obs = env.save(), env.observe()
        if chunk is None:
            chunk = common.propose(policy, obs, cfg, [common.stream(cfg.seed, "prefs", *source, k)])[0]
        actions = np.asarray(policy.unnormalise(chunk))  # (H, 7)
        noise = common.np_stream(cfg.seed, "action noise", *source, k, sigma).normal(0, sigma, actions.shape)
        actions = np.clip(actions + noise, -1, 1) if sigma else actions
        n = common.carry_out(env, actions[: cfg.execute])
        executed = policy.normalise(torch.as_tensor(np.clip(actions, -1, 1), dtype=torch.float32))[..., :7].numpy()
        made.append(Decision(k, state, obs, chunk[:, :7].numpy(), executed, n))
        chunk, k = None, k + 1
    return made


def make_pair(chosen: Decision, rejected: Decision, **facts) -> tuple[dict, dict]:
    """Tensors and description of one pair. The mask covers the actions that were executed of both chunks."""
    mask = np.arange(len(chosen.proposed)) < min(chosen.n, rejected.n)
    tensors = {
        "agentview": chosen.obs["agentview"],
        "wrist": chosen.obs["wrist"],
        "state": chosen.obs["state"],
        "chosen": chosen.executed,
        "rejected": rejected.executed,
        "chosen_proposed": chosen.proposed,
        "rejected_proposed": rejected.proposed,
        "mask": mask,
    }
    return tensors, facts | {"decision": chosen.number, "instruction": chosen.obs["instruction"]}


# ---------------------------------------------------------------------------------------------------------------- recipes
def episode_pairs(env, policy, cfg: Config, init: int, attempt: int) -> tuple[list, int, str]:
    """The paper's recipe: K noisy episodes from one init state, ranked by outcome. -> pairs, play-outs, what happened."""
    source = (env.suite, env.task_id, init, attempt)
    best, worst = None, None
    sigmas = np.linspace(cfg.noise_low, cfg.noise_high, cfg.candidates)
    wins = 0
    for i, sigma in enumerate(sigmas):
        env.reset(init)
        decisions = play(env, policy, cfg, (*source, i), sigma=float(sigma))
        wins += env.success
        if env.success and best is None:  # the least noisy success ...
            best = (decisions, float(sigma))
        if not env.success:  # ... against the noisiest failure
            worst = (decisions, float(sigma))
    if best is None or worst is None:
        return [], len(sigmas), "all succeeded" if best else "all failed"
    chunks = list(zip(best[0], worst[0], strict=False))[: None if cfg.pairs == "whole" else 1]
    seen = best[0][0].obs  # the first observation, which both share
    facts = {"chosen_sigma": best[1], "rejected_sigma": worst[1], "wins": wins}
    return [make_pair(replace(good, obs=seen), bad, **facts) for good, bad in chunks], len(sigmas), "mixed outcomes"


def branch_pairs(env, policy, cfg: Config, init: int, attempt: int) -> tuple[list, int, str]:
    """Branch from a failed episode at decision points, until a chunk leads to success. -> pairs, play-outs, what happened.

    Only failures are branched: for a policy that succeeds with probability p, a pair then costs (1/(1-p) + b/p) / b play-outs
    with b points per failure, against 1/(1-p) where failures are sought from a success.
    """
    source = (env.suite, env.task_id, init, attempt)
    env.reset(init)
    base = play(env, policy, cfg, source)
    if env.success:
        return [], 1, "succeeded"
    playouts, pairs, trying = 1, [], replace(cfg, noise_scale=cfg.branch_scale)
    points = min(len(base), cfg.last_decision)
    for k in sorted(common.np_stream(cfg.seed, "branch points", *source).permutation(points)[: cfg.branches].tolist()):
        generators = [common.stream(cfg.seed, "branch", *source, k, i) for i in range(cfg.tries)]
        for i, chunk in enumerate(common.propose(policy, base[k].obs, trying, generators)):
            env.restore(base[k].state)
            other = play(env, policy, cfg, source, k, chunk)[0]
            playouts += 1
            if env.success:
                pairs.append(make_pair(other, base[k], tried=i + 1))
                break
    return pairs, playouts, f"failed, {len(pairs)} pairs"


RECIPES = {"episode": episode_pairs, "whole": episode_pairs, "branch": branch_pairs}


# ------------------------------------------------------------------------------------------------------------- collection
def collect(job: tuple):
    """Worker: attempt after attempt at one task until its share of pairs or of play-outs is reached; yields each attempt."""
    cfg, suite, task, pairs, playouts, units, quota, budget = job
    policy = common.load_sft(cfg)
    env = sim.TaskEnv(suite, task, cfg.image_size, cfg.render)
    env.max_steps = min(cfg.max_steps or env.max_steps, env.max_steps)
    states = common.init_states("prefs", cfg.n_init)
    while pairs < quota and playouts < budget:
        init, attempt = states[units % len(states)], units // len(states)
        try:
            found, n, outcome = RECIPES[cfg.pairs](env, policy, cfg, init, attempt)
        except sim.CRASHES as error:  # the simulator diverged: nobody's success or failure
            found, n, outcome = [], 1, f"crash: {type(error).__name__}"
        found = found[: quota - pairs]
        row = {"suite": suite, "task": task, "unit": units, "init_state": init, "playouts": n, "outcome": outcome}
        yield row | {"pairs": [facts for _, facts in found]}, [tensors for tensors, _ in found]
        pairs, playouts, units = pairs + len(found), playouts + n, units + 1
    env.close()


def share(total: int, parts: int, part: int) -> int:
    """How much of `total` falls to one of `parts`, as even as integers allow."""
    return total * (part + 1) // parts - total * part // parts


def gather(cfg: Config, tasks: list, attempts: Path, parts: Path) -> None:
    """Make the attempts that are not there yet: their pairs as files of `parts`, then a line in `attempts`."""
    done, jobs = disk.read_jsonl(attempts, "suite task unit init_state outcome playouts pairs"), []
    ranks.wait()  # all have read before any writes
    for i, (suite, task) in enumerate(tasks):
        mine = [row for row in done if (row["suite"], row["task"]) == (suite, task)]
        counts = (sum(len(row["pairs"]) for row in mine), sum(row["playouts"] for row in mine), len(mine))
        jobs.append((cfg, suite, task, *counts, share(cfg.n_pairs, len(tasks), i), share(cfg.max_playouts, len(tasks), i)))
    bar = common.progress(total=cfg.max_playouts, initial=sum(row["playouts"] for row in done), desc="prefs", unit="play-out")
    found = sum(len(row["pairs"]) for row in done)
    for _, (row, tensors) in workers.parallel(collect, ranks.share(jobs), cfg.workers):
        for i, pair in enumerate(tensors):
            disk.save_tensors(part(parts, row, i), {key: torch.as_tensor(value) for key, value in pair.items()})
        disk.append_jsonl(attempts, row)  # the attempt counts from here on
        found += len(tensors)
        bar.update(row["playouts"])
        bar.set_postfix(pairs=f"{found}/{cfg.n_pairs}")


def part(parts: Path, row: dict, i: int) -> Path:
    """File of the i-th pair of an attempt."""
    return parts / f"{row['suite']}-{row['task']:02d}-{row['unit']:04d}-{i}.safetensors"


def assemble(attempts: Path, parts: Path, folder: Path) -> None:
    """All pairs in one file, in the order of tasks and attempts and not of their making; pairs.jsonl last."""
    rows = sorted(disk.read_jsonl(attempts), key=lambda row: (row["suite"], row["task"], row["unit"]))
    found = [(row, i, facts) for row in rows for i, facts in enumerate(row["pairs"])]
    if not found:
        raise common.UserError(f"{len(rows)} attempts gave no pair (see {attempts}); raise prefs.max_playouts")
    pairs = [disk.load_tensors(part(parts, row, i)) for row, i, _ in found]
    disk.save_tensors(folder / "pairs.safetensors", {key: torch.stack([p[key] for p in pairs]) for key in pairs[0]})
    disk.write_rows(attempts, rows)
    where = ("suite", "task", "unit", "init_state")
    disk.write_rows(folder / "pairs.jsonl", [{key: row[key] for key in where} | facts for row, _, facts in found])


def summary(rows: list[dict]) -> str:
    """Table of what was tried and kept, by task."""
    outcomes = sorted({row["outcome"] for row in rows})
    lines = ["task | pairs | play-outs | " + " | ".join(outcomes)]
    for suite, task in sorted({(row["suite"], row["task"]) for row in rows}):
        mine = [row for row in rows if (row["suite"], row["task"]) == (suite, task)]
        counts = Counter(row["outcome"] for row in mine)
        cells = [f"{suite} {task}", sum(len(row["pairs"]) for row in mine), sum(row["playouts"] for row in mine)]
        lines.append(" | ".join(str(c) for c in cells + [counts[o] for o in outcomes]))
    return "\n".join(lines)


def main(cfg: Config) -> None:
    if cfg.dry_run:
        return memory.report(cfg, "prefs")
    if cfg.start_seed not in (0, cfg.seed):
        raise common.UserError(f"the pairs are those of start_seed={cfg.start_seed}: collect them with seed={cfg.start_seed}")
    common.init_states("prefs", cfg.n_init)  # fails where they would reach into another group
    tasks = sim.tasks(cfg)
    shared = (
        f"suites tasks backbone seed image_size render blank_images pairs execute denoise_steps noise_scale {common.SFT_KEYS}"
    )
    code = ["sim.py", "osc.py", "workers.py", *cfg.policy_code]
    stage = runs.open_stage(__file__, cfg, cfg.variant("prefs"), shared, common.sft_inputs(cfg), code)
    if stage is None:
        return
    attempts, parts = stage.dir / "units.jsonl", stage.dir / "parts"
    if not (stage.dir / "pairs.jsonl").is_file():  # written when all else is there
        parts.mkdir(exist_ok=True)
        gather(cfg, tasks, attempts, parts)
        ranks.wait()
        if ranks.first():
            assemble(attempts, parts, stage.dir)
    if not ranks.first():
        return
    shutil.rmtree(parts, ignore_errors=True)
    rows = disk.read_jsonl(attempts)
    print(summary(rows))
    stage.finish(pairs=sum(len(row["pairs"]) for row in rows), playouts=sum(row["playouts"] for row in rows))


if __name__ == "__main__":
    common.run(lambda: main(common.load_config(Config, "prefs", sys.argv[1:])))
