"""Does the dispersion loss help an assistant or a translator that is trained from scratch?

    python experiments/tasks.py --scale laptop --threads 1
    python eval.py runs/tasks-laptop/translate-*-s? --completions translate.en-de.test.jsonl.gz    # chrF and BLEU

Trains a small model on dialogues and on English-German sentence pairs, without and with the loss, with the fast recipe
at its default learning rate. docs/finetuning.md has the commands for the two corpora, `assistant` and `translate`. Only
the answers count in the cross-entropy and in validation bits per byte; the loss spreads out all tokens of a window.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P omits it

import study

SCALES = {
    "smoke": {"seeds": 2, "train": {**study.SMOKE, "recipe": "fast", "warmup_steps": 1}},
    "laptop": {"seeds": 4, "train": {**study.FAST, "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 512,
                                     "batch_size": 4, "max_steps": 500, "eval_every": 500, "eval_tokens": 102_400,
                                     "device": "cpu"}},
    "gpu": {"seeds": 4, "train": {**study.FAST, "n_layer": 12, "n_head": 8, "n_embd": 512, "lr": 2.25e-3,
                                  "block_size": 512, "batch_size": 64, "max_steps": 500, "eval_every": 100}},
}  # fmt: skip
TASKS = ("translate", "assistant")


def arms(scale: dict) -> dict[str, dict]:
    return {f"{task}, {arm}": {**changes, "data": task} for task in TASKS for arm, changes in study.PAIR.items()}


def main(argv: list[str] | None = None) -> int:
    views = tuple(study.at_the_end_of(task, lambda label, task=task: label.startswith(task)) for task in TASKS)
    return study.cli(__file__, __doc__, SCALES, arms, views=views, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
