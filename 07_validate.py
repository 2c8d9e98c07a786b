"""07 - Is the surrogate right? Estimators of log p(chunk | observation) against the exact likelihood.

reads   <run>/<backbone>/seed<k>/sft/ (01), prefs-<pairs>[-at<start>]/ (02), every finished
        dpo-*-<pairs>/ of the same pairs and start (03)
writes  <run>/<backbone>/seed<k>/validate-<pairs>[-at<start>]/: measures.safetensors (exact values and
        estimates of every chunk under every policy), gradients.jsonl, done.json;
        beside the folder its tables, validate-<pairs>[-at<start>].{json,md}
cost    in passes of the action expert: an estimate takes one per draw, an exact value 2 x ode_steps x
        (1 + dimensions of a chunk), the density of the Euler map denoise_steps x (1 + dimensions)
try     python 07_validate.py configs/try.yaml name=mine validate.n_pairs=8

Three quantities are compared. `log p` is that of a chunk. `difference` is log p of the chosen chunk minus
that of the rejected one, under one policy. `margin` is the difference under a DPO policy minus that under its
reference: what DPO's loss sees, without beta. With held_out=N the margins are those of the pairs that 03 has
left out of its training. An estimator is a scheme of draws (t, eps) (common.make_draws) and a weight on the
velocity error (common.TIME_WEIGHTS):

    log p~(a | o) = - mean over K draws of w(t) || v(t eps + (1-t) a, t, o) - (eps - a) ||^2

`shared`: all terms of a quantity have the same draws, as in 03; otherwise every term has its own. All
estimators score whole chunks, as the exact likelihood must. (03 scores a chunk's executed actions, or all of
them with dpo.whole_chunk=true.) Every estimate is repeated with fresh draws. An estimator's `noise` is the
variance between repeats over that between pairs. Its `bias` is what more repeats would not cure: 1 - r^2,
where r is the correlation, over pairs, of its mean over endless repeats with the exact values.
report/agreement.py makes the tables.

"Exact" is the likelihood of the flow. The policy acts by ten Euler steps, and that map has another density.
The noise behind a branch pair can be drawn again, so this stage measures that density too, and compares the
exact value and all estimates with it. (Where the noise does not give the chunk back, the value is nan.)

The variance of the estimated margin bounds bias and variance of DPO's loss (VRPO, arXiv 2505.19223). Its
three levers are among the estimators: more draws; one noise for each time (`paper, one time` is the opposite:
several noises at one time); and shared draws, which VRPO calls antithetic. Here `mirrored` means something
else: a noise and its mirror image.

An autoregressive policy's log p is exact, in closed form, so there is nothing to validate.
Left out: marginals of the executed actions (no closed form), policies in bfloat16, GPUs.
"""

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import backbones
import common
from backbones import likelihood
from report import agreement
from runtime import Count, disk, load_config, refuse, stage, workers

BLOCK = 8  # pairs that are scored together
REPEATS = 4  # of every estimate, with fresh draws: one for each term of a margin
ROUNDING = 0.1  # normalised units: weights in bfloat16 make slightly other chunks of the same noise
ESTIMATORS = {  # name -> scheme of its draws, weight on the squared velocity error; and how 03 trains on it
    "paper": ("stratified", "velocity"),  # surrogate=paper, the default
    "paper-noise": ("stratified", "noise"),  # its draws, weighted as errors in eps
    "paper-elbo": ("stratified", "elbo"),  # its draws, weighted as the lower bound
    "mirrored": ("mirrored", "velocity"),  # surrogate=mirrored
    "elbo": ("logsnr", "logsnr"),  # surrogate=elbo
    "independent": ("iid", "velocity"),  # surrogate=independent: what the published code does
}


