"""Statistics of comparisons: bootstrap over text, and Student's and sign tests over seeds.

What is undefined (an interval from one value) is NaN.
"""

import math
from collections.abc import Sequence

import numpy as np

from minidisp.metrics import bits_per_byte


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, n_bytes: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Difference in bits per byte between two models on the same text, second minus first, with a 95 % interval.

    first, second: nats of each model per block of text, (N,) float64; n_bytes: bytes of each block. Blocks are
    resampled together for both models (Efron's percentile bootstrap), so a block that is hard for both models cancels
    out. Blocks and not tokens, because neighbouring tokens are not independent. Returns (difference, low, high); low
    and high are NaN if N < 2.
    """
    difference = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    n_bytes, N = np.asarray(n_bytes, np.float64), len(difference)
    observed = bits_per_byte(float(difference.sum()), float(n_bytes.sum()))
    if N < 2:
        return observed, math.nan, math.nan
    rng = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for i in range(resamples):
        blocks = rng.integers(0, N, N)
        drawn[i] = difference[blocks].sum() / n_bytes[blocks].sum() / math.log(2)
    return observed, *(float(q) for q in np.quantile(drawn, (0.025, 0.975)))


def bootstrap_mean(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of (N,) values, with a 95 % interval (Efron's percentile bootstrap): (mean, low, high); NaN ends if N < 2.

    For values of few kinds, such as 0 and 1: how often each is drawn in a resample is multinomial, so that is drawn.
    """
    values = np.asarray(values, np.float64)
    mean, N = float(values.mean()), len(values)
    if N < 2:
        return mean, math.nan, math.nan
    kinds, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(N, counts / N, size=resamples) @ kinds / N
    return mean, *(float(q) for q in np.quantile(drawn, (0.025, 0.975)))


def student_within(t: float, df: int) -> float:
    """The share of Student's distribution, df >= 1, that lies between -t and t, t >= 0; 0.95 for t = 12.706 and df = 1.

    The closed form for whole df (Abramowitz & Stegun 26.7.3 and 26.7.4).
    """
    theta = math.atan(t / math.sqrt(df))
    term, total = (math.cos(theta), 0.0) if df % 2 else (1.0, 0.0)
    for k in range(2 + df % 2, df + 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (k - 1) / k
    inner = total * math.sin(theta)
    return 2 / math.pi * (theta + inner) if df % 2 else inner


def student_t(df: int) -> float:
    """The t so that 95 % of Student's distribution, df >= 1, lies between -t and t; 12.706 for df = 1.

    Bisection in theta = arctan(t / sqrt(df)).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_within(math.sqrt(df) * math.tan(middle), df) < 0.95 else (low, middle)
    return math.sqrt(df) * math.tan(low)


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean of the paired differences second - first (over seeds, say), their standard deviation, and a 95 % interval.

    The interval is Student's, mean +- t sd / sqrt(n), so it is right for normally distributed differences even if there
    are few.
    Returns (mean, sd, low, high); with one pair, all but the mean are NaN. Raises ValueError unless both have n >= 1
    values.
    """
    if len(first) != len(second) or len(first) == 0:
        raise ValueError(f"{len(first)} and {len(second)} values are no pairs")
    difference = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    mean, n = float(difference.mean()), len(difference)
    if n == 1:
        return mean, math.nan, math.nan, math.nan
    sd = float(difference.std(ddof=1))
    half = student_t(n - 1) * sd / math.sqrt(n)
    return mean, sd, mean - half, mean + half


def paired_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of Student's paired test that the mean of second - first is 0; NaN with one pair.

    As paired_interval: p < 0.05 exactly where the interval leaves out 0. Equal values throughout give 1.
    """
    mean, sd, _, _ = paired_interval(first, second)
    if sd == 0:
        return float(mean == 0)
    n = len(first)
    return math.nan if n == 1 else 1 - student_within(abs(mean) / sd * math.sqrt(n), n - 1)


def sign_test_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of the sign test that second is as often below first as above it; equal pairs are left out.

    Six of six seeds on one side give 0.031, four of four 0.125: fewer than six can show nothing at 0.05. NaN if a value
    is.
    """
    signs = np.sign(np.asarray(second, np.float64) - np.asarray(first, np.float64))
    if np.isnan(signs).any():
        return math.nan
    n, fewer = int((signs != 0).sum()), int(min((signs > 0).sum(), (signs < 0).sum()))
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number (Holm 1979): one below 0.05 is so with all of them looked at. NaN stays."""
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected, worst = list(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected
