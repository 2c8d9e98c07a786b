"""The tables of 06_pretrain_head.py."""

from report.tables import grouped, pivot

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
