"""The paper's claims (configs/paper.yaml) beside its public logs and this kit's committed results."""

import operator
from pathlib import Path

import yaml

from report import audit, stats
from report.page import PILLS
from report.tables import difference, listing, number, p_value, percent, points, table
from runtime import HERE, disk, refuse

RESULTS = HERE / "results"
TESTS = {"==": operator.eq, ">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}


def read_paper(path: Path = HERE / "configs" / "paper.yaml") -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def logged(logs: dict, policy: str, suites: list[str]) -> tuple[int, int]:
    """Successes and episodes of a policy in the public logs, over suites and seeds."""
    cells = [cell for suite in suites for cell in logs["counts"][policy][suite].values()]
    return sum(won for won, _ in cells), sum(n for _, n in cells)


def log_text(entry: dict, logs: dict) -> str:
    """What the public logs say about a claim: counts, their difference, and the words in its entry."""
    parts = [entry["text"]] if "text" in entry else []
    if "new" in entry:
        won, n = logged(logs, entry["new"], entry["suites"])
        counts = f"{won}/{n}"
        if "base" in entry:
            base_won, base_n = logged(logs, entry["base"], entry["suites"])
            counts = (
                f"{100 * (won / n - base_won / base_n):+.1f} points ({counts} against {base_won}/{base_n})"
            )
        parts.insert(0, counts)
    return "; ".join(parts)


def look_up(ours: dict) -> dict | None:
    """The one row of the committed results that a claim names; None where its file is not there.

    Raises:
        UserError: the file is there, but not exactly one row fits.
    """
    paths = [RESULTS / name for name in ours.get("episodes", [ours.get("file", "")])]
    if not all(path.is_file() for path in paths):
        return None
    if "episodes" in ours:
        return audit.compared(*map(audit.episodes_of, paths))
    rows = disk.read_json(paths[0]) if paths[0].suffix == ".json" else audit.read_lines(paths[0])[0]
    fits = [row for row in rows if all(row.get(key) == value for key, value in ours["where"].items())]
    found = f"{len(fits)} rows of {paths[0]} have {ours['where']}"
    refuse(len(fits) != 1, f"configs/paper.yaml: {found}; a claim needs one")
    return fits[0]


def row_text(row: dict, key: str = "") -> str:
    """A row's figure with its interval, as text."""
    if key:
        return f"{key} = {row[key]:.3g}"
    if "wins" in row:
        counts = "{} against {} of {}".format(*row["wins"], row["paired_n"])
        return f"{points(row['diff'], row['ci95'])}, {counts}, p = {p_value(row['p'])}"
    if "diff_vs_sft" in row:
        return f"{difference(row)}, {row['successes']}/{row['n']}, p = {p_value(row['p_vs_sft'])}"
    if "metric" in row:
        interval = "({:.4g} to {:.4g})".format(*row["ci95"]) if row.get("ci95") else ""
        return " ".join(filter(None, (number(row["value"]), interval, row.get("unit"))))
    return f"{row['successes']}/{row['n']} ({percent(row['ci95'])})"


def judged(claim: dict, logs: dict) -> dict:
    """A claim as text: what the paper says, its logs, our result, and the verdict by the claim's own rule."""
    row = look_up(claim["ours"]) if "ours" in claim else None
    verdict, parts = claim.get("verdict", "not run here"), []
    if row is not None:
        rules = [(row[key], *rule.split()) for key, rule in claim["holds"].items()]
        holds = all(TESTS[test](value, float(bound)) for value, test, bound in rules)
        verdict = "holds here" if holds else "does not hold here"
        parts.append(row_text(row, claim["ours"].get("key", "")))
    if "why" in claim and verdict != "not run here":
        parts.append(claim["why"])
    return {
        **{key: claim[key] for key in ("id", "section", "claim", "paper", "command")},
        "logs": log_text(claim["logs"], logs),
        "ours": "; ".join(parts),
        "verdict": verdict,
    }


def tally(claims: list[dict]) -> str:
    verdicts = [claim["verdict"] for claim in claims]
    counts = [f"{verdict} {verdicts.count(verdict)}" for verdict in PILLS if verdict in verdicts]
    return f"By verdict: {', '.join(counts)}."


def claims_table(claims: list[dict]) -> str:
    return listing(
        claims,
        {
            "section": "{section}",
            "claim": "{claim}",
            "paper": "{paper}",
            "its public logs": "{logs}",
            "here (95 % interval)": "{ours}",
            "verdict": "{verdict}",
            "command": "`{command}`",
        },
    )


def logs_table(logs: dict) -> str:
    """The public logs beside the paper's tables. Intervals count episodes that repeat another seed's once."""
    rows = []
    for policy, suite in [(p, suite) for p, suites in logs["counts"].items() for suite in suites]:
        cells, (won, n) = logs["counts"][policy][suite], logged(logs, policy, [suite])
        repeated, paper = (logs[key].get(policy, {}).get(suite) for key in ("same", "paper"))
        once = [cell for seed, cell in cells.items() if seed not in (repeated or [])]
        distinct = sum(k for _, k in once)
        rows.append(
            {
                "policy": policy,
                "suite": suite,
                "successes by seed": ", ".join(f"{seed}: {w}/{k}" for seed, (w, k) in cells.items()),
                "together": f"{won} / {n}",
                "rate": f"{100 * won / n:.1f} %",
                "paper's table": "" if paper is None else f"{paper} %",
                "distinct": distinct,
                "95 % interval": percent(stats.wilson(sum(w for w, _ in once), distinct)),
            }
        )
    return table(list(rows[0]), [list(row.values()) for row in rows])
