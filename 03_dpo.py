"""03 - DPO with LoRA or DoRA on preference pairs, for either paradigm (the paper's section 3).

reads   <run>/<backbone>/seed<k>/sft/ (01), .../prefs-<pairs>[-at<start>]/ (02)
writes  <run>/<backbone>/seed<k>/dpo-<adapter>-<pairs>[-<surrogate>][-at<start>]/: adapter_model.safetensors
        adapter_config.json (peft's format), metrics.jsonl, done.json
cost    per step two passes of the language model (policy, reference), and 4 x draws passes of the action
        network per pair; configs/tiny.yaml: half a minute.
        surrogate=exact: 8 x ode_steps passes per pair (2 a step, for 4 scores), with two derivatives each
try     python 03_dpo.py configs/try.yaml name=beta dpo.beta=0.1

The loss is that of Rafailov et al. (arXiv 2305.18290, Eq. 7) on four log-probabilities. Autoregressive
backbones have them in closed form. For flow matching the paper puts a surrogate in their place: the negative
flow-matching error.

`surrogate:` names what takes the place of log p (common.SURROGATES). "exact" is the likelihood itself
(backbones/likelihood.py), its trace by random probe vectors (Hutchinson). The four terms share them, and
every step has fresh ones: fixed ones could be learned by heart. "independent" is what the paper's code does:
each term draws its own (t, eps), with t ~ Beta(1.5, 1), and augments its own images. The paper's code also
takes the mean over all of a chunk's numbers. This option sums those of the executed actions; with
whole_chunk=true only the scale of beta differs.

Differs from the paper's code: one set of draws (t, eps) per pair serves chosen, rejected, policy and
reference (theirs draws afresh in each of 16 forwards: 4 scores x 4 draws). Errors are summed over the
executed actions. Dropout and augmentation are off. The prefix is computed once per observation. The part of
it that no adapter touches is computed once for all epochs. The reference is the same weights with the adapter
switched off. A second term, the anchor, may keep chosen chunks likely; it is sft_coef * beta times
-log p(chosen). The paper has none. The logged `loss` leaves it out.
Left out: losses that are not of the margin alone (extras/losses.py has some), label smoothing, reward models.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

import backbones
import common
from runtime import Count, as_number, disk, ranks, refuse, stage, warn


@dataclass
class Config(common.AdapterConfig):
    section: ClassVar = "dpo"
    by_torchrun: ClassVar = True
    steps: Count = 200
    batch_size: Count = 8  # pairs
    draws: Count = 4  # T: (t, eps) draws per pair
    whole_chunk: bool = False  # score all H actions, not only those that were executed; "exact" always does
    ode_steps: Count = 10  # exact: midpoint steps from the chunk to the noise
    beta: str = "auto"  # a number, or "auto": 1 / std of log p_ref(chosen) - log p_ref(rejected)
    loss: Literal["dpo", "ipo", "hinge"] = "dpo"  # of the margin, see dpo_loss; the paper's is dpo
    contrast: float = 1.0  # weight of this loss; 0 = train on the anchor only
    sft_coef: float = 1.0  # of the anchor, - sft_coef * beta * log p(chosen); the paper 0, tiny.yaml 2
    lr: float = 5e-5  # peak; cosine to 1 % of it
    warmup: int = 20
    rank: Count = 32
    alpha: Count = 64
    recompute: bool = False  # compute the layers' activations again, not keep them: less memory, more time
    log_every: Count = 10
    checkpoint_every: Count = 50

    folder = property(lambda self: self.made_adapter)

    def __post_init__(self):
        super().__post_init__()
        refuse(
            self.backbone == "openvla" and self.surrogate != "paper",
            "openvla has log p in closed form: leave `surrogate` at paper",
        )
        refuse(
            self.surrogate == "exact" and (self.adapter == "dora" or self.recompute),
            "surrogate=exact takes second derivatives: use adapter=lora and dpo.recompute=false",
        )
        refuse(
            self.surrogate == "mirrored" and self.draws % 2,
            f"dpo.draws={self.draws} must be even for surrogate=mirrored: noises come in pairs",
        )
        refuse(
            not (self.contrast or self.sft_coef),
            "dpo.contrast=0 and dpo.sft_coef=0 leave nothing to train on: set one of them",
        )
        refuse(
            self.beta != "auto" and not 0 < (as_number(self.beta, float) or 0) < 1e9,
            f'dpo.beta must be "auto" or a positive number, not {self.beta!r}',
        )

    def inputs(self) -> list[Path]:
        return [*self.sft_inputs(), *self.pairs_inputs()]


# ------------------------------------------------------------------------------------------------- the method
def dpo_loss(pi_w, pi_l, ref_w, ref_l, beta: float, kind: str = "dpo") -> tuple[torch.Tensor, dict]:
    """DPO on the log-probabilities (B,) of chosen (w) and rejected (l) chunks under policy and reference.

    L = - log sigmoid( beta [ (log pi_w - log ref_w) - (log pi_l - log ref_l) ] ), arXiv 2305.18290 Eq. 7.
    kind: "dpo", or another loss of this margin.
    """
    reward_w, reward_l = beta * (pi_w - ref_w), beta * (pi_l - ref_l)  # the implicit rewards
    margin = reward_w - reward_l
    loss = -F.logsigmoid(margin)
    if kind == "ipo":  # arXiv 2310.12036 Eq. 17, times beta^2
        loss = (margin - 0.5).square()
    if kind == "hinge":  # arXiv 2309.06657, "hinge-norm"
        loss = F.relu(1 - margin)
    return loss.mean(), {"rewards/chosen": reward_w, "rewards/rejected": reward_l, "rewards/margins": margin}


def log_probs(
    policy, obs, chosen: torch.Tensor, rejected: torch.Tensor, mask: torch.Tensor, draws, weight: str
):
    """log p (B,), (B,) of both chunks (B, H, 7) of each pair: one encoding of the observation, one batch.

    obs: B observations, or what policy.begin made of them.  mask (B, H): the actions that count.
    A flow policy's log_prob is common.surrogate_log_prob of its errors (backbones/pi05.py).
    """
    b = len(chosen)
    prefix = policy.encode(obs).select(torch.arange(b).repeat(2))
    both = draws.repeat(2) if draws is not None else None  # chosen and rejected share (t, eps)
    scores = policy.log_prob(prefix, torch.cat([chosen, rejected]), both, mask.repeat(2, 1), weight)
    return scores[:b], scores[b:]


def independent_log_probs(policy, cfg: Config, obs: dict, chosen, rejected, mask, term: tuple):
    """The surrogate as the paper's code has it: each chunk of each term with images and draws of its own."""
    g = common.stream(cfg.seed, "dpo independent", *term, ranks.rank())
    scores = []
    for chunk in (chosen, rejected):
        shifted = {camera: common.random_shift(obs[camera], common.SHIFT, g) for camera in common.CAMERAS}
        own = policy.draws(len(chunk), cfg.draws, g, "iid")
        scores.append(policy.log_prob(policy.encode(obs | shifted), chunk, own, mask))
    return tuple(scores)


