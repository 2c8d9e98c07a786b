"""LIBERO's conventions, the surrogate, batches and statistics, each checked another way.

pytest tests/test_common.py
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

import common
from report import stats
from runtime.errors import UserError
from sim.env import axis_angle


# ----------------------------------------------------------------------------------------------------- LIBERO
def test_init_state_groups_share_no_state_and_cover_all():
    states = [s for group in common.INIT_GROUPS for s in common.init_states(group)]
    assert sorted(states) == list(range(50))


@pytest.mark.parametrize("group, n", [("val", 6), ("test", 11), ("demos", 0)])
def test_init_states_never_reach_into_another_group(group, n):
    with pytest.raises(UserError):
        common.init_states(group, n)


@pytest.mark.parametrize("angle", [0.3, math.pi - 1e-3, math.pi + 1e-3, 5.0])
def test_axis_angle_is_continuous_through_pi(angle):
    axis = np.array([0.6, -0.8, 0.0])
    quat = np.concatenate([axis * math.sin(angle / 2), [math.cos(angle / 2)]])
    before = quat.copy()
    np.testing.assert_allclose(axis_angle(quat), axis * angle, atol=1e-9)
    assert np.array_equal(quat, before)


def test_axis_angle_of_no_rotation_is_zero():
    assert np.array_equal(axis_angle(np.array([0.0, 0.0, 0.0, 1.0])), np.zeros(3))


# -------------------------------------------------------------------------------------------------- surrogate
def oracle_velocity(target):
    """The velocity field of a point mass at `target` (B, H, D): every path leads straight there."""
    return lambda index, x_t, t: (x_t - target[index]) / t[:, None, None]


def test_time_one_is_noise_and_the_error_of_the_true_field_is_zero():
    g = common.stream(0, "test")
    chunk, mask = torch.randn(3, 5, 7, generator=g), torch.ones(3, 5, dtype=torch.bool)
    draws = common.make_draws(3, 5, 7, 4, g, "stratified")
    assert draws.t[:, 0].tolist() == [0.125, 0.375, 0.625, 0.875], "the paper's, sec. 3.2"
    assert common.flow_matching_error(oracle_velocity(chunk), chunk, draws, mask).max() < 1e-9
    at_noise = []
    common.flow_matching_error(
        lambda i, x, t: at_noise.append(x) or x, chunk, dataclasses.replace(draws, t=torch.ones(4, 3)), mask
    )
    assert torch.equal(at_noise[0].view(4, 3, 5, 7), draws.eps)  # t = 1: all noise


def test_surrogate_equals_a_loop_written_from_the_definition():
    g = common.stream(1, "test")
    b, h, d, k = 2, 4, 9, 3
    chunk, weights = torch.randn(b, h, d, generator=g), torch.randn(d, d, generator=g)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    draws = common.make_draws(b, h, d, k, g, "beta")

    def velocity(index, x_t, t):
        return torch.tanh(x_t @ weights) * t[:, None, None] + index[:, None, None]

    for weight, w in {
        "velocity": lambda t: 1.0,
        "noise": lambda t: (1 - t) ** 2,
        "elbo": lambda t: (1 - t) / max(t, 0.05),
    }.items():
        error = common.flow_matching_error(velocity, chunk, draws, mask)
        ours = common.surrogate_log_prob(error, draws.t, weight)
        for row in range(b):
            total = 0.0
            for i in range(k):
                t = draws.t[i, row].item()
                x = t * draws.eps[i, row] + (1 - t) * chunk[row]
                v = torch.tanh(x @ weights) * t + row
                for step in range(h):
                    for dim in range(7):
                        u = draws.eps[i, row, step, dim] - chunk[row, step, dim]
                        total += w(t) * mask[row, step].item() * (v[step, dim] - u).item() ** 2 / k
            assert ours[row].item() == pytest.approx(-total, rel=1e-4)


@pytest.mark.parametrize("scheme", ["beta", "iid"])
def test_beta_draws_have_the_moments_of_openpi(scheme):
    """Beta(1.5, 1) has the mean 3/5 and the variance 12/175."""
    t = common.make_draws(50_000, 1, 1, 2, common.stream(0, "t"), scheme).t
    assert t.min() > 0.0009 and t.max() <= 1.0
    assert t.mean().item() == pytest.approx(0.6 * 0.999 + 0.001, abs=0.003)
    assert t.var().item() == pytest.approx(12 / 175, abs=0.003)
    below, above = t.aminmax(dim=0)
    median = 0.5 ** (1 / 1.5) * 0.999 + 0.001  # parts the two strata
    assert ((below <= median) & (above >= median)).all() == (scheme == "beta")


def test_mirrored_draws_are_a_noise_and_its_mirror_image_at_the_same_time():
    draws = common.make_draws(3, 5, 7, 4, common.stream(0, "a"), "mirrored")
    assert torch.equal(draws.eps[:2], -draws.eps[2:]) and torch.equal(draws.t[:2], draws.t[2:])
    assert draws.t[:2, 0].tolist() == [0.25, 0.75]


def test_repeated_draws_serve_chosen_and_rejected_alike():
    draws = common.make_draws(3, 5, 7, 4, common.stream(0, "a"), "iid")
    both = draws.repeat(2)
    for index in (torch.arange(3), torch.arange(3, 6)):
        half = both.select(index)
        assert torch.equal(half.t, draws.t) and torch.equal(half.eps, draws.eps)


# ------------------------------------------------------------------------------------- batches and randomness
def test_two_processes_take_each_row_of_a_batch_once(monkeypatch):
    draws = common.make_draws(5, 2, 7, 4, common.stream(0, "a"), "iid")
    batch = {"state": torch.arange(5), "instruction": list("abcde")}, torch.arange(5) * 10, None, draws
    alone = common.own_rows(5, *batch)
    assert alone[0]["instruction"] == list("abcde") and torch.equal(alone[3].t, draws.t)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, rows in enumerate(([0, 2, 4], [1, 3])):
        monkeypatch.setenv("RANK", str(rank))
        obs, chunks, nothing, own = common.own_rows(5, *batch)
        assert obs["state"].tolist() == rows and obs["instruction"] == ["abcde"[i] for i in rows]
        assert chunks.tolist() == [10 * i for i in rows] and nothing is None
        assert torch.equal(own.t, draws.t[:, rows]) and torch.equal(own.eps, draws.eps[:, rows])


def test_streams_depend_on_every_name_and_on_nothing_else():
    a = torch.randn(4, generator=common.stream(7, "x", 1))
    torch.manual_seed(123)
    torch.randn(10)
    assert torch.equal(a, torch.randn(4, generator=common.stream(7, "x", 1)))
    others = [
        common.stream(8, "x", 1),
        common.stream(7, "y", 1),
        common.stream(7, "x", 2),
        common.stream(7, "x", "1"),
    ]
    assert all(not torch.equal(a, torch.randn(4, generator=g)) for g in others)


# ------------------------------------------------------------------------------------------------- statistics
def test_wilson_against_published_values():
    assert stats.wilson(38, 50) == pytest.approx((0.626, 0.857), abs=5e-4)
    assert stats.wilson(450, 500) == pytest.approx((0.871, 0.923), abs=5e-4)
    assert stats.wilson(0, 0) == (0.0, 1.0)
    for n in range(1, 300):
        intervals = [stats.wilson(wins, n) for wins in range(n + 1)]
        assert all(low <= wins / n <= high for wins, (low, high) in enumerate(intervals))
        assert intervals[0][0] == 0 and intervals[n][1] == 1 and intervals[0][1] < 1


def test_mcnemar_against_the_binomial_sum():
    a = [True] * 35 + [False] * 25 + [True] * 100
    b = [False] * 35 + [True] * 25 + [True] * 100
    test = stats.mcnemar(a, b, range(160))
    tail = sum(math.comb(60, i) for i in range(26)) / 2**60
    assert (test["only_a"], test["only_b"]) == (35, 25) and test["p"] == pytest.approx(2 * tail)
    assert stats.mcnemar([True, False], [True, False], [0, 1])["p"] == 1.0 and test["deff"] == 1.0


def test_pairs_of_one_place_change_sign_together():
    """Against all assignments of signs to six places, whose pairs are three seeds."""
    g = np.random.default_rng(0)
    a, b, places = g.random(18) < 0.7, g.random(18) < 0.4, np.arange(18) % 6
    d = np.array([(a[places == i].astype(int) - b[places == i]).sum() for i in range(6)])
    sums = [abs((np.array(signs) * d).sum()) for signs in itertools.product((-1, 1), repeat=6)]
    assert stats.mcnemar(a, b, places)["p"] == pytest.approx(np.mean([s >= abs(d.sum()) for s in sums]))
    once = stats.mcnemar(a[:6], b[:6], places[:6])
    three_a, three_b = np.tile(a[:6], 3), np.tile(b[:6], 3)  # the same episodes under three seeds
    thrice = stats.mcnemar(three_a, three_b, places)
    assert thrice["p"] == once["p"] and thrice["deff"] == pytest.approx(3, rel=0.2)
    assert stats.mcnemar(three_a, three_b, np.arange(18))["p"] < once["p"]


def test_seeds_that_agree_narrow_no_interval():
    """Three seeds that agree count as one; three that are independent count as three."""
    g = np.random.default_rng(1)
    once, places = list(g.random(100) < 0.7), list(range(100))
    wins = sum(once)
    assert stats.design_effect(once, places) == 1.0
    assert stats.design_effect(once * 3, places * 3) == pytest.approx(3)
    assert stats.wilson(3 * wins, 300, 3.0) == pytest.approx(stats.wilson(wins, 100))
    independent = list(g.random(3000) < 0.7)
    assert stats.design_effect(independent, list(range(1000)) * 3) == pytest.approx(1, abs=0.1)
    assert stats.design_effect([1, 1], [0, 1]) == stats.design_effect([], []) == 1.0
    assert stats.design_effect([1] * 6, [0, 1, 2] * 2) == 2, "seeds that agree on everything are one"


def test_wilson_is_scipys_interval_of_independent_episodes():
    scipys = binomtest(70, 100).proportion_ci(0.95, method="wilson")
    assert stats.wilson(70, 100) == pytest.approx(tuple(scipys), abs=1e-6)


def test_what_the_places_of_a_task_share_is_no_agreement_of_seeds():
    """Easy and hard tasks, three independent seeds on thirty places each."""
    g = np.random.default_rng(1)
    tasks, places = np.arange(300) % 10, np.arange(300) % 100
    values = [list(g.random(300) < (1 + tasks) / 12) for _ in range(200)]
    assert np.mean([stats.design_effect(v, places, list(tasks)) for v in values]) < 1.15
    assert np.mean([stats.design_effect(v, places) for v in values]) > 1.3, "without the tasks"


def test_seeds_that_agree_count_once_where_each_task_has_a_single_place():
    once = list(np.random.default_rng(1).random(40) < 0.5)
    assert stats.design_effect(once * 3, list(range(40)) * 3, list(range(40)) * 3) == pytest.approx(3)
    values = np.array([1.0, 0.0])
    assert stats.design_effect(values, [0, 1]) == 1.0 and values.tolist() == [1.0, 0.0], "left as they were"


def test_an_interval_over_tasks_is_wider_than_wilson_when_tasks_differ():
    values, clusters = np.repeat([1.0, 0.0], 50), np.repeat(np.arange(10), 10)
    low, high = stats.over_clusters(values, clusters)
    wl, wh = stats.wilson(50, 100)
    assert low < wl - 0.1 and high > wh + 0.1  # ten tasks say less than a hundred episodes
