"""Tables of the report, and how it writes numbers: from rows of table.json to lines of text."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from report import stats
from runtime import disk

SUITES = ["libero_spatial", "libero_object", "libero_goal", "libero_10"]  # in the paper's order
NO_NAMES = {"metric", "value", "unit", "n", "ci95", "command", "commit"}  # keys that tell no metrics apart


def table(head: list[str], lines: list[list]) -> str:
    text = [[str(cell).replace("|", "\\|") for cell in line] for line in (head, ["---"] * len(head), *lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in text)


def listing(rows: list[dict], columns: dict[str, str | Callable]) -> str:
    """A line for each row. columns: heading -> its cell, as a format string or a function of the row."""
    cells = [c.format_map if isinstance(c, str) else c for c in columns.values()]
    return table(list(columns), [[cell(row) for cell in cells] for row in rows])


def publish(path: Path, rows: list[dict], text: str) -> None:
    """Write rows to path.json and the table that is made of them to path.md, and print it."""
    disk.write_json(path.with_suffix(".json"), rows)
    disk.write_atomic(path.with_suffix(".md"), text.rstrip() + "\n")
    print(text, flush=True)


def grouped(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """The rows that have the same values of `keys`, by these values, in the order of the rows."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return groups


def pivot(rows: list[dict], keys: Sequence[str], column: str, headings: dict, cell: Callable) -> str:
    """A line for each combination of values of `keys`, and a column for each value of the key `column`.

    headings: value of `column` -> heading.  cell: makes a cell from its rows; without rows it stays empty.
    """
    groups = grouped(rows, *keys, column)
    lines = dict.fromkeys(key[:-1] for key in groups)
    body = [
        [*line, *(cell(groups[*line, v]) if (*line, v) in groups else "" for v in headings)] for line in lines
    ]
    return table([*keys, *headings.values()], body)


# -------------------------------------------------------------------------------------------- numbers as text
def points(difference: float, interval: tuple[float, float]) -> str:
    """A difference of rates with its interval, in percentage points."""
    return f"{100 * difference:+.1f} points ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"


def percent(interval: tuple[float, float] | None) -> str:
    return f"{interval[0]:.1%} to {interval[1]:.1%}" if interval else ""


def p_value(p: float) -> str:
    return f"{p:.2f}" if p >= 0.0995 else f"{p:.2g}" if p >= 0.0095 else f"{p:.1g}"


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def difference(row: dict) -> str:
    """A row's difference to its baseline, with its interval."""
    return points(row["diff_vs_sft"], stats.difference_interval(row))


def joined(values: Sequence) -> str:
    return ", ".join(map(str, values))


# ----------------------------------------------------------------------------------------- names for the rows
def script(row: dict) -> str:
    """The stage that made a row, from its command: 04_eval.py, extras.cells."""
    words = [word for word in row["command"].split() if word.endswith(".py") or word.startswith("extras.")]
    return Path(words[0]).name if words else ""


def short(suite: str) -> str:
    """libero_object -> Object; several suites -> 4 suites."""
    n = len(suite.split())
    return f"{n} suites" if n > 1 else suite.removeprefix("libero_").capitalize().replace("10", "Long")


def baseline(rows: list[dict]) -> str:
    """The policy that the rows are compared with."""
    return "ten steps without reuse" if any("hit_rate" in row for row in rows) else "its SFT start"


def by_suite(row: dict) -> tuple:
    """Sort key: suite (several at once last), the SFT step that DPO started from, SFT before DPO, name."""
    return (
        SUITES.index(row["suite"]) if row["suite"] in SUITES else len(SUITES),
        row["suite"],
        row["start"] == "final",
        int(row["start"]) if row["start"].isdigit() else 0,
        row["policy"] != "sft",
        row["name"],
    )


# ----------------------------------------------------------------------------------------------------- tables
def success_table(rows: list[dict]) -> str:
    """Success rates of one group of init states.

    `over tasks` is the t interval of the tasks, each one unit. With several suites, Holm's correction
    covers all rows of the table.
    """
    rows = [dict(row) for row in sorted(rows, key=by_suite)]
    tested = [row for row in rows if "p_vs_sft" in row]
    for row, p in zip(tested, stats.holm([row["p_vs_sft"] for row in tested]), strict=True):
        row["p_holm"] = p
    columns = {
        "policy": "{name}",
        "suite": lambda row: short(row["suite"]),
        "seeds": lambda row: joined(row["train_seeds"]),
        "success": "{successes} / {n}",
        "95 % interval": lambda row: percent(row["ci95"]),
        "over tasks": lambda row: percent(row["ci95_tasks"]),
        "crashes": "{crashes}",
        f"against {baseline(rows)} (95 %)": lambda row: difference(row) if "p_vs_sft" in row else "",
        "gained / lost": lambda row: "{gained} / {lost}".format_map(row) if "gained" in row else "",
        "p": lambda row: p_value(row["p_vs_sft"]) if "p_vs_sft" in row else "",
        "p (Holm)": lambda row: p_value(row["p_holm"]) if "p_vs_sft" in row else "",
    }
    if any("hit_rate" in row for row in rows):
        columns |= {"hits": "{hit_rate:.0%}", "CPU ms per step": "{ms_per_step:.2f}"}
    if len({row["suite"] for row in rows}) == 1:
        del columns["suite"], columns["p (Holm)"]
    if len({str(row["train_seeds"]) for row in rows}) == 1:
        del columns["seeds"]
    return listing(rows, columns)


def metrics_table(rows: list[dict]) -> str:
    """Metrics, each named by itself and by every key in which the rows differ."""
    keys = sorted({key for row in rows for key in row} - NO_NAMES)
    varied = [key for key in ["metric", *keys] if len({str(row.get(key)) for row in rows}) > 1] or ["metric"]
    named = [[str(row.get(key)) for key in varied if row.get(key) not in (None, "", "none")] for row in rows]
    return listing(
        [row | {"title": " ".join(names).replace("_", " ")} for row, names in zip(rows, named, strict=True)],
        {
            "metric": "{title}",
            "value": lambda row: number(row["value"]),
            "95 % interval": lambda row: " to ".join(map(number, row.get("ci95") or ())),
            "unit": lambda row: row.get("unit", ""),
            "n": lambda row: row.get("n", ""),
        },
    )


rates_table = partial(  # the audit's success rates: all seeds of a policy and suite together
    listing,
    columns={
        "policy": "{policy}",
        "suite": "{suite}",
        "seeds": lambda row: joined(row["seeds"]),
        "episodes": "{episodes}",
        "success": "{successes} / {n}",
        "95 % interval": lambda row: percent(row["ci95"]),
        "over tasks": lambda row: percent(row["ci95_tasks"]) if len(row["tasks"]) > 1 else "",
        "crashes": "{crashes}",
    },
)
pairs_table = partial(  # its paired comparisons; the last column corrects p for all rows of the table
    listing,
    columns={
        "policy": "{policy}",
        "against": "{against}",
        "suite": "{suite}",
        "pairs": "{paired_n}",
        "successes": "{wins[0]} against {wins[1]}",
        "difference (95 %)": difference,
        "gained / lost": "{gained} / {lost}",
        "p": lambda row: p_value(row["p_vs_sft"]),
        "p (Holm)": lambda row: p_value(row["p_holm"]),
    },
)
