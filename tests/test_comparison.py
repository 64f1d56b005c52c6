"""minidisp.comparison against scipy, numpy and hand values."""

import math

import numpy as np
import pytest

from minidisp.comparison import (
    Run,
    bootstrap_mean,
    compare,
    holm,
    paired_bootstrap,
    paired_interval,
    paired_p,
    sign_test_p,
    student_t,
)
from minidisp.tasks import _mean_measure


def test_paired_bootstrap_covers_a_known_difference():
    rng = np.random.default_rng(0)
    hard = rng.gamma(4, 100, size=400)  # blocks differ far more from each other than the two models do
    first, second = hard, hard + rng.normal(2.0, 5.0, size=400)
    n_bytes = np.full(400, 1024)
    difference, low, high = paired_bootstrap(first, second, n_bytes)
    assert difference == pytest.approx((second - first).sum() / n_bytes.sum() / math.log(2))
    # The normal approximation, from the spread of the paired differences.
    spread = 1.96 * (second - first).std() / math.sqrt(400) / 1024 / math.log(2)
    assert low == pytest.approx(difference - spread, abs=0.15 * spread)
    assert high == pytest.approx(difference + spread, abs=0.15 * spread)
    assert paired_bootstrap(second, first, n_bytes)[0] == -difference


def test_paired_bootstrap_of_one_block_knows_no_spread():
    difference, low, high = paired_bootstrap(np.array([1.0]), np.array([2.0]), np.array([8]))
    assert difference == pytest.approx(1 / 8 / math.log(2))
    assert math.isnan(low)
    assert math.isnan(high)


def test_student_t_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    for df in (*range(1, 41), 99, 100, 1000, 1001):
        assert student_t(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-11), df


@pytest.mark.parametrize("n", [2, 3, 8])
def test_paired_interval_agrees_with_scipy(n):
    stats = pytest.importorskip("scipy.stats")
    first, second = np.random.default_rng(n).normal(size=(2, n))
    mean, sd, low, high = paired_interval(first.tolist(), second.tolist())
    interval = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert mean == pytest.approx((second - first).mean())
    assert sd == pytest.approx(np.std(second - first, ddof=1))
    assert (low, high) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize("n", [2, 3, 4, 6, 12])
def test_paired_p_and_the_sign_test_agree_with_scipy(n):
    stats = pytest.importorskip("scipy.stats")
    first, second = np.random.default_rng(n).normal(size=(2, n))
    assert paired_p(first, second) == pytest.approx(stats.ttest_rel(second, first).pvalue, rel=1e-9)
    assert sign_test_p(first, second) == pytest.approx(stats.binomtest(int((second > first).sum()), n).pvalue)
    _, _, low, high = paired_interval(first, second)
    assert (paired_p(first, second) < 0.05) == (low > 0 or high < 0)


def test_tests_over_seeds_at_their_limits():
    assert math.isnan(paired_p([1.0], [2.0]))
    assert paired_p([1, 2, 3], [2, 3, 4]) == 0
    assert paired_p([1, 2], [1, 2]) == 1
    assert sign_test_p([0] * 6, [1] * 6) == 0.03125
    assert sign_test_p([0] * 7, [0] + [1] * 6) == 0.03125
    assert sign_test_p([0, 0], [0, 0]) == 1
    assert math.isnan(sign_test_p([2] * 6, [1] * 5 + [math.nan]))


def test_holm_corrects_for_the_number_of_comparisons():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, math.nan, 0.9])[::2] == [1, 1]
    assert math.isnan(holm([0.5, math.nan])[1])
    assert holm([]) == []


def test_paired_interval_at_its_limits():
    mean, *unknown = paired_interval([1.0], [3.0])
    assert mean == 2
    assert all(math.isnan(x) for x in unknown)
    assert paired_interval([1, 2, 3], [2, 3, 4]) == (1, 0, 1, 1)
    for first, second in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="values cannot be paired"):
            paired_interval(first, second)


@pytest.mark.parametrize("kinds", [[0.0, 1.0], [0.0, 0.5, 1.0], [-1.0, 0.0, 0.5]])
def test_bootstrap_of_a_mean_draws_with_replacement(kinds):
    """The interval of as many resamples, drawn one value after the other."""
    values = np.random.default_rng(3).choice(kinds, 300)
    mean, low, high = bootstrap_mean(values, resamples=20_000)
    drawn = values[np.random.default_rng(4).integers(0, 300, (20_000, 300))].mean(axis=1)
    assert mean == pytest.approx(values.mean(), abs=1e-12)
    assert [low, high] == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.004)
    assert bootstrap_mean(values) == bootstrap_mean(values)


def test_bootstrap_of_a_mean_at_its_limits():
    assert bootstrap_mean(np.ones(50)) == (1.0, 1.0, 1.0)
    mean, low, high = bootstrap_mean(np.array([0.5]))
    assert mean == 0.5
    assert math.isnan(low)
    assert math.isnan(high)


def test_equal_scores_over_seeds_may_come_from_different_predictions():
    answers = {"a": [1.0, 0, 1, 0], "b": [0.0, 1, 0, 1]}
    for second, verdict in (("b", "not significant"), ("a", "no difference")):
        names = [*("a" for _ in range(3)), *(second for _ in range(3))]
        values = [np.array(answers[name]) for name in names]
        runs = [
            Run(f"{i // 3}-s{i % 3}", "tokenizer", {"seed": i % 3, "dispersion": 0.1 * (i // 3)}, "data")
            for i in range(6)
        ]
        measure = _mean_measure("acc", values, "questions", "%")
        found = compare(runs, measure)
        assert found.groups[1]["versus_first"]["verdict"] == verdict
        assert any("both predict the same on these questions" in s for s in found.sentences) == (second == "a")
