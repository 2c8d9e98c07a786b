"""07 - Is the surrogate right? Estimators of log p(chunk | observation) against the exact likelihood, on real preference pairs.

reads   <run>/<backbone>/seed<k>/sft/ (01), prefs-<recipe>/ (02), every finished dpo-*-<recipe>/ of this recipe and start (03)
        for the last panel: eval-*/episodes.jsonl of all seeds (04)
writes  <run>/<backbone>/seed<k>/validate-<recipe>/: measures.safetensors (exact values and estimates of every chunk under every
        policy), own.safetensors, gradients.jsonl, done.json; beside it validate-<recipe>.{json,md,png}: tables and plots
cost    measured by each run (CPU seconds per chunk in the .md); --dry-run counts passes of the action expert
try     python 07_validate.py configs/tiny.yaml validate.n_pairs=8 validate.repeats=4

Three quantities are compared. `log p`: of a chunk. `difference`: log p of the chosen less that of the rejected chunk, one policy.
`margin`: the difference under a DPO policy less that under its reference, which is what DPO's loss sees.
An estimator is a scheme of draws (t, eps) (common.make_draws) and a weight on the velocity error (common.time_weight):

    log p~(a | o) = - mean over k draws of w(t) || v(t eps + (1-t) a, t, o) - (eps - a) ||^2

`shared`: the same draws in all terms of a quantity, as in 03; otherwise every term has its own. All score whole chunks, as the
exact likelihood must (03 by default scores the executed actions of a chunk; dpo.whole_chunk=true makes it the same).
Every estimate is repeated with fresh draws. An estimator's `noise` is the variance between repeats over that between pairs, its
`bias` what more repeats would not cure: 1 - r^2 between its mean over endless ones and the exact values, after the best scale.
The tables and plots are made by agreement.py from what this stage measures.
For an autoregressive policy log p is exact in closed form: there is nothing to validate.
Left out: marginals of the executed actions (no closed form), policies in bfloat16, GPUs.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import agreement
import common
import disk
import likelihood
import memory
import runs
import workers


@dataclass
class Config(common.RunConfig):
    n_pairs: int = 200  # pairs looked at, evenly spread; all where there are fewer
    draws: int = 4  # the estimators' number of draws in the tables (the paper's T) ...
    max_draws: int = 64  # ... which goes through 1, 2, 4, ... up to this
    repeats: int = 4  # of every estimate, with fresh draws; at least 4, one for each term of a margin
    ode_steps: int = 20  # midpoint steps of the exact likelihood
    probes: int = 0  # Hutchinson probes of its trace, shared by all chunks of a pair; 0 = the exact trace
    float64: bool = False  # the exact likelihood in double precision
    own_chunks: int = (
        8  # observations for the Euler map's density and the study of steps, probes and precision
    )
    gradient_batches: int = 2  # of 8 pairs, in each of two states of the DPO training
    gradient_probes: int = (
        8  # of the exact gradient; the first 1, 2, 4, ... of one half are held against the other half
    )
    shift: int = 4  # augmentation of the published code's behaviour, pixels

    def __post_init__(self):
        super().__post_init__()
        common.at_least(
            self, n_pairs=2, draws=1, max_draws=4, repeats=4, ode_steps=1, probes=0, own_chunks=2, shift=0
        )
        common.at_least(self, gradient_batches=0, gradient_probes=2)
        common.one_of("validate.draws", self.draws, draw_counts(self))


BLOCK = 8  # pairs that are scored together
ESTIMATORS = {  # name -> scheme of its draws, weight on the squared velocity error. A config asks for them by
    "paper": ("stratified", "velocity"),  # surrogate=paper, the default
    "paper-noise": ("stratified", "noise"),  # surrogate=paper dpo.weight=noise
    "paper-elbo": ("stratified", "elbo"),  # surrogate=paper dpo.weight=elbo
    "antithetic": ("antithetic", "velocity"),  # surrogate=antithetic
    "elbo": ("logsnr", "logsnr"),  # surrogate=elbo
    "independent": ("iid", "velocity"),  # surrogate=independent: what the published code does
}


def draw_counts(cfg: Config) -> list[int]:
    return [2**i for i in range(cfg.max_draws.bit_length()) if 2**i <= cfg.max_draws]


# ------------------------------------------------------------------------------------------------------------ measurements
def load_policy(cfg: Config, folder: Path | None):
    """The SFT policy, or with a folder of 03 the DPO policy."""
    policy = common.load_sft(cfg)
    return policy if folder is None else common.load_adapter(policy, folder)


def load_pairs(cfg: Config) -> dict:
    """Up to n_pairs of the recipe's pairs, evenly spread: observations, and `chunks` (N, 2, H, 7), chosen first."""
    pairs = common.read_pairs(cfg.source("prefs"))
    index = torch.linspace(0, len(pairs["mask"]) - 1, min(cfg.n_pairs, len(pairs["mask"]))).round().long()
    kept = {key: pairs[key][index] for key in ("agentview", "wrist", "state")}
    kept["chunks"] = torch.stack([pairs["chosen"], pairs["rejected"]], dim=1)[index]
    kept["instruction"] = [pairs["instruction"][i] for i in index.tolist()]
    return common.blank_images(kept) if cfg.blank_images else kept


