"""Draw the training curves of any number of runs from their metrics.jsonl alone, also while they train.

    python -m minidisp.report runs/a runs/b                        # curves.png
    python -m minidisp.report runs/* --x time --out curves.pdf
    python -m minidisp.report runs/* --watch                       # redraw whenever a run has logged, until Ctrl-C

One figure: validation loss and smoothed training loss, and below them gradient norm, learning rate and throughput.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from minidisp import InputError, printable
from minidisp.report import figures
from minidisp.runtime.cli import Parser, exit_code
from minidisp.runtime.metrics_log import read_metrics

X = {"steps": "step", "tokens": "tokens", "time": "seconds"}
FORMATS = (".png", ".pdf", ".svg")


def main(argv: list[str] | None = None) -> int:
    return exit_code("minidisp.report", lambda: command(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="-m minidisp.report",
        usage="python -m minidisp.report [--flag value ...] RUN [RUN ...]",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or a metrics.jsonl")
    add("--x", choices=tuple(X), default="steps", help="horizontal axis (default steps)")
    words = "logarithmic loss axis over the whole run; default: linear, scaled to the loss after the warm-up"
    add("--log", action="store_true", help=words)
    words = "moving average of the training loss over N logged steps (default: a twentieth of them)"
    add("--smooth", type=int, metavar="N", help=words)
    words = "the figure: .png, .pdf or .svg (default curves.png)"
    add("--out", type=Path, default=Path("curves.png"), metavar="FILE", help=words)
    words = "check for new lines every SECONDS (default 10) and redraw"
    add("--watch", nargs="?", type=float, const=10.0, metavar="SECONDS", help=words)
    args = parser.parse_args(argv)
    if args.smooth is not None and args.smooth < 1:
        raise InputError(f"--smooth is {args.smooth}, but must be at least 1")
    if args.watch is not None and not 0 < args.watch < 1e6:
        raise InputError(f"--watch is {args.watch:g}, but must be a number of seconds above 0")
    if args.out.suffix not in FORMATS:
        raise InputError(f"--out {args.out}: the name must end with one of {', '.join(FORMATS)}")
    if reason := figures.cannot_draw():
        raise InputError(reason)
    return args


def command(args: argparse.Namespace) -> None:
    files = {name: run if run.suffix == ".jsonl" else run / "metrics.jsonl" for name, run in names(args.runs).items()}
    drawn = None
    while True:
        now = [(path.stat().st_mtime_ns, path.stat().st_size) for path in files.values()]
        if now != drawn:
            draw(files, args)
            drawn = now
        if args.watch is None:
            return
        time.sleep(args.watch)


def names(runs: list[Path]) -> dict[str, Path]:
    """A name for each run: that of its folder, or its full path if several folders have the same name."""
    runs = list(dict.fromkeys(runs))
    folders = [Path(os.path.realpath(run.parent if run.suffix == ".jsonl" else run)).name for run in runs]
    return {printable(name if folders.count(name) == 1 else run): run for name, run in zip(folders, runs, strict=True)}


def draw(files: dict[str, Path], args: argparse.Namespace) -> None:
    """Draw the curves logged so far, and print the progress of each run."""
    runs = {name: read_metrics(path) for name, path in files.items()}
    for name, lines in runs.items():
        if not any(X[args.x] in line for line in lines):
            raise InputError(f"{files[name]} has no line with {X[args.x]!r} yet")
    figures.draw_curves(runs, args.out, X[args.x], args.log, args.smooth)
    for name, lines in runs.items():
        last = {key: line[key] for line in lines for key in ("ce", "val_loss") if line.get(key) is not None}
        words = {"ce": "training", "val_loss": "validation"}
        losses = ", ".join(f"{word} loss {last[key]:.3f}" for key, word in words.items() if key in last)
        print(f"{name}: step {lines[-1]['step']:,}, {losses}")
    print(f"figure  {printable(args.out)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
