"""The tables of 07_validate.py: how well estimates of log p agree with the exact values.

R repeats of an estimate, N pairs, K draws. Intervals are 95 % and over attempts: pairs of one attempt of 02
belong together.
"""

import itertools
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

import numpy as np
from torch import Tensor

import common
from report import stats
from report.tables import grouped, listing, pivot, publish
from runtime import disk


# ------------------------------------------------------------------------------------------------- statistics
def quantity(scores: Tensor, ref: Tensor | None, shared: bool) -> Tensor:
    """Scores (R, N, 2) of chosen and rejected -> difference, or with the reference's scores margin: (R, N).

    Not shared: each term comes from another repeat, so that no two terms share draws.
    """
    terms = [term for each in (scores, ref) if each is not None for term in each.unbind(-1)]
    terms = [term.roll(0 if shared else i, 0) for i, term in enumerate(terms)]
    return terms[0] - terms[1] if ref is None else terms[0] - terms[1] - (terms[2] - terms[3])


def resampled(attempt: np.ndarray, n: int, purpose: str) -> np.ndarray:
    """How often each value counts (n + 1, N) in resamples of whole attempts; once each in the first row."""
    _, attempt = np.unique(attempt, return_inverse=True)
    m = attempt.max() + 1
    picks = common.np_stream(0, purpose).integers(m, size=(n, m))
    return np.stack([np.ones(m), *(np.bincount(pick, minlength=m) for pick in picks)])[:, attempt]


def correlations(x: np.ndarray, y: np.ndarray, attempt: np.ndarray) -> dict:
    """Pearson and Spearman: name -> (value, low, high).

    attempt: what each point belongs to. Resamples give each point a count c and leave its rank.
    """
    from scipy.stats import rankdata

    c = resampled(attempt, 500, "correlations")

    def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = (v - (c @ v / c.sum(1))[:, None] for v in (x, y))
        return (c * x * y).sum(1) / np.sqrt((c * x * x).sum(1) * (c * y * y).sum(1))

    with np.errstate(invalid="ignore"):  # a resample may hold one point alone
        values = {"pearson": pearson(x, y), "spearman": pearson(rankdata(x), rankdata(y))}
    return {name: (float(v[0]), *np.nanquantile(v[1:], (0.025, 0.975))) for name, v in values.items()}


def right_signs(estimates: Tensor, truth: Tensor, attempt: np.ndarray) -> tuple[float, float, float]:
    """How often estimates (R, N) have the sign of the truth (N,), with its interval."""
    right = (estimates.sign() == truth.sign()).double().flatten().numpy()
    return float(right.mean()), *stats.share_over_clusters(right, np.tile(attempt, len(estimates)))


def compare(estimates: Tensor, truth: Tensor, attempt: np.ndarray, shared: Tensor | None = None) -> dict:
    """An estimator's differences or margins (R, N) against the exact ones (N,): metric -> (value, low, high).

    noise: the variance between repeats over that between pairs; at most 100, where the spread between pairs
    cannot be told from the noise.
    bias, scale: of the estimator's mean over endless repeats, so the mean's own noise is taken off.
    shared: the same estimates with shared draws; give it where `estimates` come from rolled repeats. Those
    use every draw twice, with opposite signs. So their mean equals the shared ones', and their variance over
    repeats is too large by the noise that this mean lacks, which is corrected here.
    """
    repeats, n = estimates.shape
    together = estimates if shared is None else shared
    mean, of_mean = together.mean(0).double().numpy(), together.var(0).double().numpy()
    variance = of_mean if shared is None else ((repeats - 1) * estimates.var(0).numpy() + of_mean) / repeats
    c = resampled(attempt, 2000, "noise")
    c /= c.sum(1, keepdims=True)
    between = (c @ mean**2 - (c @ mean) ** 2) * n / (n - 1)
    signal = between - c @ of_mean / repeats  # noise taken off
    noise = c @ variance / np.maximum(signal, c @ variance / 100 + 1e-12)
    told = between[0] / max(signal[0], between[0] / 100 + 1e-12)  # what noise takes off r^2 and slope
    bias = max(0.0, 1 - np.corrcoef(mean, truth)[0, 1] ** 2 * told)
    bounds = (None, None) if noise[0] >= 99 else np.quantile(noise[1:], (0.025, 0.975))
    slope = np.cov(mean, truth)[0, 1] / between[0] * told  # nats per unit of the estimator
    return {
        "sign agreement": right_signs(estimates, truth, attempt),
        "noise": (float(noise[0]), *bounds),
        "bias": (float(bias), None, None),
        "scale": (float(slope), None, None),
    }


# ------------------------------------------------------------------------------------------------------- rows
def references(policy: str, measures: dict[str, dict]) -> dict[str, dict | None]:
    """The quantities of a policy -> the measures of the policy that is subtracted, if any."""
    return {"difference": None} if policy == "sft" else {"difference": None, "margin": measures["sft"]}


