"""The report's plots: functions of rows that return a matplotlib figure.

matplotlib is imported when something is drawn, so that importing this module is cheap.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np

from report import stats
from report.tables import baseline, by_suite, number, short

INK = "#1c2128"
COLOURS = {"sft": "#8a929c", "lora": "#2f74b5", "dora": "#d9822b", "other": "#4f9a6b"}
STYLE = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#e3e6ea",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "errorbar.capsize": 2.5,
    "figure.titlesize": 11,
    "savefig.dpi": 150,
}


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, title: str = "", **keywords):
    """A figure and its axes, in the report's style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **keywords)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure, axes


def save(figure, path: Path) -> None:
    """Write a PNG with a palette of 64 colours: a third of the size, and text stays sharp."""
    import matplotlib.pyplot as plt
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)


def list_rows(ax, names: list[str], notes: list[str] = ()) -> None:
    """Label a plot with one horizontal line per row: its name on the left, its note on the right."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)
    for i, note in enumerate(notes):
        ax.text(1.02, i, note, transform=ax.get_yaxis_transform(), va="center", fontsize=9)


def success_percent(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Success rates (N,), and how far their intervals reach below and above them (2, N), in percent."""
    rates = np.array([100 * row["successes"] / max(1, row["n"]) for row in rows])
    low, high = 100 * np.array([row["ci95"] for row in rows]).T
    return rates, np.maximum(0, [rates - low, high - rates])


def colour(row: dict) -> str:
    kind = row["adapter"] if row["policy"] == "dpo" else row["policy"]
    return COLOURS.get(kind, COLOURS["other"])


def labels(rows: list[dict]) -> list[str]:
    """The name of each row, with its suite and seeds if the rows differ in them."""
    suites, seeds = {row["suite"] for row in rows}, {str(row.get("train_seeds")) for row in rows}
    named = []
    for row in rows:
        suite = f"  {short(row['suite'])}" if len(suites) > 1 else ""
        seed = f"  seed {', '.join(map(str, row['train_seeds']))}" if len(seeds) > 1 else ""
        named.append(row["name"] + suite + seed)
    return named


# ---------------------------------------------------------------------------------------------- success rates
def success(rows: list[dict]):
    """Success rates as horizontal bars, with their Wilson intervals."""
    rows = sorted(rows, key=by_suite)[::-1]
    figure, ax = canvas(5.4, 0.8 + 0.34 * len(rows))
    rates, reach = success_percent(rows)
    style = {"elinewidth": 1.1, "ecolor": INK}
    ax.barh(range(len(rows)), rates, 0.66, xerr=reach, error_kw=style, color=[colour(row) for row in rows])
    list_rows(ax, labels(rows), [f"{row['successes']}/{row['n']}" for row in rows])
    ax.set(xlim=(0, 100), xlabel="success, % (bars: Wilson 95 %)")
    return figure


def forest(rows: list[dict]):
    """Differences to the baseline on the same episodes, in points, with intervals and exact p-values."""
    rows = sorted(rows, key=by_suite)[::-1]
    figure, ax = canvas(5.4, 0.85 + 0.34 * len(rows))
    for i, row in enumerate(rows):
        low, high = stats.paired_interval(row["gained"], row["lost"], row["paired_n"], row.get("deff", 1.0))
        ax.plot([100 * low, 100 * high], [i, i], color=colour(row), linewidth=2.2, solid_capstyle="butt")
        ax.plot(100 * row["diff_vs_sft"], i, "s", color=colour(row), markersize=6)
    ax.axvline(0, color=INK, linewidth=0.9)
    list_rows(ax, labels(rows), [f"p = {row['p_vs_sft']:.2g}" for row in rows])
    ax.set_xlabel(f"points against {baseline(rows)}, same episodes (95 %)", loc="right")
    return figure


