"""A student that does in one denoise step what the flow policy does in ten (the paper prescribes it).

reads   <run>/data/ (00), the observations alone; <run>/<backbone>/seed<k>/sft/ (01), the teacher
writes  <run>/<backbone>/seed<k>/student/: a checkpoint like 01's, metrics.jsonl, done.json
cost    a step is ten expert passes of the teacher without gradients, and one of the student with them; the
        prefixes are computed once
try     python -m extras.distill configs/tiny.yaml start=final
        python -m extras.cells configs/tiny.yaml start=final checkpoint=runs/tiny/pi05/seed42/student \
            denoise_steps=1

The teacher's Euler steps are a map from noise to a chunk, without further randomness. The student starts as
the teacher and learns that map by regression at t = 1, eps - v(eps, 1, o) = teacher(eps, o): the distillation
of rectified flow (Liu et al., arXiv 2209.03003). Only the action expert is trained, so one set of keys and
values serves both policies and all epochs.
Left out: consistency and shortcut losses, which need no teacher's trajectories; adversarial ones.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

import backbones
import common
from runtime import Count, refuse, stage
from sim.demos import demonstrations, frames

HOLDOUT = 2  # init states, the last ones, that give the validation error; by default the same ones as in 01


@dataclass
class Config(common.ActingConfig):
    section: ClassVar = "distill"
    warmup: ClassVar = 50
    steps: Count = 2000
    batch_size: Count = 64  # observations, one noise each
    lr: float = 3e-4  # peak; cosine to 1 % of it
    log_every: Count = 50
    checkpoint_every: Count = 200

    folder = property(lambda self: self.seed_dir / "student")

    def inputs(self) -> list[Path]:
        refuse(self.backbone != "pi05", f"{self.backbone} has no denoise steps to distil; set backbone=pi05")
        refuse(
            self.blank_images, "the student learns from the demonstrations' images; set blank_images=false"
        )
        return [stage.require(self.data_dir, "demos", f" name={self.name}"), *self.sft_inputs()]


def load_observations(cfg: Config) -> list[dict]:
    """Observations of all demonstrations: for training, and those that are held out for validation."""
    all_demos = list(demonstrations(cfg, HOLDOUT))
    train, val = ([demo for _, is_held, demo in all_demos if is_held == held] for held in (False, True))
    return [
        {
            **{camera: frames([getattr(d, camera) for d in demos]) for camera in common.CAMERAS},
            "state": torch.from_numpy(np.concatenate([d.state[d.image_steps] for d in demos])),
            "instruction": [d.instruction for d in demos for _ in d.image_steps],
        }
        for demos in (train, val or train)
    ]


def distance(student, teacher, prefix, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Mean squared difference between the student's and the teacher's chunks, over the real dimensions."""
    # what student.sample_actions(prefix, noise, 1) gives, with gradients
    chunk = noise - student.velocity(prefix, noise, torch.ones(1, device=noise.device))  # (B, H, D)
    return (chunk - teacher.sample_actions(prefix, noise, steps))[..., : common.ACTION_DIM].square().mean()


def main(cfg: Config, run: stage.Run) -> dict:
    teacher, student = backbones.load_sft(cfg), backbones.load_sft(cfg)
    student.requires_grad_(False).expert.requires_grad_(True)
    optimizer = torch.optim.AdamW(student.expert.parameters(), lr=cfg.lr, weight_decay=0.0)
    train, val = (student.begin(obs, cfg.batch_size) for obs in load_observations(cfg))  # the prefixes
    val = val.select(torch.arange(0, len(val), max(1, len(val) // 256)))
    val_noise = teacher.noise(len(val), common.stream(0, "distill validation")).to(val.valid.device)

    for step in run.steps(run.resume(expert=student.expert, optimizer=optimizer), cfg.steps):
        # 1. a batch of observations, and a noise for each
        prefix = train.select(common.shuffled(cfg.seed, "distill", step, cfg.batch_size, len(train)))
        noise = student.noise(cfg.batch_size, common.stream(cfg.seed, "distill", step)).to(val_noise.device)

        # 2. one step of the student against all steps of the teacher
        loss = distance(student, teacher, prefix, noise, cfg.denoise_steps)

        # 3. one step of the optimiser, and the log
        grad_norm = run.update(loss, student.expert.parameters(), optimizer, step)
        if step == 0 or run.logs(step):
            with torch.no_grad():
                held_out = distance(student, teacher, val, val_noise, cfg.denoise_steps)
            run.log(
                step,
                rmse=loss.sqrt().item(),
                val_rmse=held_out.sqrt().item(),
                grad_norm=grad_norm,
            )
    student.save(run.dir)
    return {"observations": len(train)}


if __name__ == "__main__":
    stage.start(main, Config, preview=lambda cfg, _: backbones.preview(cfg, ""))  # no estimate of memory
