"""The report's plots: each a function of rows that draws a matplotlib figure, in a light and a dark dress."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

import stats
from report.page import number

INK = {"light": "#1c2128", "dark": "#e4e7eb"}
CARD = {"light": "#ffffff", "dark": "#1a1e24"}
GRID = {"light": "#e3e6ea", "dark": "#313842"}
COLOURS = {  # of policies and their adapters, readable on both
    "light": {"sft": "#8a929c", "lora": "#2f74b5", "dora": "#d9822b", "other": "#4f9a6b"},
    "dark": {"sft": "#98a1ac", "lora": "#5b9fe0", "dora": "#eb9a4b", "other": "#6dbb8b"},
}
SUITES = ["libero_spatial", "libero_object", "libero_goal", "libero_10"]  # in the paper's order


def dressed(draw: Callable, *arguments, path: Path) -> tuple[bytes, bytes]:
    """PNG of draw(colours, *arguments) in both dresses; the light one is written to `path` as well."""
    pictures = []
    for dress in ("light", "dark"):
        ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK[dress])
        faces = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), CARD[dress])
        lines = {"axes.edgecolor": GRID[dress], "grid.color": GRID[dress], "grid.linewidth": 0.7, "axes.axisbelow": True}
        spines = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 11}
        size = {"font.size": 10, "legend.frameon": False, "legend.fontsize": 9, "figure.constrained_layout.use": True}
        with plt.rc_context(ink | faces | lines | spines | size):
            figure = draw(COLOURS[dress] | {"ink": INK[dress]}, *arguments)
            stream = io.BytesIO()
            figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
            plt.close(figure)
        pictures.append(stream.getvalue())
    path.write_bytes(pictures[0])
    return pictures[0], pictures[1]


def colour(colours: dict, row: dict) -> str:
    return colours[row["adapter"]] if row["policy"] == "dpo" else colours["sft" if row["policy"] == "sft" else "other"]


def baseline(rows: list[dict]) -> str:
    """What the rows' differences are to, in words."""
    return "ten steps without reuse" if any("hit_rate" in row for row in rows) else "its SFT start"


def labels(rows: list[dict]) -> list[str]:
    """A name for each row, with what tells rows of one name apart: suite, seed."""
    suites, seeds = {row["suite"] for row in rows}, {str(row.get("train_seeds")) for row in rows}
    named = [row["name"] for row in rows]
    if len(suites) > 1:
        named = [f"{name}  {short(row['suite'])}" for name, row in zip(named, rows, strict=True)]
    if len(seeds) > 1:
        named = [f"{name}  seed {', '.join(map(str, row['train_seeds']))}" for name, row in zip(named, rows, strict=True)]
    return named


def short(suite: str) -> str:
    """libero_object -> Object; several suites -> 4 suites."""
    names = suite.split()
    return f"{len(names)} suites" if len(names) > 1 else names[0].removeprefix("libero_").capitalize().replace("10", "Long")


def by_suite(row: dict) -> tuple:
    """Order of rows in plots and tables: suite, several at once last, where DPO started, SFT before DPO."""
    return (
        SUITES.index(row["suite"]) if row["suite"] in SUITES else len(SUITES),  # several together: no suite of the list
        row["suite"],
        row["start"] == "final",
        int(row["start"]) if row["start"].isdigit() else 0,
        row["policy"] != "sft",
        row["name"],
    )


def success(colours: dict, rows: list[dict]):
    """Success rates as horizontal bars, with their Wilson intervals."""
    rows = sorted(rows, key=by_suite)[::-1]
    figure, ax = plt.subplots(figsize=(5.4, 0.8 + 0.34 * len(rows)))
    rates = [100 * r["successes"] / max(1, r["n"]) for r in rows]
    bars = [[max(0, rate - 100 * r["ci95"][0]) for rate, r in zip(rates, rows, strict=True)]]
    bars += [[max(0, 100 * r["ci95"][1] - rate) for rate, r in zip(rates, rows, strict=True)]]
    error = {"elinewidth": 1.1, "ecolor": colours["ink"], "capsize": 2.5}
    ax.barh(range(len(rows)), rates, 0.66, xerr=bars, error_kw=error, color=[colour(colours, r) for r in rows])
    for i, r in enumerate(rows):
        ax.text(102, i, f"{r['successes']}/{r['n']}", va="center", fontsize=9)
    ax.set_yticks(range(len(rows)), labels(rows))
    ax.set(xlim=(0, 100), ylim=(-0.6, len(rows) - 0.4), xlabel="success, % (bars: Wilson 95 %)")
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)
    return figure


def forest(colours: dict, rows: list[dict]):
    """Differences to the baseline on the same episodes, in points, with their intervals and exact p-values."""
    rows = sorted(rows, key=by_suite)[::-1]
    figure, ax = plt.subplots(figsize=(5.4, 0.85 + 0.34 * len(rows)))
    for i, r in enumerate(rows):
        low, high = stats.paired_interval(r["gained"], r["lost"], r["paired_n"], r.get("deff", 1.0))
        ax.plot([100 * low, 100 * high], [i, i], color=colour(colours, r), linewidth=2.2, solid_capstyle="butt")
        ax.plot(100 * r["diff_vs_sft"], i, "s", color=colour(colours, r), markersize=6)
        ax.annotate(f"p = {r['p_vs_sft']:.2g}", (1.02, i), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    ax.axvline(0, color=colours["ink"], linewidth=0.9)
    ax.set_yticks(range(len(rows)), labels(rows))
    ax.set(ylim=(-0.6, len(rows) - 0.4))
    ax.set_xlabel(f"points against {baseline(rows)}, same episodes (95 %)", loc="right")  # names of rows leave more room there
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)
    return figure


