"""Shared by the studies in this folder: trains every condition over the seeds, then compares them with the first one.

A study defines a table of scales and a function that returns its conditions; cli() does the rest. The same command
continues an interrupted study: finished runs are kept, and an unfinished one is resumed. Runs with the same seed share
data order and dropout, and initialisation if the shapes agree, so differences are paired by seed.

The folder of a study contains one run folder per condition and seed, with the run's output in output.txt, and finally
table.txt, results.json, differences.png and, if there are few conditions, condensation.png.
"""

import os
import sys

# Before other imports: a folder beside this file, such as a corpus named email, must not be imported as a module.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(path for path in sys.path if os.path.realpath(path) != HERE)]

import argparse
import contextlib
import gc
import glob
import io
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import eval as evaluation
import train
from minidisp import InputError, report
from minidisp.comparison import paired_interval
from minidisp.config import Config, command_line, parse, read_json, to_dict
from minidisp.runtime import checkpoint, files
from minidisp.runtime.cli import Parser, exit_code

ROOT = Path(__file__).resolve().parent.parent
# The settings of most studies at each scale: flags of train.py by their names in Config. They include the gpt2 recipe
# and its warm-up, so that results do not change with the defaults of train.py.
SMOKE = {"recipe": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "batch_size": 4, "max_steps": 4,
         "warmup_steps": 1, "eval_every": 2, "eval_tokens": 512, "device": "cpu"}  # fmt: skip
LAPTOP = {"recipe": "gpt2", "n_layer": 8, "n_head": 4, "n_embd": 64, "block_size": 128, "batch_size": 8,
          "max_steps": 400, "warmup_steps": 40, "lr": 3e-3, "eval_every": 100, "eval_tokens": 12_800,
          "device": "cpu"}  # fmt: skip
GPU = {"preset": "gpt2", "recipe": "gpt2", "data": "wikitext103", "block_size": 512, "batch_size": 64, "grad_accum": 4,
       "max_steps": 7600, "eval_every": 400, "eval_tokens": 102_400}  # fmt: skip
FAST = {"recipe": "fast", "lr": 6e-3, "warmup_steps": 10}  # at the learning rate that is best at 8 x 64
BOOKS = {"n_layer": 8, "n_head": 4, "n_embd": 64, "block_size": 128, "batch_size": 8, "max_steps": 700,
         "eval_every": 700, "eval_tokens": 102_400, "device": "cpu", "data": "books"}  # fmt: skip
PAIR = {
    "cross-entropy": {},
    "with dispersion": {"dispersion": 0.1},
}  # conditions without and with the loss, at the paper's weight

# The measures that are compared: key in metrics.jsonl, label, digits, and the words for a lower and a higher value.
MEASURES = (
    ("bits_per_byte", "validation bits per byte", 4, ("better", "worse")),
    ("last_half_mean", "mean cosine, last half of the layers", 3, ("lower", "higher")),
    ("spearman", "Spearman, mean cosine against depth", 3, ("lower", "higher")),
    ("kendall", "Kendall, mean cosine against depth", 3, ("lower", "higher")),
    ("other", "bits per byte of the other corpus, best checkpoint", 4, ("better", "worse")),
)
DIVERGED = 3  # exit code of train.py
Evaluations = list[dict]  # of one run in order, or at one time, one per seed


class RunOf(str):
    """As the value of a flag: the folder of this condition's run with the same seed."""


