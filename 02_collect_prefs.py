"""02 - Preference pairs from the policy's own rollouts (the paper's section 3: collection of preferences).

reads   <run>/<backbone>/seed<k>/sft/ (01)
writes  <run>/<backbone>/seed<k>/prefs-<pairs>[-at<start>]/: pairs.safetensors (images, state, chunks, masks),
        pairs.jsonl (one line each: where the pair is from), tried.safetensors and tried.jsonl (the same of
        every play-out's first chunk and its outcome, for losses that need no pairs), units.jsonl (every
        attempt, also without a pair), done.json
cost    a play-out takes 1 to 3 s on one core; configs/tiny.yaml: 8 minutes for 110 pairs
try     python 02_collect_prefs.py configs/try.yaml name=mine

A pair is one observation, a chosen and a rejected chunk, and a mask of the actions executed in both.

`pairs: episode` is the paper's recipe as its text can be read. K episodes start from one init state. Each has
its own level of noise on the executed actions, from 0.1 in the first to 0.4 in the last. The first chunks of
a successful and of a failed episode share the first observation. Training uses the chunk as executed (noise
added, clipped), since it earned the label. The proposed one is stored beside it.

`pairs: whole` is a control. It pairs the chunks of the same two episodes step by step, and scores every chunk
under the *first* observation. With `prefs.noise_low=0 prefs.noise_high=0` it is what the paper's public code
does for OpenVLA.

`pairs: branch` is what DPO's derivation asks for. At decision points of a failed episode the simulator's
state is restored. Other chunks are sampled from the same observation. The policy plays them out, one after
another until one succeeds, *with the same later noise*. A policy that acts greedily (noise_scale 0) still
tries other chunks (branch_scale).

Differs from the paper: it uses init states 20-34, which no demonstration and no evaluation uses. Two failures
never form a pair.
Left out: learned reward models, relabelling.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

import backbones
import common
from report.tables import pivot
from runtime import Count, disk, ranks, refuse, stage, workers
from sim.env import CRASHES, TaskEnv, carry_out, tasks


@dataclass
class Config(common.SceneConfig, common.ActingConfig, common.PairsConfig):
    section: ClassVar = "prefs"
    by_torchrun: ClassVar = True
    n_pairs: Count = 60  # aim, spread evenly over the tasks
    n_init: Count = 15  # init states used, of the 15 in group "prefs"
    max_playouts: Count = 300  # of all tasks, each of which may go one attempt over its share
    candidates: Count = 4  # episode: K, the episodes played from one init state
    noise_low: float = 0.1  # episode: standard deviation of the action noise of the first candidate ...
    noise_high: float = 0.4  # ... and of the last
    branches: Count = 3  # branch: decision points per failed episode
    tries: Count = 2  # branch: other chunks per decision point, until one succeeds
    branch_scale: float = 1.0  # branch: noise_scale of the chunks that are tried, and of nothing else
    max_steps: int = 0  # play-outs end here at the latest; 0 = the suite's own limit
    last_decision: Count = 6  # branch: decision points are among the first 6 looks, about up to the grasp

    folder = property(lambda self: self.made_pairs)

    def inputs(self) -> list[Path]:
        refuse(
            self.start_seed not in (0, self.seed),
            f"the pairs are those of start_seed={self.start_seed}: collect them with seed={self.start_seed}",
        )
        alike = self.candidates < 2 or not (self.noise_scale or self.noise_high or self.noise_low)
        refuse(
            self.pairs != "branch" and alike,
            f"pairs={self.pairs} compares noisy episodes: set prefs.candidates to 2 or more, and some noise",
        )
        common.init_states("prefs", self.n_init)
        tasks(self)
        return self.sft_inputs()


# -------------------------------------------------------------------------------------------------- play-outs
@dataclass
class Decision:
    """A point at which the policy looked: the simulator's state, the observation, the chunk (normalised)."""

    number: int  # of the looks before it
    state: object
    obs: dict
    proposed: np.ndarray  # (H, 7)
    executed: np.ndarray  # (H, 7) with noise and clipped, of which the first n were carried out
    n: int


def play(
    env, policy, cfg: Config, source: tuple, k: int = 0, chunk=None, sigma: float = 0.0
) -> list[Decision]:
    """Play on from decision k to the end of the episode; the first chunk (H, D) may be given.

    The policy's noise at decision k is a function of (seed, source, k): play-outs from one source differ only
    in what they are given.
    """
    made = []
    while not env.success and env.steps < env.max_steps:
        state, obs = env.save(), env.observe()
        if chunk is None:
            chunk = backbones.propose(policy, obs, cfg, [common.stream(cfg.seed, "prefs", *source, k)])[0]
        actions = np.asarray(policy.unnormalise(chunk))  # (H, 7)
        if sigma:
            g = common.np_stream(cfg.seed, "action noise", *source, k, sigma)
            actions = np.clip(actions + g.normal(0, sigma, actions.shape), -1, 1)
        n = carry_out(env, actions[: cfg.execute])
        executed = torch.as_tensor(np.clip(actions, -1, 1), dtype=torch.float32)
        executed = policy.normalise(executed)[..., :7].numpy()
        made.append(Decision(k, state, obs, chunk[:, :7].numpy(), executed, n))
        chunk = None
        k += 1
    return made


