"""Intervals, power and equivalence: against simulation, scipy's tests and published values.

pytest tests/test_stats.py
"""

import numpy as np
import pytest
from scipy import stats as scipys

from report import power, stats


def test_a_t_interval_is_scipys():
    values = [0.03, 0.06, 0.13, 0.16, 0.21]
    theirs = scipys.ttest_1samp(values, 0).confidence_interval(0.95)
    assert stats.t_interval(values) == pytest.approx(tuple(theirs))
    assert stats.t_interval(values, 0.9) == pytest.approx(
        tuple(scipys.ttest_1samp(values, 0).confidence_interval(0.9))
    )
    assert stats.t_interval(values) == pytest.approx(
        (0.0270, 0.2090), abs=2e-4
    )  # by hand: 11.8 +- 2.776 x 3.28


def simulated(tasks: int, each: int, trials: int = 4000):
    """Success of `each` episodes on tasks whose own rates spread over a Beta(5, 2) of mean 5/7."""
    g = np.random.default_rng(3)
    rates = g.beta(5, 2, (trials, tasks))
    return (g.random((trials, tasks, each)) < rates[..., None]).astype(float).reshape(trials, -1)


def test_an_interval_over_tasks_covers_as_often_as_it_says():
    """Within a point of 95 %, where the percentile bootstrap that it replaces is far below."""
    tasks, each = 10, 10
    clusters, truth, covered, bootstrap = np.repeat(np.arange(tasks), each), 5 / 7, 0, 0
    picks = np.random.default_rng(0).integers(tasks, size=(1000, tasks))
    for values in (trials := simulated(tasks, each)):
        low, high = stats.over_clusters(values, clusters)
        covered += low <= truth <= high
        means = values.reshape(tasks, each).mean(1)[picks].mean(1)
        bootstrap += np.quantile(means, 0.025) <= truth <= np.quantile(means, 0.975)
    assert covered / len(trials) == pytest.approx(0.95, abs=0.01)
    assert bootstrap / len(trials) < 0.92


def test_an_interval_over_attempts_of_unequal_size_covers_as_often_as_it_says():
    g, covered = np.random.default_rng(5), 0
    for _ in range(3000):
        sizes = g.integers(1, 4, 60)
        clusters = np.repeat(np.arange(60), sizes)
        rates = g.beta(2, 1, 60)[clusters]  # of mean 2/3, whatever the size
        low, high = stats.over_clusters(g.random(len(clusters)) < rates, clusters)
        covered += low <= 2 / 3 <= high
    assert covered / 3000 == pytest.approx(0.95, abs=0.01)


def test_an_interval_over_equal_clusters_is_that_of_their_means():
    values = simulated(7, 5, 1)[0]
    means = values.reshape(7, 5).mean(1)
    assert stats.over_clusters(values, np.repeat(list("gfedcba"), 5)) == pytest.approx(
        stats.t_interval(means)
    )


def test_power_of_t_against_published_values():
    """Cohen (1988), tables 2.3: two groups of 64 at d = 0.5, 26 at 0.8, 393 at 0.2 have a power of 80 %."""
    for d, n in ((0.5, 64), (0.8, 26), (0.2, 393)):
        assert power.t_power(d * np.sqrt(n / 2), 2 * n - 2) == pytest.approx(0.80, abs=0.01)
    assert power.t_power(0, 5) == pytest.approx(0.05, abs=1e-4)
    assert power.t_power(500, 2) > 0.99 and power.t_power(1e6, 11) == 1, "far beyond"
    theirs = 1 - scipys.nct.cdf(scipys.t.ppf(0.975, 2), 2, 5) + scipys.nct.cdf(-scipys.t.ppf(0.975, 2), 2, 5)
    assert power.t_power(5, 2) == pytest.approx(theirs, abs=1e-4)
    assert power.t_power(-3.0, 8) == pytest.approx(power.t_power(3.0, 8))


def test_small_telescopes_of_simonsohns_example():
    """20 a group: d33 = 0.5 (Simonsohn 2015)."""
    d33 = power.detectable(lambda d: power.t_power(d * np.sqrt(10), 38), 1 / 3)
    assert d33 == pytest.approx(0.5, abs=0.01)


