"""Tables and plots of stage 07: how well estimates of log p agree with the exact values. Computes from what 07 has measured.

R repeats of an estimate, N pairs, K draws. Intervals are 95 %, by resampling pairs, or Wilson's for success rates.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import common
import disk
import episodes
import stats

INK, GRID = "#222222", "#dddddd"
COLOURS = {"paper": "#1f77b4", "paper-noise": "#7fb2d9", "paper-elbo": "#2a9d8f", "antithetic": "#9467bd", "elbo": "#d9822b"}
COLOURS |= {"independent": "#8c8c8c", "exact": "#c0392b", "none": "#bbbbbb"}


# ------------------------------------------------------------------------------------------------- statistics
def quantity(scores: Tensor, ref: Tensor | None, shared: bool) -> Tensor:
    """Scores (R, N, 2) of chosen and rejected -> difference, or with the reference's scores margin: (R, N).

    Not shared: the terms are taken from different repeats, whose draws are independent.
    """

    def term(x: Tensor, i: int) -> Tensor:
        return x if shared else x.roll(i, 0)

    difference = scores[..., 0] - term(scores[..., 1], 1)
    return difference if ref is None else difference - (term(ref[..., 0], 2) - term(ref[..., 1], 3))


def correlations(x: np.ndarray, y: np.ndarray, pair: np.ndarray) -> dict:
    """Pearson, Spearman and Kendall (tau-b), each with a 95 % interval from resampling pairs: name -> (value, low, high).

    A resample is a count c of each point; ranks and orders are the whole sample's. pair: that of each point, 0, 1, ...
    """
    from scipy.stats import rankdata

    n = pair.max() + 1
    picks = common.np_stream(0, "correlations").integers(n, size=(500, n))
    c = np.stack([np.ones(n), *(np.bincount(pick, minlength=n) for pick in picks)])[:, pair]  # the sample itself comes first

    def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = (v - (c @ v / c.sum(1))[:, None] for v in (x, y))
        return (c * x * y).sum(1) / np.sqrt((c * x * x).sum(1) * (c * y * y).sum(1))

    before_x, before_y = (np.sign(v[:, None] - v[None]) for v in (x, y))

    def total(m: np.ndarray) -> np.ndarray:  # over ordered pairs of points
        return ((c @ m) * c).sum(1)

    with np.errstate(invalid="ignore"):  # a resample of one point alone
        tau = total(before_x * before_y) / np.sqrt(total(before_x**2) * total(before_y**2))
        found = {"pearson": pearson(x, y), "spearman": pearson(rankdata(x), rankdata(y)), "kendall": tau}
    return {name: (float(v[0]), *np.nanquantile(v[1:], (0.025, 0.975))) for name, v in found.items()}


def compare(estimates: Tensor, truth: Tensor, shared: Tensor | None = None) -> dict:
    """An estimator's differences or margins (R, N) against the exact ones (N,): name of a metric -> (value, low, high).

    shared: the same with shared draws, where those of `estimates` are not. Rolled repeats have each draw twice, with either
    sign: their mean is the shared one's, and their variance over repeats s^2 is too large, by what the mean lacks.
    A noise of 100 is the most that is said: no spread between pairs can be told from the repeats' own. Bias and scale are those
    of the estimator's mean over endless repeats: the mean's own noise is taken off.
    """
    right = (estimates.sign() == truth.sign()).float()
    repeats, n = estimates.shape
    pair = np.tile(np.arange(n), repeats)
    together = estimates if shared is None else shared
    mean, of_mean = together.mean(0).numpy(), together.var(0).numpy()
    variance = of_mean if shared is None else ((repeats - 1) * estimates.var(0).numpy() + of_mean) / repeats
    picks = np.stack([np.arange(n), *common.np_stream(0, "noise").integers(n, size=(2000, n))])  # the sample itself comes first
    signal = mean[picks].var(1, ddof=1) - of_mean[picks].mean(1) / repeats  # between pairs, noise taken off
    noise = variance[picks].mean(1) / np.maximum(signal, variance[picks].mean(1) / 100 + 1e-12)
    interval = (None, None) if noise[0] >= 99 else tuple(np.quantile(noise[1:], (0.025, 0.975)))
    told = mean.var(ddof=1) / max(signal[0], mean.var(ddof=1) / 100 + 1e-12)  # what noise takes off r^2 and slope
    r = np.corrcoef(mean, truth)[0, 1]
    return {
        "sign agreement": (float(right.mean()), *stats.cluster_bootstrap(right.flatten().numpy(), pair)),
        "noise": (float(noise[0]), *interval),
        "bias": (float(max(0.0, 1 - r**2 * told)), None, None),
        "scale": (float(np.cov(mean, truth)[0, 1] / mean.var(ddof=1) * told), None, None),  # nats per unit of the estimator
    }


def always_positive(found: dict[str, dict]) -> list[dict]:
    """How often the exact difference or margin is positive: the sign agreement of a guess that never looks."""
    rows = []
    for policy, tensors in found.items():
        for what, ref in [("difference", None)] + [("margin", found["sft"]["exact"][None])] * (policy != "sft"):
            won = quantity(tensors["exact"][None], ref, True)[0] > 0
            row = {"policy": policy, "surrogate": "exact", "quantity": what, "metric": "positive"}
            rows.append(row | {"value": won.float().mean().item(), "unit": "share", "n": len(won)})
            rows[-1]["ci95"] = list(stats.wilson(int(won.sum()), len(won)))
    return rows


def passes(name: str, k: int, cfg, dims: int) -> int:
    """Passes of the action expert per chunk; a vector-Jacobian product is counted as one."""
    return k if name != "exact" else 2 * cfg.ode_steps * (1 + (cfg.probes or dims))


def table(cfg, found: dict[str, dict], dims: int) -> list[dict]:
    """A row per policy, estimator, number of draws, quantity and metric. found: policy -> tensors of `measure`."""
    rows, reference = [], found["sft"]

    def add(policy: str, name: str, k: int, shared: bool, what: str, metrics: dict, n: int) -> None:
        row = {"policy": policy, "surrogate": name, "draws": k, "shared": shared, "quantity": what, "n": n}
        row |= {"passes": passes(name, k, cfg, dims), "passes_exact": passes("exact", 0, cfg, dims)}
        for metric, (value, low, high) in metrics.items():
            rows.append(row | {"metric": metric, "value": value, "ci95": None if low is None else [float(low), float(high)]})

    for policy, tensors in found.items():
        truth, ref = tensors["exact"], None if policy == "sft" else reference
        n = len(truth)
        for key in [key for key in tensors if "/" in key]:
            name, k = key.split("/")[0], int(key.split("/")[1])
            if k in (cfg.draws, cfg.max_draws):
                log_p = correlations(tensors[key][0].flatten().numpy(), truth.flatten().numpy(), np.arange(n).repeat(2))
                add(policy, name, k, True, "log p", log_p, 2 * n)
            for shared in [False] if name == "independent" else [True, False]:
                for what, base in [("difference", None)] + ([("margin", ref)] if ref else []):
                    value = quantity(tensors[key], base and base[key], shared)
                    exactly = quantity(truth[None], base and base["exact"][None], True)[0]
                    metrics = compare(value, exactly, None if shared else quantity(tensors[key], base and base[key], True))
                    if k in (cfg.draws, cfg.max_draws):
                        metrics |= correlations(value[0].numpy(), exactly.numpy(), np.arange(n))
                    add(policy, name, k, shared, what, metrics, n)
    return rows


def draws_needed(rows: list[dict], policy: str, name: str, shared: bool, what: str) -> str:
    """The fewest draws with 95 % sign agreement."""
    mine = [r for r in rows if r["metric"] == "sign agreement" and r["quantity"] == what and r["policy"] == policy]
    mine = [r for r in mine if (r["surrogate"], r["shared"]) == (name, shared)]
    enough = [r["draws"] for r in mine if r["value"] >= 0.95]
    return str(min(enough)) if enough else f"not reached by {max(r['draws'] for r in mine)}"


def markdown(rows: list[dict], cfg) -> str:
    """The comparison of estimators at cfg.draws and at cfg.max_draws, one table per policy and quantity."""
    said = []
    for policy, what in dict.fromkeys((r["policy"], r["quantity"]) for r in rows):
        mine = [r for r in rows if (r["policy"], r["quantity"]) == (policy, what) and r["draws"] in (cfg.draws, cfg.max_draws)]
        metrics = list(dict.fromkeys(r["metric"] for r in mine))
        tail = ["draws for 95 % sign"] * (what != "log p") + ["passes / exact"]
        said.append(f"### {policy}: {what}, n = {mine[0]['n']}\n")
        said.append("| " + " | ".join(["estimator", "draws", "noise shared", *metrics, *tail]) + " |")
        said.append("|---" * (3 + len(metrics) + len(tail)) + "|")
        for name, k, shared in dict.fromkeys((r["surrogate"], r["draws"], r["shared"]) for r in mine):
            of = {r["metric"]: r for r in mine if (r["surrogate"], r["draws"], r["shared"]) == (name, k, shared)}
            cells = [name, str(k), "yes" if shared else "no"]
            for metric in metrics:
                low, high = of[metric]["ci95"] or (None, None)
                cells.append(f"{of[metric]['value']:.3g}" + (f" ({low:.2g} to {high:.2g})" if low is not None else ""))
            cells += [draws_needed(rows, policy, name, shared, what)] if tail[1:] else []
            cells.append(f"1/{next(iter(of.values()))['passes_exact'] / k:.0f}")
            said.append("| " + " | ".join(cells) + " |")
        said.append("")
    return "\n".join(said)


def flow_facts(own: dict, pairs: Tensor) -> list[dict]:
    """What some chunks say of the exact likelihood itself, in nats: Euler's density, steps, probes, precision.

    pairs: the exact log p (N, 2) of all pairs' chunks.
    """
    rows, n = [], len(own["exact"])
    probes = torch.stack([own[f"probe/{i}"] for i in range(16)])

    def add(metric: str, value, n: int = n, unit: str = "nats") -> None:
        rows.append({"policy": "sft", "surrogate": "exact", "metric": metric, "value": float(value), "unit": unit, "n": n})

    add("mean log p of own chunks, ODE", own["exact"].mean())
    add("mean log p of own chunks, Euler map", own["euler"].mean())
    add("Euler map less ODE, spread over chunks", (own["euler"] - own["exact"]).std())
    add("share of the pairs' chunks with a preimage found", own["inverse_found"].mean(), len(own["inverse_found"]), "")
    for steps in (5, 10, 20, 40):
        add(
            f"error of {steps} midpoint steps, root mean square", (own[f"steps/{steps}"] - own["steps/80"]).square().mean().sqrt()
        )
    add("float32 less float64, largest", (own["probe/0"].double() - own["float64"]).abs().max())
    add("Hutchinson, standard deviation of one probe", probes.var(0).mean().sqrt())
    add("Hutchinson, mean of 16 probes less exact trace", (probes.mean(0) - own["exact"]).mean())
    difference = {key: x[:, 0] - x[:, 1] for key, x in own.items() if key.startswith("pair/")}  # chosen less rejected
    for steps in (5, 10, 20):
        error = difference[f"pair/{steps}/0"] - difference["pair/40/0"]
        add(f"a pair's difference, error of {steps} midpoint steps, root mean square", error.square().mean().sqrt())
    shared = torch.stack([difference[f"pair/10/{i}"] for i in range(8)])
    add("a pair's difference, standard deviation of one shared probe", shared.var(0).mean().sqrt())
    spread = (pairs[:, 0] - pairs[:, 1]).var()
    add("a pair's difference, variance of one shared probe over that between pairs", shared.var(0).mean() / spread, unit="")
    return rows


def settling(cfg) -> list[dict]:
    """Success on held-out init states by surrogate, over all training seeds that were evaluated, paired with `paper`."""
    played = {}
    for surrogate in ("none", *common.SURROGATES):
        name = dataclasses.replace(cfg, surrogate=surrogate if surrogate != "none" else "paper").variant("dpo").name
        name = name if surrogate != "none" else "sft" + ("" if cfg.start == "final" else f"-at{cfg.start}")
        for seed_dir in sorted(cfg.seed_dir.parent.glob("seed*")):
            for _, rows, _ in episodes.finished(seed_dir, f"eval-{name}", "test"):
                valid = {(seed_dir.name, r["suite"], r["task"], r["init_state"]): r["success"] for r in rows if not r["crash"]}
                played.setdefault(surrogate, {}).update(valid)
    seeds = {key[0] for key in played.get("exact", {})}  # those of the experiment, where it has been made
    for arm, mine in played.items():
        played[arm] = {key: won for key, won in mine.items() if key[0] in seeds or not seeds}
    rows, paper = [], played.get("paper", {})
    for surrogate, mine in [(arm, mine) for arm, mine in played.items() if mine]:
        row = {"policy": "dpo" if surrogate != "none" else "sft", "surrogate": surrogate, "n": len(mine)}
        row |= {"name": f"{surrogate if surrogate != 'none' else 'sft'}, seeds together"}
        row |= {"adapter": cfg.adapter if surrogate != "none" else "none"}
        row |= {"train_seeds": sorted({int(key[0].removeprefix("seed")) for key in mine}), "successes": sum(mine.values())}
        deff = stats.design_effect(list(mine.values()), [key[1:] for key in mine], [str(key[1:3]) for key in mine])
        row["ci95"] = list(stats.wilson(row["successes"], row["n"], deff))
        both = [key for key in mine if key in paper]
        if surrogate != "paper" and both:
            test = stats.mcnemar([mine[key] for key in both], [paper[key] for key in both], [key[1:] for key in both])
            row |= {
                "gained_vs_paper": test["only_a"],
                "lost_vs_paper": test["only_b"],
                "p_vs_paper": test["p"],
                "paired_n": len(both),
            }
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------ plots
def page(cfg, found: dict[str, dict], rows: list[dict], cosines: list[dict], arms: list[dict], path: Path) -> None:
    """Six panels in one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 3, figsize=(15, 8.4), dpi=130, layout="constrained")
    figure.suptitle(f"Surrogate against exact likelihood: {cfg.name}, {cfg.pairs} pairs, start {cfg.start}", color=INK)
    for ax in grid.flat:
        ax.grid(color=GRID, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    trained = [policy for policy in found if policy != "sft"]
    scatter_log_p(grid[0, 0], found["sft"], cfg.draws)
    scatter_margin(grid[0, 1], found, trained, cfg.draws)
    bias_by_time(grid[0, 2], found, trained)
    noise_by_draws(grid[1, 0], [r for r in rows if r["policy"] == (trained or ["sft"])[0] and r["metric"] == "noise"])
    cosine_by_draws(grid[1, 1], cosines)
    success_bars(grid[1, 2], arms)
    figure.savefig(path)
    plt.close(figure)


def titled(ax, title: str, xlabel: str, ylabel: str) -> None:
    ax.set_title(title, fontsize=10, loc="left", color=INK)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)