Row = tuple[dict[str, torch.Tensor], dict]  # what is stored of a pair, or of a play-out: tensors and facts


def stored(seen: Decision, n: int, arrays: dict[str, np.ndarray], facts: dict) -> Row:
    """Chunks (H, 7) with the observation that they answer, and the mask of the n executed actions."""
    arrays = arrays | {key: seen.obs[key] for key in (*common.CAMERAS, "state")}
    arrays["mask"] = np.arange(len(seen.proposed)) < n
    facts = facts | {"decision": seen.number, "instruction": seen.obs["instruction"]}
    return {key: torch.as_tensor(value) for key, value in arrays.items()}, facts


def make_pair(chosen: Decision, rejected: Decision, **facts) -> Row:
    """A pair. Its mask covers the actions that were executed in both chunks."""
    arrays = {
        "chosen": chosen.executed,
        "rejected": rejected.executed,
        "chosen_proposed": chosen.proposed,
        "rejected_proposed": rejected.proposed,
    }
    return stored(chosen, min(chosen.n, rejected.n), arrays, facts)


def make_try(first: Decision, success: bool) -> Row:
    """A play-out: its first chunk, and what came of it."""
    return stored(first, first.n, {"chunk": first.executed}, {"success": bool(success)})


# ---------------------------------------------------------------------------------------------------- recipes
def episode_pairs(env, policy, cfg: Config, init: int, visit: int) -> tuple[list[Row], list[Row], str]:
    """The paper's recipe: K noisy episodes from one init state, ranked by outcome. -> pairs, play-outs,
    outcome.
    """
    source = (env.suite, env.task_id, init, visit)
    best, worst, tried = None, None, []
    sigmas = np.linspace(cfg.noise_low, cfg.noise_high, cfg.candidates)
    for i, sigma in enumerate(sigmas):
        env.reset(init)
        decisions = play(env, policy, cfg, (*source, i), sigma=float(sigma))
        tried.append(make_try(decisions[0], env.success))
        if env.success and best is None:  # the least noisy success ...
            best = (decisions, float(sigma))
        if not env.success:  # ... against the noisiest failure
            worst = (decisions, float(sigma))
    if best is None or worst is None:
        return [], tried, "all succeeded" if best else "all failed"
    chunks = list(zip(best[0], worst[0], strict=False))
    seen = best[0][0].obs  # the first observation, which both share
    wins = sum(facts["success"] for _, facts in tried)
    facts = {"chosen_sigma": best[1], "rejected_sigma": worst[1], "wins": wins}
    return (
        [
            make_pair(replace(good, obs=seen), bad, **facts)
            for good, bad in (chunks if cfg.pairs == "whole" else chunks[:1])
        ],
        tried,
        "mixed outcomes",
    )


def branch_pairs(env, policy, cfg: Config, init: int, visit: int) -> tuple[list[Row], list[Row], str]:
    """Branch from a failed episode at decision points, until a chunk leads to success. -> pairs, play-outs,
    outcome.

    Branching starts only from failures. From a state of a success, a policy that succeeds with probability p
    would need 1/(1-p) play-outs on average to fail.
    """
    source = (env.suite, env.task_id, init, visit)
    env.reset(init)
    base = play(env, policy, cfg, source)
    tried, pairs = [make_try(base[0], env.success)], []
    if env.success:
        return [], tried, "succeeded"
    trying = replace(cfg, noise_scale=cfg.branch_scale)
    points = min(len(base), cfg.last_decision)
    chosen = common.np_stream(cfg.seed, "branch points", *source).permutation(points)[: cfg.branches]
    for k in sorted(chosen.tolist()):
        generators = [common.stream(cfg.seed, "branch", *source, k, i) for i in range(cfg.tries)]
        for i, chunk in enumerate(backbones.propose(policy, base[k].obs, trying, generators)):
            env.restore(base[k].state)
            other = play(env, policy, cfg, source, k, chunk)[0]
            tried.append(make_try(other, env.success))
            if env.success:
                # its number among the tries: 07 draws its noise again
                pairs.append(make_pair(other, base[k], tried=i + 1))
                break
    return pairs, tried, f"failed, {len(pairs)} pairs"


RECIPES = {"episode": episode_pairs, "whole": episode_pairs, "branch": branch_pairs}


# ------------------------------------------------------------------------------------------------- collection
@dataclass
class Job:
    """A task, and its share of the pairs and of the play-outs."""

    cfg: Config
    folder: Path
    suite: str
    task: int
    quota: int
    budget: int


