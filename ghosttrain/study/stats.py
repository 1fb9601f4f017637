"""Statistics of a study: the difference of an arm to its control over the same seeds.

A seed draws the first weights, the order of the images and their augmentation; two arms of one seed
share them where they can. So the differences of pairs are what is tested, not two separate means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Difference(NamedTuple):
    """An arm less its control, in the unit of the metric."""

    pairs: int
    """Seeds that both have."""
    mean: float
    low: float
    """Lower end of the interval; NaN with fewer than two pairs, or where all pairs are equal."""
    high: float
    p: float
    """Probability of a mean difference this far from 0 or farther where there is none; NaN with
    fewer than two pairs."""


def paired_difference(
    arm: Mapping[int, float], control: Mapping[int, float], level: float = 0.95
) -> Difference:
    """Compare an arm with its control over the seeds that both have, by the paired t-test; where
    all pairs are equal, by the test of signs.

    Args:
        arm: seed -> metric.
        control: seed -> metric.
        level: how often such an interval holds the true difference, for normal differences.

    Raises:
        ValueError: they share no seed.
    """
    seeds = sorted(arm.keys() & control.keys())
    if not seeds:
        raise ValueError(f"no common seed: {sorted(arm)} and {sorted(control)}")
    differences = np.array([arm[seed] - control[seed] for seed in seeds])
    mean = float(differences.mean())
    if len(seeds) < 2:
        return Difference(len(seeds), mean, math.nan, math.nan, math.nan)
    if all_equal(differences):
        # A spread of 0 is that of a measure in steps, such as one image of 360: the t-test would
        # be certain of 2 seeds. The test of signs knows no spread.
        p = 2 * 0.5 ** len(seeds) if mean else 1.0
        return Difference(len(seeds), mean, math.nan, math.nan, p)
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(level)
    return Difference(len(seeds), mean, float(low), float(high), float(test.pvalue))


def all_equal(values: Sequence[float] | np.ndarray) -> bool:
    """Whether numbers differ by no more than rounding, such as 100 * 356 / 360 - 100 * 355 / 360
    and 100 * 355 / 360 - 100 * 354 / 360.
    """
    return bool(np.ptp(values) <= 1e-9 * max(1.0, np.abs(values).max()))


def holm(p_values: Sequence[float], comparisons: int = 0) -> list[float]:
    """Return p-values corrected for their number (Holm, Scand. J. Statist. 6, 1979): where no arm
    differs, the chance that any falls below .05 is at most .05. NaN is not counted and stays.

    Args:
        p_values: of the comparisons that can be made so far.
        comparisons: how many there will be, where they are more: the others count as the largest
            p, so that no p grows by them later.
    """
    corrected, largest = list(p_values), 0.0
    tested = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    number = max(comparisons, len(tested))
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, p * (number - rank)))
        corrected[i] = largest
    return corrected


def largest_deviation(deviation: float, pairs: int, level: float = 0.95) -> float:
    """Return the upper end of the interval of a standard deviation of so many normal values
    (chi-squared): 6.3 times what 3 of them show.
    """
    bound = stats.chi2.ppf((1 - level) / 2, pairs - 1)
    return deviation * math.sqrt((pairs - 1) / float(bound))


def power(seeds: int, difference: float, deviation: float, level: float = 0.95) -> float:
    """Return how often a paired t-test over so many seeds finds a true difference.

    Args:
        seeds: pairs; 2 or more.
        difference: the true one.
        deviation: standard deviation of the differences of pairs, in the same unit.
        level: 1 - the chance to find one where there is none.
    """
    freedom = seeds - 1
    bound = stats.t.ppf((1 + level) / 2, freedom)
    shift = difference / deviation * math.sqrt(seeds)
    found = float(stats.nct.sf(bound, freedom, shift) + stats.nct.cdf(-bound, freedom, shift))
    return 1.0 if math.isnan(found) else found  # scipy's answer far from 0


def seeds_needed(
    difference: float,
    deviation: float,
    chance: float = 0.8,
    most: int = 1000,
    level: float = 0.95,
) -> int | None:
    """Return how many seeds find a true difference with this chance; None above `most`.

    Args:
        difference: the true one.
        deviation: standard deviation of the differences of pairs, above 0.
        chance: to find it.
        most: seeds that are tried.
        level: 1 - the chance to find one where there is none.
    """
    counts = range(2, most + 1)
    return next((n for n in counts if power(n, difference, deviation, level) >= chance), None)
