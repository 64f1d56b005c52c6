"""Does the dispersion loss help, with the gpt2 and the fast recipe, when every condition is tuned?

    python data/prepare.py --input books10m.jsonl.gz --name books       # 142 English books, see docs/verdict.md
    python experiments/verdict.py --recipe gpt2 --stage choice          # and the same with --recipe fast
    python experiments/verdict.py --recipe gpt2 --stage small --pairs "blimp/*.jsonl"
    python experiments/verdict.py --stage report
    python experiments/verdict.py --stage figures --out results         # from results/verdict.json

The protocol was fixed before the first run; docs/verdict.md describes it and the parts that were run. In short:

choice           learning rate of each condition, then its weight decay at that rate; seeds 100 and 101, validation
                 books
small            8 x 64, 3.1M tokens, six seeds: baseline, lambda 0.1 as published, the same with tau 0.1
default          8 x 192, 6.1M tokens, four seeds: the same conditions
rates            8 x 192, 2.0M tokens, seeds 100 and 101: the learning rate selected at 8 x 64, times 0.25, 0.5 and 1
half             like default, at half the selected learning rates, four seeds
large            8 x 320 (11M parameters), at half those rates, 4.1M tokens, three seeds
mechanism        8 x 64, 0.7M tokens, four seeds: each ingredient of the fast recipe with and without the loss
limited-choice   8 x 192 on three books, six epochs: weight decay and dropout, at the selected learning rate
limited          the same with four seeds, best and last evaluation
124m             a GPT-2-small-sized model, 12 x 768, context 1,024, 4.1M tokens, two seeds; needs a GPU

All conditions of a stage and recipe see the same data in the same order, in bfloat16. The primary measure is bits per
byte on the test books, which are not used for hyperparameter selection. The same command continues an interrupted
stage. "report" compares the finished stages.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P omits it

import study  # isort: split

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from study import files, read_json, report, show

from minidisp import InputError
from minidisp.comparison import holm, paired_p, sign_test_p
from minidisp.report import figures
from minidisp.runtime.cli import Parser, exit_code

ARMS = {  # the conditions; the first three are those of the protocol
    "baseline": {},
    "lambda 0.1": {"dispersion": 0.1},
    "tau 0.1": {"dispersion": 0.1, "dispersion_tau": 0.1},
    "l2_repel": {"dispersion": 0.1, "dispersion_variant": "l2_repel"},
    "mean cosine": {"dispersion": 0.1, "dispersion_variant": "mean_cosine"},
}
GRID = {  # the search grid, with the recipe's value in the middle
    "gpt2": {"lr": (1e-3, 2e-3, 4e-3), "weight_decay": (0.0, 0.1, 0.5)},
    "fast": {"lr": (3e-3, 6e-3, 1.2e-2), "weight_decay": (0.0, 0.1, 0.5)},
}
WARMUP = {"gpt2": 40, "fast": 10}  # steps, fixed for the study, independent of the recipes' current defaults
SIZES = {
    "small": {"n_layer": 8, "n_head": 4, "n_embd": 64, "block_size": 128, "batch_size": 8},
    "default": {"n_layer": 8, "n_head": 6, "n_embd": 192, "block_size": 256, "batch_size": 8},
    "large": {"n_layer": 8, "n_head": 5, "n_embd": 320, "block_size": 256, "batch_size": 8},
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 16},
}
LIMITED = {"size": "default", "max_steps": 1000, "evaluations": 8, "data": "books3"}
# tunes: the settings selected per condition, one after the other, starting from start. settings_of: the stage whose
# selection is used. times: select among these multiples of it. rate: multiplies the selected learning rate. flags:
# fixed settings.
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
                       "tunes": ("weight_decay", "dropout"),
                       "grid": {"weight_decay": (0.1, 0.5, 1.5), "dropout": (0.0, 0.1)}},
    "limited": {**LIMITED, "seeds": 4, "settings_of": "limited-choice"},
    "124m": {"size": "124m", "max_steps": 250, "evaluations": 2, "seeds": 2,
             "flags": {"lr": 6e-4, "beta2": 0.95, "warmup_steps": 40}},
}  # fmt: skip
INGREDIENTS = {  # of the fast recipe, each added to the gpt2 recipe alone
    "gpt2": {"lr": 2e-3},
    "linear to 0": {"lr": 2e-3, "schedule": "linear", "min_lr": 0.0},
    "untied embeddings": {"lr": 2e-3, "tied": False, "embedding_lr": 5.0},
    "Qwen3 block, ReLU^2": {"lr": 2e-3, "arch": "qwen3", "mlp": "relu2"},
    "zero-initialised projections": {"lr": 2e-3, "zero_init": True},
    "Muon": {"lr": 6e-3, "optimizer": "muon", "momentum": 0.9},
}
SCALES = ("laptop", "smoke")
EVAL_TOKENS = 102_400
TEXTS = 32

# The measures of a finished run: key, label, digits, the words for a lower and a higher value.
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
    elif args.stage == "figures":
        draw(args.out)
    elif "tunes" in STAGES[args.stage]:
        choose(STAGES[args.stage], args, out)
    else:
        confirm(STAGES[args.stage], args, out)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="experiments/verdict.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--stage", choices=(*STAGES, "report", "figures"), required=True, help="which part of the study")
    add("--recipe", choices=tuple(GRID), default="gpt2", help="recipe of train.py (default gpt2)")
    add("--scale", choices=SCALES, default="laptop", help="smoke: takes seconds, checks that it runs (default laptop)")
    add("--out", type=Path, default=Path("runs/verdict"), metavar="DIR", help="folder (default runs/verdict)")
    add("--data", metavar="TEXT", help="corpus (default: books, books3 for the limited stages)")
    add("--pairs", metavar="GLOB", help="also report accuracy on minimal pairs, as eval.py does")
    words = 'conditions; the first is the baseline (default "baseline" "lambda 0.1" "tau 0.1"; also "l2_repel" '
    words += '"mean cosine")'
    add("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS)[:3], metavar="ARM", help=words)
    add("--seeds", type=int, metavar="N", help="number of seeds (default: the protocol's)")
    words = "first seed (default: the protocol's), so that two processes can share a stage"
    add("--first-seed", type=int, metavar="N", help=words)
    add("--threads", type=int, default=1, metavar="N", help="CPU threads (default 1)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of all runs (default cpu)")
    study.add_measures(parser)
    parser.set_defaults(other="pystdlib")
    args = study.check_counts(parser.parse_args(argv), "seeds", "threads")
    stage = STAGES.get(args.stage, {})
    if args.time_ratio is not None and ("settings_of" not in stage or "tunes" in stage):
        raise InputError(f"--time-ratio is for final comparisons only, not for --stage {args.stage}: omit it")
    return args


def plan(stage: dict, arms: dict[str, dict], args: argparse.Namespace, out: Path) -> dict:
    """(condition, seed) -> Config and command line of the stage's runs."""
    flags = {
        "data": stage.get("data", "books"),
        **SIZES[stage["size"]],
        "recipe": args.recipe,
        "warmup_steps": WARMUP[args.recipe],
        "dtype": "bfloat16",
        "device": args.device,
        "max_steps": stage["max_steps"],
        "eval_every": stage["max_steps"] // stage.get("evaluations", 4),
        "eval_tokens": EVAL_TOKENS,
        **stage.get("flags", {}),
    }
    if args.device == "cuda" and stage["size"] != "124m":
        flags["compile"] = "off"  # compilation takes longer than these runs
    if args.scale == "smoke":
        flags |= study.SMOKE
    if args.stage == "mechanism":
        flags |= {"recipe": "gpt2", "warmup_steps": WARMUP["gpt2"]}  # to which the ingredients are added
    arms = study.at_equal_time(arms, flags, args.time_ratio)
    first = stage.get("first_seed", 0) if args.first_seed is None else args.first_seed
    return study.make_plan({**stage, "first_seed": first, "train": flags}, arms, out, args)


