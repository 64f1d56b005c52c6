"""Compile time of the extension, file by file, and the time from the first command in a fresh clone to its first step.

    python bench/compile.py [--instructions avx2|all|...] [--cuda] [--first-step]

Compiles each file separately, one after the other, and reports wall and CPU seconds; then everything as on first use,
on as many processors as MAX_JOBS or the machine allows. --cuda also compiles the CUDA files to object files, for which
it needs nvcc and a torch with CUDA, but no GPU. --first-step clones this checkout into a temporary folder and runs
`train.py --dispersion 0.1` there with empty caches, up to the log line of step 0. Prints a table, then one JSON line.
"""

import os
import sys

# Before other imports: a folder beside this file, such as a corpus named email, must not be imported as a module.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(path for path in sys.path if os.path.realpath(path) != HERE)]

import argparse
import json
import resource
import subprocess
import tempfile
import time
from pathlib import Path

from minidisp import InputError
from minidisp.ops import build
from minidisp.runtime.cli import Parser, exit_code

ROOT = Path(__file__).resolve().parent.parent


def cpu_seconds() -> float:
    """CPU seconds of all child processes so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a command."""
    wall, cpu = time.monotonic(), cpu_seconds()
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise InputError(f"{command[0]} failed: {(result.stdout + result.stderr).strip().splitlines()[-1]}")
    return time.monotonic() - wall, cpu_seconds() - cpu


def first_step(folder: Path) -> float:
    """Seconds from the first command in a fresh clone to its first step, when metrics.jsonl has the first loss."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder / "clone")], check=True)
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
    environment.pop("MINIDISP_CPU", None)
    start = time.monotonic()
    metrics = folder / "run" / "metrics.jsonl"
    command = [sys.executable, "train.py", "--dispersion", "0.1", "--out", str(metrics.parent)]
    with subprocess.Popen(
        command, cwd=folder / "clone", env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        while child.poll() is None:
            if metrics.exists() and b'"loss"' in metrics.read_bytes():
                seconds = time.monotonic() - start
                child.terminate()
                return seconds
            time.sleep(0.02)
    raise InputError("the run in the clone ended before its first step")


def main(argv: list[str] | None = None) -> None:
    parser = Parser("bench/compile.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--instructions",
        choices=["all", *build.INSTRUCTION_SETS],
        default=build.wanted_instruction_set(),
        help="instruction set to compile for (default: the one that first use compiles for here)",
    )
    parser.add_argument("--cuda", action="store_true", help="also compile the CUDA files, to object files")
    parser.add_argument("--first-step", action="store_true", help="time the first command of a fresh clone")
    args = parser.parse_args(argv)
    if missing := build.missing_tool():
        raise InputError(missing)

    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{'file':28s} {'wall, s':>8s} {'CPU, s':>8s}")
        for unit in build.units(args.cuda, args.instructions):
            key = f"{unit.source.parent.name}/{unit.source.name}"
            rows[key] = timed([*unit.command, "-o", str(folder / "unit.o")])
            print(f"{key:28s} {rows[key][0]:8.1f} {rows[key][1]:8.1f}", flush=True)
        wall, cpu = time.monotonic(), cpu_seconds()
        if failure := build.compile_into(folder / build.BINARY, False, args.instructions):
            raise InputError(failure.log.decode(errors="replace").strip().splitlines()[-1])
        rows["as on first use"] = time.monotonic() - wall, cpu_seconds() - cpu
        print(
            f"{'as on first use':28s} {rows['as on first use'][0]:8.1f} {rows['as on first use'][1]:8.1f}", flush=True
        )
        if args.first_step:
            rows["first command to first step"] = first_step(folder), None
            print(f"{'first command to first step':28s} {rows['first command to first step'][0]:8.1f}")
    print(json.dumps({"instructions": args.instructions, "jobs": build.jobs(), "seconds": rows}))


if __name__ == "__main__":
    sys.exit(exit_code("bench/compile.py", main))