def scatter_log_p(ax, sft: dict, k: int) -> None:
    titled(ax, f"log p of chunks, SFT policy, {k} draws", "exact, nats", "paper's surrogate")
    for side, label in enumerate(("chosen", "rejected")):
        ax.scatter(sft["exact"][:, side], sft[f"paper/{k}"][0, :, side], s=10, alpha=0.7, label=label)
    ax.legend(frameon=False, fontsize=8)


def scatter_margin(ax, found: dict, trained: list[str], k: int) -> None:
    titled(ax, f"DPO margin, {k} shared draws", "exact, nats", "paper's surrogate")
    for policy in trained:
        exactly = quantity(found[policy]["exact"][None], found["sft"]["exact"][None], True)[0]
        ax.scatter(
            exactly, quantity(found[policy][f"paper/{k}"], found["sft"][f"paper/{k}"], True)[0], s=10, alpha=0.7, label=policy
        )
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.axvline(0, color=INK, linewidth=0.8)
    if trained:
        ax.legend(frameon=False, fontsize=8)


def bias_by_time(ax, found: dict, trained: list[str]) -> None:
    """1 - r^2 between the velocity error at one time alone, its noise averaged out, and the exact values."""
    titled(ax, "Bias against t: what one time alone leaves unexplained", "t (1 is noise)", "1 - r^2")
    sft, reference = found["sft"], None
    curves = {"sft: log p": (sft["by_time"].flatten(1), sft["exact"].flatten())}
    for policy in trained:
        reference = sft
        margin = quantity(found[policy]["by_time"], reference["by_time"], True)
        curves[f"{policy}: margin"] = margin, quantity(found[policy]["exact"][None], reference["exact"][None], True)[0]
    for label, (by_time, exactly) in curves.items():
        strata = by_time.unflatten(0, (-1, max(1, len(by_time) // 16))).mean(1)  # 16 times at most
        t = (np.arange(len(strata)) + 0.5) / len(strata)
        ax.plot(t, [1 - np.corrcoef(at, exactly)[0, 1] ** 2 for at in strata], "o-", markersize=3, label=label)
    ax.set_ylim(0, 1)
    ax.legend(frameon=False, fontsize=8)


def noise_by_draws(ax, rows: list[dict]) -> None:
    what = "margin" if any(r["quantity"] == "margin" for r in rows) else "difference"
    titled(ax, f"Noise of the {what}: shared draws solid, own draws dashed", "draws", "variance of the estimate / between pairs")
    rows = [r for r in rows if r["quantity"] == what]
    for name, shared in dict.fromkeys((r["surrogate"], r["shared"]) for r in rows):
        mine = sorted((r["draws"], r["value"]) for r in rows if (r["surrogate"], r["shared"]) == (name, shared))
        ax.plot(
            *zip(*mine, strict=True), "o-" if shared else "o--", markersize=3, color=COLOURS[name], label=name if shared else None
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.legend(frameon=False, fontsize=8)


def cosine_by_draws(ax, cosines: list[dict]) -> None:
    titled(ax, "Gradient: cosine with the exact one (solid: first step, dashed: last)", "draws", "cosine")
    for name, state in dict.fromkeys((r["estimator"], r["state"]) for r in cosines):
        mine = [r for r in cosines if (r["estimator"], r["state"]) == (name, state)]
        mean = {k: float(np.mean([r["cosine"] for r in mine if r["draws"] == k])) for k in sorted({r["draws"] for r in mine})}
        style = {"start": "-", "end": "--"}[state]
        label = None if state == "end" else "exact: probes against others" if name == "exact" else name
        ax.plot(list(mean), list(mean.values()), style, marker="o", markersize=3, color=COLOURS[name], label=label)
    if cosines:
        ax.set_xscale("log", base=2)
        ax.legend(frameon=False, fontsize=8)


def success_bars(ax, arms: list[dict]) -> None:
    titled(ax, "Success after DPO on held-out init states" + ("" if arms else ": not run"), "", "success, % (Wilson 95 %)")
    for i, arm in enumerate(arms):
        rate, (low, high) = 100 * arm["successes"] / max(1, arm["n"]), arm["ci95"]
        ax.bar(i, rate, 0.6, yerr=[[rate - 100 * low], [100 * high - rate]], capsize=3, color=COLOURS[arm["surrogate"]])
        ax.text(i, 2, f"{arm['successes']}/{arm['n']}", ha="center", fontsize=8, color="white")
    ax.set_xticks(range(len(arms)), ["SFT" if arm["surrogate"] == "none" else arm["surrogate"] for arm in arms], fontsize=8)
    ax.set_ylim(0, 100)


# ----------------------------------------------------------------------------------------------------- report
def report(cfg, folder: Path) -> None:
    """From a finished folder of 07: <folder>.json, .md and .png beside it. Evaluations (04) that came later are taken in."""
    found: dict[str, dict] = {}
    for key, tensor in disk.load_tensors(folder / "measures.safetensors").items():
        policy, _, name = key.partition("|")
        found.setdefault(policy, {})[name] = tensor
    found = {policy: found[policy] for policy in sorted(found, key=lambda p: (p != "sft", p))}
    cosines, own = disk.read_jsonl(folder / "gradients.jsonl"), disk.load_tensors(folder / "own.safetensors")
    timing, arms = disk.read_json(folder / "timing.json"), settling(cfg)
    rows, facts = table(cfg, found, own["chunk"][0].numel()), flow_facts(own, found["sft"]["exact"])
    positive = always_positive(found)
    said = [f"# {cfg.name}, {cfg.pairs} pairs, start {cfg.start}, seed {cfg.seed}\n", markdown(rows, cfg)]
    said += [
        "## The exact likelihood itself\n",
        *(f"- {r['policy']}, {r['quantity']} above 0: {r['value']:.3f} of {r['n']} pairs" for r in positive),
        *(f"- {r['metric']}: {r['value']:.4g} {r['unit']} (n = {r['n']})" for r in facts),
    ]
    said += ["", "## Cosine between the DPO gradients of an estimator and of the exact likelihood\n", gradient_table(cosines)]
    said += ["## CPU seconds per chunk\n", cost_table(timing["cpu_s_per_chunk"])]
    said += ["## Success after DPO\n", arms_table(arms), f"`{timing['command']}` at {timing['commit']}"]
    common_keys = {"suite": " ".join(cfg.suites), "backbone": cfg.backbone, "pairs": cfg.pairs, "start": cfg.start}
    common_keys |= {"command": timing["command"], "commit": timing["commit"]}
    gradient_rows = [
        r | {"policy": "dpo", "surrogate": r["estimator"], "metric": "gradient cosine", "value": r["cosine"]} for r in cosines
    ]
    seconds = timing["cpu_s_per_chunk"].items()
    cost_rows = [{"metric": "cost per chunk", "surrogate": name, "value": s, "unit": "CPU s"} for name, s in seconds]
    disk.write_json(
        folder.with_suffix(".json"), [common_keys | r for r in [*rows, *positive, *facts, *gradient_rows, *cost_rows, *arms]]
    )
    page(cfg, found, rows, cosines, arms, folder.with_suffix(".png"))
    disk.write_atomic(folder.with_suffix(".md"), "\n".join(said) + "\n")
    print("\n".join(said), flush=True)


def gradient_table(cosines: list[dict]) -> str:
    lines = ["| estimator | draws | first step | last step |", "|---|---|---|---|"]
    for name, k in dict.fromkeys((r["estimator"], r["draws"]) for r in cosines):
        cells = []
        for state in ("start", "end"):
            mine = [r["cosine"] for r in cosines if (r["estimator"], r["draws"], r["state"]) == (name, k, state)]
            cells.append(f"{np.mean(mine):.3f} ({min(mine):.3f} to {max(mine):.3f})" if mine else "")
        label = "exact: so many probes against other ones" if name == "exact" else name
        lines.append(f"| {label} | {k} | {cells[0]} | {cells[1]} |")
    without = "not measured: no LoRA policy has been trained on these pairs (03_dpo.py), or validate.gradient_batches is 0"
    return "\n".join(lines if cosines else [without]) + "\n"


def cost_table(seconds: dict[str, float]) -> str:
    lines = [f"| {name} | {s:.4f} | 1/{seconds['exact'] / s:.0f} |" for name, s in seconds.items()]
    return "\n".join(["| | CPU s | of exact |", "|---|---|---|", *lines]) + "\n"


def arms_table(arms: list[dict]) -> str:
    lines = ["| surrogate | success | 95 % interval | seeds | gained / lost against paper | p |", "|---|---|---|---|---|---|"]
    for arm in arms:
        (low, high), test = arm["ci95"], "p_vs_paper" in arm
        paired = f"{arm['gained_vs_paper']} / {arm['lost_vs_paper']} | {arm['p_vs_paper']:.2g}" if test else " | "
        name = "SFT start" if arm["surrogate"] == "none" else arm["surrogate"]
        seeds = ", ".join(map(str, arm["train_seeds"]))
        lines.append(f"| {name} | {arm['successes']} / {arm['n']} | {low:.1%} to {high:.1%} | {seeds} | {paired} |")
    return "\n".join(lines) + "\n" if arms else "not run (04_eval.py)\n"
