"""Does a wider MLP, and nothing else, condense less? Observation 2 of arXiv 2602.00217.

    python experiments/mlp_width.py --scale laptop --threads 1

The paper trains 12 layers of width 768 on 1B tokens with MLP widths of 64, 256, 1024 and 4096: the wider the MLP, the
lower the rank correlation of mean cosine and depth (.967, .912, .692, .429). Here, only the width of the MLP differs.
The laptop scale took 26 minutes on one thread of a busy 2-core CPU.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P omits it

import study

SCALES = {
    "smoke": {
        "seeds": 2,
        "widths": (4, 64),
        "train": study.SMOKE,
    },
    "laptop": {
        "seeds": 4,
        "widths": (16, 64, 256, 1024),
        "train": study.LAPTOP,
    },
    "gpu": {
        "seeds": 3,
        "widths": (64, 256, 1024, 4096),
        "train": study.GPU,
    },
}


def arms(scale: dict) -> dict[str, dict]:
    return {f"MLP {width}": {"mlp_dim": width} for width in scale["widths"]}


def main(argv: list[str] | None = None) -> int:
    return study.cli(__file__, __doc__, SCALES, arms, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
