"""05 - A student that does in one denoise step what the flow policy does in ten (the paper prescribes it, and does not show it).

reads   <run>/data/ (00), the observations alone; <run>/<backbone>/seed<k>/sft/ (01), the teacher
writes  <run>/<backbone>/seed<k>/student/: a checkpoint like 01's, metrics.jsonl, done.json
cost    a step is ten expert passes of the teacher without gradients, and one of the student with; the prefix is computed once
try     python 05_distill.py configs/tiny.yaml start=final
        python 05_cells.py configs/tiny.yaml start=final checkpoint=runs/tiny/pi05/seed42/student denoise_steps=1

The teacher's Euler steps are a map from noise to a chunk, without further randomness. The student starts as the teacher and
learns that map by regression at t = 1, eps - v(eps, 1, o) = teacher(eps, o): the distillation of rectified flow (Liu et al.,
arXiv 2209.03003).
Only the action expert is trained, so that one set of keys and values serves both, and all epochs.
Left out: consistency and shortcut losses, which need no teacher's trajectories; adversarial ones.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch

import common
import disk
import memory
import runs


@dataclass
class Config(common.RunConfig):
    steps: int = 2000
    batch_size: int = 64  # observations, one noise each
    lr: float = 3e-4  # peak; cosine to 1 % of it
    warmup: int = 50
    holdout: int = 2  # the last so many init states of the demonstrations are for validation, as in 01_sft.py
    grad_clip: float = 1.0
    log_every: int = 50
    checkpoint_every: int = 200
    threads: int = 1

    def __post_init__(self):
        super().__post_init__()
        common.at_least(self, steps=1, batch_size=1, lr=0, warmup=0, holdout=0, log_every=1, checkpoint_every=1, threads=1)


def load_observations(cfg: Config) -> tuple[dict, dict]:
    """Observations of all demonstrations, those that 01_sft.py holds out apart: training and validation."""
    parts = {False: [], True: []}
    for _, held, demo in common.demonstrations(cfg, cfg.holdout):
        parts[held].append(demo)

    def tensors(demos: list) -> dict:
        obs = {c: torch.from_numpy(np.concatenate([getattr(d, c) for d in demos])) for c in ("agentview", "wrist")}
        obs["state"] = torch.from_numpy(np.concatenate([d.state[d.image_steps] for d in demos]))
        return obs | {"instruction": [d.instruction for d in demos for _ in d.image_steps]}

    return tensors(parts[False]), tensors(parts[True] or parts[False])


@torch.no_grad()
def encode_all(policy, obs: dict, batch_size: int):
    """Prefixes of all observations."""
    rows = torch.arange(len(obs["state"])).split(batch_size)
    parts = [
        {k: v[i] for k, v in obs.items() if k != "instruction"} | {"instruction": [obs["instruction"][j] for j in i]}
        for i in rows
    ]
    prefixes = [policy.encode(part) for part in parts]
    return type(prefixes[0]).cat(prefixes)


def one_step(policy, prefix, noise: torch.Tensor) -> torch.Tensor:
    """What sample_actions(prefix, noise, 1) gives, with gradients: (B, H, D)."""
    return noise - policy.velocity(prefix, noise, torch.ones(1, device=noise.device))


def distance(student, teacher, prefix, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Mean squared difference of the student's chunks and the teacher's over actions and real dimensions."""
    target = teacher.sample_actions(prefix, noise, steps)
    return (one_step(student, prefix, noise) - target)[..., : common.ACTION_DIM].square().mean()


def main(cfg: Config) -> None:
    if cfg.dry_run:
        parts = memory.estimate(cfg, "distill")["parts"]
        return print(
            f"distill: {2 * parts['weights'] / 2**30:.3f} GiB of weights, the teacher's and the student's, and prefixes of all"
        )
    if cfg.backbone != "pi05":
        raise common.UserError(f"{cfg.backbone} has no denoise steps to distil; set backbone=pi05")
    if cfg.blank_images:
        raise common.UserError("the student learns from the demonstrations' images; set blank_images=false")
    runs.alone(__file__)
    inputs = [runs.require(cfg.data_dir, "demos"), *common.sft_inputs(cfg)]
    shared = f"suites tasks backbone seed denoise_steps {common.SFT_KEYS}"
    stage = runs.open_stage(__file__, cfg, cfg.seed_dir / "student", shared, inputs, cfg.policy_code)
    if stage is None:
        return
    torch.set_num_threads(cfg.threads)
    teacher, student = common.load_sft(cfg), common.load_sft(cfg)
    student.requires_grad_(False).expert.requires_grad_(True)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=cfg.lr, weight_decay=0.0)
    train, val = (encode_all(teacher, obs, cfg.batch_size) for obs in load_observations(cfg))
    val = val.select(torch.arange(0, len(val), max(1, len(val) // 256)))
    val_noise = teacher.noise(len(val), common.stream(0, "distill validation"))

    step, metrics = 0, stage.dir / "metrics.jsonl"
    state = disk.load_checkpoint(stage.dir / "checkpoint.pt")
    if state:
        student.load_state_dict(state["trained"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    disk.keep_rows(metrics, lambda row: row["step"] <= step, "step")

    bar = common.progress(range(step, cfg.steps), initial=step, total=cfg.steps, desc="distill", unit="step")
    for step in bar:
        prefix = train.select(common.shuffled(cfg.seed, "distill", step, cfg.batch_size, len(train)))
        noise = student.noise(cfg.batch_size, common.stream(cfg.seed, "distill", step)).to(prefix.valid.device)
        loss = distance(student, teacher, prefix, noise, cfg.denoise_steps)
        if not loss.isfinite():
            raise common.UserError(f"the loss is {loss.item()} at step {step}: lower distill.lr")
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, cfg)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        if step == 0 or done % cfg.log_every == 0 or done == cfg.steps:
            with torch.no_grad():
                val_rmse = distance(student, teacher, val, val_noise.to(val.valid.device), cfg.denoise_steps).sqrt().item()
            row = {"step": done, "rmse": loss.sqrt().item(), "val_rmse": val_rmse, "grad_norm": grad_norm.item()}
            disk.append_jsonl(metrics, row)
            bar.set_postfix(val_rmse=f"{val_rmse:.3f}")
        if done % cfg.checkpoint_every == 0:
            state = {"step": done, "trained": trained, "optimizer": optimizer.state_dict()}
            disk.save_checkpoint(stage.dir / "checkpoint.pt", state)
    student.save(stage.dir)
    stage.finish(observations=len(train))


if __name__ == "__main__":
    common.run(lambda: main(common.load_config(Config, "distill", sys.argv[1:])))
