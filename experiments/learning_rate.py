"""Does the dispersion loss still help when the learning rate is tuned with and without it?

    python experiments/learning_rate.py --scale laptop --threads 1

A regulariser may only make up for a learning rate that suits the plain model badly. So both arms are trained at several rates. The
last tables compare each arm at the rate where its mean over the seeds is best, chosen by the same evaluations for both.
"""

import sys

import numpy as np
import study

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
}  # fmt: skip


def arms(scale: dict) -> dict[str, dict]:
    return {
        f"{arm}, {rate:g}": {**changes, "lr": rate} for rate in scale["rates"] for arm, changes in study.PAIR.items()
    }


def at_its_best(evaluations: dict[str, list[study.Evaluations]]) -> dict[str, study.Evaluations]:
    """Each arm at the end, at its best learning rate."""
    end = study.at_the_end(evaluations)

    def mean(label: str) -> float:
        return np.mean([evaluation["bits_per_byte"] for evaluation in end[label]])

    best = [min((label for label in end if label.startswith(arm)), key=mean) for arm in study.PAIR]
    return {label: end[label] for label in best}


def main(argv: list[str] | None = None) -> int:
    return study.cli(__file__, __doc__, SCALES, arms, views=(study.at_the_end, at_its_best), argv=argv)


if __name__ == "__main__":
    sys.exit(main())
