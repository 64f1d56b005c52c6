"""Are hidden states condensed before the first step, and does training reduce it? Observation 3 of arXiv 2602.00217.

    python experiments/through_training.py --scale laptop --threads 1

The paper follows Olmo-3-7B, whose rank correlation of mean cosine and depth falls from 1.0 at initialisation to -.47.
Here, a small model is measured every few steps, with and without the dispersion loss. Compares later steps with step 0,
then the two conditions at the end. The laptop scale took 38 minutes on one thread of a busy 2-core CPU.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P omits it

import study

SCALES = {
    "smoke": {
        "seeds": 2,
        "train": study.SMOKE,
    },
    "laptop": {
        "seeds": 4,
        "train": {**study.LAPTOP, "max_steps": 700, "eval_every": 50},
    },
    "gpu": {
        "seeds": 3,
        "train": {**study.GPU, "eval_every": 200},
    },
}


def arms(scale: dict) -> dict[str, dict]:
    return study.PAIR


def moments(evaluations: dict[str, list[study.Evaluations]]) -> dict[str, study.Evaluations]:
    """Step 0, which both conditions share, then evaluations 1, 2, 4, 8, ... and the last of each, one per seed."""
    rows = {"step 0": [of_seed[0] for of_seed in next(iter(evaluations.values()))]}
    for arm, over_seeds in evaluations.items():
        last = len(over_seeds[0]) - 1
        for k in sorted({last, *(2**i for i in range(last.bit_length()))}):
            rows[f"{arm}, step {over_seeds[0][k]['step']:,}"] = [of_seed[k] for of_seed in over_seeds]
    return rows


def main(argv: list[str] | None = None) -> int:
    return study.cli(__file__, __doc__, SCALES, arms, views=(moments, study.at_the_end), argv=argv)


if __name__ == "__main__":
    sys.exit(main())
