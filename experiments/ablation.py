"""Does the dispersion loss help, and which part of it matters? With the other mitigation methods of arXiv 2602.00217.

    python experiments/ablation.py --scale laptop --threads 1

Trains cross-entropy alone, the paper's default (lambda 0.1, tau 1, all layers, angular_spread, all tokens), variants of
it with one setting changed, noisy embeddings, and active forgetting. Compares all of them with cross-entropy alone,
then with the paper's default. The paper's averages over ten tasks, GPT-2 in mid-training: lambda .01/.1/.5/1
35.36/35.61/35.37/35.29; tau .1/.5/1/2 35.33/35.42/35.61/35.27; early half 34.96, late half 35.37.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P omits it

import study

SWEEP = {
    "seeds": 3,
    "weights": (0.01, 0.5, 1.0),
    "taus": (0.1, 0.5, 2.0),
    "layers": ("last", "early_half", "late_half"),
    "variants": ("orthogonalization", "l2_repel", "decorrelation", "perplexity_entropy", "mean_cosine"),
    "noise": (1.0, 5.0),
}
SCALES = {
    "smoke": {
        "seeds": 2,
        "weights": (),
        "taus": (),
        "layers": ("late_half",),
        "variants": (),
        "tokens": (8,),
        "noise": (5.0,),
        "forgetting": (2,),
        "train": study.SMOKE,
    },
    "laptop": {
        **SWEEP,
        "tokens": (32,),
        "forgetting": (100,),
        "train": study.LAPTOP,
    },
    "gpu": {
        **SWEEP,
        "tokens": (256,),
        "forgetting": (1000,),
        "train": {**study.GPU, "batch_size": 32, "grad_accum": 8},
    },
}
DEFAULT = "dispersion (lambda 0.1)"


def arms(scale: dict) -> dict[str, dict]:
    on = {"dispersion": 0.1}
    return {
        "cross-entropy": {},
        DEFAULT: on,
        **{f"lambda {weight:g}": {"dispersion": weight} for weight in scale["weights"]},
        **{f"tau {tau:g}": {**on, "dispersion_tau": tau} for tau in scale["taus"]},
        **{f"layers {layers}": {**on, "dispersion_layers": layers} for layers in scale["layers"]},
        **{variant: {**on, "dispersion_variant": variant} for variant in scale["variants"]},
        **{f"{tokens} tokens": {**on, "dispersion_tokens": tokens} for tokens in scale["tokens"]},
        **{f"noisy embedding {alpha:g}": {"noisy_embedding": alpha} for alpha in scale["noise"]},
        **{f"forgetting every {K}": {"active_forgetting": K} for K in scale["forgetting"]},
    }


def against_the_default(evaluations: dict[str, list[study.Evaluations]]) -> dict[str, study.Evaluations]:
    """The conditions at the end, the paper's default first."""
    end = study.at_the_end(evaluations)
    return {DEFAULT: end.pop(DEFAULT), **end} if DEFAULT in end else {}


def main(argv: list[str] | None = None) -> int:
    return study.cli(__file__, __doc__, SCALES, arms, views=(study.at_the_end, against_the_default), argv=argv)


if __name__ == "__main__":
    sys.exit(main())
