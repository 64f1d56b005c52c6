"""How much of the dispersion loss's gain at the default size is left once the warm-up is long enough?

    python experiments/warmup.py --scale laptop --threads 1

With the gpt2 recipe's 40 warm-up steps, the gradient norm of the baseline spikes around step 40. Both settings, with and
without the loss, are trained with several warm-up lengths. The first tables compare every setting with the baseline at
the shortest warm-up; those that follow compare, at each warm-up, the loss with its own baseline.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P leaves it out

import study

PLAIN = {"recipe": "gpt2", "device": "cpu"}  # the model, the steps and the learning rate are the default ones
SCALES = {
    "smoke": {"seeds": 2, "warmups": (1, 2, 3), "train": {**study.SMOKE, "recipe": "gpt2"}},
    "laptop": {"seeds": 6, "warmups": (40, 100, 200), "train": {**PLAIN, "eval_every": 400}},
    "gpu": {"seeds": 3, "warmups": (200, 400, 800), "train": study.GPU},
}


def arms(scale: dict) -> dict[str, dict]:
    return {
        f"{label}, warm-up {steps}": {**changes, "warmup_steps": steps}
        for steps in scale["warmups"]
        for label, changes in study.PAIR.items()
    }


def pair(i: int):
    """A view of the i-th warm-up alone: the baseline, then the loss."""

    def view(evaluations: dict[str, list[study.Evaluations]]) -> dict[str, study.Evaluations]:
        rows = list(study.at_the_end(evaluations).items())
        return dict(rows[2 * i : 2 * i + 2])

    view.__name__ = f"warmup_{i}"
    return view


def main(argv: list[str] | None = None) -> int:
    return study.cli(__file__, __doc__, SCALES, arms, views=(study.at_the_end, *map(pair, range(3))), argv=argv)


if __name__ == "__main__":
    sys.exit(main())
