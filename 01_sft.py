"""01 - Supervised fine-tuning of a backbone on demonstrations (the paper's starting point; it takes published checkpoints).

reads   <run>/data/<suite>/task_NN.hdf5 (00)
writes  <run>/<backbone>/seed<k>/sft/: model.safetensors config.json norm_stats.json tokenizer.json, the snapshots
        model-<step>.safetensors, metrics.jsonl, done.json
cost    configs/tiny.yaml: see README; stops and goes on at any moment, the result is the same bit for bit
try     python 01_sft.py configs/tiny.yaml sft.steps=200 sft.lr=5e-4

The loss is flow matching (or next-token cross-entropy: the backbone's own `sft_loss`). An observation is encoded once and
scored with several draws of (t, eps): on a small model the encoder is the dear part.
With torchrun, each process takes its rows of every batch (ranks.py).
`head_coef` adds stage 06's multi-view loss: through the vision tower and a head of that stage, a frame's two views must find each
other in the batch. A loss and no further input, so the policy, its checkpoint and its cost at work stay what they are. The head
is frozen, so that with and without differ in nothing but this term (same weights trained, same optimiser, same draws), and so
that the term cannot be met by the head in the tower's stead. Its temporal half is left out: it needs a second frame in every row.
Left out: mixed precision, streaming of data that does not fit into memory.
Differs from the paper: it publishes no SFT stage. Here `train: full` learns everything, from scratch or from `init_from`;
`train: lora | dora` trains an adapter and merges it, so that the reference policy of stage 03 is one set of weights.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field

import numpy as np
import torch

import backbones
import common
import contrastive
import disk
import memory
import ranks
import runs


@dataclass
class Config(common.RunConfig):
    train: str = "full"  # "full", or an adapter: "lora" | "dora"
    steps: int = 3000
    batch_size: int = 32  # observations
    draws: int = 4  # (t, eps) draws per encoded observation
    lr: float = 1e-3  # peak; cosine to 1 % of it
    warmup: int = 100
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema: float = 0.998  # decay of the averaged weights, which are the ones saved; 0 = none
    shift: int = 4  # random shift of the images, pixels
    holdout: int = 2  # the last so many init states of the demonstrations give the validation loss only
    rank: int = 32  # of the adapter
    alpha: int = 64
    head_coef: float = 0.0  # weight of stage 06's multi-view loss on the vision tower; 0 = none
    init_head: str = ""  # the head that it goes through: runs/<config>/<backbone>/seed<k>/head/heads/<name>.safetensors
    head_temperature: float = 0.07  # as the head was trained with
    snapshots: list[int] = field(default_factory=list)  # steps whose averaged weights are kept (learning curve, early start)
    log_every: int = 50
    checkpoint_every: int = 200
    recompute: bool = False  # keep no activations of the layers, compute them again: less memory, a third more time
    threads: int = 1  # torch threads; part of the result's last bits. For a tiny model a second one gains little

    def __post_init__(self):
        super().__post_init__()
        common.at_least(self, steps=1, batch_size=1, draws=1, lr=0, warmup=0, shift=0, holdout=0, rank=1, ema=0)
        common.at_least(self, log_every=1, checkpoint_every=1, threads=1)
        common.one_of("sft.train", self.train, ("full", "lora", "dora"))
        if self.train == "full" and self.dtype != "float32":
            raise common.UserError(f"sft.train=full needs dtype=float32, not {self.dtype}: AdamW's small steps get lost in it")
        common.divisible("sft.batch_size", self.batch_size)
        common.at_least(self, head_coef=0, grad_clip=1e-9, alpha=1, head_temperature=1e-6)
        common.at_most(self, ema=1)
        if (self.head_coef > 0) != bool(self.init_head) or (self.head_coef and (self.train != "full" or self.blank_images)):
            raise common.UserError("sft.head_coef > 0 and sft.init_head go together, with train=full and without blank_images")


# ------------------------------------------------------------------------------------------------------------------ data
def future_chunks(actions: np.ndarray, steps: np.ndarray, horizon: int) -> np.ndarray:
    """The `horizon` actions from each of `steps` on, (N, H, 7). Past the end: stand still, gripper as it was."""
    still = np.zeros((horizon, 7), actions.dtype)
    still[:, 6] = actions[-1, 6]
    padded = np.concatenate([actions, still])  # (T + H, 7)
    return padded[steps[:, None] + np.arange(horizon)]


def load_data(cfg: Config, horizon: int) -> tuple[dict, dict | None, list[str]]:
    """Training and validation observations (if any are held out) with their chunks, and the instructions of all tasks."""
    rows = {"train": [], "val": []}
    for _, held, demo in common.demonstrations(cfg, cfg.holdout):
        rows["val" if held else "train"].append((demo, future_chunks(demo.actions, demo.image_steps, horizon)))
    instructions = sorted({demo.instruction for part in rows.values() for demo, _ in part})

    def tensors(part: list) -> dict:
        return {
            "agentview": torch.from_numpy(np.concatenate([d.agentview for d, _ in part])),  # (N, S, S, 3) uint8
            "wrist": torch.from_numpy(np.concatenate([d.wrist for d, _ in part])),
            "state": torch.from_numpy(np.concatenate([d.state[d.image_steps] for d, _ in part])),  # (N, 8)
            "chunk": torch.from_numpy(np.concatenate([c for _, c in part])),  # (N, H, 7) env units
            "instruction": [d.instruction for d, _ in part for _ in d.image_steps],
            "all_actions": np.concatenate([d.actions for d, _ in part]),  # every step: for the statistics
            "all_states": np.concatenate([d.state for d, _ in part]),
        }

    return tensors(rows["train"]), tensors(rows["val"]) if rows["val"] else None, instructions


def statistics(x: np.ndarray) -> dict:
    """Per dimension: mean, std, and the 1 % and 99 % quantiles between which published policies normalise to [-1, 1].

    The quantiles are kept 0.02 apart: what hardly varies (a rotation that no demonstration uses) must not be blown up.
    """
    q01, q99 = np.quantile(x, (0.01, 0.99), axis=0)
    spare = np.maximum(0.0, 0.01 - (q99 - q01) / 2)
    q01, q99 = q01 - spare, q99 + spare
    named = {"mean": x.mean(0), "std": x.std(0), "q01": q01, "q99": q99, "min": x.min(0), "max": x.max(0)}
    return {key: [float(v) for v in value] for key, value in named.items()}


def batch_of(data: dict, index: torch.Tensor) -> tuple[dict, torch.Tensor]:
    obs = {key: data[key][index] for key in ("agentview", "wrist", "state")}
    obs["instruction"] = [data["instruction"][i] for i in index.tolist()]
    return obs, data["chunk"][index]


# -------------------------------------------------------------------------------------------------------------- training
def make_policy(cfg: Config, policy, train: dict, instructions: list[str]):
    """The policy to be trained: the given one, or (None) from scratch on these demonstrations' statistics and words."""
    if policy is None:
        with torch.random.fork_rng():
            torch.manual_seed(cfg.seed)
            policy = backbones.build(cfg.backbone, cfg.model, instructions)
        policy.norm_stats = {"action": statistics(train["all_actions"]), "state": statistics(train["all_states"])}
    policy.cast(cfg.dtype).to(ranks.place(cfg.device)).train()
    policy.recompute = cfg.recompute
    if cfg.train != "full":
        common.attach_adapter(policy, cfg.train, cfg.rank, cfg.alpha, policy.adapter_targets, cfg.seed)
    return policy


