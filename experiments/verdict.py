"""Does the dispersion loss help, under a plain and under a good recipe, with every arm tuned?

    python data/prepare.py --input books10m.jsonl.gz --name books       # 142 English books: docs/verdict.md says where they are
    python experiments/verdict.py --recipe gpt2 --stage choice          # and the same with --recipe fast
    python experiments/verdict.py --recipe gpt2 --stage small --pairs "blimp/*.jsonl"
    python experiments/verdict.py --stage report

The protocol was fixed before the first run; docs/verdict.md has it in words, and what was run of it. In short:

choice           each arm's learning rate, then its weight decay at that rate; seeds 100 and 101, validation books
small            8 x 64, 3.1M tokens, six seeds;            off, lambda 0.1 as published, the same with tau 0.1
default          8 x 192, 6.1M tokens, four seeds;          the same arms
rates            8 x 192, 2.0M tokens, seeds 100 and 101: a quarter, a half and the whole of the rate chosen at 8 x 64
half             default at half the rates of the choice, four seeds
large            8 x 320 (11M parameters), at half those rates, too, 4.1M tokens, three seeds
mechanism        8 x 64, 0.7M tokens, four seeds: each ingredient of the fast recipe with and without the loss
limited-choice   8 x 192 on three books, six times over: weight decay and dropout, at the rate of the choice
limited          the same with four seeds, the best and the last evaluation
124m             GPT-2's body, 12 x 768, context 1,024, 4.1M tokens, two seeds; for a GPU

All arms of a stage and recipe see the same data in the same order, in bfloat16. The measure that counts is bits per byte of
the test books, which no choice has seen; a stage that was stopped goes on. "report" puts together what is there.
"""

import study  # isort: split

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from study import files, read_json, report, show

from minidisp import InputError
from minidisp.comparison import holm, paired_p, sign_test_p
from minidisp.runtime.cli import Parser, exit_code

ARMS = {  # how the loss is used; the first three are the protocol's
    "off": {},
    "lambda 0.1": {"dispersion": 0.1},
    "tau 0.1": {"dispersion": 0.1, "dispersion_tau": 0.1},
    "l2_repel": {"dispersion": 0.1, "dispersion_variant": "l2_repel"},
    "mean cosine": {"dispersion": 0.1, "dispersion_variant": "mean_cosine"},
}
GRID = {  # what is tried, the recipe's own value in the middle
    "gpt2": {"lr": (1e-3, 2e-3, 4e-3), "weight_decay": (0.0, 0.1, 0.5)},
    "fast": {"lr": (3e-3, 6e-3, 1.2e-2), "weight_decay": (0.0, 0.1, 0.5)},
}
SIZES = {
    "small": {"n_layer": 8, "n_head": 4, "n_embd": 64, "block_size": 128, "batch_size": 8},
    "default": {"n_layer": 8, "n_head": 6, "n_embd": 192, "block_size": 256, "batch_size": 8},
    "large": {"n_layer": 8, "n_head": 5, "n_embd": 320, "block_size": 256, "batch_size": 8},
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 16},
}
LIMITED = {"size": "default", "max_steps": 1000, "evaluations": 8, "data": "books3"}
# tunes: what is chosen per arm, one after the other, from start. settings_of: the stage that chose before.
# times: choose among these multiples of what it chose. rate: times the learning rate that it chose. flags: what no stage chooses.
STAGES = {
    "choice": {"size": "small", "max_steps": 700, "first_seed": 100, "seeds": 2, "start": {"weight_decay": 0.1},
               "tunes": ("lr", "weight_decay")},
    "small": {"size": "small", "max_steps": 3000, "seeds": 6, "settings_of": "choice"},
    "default": {"size": "default", "max_steps": 3000, "seeds": 4, "settings_of": "choice"},
    "half": {"size": "default", "max_steps": 3000, "seeds": 4, "settings_of": "choice", "rate": 0.5},
    "rates": {"size": "default", "max_steps": 1000, "first_seed": 100, "seeds": 2, "settings_of": "choice", "start": {},
              "tunes": ("lr",), "times": (0.25, 0.5, 1.0)},
    "large": {"size": "large", "max_steps": 2000, "seeds": 3, "settings_of": "choice", "rate": 0.5},
    "mechanism": {"size": "small", "max_steps": 700, "seeds": 4},
    "limited-choice": {**LIMITED, "first_seed": 100, "seeds": 2, "settings_of": "choice", "start": {"dropout": 0.0},
                       "tunes": ("weight_decay", "dropout"), "grid": {"weight_decay": (0.1, 0.5, 1.5), "dropout": (0.0, 0.1)}},
    "limited": {**LIMITED, "seeds": 4, "settings_of": "limited-choice"},
    "124m": {"size": "124m", "max_steps": 250, "evaluations": 2, "seeds": 2,
             "flags": {"lr": 6e-4, "beta2": 0.95, "warmup_steps": 40}},
}  # fmt: skip
INGREDIENTS = {  # of the fast recipe, each added to the plain one by itself
    "gpt2": {"lr": 2e-3},
    "linear to 0": {"lr": 2e-3, "schedule": "linear", "min_lr": 0.0},
    "embeddings apart": {"lr": 2e-3, "tied": False, "embedding_lr": 5.0},
    "qwen3 block, ReLU^2": {"lr": 2e-3, "arch": "qwen3", "mlp": "relu2"},
    "projections from 0": {"lr": 2e-3, "zero_init": True},
    "muon": {"lr": 6e-3, "optimizer": "muon", "momentum": 0.9},
}
SCALES = ("laptop", "smoke")
DIVERGED = 3  # exit code of train.py
EVAL_TOKENS = 102_400
TEXTS = 32

# What is measured of a finished run: key, label, digits, the words for less and for more of it.
MEASURES = (
    ("test", "bits per byte, test books", 4, ("better", "worse")),
    ("other", "bits per byte, another corpus", 4, ("better", "worse")),
    ("val", "bits per byte, validation books", 4, ("better", "worse")),
    ("val_best", "the same at its best evaluation", 4, ("better", "worse")),
    ("train_loss", "training loss, last tenth of the steps", 4, ("lower", "higher")),
    ("pairs", "accuracy on minimal pairs", 4, ("worse", "better")),
    ("rep_4", "repeated 4-grams of greedy continuations", 3, ("fewer", "more")),
    ("last_half_mean", "mean cosine, last half of the layers", 3, ("lower", "higher")),
)


def main(argv: list[str] | None = None) -> int:
    return exit_code("verdict.py", lambda: command(parse(argv)))


def command(args: argparse.Namespace) -> None:
    out = args.out / f"{args.recipe}-{args.stage}"
    if args.stage == "report":
        conclude(args)
    elif "tunes" in STAGES[args.stage]:
        choose(STAGES[args.stage], args, out)
    else:
        confirm(STAGES[args.stage], args, out)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="experiments/verdict.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--stage", choices=(*STAGES, "report"), required=True, help="which part of the study")
    add("--recipe", choices=tuple(GRID), default="gpt2", help="how to train (default gpt2)")
    add("--scale", choices=SCALES, default="laptop", help="smoke: seconds, to see that it runs (default laptop)")
    add("--out", type=Path, default=Path("runs/verdict"), metavar="DIR", help="folder (default runs/verdict)")
    add("--data", metavar="TEXT", help="corpus (default: books, books3 for the limited stages)")
    add("--pairs", metavar="GLOB", help="minimal pairs, as for eval.py; without it there is no such row")
    add("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS)[:3], metavar="ARM",
        help='these arms, the first one compared with (default "off" "lambda 0.1" "tau 0.1"; also "l2_repel" "mean cosine")')  # fmt: skip
    add("--seeds", type=int, metavar="N", help="another number of seeds than the protocol's")
    add("--first-seed", type=int, metavar="N", help="and another first one: so two processes can share a stage")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads (default 1)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of all runs (default cpu)")
    study.add_measures(parser)
    parser.set_defaults(other="pystdlib")
    args = study.check_counts(parser.parse_args(argv))
    stage = STAGES.get(args.stage, {})
    if args.time_ratio is not None and ("settings_of" not in stage or "tunes" in stage):
        raise InputError(f"--time-ratio adds an arm to a confirmation, and --stage {args.stage} is none: leave it out")
    return args


def plan(stage: dict, arms: dict[str, dict], args: argparse.Namespace, out: Path) -> dict:
    """(arm, seed) -> Config and command line of the stage's runs."""
    flags = {"data": stage.get("data", "books"), **SIZES[stage["size"]], "recipe": args.recipe,
             "dtype": "bfloat16", "device": args.device, "max_steps": stage["max_steps"],
             "eval_every": stage["max_steps"] // stage.get("evaluations", 4), "eval_tokens": EVAL_TOKENS,
             **stage.get("flags", {})}  # fmt: skip
    if args.device == "cuda" and stage["size"] != "124m":
        flags["compile"] = "off"  # it would take longer than these runs
    if args.scale == "smoke":
        flags |= study.SMOKE
    if args.stage == "mechanism":
        del flags["recipe"]  # its ingredients are named one by one
    arms = study.at_equal_time(arms, flags, args.time_ratio)
    first = stage.get("first_seed", 0) if args.first_seed is None else args.first_seed
    return study.make_plan({**stage, "first_seed": first, "train": flags}, arms, out, args)


