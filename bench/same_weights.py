"""Does a code change leave trained weights unchanged? Trains small runs with two checkouts and compares them bit for
bit.

    git worktree add --detach ../before HEAD~1 && python bench/same_weights.py ../before

Every run is short, on one CPU thread, and covers one path through the trainer: plain, each dispersion variant, a token
subset, gradient accumulation, Muon, the fast recipe, dropout, noise, forgetting, distillation, resuming. Exit code 1 if
any weight differs.
"""

import os
import sys

# Before other imports: a folder beside this file, such as a corpus named email, must not be imported as a module.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(path for path in sys.path if os.path.realpath(path) != HERE)]

import argparse
import subprocess
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
MODEL = "--recipe gpt2 --n-layer 3 --n-head 2 --n-embd 32 --block-size 64 --batch-size 4".split()  # noqa: SIM905
STEPS = "--max-steps 12 --warmup-steps 3 --eval-every 6 --eval-tokens 1024 --device cpu --threads 1".split()  # noqa: SIM905
DISPERSED = ["--dispersion", "0.1"]
RUNS: dict[str, list[str]] = {
    "plain": [],
    "dispersion": DISPERSED,
    **{
        name: [*DISPERSED, "--dispersion-variant", name]
        for name in ("orthogonalization", "l2_repel", "decorrelation", "perplexity_entropy", "mean_cosine")
    },
    "streamed": [*DISPERSED, "--dispersion-impl", "streamed"],
    "tokens": [*DISPERSED, "--dispersion-tokens", "16", "--dispersion-layers", "late_half"],
    "accumulation": [*DISPERSED, "--grad-accum", "3"],
    "muon": ["--optimizer", "muon"],
    "fast": ["--recipe", "fast", *DISPERSED],
    "qwen3": ["--arch", "qwen3", "--n-kv-head", "1", "--schedule", "wsd"],
    "dropout": ["--dropout", "0.1"],
    "noise": ["--noisy-embedding", "5"],
    "forgetting": ["--active-forgetting", "4"],
    "distillation": ["--distill", "plain"],
    "bfloat16": ["--dtype", "bfloat16", *DISPERSED],
    "resumed": [*DISPERSED, "--dropout", "0.1", "--save-every", "5"],
}


def train(checkout: Path, data: Path, folder: Path) -> None:
    """Train all runs with the code of a checkout; a run that depends on another one comes after it."""
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONIOENCODING": "utf-8"}

    def run(name: str, *flags: str) -> None:
        command = [sys.executable, "train.py", *flags, "--out", str(folder / name)]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}, with the code in {checkout}: {done.stderr or done.stdout}")

    for name, flags in RUNS.items():
        pairs = zip(["", *flags], flags, strict=False)
        flags = [str(folder / flag) if before == "--distill" else flag for before, flag in pairs]
        everything = ["--data", str(data), *MODEL, *STEPS, *flags]
        if name == "resumed":
            run(name, *everything, "--schedule", "constant", "--max-steps", "7")
            run(name, "--resume", "--max-steps", "12")
        else:
            run(name, *everything)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "ckpt_last.pt", weights_only=True)["model"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench/same_weights.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="a checkout of the code to compare with")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "pystdlib", help="a prepared corpus")
    parser.add_argument("--keep", type=Path, help="keep the other checkout's runs in this folder, and reuse them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        before, after = args.keep or Path(folder, "before"), Path(folder, "after")
        if not before.exists():
            train(args.before, args.data.resolve(), before)
        train(ROOT, args.data.resolve(), after)
        differing = 0
        for name in RUNS:
            a, b = weights(before / name), weights(after / name)
            same = a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
            differing += not same
            print(f"{name:20s} {'the same, bit for bit' if same else 'DIFFERENT'}")
    print(f"{len(RUNS)} configurations, {differing} of them different")
    sys.exit(min(differing, 1))


if __name__ == "__main__":
    main()
