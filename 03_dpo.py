"""03 - DPO with LoRA or DoRA on preference pairs, for either paradigm (paper sec. 3: the surrogate, the loss, the adapters).

reads   <run>/<backbone>/seed<k>/sft/ (01), .../prefs-<recipe>/ (02)
writes  <run>/<backbone>/seed<k>/dpo-<adapter>-<recipe>[-<surrogate>][-at<start>]/: adapter_model.safetensors
        adapter_config.json (peft's format), metrics.jsonl, done.json
cost    per step one pass of the language model each for policy and reference, and 4 x draws expert passes per pair; see README
        `surrogate: exact`: 2 x ode_steps passes with two derivatives each in place of `draws` (counted, not timed)
try     python 03_dpo.py configs/tiny.yaml adapter=dora dpo.beta=auto
        python 03_dpo.py configs/tiny.yaml surrogate=exact

The loss is that of Rafailov et al. (arXiv 2305.18290, Eq. 7) on four log-probabilities. Autoregressive backbones have them in
closed form; for flow matching the paper puts the surrogate in their place: the negative flow-matching error.
Differs from the paper's code: one set of draws (t, eps) per pair serves chosen, rejected, policy and reference (theirs draws
afresh in each of 16 forwards), the prefix is computed once per observation and what no adapter touches of it once for all
epochs, errors are summed over the chunk, dropout and augmentation are off, and the reference is the same weights with the
adapter switched off.
`surrogate:` names what takes the place of log p (common.SURROGATES). "exact" is the likelihood itself (likelihood.py), the trace
by Hutchinson's estimate with probes that the four terms share and that are fresh in every step: fixed ones, with reference
values computed beforehand, could be learned by heart, and the margin at policy = reference would not be exactly 0. "independent"
is what the paper's code does: every term has draws of its own with t ~ Beta(1.5, 1), and augmented images of its own. (The mean
over dimensions that it takes is only another scale of beta.)
With torchrun, each process takes its rows of every batch (ranks.py).
Left out: IPO and other losses, label smoothing, reward models.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common
import disk
import likelihood
import memory
import ranks
import runs


@dataclass
class Config(common.RunConfig):
    steps: int = 200
    batch_size: int = 8  # pairs
    draws: int = 4  # T: (t, eps) draws per pair; stratified, but for surrogate: independent
    weight: str = "velocity"  # w(t) of the surrogate: "velocity" (paper) | "noise" | "elbo"; surrogate: elbo has its own
    whole_chunk: bool = False  # score all H actions, not only those that were executed; "exact" always does: it has no marginals
    ode_steps: int = 10  # exact: midpoint steps from the chunk to the noise
    probes: int = 1  # exact: Hutchinson probes per pair
    shift: int = 4  # independent: random shift of the images, pixels, as in 01
    beta: str = "auto"  # a number, or "auto": 1 / std of log p_ref(chosen) - log p_ref(rejected) over the pairs
    sft_coef: float = 1.0  # weight of - beta log p(chosen), which keeps the chosen likelihood from falling; paper: 0
    lr: float = 5e-5  # peak; cosine to 1 % of it
    warmup: int = 20
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    rank: int = 32
    alpha: int = 64
    targets: str = ""  # regex of the adapted linear layers; empty = the backbone's q, k, v, o projections
    recompute: bool = False  # keep no activations of the layers, compute them again: less memory, a third more time
    log_every: int = 10
    checkpoint_every: int = 50
    threads: int = 1

    def __post_init__(self):
        super().__post_init__()
        common.at_least(self, steps=1, batch_size=1, draws=1, lr=0, warmup=0, rank=1, sft_coef=0, log_every=1, checkpoint_every=1)
        common.at_least(self, threads=1, ode_steps=1, probes=1, shift=0)
        if self.backbone == "openvla" and self.surrogate != "paper":
            raise common.UserError("openvla has log p in closed form: `surrogate` is for flow policies, leave it at 'paper'")
        if self.surrogate == "exact" and (self.adapter == "dora" or self.recompute):
            raise common.UserError("surrogate=exact takes second derivatives: adapter=lora (not dora), dpo.recompute=false")
        if self.surrogate == "antithetic" and self.draws % 2:
            raise common.UserError(f"dpo.draws={self.draws} must be even for surrogate=antithetic: noises come in pairs")
        common.time_weight(torch.zeros(1), self.weight)  # fails for an unknown one
        common.divisible("dpo.batch_size", self.batch_size)
        common.at_least(self, grad_clip=1e-9, alpha=1)
        common.regex("dpo.targets", self.targets)
        if self.beta != "auto" and not (re.fullmatch(r"[0-9]+\.?[0-9]*(e-?[0-9]+)?", self.beta) and 0 < float(self.beta) < 1e9):
            raise common.UserError(f'dpo.beta must be "auto" or a positive number, not {self.beta!r}')


# ------------------------------------------------------------------------------------------------------------ the method
def dpo_loss(pi_w, pi_l, ref_w, ref_l, beta: float) -> tuple[torch.Tensor, dict]:
    """DPO on the log-probabilities (B,) of chosen (w) and rejected (l) chunks under policy and reference.

    L = - log sigmoid( beta [ (log pi_w - log ref_w) - (log pi_l - log ref_l) ] ), arXiv 2305.18290 Eq. 7.
    """
    reward_w, reward_l = beta * (pi_w - ref_w), beta * (pi_l - ref_l)  # the implicit rewards
    margin = reward_w - reward_l
    loss = -F.logsigmoid(margin).mean()
    return loss, {"rewards/chosen": reward_w, "rewards/rejected": reward_l, "rewards/margins": margin}


def log_probs(policy, obs, chosen: torch.Tensor, rejected: torch.Tensor, mask: torch.Tensor, draws, weight: str):
    """log p of both chunks (B, H, 7) of each pair: the observation encoded once, chunks and draws in one batch. -> (B,), (B,).

    obs: B observations, or what policy.begin made of them.
    """
    b = len(chosen)
    prefix = policy.encode(obs).select(torch.arange(b).repeat(2))
    both = draws.repeat(2) if draws is not None else None  # common random numbers: the same (t, eps) for chosen and rejected
    scores = policy.log_prob(prefix, torch.cat([chosen, rejected]), both, mask.repeat(2, 1), weight)
    return scores[:b], scores[b:]


def independent_log_prob(policy, obs: dict, chunk: torch.Tensor, mask: torch.Tensor, generator: torch.Generator, cfg: Config):
    """Surrogate log p (B,) as the paper's code has it: nothing shared with any other term, images augmented."""
    obs = obs | {camera: common.random_shift(obs[camera], cfg.shift, generator) for camera in ("agentview", "wrist")}
    draws = policy.draws(len(chunk), cfg.draws, generator, "iid")
    return policy.log_prob(policy.encode(obs), chunk, draws, mask, cfg.weight)


