"""Statistics of a study, on simulated results whose truth is known and against scipy's tests."""

import math

import numpy as np
import pytest
from scipy import stats

from ghosttrain.study.stats import (
    holm,
    largest_deviation,
    paired_difference,
    power,
    seeds_needed,
)


def simulated(rng, seeds, difference, shared=1.0, own=0.3):
    """Return arm and control: what a seed brings to both, and what each has alone."""
    common = rng.normal(70, shared, seeds)
    arm = common + difference + rng.normal(0, own, seeds)
    control = common + rng.normal(0, own, seeds)
    return dict(enumerate(arm)), dict(enumerate(control))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_hold_the_true_difference_as_often_as_they_say(seeds):
    rng = np.random.default_rng(0)
    rounds = 1500
    found = [paired_difference(*simulated(rng, seeds, 0.4)) for _ in range(rounds)]
    share = np.mean([each.low <= 0.4 <= each.high for each in found])
    assert abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / rounds)


def test_pairs_take_out_what_a_seed_brings_to_both():
    arm, control = simulated(np.random.default_rng(1), 5, 0.8, shared=5.0, own=0.1)
    paired = paired_difference(arm, control)
    unpaired = stats.ttest_ind(list(arm.values()), list(control.values()))
    assert paired.p < 0.01 < 0.5 < unpaired.pvalue
    assert paired.p == pytest.approx(
        stats.ttest_rel(list(arm.values()), list(control.values())).pvalue
    )


def test_false_findings_of_a_whole_study_stay_below_five_percent_after_correction():
    """Five arms that do not differ from one control: an uncorrected study finds something in more
    than one of ten studies, a corrected one in at most one of twenty.
    """
    rng = np.random.default_rng(2)
    rounds, uncorrected, corrected = 600, 0, 0
    for _ in range(rounds):
        control = rng.normal(70, 0.3, 5)
        arms = [dict(enumerate(rng.normal(70, 0.3, 5))) for _ in range(5)]
        p = [paired_difference(arm, dict(enumerate(control))).p for arm in arms]
        uncorrected += min(p) < 0.05
        corrected += min(holm(p)) < 0.05
    assert uncorrected / rounds > 0.1
    assert corrected / rounds < 0.05 + 3 * math.sqrt(0.05 * 0.95 / rounds)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_measure_in_steps_finds_no_more_than_it_may(seeds):
    """Two equal arms on 360 images of which 98.5 % are right: pairs are often all equal."""
    rng = np.random.default_rng(4)
    rounds = 2000
    right = rng.binomial(360, 0.985, (2, rounds, seeds)) / 3.6
    found = [
        paired_difference(dict(enumerate(arm)), dict(enumerate(control))).p < 0.05
        for arm, control in zip(*right, strict=True)
    ]
    assert np.mean(found) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / rounds)


def test_a_deviation_lies_below_its_largest_as_often_as_it_says():
    values = np.random.default_rng(0).normal(0, 2, (4000, 3)).std(axis=1, ddof=1)
    inside = np.mean([2 <= largest_deviation(float(value), 3) for value in values])
    assert abs(inside - 0.975) < 0.01  # the upper end of a two-sided interval of 95 %


def test_holm_by_hand():
    # 4 tests: .01 * 4, .02 * 3, .03 * 2 = .06, and the largest before it holds for .04 * 1
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.01, 0.03], 4) == pytest.approx([0.04, 0.09])  # as with two more of p 1
    assert holm([0.01, 0.03], 1) == holm([0.01, 0.03])
    kept = holm([0.01, math.nan, 0.02])
    assert kept[0] == 0.02 and math.isnan(kept[1]) and kept[2] == 0.02
    assert holm([]) == []


def test_only_common_seeds_count_and_one_pair_has_no_interval():
    found = paired_difference({0: 2.0, 1: 3.0, 7: 90.0}, {0: 1.0, 1: 1.0, 9: -90.0})
    assert (found.pairs, found.mean) == (2, 1.5)
    single = paired_difference({0: 2.0}, {0: 1.0})
    assert single[:2] == (1, 1.0) and all(math.isnan(x) for x in single[2:])
    same = paired_difference({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})
    assert same.p == 0.5 and math.isnan(same.low)  # the test of signs: both of 2 say more
    assert paired_difference({0: 2.0, 1: 3.0}, {0: 2.0, 1: 3.0}).p == 1.0
    right = {0: 100 * 355 / 360, 1: 100 * 354 / 360}  # one image more, but for rounding
    one_more = paired_difference({0: 100 * 356 / 360, 1: 100 * 355 / 360}, right)
    assert one_more.p == 0.5 and math.isnan(one_more.low)
    with pytest.raises(ValueError, match="no common seed"):
        paired_difference({0: 1.0}, {1: 1.0})


def test_the_number_of_seeds_finds_the_difference_as_often_as_asked():
    assert seeds_needed(0.3, 1e-9) == 2
    seeds = seeds_needed(0.3, 0.25)
    assert power(seeds - 1, 0.3, 0.25) < 0.8 <= power(seeds, 0.3, 0.25)
    rng = np.random.default_rng(3)
    rounds = 1500
    found = stats.ttest_1samp(rng.normal(0.3, 0.25, (rounds, seeds)), 0.0, axis=1).pvalue < 0.05
    expected = power(seeds, 0.3, 0.25)
    assert abs(np.mean(found) - expected) < 4 * math.sqrt(expected * (1 - expected) / rounds)
    assert seeds_needed(0.001, 1.0) is None
    assert seeds_needed(0.3, 0.25, level=0.99) > seeds