# --- choosing ---------------------------------------------------------------------------------------------------------


def choose(stage: dict, args: argparse.Namespace, out: Path) -> None:
    """Find every arm's settings one after the other, each at the best of those before; choice.json has all that was tried.

    The best is what has the fewest validation bits per byte in the mean over the seeds; null stands for a run that diverged.
    """
    grid = stage.get("grid", GRID[args.recipe])
    before = settings_before(stage, args) if "settings_of" in stage else {}
    chosen = {}
    for arm in args.arms:
        best, tried = {**before.get(arm, {}), **stage["start"]}, {}
        for field in stage["tunes"]:
            values = [times * best[field] for times in stage["times"]] if "times" in stage else grid[field]
            candidates = {name_of(arm, {**best, field: value}): {**ARMS[arm], **best, field: value} for value in values}
            bits: dict[str, list[float]] = {}
            runs = plan(stage, candidates, args, out)
            for (label, seed), run in runs.items():
                bits.setdefault(label, []).append(final_bits((label, seed), run))
            tried |= {label: float(np.mean(over_seeds)) for label, over_seeds in bits.items()}
            winner = min(candidates, key=tried.get)
            best |= {field: candidates[winner][field]}
        seeds = sorted({seed for _, seed in runs})
        chosen[arm] = {"settings": best, "bits_per_byte": tried[winner], "tried": tried, "seeds": seeds}
    path = out / "choice.json"
    kept = read_json(path)["arms"] if path.exists() else {}  # arms that were chosen for by an earlier command
    files.write_json(path, {"arms": {**kept, **chosen}})
    rows = [
        [arm, *(f"{c['settings'][field]:g}" for field in stage["tunes"]), f"{c['bits_per_byte']:.4f}"]
        for arm, c in chosen.items()
    ]
    show(report.table([f"{args.recipe}, chosen", *stage["tunes"], "bits per byte"], rows), out / "table.txt")


def name_of(arm: str, settings: dict) -> str:
    return ", ".join([arm, *(f"{field.replace('_', ' ')} {value:g}" for field, value in sorted(settings.items()))])


def final_bits(name: tuple[str, int], run: tuple) -> float:
    """Train a run, or what is left of it; its validation bits per byte at the end, infinite if it diverged."""
    try:
        study.train_all({name: run})
    except SystemExit as failed:
        if failed.code != DIVERGED:
            raise
        return math.inf
    return read_json(run[0].run_dir / "summary.json")["last"]["bits_per_byte"]


# --- confirming -------------------------------------------------------------------------------------------------------


def settings_before(stage: dict, args: argparse.Namespace) -> dict[str, dict]:
    """arm -> the settings that an earlier stage has chosen for it."""
    path = args.out / f"{args.recipe}-{stage['settings_of']}" / "choice.json"
    if not path.exists():
        raise InputError(f"{path} is not there: run --stage {stage['settings_of']} --recipe {args.recipe} first")
    chosen = read_json(path)["arms"]
    if missing := [arm for arm in args.arms if arm not in chosen]:
        raise InputError(f"{path} has no settings for {', '.join(missing)}: name other --arms, or run that stage again")
    return {arm: chosen[arm]["settings"] for arm in args.arms}


def confirmed_arms(stage: dict, args: argparse.Namespace) -> dict[str, dict]:
    """label -> flags: every arm with the settings that were chosen for it."""
    before = settings_before(stage, args) if "settings_of" in stage else {arm: {} for arm in args.arms}
    arms = {arm: {**ARMS[arm], **settings} for arm, settings in before.items()}
    if "rate" in stage:
        arms = {arm: {**flags, "lr": stage["rate"] * flags["lr"]} for arm, flags in arms.items()}
    return arms


def mechanism_arms(args: argparse.Namespace) -> dict[str, dict]:
    return {f"{name}, {arm}": {**flags, **ARMS[arm]} for name, flags in INGREDIENTS.items() for arm in args.arms}