def draw(policy, cfg: Config, n: int, generator: torch.Generator):
    """The randomness that the four scores of n pairs share: draws (t, eps), or probes of the exact trace."""
    if cfg.surrogate == "exact":
        from backbones import likelihood

        return likelihood.make_probes(n, 1, (policy.horizon, policy.cfg.flow_dim), generator)
    return policy.draws(n, cfg.draws, generator, common.SURROGATES[cfg.surrogate])


def score(policy, cfg: Config, obs, chosen, rejected, mask, draws, term: tuple):
    """log p, or what `surrogate` puts in its place, of chosen and rejected: (B,), (B,).

    term: which score of which step, e.g. (step, "policy"); it seeds the draws of surrogate=independent.
    """
    if cfg.surrogate == "exact":
        from backbones import likelihood

        prefix = policy.encode(obs)
        return likelihood.pair_log_probs(policy, prefix, chosen, rejected, draws, cfg.ode_steps)
    if cfg.surrogate == "independent":
        return independent_log_probs(policy, cfg, obs, chosen, rejected, mask, term)
    weight = "logsnr" if cfg.surrogate == "elbo" else "velocity"
    return log_probs(policy, obs, chosen, rejected, mask, draws, weight)


# ------------------------------------------------------------------------------------------------------- data
def load_pairs(cfg: Config, policy) -> tuple[dict, dict]:
    """The pairs to train on, and those of every `held_out`-th attempt: their tensors, and `obs`."""
    pairs = common.read_pairs(cfg.pairs_dir, policy)
    if cfg.whole_chunk:
        pairs["mask"] = torch.ones_like(pairs["mask"])
    obs = {key: pairs.pop(key) for key in (*common.CAMERAS, "state", "instruction")}
    pairs["obs"] = common.blank_images(obs) if cfg.blank_images else obs
    held = pairs["attempt"] % cfg.held_out == 0 if cfg.held_out else pairs["attempt"] < 0  # (N,)
    refuse(bool(held.all()), f"held_out={cfg.held_out} leaves no pair to train on")
    return tuple(common.select(pairs, part.nonzero()[:, 0]) for part in (~held, held))


