"""Does distillation from a larger model remove condensation from a small one? In arXiv 2602.00217, observation 4: no.

    python experiments/distillation.py --scale laptop --threads 1

A small model is trained on the text alone, with a larger teacher, or with a teacher and the dispersion loss. The
teacher has the same seed and is trained first, on the same text; it is part of the comparison.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P omits it

import study

SCALES = {
    "smoke": {
        "seeds": 2,
        "teacher": {"n_layer": 3, "n_embd": 24},
        "train": study.SMOKE,
    },
    "laptop": {
        "seeds": 3,
        "teacher": {"n_layer": 8, "n_embd": 128, "max_steps": 800},
        "train": study.LAPTOP,
    },
    "gpu": {
        "seeds": 3,
        "teacher": {"preset": "gpt2-medium"},
        "train": {**study.GPU, "batch_size": 32, "grad_accum": 8, "lr": 3e-4},
    },
}


def arms(scale: dict) -> dict[str, dict]:
    distilled = {"distill": study.RunOf("teacher")}
    return {
        "student": {},
        "teacher": scale["teacher"],
        "student, distilled": distilled,
        "student, distilled, dispersion": {**distilled, "dispersion": 0.1},
    }


def main(argv: list[str] | None = None) -> int:
    return study.cli(__file__, __doc__, SCALES, arms, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