def shared_noise(policy, n: int, cfg: Config, generator: torch.Generator):
    """What the four terms of the loss share, for n pairs: draws (t, eps), or the probes of the exact likelihood."""
    if cfg.surrogate == "exact":
        return likelihood.make_probes(n, cfg.probes, (policy.horizon, policy.cfg.flow_dim), generator)
    return policy.draws(n, cfg.draws, generator, common.SURROGATES[cfg.surrogate])


def score(policy, obs: dict, chosen, rejected, mask, noise, cfg: Config, *term: int | str):
    """log p of chosen and rejected as `surrogate` says. noise: what the terms share; term: names one where they share nothing."""
    if cfg.surrogate == "exact":
        return likelihood.pair_log_probs(policy, policy.encode(obs), chosen, rejected, noise, cfg.ode_steps)
    if cfg.surrogate == "independent":
        g = common.stream(cfg.seed, "dpo independent", *term, ranks.rank())
        return tuple(independent_log_prob(policy, obs, chunk, mask, g, cfg) for chunk in (chosen, rejected))
    weight = "logsnr" if cfg.surrogate == "elbo" else cfg.weight
    return log_probs(policy, obs, chosen, rejected, mask, noise, weight)


def begin_all(policy, pairs: dict, batch_size: int):
    """`policy.begin` of all pairs, None where nothing of the prefix stays as it is."""
    rows = torch.arange(len(pairs["mask"])).split(batch_size)
    parts = [policy.begin(batch_of(pairs, index)[0]) for index in rows]
    return None if isinstance(parts[0], dict) else type(parts[0]).cat(parts)


