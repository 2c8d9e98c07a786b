"""GRPO: groups of play-outs from one init state; what did better than its group becomes likelier (App. C).

reads   <run>/<backbone>/seed<k>/sft/ (01)
writes  <run>/<backbone>/seed<k>/grpo[-at<start>]/<adapter>/: adapter in peft's format, metrics.jsonl (a line
        per round), done.json
cost    a round plays 8 x `groups` episodes of 1 to 3 s each on one core, then trains for seconds
try     python -m extras.grpo configs/try.yaml name=grpo grpo.steps=1 grpo.groups=2
        python 04_eval.py configs/try.yaml name=grpo policy=dpo adapters_from=runs/grpo/pi05/seed42/grpo

1. Play 8 episodes from each of `groups` init states. A return is 1 for a success, else 0.
2. Drop groups in which all or none succeed: their mean return must lie in 0.1 to 0.9.
3. Advantage of every chunk of an episode: A = (return - mean of its group) / standard deviation of its group.
4. Ratio of new to old policy: rho = exp( (log p_new - log p_old) / n ), n numbers in the executed actions.
5. Loss: - mean of min( rho A, clip(rho, 1 - 0.2, 1 + 0.28) A ), one pass over all chunks.

log p of action tokens is exact. A flow policy has the surrogate, with draws (t, eps) that old and new policy
share, as in FPO (arXiv 2507.21053). Group size, limits of the return, clip range and one pass are those of
SimpleVLA-RL (arXiv 2509.09674) and of TorchRL's sota-implementations/vla_grpo (commit 1367811). Both train
with lr 5e-6, 512 episodes a round and temperature 1.6.
Differs from both: the ratio is per chunk, as in GSPO (arXiv 2507.18071), not per token. Tokens are scored at
temperature 1, at whichever `noise_scale` they were drawn.
Left out: a KL term (they have none either), a value function, dense rewards.
"""

import importlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

import backbones
import common
from runtime import Count, disk, refuse, stage, workers
from sim.env import CRASHES, TaskEnv, instruction, tasks

prefs = importlib.import_module("02_collect_prefs")

GROUP = 8  # play-outs from one init state
KEPT = 0.1, 0.9  # mean returns of the groups that are kept
CLIP = 0.2, 0.28  # how far the ratio may fall and rise


@dataclass
class Config(common.SceneConfig, common.ActingConfig, common.AdapterConfig):
    section: ClassVar = "grpo"
    checkpoint_every: ClassVar = 1
    warmup: ClassVar = 0
    steps: Count = 6  # rounds
    groups: Count = 20  # init states played in a round, spread evenly over the tasks
    max_steps: int = 0  # play-outs end here at the latest, as in 02; 0 = the suite's own limit
    batch_size: Count = 64  # chunks per update
    draws: Count = 4
    lr: float = 5e-5  # peak; cosine over the rounds to 1 % of it
    rank: Count = 32
    alpha: Count = 64

    folder = property(lambda self: self.seed_dir / self.variant("grpo") / self.adapter)

    def inputs(self) -> list[Path]:
        refuse(self.surrogate != "paper", "GRPO's ratio has the paper's surrogate; leave surrogate= out")
        most = len(tasks(self)) * len(common.INIT_GROUPS["prefs"])
        refuse(self.groups > most, f"grpo.groups={self.groups}: there are {most} init states in all")
        refuse(
            self.noise_scale == 0, "without noise all play-outs of a group are equal; set grpo.noise_scale"
        )
        return self.sft_inputs()


# ------------------------------------------------------------------------------------------------- the method
def advantages(returns: Tensor) -> Tensor:
    """Of groups (G, 8): how many standard deviations an episode is above its group's mean. nan: dropped."""
    mean, std = returns.mean(1, keepdim=True), returns.std(1, keepdim=True)
    return torch.where((mean >= KEPT[0]) & (mean <= KEPT[1]), (returns - mean) / (std + 1e-6), torch.nan)