@dataclass
class Config(common.ActingConfig, common.AdapterConfig):
    section: ClassVar = "validate"
    draws: ClassVar = 4  # of the estimates in the tables: the paper's T
    n_pairs: Annotated[int, 2] = 200  # pairs looked at, evenly spread; all where there are fewer
    max_draws: Annotated[int, 4] = 64  # the plots have 1, 2, 4, ... draws, up to this
    ode_steps: Count = 20  # midpoint steps of the exact likelihood
    gradient_batches: int = 2  # of 8 pairs, spread over all tasks, in each of two states of the DPO training
    gradient_probes: Annotated[int, 2] = 8  # of the exact gradient; half of them are compared with the rest

    folder = property(lambda self: self.seed_dir / self.variant("validate", self.pairs))

    def dpo_folders(self) -> dict[str, Path]:
        """Name -> folder of each finished DPO on these pairs, with this start, held_out and blank_images.

        Or of the one that is given.
        """
        if self.adapters_from:
            return {self.made_adapter.name: self.adapter_dir}
        pairs = {stage.input_name(path, self.run_dir) for path in self.pairs_inputs()}
        ours = {key: getattr(self, key) for key in ("pairs", "start", "held_out", "blank_images")}
        older = {"held_out": 0, "blank_images": False}  # of folders that lack these keys
        found = {path.parent: disk.read_json(path) for path in sorted(self.seed_dir.glob("dpo-*/done.json"))}
        return {
            path.name: path
            for path, made in found.items()
            if pairs <= made["inputs"].keys() and ours.items() <= (older | made["config"]).items()
        }

    def inputs(self) -> list[Path]:
        refuse(
            (self.device, self.dtype) != ("cpu", "float32"),
            "07_validate.py measures on the CPU in float32; set device=cpu dtype=float32",
        )
        refuse(
            self.max_draws & (self.max_draws - 1),
            f"validate.max_draws={self.max_draws} must be a power of 2: 1, 2, 4, ... draws are tried",
        )
        adapters = self.adapter_inputs("held_out") if self.adapters_from else self.dpo_folders().values()
        if self.adapters_from and self.held_out:
            done = self.adapter_dir / "done.json"
            known = disk.read_object(done).get("inputs", {}).values() if done.is_file() else ()
            refuse(
                not all(stage.fingerprint_of(path, self.run_dir) in known for path in self.pairs_inputs()),
                f"held_out={self.held_out}: {self.adapter_dir} was not, or not provably, trained on"
                " these pairs; set pairs_from= to those that it was trained on (no done.json: held_out=0)",
            )
        inputs = [*self.sft_inputs(), *self.pairs_inputs(), *adapters]
        self.made_with(self.pairs_dir, "denoise_steps")  # the Euler steps whose density `acting` measures
        return inputs


# ------------------------------------------------------------------------------------------------------- data
# Workers get jobs: (cfg, the file to write, numbers of the pairs, folder of a DPO policy or None for the SFT
# policy). A job of `gradients` has a state, "start" or "end", and the betas of DPO by estimator, too.
def load_pairs(cfg: Config, policy=None) -> dict:
    """Up to n_pairs pairs, evenly spread: observations, `chunks` (N, 2, H, 7), the chosen ones first, where
    they are from, and the attempt of each."""
    pairs = common.read_pairs(cfg.pairs_dir, policy)
    n = len(pairs["mask"])
    kept = {key: pairs[key] for key in (*common.CAMERAS, "state", "instruction", "attempt")}
    kept["chunks"] = torch.stack([pairs["chosen"], pairs["rejected"]], dim=1)
    kept["proposed"] = torch.stack(
        [pairs.get(f"{side}_proposed", pairs[side]) for side in ("chosen", "rejected")], dim=1
    )
    kept["source"] = disk.read_jsonl(cfg.pairs_dir / "pairs.jsonl")
    kept = common.select(kept, torch.linspace(0, n - 1, min(cfg.n_pairs, n)).round().long())
    return common.blank_images(kept) if cfg.blank_images else kept


