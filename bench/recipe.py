"""The speed run: how soon do we reach nanoGPT's final loss? Times whole commands, interleaved on one core.

    python data/prepare.py shakespeare --tokenizer byte --out data/shakespeare-bytes
    python bench/recipe.py --against ../nanoGPT --data data/shakespeare-bytes [--seeds 3] [--records 2 3] [--log FILE]

Runs nanoGPT's train.py with the command that its README gives for a CPU (4 layers x 128, context 64, batch 12, 2000
steps), on the same bytes; then ours, on the same core, with the flags in RECORDS. docs/speedrun.md has the rules and
the results. Times are wall-clock times of the whole command: imports, evaluations at the first and the last step,
checkpoint and, for ours, table and figures. Losses are those of the last checkpoint's weights over every window of the
validation split, computed by the same function for both, in nats per byte.

--log: results are appended to this file, and those already in it are not run again, so that a series can be
interrupted, and several corpora can be tested together.
"""

import os
import sys

# Before other imports: a folder beside this file, such as a corpus named email, must not be imported as a module.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(path for path in sys.path if os.path.realpath(path) != HERE)]

import argparse
import json
import pickle
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

import minidisp
from minidisp import GPT, GPTConfig
from minidisp.comparison import paired_p
from minidisp.config import command_line
from minidisp.data import Dataset, Split, eval_windows

ROOT = Path(__file__).resolve().parent.parent
MODEL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}
BATCH_SIZE = 12
PEER_STEPS = 2000
PEER_FLAGS = {
    **MODEL,
    "batch_size": BATCH_SIZE,
    "max_iters": PEER_STEPS,
    "lr_decay_iters": PEER_STEPS,
    "dropout": 0.0,
    "device": "cpu",
    "compile": False,
    "eval_iters": 20,
    "eval_interval": PEER_STEPS,
    "always_save_checkpoint": True,
}
# nanoGPT's seed is hard-coded.
SEEDED = (
    "import runpy, sys, torch; f = torch.manual_seed; torch.manual_seed = lambda _: f({seed}); "
    "runpy.run_path('train.py', run_name='__main__')"
)
PEER = 0  # nanoGPT's number among the records


class Record(NamedTuple):
    """A command that reached nanoGPT's loss, as flags of train.py by their names in Config."""

    change: str
    flags: dict


# Today's Muon orthogonalises every head separately, which it did not when records 1 to 3 were set: their losses are
# lower now.
FAST = {"recipe": "fast"}
BEFORE = {**FAST, "schedule": "wsd", "warmup_steps": 40, "tied": True, "embedding_lr": 1.0, "momentum": 0.95}
RECORDS = {
    1: Record("the previous fast recipe, with as few steps as necessary", {**BEFORE, "max_steps": 400}),
    2: Record(
        "linear schedule, untied embeddings at five times the learning rate, momentum 0.9", {**FAST, "max_steps": 290}
    ),
    3: Record("bfloat16", {**FAST, "max_steps": 290, "dtype": "bfloat16"}),
    4: Record(
        "every head of queries, keys and values orthogonalised separately, learning rate 8e-3",
        {**FAST, "max_steps": 230, "lr": 8e-3, "dtype": "bfloat16"},
    ),
}


class Result(NamedTuple):
    """The result of a command, a line of --log."""

    corpus: str
    seed: int
    record: int  # or PEER
    steps: int
    loss: float  # nats per byte
    seconds: float
    parameters: int