def exact_values(cfg, measures: dict, policy: str, what: str, ref: dict | None, attempt: np.ndarray) -> tuple:
    """The exact difference or margin of all pairs, and which pairs count for it.

    For margins they are the pairs that DPO was not trained on, where there are any.
    """
    kept = attempt % (cfg.held_out if cfg.held_out and what == "margin" else 1) == 0
    return quantity(measures[policy]["exact"][None], ref and ref["exact"][None], True)[0], kept


def base_rates(cfg, measures: dict[str, dict], attempt: np.ndarray) -> Iterator[dict]:
    """How often guessing is right without looking: always "positive", or the better of both constant guesses.

    And the exact difference or margin itself, in nats: of a margin, the treatment that DPO has delivered.
    Where pairs are held out, also that of the pairs that DPO was trained on.
    """
    for policy in measures:
        for what, ref in references(policy, measures).items():
            every, kept = exact_values(cfg, measures, policy, what, ref, attempt)
            parts = {what: kept} | ({} if kept.all() else {"margin of trained pairs": ~kept})
            for name, part in parts.items():
                exact = every[part].double().numpy()
                positive = (exact > 0).astype(float)
                share, sources = positive.mean(), attempt[part]
                about = {"policy": policy, "surrogate": "exact", "quantity": name, "n": len(exact)}
                yield about | {"metric": "blind guess", "unit": "share", "value": max(share, 1 - share)}
                interval = stats.share_over_clusters(positive, sources)
                yield about | {"metric": "positive", "unit": "share", "value": share, "ci95": interval}
                interval = stats.over_clusters(exact, sources)
                yield about | {"metric": "mean", "unit": "nats", "value": exact.mean(), "ci95": interval}


def estimator_rows(cfg, measures: dict[str, dict], dims: int, attempt: np.ndarray) -> Iterator[dict]:
    """A row per policy, estimator, number of draws, quantity and metric.

    measures: policy -> tensors that 07 measured.  dims: dimensions of a chunk.
    """
    for policy, tensors in measures.items():
        names = {key: key for key in tensors if "/" in key} | {"by_time": f"paper, one time/{cfg.draws}"}
        for key, (name, _, k) in {key: name.partition("/") for key, name in names.items()}.items():
            estimates, tabled = tensors[key], int(k) in (cfg.draws, cfg.max_draws)
            about = {
                "policy": policy,
                "surrogate": name,
                "draws": int(k),
                "passes": int(k),  # of the action expert per chunk; a vector-Jacobian product counts as one
                "passes_exact": 2 * cfg.ode_steps * (1 + dims),
            }
            if tabled:
                flat = estimates[0].flatten().numpy(), tensors["exact"].flatten().numpy()
                of = {"shared": True, "quantity": "log p", "n": 2 * len(attempt)}
                yield from rows_of(about | of, correlations(*flat, attempt.repeat(2)))
            shareds = {"independent": [False], "paper, one time": [True]}.get(name, [True, False])
            for shared, (what, ref) in itertools.product(shareds, references(policy, measures).items()):
                every, kept = exact_values(cfg, measures, policy, what, ref, attempt)
                if kept.sum() < 2:  # held out
                    continue
                value, together = (
                    quantity(estimates, ref and ref[key], each)[:, kept] for each in (shared, True)
                )
                exact = every[kept]
                metrics = compare(value, exact, attempt[kept], None if shared else together)
                if tabled:
                    metrics |= correlations(value[0].numpy(), exact.numpy(), attempt[kept])
                yield from rows_of(about | {"shared": shared, "quantity": what, "n": len(exact)}, metrics)


def rows_of(about: dict, metrics: dict[str, tuple]) -> Iterator[dict]:
    """A row for each metric: (value, low, high), where the last two may be None."""
    for metric, (value, low, high) in metrics.items():
        bounds = None if low is None else [float(low), float(high)]
        yield about | {"metric": metric, "value": value, "ci95": bounds}


def against_what_acts(cfg, sft: dict, attempt: np.ndarray) -> Iterator[dict]:
    """The differences within pairs against those of the Euler map's density, where the noise is known."""
    known = sft["euler"].isfinite().all(1)
    if known.sum() < 3:
        return
    truth, attempt = quantity(sft["euler"][None, known], None, True)[0], attempt[known.numpy()]
    about = {"policy": "sft", "quantity": "difference", "against": "euler", "n": len(truth)}
    keys = [key for key in sft if "/" in key and int(key.split("/")[1]) in (cfg.draws, cfg.max_draws)]
    for key in ["exact", *keys]:
        name, _, k = key.partition("/")
        value = quantity((sft[key] if k else sft[key][None])[:, known], None, name != "independent")
        metrics = {
            "spearman": correlations(value[0].numpy(), truth.numpy(), attempt)["spearman"],
            "sign agreement": right_signs(value, truth, attempt),
        }
        if name == "exact":
            metrics["spread"] = (truth - value[0]).std().item(), None, None
        yield from rows_of(about | {"surrogate": name, "draws": int(k or 0)}, metrics)
    positive = (truth > 0).double().numpy()
    yield from rows_of(
        about | {"surrogate": "always positive", "draws": 0},
        {"sign agreement": (positive.mean(), *stats.share_over_clusters(positive, attempt))},
    )