def learning_curve(colours: dict, rows: list[dict], losses: list[dict]):
    """Success on validation init states (left) and the validation loss (right), against SFT steps."""
    last = losses[-1]["step"]
    rows = sorted(rows, key=lambda r: last if r["start"] == "final" else int(r["start"]))
    steps = [last if r["start"] == "final" else int(r["start"]) for r in rows]
    rates = [100 * r["successes"] / max(1, r["n"]) for r in rows]
    bars = [[rate - 100 * r["ci95"][0] for rate, r in zip(rates, rows, strict=True)]]
    bars += [[100 * r["ci95"][1] - rate for rate, r in zip(rates, rows, strict=True)]]
    figure, ax = plt.subplots(figsize=(5.4, 3.3))
    ax.errorbar(steps, rates, bars, fmt="o-", color=colours["lora"], capsize=3, label="success (left), Wilson 95 %")
    ax.set(ylim=(0, 100), xlabel="SFT step", ylabel="success on validation states, %")
    ax.grid()
    right = ax.twinx()
    with_loss = [row for row in losses if "val_loss" in row]
    curve = [row["step"] for row in with_loss], [row["val_loss"] for row in with_loss]
    right.plot(*curve, color=colours["dora"], label="validation loss (right)")
    right.set_yscale("log")
    handles = [*ax.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    ax.legend(handles, [h.get_label() for h in handles], loc="center right")
    return figure


def dpo(colours: dict, curves: dict[str, list[dict]]):
    """Implicit rewards of chosen (solid) and rejected (dashed) chunks while DPO trains on one set of pairs, by adapter."""
    figure, ax = plt.subplots(figsize=(5.2, 3.3))
    for i, (name, rows) in enumerate(curves.items()):
        adapter = "dora" if "dora" in name else "lora"
        steps = [row["step"] for row in rows]
        look = {"color": colours[adapter], "linewidth": 2.8 if i % 2 == 0 else 1.3}  # where two lie on each other, both are seen
        ax.plot(steps, [row["rewards/chosen"] for row in rows], label=f"{name}, chosen", **look)
        ax.plot(steps, [row["rewards/rejected"] for row in rows], "--", label=f"{name}, rejected", **look)
    ax.axhline(0, color=colours["ink"], linewidth=0.8)
    ax.set(xlabel="DPO step", ylabel="beta x log-ratio to reference")
    ax.grid()
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(curves), borderaxespad=0.2)
    return figure


def of_cell(row: dict) -> tuple[tuple, str]:
    """A cell of 05, by its name: its place in a list, and in words."""
    fits = re.fullmatch(r"(.+-)?(none|[a-z]+(?=\d))([\d.]*)x?(\d*)-k(\d+)-([a-z]+)(\d+)(-at\d+)?", row["name"])
    given, reuse, threshold, cap, k, solver, steps, start = fits.groups()
    said = "" if reuse == "none" else f"{reuse} at {threshold}, {cap} in a row; "
    said += f"look every {k}, {solver} {steps}" + (", student" if given == "student-" else "")
    said += f", from step {start[3:]}" if start else ""
    return (reuse != "none", reuse, int(k), given == "student-", solver, int(steps), float(threshold or 0)), said


def cells(colours: dict, rows: list[dict]):
    """Success (left, Wilson intervals) and CPU ms of the policy per step of the environment (right) of each cell of 05."""
    rows = sorted(rows, key=of_cell)[::-1]
    figure, (ax, right) = plt.subplots(1, 2, figsize=(7.6, 0.8 + 0.27 * len(rows)), sharey=True)
    reuses = [of_cell(row)[0][0] for row in rows]
    ink = [colours["dora"] if reuse else colours["sft"] for reuse in reuses]
    for i, r in enumerate(rows):
        ax.plot([100 * x for x in r["ci95"]], [i, i], color=ink[i], linewidth=2)
        ax.plot(100 * r["successes"] / max(1, r["n"]), i, "s", color=ink[i], markersize=5)
    right.barh(range(len(rows)), [r["ms_per_step"] for r in rows], 0.62, color=ink)
    for i, r in enumerate(rows):
        hits = f"   {r['hit_rate']:.0%} hits" if reuses[i] else ""
        right.text(r["ms_per_step"], i, f" {r['ms_per_step']:.2f}{hits}", va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [of_cell(row)[1] for row in rows], fontsize=8)
    ax.set(xlim=(0, 101), ylim=(-0.6, len(rows) - 0.4), xlabel="success, % (95 %)")
    right.set(xlim=(0, 2 * max(r["ms_per_step"] for r in rows)), xlabel="CPU ms per step")
    for panel in (ax, right):
        panel.grid(axis="x")
        panel.tick_params(axis="y", length=0)
    return figure


def metrics(colours: dict, rows: list[dict], names: list[str]):
    """Figures of one unit as bars, with their intervals where they have some."""
    figure, ax = plt.subplots(figsize=(5.4, 0.8 + 0.32 * len(rows)))
    places = range(len(rows))[::-1]
    ax.barh(places, [row["value"] for row in rows], 0.62, color=colours["lora"])
    for y, row in zip(places, rows, strict=True):
        if row.get("ci95"):
            ax.plot(row["ci95"], [y, y], color=colours["ink"], linewidth=1.2)
        ax.annotate(number(row["value"]), (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    ax.set_yticks(places, names)
    ax.set(xlabel=rows[0].get("unit", ""), ylim=(-0.6, len(rows) - 0.4))
    if max(abs(row["value"]) for row in rows) >= 1e5:
        ax.xaxis.set_major_formatter(EngFormatter())
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)
    return figure