def after_each_step(act: Callable[[], None], optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """The optimisers of a run, the last of which also calls act after its step."""
    step = optimizers[-1].step

    @torch.no_grad()
    def step_and_act() -> None:
        step()
        act()

    optimizers[-1].step = step_and_act
    return optimizers


def at_the_end(evaluations: dict[str, list[Evaluations]]) -> dict[str, Evaluations]:
    """The view of most studies: the last evaluation of every condition, one per seed."""
    return {condition: [of_seed[-1] for of_seed in over_seeds] for condition, over_seeds in evaluations.items()}


def at_the_end_of(name: str, belongs: Callable[[str], bool]) -> Callable:
    """at_the_end of the conditions whose label belongs; name: the view's key in results.json."""

    def view(evaluations: dict[str, list[Evaluations]]) -> dict[str, Evaluations]:
        return {label: rows for label, rows in at_the_end(evaluations).items() if belongs(label)}

    view.__name__ = name
    return view


def cli(
    file: str,
    doc: str,
    scales: dict[str, dict],
    arms: Callable[[dict], dict[str, dict]],
    views: tuple[Callable, ...] = (at_the_end,),
    argv: list[str] | None = None,
) -> int:
    """Run a study, or the rest of it, print its tables and draw its figures; returns the exit code.

    file, doc: `__file__` and `__doc__` of the study; the text up to the first question mark is the title of the
        figures.
    scales: name -> dictionary with `seeds` (their number, from `first_seed` or 0 on), `train` (flags of train.py, by
        their names in Config), and anything that `arms` needs.
    arms(scale): label -> the flags in `train` that this condition changes, in the order they run; the first is the
        baseline. A function instead of a flag replaces the function of this name in train.py.
    views: the comparisons; each maps condition -> evaluations of each seed to label -> one evaluation per seed, the
        first being the baseline. differences.png shows the first. A view without two rows, because of --arms, is
        left out.
    """
    name = Path(file).stem

    def command() -> None:
        args = parse_arguments(name, doc, scales, argv)
        scale, out = scales[args.scale], Path(args.out or f"runs/{name}-{args.scale}")
        conditions = at_equal_time(arms(scale), scale["train"], args.time_ratio)
        plan = chosen(args.arms, make_plan(scale, conditions, out, args))
        if reason := report.cannot_draw():
            print(reason, flush=True)
        train_all(plan, conditions)
        conclude(f"{name}, scale {args.scale}", doc[: doc.index("?") + 1], plan, views, out, args.other)

    # Ctrl-C between two runs ends here; during one, the trainer saves and raises SystemExit.
    return exit_code(f"{name}.py", command)


def parse_arguments(name: str, doc: str, scales: dict, argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog=f"experiments/{name}.py",
        description=doc,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--scale", choices=tuple(scales), required=True, help="smoke: seconds; laptop: minutes to hours; gpu: hours")
    add("--out", metavar="DIR", help=f"folder of the study (default runs/{name}-SCALE)")
    add("--data", metavar="TEXT", help="corpus, as for train.py (default: the scale's)")
    words = "number of seeds (default: the scale's); more seeds resolve smaller differences"
    add("--seeds", type=int, metavar="N", help=words)
    words = "train and compare only these conditions, by the labels of the tables, such as 'cross-entropy'"
    add("--arms", nargs="+", metavar="LABEL", help=words)
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add_measures(parser)
    return check_counts(parser.parse_args(argv), "seeds", "threads")


def add_measures(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every study for further comparisons."""
    add = parser.add_argument
    words = "also report bits per byte on the test split of this corpus, on which no run is trained"
    add("--other", metavar="TEXT", help=words)
    words = (
        "add a condition: the baseline trained for R times the steps. R: the time of a step with the loss, relative to "
    )
    words += "one without, on an idle machine (bench/train.py: minidisp + dispersion against minidisp)"
    add("--time-ratio", type=float, metavar="R", help=words)


def check_counts(args: argparse.Namespace, *options: str) -> argparse.Namespace:
    """Refuse values below 1 of these options, and a --time-ratio that is not one."""
    for option in options:
        value = getattr(args, option)
        if value is not None and value < 1:
            raise InputError(f"--{option.replace('_', '-')} is {value}, but must be at least 1")
    ratio = getattr(args, "time_ratio", None)
    if ratio is not None and not 0 < ratio < 100:
        raise InputError(f"--time-ratio is {ratio:g}, but must be more than 0 and less than 100, such as 1.05")
    return args


def at_equal_time(arms: dict[str, dict], flags: dict, ratio: float | None) -> dict[str, dict]:
    """The conditions; with a ratio, also the first one trained for that many times the steps, at equal time."""
    if ratio is None:
        return arms
    first, changes = next(iter(arms.items()))
    steps = {**flags, **changes}["max_steps"]
    return {**arms, f"{first}, {ratio:g} x the steps": {**changes, "max_steps": round(ratio * steps)}}


def make_plan(scale: dict, arms: dict[str, dict], out: Path, args: argparse.Namespace) -> dict:
    """(condition, seed) -> Config and command line of every run; bad settings are reported before the first run.

    Ordered by seed, so that an interrupted study has complete pairs.
    """
    plan, first = {}, scale.get("first_seed", 0)
    for seed in range(first, first + (args.seeds or scale["seeds"])):
        folders = {arm: out / f"{re.sub('[^a-z0-9.]+', '-', arm.lower()).strip('-')}-s{seed}" for arm in arms}
        for arm, changes in arms.items():
            changed = {field: value for field, value in changes.items() if not callable(value)}
            flags = {"recipe": "gpt2", **scale["train"], **changed, "seed": seed, "out": folders[arm]}
            flags |= {key: value for key, value in (("data", args.data), ("threads", args.threads)) if value}
            line = command_line(
                {field: folders[value] if isinstance(value, RunOf) else value for field, value in flags.items()}
            )
            plan[arm, seed] = parse(line), line
    return plan


def chosen(labels: list[str] | None, plan: dict) -> dict:
    """The runs of these conditions; all if None."""
    known = dict.fromkeys(arm for arm, _ in plan)
    for label in labels or ():
        if label not in known:
            raise InputError(f"--arms {label!r} is not a condition: choose from {', '.join(map(repr, known))}")
    return {(arm, seed): run for (arm, seed), run in plan.items() if labels is None or arm in labels}


def train_all(plan: dict, arms: dict[str, dict] | None = None) -> None:
    """Train every unfinished run of the plan, and print a line for each run.

    arms: the conditions, if some replace functions of train.py.
    """
    for i, ((arm, seed), (config, flags)) in enumerate(plan.items(), 1):
        with contextlib.ExitStack() as replaced:
            for name, value in (arms or {}).get(arm, {}).items():
                if callable(value):
                    replaced.enter_context(mock.patch.object(train, name, value))
            remark = finish(config, flags)
        summary = read_json(config.run_dir / "summary.json")
        last = summary["last"]
        scores = f"{last['bits_per_byte']:.4f} bits/byte, mean cosine {last['last_half_mean']:.3f}"
        print(f"{i:3d}/{len(plan)}  {arm}, seed {seed}: {scores}, {summary['seconds']:.0f} s{remark}", flush=True)


def finish(config: Config, flags: list[str]) -> str:
    """Train a run, or the rest of it; returns a remark if part of it existed already.

    Raises InputError if its folder holds a run with other settings, and SystemExit if the run was stopped or failed.
    """
    run, remark = config.run_dir, ""
    if (run / "config.json").exists():
        saved = read_json(run / "config.json")
        for field, wanted in to_dict(config).items():
            may_differ = ("out", "resume", "overwrite", "vocab_size", "threads")
            if field not in may_differ and saved.get(field, wanted) != wanted:
                raise InputError(
                    f"{run} holds a run with {field} {saved[field]}, not {wanted}: pass another --out, or remove it"
                )
        if (run / "summary.json").exists():
            return ", already finished"
        if (run / checkpoint.LAST).exists():
            flags, remark = ["--resume", "--out", str(run)], ", resumed"
        else:
            flags = [*flags, "--overwrite"]
    run.mkdir(parents=True, exist_ok=True)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with open(run / "output.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            code = train.cli(flags)
    finally:
        for number, handler in before.items():  # the trainer installed its own
            signal.signal(number, handler)
    if code > 128:  # a signal
        print("or continue the whole study with the command that started it", file=sys.stderr)
    elif code:
        print(f"the run in {run} failed", file=sys.stderr)
    if code:
        raise SystemExit(code)
    if torch.cuda.is_available():  # free what the run compiled and allocated
        torch.compiler.reset()
        gc.collect()
    return remark


def final_bits(name: tuple[str, int], run: tuple) -> float:
    """Train a run, or the rest of it; its final validation bits per byte, infinite if it diverged."""
    try:
        train_all({name: run})
    except SystemExit as failed:
        if failed.code != DIVERGED:
            raise
        return math.inf
    return read_json(run[0].run_dir / "summary.json")["last"]["bits_per_byte"]


def evaluated(config: Config, name: str, flags: list[str]) -> dict:
    """The output of eval.py with these flags for a finished run, cached in its measured.json under this name and the
    state of the files in the flags.
    """
    path = config.run_dir / "measured.json"
    kept = read_json(path) if path.exists() else {}
    stats = [os.stat(file) for flag in flags for file in sorted(glob.glob(flag)) if os.path.isfile(file)]
    if stats:
        name += f", {sum(s.st_size for s in stats)} bytes, of {max(s.st_mtime_ns for s in stats)}"
    if name not in kept:
        with contextlib.redirect_stdout(io.StringIO()):
            kept[name] = evaluation.main([str(config.run_dir), "--device", config.device, *flags])[0]
        files.write_json(path, kept)
    return kept[name]


def bits_elsewhere(config: Config, corpus: str) -> float:
    """Bits per byte of a finished run on the test split of a corpus on which it was not trained."""
    flags = ["--split", "test", "--stride", str(config.block_size), "--data", corpus]
    return evaluated(config, f"other {corpus}", flags)["bits_per_byte"]


def conclude(name: str, title: str, plan: dict, views: tuple[Callable, ...], out: Path, other: str | None) -> None:
    """Print and save the tables, results.json and the figures. other: a corpus on which no run is trained."""
    evaluations: dict[str, list[Evaluations]] = {}
    cost: dict[str, list[dict]] = {}
    for (arm, _), (config, _) in plan.items():
        metrics = report.read_metrics(config.run_dir / "metrics.jsonl")
        evaluations.setdefault(arm, []).append([line for line in metrics if "val_loss" in line])
        if other:  # only for the last evaluation, since earlier weights are gone
            evaluations[arm][-1][-1]["other"] = bits_elsewhere(config, other)
        cost.setdefault(arm, []).append(read_json(config.run_dir / "summary.json"))
    seeds = len({seed for _, seed in plan})

    rows = []
    for arm, runs in cost.items():
        seconds = np.mean([run["seconds"] for run in runs])
        rows.append([arm, f"{runs[0]['parameters']:,}", f"{runs[0]['tokens']:,}", f"{seconds:.0f}"])
    tables = [report.table([name, "parameters", "tokens", "seconds"], rows)]
    compared = {}
    # Views without two rows are left out; conditions chosen across views are compared with the first one.
    for view in [view for view in views if len(view(evaluations)) >= min(2, len(evaluations))] or [at_the_end]:
        rows = view(evaluations)
        compared[view.__name__], shown = compare_all(rows, MEASURES)
        tables += shown
        base, *others = rows
        tables.append(
            f"{seeds} seeds. Differences to {base!r}, paired by seed, with Student's 95 % interval: about one in "
            f"twenty of these {len(others) * len(shown)} excludes 0 by chance."
        )
    show("\n\n".join(tables), out / "table.txt")
    files.write_json(out / "results.json", {"name": name, "seeds": seeds, "compared": compared})
    labels = {key: (label, words) for key, label, _, words in MEASURES[:2]}
    figures = report.draw_differences(next(iter(compared.values())), labels, title, out / "differences.png")
    if len(evaluations) <= len(report.CYCLE):
        figures += report.draw_study(evaluations, title, out / "condensation.png")
    for path in figures:
        print(f"figure  {path}")


def show(text: str, path: Path) -> None:
    """Print a text and save it."""
    print("\n" + text)
    files.write_atomic(path, lambda file: file.write((text + "\n").encode()))


def compare_all(rows: dict[str, Evaluations], measures: tuple) -> tuple[dict[str, dict[str, dict]], list[str]]:
    """key -> the result of `compare`, and the tables, for each of the measures that all evaluations have."""
    known = [m for m in measures if all(m[0] in e for over_seeds in rows.values() for e in over_seeds)]
    compared = {key: compare(rows, key, words) for key, _, _, words in known}
    return compared, [comparison_table(label, digits, compared[key]) for key, label, digits, _ in known]


def compare(rows: dict[str, Evaluations], key: str, words: tuple[str, str]) -> dict[str, dict]:
    """label -> values over the seeds, their mean and sd, and the paired difference to the first row with interval."""
    values = {label: [math.nan if e[key] is None else e[key] for e in over_seeds] for label, over_seeds in rows.items()}
    base = next(iter(values.values()))
    compared = {}
    for label, own in values.items():
        sd = float(np.std(own, ddof=1)) if len(own) > 1 else math.nan
        difference, difference_sd, low, high = paired_interval(base, own)
        if math.isnan(difference):
            verdict = "undefined"
        elif math.isnan(low):
            verdict = "one seed: no interval"
        else:
            verdict = words[0] if high < 0 else words[1] if low > 0 else "not significant"
        paired = {"difference": difference, "difference_sd": difference_sd, "low": low, "high": high}
        compared[label] = {"values": own, "mean": float(np.mean(own)), "sd": sd, **paired, "verdict": verdict}
    return compared


def comparison_table(label: str, digits: int, compared: dict[str, dict]) -> str:
    rows = []
    for i, (arm, c) in enumerate(compared.items()):
        row = [arm, report.number(c["mean"], digits), report.number(c["sd"], digits)]
        if i == 0:
            row += ["", "", "", "baseline"]
        else:
            low, high = (("-" if math.isnan(c[end]) else f"{c[end]:+.{digits}f}") for end in ("low", "high"))
            change = "-" if math.isnan(c["difference"]) else f"{c['difference']:+.{digits}f}"
            row += [change, report.number(c["difference_sd"], digits), f"{low} to {high}", c["verdict"]]
        rows.append(row)
    return report.table([label, "mean", "sd", "difference", "sd", "95 % interval", ""], rows)