def inputs_of(cfg: Config, pairs: list[int], adapter: Path | None = None) -> tuple:
    """A policy, and the observations and chunks (n, 2, H, 7) of some pairs."""
    policy = backbones.load_sft(cfg)
    obs = common.select(load_pairs(cfg, policy), torch.tensor(pairs))
    return common.load_adapter(policy, adapter) if adapter else policy, obs, obs["chunks"]


def noise_behind(cfg: Config, policy, source: list[dict]) -> Tensor:
    """The noise (N, 2, H, D) that 02 drew for the chosen and the rejected chunk of branch pairs."""
    done, seed = cfg.pairs_dir / "done.json", cfg.start_seed or cfg.seed
    made = {"n_init": None, "branch_scale": 1.0, "noise_scale": 1.0, "seed": seed}
    made |= disk.read_json(done)["config"] if done.is_file() else {}
    states, noise = len(common.init_states("prefs", made["n_init"])), []
    for row in source:
        played = row["suite"], row["task"], row["init_state"], row["unit"] // states, row["decision"]
        own = common.stream(made["seed"], "branch", *played, row["tried"] - 1)
        base = common.stream(made["seed"], "prefs", *played)
        scales = (made["branch_scale"], own), (made["noise_scale"], base)
        noise.append(torch.cat([scale * policy.noise(1, g) for scale, g in scales]))
    return torch.stack(noise)


