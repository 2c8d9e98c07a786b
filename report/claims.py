"""The paper's claims (configs/paper.yaml) against its public logs and against this kit's committed results."""

from __future__ import annotations

import operator
from pathlib import Path

import yaml

import common
import disk
import runs
import stats
from report import audit
from report.page import Table, number, p_value, percent, points

RESULTS = runs.HERE / "results"
TESTS = {"==": operator.eq, ">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}


def read_paper(path: Path = runs.HERE / "configs" / "paper.yaml") -> dict:
    return yaml.safe_load(path.read_text())


def logged(logs: dict, policy: str, suites: list[str]) -> tuple[int, int]:
    """Successes and episodes of a policy in the public logs, over suites and seeds."""
    cells = [cell for suite in suites for cell in logs["counts"][policy][suite].values()]
    return sum(won for won, _ in cells), sum(n for _, n in cells)


def said_by_logs(entry: dict, logs: dict) -> str:
    """What the public logs give for a claim: counts, the difference of their rates, and the claim's own words."""
    said = []
    if "new" in entry:
        won, n = logged(logs, entry["new"], entry["suites"])
        said.append(f"{won}/{n}")
        if "base" in entry:
            base_won, base_n = logged(logs, entry["base"], entry["suites"])
            said = [f"{100 * (won / n - base_won / base_n):+.1f} points ({won}/{n} against {base_won}/{base_n})"]
    return "; ".join(said + ([entry["text"]] if "text" in entry else []))


def look_up(ours: dict) -> dict | None:
    """The one row of the committed results that a claim names; None where its file is not there.

    Raises:
        UserError: the file is there, but not exactly one row of it fits.
    """
    paths = [RESULTS / name for name in ours.get("episodes", [ours.get("file", "")])]
    if not all(path.is_file() for path in paths):
        return None
    if "episodes" in ours:
        return audit.compared(*({found[:3]: found[3] for found in audit.episodes_of(path)} for path in paths))
    rows = disk.read_json(paths[0]) if paths[0].suffix == ".json" else audit.read_lines(paths[0])[0]
    fits = [row for row in rows if all(row.get(key) == value for key, value in ours["where"].items())]
    if len(fits) != 1:
        raise common.UserError(f"configs/paper.yaml: {len(fits)} rows of {paths[0]} have {ours['where']}; a claim needs one")
    return fits[0]


def said_difference(row: dict) -> str:
    """A row's difference to its SFT start, with an interval where the row says how many episodes were gained and lost."""
    if "gained" not in row:
        return f"{100 * row['diff_vs_sft']:+.1f} points"
    return points(row["diff_vs_sft"], stats.paired_interval(row["gained"], row["lost"], row["paired_n"], row.get("deff", 1.0)))


def said_by_row(row: dict, key: str = "") -> str:
    """A row's figure with its interval, in words."""
    if key:
        return f"{key} = {row[key]:.3g}"
    if "wins" in row:
        mine, other = row["wins"]
        return f"{points(row['diff'], row['ci95'])}, {mine} against {other} of {row['paired_n']}, p = {p_value(row['p'])}"
    if "diff_vs_sft" in row:
        return f"{said_difference(row)}, {row['successes']}/{row['n']}, p = {p_value(row['p_vs_sft'])}"
    if "metric" in row:
        interval = f" ({row['ci95'][0]:.4g} to {row['ci95'][1]:.4g})" if row.get("ci95") else ""
        return f"{number(row['value'])}{interval} {row.get('unit', '')}".strip()
    return f"{row['successes']}/{row['n']} ({percent(row['ci95'])})"


def judged(claim: dict, logs: dict) -> dict:
    """A claim in words: what the paper says, what its logs give, what we find, and the verdict by the claim's own rule."""
    row = look_up(claim["ours"]) if "ours" in claim else None
    verdict, said = claim.get("verdict", "not run here"), []
    if row is not None:
        rules = [(row[key], *rule.split()) for key, rule in claim["holds"].items()]
        verdict = "holds here" if all(TESTS[test](x, float(bound)) for x, test, bound in rules) else "does not hold here"
        said = [said_by_row(row, claim["ours"].get("key", ""))]
    if "why" in claim and verdict != "not run here":
        said.append(claim["why"])
    same = {key: claim[key] for key in ("id", "section", "claim", "paper", "command")}
    return same | {"logs": said_by_logs(claim["logs"], logs), "ours": "; ".join(said), "verdict": verdict}


def claims_table(claims: list[dict]) -> Table:
    head = ["section", "claim", "paper", "its public logs", "here (95 % interval)", "verdict", "command"]
    rows = [[c["section"], c["claim"], c["paper"], c["logs"], c["ours"], c["verdict"], f"`{c['command']}`"] for c in claims]
    return Table(head, rows, cards=True)


def logs_table(logs: dict) -> Table:
    """The public logs cell by cell beside the paper's tables; episodes that repeat another seed's count once in intervals."""
    head = ["policy", "suite", "successes by seed", "together", "rate", "paper's table", "distinct", "95 % interval"]
    table = Table(head, [])
    for policy, suites in logs["counts"].items():
        for suite, cells in suites.items():
            won, n = logged(logs, policy, [suite])
            repeated = logs["same"].get(policy, {}).get(suite, [])
            once = [cell for seed, cell in cells.items() if seed not in repeated]
            distinct = sum(k for _, k in once)
            says = logs["paper"].get(policy, {}).get(suite)
            by_seed = ", ".join(f"{seed}: {w}/{k}" for seed, (w, k) in cells.items())
            row = [policy, suite, by_seed, f"{won} / {n}", f"{100 * won / n:.1f} %", "" if says is None else f"{says} %"]
            table.rows.append([*row, distinct, percent(stats.wilson(sum(w for w, _ in once), distinct))])
    return table