# --- hyperparameter selection -----------------------------------------------------------------------------------------


def choose(stage: dict, args: argparse.Namespace, out: Path) -> None:
    """Select the settings of every condition one after the other, each with the best values of the previous ones.

    The best has the fewest validation bits per byte, averaged over the seeds. choice.json has all trials; null means
    that a run diverged.
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
                bits.setdefault(label, []).append(study.final_bits((label, seed), run))
            tried |= {label: float(np.mean(over_seeds)) for label, over_seeds in bits.items()}
            winner = min(candidates, key=tried.get)
            best |= {field: candidates[winner][field]}
        seeds = sorted({seed for _, seed in runs})
        chosen[arm] = {"settings": best, "bits_per_byte": tried[winner], "tried": tried, "seeds": seeds}
    path = out / "choice.json"
    kept = read_json(path)["arms"] if path.exists() else {}  # conditions of an earlier command
    files.write_json(path, {"arms": {**kept, **chosen}})
    rows = [
        [arm, *(f"{c['settings'][field]:g}" for field in stage["tunes"]), f"{c['bits_per_byte']:.4f}"]
        for arm, c in chosen.items()
    ]
    show(report.table([f"{args.recipe}, selected", *stage["tunes"], "bits per byte"], rows), out / "table.txt")


def name_of(arm: str, settings: dict) -> str:
    return ", ".join([arm, *(f"{field.replace('_', ' ')} {value:g}" for field, value in sorted(settings.items()))])


# --- final comparison -------------------------------------------------------------------------------------------------


def settings_before(stage: dict, args: argparse.Namespace) -> dict[str, dict]:
    """condition -> the settings selected for it in an earlier stage."""
    path = args.out / f"{args.recipe}-{stage['settings_of']}" / "choice.json"
    if not path.exists():
        raise InputError(f"{path} does not exist: run --stage {stage['settings_of']} --recipe {args.recipe} first")
    chosen = read_json(path)["arms"]
    if missing := [arm for arm in args.arms if arm not in chosen]:
        raise InputError(f"{path} has no settings for {', '.join(missing)}: pass other --arms, or run that stage again")
    return {arm: chosen[arm]["settings"] for arm in args.arms}


def confirmed_arms(stage: dict, args: argparse.Namespace) -> dict[str, dict]:
    """label -> flags: every condition with its selected settings."""
    before = settings_before(stage, args) if "settings_of" in stage else {arm: {} for arm in args.arms}
    arms = {arm: {**ARMS[arm], **settings} for arm, settings in before.items()}
    if "rate" in stage:
        arms = {arm: {**flags, "lr": stage["rate"] * flags["lr"]} for arm, flags in arms.items()}
    return arms


def mechanism_arms(args: argparse.Namespace) -> dict[str, dict]:
    return {f"{name}, {arm}": {**flags, **ARMS[arm]} for name, flags in INGREDIENTS.items() for arm in args.arms}


def confirm(stage: dict, args: argparse.Namespace, out: Path) -> None:
    """Train the conditions over the seeds, evaluate each run, compare; results.json, table.txt, differences.png."""
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
    seconds = {arm: [f["seconds"] for f in of] for arm, of in found.items()}
    head = {"recipe": args.recipe, "stage": args.stage, "settings": arms, "seconds": seconds}
    files.write_json(out / "results.json", {**head, "compared": results})
    show("\n\n".join(tables), out / "table.txt")
    labels = {key: (label, words) for key, label, _, words in MEASURES if key in ("test", "other", "last_half_mean")}
    title = f"Effect of the dispersion loss: {args.recipe} recipe, stage {args.stage}"
    for path in report.draw_differences(results[0], labels, title, out / "differences.png"):
        print(f"figure  {path}")


def measured(config: study.Config, args: argparse.Namespace) -> dict:
    """The measures of a finished run, by their keys in MEASURES."""
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


# --- the verdict ------------------------------------------------------------------------------------------------------


def conclude(args: argparse.Namespace) -> None:
    """Write verdict.txt, one row per finished comparison with corrected p-values, verdict.json and the figures."""
    results = [with_nan(read_json(path)) for path in sorted(args.out.glob("*/results.json"))]
    if not results:
        raise InputError(f"{args.out} has no finished stage: run one with --stage first")
    rows, comparisons, p_values = [], [], []
    for result in results:
        for compared in result["compared"]:
            base, *others = compared["test"]
            for arm in others:
                baseline, own = compared["test"][base]["values"], compared["test"][arm]
                p_values.append(paired_p(baseline, own["values"]))
                better = sum(b < a for a, b in zip(baseline, own["values"], strict=True))
                difference, low, high = (report.number(own[key], 4, "+") for key in ("difference", "low", "high"))
                row = [f"{result['recipe']}, {result['stage']}: {arm}", report.number(np.mean(baseline)), difference]
                row += [f"{low} to {high}", f"{better} of {len(baseline)}"]
                rows.append([*row, report.number(sign_test_p(baseline, own["values"]), 3)])
                comparisons.append(
                    {
                        "recipe": result["recipe"],
                        "stage": result["stage"],
                        "condition": arm,
                        "books": "test",
                        "seeds": len(baseline),
                        "baseline": float(np.mean(baseline)),
                        **{key: own[key] for key in ("difference", "low", "high")},
                        "baseline_by_seed": baseline,
                        "by_seed": own["values"],
                    }
                )
    for row, p, corrected in zip(rows, p_values, holm(p_values), strict=True):
        row += [report.number(p), report.number(corrected)]
    head = ["bits per byte of the test books", "baseline", "difference", "95 % interval", "better"]
    show(report.table([*head, "sign p", "p", "Holm's p"], rows), args.out / "verdict.txt")
    files.write_json(args.out / "verdict.json", {"comparisons": comparisons})
    draw(args.out)


LABELS = {  # of the stages in the figures, in that order: layers x channels, and how a stage differs
    "small": "8 x 64",
    "default": "8 x 192",
    "half": "8 x 192, half LR",
    "large": "8 x 320, half LR",
    "124m": "12 x 768",
    "limited": "8 x 192, three books, six epochs",
    "mechanism": "8 x 64, 700 steps",
    **{f"warmup-{steps}": f"8 x 192, warm-up {steps}" for steps in (40, 100, 200)},  # of warmup.py
}
TEXTS_OF = {
    "test": "",
    "validation": "validation books",
    "python": "Python sources",
}  # what a comparison was measured on
MARKS = {  # of the conditions in figures/recipes.png: colour, marker, offset
    "baseline": (figures.BLUE, "o", -0.2),
    "lambda 0.1": (figures.ORANGE, "D", 0.0),
    "tau 0.1": (figures.CYCLE[3], "s", 0.2),
}


def draw(out: Path) -> None:
    """Draw figures/verdict.png, all comparisons of verdict.json, and figures/recipes.png, with and without the loss."""
    path = out / "verdict.json"
    if not path.exists():
        raise InputError(f"{path} does not exist: run --stage report first")
    comparisons = with_nan(read_json(path))["comparisons"]
    drawn = draw_comparisons(comparisons, out / "figures" / "verdict.png")
    drawn += draw_recipes(comparisons, out / "figures" / "recipes.png")
    for figure in drawn:
        print(f"figure  {figure}")


def in_order(comparisons: list[dict]) -> list[dict]:
    return sorted(comparisons, key=lambda c: (list(LABELS).index(c["stage"]), c["recipe"] == "fast"))


def draw_comparisons(comparisons: list[dict], path: Path) -> list[Path]:
    """Every comparison as a row: the paired difference to the baseline and its interval."""
    rows = {}
    for c in in_order(comparisons):
        books = f" ({TEXTS_OF[c['books']]})" if TEXTS_OF[c["books"]] else ""
        recipe, condition = f"{c['recipe']} recipe", c["condition"]
        if c["stage"] == "mechanism":
            ingredient, condition = condition.rsplit(", ", 1)
            recipe += f" + {ingredient}" * (ingredient != "gpt2")
        rows[f"{LABELS[c['stage']]}, {recipe}: {condition}{books}"] = c
    measures = {"test": ("held-out bits per byte", ("better", "worse"))}
    title = "Effect of the dispersion loss on held-out bits per byte"
    return report.draw_differences({"test": {"baseline": None, **rows}}, measures, title, path)


@figures.drawing
def draw_recipes(comparisons: list[dict], path: Path) -> list[Path]:
    """A row per model and recipe: bits per byte of every seed with and without the loss, and the paired differences."""
    rows: dict[str, dict[str, dict]] = {}
    for c in in_order(comparisons):
        if c["stage"] not in ("mechanism", "limited") and c["condition"] in MARKS:
            books = f" {'*' * list(TEXTS_OF).index(c['books'])}".rstrip()
            rows.setdefault(f"{LABELS[c['stage']]}, {c['recipe']} recipe{books}", {})[c["condition"]] = c
    figure, (level, change) = figures.subplots(1, 2, size=(11, 1.9 + 0.42 * len(rows)), sharey=True)
    for y, conditions in enumerate(rows.values()):
        by_seed = {"baseline": next(iter(conditions.values()))["baseline_by_seed"]}
        by_seed |= {condition: c["by_seed"] for condition, c in conditions.items()}
        for condition, values in by_seed.items():
            colour, marker, offset = MARKS[condition]
            level.plot(values, [y + offset] * len(values), marker, color=colour, ms=4, alpha=0.4, mew=0)
            level.plot(np.mean(values), y + offset, marker, color=colour, ms=6, label=condition)
        for condition, c in conditions.items():
            colour, marker, offset = MARKS[condition]
            change.plot([c["low"], c["high"]], [y + offset] * 2, color=colour, lw=2.2, solid_capstyle="butt")
            change.plot(c["difference"], y + offset, marker, color=colour, ms=5)
    for axes in (level, change):
        for y in range(0, len(rows), 2):
            axes.axhspan(y - 0.5, y + 0.5, color="black", alpha=0.04, lw=0)
    level.set_yticks(range(len(rows)), rows)
    level.set_ylim(len(rows) - 0.5, -0.5)
    level.set(xlabel="held-out bits per byte", title="Mean (large) and every seed (small)")
    level.annotate("\N{LEFTWARDS ARROW} better", (0.02, 0.02), xycoords="axes fraction", weight="bold")
    change.axvline(0, color="black", lw=1)
    change.set(xlabel="bits per byte, 95 % interval over paired seeds", title="Difference to the baseline")
    change.annotate("\N{LEFTWARDS ARROW} better", (0.02, 0.02), xycoords="axes fraction", weight="bold")
    change.annotate("worse \N{RIGHTWARDS ARROW}", (0.98, 0.02), xycoords="axes fraction", ha="right", weight="bold")
    labels = {
        "baseline": "baseline: cross-entropy alone",
        "lambda 0.1": "with the dispersion loss as published (lambda 0.1)",
        "tau 0.1": "the same with tau 0.1",
    }
    handles, names = level.get_legend_handles_labels()
    drawn = dict(zip(names, handles, strict=True))
    shown = [c for c in labels if c in drawn]
    options = {"loc": "outside lower center", "ncols": 3, "frameon": False}
    figure.legend([drawn[c] for c in shown], [labels[c] for c in shown], **options)
    marks = (name.partition("*") for name in rows)
    stars = sorted({star + more for _, star, more in marks if star})
    notes = "\n".join(f"{star} {list(TEXTS_OF.values())[len(star)]}" for star in stars)
    below = {"xytext": (-6, -34), "xycoords": "axes fraction", "textcoords": "offset points", "ha": "right"}
    level.annotate(notes, (0, 0), **below, va="top" if len(stars) > 1 else "center", fontsize=9)
    return [figures.save(figure, path)]


def with_nan(values):
    """Values from JSON, with null replaced by NaN."""
    if isinstance(values, dict):
        return {key: with_nan(value) for key, value in values.items()}
    if isinstance(values, list):
        return [with_nan(value) for value in values]
    return math.nan if values is None else values


if __name__ == "__main__":
    sys.exit(main())
