"""The tables and the plot of 06_pretrain_head.py."""

from pathlib import Path

import numpy as np

from report.plots import INK, canvas, save
from report.tables import grouped, pivot

VARIANTS = {"paper": "#8c8c8c", "masked": "#1f77b4", "corrected": "#d9822b"}  # of the head -> their colours
INTRODUCTION = """Tower: {backbone}, {encoder}.
Each cell: recall@1 (95 % interval over episodes) / @5 / @10, in percent. A frame counts as found if it is of
the same task, of the same episode, or of the same moment (same task, at most {near} steps apart).
An interval without width means that resampling the episodes never changes the value. It may still rest on
few episodes.
"""
PROGRESS = {
    "rising": "rises from frame to frame (chance 0.5)",
    "rank correlation": "rank correlation with time (chance 0)",
}


def retrieval_report(rows: list[dict], cfg) -> str:
    """Markdown: a table for every protocol and suite, the last one for progress towards the goal."""
    parts = [INTRODUCTION.format(**vars(cfg))]
    for (protocol, suite, n), part in grouped(rows, "protocol", "suite", "n").items():
        if protocol == "progress":
            title = f"**progress**: similarity to the goal frame along {n} held-out episodes"
            table = pivot(part, ["features"], "metric", PROGRESS, progress_cell)
        else:
            title = f"**{protocol}**, {suite}, {n} queries"
            kinds = {row["right"]: f"same {row['right']}" for row in part}
            table = pivot(part, ["features"], "right", kinds, recall_cell)
        parts.append(f"{title}\n\n{table}\n")
    return "\n".join(parts)


def recall_cell(rows: list[dict]) -> str:
    """Recall at 1 with its interval, then at 5 and 10."""
    values = [f"{100 * row['value']:.1f}" for row in rows]
    if rows[0]["ci95"]:
        values[0] += " ({:.1f} to {:.1f})".format(*(100 * x for x in rows[0]["ci95"]))
    return " / ".join(values)


def progress_cell(rows: list[dict]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(rows[0]["value"], *rows[0]["ci95"])


# ------------------------------------------------------------------------------------------------------- plot
def plot_losses(logged: list[dict], cfg, path: Path) -> None:
    """Both terms of the loss against steps. Takes the heads trained without the held-out episodes, if any."""
    split = "episodes" if any(row["trained_on"] == "episodes" for row in logged) else "all"
    figure, axes = canvas(9, 3.8, columns=2, title="InfoNCE: training (solid) and held-out episodes (dashed)")
    terms = {"views": "agent view and wrist view", "temporal": f"agent view, {cfg.gap} steps on"}
    for ax, (term, words) in zip(axes, terms.items(), strict=True):
        for variant, colour in VARIANTS.items():
            rows = [row for row in logged if (row["trained_on"], row["variant"]) == (split, variant)]
            steps = [row["step"] for row in rows]
            ax.plot(steps, [row[term] for row in rows], color=colour, label=variant)
            ax.plot(steps, [row.get(f"held_out_{term}", np.nan) for row in rows], "--", color=colour)
        ax.axhline(np.log(cfg.batch_size), color=INK, linewidth=0.8, label=f"chance, log {cfg.batch_size}")
        ax.set(title=words, xlabel="step", ylim=(0, None))
    axes[0].legend()
    save(figure, path)