# ----------------------------------------------------------------------------------------------------- tables
def with_interval(row: dict) -> str:
    return f"{row['value']:.3g}" + (" ({:.2g} to {:.2g})".format(*row["ci95"]) if row.get("ci95") else "")


def estimator_tables(rows: list[dict], guesses: list[dict], cfg) -> str:
    """Markdown: the estimators at cfg.draws and at cfg.max_draws, a table per policy and quantity.

    guesses: from base_rates; what guessing without looking has stands beside every agreement of signs.
    """
    parts, blind = [], grouped(guesses, "policy", "quantity")
    for (policy, what), of_policy in grouped(rows, "policy", "quantity").items():
        lines = [
            {
                "estimator": name,
                "draws": k,
                "noise shared": "yes" if shared else "no",
                **{row["metric"]: with_interval(row) for row in metrics},
                "passes / exact": f"1/{metrics[0]['passes_exact'] / k:.0f}",
            }
            for (name, k, shared), metrics in grouped(of_policy, "surrogate", "draws", "shared").items()
            if k in (cfg.draws, cfg.max_draws)
        ]
        for row in blind.get((policy, what), []):
            if row["metric"] != "mean":
                name = "always positive" if row["metric"] == "positive" else "the better constant guess"
                lines.append(
                    dict.fromkeys(lines[0], "") | {"estimator": name, "sign agreement": with_interval(row)}
                )
        untrained = ", held-out pairs" if cfg.held_out and what == "margin" else ""
        parts += [
            f"### {policy}: {what}, n = {of_policy[0]['n']}{untrained}\n",
            listing(lines, {key: itemgetter(key) for key in lines[0]}) + "\n",
        ]
    return "\n".join(parts)


def acting_table(rows: list[dict]) -> str:
    if not rows:
        return "not measured: the noise behind the chunks is not known (that of branch pairs is)\n"
    heads = {
        "spearman": "rank correlation",
        "sign agreement": "right sign",
        "spread": "sd of the difference, nats",
    }
    return pivot(rows, ["surrogate", "draws"], "metric", heads, lambda same: with_interval(same[0])) + "\n"


def gradient_table(cosines: list[dict]) -> str:
    if not cosines:
        return (
            "not measured: no LoRA policy has been trained on these pairs (03_dpo.py), "
            "or validate.gradient_batches is 0\n"
        )

    def cell(rows: list[dict]) -> str:
        values = [row["cosine"] for row in rows]
        return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    return (
        pivot(cosines, ["estimator", "draws"], "state", {"start": "first step", "end": "last step"}, cell)
        + "\n"
    )


# ----------------------------------------------------------------------------------------------------- report
def report(cfg, folder: Path) -> None:
    """Write <folder>.json and .md beside a finished folder of 07."""
    measures: dict[str, dict] = {"sft": {}}
    stored = disk.load_tensors(folder / "measures.safetensors")
    attempt, dims = stored.pop("sft|attempt").numpy(), int(stored.pop("sft|dims")[0])
    for key in sorted(stored, key=lambda key: key.partition("|")[0]):
        policy, _, name = key.partition("|")
        measures.setdefault(policy, {})[name] = stored[key]
    cosines, timing = disk.read_jsonl(folder / "gradients.jsonl"), disk.read_json(folder / "timing.json")
    rows = list(estimator_rows(cfg, measures, dims, attempt))
    guesses = list(base_rates(cfg, measures, attempt))
    acts = list(against_what_acts(cfg, measures["sft"], attempt))
    about = {
        "suite": " ".join(cfg.suites),
        "backbone": cfg.backbone,
        "pairs": cfg.pairs,
        "start": cfg.start,
        "train_seeds": [cfg.start_seed or cfg.seed],
        "command": timing["command"],
        "commit": timing["commit"],
    }
    gradients = [
        row
        | {
            "policy": "dpo",
            "metric": "gradient cosine",
            "surrogate": row["estimator"],
            "value": row["cosine"],
        }
        for row in cosines
    ]
    text = "\n".join(
        [
            f"# {cfg.name}, {cfg.pairs} pairs, start {cfg.start}, seed {cfg.seed}\n",
            f"{len(attempt)} pairs of {len(np.unique(attempt))} attempts.\n",
            estimator_tables(rows, guesses, cfg),
            "## Against the density of the Euler map, which acts\n",
            acting_table(acts),
            "## The exact values themselves\n",
            *(
                "- {policy}, {quantity}, {metric}: {} {unit} (n = {n})".format(with_interval(row), **row)
                for row in guesses
            ),
            "\n## Cosine between the DPO gradients of an estimator and of the exact likelihood\n",
            "(Of the exact one: with this many probes, against others.)\n",
            gradient_table(cosines),
            f"`{timing['command']}` at {timing['commit']}",
        ]
    )
    publish(folder, [about | row for row in [*rows, *guesses, *acts, *gradients]], text)