def collect(job: Job) -> None:
    """Worker: attempt after attempt at one task, until its share of pairs or of play-outs is reached.

    An attempt counts when its line is in units.jsonl; the files of its pairs are written before.
    """
    rows = [row for row in attempts(job.folder) if (row["suite"], row["task"]) == (job.suite, job.task)]
    pairs, playouts = sum(len(row["pairs"]) for row in rows), sum(row["playouts"] for row in rows)
    if pairs >= job.quota or playouts >= job.budget:
        return
    cfg, policy = job.cfg, backbones.load_sft(job.cfg).freeze()
    made_with = common.origin(policy, policy.adapter_targets)
    env = TaskEnv(job.suite, job.task, cfg.image_size, cfg.render, cfg.max_steps)
    states, unit = common.init_states("prefs", cfg.n_init), len(rows)
    most = 1 + cfg.branches * cfg.tries if cfg.pairs == "branch" else cfg.candidates  # an attempt's play-outs
    while pairs < job.quota and playouts < job.budget:
        init, visit = states[unit % len(states)], unit // len(states)  # each visit draws new noise
        try:
            found, tried, outcome = RECIPES[cfg.pairs](env, policy, cfg, init, visit)
        except CRASHES as error:  # the simulator diverged: nobody's success or failure
            found, tried, outcome = [], [], f"crash: {type(error).__name__}"
        kept = {"pairs": found[: job.quota - pairs], "tried": tried}
        row = {
            "suite": job.suite,
            "task": job.task,
            "unit": unit,
            "init_state": init,
            "playouts": len(tried) or most,  # after a crash nobody knows
            "outcome": outcome,
            "pairs": [facts for _, facts in kept["pairs"]],
            "tried": [facts for _, facts in tried],
        }
        for kind in [name for name in kept if kept[name]]:
            parts = [tensors for tensors, _ in kept[kind]]
            stacked = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
            disk.save_tensors(part_file(job.folder, row, kind), stacked, made_with)
        disk.append_jsonl(job.folder / "units.jsonl", row)
        pairs += len(row["pairs"])
        playouts += row["playouts"]
        unit += 1
    env.close()


def attempts(folder: Path) -> list[dict]:
    rows = disk.read_jsonl(folder / "units.jsonl", "suite task unit init_state outcome playouts pairs tried")
    return list({(row["suite"], row["task"], row["unit"]): row for row in rows}.values())


def part_file(folder: Path, row: dict, kind: str) -> Path:
    """File of an attempt's "pairs", or of what it "tried"."""
    return folder / "parts" / f"{row['suite']}-{row['task']:02d}-{row['unit']:04d}-{kind}.safetensors"


def portion(total: int, parts: int, part: int) -> int:
    """How much of `total` falls to one of `parts`, as even as integers allow."""
    return total * (part + 1) // parts - total * part // parts


def assemble(folder: Path) -> None:
    """Merge the attempts' files, sorted by task and attempt. pairs.jsonl comes last and marks the end."""
    rows = sorted(attempts(folder), key=lambda row: (row["suite"], row["task"], row["unit"]))
    refuse(
        not any(row["pairs"] for row in rows),
        f"{len(rows)} attempts gave no pair (see {folder / 'units.jsonl'}); raise prefs.max_playouts, with"
        " overwrite=true",
    )
    disk.write_rows(folder / "units.jsonl", rows)
    for kind in ("tried", "pairs"):
        files = [part_file(folder, row, kind) for row in rows if row[kind]]
        parts = [disk.load_tensors(file) for file in files]
        tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        disk.save_tensors(folder / f"{kind}.safetensors", tensors, disk.facts_of(files[0]))
        where = ("suite", "task", "unit", "init_state")
        disk.write_rows(
            folder / f"{kind}.jsonl",
            [{key: row[key] for key in where} | facts for row in rows for facts in row[kind]],
        )


def main(cfg: Config, run: stage.Run) -> dict | None:
    (run.dir / "parts").mkdir(exist_ok=True)
    if not (run.dir / "pairs.jsonl").is_file():  # written when all else is there
        # 1. every task gets an equal share of the pairs wanted and of the play-outs allowed
        every = tasks(cfg)
        jobs = [
            Job(
                cfg,
                run.dir,
                suite,
                task,
                portion(cfg.n_pairs, len(every), i),
                portion(cfg.max_playouts, len(every), i),
            )
            for i, (suite, task) in enumerate(every)
        ]

        # 2. play until each has its share; what an earlier run has played counts
        workers.run(
            collect,
            ranks.share(jobs),
            cfg.workers,
            "prefs",
            count=lambda: sum(row["playouts"] for row in attempts(run.dir)),
            total=cfg.max_playouts,
            note=lambda: f"{sum(len(row['pairs']) for row in attempts(run.dir))} pairs",
        )
        ranks.wait()

        # 3. one file of all pairs
        if run.first:
            assemble(run.dir)
    if not run.first:
        return None
    rows = attempts(run.dir)
    shutil.rmtree(run.dir / "parts", ignore_errors=True)
    outcomes = {name: name for name in sorted({row["outcome"] for row in rows})}
    print(pivot(rows, ["suite", "task"], "outcome", outcomes, len))  # how many attempts ended how
    return {"pairs": sum(len(row["pairs"]) for row in rows), "playouts": sum(row["playouts"] for row in rows)}


if __name__ == "__main__":
    stage.start(main, Config, preview=backbones.preview)