def confirm(stage: dict, args: argparse.Namespace, out: Path) -> None:
    """Train the arms over the seeds, measure each run, compare; results.json, table.txt, differences.png."""
    arms = mechanism_arms(args) if args.stage == "mechanism" else confirmed_arms(stage, args)
    runs = plan(stage, arms, args, out)
    study.train_all(runs)
    found: dict[str, list[dict]] = {}
    for (arm, _), (config, _) in runs.items():
        found.setdefault(arm, []).append(measured(config, args))
    groups = [list(found)]
    if args.stage == "mechanism":
        groups = [[label for label in arms if label.startswith(f"{name}, ")] for name in INGREDIENTS]
    results, tables = [], []
    for group in groups:
        compared, shown = study.compare_all({arm: found[arm] for arm in group}, MEASURES)
        results.append(compared)
        tables += shown
    files.write_json(out / "results.json", {"recipe": args.recipe, "stage": args.stage, "settings": arms,
                                            "seconds": {arm: [f["seconds"] for f in of] for arm, of in found.items()},
                                            "compared": results})  # fmt: skip
    show("\n\n".join(tables), out / "table.txt")
    labels = {key: label for key, label, *_ in MEASURES if key in ("test", "other", "last_half_mean")}
    title = f"{args.recipe}, {args.stage}: does the dispersion loss help?"
    for path in report.draw_differences(results[0], labels, title, out / "differences.png"):
        print(f"figure  {path}")


def measured(config: study.Config, args: argparse.Namespace) -> dict:
    """The numbers of a finished run."""
    torch.set_num_threads(args.threads)
    text = ["--split", "test", "--stride", str(config.block_size), "--texts", str(TEXTS)]
    test = study.evaluated(config, "test", text)
    lines, summary = report.read_metrics(config.run_dir / "metrics.jsonl"), read_json(config.run_dir / "summary.json")
    losses = [line["ce"] for line in lines if line.get("ce") is not None]  # null: the step was skipped
    found = {
        "test": test["bits_per_byte"],
        "other": study.bits_elsewhere(config, args.other),
        "val": summary["last"]["bits_per_byte"],
        "val_best": summary["best"]["bits_per_byte"],
        "train_loss": float(np.mean(losses[-max(1, len(losses) // 10) :])),
        "rep_4": test["writing"]["greedy"]["rep_4"],
        "last_half_mean": summary["last"]["last_half_mean"],
        "seconds": summary["seconds"],
    }
    if args.pairs:
        pairs = study.evaluated(config, f"pairs {args.pairs}", ["--split", "none", "--minimal-pairs", args.pairs])
        found["pairs"] = pairs["minimal_pairs"]["accuracy"]
    return found


# --- what it comes to -------------------------------------------------------------------------------------------------


def conclude(args: argparse.Namespace) -> None:
    """One row per comparison that has been run, p-values corrected for their number; verdict.txt and verdict.png."""
    results = [with_nan(read_json(path)) for path in sorted(args.out.glob("*/results.json"))]
    if not results:
        raise InputError(f"{args.out} has no finished stage: run one with --stage first")
    rows, drawn, p_values = [], {"test": {"off": None}, "other": {"off": None}}, []
    for result in results:
        for compared in result["compared"]:
            base, *others = compared["test"]
            for arm in others:
                off, own = compared["test"][base]["values"], compared["test"][arm]
                label = f"{result['recipe']}, {result['stage']}: {arm}"
                p_values.append(paired_p(off, own["values"]))
                better = sum(b < a for a, b in zip(off, own["values"], strict=True))
                difference, low, high = (report.number(own[key], 4, "+") for key in ("difference", "low", "high"))
                rows.append([label, report.number(np.mean(off)), difference, f"{low} to {high}", f"{better} of {len(off)}",
                             report.number(sign_test_p(off, own["values"]), 3)])  # fmt: skip
                for key in drawn:
                    drawn[key][label] = compared[key][arm]
    for row, p, corrected in zip(rows, p_values, holm(p_values), strict=True):
        row += [report.number(p), report.number(corrected)]
    head = [
        "bits per byte of the test books",
        "off",
        "difference",
        "95 % interval",
        "better",
        "sign p",
        "p",
        "Holm's p",
    ]
    show(report.table(head, rows), args.out / "verdict.txt")
    labels = {key: label for key, label, *_ in MEASURES if key in drawn}
    for path in report.draw_differences(drawn, labels, "Does the dispersion loss help?", args.out / "verdict.png"):
        print(f"figure  {path}")


def with_nan(values):
    """What JSON holds, with NaN again in the place of null."""
    if isinstance(values, dict):
        return {key: with_nan(value) for key, value in values.items()}
    if isinstance(values, list):
        return [with_nan(value) for value in values]
    return math.nan if values is None else values


if __name__ == "__main__":
    sys.exit(main())
