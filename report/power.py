"""What an experiment can see, and what it excludes: power, the smallest effect that is found, equivalence."""

from collections.abc import Callable

import numpy as np
from scipy import optimize, special

from report.stats import Z


def t_power(shift: float, df: float) -> float:
    """Power of a two-sided t test at 5 %. shift: the true effect in standard errors."""
    quantiles = special.gammaincinv(df / 2, (np.arange(2000) + 0.5) / 2000)  # of the estimated standard error
    critical = special.stdtrit(df, 0.975) * np.sqrt(2 * quantiles / df)
    return float(np.mean(special.ndtr(shift - critical) + special.ndtr(-shift - critical)))


def over_trainings(error: float, df: float) -> Callable[[float], float]:
    """The power of that test for an effect. error: its standard error."""
    return lambda effect: t_power(effect / error, df)


def paired_power(effect: float, n: int, discordance: float, deff: float = 1.0) -> float:
    """Power of McNemar's test at 5 % for a difference of success rates.

    discordance: the share of pairs that differ, at least |effect| (Connor, Biometrics 43, 1987).
    """
    d = min(abs(effect), 0.9999)
    both = max(discordance, d, 1e-9)
    return float(special.ndtr((d * np.sqrt(n / deff) - Z * np.sqrt(both)) / np.sqrt(both - d * d)))


def detectable(power: Callable[[float], float], target: float = 0.8) -> float:
    """The smallest effect, up to 1, that is found with the target's power; 1 where none is.

    target = 1/3 gives d33 of a replication (Simonsohn, Psychol. Sci. 26, 2015): an interval below it says
    that the first study could hardly have seen an effect so small.
    """
    return optimize.bisect(lambda effect: power(effect) - target, 0, 1) if power(1) >= target else 1.0


def tost(value: float, error: float, df: float, delta: float) -> float:
    """p of two one-sided tests: that the truth lies within +-delta (Schuirmann, 1987). error: standard."""
    return float(special.stdtr(df, (abs(value) - delta) / error))


def t_test(value: float, error: float, df: float) -> float:
    """Two-sided p of a value with this standard error."""
    return float(2 * special.stdtr(df, -abs(value) / error))