def clipped_loss(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """PPO's, with more room above than below (arXiv 2503.14476): both (B,) -> scalar."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - CLIP[0], 1 + CLIP[1])
    return -torch.minimum(ratio * advantage, clipped * advantage).mean()


def per_number(policy, chunks: dict, draws) -> Tensor:
    """log p of the executed actions, divided by how many numbers they have: (B,)."""
    log_p = policy.log_prob(policy.encode(chunks["obs"]), chunks["chunk"], draws, chunks["mask"])
    return log_p / (chunks["mask"].sum(1) * common.ACTION_DIM).to(log_p.device)


# ------------------------------------------------------------------------------------------------------- play
@dataclass
class Group:
    cfg: Config
    folder: Path  # of the round; its adapter is there
    number: int  # of the round
    suite: str
    task: int
    init: int

    file = property(lambda self: self.folder / f"{self.suite}-{self.task:02d}-{self.init}.safetensors")


def play_group(group: Group) -> None:
    """Worker: play a group's episodes, and write every chunk with its episode."""
    cfg, policy = group.cfg, backbones.load_sft(group.cfg)
    policy = common.load_adapter(policy, group.folder / "adapter").freeze()
    env = TaskEnv(group.suite, group.task, cfg.image_size, cfg.render, cfg.max_steps)
    chunks, returns = [], torch.zeros(GROUP)
    for i in range(GROUP):
        try:
            env.reset(group.init)
            made = prefs.play(
                env, policy, cfg, ("grpo", group.number, group.suite, group.task, group.init, i)
            )
        except CRASHES:  # neither success nor failure: the group is dropped
            returns[i] = torch.nan
            continue
        returns[i] = float(env.success)
        for seen in made:
            obs = common.blank_images(seen.obs) if cfg.blank_images else seen.obs
            arrays = {key: obs[key] for key in (*common.CAMERAS, "state")} | {"chunk": seen.executed}
            row = {key: torch.as_tensor(value) for key, value in arrays.items()}
            chunks.append(row | {"mask": torch.arange(policy.horizon) < seen.n, "episode": torch.tensor(i)})
    env.close()
    # nothing where all crashed
    stacked = {key: torch.stack([chunk[key] for chunk in chunks]) for key in (chunks[0] if chunks else ())}
    disk.save_tensors(group.file, stacked | {"returns": returns})


def groups_of(cfg: Config, folder: Path, number: int) -> list[Group]:
    """The groups of a round: tasks in turn, and the next init states of each in every round."""
    every = [(suite, task, init) for init in common.init_states("prefs") for suite, task in tasks(cfg)]
    chosen = [every[i % len(every)] for i in range(number * cfg.groups, (number + 1) * cfg.groups)]
    return [Group(cfg, folder, number, *where) for where in chosen]


def chunks_of(groups: list[Group]) -> tuple[dict, Tensor]:
    """All chunks of the groups that are kept, with their advantages; and the returns (G, 8) of all groups."""
    played = [disk.load_tensors(group.file) for group in groups]
    returns = torch.stack([each.pop("returns") for each in played])
    parts, sentences = [], []
    for group, each, advantage in zip(groups, played, advantages(returns), strict=True):
        if advantage.isfinite().all():
            parts.append(each | {"advantage": advantage[each["episode"]]})
            sentences += [instruction(group.suite, group.task)] * len(each["episode"])
    if not parts:
        return {}, returns
    chunks = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    obs = {key: chunks[key] for key in (*common.CAMERAS, "state")} | {"instruction": sentences}
    return {key: chunks[key] for key in ("chunk", "mask", "advantage")} | {"obs": obs}, returns


# -------------------------------------------------------------------------------------------------- training
def main(cfg: Config, run: stage.Run) -> dict:
    policy = backbones.load_sft(cfg)
    adapted = common.attach_adapter(
        policy, cfg.adapter, cfg.rank, cfg.alpha, policy.adapter_targets, cfg.seed
    )
    trained = torch.nn.ParameterList(p for p in policy.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=0.0)

    for step in run.steps(run.resume(adapter=trained, optimizer=optimizer), cfg.steps):
        # 1. play groups with the policy as it stands
        folder = run.dir / f"round-{step + 1}"
        common.save_adapter(adapted, folder / "adapter")
        groups = groups_of(cfg, folder, step)
        files = {group.file: group for group in groups}
        workers.run_missing(play_group, files, cfg.workers, f"grpo round {step + 1}")

        # 2. advantages, and the old policy's log p under the draws that the new one will share
        chunks, returns = chunks_of(groups)
        n, generator = len(chunks.get("mask", ())), common.stream(cfg.seed, "grpo", step)
        order = torch.randperm(n, generator=generator).split(cfg.batch_size) if n else ()
        draws = policy.draws(n, cfg.draws, generator, "stratified")
        with torch.no_grad():
            old = [
                per_number(policy, common.select(chunks, index), common.select(draws, index))
                for index in order
            ]

        # 3. one pass over all chunks, an update per batch
        losses = []
        for index, log_p_old in zip(order, old, strict=True):
            batch = common.select(chunks, index)
            log_ratio = per_number(policy, batch, common.select(draws, index)) - log_p_old
            loss = clipped_loss(log_ratio, batch["advantage"].to(log_ratio.device))
            run.update(loss, trained, optimizer, step)
            losses.append(loss.item())
        run.log(
            step,
            success=returns.nanmean().item(),
            kept=advantages(returns).isfinite().all(1).double().mean().item(),
            chunks=n,
            loss=sum(losses) / max(1, len(losses)),
        )
        shutil.rmtree(folder)

    common.save_adapter(adapted, run.dir)
    return {"playouts": GROUP * cfg.groups * cfg.steps}


if __name__ == "__main__":
    stage.start(main, Config, preview=backbones.preview)