def rows_of(pairs: dict, index: list[int]) -> tuple[dict, Tensor]:
    """Observations and chunks (n, 2, H, 7) of some pairs."""
    part = {key: [x[i] for i in index] if isinstance(x, list) else x[index] for key, x in pairs.items()}
    return part, part.pop("chunks")


def velocity_errors(policy, prefix, chunks: Tensor, draws: common.Draws) -> Tensor:
    """Squared velocity error (K, n, c) of the c chunks (n, c, H, 7) of each pair, two or one, under the same draws."""
    n, c, h, _ = chunks.shape
    flat, prefix = policy.pad(chunks.transpose(0, 1).flatten(0, 1)), prefix.select(torch.arange(n).repeat(c))
    errors = common.flow_matching_error(
        lambda index, x, t: policy.velocity(prefix.select(index), x, t),
        flat,
        draws.repeat(c),
        torch.ones(c * n, h),
    )
    return errors.unflatten(1, (c, n)).transpose(1, 2)


def estimate(
    policy, obs, chunks: Tensor, name: str, k: int, g: torch.Generator, cfg: Config
) -> tuple[Tensor, Tensor]:
    """One estimate of log p (n, c), and the errors (K, n, c) it is the weighted mean of. Differentiable.

    obs: observations, or (but for "independent") their prefix.
    """
    scheme, weight = ESTIMATORS[name]
    if name == "independent":  # the published code augments the images in every forward
        obs = obs | {
            camera: common.random_shift(obs[camera], cfg.shift, g) for camera in ("agentview", "wrist")
        }
    draws = policy.draws(len(chunks), k, g, scheme)
    errors = velocity_errors(policy, policy.encode(obs), chunks, draws)
    return -(common.time_weight(draws.t, weight)[..., None] * errors).mean(0), errors


def exact(policy, prefix, chunks: Tensor, cfg: Config, g: torch.Generator) -> Tensor:
    """log p (n, 2) along the ODE; both chunks of a pair share the probes where there are any."""
    probes = (
        likelihood.make_probes(len(chunks), cfg.probes, (policy.horizon, policy.cfg.flow_dim), g)
        if cfg.probes
        else None
    )
    scores = likelihood.pair_log_probs(policy, prefix, *chunks.unbind(1), probes, cfg.ode_steps, cfg.float64)
    return torch.stack(scores, dim=1)