def lay_out_peer(checkout: Path, folder: Path, dataset: Dataset) -> None:
    """A working folder for nanoGPT's train.py: its code, and our tokens in its format."""
    for name in ("train.py", "model.py", "configurator.py", "config"):
        if not (checkout / name).exists():
            raise SystemExit(f"bench/recipe.py: --against {checkout} has no {name}: pass a nanoGPT checkout")
        (folder / name).symlink_to((checkout / name).resolve())
    text = folder / "data" / "text"
    text.mkdir(parents=True)
    for name in ("train", "val"):
        split = dataset.split(name)
        split.slice(0, split.tokens).astype("uint16").tofile(text / f"{name}.bin")
    (text / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": dataset.tokenizer.vocab_size}))


def train_peer(checkout: Path, folder: Path, dataset: Dataset, seed: int) -> tuple[GPT, float]:
    lay_out_peer(checkout, folder, dataset)
    flags = [f"--{name}={value}" for name, value in {**PEER_FLAGS, "dataset": "text", "out_dir": "out"}.items()]
    seconds = run([sys.executable, "-c", SEEDED.format(seed=seed), "config/train_shakespeare_char.py", *flags], folder)
    saved = torch.load(folder / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    known = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
    model = GPT(GPTConfig(**{name: saved["model_args"][name] for name in known}))
    model.load_state_dict({name.removeprefix("transformer."): weight for name, weight in saved["model"].items()})
    return model, seconds


def train_ours(folder: Path, data: Path, seed: int, flags: dict) -> tuple[GPT, float]:
    fixed = {**MODEL, "batch_size": BATCH_SIZE, "eval_every": flags["max_steps"], "device": "cpu"}
    flags = {**fixed, **flags, "seed": seed, "data": data, "out": folder / "run"}
    seconds = run([sys.executable, str(ROOT / "train.py"), "--overwrite", *command_line(flags)], folder)
    return minidisp.load(folder / "run" / "ckpt_last.pt")[0], seconds


def run(command: list[str], folder: Path) -> float:
    """Run a command; returns its wall-clock time in seconds."""
    start = time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench/recipe.py: {' '.join(command[:2])} failed:\n{done.stdout[-500:]}{done.stderr[-1500:]}")
    return time.monotonic() - start


@torch.no_grad()
def validation_loss(model: GPT, split: Split) -> float:
    model.eval()
    x, y = (torch.from_numpy(tokens) for tokens in eval_windows(split, model.config.block_size, 0))
    nats = (model(*part).loss.item() * part[1].numel() for part in zip(x.split(64), y.split(64), strict=True))
    return sum(nats) / y.numel()


def measure(args: argparse.Namespace, data: Path, dataset: Dataset, seed: int, record: int) -> Result:
    with tempfile.TemporaryDirectory() as temporary:
        folder, flags = Path(temporary), {**RECORDS[record].flags} if record else {"max_steps": PEER_STEPS}
        if record and args.steps:
            flags["max_steps"] = args.steps
        if record and args.dtype:
            flags["dtype"] = args.dtype
        if record:
            model, seconds = train_ours(folder, data, seed, flags)
        else:
            model, seconds = train_peer(Path(args.against), folder, dataset, seed)
    loss, size = validation_loss(model, dataset.split("val")), model.num_params()
    return Result(dataset.meta["name"], seed, record, flags["max_steps"], loss, seconds, size)


def one_sided_p(first: list[float], second: list[float]) -> float:
    """p of Student's paired test that the mean of second is not below that of first."""
    p = paired_p(first, second)
    return p / 2 if sum(second) <= sum(first) else 1 - p / 2


def show(results: dict[tuple[str, int, int], Result], corpus: str, record: int) -> None:
    """Print a record's table for a corpus, and its tests, which are over all corpora."""
    ours = [result for result in results.values() if result.record == record]
    pairs = [(results[peer], result) for result in ours if (peer := (result.corpus, result.seed, PEER)) in results]
    here = [(peer, result) for peer, result in pairs if peer.corpus == corpus]
    if not here:
        return
    print(f"\nrecord {record}: {RECORDS[record].change}\n")
    print("| seed | nanoGPT: loss | seconds | ours: loss | seconds | of nanoGPT's time |")
    print("|---|---|---|---|---|---|")
    for peer, own in here:
        share = own.seconds / peer.seconds
        print(
            f"| {own.seed} | {peer.loss:.4f} | {peer.seconds:.0f} | {own.loss:.4f} | {own.seconds:.0f} | {share:.2f} |"
        )
    peer, own = here[-1]
    print(f"\nnanoGPT {peer.steps} steps, {peer.parameters:,} parameters; ", end="")
    print(f"ours {own.steps} steps, {own.parameters:,} parameters.")
    reached = sum(own.loss <= peer.loss for peer, own in here)
    share = statistics.median(own.seconds / peer.seconds for peer, own in here)
    print(f"{reached} of {len(here)} seeds reach nanoGPT's loss, in {share:.2f} of its time (median)")
    if len(pairs) > 1:
        p = one_sided_p([peer.loss for peer, _ in pairs], [own.loss for _, own in pairs])
        print(f"loss below nanoGPT's: p = {p:.1e} ({len(pairs)} pairs by seed and corpus, one-sided paired t test)")
    before = [(old, own) for own in ours if (old := results.get((own.corpus, own.seed, record - 1))) and record > 1]
    if len(before) > 1:
        p = one_sided_p([old.seconds for old, _ in before], [own.seconds for _, own in before])
        print(f"faster than record {record - 1}: p = {p:.1e} ({len(before)} pairs, the same test)")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench/recipe.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", metavar="DIR", required=True, help="a nanoGPT checkout")
    parser.add_argument("--data", metavar="DIR", required=True, help="a corpus prepared with --tokenizer byte")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--records", type=int, nargs="+", choices=tuple(RECORDS), default=[max(RECORDS)])
    parser.add_argument("--steps", type=int, help="our number of steps, instead of the record's")
    words = "our dtype, instead of the record's; float32 is faster on CPUs without bfloat16 instructions"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=words)
    parser.add_argument("--log", metavar="FILE", help="a file of results to continue")
    args = parser.parse_args()
    data = Path(args.data).resolve()
    dataset = Dataset(data)
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)

    corpus, log = dataset.meta["name"], args.log and Path(args.log)
    known = [Result(**json.loads(line)) for line in log.read_text().splitlines()] if log and log.exists() else []
    steps = {PEER: PEER_STEPS, **{n: args.steps or record.flags["max_steps"] for n, record in RECORDS.items()}}
    known = [result for result in known if result.steps == steps[result.record]]
    results = {(result.corpus, result.seed, result.record): result for result in known}
    print(f"{corpus}: {dataset.split('train').tokens:,} bytes to train on; torch {torch.__version__}, one core")
    for seed in range(args.seeds):
        for record in (PEER, *args.records):
            if (corpus, seed, record) not in results:
                result = results[corpus, seed, record] = measure(args, data, dataset, seed, record)
                print(f"seed {seed}, record {record}: {result.loss:.4f} in {result.seconds:.1f} s", file=sys.stderr)
                if log:
                    with open(log, "a", encoding="utf-8") as file:
                        file.write(json.dumps(result._asdict()) + "\n")
    for record in args.records:
        show(results, corpus, record)


if __name__ == "__main__":
    main()