def test_power_of_a_t_test_over_trainings_by_simulation():
    g = np.random.default_rng(7)
    effects = g.normal(0.05, 0.049, (20_000, 6))
    won = scipys.ttest_1samp(effects, 0, axis=1).pvalue < 0.05
    assert power.t_power(0.05 / (0.049 / np.sqrt(6)), 5) == pytest.approx(won.mean(), abs=0.01)


def test_power_of_paired_episodes():
    """The rows of the evaluation's plan: Object +20 has 91 %, +14 63 %, Goal +8 40 %, Spatial +2.7 9 %."""
    assert power.paired_power(0.20, 100, 0.38) == pytest.approx(0.91, abs=0.005)
    assert power.paired_power(0.14, 100, 0.38) == pytest.approx(0.63, abs=0.005)
    assert power.paired_power(0.08, 100, 0.22) == pytest.approx(0.40, abs=0.005)
    assert power.paired_power(0.027, 100, 0.20) == pytest.approx(0.09, abs=0.005)
    assert power.detectable(lambda d: power.paired_power(d, 100, 0.38)) == pytest.approx(0.17, abs=0.005)
    for n, d, discordance, deff in (
        (2280, 0.03, 0.22, 1.18),
        (940, 0.05, 0.30, 1.0),
        (420, 0.05, 0.107, 1.25),
    ):
        found = power.detectable(lambda e, n=n, D=discordance, f=deff: power.paired_power(e, n, D, f))
        assert found == pytest.approx(
            d, rel=0.1
        )  # N per arm = deff (1.96 sqrt D + 0.84 sqrt(D - d^2))^2 / d^2


def test_power_of_paired_episodes_by_simulation():
    g, n, gained, lost = np.random.default_rng(9), 400, 0.15, 0.08
    counts = g.multinomial(n, [gained, lost, 1 - gained - lost], 20_000)
    up, down = counts[:, 0], counts[:, 1]
    z = (up - down) / np.sqrt(np.maximum(up + down, 1))
    assert power.paired_power(0.07, n, 0.23) == pytest.approx((abs(z) > stats.Z).mean(), abs=0.015)


def test_what_no_experiment_can_see_is_1():
    assert power.detectable(lambda d: power.paired_power(d, 3, 0.5)) == pytest.approx(1)
    assert power.detectable(lambda d: power.paired_power(d, 100, 0.0)) < 0.1, (
        "nobody differs: a few would show"
    )


def test_equivalence_against_a_published_example():
    """Lakens' TOSTER, TOSTtwo: means 5.25 and 5.22, sd 0.95 and 0.83, n 95 and 89, bounds +-0.43 sd:
    t = -2.69, p = 0.004."""
    error = np.sqrt(0.95**2 / 95 + 0.83**2 / 89)
    delta = 0.43 * np.sqrt((0.95**2 + 0.83**2) / 2)
    assert power.tost(0.03, error, 182, delta) == pytest.approx(0.004, abs=0.0005)
    assert (0.03 - delta) / error == pytest.approx(-2.69, abs=0.005)


def test_equivalence_is_the_90_percent_interval_within_the_bounds():
    g = np.random.default_rng(11)
    for _ in range(200):
        values = g.normal(0.01, 0.03, 6)
        low, high = stats.t_interval(values, 0.9)
        error = values.std(ddof=1) / np.sqrt(6)
        assert (power.tost(values.mean(), error, 5, 0.03) < 0.05) == (low > -0.03 and high < 0.03)


def test_equivalence_at_the_bound_is_found_in_one_case_of_twenty():
    g = np.random.default_rng(13)
    values = g.normal(0.03, 0.02, (20_000, 12))
    found = [power.tost(v.mean(), v.std(ddof=1) / np.sqrt(12), 11, 0.03) < 0.05 for v in values]
    assert np.mean(found) == pytest.approx(0.05, abs=0.005)


def test_one_cluster_gives_a_range_that_json_can_hold():
    assert stats.over_clusters(np.array([0.0, 1.0, 1.0]), np.zeros(3, int)) == (0.0, 1.0)


def test_an_interval_of_a_share_stays_between_0_and_1():
    low, high = stats.share_over_clusters(np.array([1.0, 1.0, 0.0, 1.0]), np.array([0, 0, 1, 1]))
    assert stats.over_clusters(np.array([1.0, 1.0, 0.0, 1.0]), np.array([0, 0, 1, 1]))[1] > 1
    assert (low, high) == (0.0, 1.0)
