"""Do larger models condense less? Observation 1 of arXiv 2602.00217.

    python experiments/size.py --scale laptop --threads 1

The paper measures the published GPT-2 models of four sizes: the rank correlation of mean cosine and depth is .385,
-.07, .12 and -.59. Here, models of several depths and widths are trained on the same tokens with the same settings. To
measure the published models, use eval.py --hf.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P omits it

import study

SCALES = {
    "smoke": {
        "seeds": 2,
        "sizes": {"2 x 16": {}, "3 x 24": {"n_layer": 3, "n_embd": 24}},
        "train": study.SMOKE,
    },
    "laptop": {
        "seeds": 3,
        "sizes": {"4 x 48": {"n_layer": 4, "n_embd": 48}, "6 x 72": {"n_layer": 6, "n_embd": 72},
                  "8 x 96": {"n_layer": 8, "n_embd": 96}, "10 x 144": {"n_layer": 10, "n_embd": 144}},
        "train": study.LAPTOP,
    },
    "gpu": {
        "seeds": 3,
        "sizes": {preset: {"preset": preset} for preset in ("gpt2", "gpt2-medium", "gpt2-large")},
        "train": {**study.GPU, "batch_size": 16, "grad_accum": 16, "lr": 3e-4},
    },
}  # fmt: skip


def arms(scale: dict) -> dict[str, dict]:
    return scale["sizes"]


def main(argv: list[str] | None = None) -> int:
    return study.cli(__file__, __doc__, SCALES, arms, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
