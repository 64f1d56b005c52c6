"""Does --recipe fast reach nanoGPT's final loss in half of its time? Both are trained as commands, in turn, on one core.

    python data/prepare.py shakespeare --tokenizer byte --out data/shakespeare-bytes
    python bench/recipe.py --against ../nanoGPT --data data/shakespeare-bytes [--seeds 3] [--steps 560]

nanoGPT's own train.py runs with the command that its README gives for a CPU (4 layers x 128, context 64, batch 12, 2000
steps), on the same bytes; then ours, on the same core, with the recipe and fewer steps. A time is that of the whole command by the
clock: imports, evaluations at the first and the last step, checkpoint and, for ours, table and figures. A loss is that of
the weights in the last checkpoint, over every window of the validation split, by one and the same function, in nats per byte.
"""

import argparse
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import minidisp  # noqa: E402
from minidisp import GPT, GPTConfig  # noqa: E402
from minidisp.data import Dataset, Split, eval_windows  # noqa: E402

MODEL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}
BATCH_SIZE = 12
PEER_STEPS = 2000
PEER_FLAGS = {**MODEL, "batch_size": BATCH_SIZE, "max_iters": PEER_STEPS, "lr_decay_iters": PEER_STEPS, "dropout": 0.0,
              "device": "cpu", "compile": False, "eval_iters": 20, "eval_interval": PEER_STEPS, "always_save_checkpoint": True}  # fmt: skip
# Its seed is a number in the code.
SEEDED = "import runpy, sys, torch; f = torch.manual_seed; torch.manual_seed = lambda _: f({seed}); runpy.run_path('train.py', run_name='__main__')"


def lay_out_peer(checkout: Path, folder: Path, dataset: Dataset) -> None:
    """A working folder for nanoGPT's train.py: its code, and our tokens in its format."""
    for name in ("train.py", "model.py", "configurator.py", "config"):
        if not (checkout / name).exists():
            raise SystemExit(f"bench/recipe.py: --against {checkout}: there is no {name}; name a nanoGPT checkout")
        (folder / name).symlink_to((checkout / name).resolve())
    text = folder / "data" / "text"
    text.mkdir(parents=True)
    for name in ("train", "val"):
        split = dataset.split(name)
        split.slice(0, split.tokens).astype("uint16").tofile(text / f"{name}.bin")
    (text / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": dataset.tokenizer.vocab_size}))


def train_peer(folder: Path, seed: int) -> tuple[GPT, float]:
    flags = [f"--{name}={value}" for name, value in {**PEER_FLAGS, "dataset": "text", "out_dir": "out"}.items()]
    seconds = run([sys.executable, "-c", SEEDED.format(seed=seed), "config/train_shakespeare_char.py", *flags], folder)
    saved = torch.load(folder / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    known = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
    model = GPT(GPTConfig(**{name: saved["model_args"][name] for name in known}))
    model.load_state_dict({name.removeprefix("transformer."): weight for name, weight in saved["model"].items()})
    return model, seconds


def train_ours(folder: Path, data: Path, seed: int, steps: int) -> tuple[GPT, float]:
    flags = {**MODEL, "batch_size": BATCH_SIZE, "recipe": "fast", "seed": seed, "max_steps": steps, "eval_every": steps,
             "data": data, "out": folder / "run", "device": "cpu"}  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    seconds = run([sys.executable, str(ROOT / "train.py"), "--overwrite", *words], folder)
    return minidisp.load(folder / "run" / "ckpt_last.pt")[0], seconds


def run(command: list[str], folder: Path) -> float:
    """Seconds that the command took."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="DIR", required=True, help="a nanoGPT checkout")
    parser.add_argument("--data", metavar="DIR", required=True, help="a corpus prepared with --tokenizer byte")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=560, help="of ours")
    args = parser.parse_args()
    data = Path(args.data).resolve()
    dataset = Dataset(data)
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)

    print(
        f"{dataset.meta['name']}: {dataset.split('train').tokens:,} bytes to train on; torch {torch.__version__}, one core\n"
    )
    print("| seed | nanoGPT: loss | seconds | fast: loss | seconds | of nanoGPT's time |")
    print("|---|---|---|---|---|---|", flush=True)
    shares, reached = [], 0
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            lay_out_peer(Path(args.against), folder, dataset)
            peer, peer_seconds = train_peer(folder, seed)
            ours, seconds = train_ours(folder, data, seed, args.steps)
        peer_loss, loss = (validation_loss(model, dataset.split("val")) for model in (peer, ours))
        shares.append(seconds / peer_seconds)
        reached += loss <= peer_loss
        print(
            f"| {seed} | {peer_loss:.4f} | {peer_seconds:.0f} | {loss:.4f} | {seconds:.0f} | {shares[-1]:.2f} |",
            flush=True,
        )
    sizes = [f"{sum(p.numel() for p in model.parameters()):,}" for model in (peer, ours)]
    print(f"\nnanoGPT {PEER_STEPS} steps, {sizes[0]} parameters; fast {args.steps} steps, {sizes[1]} parameters.")
    print(
        f"{reached} of {args.seeds} seeds reach nanoGPT's loss, in {statistics.median(shares):.2f} of its time (median)"
    )


if __name__ == "__main__":
    main()