def learning_curve(rows: list[dict], losses: list[dict]):
    """Success on validation init states (left) and the validation loss (right), against SFT steps."""

    def step(row: dict) -> int:
        return losses[-1]["step"] if row["start"] == "final" else int(row["start"])

    rows = sorted(rows, key=step)
    figure, ax = canvas(5.4, 3.3)
    rates, reach = success_percent(rows)
    ax.errorbar(
        [step(row) for row in rows],
        rates,
        reach,
        fmt="o-",
        color=COLOURS["lora"],
        label="success (left), Wilson 95 %",
    )
    ax.set(ylim=(0, 100), xlabel="SFT step", ylabel="success on validation states, %")
    ax.grid()
    right = ax.twinx()
    curve = np.array([(row["step"], row["val_loss"]) for row in losses if "val_loss" in row])
    right.semilogy(*curve.T, color=COLOURS["dora"], label="validation loss (right)")
    handles = [*ax.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    ax.legend(handles=handles, loc="center right")
    return figure


def dpo(curves: dict[str, list[dict]]):
    """Implicit rewards of chosen (solid) and rejected (dashed) chunks during DPO, by adapter."""
    figure, ax = canvas(5.2, 3.3)
    for i, (name, rows) in enumerate(curves.items()):
        look = {"color": COLOURS["dora" if "dora" in name else "lora"]}
        look["linewidth"] = 2.8 if i % 2 == 0 else 1.3  # both stay visible where one covers the other
        for side, line in (("chosen", "-"), ("rejected", "--")):
            rewards = [row[f"rewards/{side}"] for row in rows]
            ax.plot([row["step"] for row in rows], rewards, line, label=f"{name}, {side}", **look)
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.set(xlabel="DPO step", ylabel="beta x log-ratio to reference")
    ax.grid()
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(curves), borderaxespad=0.2)
    return figure


# --------------------------------------------------------------------------------------------- cells, metrics
CELL = re.compile(r"(.+-)?(none|[a-z]+(?=\d))([\d.]*)x?(\d*)-k(\d+)-([a-z]+)(\d+)(-at\d+)?")


def describe_cell(name: str) -> tuple[tuple, str]:
    """The sort key of a cell of extras/cells.py, and the cell in words, from its name."""
    given, reuse, threshold, cap, k, solver, steps, start = CELL.fullmatch(name).groups()
    words = "" if reuse == "none" else f"{reuse} at {threshold}, {cap} in a row; "
    words += f"look every {k}, {solver} {steps}"
    words += ", student" if given == "student-" else ""
    words += f", from step {start[3:]}" if start else ""
    return (
        reuse != "none",
        reuse,
        int(k),
        given == "student-",
        solver,
        int(steps),
        float(threshold or 0),
    ), words


def cells(rows: list[dict]):
    """Success with Wilson intervals (left), and CPU ms of the policy per step of the environment (right)."""
    rows = sorted(rows, key=lambda row: describe_cell(row["name"]))[::-1]
    figure, (ax, right) = canvas(7.6, 0.8 + 0.27 * len(rows), columns=2, sharey=True)
    rates, _ = success_percent(rows)
    for i, row in enumerate(rows):
        reuses = CELL.fullmatch(row["name"])[2] != "none"
        ink = COLOURS["dora" if reuses else "sft"]
        ax.plot([100 * x for x in row["ci95"]], [i, i], color=ink, linewidth=2)
        ax.plot(rates[i], i, "s", color=ink, markersize=5)
        right.barh(i, row["ms_per_step"], 0.62, color=ink)
        hits = f"   {row['hit_rate']:.0%} hits" if reuses else ""
        right.text(row["ms_per_step"], i, f" {row['ms_per_step']:.2f}{hits}", va="center", fontsize=8)
    for panel in (ax, right):
        list_rows(panel, [describe_cell(row["name"])[1] for row in rows])
    ax.tick_params(axis="y", labelsize=8)
    ax.set(xlim=(0, 101), xlabel="success, % (95 %)")
    right.set(xlim=(0, 2 * max(row["ms_per_step"] for row in rows)), xlabel="CPU ms per step")
    return figure


def metrics(rows: list[dict], names: list[str]):
    """Values of one unit as bars, with their intervals if they have any."""
    figure, ax = canvas(5.4, 0.8 + 0.32 * len(rows))
    rows = rows[::-1]
    ax.barh(range(len(rows)), [row["value"] for row in rows], 0.62, color=COLOURS["lora"])
    for i, row in enumerate(rows):
        if row.get("ci95"):
            ax.plot(row["ci95"], [i, i], color=INK, linewidth=1.2)
    list_rows(ax, names[::-1], [number(row["value"]) for row in rows])
    ax.set_xlabel(rows[0].get("unit", ""))
    if max(abs(row["value"]) for row in rows) >= 1e5:
        from matplotlib.ticker import EngFormatter

        ax.xaxis.set_major_formatter(EngFormatter())
    return figure
