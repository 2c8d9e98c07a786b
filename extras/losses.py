"""Four losses that 03 leaves out, on the same pairs or on single play-outs, at 03's settings.

reads   as 03_dpo.py; for kto and nft the play-outs that 02 tried, successes and failures
writes  <run>/<backbone>/seed<k>/losses-<loss>[-at<start>]/<adapter>/: as 03
cost    as 03; kto and nft score one chunk where 03 scores two, kto each of them twice
try     python -m extras.losses configs/tiny.yaml dpo.loss=kto
        python 04_eval.py configs/tiny.yaml name=kto policy=dpo checkpoint=runs/tiny/pi05/seed42/sft \\
            adapters_from=runs/tiny/pi05/seed42/losses-kto-at750

A log-ratio r is log p of the policy minus log p of the reference, which is the same weights with the adapter
switched off. All losses keep 03's draws, beta, anchor (`dpo.sft_coef`) and schedule.

proximal  the contrast of DPO plus a term that keeps both rewards small, FlowPRO's idea (arXiv 2606.05468).
          Its equation was not at hand. This one is the square of the rewards, which is 0 at the start.
simpo     no reference: log p of chosen and rejected per number, with a target margin (arXiv 2405.14734).
kto       unpaired: a chunk's reward against the mean reward of chunks that answer other observations
          (arXiv 2402.01306). Both groups weigh the same, however many chunks each has.
nft       unpaired, for flow policies, without a likelihood: is the chunk nearer to the policy's velocity or
          to its mirror image at the reference's? (DiffusionNFT, arXiv 2509.16117; softplus as in RLinf).
Left out: ORPO (arXiv 2403.07691). Its odds p / (1 - p) need p < 1, and a density has no such bound.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import backbones
import common
from runtime import disk, refuse, stage

dpo = importlib.import_module("03_dpo")

PROXIMITY = 0.1  # weight of the squared rewards
TARGET = 0.5  # simpo: the margin that chosen and rejected shall reach


@dataclass
class Config(dpo.Config):
    by_torchrun: ClassVar = False
    loss: Literal["proximal", "simpo", "kto", "nft"] = "kto"

    folder = property(lambda self: self.seed_dir / self.variant("losses", self.loss) / self.adapter)

    def __post_init__(self):
        super().__post_init__()
        refuse(
            self.loss == "nft" and self.backbone != "pi05",
            f"nft compares velocities, which {self.backbone} does not have; take another dpo.loss",
        )
        refuse(
            self.loss == "nft" and self.surrogate == "elbo",
            "nft has the errors themselves, without weights; leave surrogate=elbo out",
        )
        refuse(
            self.surrogate in ("exact", "independent") or self.whole_chunk,
            "extras/losses.py shares draws and scores executed actions: surrogate=paper, mirrored or elbo,"
            " dpo.whole_chunk=false",
        )


# ------------------------------------------------------------------------------------------------- the losses
def proximal(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float) -> Tensor:
    """DPO, and the squared rewards of both chunks: log-probabilities (B,) -> scalar."""
    contrast, rewards = dpo.dpo_loss(pi_w, pi_l, ref_w, ref_l, beta)
    near = rewards["rewards/chosen"].square() + rewards["rewards/rejected"].square()
    return contrast + PROXIMITY * near.mean()


def simpo(pi_w: Tensor, pi_l: Tensor, numbers: Tensor, beta: float) -> Tensor:
    """- log sigmoid( beta [ log pi_w / |w| - log pi_l / |l| ] - gamma ), Eq. 6. numbers (B,): |w| = |l|.

    beta is that of sums, so it is multiplied by their mean length.
    """
    per_number = beta * numbers.mean() * (pi_w - pi_l) / numbers
    return -F.logsigmoid(per_number - TARGET).mean()


def kto(log_ratio: Tensor, other: Tensor, won: Tensor, beta: float) -> Tensor:
    """1 - sigmoid( +-beta (r - z) ), Eq. 8: plus where the play-out has won. log_ratio, other, won: (B,).

    z = max(0, mean of `other`), the log-ratios of chunks that answer other observations; no gradient.
    """
    z = other.mean().clamp(min=0).detach()
    sign = won.float() * 2 - 1
    return balanced(1 - torch.sigmoid(beta * sign * (log_ratio - z)), won)


def nft(error: Tensor, mirrored: Tensor, won: Tensor, beta: float) -> Tensor:
    """softplus( +-beta/2 (E - E') ): plus where the play-out has won. E is the policy's flow-matching error
    and E' that of 2 v_ref - v, both (B,).
    """
    sign = won.float() * 2 - 1
    return balanced(F.softplus(beta / 2 * sign * (error - mirrored)), won)


def balanced(losses: Tensor, won: Tensor) -> Tensor:
    """The mean of successes' and failures' mean losses (of one group, where the batch has no other)."""
    return torch.stack([losses[group].mean() for group in (won, ~won) if group.any()]).mean()


# -------------------------------------------------------------------------------------------------- unpaired
def trained_on(prefs: Path, held_out: int) -> list[int]:
    """Which play-outs of 02 may be trained on: all but those of attempts whose pairs 03 holds out."""
    with_pairs, tried = (
        [
            (row["suite"], row["task"], row["unit"])
            for row in disk.read_jsonl(prefs / f"{name}.jsonl", "suite task unit")
        ]
        for name in ("pairs", "tried")
    )
    held = list(dict.fromkeys(with_pairs))[::held_out] if held_out else []  # as common.read_pairs counts
    return [i for i, attempt in enumerate(tried) if attempt not in held]


def load_tried(cfg: Config, policy) -> dict:
    """The first chunks of 02's play-outs, as 03's batches have pairs, and whether they `won`.

    Attempts whose pairs are held out are left out.
    """
    path = cfg.pairs_dir / "tried.safetensors"
    refuse(
        not path.is_file(),
        f"{path} is not there: kto and nft need the play-outs that 02 keeps; run 02, and set pairs_from="
        " (empty)",
    )
    tried, rows = disk.load_finite(path), disk.read_jsonl(path.with_suffix(".jsonl"), "instruction success")
    refuse(len(rows) != len(tried["chunk"]), f"{path} and its .jsonl differ in length; run 02 again")
    kept = torch.tensor(trained_on(cfg.pairs_dir, cfg.held_out))
    tried |= {
        "won": torch.tensor([row["success"] for row in rows]),
        "instruction": [row["instruction"] for row in rows],
    }
    tried = common.select(tried, kept)
    refuse(len(tried["won"].unique()) < 2, f"{path} holds successes only, or failures only; play more")
    obs = {key: tried[key] for key in (*common.CAMERAS, "state", "instruction")}
    tried["obs"] = common.blank_images(obs) if cfg.blank_images else obs
    refuse(
        tried["chunk"].shape[1] != policy.horizon,
        f"{path} has chunks of {tried['chunk'].shape[1]} actions, the policy of {policy.horizon}",
    )
    common.same_origin(policy, path)
    return tried | {"chosen": tried["chunk"], "rejected": tried["chunk"].roll(len(kept) // 2, 0)}


def flow_errors(policy, obs, chunk: Tensor, draws, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Flow-matching errors (B,) of the policy's velocity, and of its mirror image at the reference's."""
    with policy.reference():
        ref_prefix = policy.encode(obs)
    prefix, velocities = policy.encode(obs), []

    def own(index, x_t, t):
        velocities.append(policy.velocity(prefix.select(index), x_t, t))
        return velocities[0]

    def mirror(index, x_t, t):
        with policy.reference():
            v_ref = policy.velocity(ref_prefix.select(index), x_t, t)
        return 2 * v_ref - velocities[0]

    scored = [x.to(prefix.valid.device) for x in (policy.pad(chunk), draws, mask)]
    return tuple(common.flow_matching_error(v, *scored).mean(0) for v in (own, mirror))


# -------------------------------------------------------------------------------------------------- training
def main(cfg: Config, run: stage.Run) -> dict:
    policy = backbones.load_sft(cfg)
    unpaired = cfg.loss in ("kto", "nft")
    pairs, _ = dpo.load_pairs(cfg, policy)
    adapted = common.attach_adapter(
        policy, cfg.adapter, cfg.rank, cfg.alpha, policy.adapter_targets, cfg.seed
    )
    policy.recompute = cfg.recompute
    trained = torch.nn.ParameterList(p for p in policy.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=0.0)
    beta = dpo.choose_beta(policy, pairs, cfg)
    if unpaired:  # with the beta that the pairs of the same play-outs give
        pairs = load_tried(cfg, policy)
    pairs["obs"] = policy.begin(pairs["obs"], cfg.batch_size)

    for step in run.steps(run.resume(adapter=trained, optimizer=optimizer), cfg.steps):
        # 1. a batch, and the draws that its log-probabilities share
        index = common.shuffled(cfg.seed, "losses", step, cfg.batch_size, len(pairs["mask"]))
        draws = dpo.draw(policy, cfg, cfg.batch_size, common.stream(cfg.seed, "losses", step))
        obs, chosen, _, mask = batch = dpo.batch_of(pairs, index)

        # 2. log-probabilities under reference and policy; unpaired, "rejected" answers another observation
        with policy.reference():
            ref_w, ref_l = dpo.score(policy, cfg, *batch, draws, (step, "reference"))
        pi_w, pi_l = dpo.score(policy, cfg, *batch, draws, (step, "policy"))

        # 3. the loss, and 03's anchor on what was chosen, or has won
        good = (pairs["won"][index] if unpaired else torch.ones(len(index), dtype=torch.bool)).to(pi_w.device)
        if cfg.loss == "kto":
            loss = kto(pi_w - ref_w, pi_l - ref_l, good, beta)
        elif cfg.loss == "nft":
            loss = nft(*flow_errors(policy, obs, chosen, draws, mask), good, beta)
        elif cfg.loss == "simpo":
            loss = simpo(pi_w, pi_l, mask.sum(1).to(pi_w) * common.ACTION_DIM, beta)
        else:
            loss = proximal(pi_w, pi_l, ref_w, ref_l, beta)
        total = cfg.contrast * loss - cfg.sft_coef * beta * (pi_w * good).sum() / len(index)

        # 4. one step of the optimiser, and the log
        grad_norm = run.update(total, trained, optimizer, step)
        if step == 0 or run.logs(step):
            run.log(step, loss=loss.item(), log_ratio=(pi_w - ref_w).mean().item(), grad_norm=grad_norm)

    common.save_adapter(adapted, run.dir)
    return {"beta": beta, "chunks": len(pairs["mask"])}


if __name__ == "__main__":
    stage.start(main, Config, preview=backbones.preview)