@torch.no_grad()
def measure(job: tuple):
    """Worker: exact values and all estimates for a block of pairs under one policy. Draws are the same under every policy."""
    cfg, folder, pairs, block = job
    policy, (obs, chunks) = load_policy(cfg, folder), rows_of(pairs, block)
    prefix = policy.encode(obs)
    found = {
        "exact": exact(policy, prefix, chunks, cfg, common.stream(cfg.seed, "validate probes", block[0]))
    }
    for name, (scheme, weight) in ESTIMATORS.items():
        if scheme == "stratified" and weight != "velocity":
            continue  # other weights of the paper's errors
        for k in draw_counts(cfg)[name == "antithetic" :]:  # mirror images come in pairs
            streams = [
                common.stream(cfg.seed, "validate", scheme, k, r, block[0]) for r in range(cfg.repeats)
            ]
            seen = obs if name == "independent" else prefix
            scores, errors = zip(
                *(estimate(policy, seen, chunks, name, k, g, cfg) for g in streams), strict=True
            )
            found[f"{name}/{k}"] = torch.stack(scores)  # (R, n, 2)
            if name == "paper":
                t = (torch.arange(k) + 0.5) / k
                for other in ("noise", "elbo"):
                    weighted = common.time_weight(t, other)[None, :, None, None] * torch.stack(
                        errors
                    )  # (R, K, n, 2)
                    found[f"paper-{other}/{k}"] = -weighted.mean(1)
                found["by_time"] = -torch.stack(errors).mean(
                    0
                )  # (K, n, 2) of the largest K, which comes last
    yield found


@torch.no_grad()
def own_chunks(job: tuple):
    """Worker: what the policy's own samples tell, whose noise is known: the Euler map's density, solver, probes, precision."""
    cfg, folder, pairs, index = job
    policy, (obs, chunks) = load_policy(cfg, folder), rows_of(pairs, index)
    prefix, steps = policy.encode(obs), cfg.denoise_steps
    velocity, grid = likelihood.velocity_of(policy, prefix), likelihood.time_grid(cfg.ode_steps)
    own, euler = likelihood.euler_sample(
        velocity, policy.noise(len(index), common.stream(cfg.seed, "own")), steps
    )
    probes = likelihood.make_probes(len(index), 16, own.shape[1:], common.stream(cfg.seed, "own probes"))
    along = {"exact": likelihood.ode_log_prob(velocity, own, likelihood.exact_trace, grid)}
    for n in (5, 10, 20, 40, 80):
        one = likelihood.hutchinson(probes[:, :1])
        along[f"steps/{n}"] = likelihood.ode_log_prob(velocity, own, one, likelihood.time_grid(n))
    double = likelihood.in_float64(policy, prefix, own)
    velocity64 = likelihood.velocity_of(*double[:2])
    along["float64"] = likelihood.ode_log_prob(
        velocity64, double[2], likelihood.hutchinson(probes[:, :1].double()), grid
    )
    for i in range(16):
        along[f"probe/{i}"] = likelihood.ode_log_prob(
            velocity, own, likelihood.hutchinson(probes[:, i : i + 1]), grid
        )
    for n in (5, 10, 20, 40):  # what 03 would see of the pairs: one probe that both chunks share
        one = dataclasses.replace(cfg, ode_steps=n, probes=1)
        for i in range(8 if n == 10 else 1):
            along[f"pair/{n}/{i}"] = exact(
                policy, prefix, chunks, one, common.stream(cfg.seed, "pair probes", i)
            )
    pair_chunks = policy.pad(chunks.transpose(0, 1).flatten(0, 1))
    twice = likelihood.velocity_of(policy, prefix.select(torch.arange(len(index)).repeat(2)))
    inverse = likelihood.euler_log_prob(twice, pair_chunks, steps)
    yield along | {
        "chunk": own,
        "euler": euler,
        "inverse_found": inverse.isfinite().float(),
        "inverse": inverse.nan_to_num(0),
    }


