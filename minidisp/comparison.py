"""Comparing runs: grouping and pairing them, the verdict on a difference, and the statistics behind it.

Runs are grouped by configuration and paired by seed. "Better" and "worse" need the same corpus and at least three pairs
whose interval over seeds excludes 0. Any other difference is reported with the reason why it is no verdict. Undefined
values, such as the interval of a single value, are NaN.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minidisp import printable
from minidisp.metrics import bits_per_byte

LEAST_PAIRS = 3  # of seeds, for a verdict

# Settings of evaluation during training and of logging, which do not affect what a run learns.
LOGGING = frozenset(["eval_every", "eval_tokens", "log_every", "save_every", "keep", "tensorboard", "wandb"])
# Settings that do not change what a run learns (other than by rounding): its name, how it is computed and logged.
APART = LOGGING.union(
    ["preset", "recipe", "out", "seed", "resume", "overwrite"],
    ["recompute", "dispersion_impl", "device", "compile", "threads", "shard"],
)


class Run(NamedTuple):
    """The information about a run by which it is grouped and paired with others."""

    name: str
    tokenizer: str  # its hash
    settings: dict | None = None  # of its training; None if unknown
    data: str | None = None  # hash of its training corpus; None if unknown

    @property
    def seed(self) -> int | None:
        return self.settings.get("seed") if self.settings else None


@dataclass
class Measure:
    """A score of every run, and its difference between two runs on the same text (or questions, pairs, ...)."""

    key: str  # key of the difference in the JSON file
    values: list[float]  # one per run
    difference: Callable[[int, int], tuple[float, float, float]]  # (i, j) -> j minus i, and its 95 % interval
    sampled: str  # what that interval resamples: "text", "questions"
    unit: str  # printed after a difference, such as "bits/byte"
    digits: int = 5
    percent: bool = False  # show 0.01 as 1.00 %
    lower_is_better: bool = False
    remark: Callable[[int, int], str] = field(default=lambda i, j: "")  # of run j against run i

    def show(self, value: float, sign: str = "+") -> str:
        return f"{100 * value:{sign}.2f}" if self.percent else f"{value:{sign}.{self.digits}f}"


def short_names(paths: list[str]) -> list[str]:
    """The shortest distinct names: the last part of each path, or more parts if necessary; always printable."""
    resolved = [Path(os.path.realpath(path)) for path in paths]  # realpath also resolves a loop of symbolic links
    parts = 1
    while len({path.parts[-parts:] for path in resolved}) < len(set(resolved)):
        parts += 1
    return [printable("/".join(path.parts[-parts:])) for path in resolved]


class Comparison(NamedTuple):
    sentences: list[str]
    versus_first: list[dict]  # for every run but the first: the difference, low, high, verdict
    groups: list[dict]  # for every configuration: name, runs, seeds, mean, sd; from the second on, versus_first


def group_runs(runs: Sequence[Run]) -> list[list[int]]:
    """Indices of the runs of each configuration, in order of first appearance.

    A group contains a seed only once: a second checkpoint of a run, for example, goes to another group.
    """
    groups: dict[tuple, list[int]] = {}
    for i, run in enumerate(runs):
        configuration = _configuration(run) if run.settings else f"run {i}"
        again = sum(run.seed == runs[j].seed for key in groups if key[0] == configuration for j in groups[key])
        groups.setdefault((configuration, again), []).append(i)
    return list(groups.values())


def _configuration(run: Run) -> str:
    """A key that is equal for two runs if they differ only in their seeds."""
    settings = {name: value for name, value in run.settings.items() if name not in APART}
    sequences = settings.pop("batch_size", 1) * settings.pop("grad_accum", 1)
    data = run.data or settings.get("data")
    settings |= {"data": data, "tokenizer": run.tokenizer, "sequences": sequences}
    return json.dumps(settings, sort_keys=True, default=str)


def group_name(runs: Sequence[Run], members: Sequence[int]) -> str:
    """The common name of the runs without the seed at the end, or else that of the first."""
    names = {runs[i].name.removesuffix(f"-s{runs[i].seed}") for i in members}
    if len(members) == 1:
        return runs[members[0]].name
    return names.pop() if len(names) == 1 else f"{runs[members[0]].name} and {len(members) - 1} more"


def compare(runs: Sequence[Run], measure: Measure) -> Comparison:
    """Compare every configuration with that of the first run, in sentences and in numbers."""
    groups = group_runs(runs)
    sentences, found = [], []
    verdicts = dict.fromkeys(groups[0], "same configuration")
    for members in groups:
        values = [measure.values[i] for i in members]
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        name = group_name(runs, members)
        entry = {"name": name, "runs": [runs[i].name for i in members], "seeds": [runs[i].seed for i in members]}
        entry |= {"mean": float(np.mean(values)), "sd": sd}
        if len(values) > 1 and not math.isfinite(entry["mean"]):
            sentences.append(f"{name}: undefined, {_broken(runs, measure, members)}")
        elif len(values) > 1:
            sentences.append(
                f"{name}: {len(values)} seeds, mean {measure.show(entry['mean'], '')} {measure.unit}, "
                f"standard deviation {measure.show(sd, '')}"
            )
        if members is not groups[0]:
            sentence, entry["versus_first"] = _against(runs, measure, groups[0], members)
            sentences.append(f"{name} against {group_name(runs, groups[0])}: {sentence}")
            verdicts |= dict.fromkeys(members, entry["versus_first"]["verdict"])
        found.append(entry)
    versus = []
    for i in range(1, len(runs)):
        difference, low, high = measure.difference(0, i)
        verdict = "no difference" if low == high == difference == 0 else verdicts[i]
        if verdict in ("same configuration", "one seed") and math.isnan(low):
            verdict = "too little text to tell"
        versus.append({measure.key: difference, "low": low, "high": high, "verdict": verdict})
    return Comparison(sentences, versus, found)


def _against(runs: Sequence[Run], measure: Measure, first: list[int], other: list[int]) -> tuple[str, dict]:
    """Compare a configuration with the first one: the end of a sentence, and its numbers."""
    seeds = {runs[i].seed: i for i in first}
    pairs = [(seeds[runs[j].seed], j) for j in other if runs[j].seed in seeds]
    i, j = pairs[0] if pairs else (first[0], other[0])
    limit, why = _limit(runs, measure, first, other, len(pairs))
    remark = measure.remark(i, j)
    if len(pairs) > 1:
        a, b = ([measure.values[pair[side]] for pair in pairs] for side in (0, 1))
        mean, sd, low, high = paired_interval(a, b)
        spread = f"mean of {len(pairs)} pairs of seeds, standard deviation {measure.show(sd, '')}, "
        kind, remark = "interval over seeds", ""
    else:
        mean, low, high = measure.difference(i, j)
        sd, spread, kind = math.nan, "", f"interval over the {measure.sampled}"
    numbers = {"pairs": len(pairs), "mean": mean, "sd": sd, "low": low, "high": high}
    if limit == "undefined":
        return f"undefined, {why}", {**numbers, "verdict": limit}
    # Equal scores in all pairs of seeds may come from different predictions.
    if low == high == mean == 0 and all(not any(measure.difference(*pair)) for pair in pairs or [(i, j)]):
        these = "these" if measure.sampled.endswith("s") else "this"
        limit, why = "no difference", f"no difference: both predict the same on {these} {measure.sampled}"
    elif not limit:
        gain = -1 if measure.lower_is_better else 1
        limit = "not significant" if low <= 0 <= high else "better" if gain * mean > 0 else "worse"
        why = f"not significant with {len(pairs)} seeds" if limit == "not significant" else limit
    if math.isnan(low):
        interval = f"too little {measure.sampled} for an interval"
    else:
        interval = f"95 % {kind} {measure.show(low)} to {measure.show(high)}"
    sentence = f"{measure.show(mean)} {measure.unit}, {spread}{interval}: {why}"
    return sentence + (f" ({remark})" if remark else ""), {**numbers, "verdict": limit}


def _broken(runs: Sequence[Run], measure: Measure, members: Sequence[int]) -> str:
    """The runs whose score is NaN or Inf, as the end of a sentence; "" if there are none."""
    broken = [runs[i].name for i in members if not math.isfinite(measure.values[i])]
    return f"as the loss of {' and '.join(broken)} is NaN or Inf: training diverged" if broken else ""


def _limit(runs: Sequence[Run], measure: Measure, first: list[int], other: list[int], pairs: int) -> tuple[str, str]:
    """The reason against a verdict: a keyword for the JSON file, and a sentence; ("", "") if there is none."""
    if broken := _broken(runs, measure, [*first, *other]):
        return "undefined", broken
    if unknown := [runs[i].name for i in (first[0], other[0]) if runs[i].data is None]:
        return "data unknown", f"no verdict, since the training data of {' and '.join(unknown)} is not known"
    if runs[first[0]].tokenizer != runs[other[0]].tokenizer:
        return "another tokenizer", "no verdict, since they were trained with different tokenizers"
    if runs[first[0]].data != runs[other[0]].data:
        return "other data", (
            "no verdict, since they were trained on different data: this text may be training text of one of them"
        )
    if pairs < 2:
        what = "one seed" if pairs or len(first) == len(other) == 1 else "no seed in common"
        return "one seed", (
            f"no verdict from {what}: the interval covers only the {measure.sampled}, not the larger variance between "
            f"seeds (train at least {LEAST_PAIRS} seeds of both)"
        )
    if pairs < LEAST_PAIRS:
        return "two seeds", f"no verdict from {pairs} seeds: train at least {LEAST_PAIRS} of both"
    return "", ""


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
    """Mean of (N,) values and its 95 % interval (Efron's percentile bootstrap): (mean, low, high).

    low and high are NaN if N < 2. Efficient for values with few distinct levels, such as 0 and 1: the number of times
    that each occurs in a resample is drawn from a multinomial distribution.
    """
    values = np.asarray(values, np.float64)
    mean, N = float(values.mean()), len(values)
    if N < 2:
        return mean, math.nan, math.nan
    kinds, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(N, counts / N, size=resamples) @ kinds / N
    return mean, *(float(q) for q in np.quantile(drawn, (0.025, 0.975)))


def student_within(t: float, df: int) -> float:
    """The probability of [-t, t] in Student's t-distribution, df >= 1, t >= 0; 0.95 for t = 12.706 and df = 1.

    The closed form for integer df (Abramowitz & Stegun 26.7.3 and 26.7.4).
    """
    theta = math.atan(t / math.sqrt(df))
    term, total = (math.cos(theta), 0.0) if df % 2 else (1.0, 0.0)
    for k in range(2 + df % 2, df + 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (k - 1) / k
    inner = total * math.sin(theta)
    return 2 / math.pi * (theta + inner) if df % 2 else inner


def student_t(df: int) -> float:
    """The t for which [-t, t] has probability 95 % in Student's t-distribution, df >= 1; 12.706 for df = 1.

    Found by bisection in theta = arctan(t / sqrt(df)).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_within(math.sqrt(df) * math.tan(middle), df) < 0.95 else (low, middle)
    return math.sqrt(df) * math.tan(low)


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean of the paired differences second - first, for example over seeds, their standard deviation, and a 95 %
    interval.

    The interval is Student's, mean +- t sd / sqrt(n), which is exact for normally distributed differences, however few.
    Returns (mean, sd, low, high); with one pair, all but the mean are NaN. Raises ValueError unless both have the same
    number n >= 1 of values.
    """
    if len(first) != len(second) or len(first) == 0:
        raise ValueError(f"{len(first)} and {len(second)} values cannot be paired")
    difference = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    mean, n = float(difference.mean()), len(difference)
    if n == 1:
        return mean, math.nan, math.nan, math.nan
    sd = float(difference.std(ddof=1))
    half = student_t(n - 1) * sd / math.sqrt(n)
    return mean, sd, mean - half, mean + half


def paired_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of the paired t-test that the mean of second - first is 0; NaN with one pair.

    p < 0.05 exactly if the interval of paired_interval excludes 0. 1 if all pairs are equal.
    """
    mean, sd, _, _ = paired_interval(first, second)
    if sd == 0:
        return float(mean == 0)
    n = len(first)
    return math.nan if n == 1 else 1 - student_within(abs(mean) / sd * math.sqrt(n), n - 1)


def sign_test_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of the sign test that second is below first as often as above; ties are left out.

    Six of six seeds on one side give 0.031, five of five 0.0625: fewer than six are never significant at 0.05. NaN if
    any value is NaN.
    """
    signs = np.sign(np.asarray(second, np.float64) - np.asarray(first, np.float64))
    if np.isnan(signs).any():
        return math.nan
    n, fewer = int((signs != 0).sum()), int(min((signs > 0).sum(), (signs < 0).sum()))
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for multiple comparisons (Holm 1979). A NaN stays NaN and does not count as a comparison."""
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected, worst = list(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected
