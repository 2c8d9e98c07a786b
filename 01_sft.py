"""01 - Supervised fine-tuning of a backbone on demonstrations. (The paper starts from published checkpoints.)

reads   <run>/data/<suite>/task_NN.hdf5 (00)
writes  <run>/<backbone>/seed<k>/sft/: model.safetensors config.json norm_stats.json tokenizer.json,
        the snapshots model-<step>.safetensors, metrics.jsonl, done.json
cost    configs/tiny.yaml: 9 minutes on two cores
try     python 01_sft.py configs/try.yaml name=mine (after the same with 00_demos.py)

The loss is flow matching, or next-token cross-entropy: the backbone's own `sft_loss`. An observation is
encoded once and scored with several draws of (t, eps), because on a small model the encoder is the expensive
part. `early` draws a share of every batch from steps 0 to 16 of the episodes (five frames here). Only
there do the images alone say where the object is. Later the hand is on its way, and the robot's state tells
as much. `until` ends the training early, e.g. at a snapshot's step, on the schedule of `steps`.
Differs from the paper: it publishes no SFT stage. Here `train: full` learns everything, from scratch or from
`init_from`. `train: lora | dora` trains an adapter and merges it, so that stage 03's reference is one set of
weights.
Images that take more than 0.4 gigabytes per camera stay on disk until a batch needs them (sim/demos.py).
Left out: mixed precision.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch

import backbones
import common
from runtime import Count, ranks, refuse, stage
from sim.demos import demonstrations, frames


@dataclass
class Config(common.PolicyConfig):
    section: ClassVar = "sft"
    by_torchrun: ClassVar = True
    train: Literal["full", "lora", "dora"] = "full"  # all weights, or an adapter
    steps: Count = 3000  # of the learning rate's schedule
    until: int = 0  # stop at this step of it, e.g. at the snapshot that DPO starts from; 0 = at the end
    batch_size: Count = 32  # observations
    draws: Count = 4  # (t, eps) draws per encoded observation
    lr: float = 1e-3  # peak; cosine to 1 % of it
    warmup: int = 100
    ema: Annotated[float, 0, 1] = 0.998  # decay of the averaged weights, which are the ones saved; 0 = none
    early: Annotated[float, 0, 1] = 0  # share of each batch drawn from steps 0 to 16 of the episodes
    holdout: int = 2  # demonstrations of this many last init states are for validation only
    rank: Count = 32  # of the adapter
    alpha: Count = 64
    snapshots: list[int] = field(default_factory=list)  # steps whose averaged weights are kept
    log_every: Count = 50
    checkpoint_every: Count = 200
    recompute: bool = False  # compute the layers' activations again, not keep them: less memory, more time
    processes: Count = 1  # that share each batch on a CPU; part of the result's last bits (GPUs: torchrun)

    folder = property(lambda self: self.seed_dir / "sft")
    last = property(lambda self: self.until or self.steps)

    def __post_init__(self):
        super().__post_init__()
        refuse(
            self.train == "full" and self.dtype != "float32",
            f"sft.train=full needs dtype=float32, not {self.dtype}: AdamW's small steps get lost in it",
        )
        refuse(self.until > self.steps, f"sft.until={self.until} is beyond sft.steps={self.steps}; lower it")

    def inputs(self) -> list[Path]:
        refuse(
            self.train != "full" and not self.init_from,
            f"sft.train={self.train} adapts given weights: set init_from= to their folder",
        )
        if not self.init_from:
            backbones.horizon(self.backbone, self.model)  # fails for a model that can't be
        given = stage.checkpoint_files(self.init_from) if self.init_from else []
        return [stage.require(self.data_dir, "demos", f" name={self.name}"), *given]


# ------------------------------------------------------------------------------------------------------- data
def future_chunks(actions: np.ndarray, steps: np.ndarray, horizon: int) -> np.ndarray:
    """The `horizon` actions from each of `steps` on, (N, H, 7). Past the end: stand still, keep the grip."""
    still = np.zeros((horizon, 7), actions.dtype)
    still[:, 6] = actions[-1, 6]
    return np.concatenate([actions, still])[steps[:, None] + np.arange(horizon)]  # of (T + H, 7)


def load_data(cfg: Config, horizon: int) -> tuple[dict, dict | None, list[str]]:
    """Training and validation observations (if any are held out) with their chunks, and all tasks'
    instructions.
    """
    rows = {"train": [], "val": []}
    for _, held, demo in demonstrations(cfg, cfg.holdout):
        rows["val" if held else "train"].append(
            (demo, future_chunks(demo.actions, demo.image_steps, horizon))
        )
    instructions = sorted({demo.instruction for part in rows.values() for demo, _ in part})

    def tensors(part: list) -> dict:
        return {
            "agentview": frames([d.agentview for d, _ in part]),  # (N, S, S, 3) uint8
            "wrist": frames([d.wrist for d, _ in part]),
            "state": torch.from_numpy(np.concatenate([d.state[d.image_steps] for d, _ in part])),  # (N, 8)
            "chunk": torch.from_numpy(np.concatenate([c for _, c in part])),  # (N, H, 7) environment units
            "instruction": [d.instruction for d, _ in part for _ in d.image_steps],
            "step": torch.from_numpy(np.concatenate([d.image_steps for d, _ in part])),  # (N,) of its episode
            "places": torch.from_numpy(np.stack([d.places for d, _ in part for _ in d.image_steps])),
            "all_actions": np.concatenate([d.actions for d, _ in part]),  # of every step: for the statistics
            "all_states": np.concatenate([d.state for d, _ in part]),
        }

    return tensors(rows["train"]), tensors(rows["val"]) if rows["val"] else None, instructions


def statistics(x: np.ndarray) -> dict:
    """Per dimension: mean, std, and the 1 % and 99 % quantiles, which published policies normalise to [-1,
    1].

    The quantiles are kept 0.02 apart, so that what hardly varies (a rotation that no demonstration uses) is
    not blown up.
    """
    q01, q99 = np.quantile(x, (0.01, 0.99), axis=0)
    spare = np.maximum(0.0, 0.01 - (q99 - q01) / 2)
    q01, q99 = q01 - spare, q99 + spare
    return {
        "mean": x.mean(0).tolist(),
        "std": x.std(0).tolist(),
        "q01": q01.tolist(),
        "q99": q99.tolist(),
        "min": x.min(0).tolist(),
        "max": x.max(0).tolist(),
    }


def rows_of_step(cfg: Config, step: int, data: dict) -> torch.Tensor:
    """The rows (batch_size,) of a training step: first some of all frames, then the early ones."""
    n = round(cfg.early * cfg.batch_size)
    early = (data["step"] <= 16).nonzero()[:, 0]  # five frames, where every fourth step has one
    parts = [("sft", cfg.batch_size - n, torch.arange(len(data["step"]))), ("sft early", n, early)]
    return torch.cat(
        [rows[common.shuffled(cfg.seed, name, step, k, len(rows))] for name, k, rows in parts if k]
    )


def batch_of(data: dict, index: torch.Tensor, blank: bool = False) -> tuple[dict, torch.Tensor]:
    """Observations, with black images if `blank`, and their chunks (B, H, 7) in environment units."""
    obs = {key: common.select(data[key], index) for key in (*common.CAMERAS, "state", "instruction")}
    return common.blank_images(obs) if blank else obs, data["chunk"][index]


# --------------------------------------------------------------------------------------------------- training
def make_policy(cfg: Config) -> tuple:
    """The policy to be trained, the training data and the validation data.

    The policy is that of `init_from`; or it starts from scratch, with these demonstrations' statistics and
    words.
    """
    if cfg.init_from:
        policy = backbones.load_policy(
            cfg.init_from, model=cfg.model, suites=cfg.suites, backbone=cfg.backbone
        )
        train, val, instructions = load_data(cfg, policy.horizon)
        policy.check_words(instructions)
    else:
        train, val, instructions = load_data(cfg, backbones.horizon(cfg.backbone, cfg.model))
        with torch.random.fork_rng():
            torch.manual_seed(cfg.seed)
            policy = backbones.build(cfg.backbone, cfg.model, instructions)
        policy.norm_stats = {
            "action": statistics(train["all_actions"]),
            "state": statistics(train["all_states"]),
        }
    policy.cast(cfg.dtype).to(ranks.place(cfg.device)).train()
    policy.recompute = cfg.recompute
    if cfg.train != "full":
        common.attach_adapter(policy, cfg.train, cfg.rank, cfg.alpha, policy.adapter_targets, cfg.seed)
    return policy, train, val


def merged(policy):
    """The policy as plain weights: a copy with its adapter merged in, or, without an adapter, itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not any(isinstance(module, BaseTunerLayer) for module in policy.modules()):
        return policy
    policy = copy.deepcopy(policy)
    for name, module in list(policy.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            policy.set_submodule(name, module.get_base_layer())
    return policy


@torch.no_grad()
def update_average(averaged, policy, decay: float, step: int) -> None:
    """averaged <- decay * averaged + (1 - decay) * policy. Early on the average follows closely."""
    decay = min(decay, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(averaged.parameters()), list(policy.parameters()), 1 - decay)


@torch.no_grad()
def validation_loss(policy, data: dict, cfg: Config) -> float:
    """Mean loss over held-out demonstrations (at most 256 observations) with the same draws every time."""
    policy.eval()
    n = len(data["chunk"])
    losses, sizes = [], []
    for index in torch.arange(n)[:: max(1, -(-n // 256))].split(64):
        obs, actions = batch_of(data, index, cfg.blank_images)
        draws = policy.draws(len(index), cfg.draws, common.stream(0, "validation", len(losses)), "beta")
        losses.append(policy.sft_loss(policy.encode(obs), policy.normalise(actions), draws).item())
        sizes.append(len(index))
    return float(np.average(losses, weights=sizes))


@torch.no_grad()
def right_place(policy, data: dict, cfg: Config) -> dict:
    """Share of chunks, four for each first look of the demonstrations held out, that head for the target's
    place in this layout and not for that in the other. Over both layouts, a blind policy gets one half. Empty
    where no target moves.
    """
    first = ((data["step"] == 0) & data["places"].isfinite().all(-1).all(-1)).nonzero()[:, 0]
    right = []
    for rows in first.repeat_interleave(4).split(64) if len(first) else ():
        obs, _ = batch_of(data, rows, cfg.blank_images)
        noise = policy.noise(len(rows), common.stream(0, "first look", len(right)))
        chunk = policy.sample_actions(policy.encode(obs), noise).cpu()
        actions = policy.unnormalise(chunk)[:, : common.EXECUTE]
        right.append(backbones.heads_for_first(actions, obs["state"][:, :3], data["places"][rows]))
    return {"right_place": torch.cat(right).float().mean().item()} if right else {}


def main(cfg: Config, run: stage.Run) -> dict:
    policy, train, val = make_policy(cfg)
    averaged = copy.deepcopy(policy)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

    # 0, or the last checkpoint's step
    first = run.resume(policy=policy, averaged=averaged, optimizer=optimizer)
    for step in run.steps(first, cfg.last):
        # 1. a batch, its images shifted at random, and draws (t, eps) for each observation
        g = common.stream(cfg.seed, "sft", step)
        obs, actions = batch_of(train, rows_of_step(cfg, step, train), cfg.blank_images)
        for camera in common.CAMERAS:
            obs[camera] = common.random_shift(obs[camera], common.SHIFT, g)
        chunk = policy.normalise(actions)  # (B, H, 7)
        draws = policy.draws(len(chunk), cfg.draws, g, "beta")
        obs, chunk, draws = common.own_rows(cfg.batch_size, obs, chunk, draws)

        # 2. the loss: the error of the velocity, or of the next token, averaged over draws and actions
        loss = policy.sft_loss(policy.encode(obs), chunk, draws)
        run.check(loss, step)

        # 3. one step of the optimiser, and of the average that will be saved
        loss.backward()
        run.average_gradients(parameters)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        run.check(grad_norm, step, "gradient")
        lr = run.set_learning_rate(optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
        update_average(averaged, policy, cfg.ema, step)

        # 4. the log, and the snapshots
        if run.logs(step):
            row = {"loss": loss.item(), "grad_norm": grad_norm.item(), "lr": lr}
            if val and ((step + 1) % (4 * cfg.log_every) == 0 or step + 1 == cfg.last):
                saved = merged(averaged)
                row |= {"val_loss": validation_loss(saved, val, cfg)} | right_place(saved, val, cfg)
            run.log(step, **row)
        if step + 1 in cfg.snapshots:
            run.save(f"model-{step + 1}.safetensors", merged(averaged).state_dict())

    if run.first:
        merged(averaged).save(run.dir)
    return {"parameters": sum(p.numel() for p in policy.parameters()), "observations": len(train["chunk"])}


if __name__ == "__main__":
    stage.start(main, Config, preview=backbones.preview)