def batch_of(pairs: dict, index: torch.Tensor) -> tuple:
    """Observations, chosen and rejected chunks (B, H, 7), and mask (B, H) of the pairs of `index`."""
    return tuple(common.select(pairs[key], index) for key in ("obs", "chosen", "rejected", "mask"))


def choose_beta(policy, pairs: dict, cfg: Config) -> float:
    """dpo.beta. "auto" is 1 / std of log p_ref(chosen) - log p_ref(rejected), known before training.

    It scales the margins to order 1, where DPO's sigmoid is neither flat nor saturated. A number five orders
    of magnitude off is refused, unless dpo.contrast=0. 64 to 127 evenly spread pairs count (all if fewer).
    """
    n, given = len(pairs["mask"]), as_number(cfg.beta, float)
    refuse(n < 2 and not given, "dpo.beta=auto needs two pairs or more; give it a number")
    if given and (n < 2 or not cfg.contrast):
        return given
    index = torch.arange(0, n, max(1, n // 64))
    draws, differences = draw(policy, cfg, len(index), common.stream(cfg.seed, "beta")), []
    with policy.reference():
        for rows in torch.arange(len(index)).split(cfg.batch_size):  # no more memory than a training step
            batch, own = batch_of(pairs, index[rows]), common.select(draws, rows)
            ref_w, ref_l = score(policy, cfg, *batch, own, ("beta", int(rows[0])))
            differences.append(ref_w - ref_l)
    spread = torch.cat(differences).std(correction=0).item()
    why = f"log p_ref(chosen) - log p_ref(rejected) has a standard deviation of {spread:.3g} over the pairs"
    refuse(not 1e-5 < spread < 1e9, f"{why}; look at the weights, statistics and pairs")
    beta = given or 1.0 / spread
    refuse(not 1e-5 < beta * spread < 1e5, f"{why}, too far from dpo.beta={beta:.3g}: take dpo.beta=auto")
    return beta


@torch.no_grad()
def delivered(policy, pairs: dict, size: int) -> dict:
    """What training moved on pairs that it never saw: log-ratio of chosen minus that of rejected, in nats.

    A log-ratio is log p of the policy minus log p of the reference: the lower bound (64 draws, shared) of a
    flow policy, the exact value of an autoregressive one. `size` pairs are scored at a time.
    """
    n, moved = len(pairs["mask"]), []
    draws = policy.draws(n, 64, common.stream(0, "held out"), "logsnr")
    for rows in torch.arange(n).split(size):
        scored = *batch_of(pairs, rows), common.select(draws, rows), "logsnr"
        with policy.reference():
            ref_w, ref_l = log_probs(policy, *scored)
        pi_w, pi_l = log_probs(policy, *scored)
        moved.append((pi_w - ref_w) - (pi_l - ref_l))
    moved = torch.cat(moved)
    return {"nats": moved.mean().item(), "std": moved.std(correction=0).item(), "pairs": n}


# --------------------------------------------------------------------------------------------------- training
def main(cfg: Config, run: stage.Run) -> dict:
    policy = backbones.load_sft(cfg)  # in evaluation mode throughout: no dropout in any log-probability
    pairs, held = load_pairs(cfg, policy)
    adapted = common.attach_adapter(
        policy, cfg.adapter, cfg.rank, cfg.alpha, policy.adapter_targets, cfg.seed
    )
    policy.recompute = cfg.recompute
    trained = torch.nn.ParameterList(p for p in policy.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=0.0)
    beta = ranks.told(choose_beta(policy, pairs, cfg))
    n, k = len(pairs["mask"]), sum(p.numel() for p in trained)
    if run.first:
        print(f"[03_dpo] {n} pairs, {cfg.adapter} with {k:,} parameters, beta {beta:.4g}", flush=True)
    if cfg.surrogate != "independent":  # which augments the images at every step
        pairs["obs"] = policy.begin(pairs["obs"], cfg.batch_size)

    first = run.resume(adapter=trained, optimizer=optimizer)  # 0, or the last checkpoint's step
    for step in run.steps(first, cfg.steps):
        # 1. a batch of pairs, and the draws (t, eps) that the four log-probabilities share
        index = common.shuffled(cfg.seed, "dpo", step, cfg.batch_size, n)
        draws = draw(policy, cfg, cfg.batch_size, common.stream(cfg.seed, "dpo", step))
        index, draws = common.own_rows(cfg.batch_size, index, draws)
        obs, chosen, rejected, mask = batch_of(pairs, index)

        # 2. log p under the reference (the same weights, adapter off, no gradients) and under the policy
        with policy.reference():
            ref_w, ref_l = score(policy, cfg, obs, chosen, rejected, mask, draws, (step, "reference"))
        pi_w, pi_l = score(policy, cfg, obs, chosen, rejected, mask, draws, (step, "policy"))

        # 3. DPO's contrast, and an anchor that keeps chosen chunks likely (the paper: sft_coef = 0)
        loss, rewards = dpo_loss(pi_w, pi_l, ref_w, ref_l, beta, cfg.loss)
        total = cfg.contrast * loss - cfg.sft_coef * beta * pi_w.mean()
        run.check(total, step)

        # 4. one step of the optimiser, and the log
        total.backward()
        run.average_gradients(trained)
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        run.check(grad_norm, step, "gradient")
        lr = run.set_learning_rate(optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0 or run.logs(step):
            run.log(step, **metrics(loss, rewards, pi_w, pi_l), grad_norm=grad_norm.item(), lr=lr)

    if run.first:
        warn_about_scale(disk.read_jsonl(run.dir / "metrics.jsonl"), cfg, beta)
        common.save_adapter(adapted, run.dir)
    measured = {"delivered": delivered(policy, held, cfg.batch_size)} if cfg.held_out else {}
    return {"beta": beta, "trainable": k, "pairs": n} | measured


def metrics(loss: torch.Tensor, rewards: dict, pi_w: torch.Tensor, pi_l: torch.Tensor) -> dict[str, float]:
    """A line of the log; docs/reading.md explains each number."""
    margins = rewards["rewards/margins"]
    mean = ranks.mean({"margin": margins.mean().item()})["margin"]  # over the pairs of all processes
    variance = ranks.mean({"margin": (margins - mean).square().mean().item()})["margin"]
    return {key: value.mean().item() for key, value in rewards.items()} | {
        "loss": loss.item(),
        "rewards/accuracies": (margins > 0).float().mean().item(),
        "rewards/margin_std": variance**0.5,
        "logps/chosen": pi_w.mean().item(),
        "logps/rejected": pi_l.mean().item(),
    }


def warn_about_scale(rows: list[dict], cfg: Config, beta: float) -> None:
    """Warn of what the second half of the log shows: chosen chunks unlearned, or margins far from order 1.

    Far below 1 the sigmoid is straight, and nothing holds the policy to its reference; far above it is flat.
    """
    rows = rows[len(rows) // 2 :]
    moved = sum(row["rewards/chosen"] for row in rows) / len(rows) / beta
    if moved < -1 and cfg.surrogate != "independent":  # whose scores of one chunk differ by their draws
        warn(f"chosen chunks' scores fell by {-moved:.3g}: lower dpo.lr, or raise dpo.sft_coef, the anchor")
    late = max(abs(row["rewards/margins"]) + row["rewards/margin_std"] for row in rows)
    if late < 0.05 and cfg.contrast:
        remedy = "raise dpo.steps or dpo.lr" if cfg.beta == "auto" else "take dpo.beta=auto"
        warn(f"margins stayed below 0.05 (largest {late:.3g}), too small to feel the reference: {remedy}")
    if late > 20 and cfg.contrast:
        other = "" if cfg.beta == "auto" else ", or take dpo.beta=auto"
        warn(f"margins saturated (largest {late:.3g}): lower dpo.lr or dpo.steps{other}")


if __name__ == "__main__":
    stage.start(main, Config, preview=backbones.preview)
