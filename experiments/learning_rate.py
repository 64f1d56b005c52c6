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
        "train": {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "batch_size": 4, "max_steps": 4,
                  "warmup_steps": 1, "eval_every": 2, "eval_tokens": 512, "device": "cpu"},
    },
    "laptop": {
        "seeds": 4,
        "rates": (1e-3, 2e-3, 3e-3, 6e-3),
        "train": {"n_layer": 8, "n_head": 4, "n_embd": 64, "block_size": 128, "batch_size": 8, "max_steps": 400,
                  "warmup_steps": 40, "eval_every": 100, "eval_tokens": 12_800, "device": "cpu"},
    },
    "gpu": {
        "seeds": 3,
        "rates": (3e-4, 6e-4, 1.2e-3),
        "train": {"preset": "gpt2", "data": "wikitext103", "block_size": 512, "batch_size": 64, "grad_accum": 4,
                  "max_steps": 7600, "eval_every": 400, "eval_tokens": 102_400},
    },
}  # fmt: skip
ARMS = {"cross-entropy": {}, "with dispersion": {"dispersion": 0.1}}


def arms(scale: dict) -> dict[str, dict]:
    return {f"{arm}, {rate:g}": {**changes, "lr": rate} for rate in scale["rates"] for arm, changes in ARMS.items()}


def at_its_best(evaluations: dict[str, list[study.Evaluations]]) -> dict[str, study.Evaluations]:
    """Each arm at the end, at its best learning rate."""
    end = study.at_the_end(evaluations)

    def mean(label: str) -> float:
        return np.mean([evaluation["bits_per_byte"] for evaluation in end[label]])

    best = [min((label for label in end if label.startswith(arm)), key=mean) for arm in ARMS]
    return {label: end[label] for label in best}


def main(argv: list[str] | None = None) -> int:
    return study.cli(__file__, __doc__, SCALES, arms, views=(study.at_the_end, at_its_best), argv=argv)


if __name__ == "__main__":
    sys.exit(main())
