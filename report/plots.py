"""The report's plots: functions of rows that return a matplotlib figure.

matplotlib is imported when something is drawn, so that importing this module is cheap.
"""

from pathlib import Path

from report import stats
from report.tables import baseline, by_suite, joined, short

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
    "savefig.dpi": 150,
}


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **keywords):
    """A figure and its axes, in the report's style."""
    from matplotlib import figure, rcParams

    rcParams.update(STYLE)
    drawn = figure.Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.subplots(rows, columns, **keywords)


def save(figure, path: Path) -> None:
    """Write a PNG with a palette of 64 colours: a third of the size, and text stays sharp."""
    from PIL import Image

    figure.savefig(path)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


# ---------------------------------------------------------------------------------------------- success rates
def forest(rows: list[dict]):
    """Differences to the baseline on the same episodes, in points, with intervals and exact p-values."""
    rows = sorted(rows, key=by_suite)
    figure, ax = canvas(6.4, 0.85 + 0.34 * len(rows))
    places = range(len(rows))[::-1]
    for y, row in zip(places, rows, strict=True):
        colour = COLOURS.get(row["adapter"], COLOURS["other"])
        interval = [100 * bound for bound in stats.difference_interval(row)]
        ax.plot(100 * row["diff_vs_sft"], y, "s", color=colour)
        ax.plot(interval, [y, y], color=colour, linewidth=2)
        ax.text(
            1.02, y, f"p = {row['p_vs_sft']:.2g}", transform=ax.get_yaxis_transform(), va="center", fontsize=9
        )
    names = [f"{row['name']}, {short(row['suite'])}, seed {joined(row['train_seeds'])}" for row in rows]
    ax.set(yticks=places, yticklabels=names, ylim=(-0.6, len(rows) - 0.4))
    ax.grid(axis="x")
    ax.axvline(0, color=INK, linewidth=0.9)
    ax.set_xlabel(f"points against {baseline(rows)}, same episodes (95 %)", loc="right")
    return figure


def blocks(effects: dict[str, list[float]]):
    """Effects of arms against arm A, in points: a dot for each block, a bar at their mean."""
    figure, ax = canvas(6.4, 0.85 + 0.3 * len(effects))
    places = range(len(effects))[::-1]
    for y, values in zip(places, effects.values(), strict=True):
        ax.plot([100 * value for value in values], [y] * len(values), "o", color=COLOURS["lora"], alpha=0.6)
        ax.plot(100 * sum(values) / len(values), y, "|", color=INK, markersize=16, markeredgewidth=2)
    names = [f"{arm} ({len(values)})" for arm, values in effects.items()]
    ax.set(yticks=places, yticklabels=names, ylim=(-0.6, len(effects) - 0.4))
    ax.grid(axis="x")
    ax.axvline(0, color=INK, linewidth=0.9)
    ax.set_xlabel("points against A; a dot for each block, a bar at their mean", loc="right")
    return figure


# -------------------------------------------------------------------------------------------------------- DPO
def dpo(curves: dict[str, list[dict]]):
    """Implicit rewards of chosen (solid) and rejected (dashed) chunks during DPO, by adapter."""
    figure, ax = canvas(5.2, 3.3)
    for i, (name, rows) in enumerate(curves.items()):
        for side, line in (("chosen", "-"), ("rejected", "--")):
            ax.plot(
                [row["step"] for row in rows],
                [row[f"rewards/{side}"] for row in rows],
                line,
                color=COLOURS["dora" if "dora" in name else "lora"],
                linewidth=2.8 if i % 2 == 0 else 1.3,  # both stay visible where one covers the other
                label=f"{name}, {side}",
            )
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.set(xlabel="DPO step", ylabel="beta x log-ratio to reference")
    ax.grid()
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(curves), borderaxespad=0.2)
    return figure
