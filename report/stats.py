"""Intervals and tests of success rates.

A place is a (suite, task, init state). Episodes of one place under several seeds are not independent, and
these functions allow for that: by grouping episodes by place, or by the design effect `deff`, the factor by
which dependence raises the variance. A p-value of `mcnemar` generalises over init states, for the policies at
hand.
`t_interval`, which takes one value for each training, generalises over trainings. report/power.py has what an
experiment can see.
"""

from collections.abc import Sequence

import numpy as np
from scipy import special

Z = 1.959964  # 95 %


def wilson(wins: int, n: int, deff: float = 1.0) -> tuple[float, float]:
    """95 % Wilson interval of a success rate over n / deff independent episodes."""
    if n == 0:
        return (0.0, 1.0)
    p, each = wins / n, Z**2 * deff / n
    middle, half = p + each / 2, np.sqrt(each * p * (1 - p) + each**2 / 4)
    low, high = float((middle - half) / (1 + each)), float((middle + half) / (1 + each))
    return low if wins > 0 else 0.0, high if wins < n else 1.0  # exact at both ends, without rounding errors


def design_effect(values: Sequence[float], places: Sequence, tasks: Sequence | None = None) -> float:
    """Design effect of a mean: 1 with one value per place, the number of seeds where all seeds agree.

    places: the place of each value.
    tasks: the task of each value. Some tasks are easier than others, and what all places of a task share is
    not agreement between seeds, so it is removed first.
    """
    left, of_place = np.array(values, float), {}
    single = not tasks or len({*tasks}) == len({*places})  # one place a task: its mean would be the place's
    tasks = np.zeros(len(left)) if single else np.asarray(tasks)
    for task in np.unique(tasks):
        left[tasks == task] -= left[tasks == task].mean()
    for value, place in zip(left, places, strict=True):
        of_place[place] = of_place.get(place, 0.0) + value
    alone = float((left**2).sum())
    if alone == 0:  # all agree
        return len(left) / max(1, len(of_place)) if len(left) else 1.0
    return max(1.0, float(sum(x * x for x in of_place.values())) / alone)


def mcnemar(a: list[bool], b: list[bool], places: list) -> dict:
    """Exact two-sided test of paired successes: {"only_a", "only_b", "p", "deff"}.

    only_a, only_b: how often only a, or only b, succeeded. p: under a fair coin for each place. deff: design
    effect of the difference.
    places: the place of each pair. Pairs of one place under several seeds are not independent, so
    their differences change sign together. With one pair per place this is McNemar's test.
    """
    differences, of_place = [int(x) - int(y) for x, y in zip(a, b, strict=True)], {}
    for d, place in zip(differences, places, strict=True):
        of_place[place] = of_place.get(place, 0) + d
    steps = [abs(d) for d in of_place.values() if d]
    chance = np.ones(1)  # probability of each sum of signed steps, from the lowest to the highest
    for d in steps:
        chance = (np.pad(chance, (2 * d, 0)) + np.pad(chance, (0, 2 * d))) / 2
    sums = np.arange(-sum(steps), sum(steps) + 1)
    p = min(1.0, float(chance[abs(sums) >= abs(sum(differences))].sum()))
    deff = design_effect(differences, places)
    return {"only_a": differences.count(1), "only_b": differences.count(-1), "p": p, "deff": deff}


def difference_interval(row: dict) -> tuple[float, float]:
    """95 % interval of a difference of paired proportions: of a row that counts gained and lost episodes.

    Bonett and Price's (J. Educ. Behav. Stat. 37, 2012): a Wald interval after one episode is added to each of
    gained and lost, so it has a width even where nothing was gained or lost.
    Its deff is from mcnemar, for pairs that are not independent.
    """
    n, deff = row["paired_n"], row.get("deff", 1.0)
    up, down = (row["gained"] + 1) / (n + 2), (row["lost"] + 1) / (n + 2)
    half = Z * np.sqrt(deff * (up + down - (up - down) ** 2) / (n + 2))
    return float(max(-1.0, up - down - half)), float(min(1.0, up - down + half))


def holm(p: list[float]) -> list[float]:
    """Holm's step-down correction of p-values for testing them all."""
    order = np.argsort(p, kind="stable")
    multiplied = np.arange(len(p), 0, -1) * np.asarray(p, float)[order]
    return np.minimum(1.0, np.maximum.accumulate(multiplied))[np.argsort(order)].tolist()


# ------------------------------------------------------------------------- over trainings, tasks and attempts
def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of independent values, two or more: one for each training."""
    half = special.stdtrit(len(values) - 1, (1 + level) / 2) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def over_clusters(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean of values that come in clusters (tasks, attempts), which are the units.

    The mean is a ratio of two sums over clusters. Each cluster counts with its deviation from that ratio, and
    with clusters of one size that is the t interval of their means. In simulations it covers the truth as
    often as it says (tests/test_stats.py), where a percentile bootstrap over ten tasks covers 90.5 %. Of
    shares near 0 and 100 % it is too narrow. One cluster tells nothing of others: then it is the range of
    the values.
    """
    _, cluster = np.unique(clusters, return_inverse=True)
    if not np.any(cluster):
        return float(np.min(values)), float(np.max(values))
    counts, mean = np.bincount(cluster), np.mean(values)
    return t_interval(mean + (np.bincount(cluster, values) - mean * counts) / counts.mean())


def share_over_clusters(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """The same of values between 0 and 1, which their mean does not leave either."""
    low, high = over_clusters(values, clusters)
    return max(0.0, low), min(1.0, high)