# ------------------------------------------------------------------------------------------------------------- the gradient
def dpo_gradient(policy, score, beta: float) -> Tensor:
    """Gradient of DPO's loss on the adapter. score(term) -> log p (n, 2) of chosen and rejected."""
    with policy.reference():
        ref = score("reference")
    log_ratio = score("policy") - ref
    loss = -F.logsigmoid(beta * (log_ratio[:, 0] - log_ratio[:, 1])).mean()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def gradients(job: tuple):
    """Worker: cosines between the exact DPO gradient on one batch of pairs and every estimator's.

    state "start": the adapter an identity again (B = 0), so policy = reference, as in DPO's first step; "end": as trained.
    """
    cfg, folder, pairs, index, betas, state = job
    from peft import PeftModel

    policy, (obs, chunks) = common.load_sft(cfg), rows_of(pairs, index)
    PeftModel.from_pretrained(policy, str(folder), is_trainable=True).eval()
    for name, p in policy.named_parameters():
        if state == "start" and "lora_B" in name:
            p.data.zero_()
    each, one_probe = [], dataclasses.replace(cfg, probes=1, ode_steps=max(1, cfg.ode_steps // 2))
    for i in range(cfg.gradient_probes):  # one probe at a time: the graph of a second derivative is large

        def score(term, i=i):
            g = common.stream(cfg.seed, "gradient probes", i, index[0])
            return exact(policy, policy.encode(obs), chunks, one_probe, g)

        each.append(dpo_gradient(policy, score, betas["exact"]))
    probes, half = torch.stack(each), len(each) // 2
    truth, row, rows = probes.mean(0), {"state": state, "batch": index}, []
    for k in [2**i for i in range(half.bit_length())]:
        cosine = F.cosine_similarity(probes[:k].mean(0), probes[half:].mean(0), dim=0).item()
        rows.append(row | {"estimator": "exact", "draws": k, "cosine": cosine})
    for name in ESTIMATORS:
        for k in [k for k in (1, 4, 16, 64) if k <= cfg.max_draws and (name, k) != ("antithetic", 1)]:

            def score(term, name=name, k=k):
                if name != "independent":
                    return estimate(
                        policy,
                        obs,
                        chunks,
                        name,
                        k,
                        common.stream(cfg.seed, "gradient", k, "", index[0]),
                        cfg,
                    )[0]
                g = common.stream(
                    cfg.seed, "gradient", k, term, index[0]
                )  # and from chunk to chunk, as 03's code has it
                return torch.cat(
                    [estimate(policy, obs, chunks[:, i : i + 1], name, k, g, cfg)[0] for i in (0, 1)], dim=1
                )

            cosine = F.cosine_similarity(dpo_gradient(policy, score, betas[name]), truth, dim=0).item()
            rows.append(row | {"estimator": name, "draws": k, "cosine": cosine})
    yield rows


# -------------------------------------------------------------------------------------------------------------------- main
def do_missing(
    function, jobs: dict[str, tuple], parts: Path, cfg: Config, title: str
) -> dict[str, dict | list]:
    """The results of all jobs by name; those that a file of `parts` does not hold yet are worked on."""

    def read(path: Path):
        return disk.load_tensors(path) if path.suffix == ".safetensors" else disk.read_jsonl(path)

    paths = {name: parts / f"{name}.{'jsonl' if function is gradients else 'safetensors'}" for name in jobs}
    todo = [name for name, path in paths.items() if not path.is_file()]
    results = workers.parallel(function, [jobs[name] for name in todo], cfg.workers)
    for i, result in common.progress(results, total=len(jobs), initial=len(jobs) - len(todo), desc=title):
        (disk.save_tensors if isinstance(result, dict) else disk.write_rows)(paths[todo[i]], result)
    return {name: read(path) for name, path in paths.items()}


def costs(cfg: Config, pairs: dict) -> dict:
    """CPU seconds per chunk under the SFT policy, in blocks of the same size: the exact likelihood and estimates by draws."""
    policy, (obs, chunks) = (
        common.load_sft(cfg),
        rows_of(pairs, list(range(min(BLOCK, len(pairs["chunks"]))))),
    )
    torch.set_num_threads(1)

    def seconds(function) -> float:
        began = time.process_time()
        function()
        return (time.process_time() - began) / (2 * len(chunks))

    with torch.no_grad():
        prefix, g = policy.encode(obs), common.stream(cfg.seed, "costs")
        found = {"exact": seconds(lambda: exact(policy, prefix, chunks, cfg, g))}
        for k in draw_counts(cfg):
            found[f"surrogate, {k} draws"] = seconds(
                lambda k=k: estimate(policy, prefix, chunks, "paper", k, g, cfg)
            )
    return found


def dpo_folders(cfg: Config) -> dict[str, Path]:
    """Every finished DPO of this recipe and start, or the one adapter that is given."""
    if cfg.adapters_from:
        return {cfg.variant("dpo").name: cfg.source("dpo")}
    done = {p.parent: disk.read_json(p)["config"] for p in sorted(cfg.seed_dir.glob("dpo-*/done.json"))}
    return {p.name: p for p, used in done.items() if (used["pairs"], used["start"]) == (cfg.pairs, cfg.start)}


def measure_all(cfg: Config, folder: Path, dpo: dict[str, Path]) -> None:
    """Everything that takes time, in parts that survive a kill; measures.safetensors, own.safetensors, gradients.jsonl."""
    pairs, parts = load_pairs(cfg), folder / "parts"
    parts.mkdir(exist_ok=True)
    every = list(range(len(pairs["chunks"])))
    blocks = [every[i : i + BLOCK] for i in range(0, len(every), BLOCK)]
    policies = {"sft": None, **dpo}
    jobs = {
        f"{name}-{b:03d}": (cfg, path, pairs, block)
        for name, path in policies.items()
        for b, block in enumerate(blocks)
    }
    found, measures = do_missing(measure, jobs, parts, cfg, "validate"), {}
    for name in policies:
        mine = [found[f"{name}-{b:03d}"] for b in range(len(blocks))]
        for key in mine[0]:
            measures[f"{name}|{key}"] = torch.cat(
                [part[key] for part in mine], dim=0 if key == "exact" else 1
            )
    few = [every[i * len(every) // cfg.own_chunks] for i in range(min(cfg.own_chunks, len(every)))]
    own = do_missing(own_chunks, {"own": (cfg, None, pairs, few)}, parts, cfg, "own chunks")["own"]

    spread = {"exact": measures["sft|exact"]} | {
        n: measures[f"sft|{n}/{cfg.draws}"].mean(0) for n in ESTIMATORS
    }
    betas = {
        name: 1 / (x[:, 0] - x[:, 1]).std(correction=0).item() for name, x in spread.items()
    }  # 03's beta: auto
    lora = sorted((p for name, p in dpo.items() if name.startswith("dpo-lora")), key=lambda p: len(p.name))[
        :1
    ]  # paper's
    jobs = {}
    for path in lora:
        for state in ("start", "end"):
            for b, block in enumerate(blocks[: cfg.gradient_batches]):
                jobs[f"gradient-{state}-{b}"] = (cfg, path, pairs, block, betas, state)
    cosines = [row for rows in do_missing(gradients, jobs, parts, cfg, "gradients").values() for row in rows]
    disk.save_tensors(folder / "measures.safetensors", measures)
    disk.save_tensors(folder / "own.safetensors", own)
    disk.write_rows(folder / "gradients.jsonl", cosines)
    shutil.rmtree(parts)


def main(cfg: Config) -> None:
    if cfg.backbone == "openvla":
        return print(
            "[07_validate] openvla's log p is the exact likelihood, in closed form: there is nothing to validate"
        )
    if cfg.dry_run:
        dims = (
            memory.make_policy(cfg, "").noise(1, torch.Generator()).numel()
        )  # as flowed: with what published shapes pad
        counts = f"{agreement.passes('exact', 0, cfg, dims)} exact, {cfg.repeats * 4 * 2 * cfg.max_draws} for the estimates"
        return print(f"validate: passes of the action expert per chunk and policy: {counts}")
    if cfg.device != "cpu":
        raise common.UserError("07_validate.py measures on the CPU; set device=cpu")
    runs.alone(__file__)
    dpo = dpo_folders(cfg)
    adapters = common.given_or_made(cfg, "dpo") if cfg.adapters_from else list(dpo.values())
    inputs = [*common.sft_inputs(cfg), *common.given_or_made(cfg, "prefs"), *adapters]
    shared = f"suites backbone seed blank_images pairs denoise_steps {common.SFT_KEYS}"
    code = ["likelihood.py", "workers.py", *cfg.policy_code]
    stage = runs.open_stage(__file__, cfg, cfg.variant("validate"), shared, inputs, code)
    folder = cfg.variant("validate")
    if stage is not None:
        measure_all(cfg, folder, dpo)
        stage.finish(policies=["sft", *dpo])
    timing = disk.read_json(folder / "timing.json")
    if "cpu_s_per_chunk" not in timing:  # also after a kill between the two
        disk.write_json(folder / "timing.json", timing | {"cpu_s_per_chunk": costs(cfg, load_pairs(cfg))})
    agreement.report(cfg, folder)


if __name__ == "__main__":
    common.run(lambda: main(common.load_config(Config, "validate", sys.argv[1:])))
