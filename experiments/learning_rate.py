"""Does the dispersion loss still help when the learning rate is tuned with and without it?

    python experiments/learning_rate.py --scale laptop --threads 1

A regulariser may merely compensate for a learning rate that is poor for the baseline. So both conditions are trained at
several learning rates. The last tables compare each condition at its best learning rate: for every seed, the one with
the best mean over the other seeds, so that no evaluation is used to select the learning rate at which it is reported.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P omits it

import study  # isort: split

import numpy as np

SCALES = {
    "smoke": {
        "seeds": 2,
        "rates": (1e-3, 3e-3),
        "train": study.SMOKE,
    },
    "laptop": {
        "seeds": 4,
        "rates": (1e-3, 2e-3, 3e-3, 6e-3),
        "train": study.LAPTOP,
    },
    "gpu": {
        "seeds": 3,
        "rates": (3e-4, 6e-4, 1.2e-3),
        "train": study.GPU,
    },
}


def arms(scale: dict) -> dict[str, dict]:
    return {
        f"{arm}, {rate:g}": {**changes, "lr": rate} for rate in scale["rates"] for arm, changes in study.PAIR.items()
    }


def at_its_best(evaluations: dict[str, list[study.Evaluations]]) -> dict[str, study.Evaluations]:
    """Final evaluations of each condition, every seed at the learning rate that is best for the other seeds."""
    end = study.at_the_end(evaluations)
    rows = {}
    for arm in study.PAIR:
        at_rate = {label.removeprefix(f"{arm}, "): end[label] for label in end if label.startswith(f"{arm}, ")}
        if not at_rate:  # because of --arms
            continue
        bits = np.array([[evaluation["bits_per_byte"] for evaluation in row] for row in at_rate.values()])
        others = bits.sum(1, keepdims=True) - bits if bits.shape[1] > 1 else bits
        chosen = [list(at_rate)[i] for i in others.argmin(0)]
        counts = [f"{rate} ({chosen.count(rate)} of {len(chosen)})" for rate in at_rate if rate in chosen]
        rows[f"{arm}, {', '.join(counts)}"] = [at_rate[rate][seed] for seed, rate in enumerate(chosen)]
    return rows


def main(argv: list[str] | None = None) -> int:
    return study.cli(__file__, __doc__, SCALES, arms, views=(study.at_the_end, at_its_best), argv=argv)


if __name__ == "__main__":
    sys.exit(main())
