"""The tables and plots of 07_validate.py: how well estimates of log p agree with the exact values.

R repeats of an estimate, N pairs, K draws. Intervals are 95 %, from resampling pairs; Wilson's for success
rates.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import common
from report import episodes, stats
from report.plots import INK, canvas, draw_rows, percents, save
from report.tables import grouped, joined, listing, percent, pivot
from runtime import disk

COLOURS = {
    "paper": "#1f77b4",
    "paper-noise": "#7fb2d9",
    "paper-elbo": "#2a9d8f",
    "antithetic": "#9467bd",
    "elbo": "#d9822b",
    "independent": "#8c8c8c",
    "exact": "#c0392b",
    "none": "#bbbbbb",
}


# ------------------------------------------------------------------------------------------------- statistics
def quantity(scores: Tensor, ref: Tensor | None, shared: bool) -> Tensor:
    """Scores (R, N, 2) of chosen and rejected -> difference, or with the reference's scores margin: (R, N).

    Not shared: each term comes from another repeat, so that no two terms share draws.
    """
    terms = [term for each in (scores, ref) if each is not None for term in each.unbind(-1)]
    if not shared:
        terms = [term.roll(i, 0) for i, term in enumerate(terms)]
    return terms[0] - terms[1] if ref is None else terms[0] - terms[1] - (terms[2] - terms[3])


def correlations(x: np.ndarray, y: np.ndarray, pair: np.ndarray) -> dict:
    """Pearson, Spearman and Kendall (tau-b): name -> (value, low, high). Intervals: 95 %, resampling pairs.

    pair: the pair that each point belongs to, 0, 1, ...  A resample gives each point a count c; ranks and
    orders stay those of the whole sample.
    """
    from scipy.stats import rankdata

    n = pair.max() + 1
    picks = common.np_stream(0, "correlations").integers(n, size=(500, n))
    c = np.stack([np.ones(n), *(np.bincount(pick, minlength=n) for pick in picks)])[:, pair]  # 1: the sample

    def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = (v - (c @ v / c.sum(1))[:, None] for v in (x, y))
        return (c * x * y).sum(1) / np.sqrt((c * x * x).sum(1) * (c * y * y).sum(1))

    before_x, before_y = (np.sign(v[:, None] - v[None]) for v in (x, y))

    def total(m: np.ndarray) -> np.ndarray:  # over ordered pairs of points
        return ((c @ m) * c).sum(1)

    with np.errstate(invalid="ignore"):  # a resample may hold one point alone
        values = {
            "pearson": pearson(x, y),
            "spearman": pearson(rankdata(x), rankdata(y)),
            "kendall": total(before_x * before_y) / np.sqrt(total(before_x**2) * total(before_y**2)),
        }
    return {name: (float(v[0]), *np.nanquantile(v[1:], (0.025, 0.975))) for name, v in values.items()}


def compare(estimates: Tensor, truth: Tensor, shared: Tensor | None = None) -> dict:
    """An estimator's differences or margins (R, N) against the exact ones (N,): metric -> (value, low, high).

    noise: the variance between repeats over that between pairs; at most 100, where the spread between pairs
    cannot be told from the noise.
    bias, scale: of the estimator's mean over endless repeats, so the mean's own noise is taken off.
    shared: the same estimates with shared draws, if those of `estimates` are separate. Separate ones come
    from rolled repeats and contain each draw twice, with either sign. So their mean is that of the shared
    ones, and their variance over repeats is too large by the noise that this mean lacks.
    """
    repeats, n = estimates.shape
    right = (estimates.sign() == truth.sign()).float()
    of_right = stats.cluster_bootstrap(right.flatten().numpy(), np.tile(np.arange(n), repeats))
    together = estimates if shared is None else shared
    mean, of_mean = together.mean(0).numpy(), together.var(0).numpy()
    variance = of_mean if shared is None else ((repeats - 1) * estimates.var(0).numpy() + of_mean) / repeats
    picks = np.stack(
        [np.arange(n), *common.np_stream(0, "noise").integers(n, size=(2000, n))]
    )  # first: the sample
    signal = mean[picks].var(1, ddof=1) - of_mean[picks].mean(1) / repeats  # between pairs, noise taken off
    noise = variance[picks].mean(1) / np.maximum(signal, variance[picks].mean(1) / 100 + 1e-12)
    spread = mean.var(ddof=1)
    told = spread / max(signal[0], spread / 100 + 1e-12)  # what noise takes off r^2 and slope
    bias = max(0.0, 1 - np.corrcoef(mean, truth)[0, 1] ** 2 * told)
    return {
        "sign agreement": (float(right.mean()), *of_right),
        "noise": (
            float(noise[0]),
            *((None, None) if noise[0] >= 99 else np.quantile(noise[1:], (0.025, 0.975))),
        ),
        "bias": (float(bias), None, None),
        # nats per unit of the estimator
        "scale": (float(np.cov(mean, truth)[0, 1] / spread * told), None, None),
    }


# ------------------------------------------------------------------------------------------------------- rows
def references(policy: str, measures: dict[str, dict]) -> dict[str, dict | None]:
    """The quantities of a policy -> the measures of the policy that is subtracted, if any."""
    return {"difference": None} if policy == "sft" else {"difference": None, "margin": measures["sft"]}


def always_positive(measures: dict[str, dict]) -> Iterator[dict]:
    """How often the exact difference or margin is positive, so how often guessing "positive" is right."""
    for policy, tensors in measures.items():
        for what, ref in references(policy, measures).items():
            won = quantity(tensors["exact"][None], ref and ref["exact"][None], True)[0] > 0
            yield {
                "policy": policy,
                "surrogate": "exact",
                "quantity": what,
                "metric": "positive",
                "value": won.float().mean().item(),
                "unit": "share",
                "n": len(won),
                "ci95": list(stats.wilson(int(won.sum()), len(won))),
            }


def estimator_rows(cfg, measures: dict[str, dict], dims: int) -> Iterator[dict]:
    """A row per policy, estimator, number of draws, quantity and metric.

    measures: policy -> tensors that 07 measured.  dims: dimensions of a chunk.
    """
    for policy, tensors in measures.items():
        truth, n = tensors["exact"], len(tensors["exact"])
        for key in [key for key in tensors if "/" in key]:
            name, k = key.split("/")[0], int(key.split("/")[1])
            estimates, tabled, results = tensors[key], k in (cfg.draws, cfg.max_draws), []
            if tabled:
                flat = estimates[0].flatten().numpy(), truth.flatten().numpy(), np.arange(n).repeat(2)
                results.append(({"shared": True, "quantity": "log p", "n": 2 * n}, correlations(*flat)))
            shareds = [False] if name == "independent" else [True, False]
            for shared, (what, ref) in itertools.product(shareds, references(policy, measures).items()):
                value, together = (quantity(estimates, ref and ref[key], each) for each in (shared, True))
                exact = quantity(truth[None], ref and ref["exact"][None], True)[0]
                metrics = compare(value, exact, None if shared else together)
                if tabled:
                    metrics |= correlations(value[0].numpy(), exact.numpy(), np.arange(n))
                results.append(({"shared": shared, "quantity": what, "n": n}, metrics))
            about = {
                "policy": policy,
                "surrogate": name,
                "draws": k,
                "passes": k,  # of the action expert per chunk; a vector-Jacobian product counts as one
                "passes_exact": 2 * cfg.ode_steps * (1 + dims),
            }
            for of, metrics in results:
                for metric, (value, low, high) in metrics.items():
                    bounds = None if low is None else [float(low), float(high)]
                    yield about | of | {"metric": metric, "value": value, "ci95": bounds}


def flow_facts(own: dict, pairs: Tensor) -> Iterator[dict]:
    """Facts about the exact likelihood itself, in nats: Euler's density, steps, probes, precision.

    own: measurements of a few chunks.  pairs: the exact log p (N, 2) of all pairs' chunks.
    """
    probes = torch.stack([own[f"probe/{i}"] for i in range(16)])
    # chosen less rejected
    between = {key: x[:, 0] - x[:, 1] for key, x in own.items() if key.startswith("pair/")}
    shared = torch.stack([between[f"pair/10/{i}"] for i in range(8)])
    preimages = "share of the pairs' chunks with a preimage found"
    ratio = "a pair's difference, variance of one shared probe over that between pairs"

    def rms(x: Tensor) -> Tensor:
        return x.square().mean().sqrt()

    facts = {
        "mean log p of own chunks, ODE": own["exact"].mean(),
        "mean log p of own chunks, Euler map": own["euler"].mean(),
        "Euler map less ODE, spread over chunks": (own["euler"] - own["exact"]).std(),
        preimages: own["inverse_found"].mean(),
        **{
            f"error of {steps} midpoint steps, root mean square": rms(own[f"steps/{steps}"] - own["steps/80"])
            for steps in (5, 10, 20, 40)
        },
        "float32 less float64, largest": (own["probe/0"].double() - own["float64"]).abs().max(),
        "Hutchinson, standard deviation of one probe": probes.var(0).mean().sqrt(),
        "Hutchinson, mean of 16 probes less exact trace": (probes.mean(0) - own["exact"]).mean(),
        **{
            f"a pair's difference, error of {steps} midpoint steps, root mean square": rms(
                between[f"pair/{steps}/0"] - between["pair/40/0"]
            )
            for steps in (5, 10, 20)
        },
        "a pair's difference, standard deviation of one shared probe": shared.var(0).mean().sqrt(),
        ratio: shared.var(0).mean() / (pairs[:, 0] - pairs[:, 1]).var(),
    }
    for metric, value in facts.items():
        yield {
            "policy": "sft",
            "surrogate": "exact",
            "metric": metric,
            "value": float(value),
            "unit": "" if metric in (preimages, ratio) else "nats",
            "n": len(own["inverse_found" if metric == preimages else "exact"]),
        }


def settling(cfg) -> Iterator[dict]:
    """Success on held-out init states by surrogate, over all evaluated training seeds, against `paper`."""
    names = {
        "none": cfg.variant("sft"),
        **{s: dataclasses.replace(cfg, surrogate=s).made_adapter.name for s in common.SURROGATES},
    }
    seed_dirs = sorted(cfg.seed_dir.parent.glob("seed*"))
    arms = {
        surrogate: [
            row
            for seed_dir in seed_dirs
            for _, played, _ in episodes.finished(seed_dir, f"eval-{name}", "test")
            for row in played
        ]
        for surrogate, name in names.items()
    }
    seeds = {row["seed"] for row in arms["exact"]}  # of the experiment with the exact likelihood
    for surrogate, every in arms.items():
        played = [row for row in every if not seeds or row["seed"] in seeds]
        is_dpo, summary = surrogate != "none", episodes.summarise(played)
        row = {
            "policy": "dpo" if is_dpo else "sft",
            "surrogate": surrogate,
            "name": f"{surrogate if is_dpo else 'sft'}, seeds together",
            "adapter": cfg.adapter if is_dpo else "none",
            "train_seeds": sorted({episode["seed"] for episode in played}),
            **{key: summary[key] for key in ("n", "successes", "ci95")},
        }
        test = episodes.paired(played, arms["paper"])
        if surrogate != "paper" and test["paired_n"]:
            row |= {
                "gained_vs_paper": test["gained"],
                "lost_vs_paper": test["lost"],
                "p_vs_paper": test["p_vs_sft"],
                "paired_n": test["paired_n"],
            }
        if row["n"]:
            yield row


# ----------------------------------------------------------------------------------------------------- tables
def draws_needed(rows: list[dict]) -> str:
    """The fewest draws with 95 % sign agreement, from the rows of one estimator."""
    signs = {row["draws"]: row["value"] for row in rows if row["metric"] == "sign agreement"}
    enough = [draws for draws, value in signs.items() if value >= 0.95]
    return str(min(enough)) if enough else f"not reached by {max(signs)}"


def with_interval(row: dict) -> str:
    return f"{row['value']:.3g}" + (" ({:.2g} to {:.2g})".format(*row["ci95"]) if row["ci95"] else "")


def estimator_tables(rows: list[dict], cfg) -> str:
    """Markdown: the estimators at cfg.draws and at cfg.max_draws, a table per policy and quantity."""
    parts = []
    for (policy, what), of_policy in grouped(rows, "policy", "quantity").items():
        needed = {
            key: draws_needed(same)
            for key, same in grouped(of_policy, "surrogate", "shared").items()
            if what != "log p"
        }
        lines = [
            {
                "estimator": name,
                "draws": k,
                "noise shared": "yes" if shared else "no",
                **{row["metric"]: with_interval(row) for row in metrics},
                **({"draws for 95 % sign": needed[name, shared]} if needed else {}),
                "passes / exact": f"1/{metrics[0]['passes_exact'] / k:.0f}",
            }
            for (name, k, shared), metrics in grouped(of_policy, "surrogate", "draws", "shared").items()
            if k in (cfg.draws, cfg.max_draws)
        ]
        parts += [
            f"### {policy}: {what}, n = {of_policy[0]['n']}\n",
            listing(lines, {key: itemgetter(key) for key in lines[0]}) + "\n",
        ]
    return "\n".join(parts)


def gradient_table(cosines: list[dict]) -> str:
    if not cosines:
        return (
            "not measured: no LoRA policy has been trained on these pairs (03_dpo.py), "
            "or validate.gradient_batches is 0\n"
        )

    def cell(rows: list[dict]) -> str:
        values = [row["cosine"] for row in rows]
        return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    exact = {"estimator": "exact: this many probes against others"}
    rows = [row | exact if row["estimator"] == "exact" else row for row in cosines]
    return (
        pivot(rows, ["estimator", "draws"], "state", {"start": "first step", "end": "last step"}, cell) + "\n"
    )


def arms_table(arms: list[dict]) -> str:
    if not arms:
        return "not run (04_eval.py)\n"
    return (
        listing(
            arms,
            {
                "surrogate": lambda arm: "SFT start" if arm["surrogate"] == "none" else arm["surrogate"],
                "success": "{successes} / {n}",
                "95 % interval": lambda arm: percent(arm["ci95"]),
                "seeds": lambda arm: joined(arm["train_seeds"]),
                "gained / lost against paper": lambda arm: (
                    f"{arm['gained_vs_paper']} / {arm['lost_vs_paper']}" if "p_vs_paper" in arm else ""
                ),
                "p": lambda arm: f"{arm['p_vs_paper']:.2g}" if "p_vs_paper" in arm else "",
            },
        )
        + "\n"
    )


# ------------------------------------------------------------------------------------------------------ plots
def draw_panels(
    cfg, measures: dict[str, dict], rows: list[dict], cosines: list[dict], arms: list[dict], path: Path
) -> None:
    trained = [policy for policy in measures if policy != "sft"]
    shown, what = (trained[0], "margin") if trained else ("sft", "difference")
    title = f"Surrogate against exact likelihood: {cfg.name}, {cfg.pairs} pairs, start {cfg.start}"
    figure, grid = canvas(15, 8.4, 2, 3, title=title)
    scores = {"xlabel": "exact, nats", "ylabel": "paper's surrogate"}
    panels = [
        {"title": f"log p of chunks, SFT policy, {cfg.draws} draws", **scores},
        {"title": f"DPO margin, {cfg.draws} shared draws", **scores},
        {
            "title": "Bias against t: what one time alone leaves unexplained",
            "xlabel": "t (1 is noise)",
            "ylabel": "1 - r^2",
            "ylim": (0, 1),
        },
        {
            "title": f"Noise of the {what} (dashed: own draws)",
            "xlabel": "draws",
            "ylabel": "variance of the estimate / between pairs",
            "yscale": "log",
        },
        {
            "title": "Gradient: cosine with the exact one (dashed: last step)",
            "xlabel": "draws",
            "ylabel": "cosine",
        },
        {
            "title": "Success after DPO on held-out init states" + ("" if arms else ": not run"),
            "xlabel": "success, % (Wilson 95 %)",
            "xlim": (0, 100),
        },
    ]
    for ax, labels in zip(grid.flat, panels, strict=True):
        ax.grid()
        ax.set(**labels)
    log_p, margin, by_time, noise, gradient, success = grid.flat
    sft, estimate = measures["sft"], f"paper/{cfg.draws}"
    for side, label in enumerate(("chosen", "rejected")):
        log_p.scatter(sft["exact"][:, side], sft[estimate][0, :, side], s=10, alpha=0.7, label=label)
    unexplained(by_time, "sft: log p", sft["by_time"].flatten(1), sft["exact"].flatten())
    for policy in trained:
        own = measures[policy]
        exact = quantity(own["exact"][None], sft["exact"][None], True)[0]
        margin.scatter(exact, quantity(own[estimate], sft[estimate], True)[0], s=10, alpha=0.7, label=policy)
        unexplained(by_time, f"{policy}: margin", quantity(own["by_time"], sft["by_time"], True), exact)
    margin.axhline(0, color=INK, linewidth=0.8)
    margin.axvline(0, color=INK, linewidth=0.8)
    lines_by_draws(
        noise,
        [
            row | {"name": row["surrogate"], "solid": row["shared"]}
            for row in rows
            if (row["policy"], row["quantity"], row["metric"]) == (shown, what, "noise")
        ],
    )
    lines_by_draws(
        gradient,
        [
            row | {"name": row["estimator"], "solid": row["state"] == "start", "value": row["cosine"]}
            for row in cosines
        ],
    )
    draw_rows(
        success,
        ["SFT" if arm["surrogate"] == "none" else arm["surrogate"] for arm in arms],
        *percents(arms),
        [COLOURS[arm["surrogate"]] for arm in arms],
        [f"{arm['successes']}/{arm['n']}" for arm in arms],
    )
    for ax in grid.flat:
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
    save(figure, path)


def unexplained(ax, label: str, by_time: Tensor, exact: Tensor) -> None:
    """1 - r^2 between the velocity error at one time alone, its noise averaged out, and the exact values."""
    strata = by_time.unflatten(0, (-1, max(1, len(by_time) // 16))).mean(1)  # 16 times at most
    values = [1 - np.corrcoef(at, exact)[0, 1] ** 2 for at in strata]
    ax.plot((np.arange(len(strata)) + 0.5) / len(strata), values, "o-", markersize=3, label=label)


def lines_by_draws(ax, rows: list[dict]) -> None:
    """Means of the rows' values against their draws: a line for each name, another one where not `solid`."""
    solid_ones = {row["name"] for row in rows if row["solid"]}
    for (name, solid), of_line in grouped(rows, "name", "solid").items():
        values = {
            draws: [row["value"] for row in same] for (draws,), same in grouped(of_line, "draws").items()
        }
        label = "exact: probes against others" if name == "exact" else name
        ax.plot(
            sorted(values),
            [np.mean(values[draws]) for draws in sorted(values)],
            "o-" if solid else "o--",
            color=COLOURS[name],
            markersize=3,
            label=label if solid or name not in solid_ones else None,
        )
    if rows:
        ax.set_xscale("log", base=2)


# ----------------------------------------------------------------------------------------------------- report
def report(cfg, folder: Path) -> None:
    """Write <folder>.json, .md and .png beside a finished folder of 07, with the evaluations (04) so far."""
    measures: dict[str, dict] = {"sft": {}}
    stored = disk.load_tensors(folder / "measures.safetensors")
    for key in sorted(stored, key=lambda key: key.partition("|")[0]):
        policy, _, name = key.partition("|")
        measures.setdefault(policy, {})[name] = stored[key]
    cosines, own = disk.read_jsonl(folder / "gradients.jsonl"), disk.load_tensors(folder / "own.safetensors")
    timing, arms = disk.read_json(folder / "timing.json"), list(settling(cfg))
    seconds = timing["cpu_s_per_chunk"]
    rows = list(estimator_rows(cfg, measures, own["chunk"][0].numel()))
    positive, facts = list(always_positive(measures)), list(flow_facts(own, measures["sft"]["exact"]))
    about = {
        "suite": " ".join(cfg.suites),
        "backbone": cfg.backbone,
        "pairs": cfg.pairs,
        "start": cfg.start,
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
    costs = [
        {"metric": "cost per chunk", "unit": "CPU s", "surrogate": name, "value": value}
        for name, value in seconds.items()
    ]
    disk.write_json(
        folder.with_suffix(".json"),
        [about | row for row in (*rows, *positive, *facts, *gradients, *costs, *arms)],
    )
    draw_panels(cfg, measures, rows, cosines, arms, folder.with_suffix(".png"))
    text = "\n".join(
        [
            f"# {cfg.name}, {cfg.pairs} pairs, start {cfg.start}, seed {cfg.seed}\n",
            estimator_tables(rows, cfg),
            "## The exact likelihood itself\n",
            *("- {policy}, {quantity} above 0: {value:.3f} of {n} pairs".format(**row) for row in positive),
            *("- {metric}: {value:.4g} {unit} (n = {n})".format(**row) for row in facts),
            "\n## Cosine between the DPO gradients of an estimator and of the exact likelihood\n",
            gradient_table(cosines),
            "## CPU seconds per chunk\n",
            listing(
                [{"name": name, "s": s, "ratio": seconds["exact"] / s} for name, s in seconds.items()],
                {"": "{name}", "CPU s": "{s:.4f}", "of exact": "1/{ratio:.0f}"},
            ),
            "",
            "## Success after DPO\n",
            arms_table(arms),
            f"`{timing['command']}` at {timing['commit']}",
        ]
    )
    disk.write_atomic(folder.with_suffix(".md"), text + "\n")
    print(text, flush=True)