def auto_beta(policy, pairs: dict, cfg: Config) -> float:
    """1 / std of the reference's own log-ratio over (about 64 of) the pairs: with it the logits are on the scale where DPO's
    sigmoid bends. Known before training, as it needs the reference only."""
    n = len(pairs["mask"])
    if n < 2:
        raise common.UserError("dpo.beta=auto needs two pairs or more; give it a number")
    index = torch.arange(0, n, max(1, n // 64))
    noise, log_ratios = shared_noise(policy, len(index), cfg, common.stream(cfg.seed, "beta")), []
    with policy.reference():
        for rows in torch.arange(len(index)).split(cfg.batch_size):  # no more memory than a training step
            shared = noise.rows(rows) if isinstance(noise, common.Draws) else noise if noise is None else noise[rows]
            ref_w, ref_l = score(policy, *batch_of(pairs, index[rows]), shared, cfg, "beta", int(rows[0]))
            log_ratios.append(ref_w - ref_l)
    return 1.0 / max(torch.cat(log_ratios).std(correction=0).item(), 1e-6)


# ------------------------------------------------------------------------------------------------------------------ data
def load_pairs(cfg: Config) -> dict:
    pairs = common.read_pairs(cfg.source("prefs"))
    if cfg.blank_images:
        pairs = common.blank_images(pairs)
    if cfg.whole_chunk:
        pairs["mask"] = torch.ones_like(pairs["mask"])
    return pairs


def batch_of(pairs: dict, index: torch.Tensor):
    """Observations and chosen, rejected (B, H, 7) and mask (B, H) of the pairs of `index`."""
    obs = {key: pairs[key][index] for key in ("agentview", "wrist", "state")}
    obs["instruction"] = [pairs["instruction"][i] for i in index.tolist()]
    return obs, pairs["chosen"][index], pairs["rejected"][index], pairs["mask"][index]


# -------------------------------------------------------------------------------------------------------------- training
def main(cfg: Config) -> None:
    if cfg.dry_run:
        memory.report(cfg, "dpo")
        if cfg.surrogate == "exact":
            print(f"not counted: surrogate=exact keeps {2 * cfg.ode_steps} such passes of the expert and their derivatives")
        return
    inputs = [*common.sft_inputs(cfg), *common.given_or_made(cfg, "prefs")]
    shared = f"suites backbone seed blank_images pairs adapter surrogate {common.SFT_KEYS}"
    code = ["dora.py", "likelihood.py", *cfg.policy_code]
    stage = runs.open_stage(__file__, cfg, cfg.variant("dpo"), shared, inputs, code)
    if stage is None:
        return
    torch.set_num_threads(cfg.threads)
    pairs = load_pairs(cfg)
    policy = common.load_sft(cfg)  # eval mode throughout: no dropout in any log-probability
    common.check_pairs(pairs, policy)
    adapted = common.attach_adapter(policy, cfg.adapter, cfg.rank, cfg.alpha, cfg.targets or policy.adapter_targets, cfg.seed)
    policy.recompute = cfg.recompute
    trainable = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    beta = float(ranks.told(repr(auto_beta(policy, pairs, cfg)))) if cfg.beta == "auto" else float(cfg.beta)
    n, k = len(pairs["mask"]), sum(p.numel() for p in trainable.values())
    print(f"[03_dpo] {n} pairs, {cfg.adapter} with {k:,} parameters, beta {beta:.4g}", flush=True)
    optimizer = torch.optim.AdamW(trainable.values(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    # what no adapter touches, once for all epochs, unless images are augmented
    begun = None if cfg.surrogate == "independent" else begin_all(policy, pairs, cfg.batch_size)

    step, metrics = 0, stage.dir / "metrics.jsonl"
    state = disk.load_checkpoint(stage.dir / "checkpoint.pt")
    if state:
        policy.load_state_dict(state["adapter"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    if ranks.first():
        disk.keep_rows(metrics, lambda row: row["step"] <= step, "step")

    bar = common.progress(range(step, cfg.steps), initial=step, total=cfg.steps, desc=f"dpo {cfg.adapter}", unit="step")
    for step in bar:
        index = common.shuffled(cfg.seed, "dpo", step, cfg.batch_size, n)
        noise = shared_noise(policy, len(index), cfg, common.stream(cfg.seed, "dpo", step))
        index, noise = common.own_rows(index, noise)
        obs, chosen, rejected, mask = batch_of(pairs, index)
        obs = obs if begun is None else begun.select(index.to(begun.valid.device))
        with policy.reference():  # the same weights, adapter off, no gradients
            ref_w, ref_l = score(policy, obs, chosen, rejected, mask, noise, cfg, step, "reference")
        pi_w, pi_l = score(policy, obs, chosen, rejected, mask, noise, cfg, step, "policy")
        loss, rewards = dpo_loss(pi_w, pi_l, ref_w, ref_l, beta)
        total = loss - cfg.sft_coef * beta * pi_w.mean()  # the anchor, in units of the reward
        if not total.isfinite():
            raise common.UserError(f"the loss is {total.item()} at step {step}: lower dpo.lr")
        total.backward()
        ranks.average_gradients(trainable.values())
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable.values(), cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, cfg)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        if step == 0 or done % cfg.log_every == 0 or done == cfg.steps:
            row = {key: value.mean().item() for key, value in rewards.items()} | {"loss": loss.item()}
            row |= {"rewards/accuracies": (rewards["rewards/margins"] > 0).float().mean().item()}
            row |= {"rewards/margin_std": rewards["rewards/margins"].std(correction=0).item()}
            row |= {"logps/chosen": pi_w.mean().item(), "logps/rejected": pi_l.mean().item()}
            row = ranks.mean(row) | {"step": done, "grad_norm": grad_norm.item(), "lr": common.learning_rate(step, cfg)}
            if ranks.first():
                disk.append_jsonl(metrics, row)
            bar.set_postfix(loss=f"{row['loss']:.3f}", margin=f"{row['rewards/margins']:.2f}")
        if done % cfg.checkpoint_every == 0 and ranks.first():
            state = {"step": done, "adapter": trainable, "optimizer": optimizer.state_dict()}
            disk.save_checkpoint(stage.dir / "checkpoint.pt", state)

    if not ranks.first():
        return
    warn_about_scale(disk.read_jsonl(metrics))
    with disk.writing(stage.dir):
        adapted.save_pretrained(str(stage.dir))
    (stage.dir / "README.md").unlink(missing_ok=True)  # peft's empty model card
    stage.finish(beta=beta, trainable=k, pairs=n)


def warn_about_scale(rows: list[dict]) -> None:
    """DPO learns where its logit is of order 1. Far below, sigmoid is a constant and the reference drops out of the gradient."""
    late = max(abs(row["rewards/margins"]) + row["rewards/margin_std"] for row in rows[len(rows) // 2 :])
    if late < 0.05:
        print(f"[03_dpo] warning: logits stayed below 0.05 (largest {late:.3g}): raise beta or use beta=auto", flush=True)
    if late > 20:
        print(f"[03_dpo] warning: logits saturated (largest {late:.3g}): lower beta, lr or steps", flush=True)


if __name__ == "__main__":
    common.run(lambda: main(common.load_config(Config, "dpo", sys.argv[1:])))
