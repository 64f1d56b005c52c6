"""How much of the dispersion loss's gain at the default size remains with a longer warm-up?

    python experiments/warmup.py --scale laptop --threads 1

With 40 warm-up steps, once the default of the gpt2 recipe, the gradient norm of the baseline spikes at steps 20 to 40.
The baseline and the loss are both trained with several warm-up lengths. The first tables compare all conditions with
the baseline at the shortest warm-up; the others compare the loss with the baseline at the same warm-up.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P omits it

import study

PLAIN = {"recipe": "gpt2", "device": "cpu"}  # default model, number of steps and learning rate
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


def at_the_same_warm_up(steps: int):
    """A view of only this warm-up: the baseline, then the loss."""
    return study.at_the_end_of(f"warm_up_{steps}", lambda label: label.endswith(f", warm-up {steps}"))


def main(argv: list[str] | None = None) -> int:
    lengths = sorted({steps for scale in SCALES.values() for steps in scale["warmups"]})
    views = (study.at_the_end, *map(at_the_same_warm_up, lengths))
    return study.cli(__file__, __doc__, SCALES, arms, views=views, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
