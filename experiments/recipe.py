"""What does each ingredient of --recipe fast contribute?

    python data/prepare.py shakespeare --tokenizer byte --out data/shakespeare-bytes
    python experiments/recipe.py --scale laptop --threads 1 --data shakespeare-bytes
    python experiments/recipe.py --scale laptop --threads 1 --data pystdlib-bytes        # prepared in the same way

Starts from nanoGPT's setting for a CPU (4 layers x 128, context 64, batch 12, AdamW, learning rate 1e-3, cosine decay
to a tenth) and adds one ingredient after another, with the same number of steps; the first table has the seconds of
each condition. Tokens are bytes, so one token is one character of English.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P omits it

import study

SETTING = {
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "block_size": 64,
    "batch_size": 12,
    "lr": 1e-3,
    "recipe": "gpt2",
    "device": "cpu",
}
SCALES = {
    "smoke": {
        "seeds": 2,
        "train": {**SETTING, "n_layer": 2, "n_embd": 16, "block_size": 32, "batch_size": 4, "max_steps": 4,
                  "warmup_steps": 1, "eval_every": 2, "eval_tokens": 512},
    },
    "laptop": {
        "seeds": 3,
        "train": {**SETTING, "max_steps": 560, "warmup_steps": 40, "eval_every": 560, "eval_tokens": 51_200},
    },
    "gpu": {
        "seeds": 3,
        "train": {"preset": "mini", "recipe": "gpt2", "max_steps": 2000, "lr": 1e-3, "warmup_steps": 100,
                  "eval_every": 500, "eval_tokens": 102_400},
    },
}  # fmt: skip


def arms(scale: dict) -> dict[str, dict]:
    ingredients = {
        "+ learning rate 4e-3": {"lr": 4e-3},
        "+ wsd schedule to 0": {"schedule": "wsd", "min_lr": 0.0},
        "+ RMSNorm, RoPE, QK-norm, SwiGLU": {"arch": "qwen3"},
        "+ ReLU^2": {"mlp": "relu2"},
        "+ zero-initialised projections": {"zero_init": True},
        "+ Muon at 6e-3": {"optimizer": "muon", "lr": 6e-3},
        "+ linear schedule from step 10": {"schedule": "linear", "warmup_steps": 10},
        "+ untied embeddings at five times lr": {"tied": False, "embedding_lr": 5.0},
        "+ momentum 0.9 (fast)": {"momentum": 0.9},
    }
    arms, so_far = {"gpt2": {}}, {}
    for label, fields in ingredients.items():
        so_far = {**so_far, **fields}
        arms[label] = so_far
    return arms


def main(argv: list[str] | None = None) -> int:
    return study.cli(__file__, __doc__, SCALES, arms, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