def acting(cfg: Config, policy, prefix, pairs: dict) -> Tensor:
    """log p (n, 2) of the chunks under the Euler map, along the noise that made them; nan if it did not."""
    if cfg.pairs != "branch" or "tried" not in pairs["source"][0]:
        return torch.full(pairs["chunks"].shape[:2], math.nan)
    noise = noise_behind(cfg, policy, pairs["source"]).transpose(0, 1).flatten(0, 1)  # (2 n, H, D)
    both = prefix.select(torch.arange(len(noise) // 2).repeat(2))
    made, log_p = likelihood.euler_sample(likelihood.velocity_of(policy, both), noise, cfg.denoise_steps)
    off = made[..., :7] - pairs["proposed"].transpose(0, 1).flatten(0, 1)
    log_p[off.square().mean((1, 2)).sqrt() > ROUNDING] = math.nan
    return log_p.view(2, -1).T


# ------------------------------------------------------------------------------------ estimates and the truth
def estimate(policy, obs, chunks: Tensor, name: str, k: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """One estimate of log p (n, c) of c chunks (n, c, H, 7) of each pair, which share draws. Differentiable.

    Also returns the squared velocity errors (K, n, c) whose weighted mean it is.
    obs: observations, or (except for "independent") their prefix.
    """
    scheme, weight = ESTIMATORS[name]
    if name == "independent":  # the published code augments the images in every forward pass
        obs = obs | {camera: common.random_shift(obs[camera], common.SHIFT, g) for camera in common.CAMERAS}
    n, c, h, _ = chunks.shape
    draws = policy.draws(n, k, g, scheme)
    prefix = policy.encode(obs).select(torch.arange(n).repeat(c))
    flat = chunks.transpose(0, 1).flatten(0, 1)  # (c n, H, 7)
    errors = policy.errors(prefix, flat, draws.repeat(c), torch.ones(c * n, h))
    errors = errors.unflatten(1, (c, n)).transpose(1, 2)
    return common.surrogate_log_prob(errors, draws.t[..., None], weight), errors


def exact(policy, prefix, chunks: Tensor, steps: int, g: torch.Generator | None = None) -> Tensor:
    """log p (n, 2) along the ODE, in so many midpoint steps.

    g: None: the exact trace. A generator: one Hutchinson probe from it, which both chunks of a pair share;
    differentiable.
    """
    probes = (
        None
        if g is None
        else likelihood.make_probes(len(chunks), 1, (policy.horizon, policy.cfg.flow_dim), g)
    )
    return torch.stack(likelihood.pair_log_probs(policy, prefix, *chunks.unbind(1), probes, steps), dim=1)


@torch.no_grad()
def measure(job: tuple) -> None:
    """Worker: exact values and all estimates of some pairs under one policy. All policies share draws."""
    cfg, file, pairs, adapter = job
    policy, obs, chunks = inputs_of(cfg, pairs, adapter)
    prefix = policy.encode(obs)
    tensors = {"exact": exact(policy, prefix, chunks, cfg.ode_steps)}
    if adapter is None:
        tensors |= {"euler": acting(cfg, policy, prefix, obs), "attempt": obs["attempt"]}
        tensors["dims"] = torch.full((len(chunks),), policy.horizon * policy.cfg.flow_dim)
    for name in ("paper", "mirrored", "elbo", "independent"):
        seen = obs if name == "independent" else prefix
        for i in range(1 if name == "mirrored" else 0, cfg.max_draws.bit_length()):  # mirror images: pairs
            k = 2**i
            repeats = [
                estimate(
                    policy,
                    seen,
                    chunks,
                    name,
                    k,
                    common.stream(cfg.seed, "validate", ESTIMATORS[name][0], k, r, pairs[0]),
                )
                for r in range(REPEATS)
            ]
            tensors[f"{name}/{k}"] = torch.stack([score for score, _ in repeats])  # (R, n, 2)
            if name == "paper":  # its errors give the estimates with other weights, too
                errors = torch.stack([error for _, error in repeats], dim=1)  # (K, R, n, 2)
                t = ((torch.arange(k) + 0.5) / k)[:, None, None, None]
                for weight in ("noise", "elbo"):
                    tensors[f"paper-{weight}/{k}"] = common.surrogate_log_prob(errors, t, weight)
                order = torch.randperm(k, generator=common.stream(cfg.seed, "one time", k, pairs[0]))
                tensors["by_time"] = -errors.mean(1)[order]  # (K, n, 2) of the largest K, which comes last
    disk.save_tensors(file, tensors)


# ----------------------------------------------------------------------------------------------- the gradient
def dpo_gradient(policy, score: Callable[[str], Tensor], beta: float) -> Tensor:
    """Gradient of DPO's loss on the adapter. score(term) -> log p (n, 2) of chosen and rejected."""
    with policy.reference():
        ref = score("reference")
    log_ratio = score("policy") - ref
    loss = -F.logsigmoid(beta * (log_ratio[:, 0] - log_ratio[:, 1])).mean()
    grads = torch.autograd.grad(loss, [p for p in policy.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def gradients(job: tuple) -> None:
    """Worker: cosines between the exact DPO gradient on one batch of pairs and every estimator's.

    "exact" with k draws: the mean over the first k probes against that over the last half.

    state "start": the trained adapter with B = 0, an identity: policy = reference, as in DPO's first step.
    state "end": the adapter as trained.
    """
    cfg, file, pairs, adapter, state, betas = job
    policy, obs, chunks = inputs_of(cfg, pairs)
    stream, cosine = partial(common.stream, cfg.seed), partial(F.cosine_similarity, dim=0)
    common.load_adapter(policy, adapter, trainable=True)
    for name, p in policy.named_parameters():
        if state == "start" and "lora_B" in name:
            p.data.zero_()

    def exactly(i: int, term: str) -> Tensor:
        return exact(
            policy,
            policy.encode(obs),
            chunks,
            max(1, cfg.ode_steps // 2),
            stream("gradient probes", i, pairs[0]),
        )

    def estimated(name: str, k: int, term: str) -> Tensor:
        fresh = name == "independent"  # other draws in each term, and for each chunk
        g = stream("gradient", k, term if fresh else "", pairs[0])
        return torch.cat(
            [estimate(policy, obs, part, name, k, g)[0] for part in chunks.split(1 if fresh else 2, dim=1)],
            dim=1,
        )

    # one at a time: the graph of a second derivative is large
    probes = torch.stack(
        [dpo_gradient(policy, partial(exactly, i), betas["exact"]) for i in range(cfg.gradient_probes)]
    )
    half = len(probes) // 2
    found = (
        {  # (estimator, draws) -> cosine
            ("exact", k): cosine(probes[:k].mean(0), probes[half:].mean(0))
            for k in [2**i for i in range(half.bit_length())]
        }
        | {
            (name, k): cosine(dpo_gradient(policy, partial(estimated, name, k), betas[name]), probes.mean(0))
            for name in ESTIMATORS
            for k in (1, 4, 16, 64)
            if k <= cfg.max_draws and (name, k) != ("mirrored", 1)
        }
    )
    disk.write_rows(
        file,
        [
            {"state": state, "batch": pairs, "estimator": name, "draws": k, "cosine": x.item()}
            for (name, k), x in found.items()
        ],
    )


# ------------------------------------------------------------------------------------------------------- main
def spread(n: int, batches: int) -> list[list[int]]:
    """Batches of the numbers of n pairs. Pairs are sorted by task, so each batch has some from all over."""
    size = min(BLOCK, n)
    batches = min(batches, n // size)
    return [[(batches * i + b) * n // (batches * size) for i in range(size)] for b in range(batches)]


def main(cfg: Config, run: stage.Run) -> dict:
    parts, policies = run.dir / "parts", {"sft": None, **cfg.dpo_folders()}
    parts.mkdir(exist_ok=True)
    every = range(len(load_pairs(cfg)["chunks"]))
    refuse(len(every) < 2, f"{cfg.pairs_dir} holds a single pair: collect more")
    blocks = [list(every[i : i + BLOCK]) for i in every[::BLOCK]]

    # 1. exact values and all estimates of every pair under every policy
    jobs = {
        name: [(cfg, parts / f"{name}-{b:03d}.safetensors", block, adapter) for b, block in enumerate(blocks)]
        for name, adapter in policies.items()
    }
    every_job = {job[1]: job for of_policy in jobs.values() for job in of_policy}
    workers.run_missing(measure, every_job, cfg.workers, "validate")
    measures = {}
    for name, of_policy in jobs.items():
        tensors = [disk.load_tensors(file) for _, file, _, _ in of_policy]
        measures |= {
            f"{name}|{key}": torch.cat(
                # the pairs are the second axis of estimates (R, n, 2) and of by_time (K, n, 2)
                [part[key] for part in tensors],
                dim=1 if "/" in key or key == "by_time" else 0,
            )
            for key in tensors[0]
        }

    # 2. gradients of DPO's loss under LoRA, on the paper's surrogate where there are several
    scores = {
        **{name: measures[f"sft|{name}/{cfg.draws}"].mean(0) for name in ESTIMATORS},
        "exact": measures["sft|exact"],
    }
    # near beta: auto (03's for "independent" is smaller: there chosen and rejected have other draws)
    betas = {name: 1 / (x[:, 0] - x[:, 1]).std(correction=0).item() for name, x in scores.items()}
    gradient_jobs = [
        (cfg, parts / f"gradient-{state}-{b}.jsonl", block, policies[name], state, betas)
        # the shortest name is that of the paper's surrogate
        for name in sorted((name for name in policies if name.startswith("dpo-lora")), key=len)[:1]
        for state in ("start", "end")
        for b, block in enumerate(spread(len(every), cfg.gradient_batches))
    ]
    workers.run_missing(gradients, {job[1]: job for job in gradient_jobs}, cfg.workers, "gradients")

    disk.save_tensors(run.dir / "measures.safetensors", measures)
    disk.write_rows(
        run.dir / "gradients.jsonl", [row for job in gradient_jobs for row in disk.read_jsonl(job[1])]
    )
    shutil.rmtree(parts)
    return {"policies": list(policies)}


def validate(cfg: Config) -> None:
    if cfg.backbone == "openvla":
        print("[07_validate] openvla's log p is exact, in closed form: there is nothing to validate")
    else:
        stage.execute(main, cfg, backbones.preview, lambda cfg: agreement.report(cfg, cfg.folder))


if __name__ == "__main__":
    stage.command_line(lambda: validate(load_config(Config, sys.argv[1:])))