def view_loss(policy, head, obs: dict, cfg: Config) -> torch.Tensor:
    """Stage 06's multi-view loss of a whole batch, whose rows are one another's negatives; the mean over this rank's rows."""
    agentview, wrist = (head(contrastive.pooled(policy, obs[camera])) for camera in ("agentview", "wrist"))
    return contrastive.info_nce(agentview, wrist, cfg.head_temperature, rows=ranks.share(torch.arange(len(wrist))))


@torch.no_grad()
def validation_loss(policy, data: dict, cfg: Config) -> float:
    """Mean loss over held-out demonstrations (at most 256 observations) with the same draws every time."""
    policy.eval()
    n = len(data["chunk"])
    losses, sizes = [], []
    for index in torch.arange(n)[:: max(1, -(-n // 256))].split(64):
        obs, actions = batch_of(data, index)
        chunk = policy.normalise(actions)
        draws = policy.draws(len(index), cfg.draws, common.stream(0, "validation", len(losses)), "beta")
        obs = common.blank_images(obs) if cfg.blank_images else obs
        losses.append(policy.sft_loss(policy.encode(obs), chunk, draws).item())
        sizes.append(len(index))
    return float(np.average(losses, weights=sizes))


def main(cfg: Config) -> None:
    if cfg.dry_run:
        return memory.report(cfg, "sft")
    runs.require(cfg.data_dir, "demos")
    inputs = [cfg.data_dir, *(p for path in (cfg.init_from, cfg.init_head) if path for p in runs.checkpoint_files(path))]
    horizon = 0 if cfg.init_from else backbones.horizon(cfg.backbone, cfg.model)
    shared = "suites tasks backbone model init_from seed blank_images device dtype"
    code = [*["backbones/published.py"] * bool(cfg.init_from), *["contrastive.py"] * (cfg.head_coef > 0)]
    code += [*["dora.py"] * (cfg.train == "dora"), *cfg.policy_code]
    stage = runs.open_stage(__file__, cfg, cfg.seed_dir / "sft", shared, inputs, code)
    if stage is None:
        return
    torch.set_num_threads(cfg.threads)
    policy = backbones.load_policy(cfg.init_from, model=cfg.model, suites=cfg.suites) if cfg.init_from else None
    if policy and policy.backbone != cfg.backbone:
        raise common.UserError(f"{cfg.init_from} is a checkpoint of {policy.backbone}; set backbone={policy.backbone}")
    train, val, instructions = load_data(cfg, policy.horizon if policy else horizon)
    policy = make_policy(cfg, policy, train, instructions)
    averaged = copy.deepcopy(policy)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    head = contrastive.load_head(cfg.init_head).to(ranks.place(cfg.device)) if cfg.init_head else None
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay)

    step, metrics = 0, stage.dir / "metrics.jsonl"
    state = disk.load_checkpoint(stage.dir / "checkpoint.pt")
    if state:
        policy.load_state_dict(state["policy"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    if ranks.first():
        disk.keep_rows(metrics, lambda row: row["step"] <= step, "step")

    # ---------------------------------------------------------------------------------------------- one loop, all in sight
    bar = common.progress(range(step, cfg.steps), initial=step, total=cfg.steps, desc="sft", unit="step")
    for step in bar:
        g = common.stream(cfg.seed, "sft", step)
        obs, actions = batch_of(train, common.shuffled(cfg.seed, "sft", step, cfg.batch_size, len(train["chunk"])))
        if cfg.blank_images:
            obs = common.blank_images(obs)
        for camera in ("agentview", "wrist"):
            obs[camera] = common.random_shift(obs[camera], cfg.shift, g)
        chunk = policy.normalise(actions)  # (B, H, 7)
        draws = policy.draws(len(chunk), cfg.draws, g, "beta")
        whole = obs
        obs, chunk, draws = common.own_rows(obs, chunk, draws)

        policy.train()
        loss = policy.sft_loss(policy.encode(obs), chunk, draws)
        said = {"loss": loss.item()}
        if head is not None:
            term = view_loss(policy, head, whole, cfg)
            loss, said = loss + cfg.head_coef * term, said | {"view_loss": term.item()}
        if not loss.isfinite():
            raise common.UserError(f"the loss is {loss.item()} at step {step}: lower sft.lr")
        loss.backward()
        ranks.average_gradients(parameters)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, cfg)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(cfg.ema, (step + 1) / (step + 10))  # early on, the average follows closely
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(policy.parameters()), 1 - decay)

        done, said = step + 1, ranks.mean(said)
        if not ranks.first():
            continue
        if done % cfg.log_every == 0 or done == cfg.steps:
            row = said | {"step": done, "grad_norm": grad_norm.item(), "lr": common.learning_rate(step, cfg)}
            if val and (done % (4 * cfg.log_every) == 0 or done == cfg.steps):
                row["val_loss"] = validation_loss(averaged, val, cfg)
            bar.set_postfix({key: f"{row[key]:.3f}" for key in ("loss", "val_loss") if key in row})
            disk.append_jsonl(metrics, row)
        if done in cfg.snapshots:
            disk.save_tensors(stage.dir / f"model-{done}.safetensors", merged(averaged, cfg).state_dict())
        if done % cfg.checkpoint_every == 0:
            modules = {"policy": policy, "averaged": averaged, "optimizer": optimizer}
            disk.save_checkpoint(
                stage.dir / "checkpoint.pt", {"step": done} | {key: m.state_dict() for key, m in modules.items()}
            )

    if not ranks.first():
        return
    merged(averaged, cfg).save(stage.dir)
    stage.finish(parameters=sum(p.numel() for p in policy.parameters()), observations=len(train["chunk"]))


def merged(policy, cfg: Config):
    """A copy of the policy as plain weights: an adapter, if any, is merged in."""
    return policy if cfg.train == "full" else common.merged_copy(policy)


if __name__ == "__main__":
    common.run(lambda: main(common.load_config(Config, "sft", sys.argv[1:])))
