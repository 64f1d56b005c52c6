"""Does the dispersion loss help in continued pre-training ("mid-training"), as the paper uses it?

    python train.py --data books --recipe gpt2 --out runs/base
    python data/prepare.py --input dialogues.jsonl --name dialogues --tokenizer-from runs/base
    python experiments/midtraining.py --base runs/base --data dialogues --pairs "blimp/*.jsonl" --choices "tasks/arc*"

Continues training of the base model on another corpus, for 5 % of the base's steps at its batch size, with a warm-up of
a fifth of them, as in the paper. The conditions:

baseline             cross-entropy alone
lambda 0.1           the published loss, with the authors' clamp of 0.1 and 256 tokens per sequence
tau 0.1              the same with tau 0.1
noisy embeddings     NEFTune with alpha 1, which the paper compares with
active forgetting    the token embeddings are reset once, halfway (in the paper every 1,000 of about 1,500 steps)

First the learning rate of each condition is selected by bits per byte of the corpus's validation split, with seed 100:
a tenth, three tenths, or all of the base's. Then each is trained with seeds 0 to 3 and measured on the test splits of
the new corpus and of the base's own (forgetting), and on tasks. The same command continues an interrupted study.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P omits it

import study  # isort: split

import argparse
import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from study import files, read_json, report, show

from minidisp import InputError
from minidisp.config import Config, from_dict
from minidisp.runtime.cli import Parser, exit_code

PUBLISHED = {"dispersion": 0.1, "dispersion_clamp": 0.1, "dispersion_tokens": 256}
CONDITIONS = {
    "baseline": {},
    "lambda 0.1": PUBLISHED,
    "tau 0.1": {**PUBLISHED, "dispersion_tau": 0.1},
    "noisy embeddings": {"noisy_embedding": 1.0},
    "active forgetting": {"active_forgetting": 0.5},  # of the steps
}
TIMES = (0.1, 0.3, 1.0)  # the candidates for the learning rate, relative to the base's
CHOICE_SEED = 100


def main(argv: list[str] | None = None) -> int:
    def command() -> None:
        args = parse_arguments(argv)
        base = base_config(args.base)
        before = measured(base, base, args)  # first, since it reads all corpora and tasks
        lr = choose(base, args)
        arms = {arm: {**CONDITIONS[arm], "lr": lr[arm]} for arm in args.arms}
        runs = plan(arms, base, args, seeds=args.seeds)
        study.train_all(runs)
        conclude(base, before, runs, args)

    return exit_code("midtraining.py", command)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="experiments/midtraining.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--base", type=Path, metavar="RUN", required=True, help="run folder of the base model")
    add("--data", metavar="TEXT", required=True, help="corpus to continue on, with the tokenizer of the base")
    add("--out", type=Path, metavar="DIR", help="folder of the study (default runs/midtraining-BASE-DATA)")
    add("--share", type=float, default=0.05, metavar="X", help="steps, relative to those of the base (default 0.05)")
    add("--seeds", type=int, default=4, metavar="N", help="number of seeds of the comparison (default 4)")
    words = f"conditions to train and compare (default: all, {', '.join(map(repr, CONDITIONS))})"
    add("--arms", nargs="+", choices=tuple(CONDITIONS), default=list(CONDITIONS), metavar="LABEL", help=words)
    words = "tokens of the test split of the base's corpus to measure forgetting on (default 200,000)"
    add("--old-tokens", type=int, default=200_000, metavar="N", help=words)
    add("--pairs", metavar="GLOB", help="minimal pairs, as for eval.py --minimal-pairs")
    add("--choices", metavar="GLOB", help="multiple choice, as for eval.py --choices")
    add("--completions", metavar="GLOB", help="cloze tasks, as for eval.py --completions")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    args = parser.parse_args(argv)
    study.check_counts(args, "seeds", "threads", "old_tokens")
    if not 0 < args.share <= 1:
        raise InputError(f"--share is {args.share:g}, but must be more than 0 and at most 1")
    args.arms = [arm for arm in CONDITIONS if arm in args.arms]
    args.out = args.out or Path(f"runs/midtraining-{args.base.name}-{Path(args.data).name}")
    return args


def base_config(run: Path) -> Config:
    """The settings of the base model, whose folder may have been moved."""
    if not (run / "summary.json").exists():
        raise InputError(f"{run} is not the folder of a finished run: train the base model with train.py first")
    settings = read_json(run / "config.json")
    settings.pop("environment")
    if not isinstance(settings["data"], str):
        raise InputError(f"{run} was trained on several corpora, but forgetting is measured on a single one")
    return dataclasses.replace(from_dict(settings), out=str(run))


def plan(
    arms: dict[str, dict], base: Config, args: argparse.Namespace, first_seed: int = 0, seeds: int = 1
) -> dict[tuple[str, int], tuple[Config, list[str]]]:
    """(condition, seed) -> Config and command line, with the optimiser, context and batch of the base."""
    steps = max(1, round(args.share * base.max_steps))
    kept = (
        "recipe",
        "optimizer",
        "schedule",
        "beta1",
        "beta2",
        "momentum",
        "grad_clip",
        "embedding_lr",
        "weight_decay",
    )
    kept += ("block_size", "batch_size", "grad_accum", "dtype", "device", "eval_tokens")
    flags = {field: getattr(base, field) for field in kept}
    flags |= {"init_from": args.base, "max_steps": steps, "warmup_steps": steps // 5, "eval_every": steps}
    arms = {arm: dict(changes) for arm, changes in arms.items()}
    for changes in arms.values():
        if part := changes.get("active_forgetting"):
            changes["active_forgetting"] = max(1, int(part * steps))
    scale = {"seeds": seeds, "first_seed": first_seed, "train": flags}
    return study.make_plan(scale, arms, args.out, argparse.Namespace(seeds=None, data=args.data, threads=args.threads))


def choose(base: Config, args: argparse.Namespace) -> dict[str, float]:
    """condition -> the learning rate with the fewest validation bits per byte; choice.json and choice.txt have all."""
    bits: dict[str, dict[float, float]] = {}
    for arm in args.arms:
        candidates = {f"{arm}, lr {base.lr * times:g}": base.lr * times for times in TIMES}
        runs = plan({label: {**CONDITIONS[arm], "lr": lr} for label, lr in candidates.items()}, base, args, CHOICE_SEED)
        for (label, seed), run in runs.items():
            bits.setdefault(arm, {})[candidates[label]] = study.final_bits((label, seed), run)
    if diverged := next((arm for arm, tried in bits.items() if min(tried.values()) == math.inf), None):
        raise InputError(f"{diverged!r} diverges at every learning rate: omit it, with --arms")
    chosen = {arm: min(tried, key=tried.get) for arm, tried in bits.items()}
    files.write_json(args.out / "choice.json", {"chosen": chosen, "tried": bits})
    rows = [
        [arm, *(report.number(value) for value in tried.values()), f"{chosen[arm]:g}"] for arm, tried in bits.items()
    ]
    head = ["validation bits per byte", *(f"lr {base.lr * times:g}" for times in TIMES), "chosen"]
    show(report.table(head, rows), args.out / "choice.txt")
    return chosen


def measured(config: Config, base: Config, args: argparse.Namespace) -> dict[str, float]:
    """The measures of a finished run, or of the base itself, by their keys in `measures`."""
    if args.threads:
        torch.set_num_threads(args.threads)
    test = ["--split", "test", "--stride", str(base.block_size), "--data"]
    new = study.evaluated(config, f"new {args.data}", [*test, args.data])
    old = study.evaluated(
        config, f"old {base.data} {args.old_tokens}", [*test, base.data, "--tokens", str(args.old_tokens)]
    )
    found = {"new": new["bits_per_byte"], "old": old["bits_per_byte"]}
    for where, scores in (("new", new), ("old", old)):
        found |= {f"{key} {where}": scores["condensation"][key] for key in ("last_half_mean", "spearman")}
    tasks = {"minimal_pairs": args.pairs, "choices": args.choices, "completions": args.completions}
    for task, pattern in tasks.items():
        if pattern:
            flags = ["--split", "none", f"--{task.replace('_', '-')}", pattern]
            scores = study.evaluated(config, f"{task} {pattern}", flags)[task]
            if task == "minimal_pairs":
                found["minimal pairs"] = 100 * scores["accuracy"]
                continue
            by_file = {name: of for name, of in scores.items() if name != "overall"}
            if answered := next((name for name, of in by_file.items() if "acc" not in of), None):
                raise InputError(f"--{task} {pattern}: {answered} has prompts to answer: pass cloze tasks, as LAMBADA")
            found |= {name: 100 * of["acc"] for name, of in by_file.items()}
            if task == "completions":
                found |= {f"{name} loss": math.log(of["token_perplexity"]) for name, of in by_file.items()}
    return found


def measures(keys: list[str]) -> tuple[tuple[str, str, int, tuple[str, str]], ...]:
    """Key, label, digits, and the words for a lower and a higher value, as in study.MEASURES."""
    labels = {
        "new": ("bits per byte of the new corpus", 4, ("better", "worse")),
        "old": ("bits per byte of the corpus of the base", 4, ("better", "worse")),
    }
    for where in ("new", "old"):
        labels[f"last_half_mean {where}"] = (f"mean cosine, last half, {where} corpus", 3, ("lower", "higher"))
        labels[f"spearman {where}"] = (f"Spearman with depth, {where} corpus", 3, ("lower", "higher"))
    for key in keys:
        if key.endswith(" loss"):
            labels[key] = (f"{key} (nats per token)", 3, ("better", "worse"))
        elif key not in labels:
            labels[key] = (f"{key} accuracy (%)", 2, ("worse", "better"))
    return tuple((key, *labels[key]) for key in keys)


def conclude(base: Config, before: dict[str, float], runs: dict, args: argparse.Namespace) -> None:
    """Measure every run, compare the conditions; table.txt, results.json and differences.png.

    before: the measures of the base.
    """
    found: dict[str, list[dict]] = {}
    for (arm, _), (config, _) in runs.items():
        found.setdefault(arm, []).append(measured(config, base, args))
    shown = measures(list(before))
    compared, tables = study.compare_all(found, shown)
    rows = [
        [label, report.number(before[key], digits)]
        + [report.number(float(np.mean([of_seed[key] for of_seed in found[arm]])), digits) for arm in found]
        for key, label, digits, _ in shown
    ]
    overview = report.table([f"mean over {args.seeds} seeds", "base", *found], rows)
    show("\n\n".join([overview, *tables]), args.out / "table.txt")
    lr = {arm: config.lr for (arm, _), (config, _) in runs.items()}
    files.write_json(args.out / "results.json", {"base": before, "lr": lr, "seeds": args.seeds, "compared": compared})
    labels = {key: (label, words) for key, label, _, words in shown if key in ("new", "old", "last_half_mean new")}
    title = __doc__[: __doc__.index("?") + 1]
    for path in report.draw_differences(compared, labels, title, args.out / "differences.png"):
        print(f"figure  {path}")


if __name__ == "__main__":
    sys.exit(main())
