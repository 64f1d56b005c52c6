"""Does distillation from a larger model rid a small one of condensation? Observation 4 of arXiv 2602.00217: it does not.

    python experiments/distillation.py --scale laptop --threads 1

A small model learns from the text alone, from the text and a larger teacher, or from both and with the dispersion loss. The
teacher has the same seed and is trained first, on the same text; it is compared, too.
"""

import sys

import study

SCALES = {
    "smoke": {
        "seeds": 2,
        "teacher": {"n_layer": 3, "n_embd": 24},
        "train": {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "batch_size": 4, "max_steps": 4,
                  "warmup_steps": 1, "eval_every": 2, "eval_tokens": 512, "device": "cpu"},
    },
    "laptop": {
        "seeds": 3,
        "teacher": {"n_layer": 8, "n_embd": 128, "max_steps": 800},
        "train": {"n_layer": 8, "n_head": 4, "n_embd": 64, "block_size": 128, "batch_size": 8, "max_steps": 400,
                  "warmup_steps": 40, "lr": 3e-3, "eval_every": 100, "eval_tokens": 12_800, "device": "cpu"},
    },
    "gpu": {
        "seeds": 3,
        "teacher": {"preset": "gpt2-medium"},
        "train": {"preset": "gpt2", "data": "wikitext103", "block_size": 512, "batch_size": 32, "grad_accum": 8, "lr": 3e-4,
                  "max_steps": 7600, "eval_every": 400, "eval_tokens": 102_400},
    },
}  # fmt: skip


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
