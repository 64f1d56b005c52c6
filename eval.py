"""Evaluate runs: perplexity, condensation and samples of one, or of several side by side on the same held-out text.

    python eval.py runs/NAME
    python eval.py runs/BASELINE runs/OTHER --split test --json results.json
    python eval.py runs/NAME --sample "def main("

Every token of the split is predicted exactly once, from as much text before it as fits: windows are as long as the model's
context, and each one advances by --stride tokens. The first token of the split follows an end-of-document token.
Exit codes: 0 done; 2 bad usage or input.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from minidisp import InputError, checkpoint, report
from minidisp.config import Parser
from minidisp.data import Dataset, strided_windows
from minidisp.metrics import Condensation, bits_per_byte, paired_bootstrap, perplexity, word_perplexity
from minidisp.model import GPT
from train import find_corpus, pick_device

SEQUENCES, SEQUENCE_TOKENS = 100, 512  # the paper's condensation protocol
BLOCK_BYTES = 1024  # what the bootstrap resamples
BATCH_TOKENS = 4096  # per forward pass


class Text(NamedTuple):
    """Held-out text that all models are measured on."""

    documents: list[str]
    ends: bool  # the last document is complete, and so followed by EOS
    tokens: np.ndarray  # the corpus's own tokens, (N,) int64
    tokenizer: object

    @classmethod
    def read(cls, dataset: Dataset, split: str, limit: int) -> "Text":
        """The first `limit` tokens of a split (0 = all), less a last character that this would cut in two."""
        source, vocabulary = dataset.split(split), dataset.tokenizer
        tokens = source.slice(0, min(limit, source.tokens) if limit else source.tokens)
        while len(tokens) and not _whole(b"".join(vocabulary.token_bytes[token] for token in tokens[-4:])):
            tokens = tokens[:-1]
        ends = np.flatnonzero(tokens == vocabulary.eos_id)
        pieces = np.split(tokens, ends + 1)
        documents = [vocabulary.decode(piece.tolist()) for piece in pieces if len(piece)]
        return cls(documents, len(ends) > 0 and ends[-1] == len(tokens) - 1, tokens, vocabulary)

    def encode(self, vocabulary) -> np.ndarray:
        """The text in the tokens of another tokenizer, (M,) int64; every document ends with its EOS."""
        if vocabulary.hash == self.tokenizer.hash:
            return self.tokens
        encoded: list[int] = []
        for document in self.documents:
            encoded += [*vocabulary.encode(document), vocabulary.eos_id]
        return np.array(encoded if self.ends else encoded[:-1], dtype=np.int64)


def _whole(tail: bytes) -> bool:
    """Whether the end of these bytes is the end of a UTF-8 character; they may begin inside one."""
    try:
        tail.lstrip(bytes(range(0x80, 0xC0))).decode()
    except UnicodeDecodeError as error:
        return error.reason != "unexpected end of data"
    return True


class Result(NamedTuple):
    scores: dict  # what goes into the JSON file
    block_nats: np.ndarray  # nats per block of BLOCK_BYTES of text, to compare runs with


@torch.no_grad()
def token_nats(model: GPT, tokens: np.ndarray, eos_id: int, stride: int, device: torch.device) -> np.ndarray:
    """-log p of every token given the text before it, (N,) float64."""
    stream = np.concatenate(([eos_id], tokens))
    nats = np.full(len(tokens), np.nan)
    windows = list(strided_windows(len(tokens), model.config.block_size, stride))
    batch_size = max(1, BATCH_TOKENS // model.config.block_size)
    progress = tqdm(total=len(tokens), unit="token", unit_scale=True, leave=False, disable=None)
    while windows:
        # Windows of one batch have one length; only the first ones and the last one differ.
        length = windows[0].stop - windows[0].context_start
        batch = [w for w in windows[:batch_size] if w.stop - w.context_start == length]
        windows = windows[len(batch) :]
        rows = np.stack([stream[w.context_start : w.stop + 1] for w in batch])
        x, y = torch.from_numpy(rows[:, :-1]).to(device), torch.from_numpy(rows[:, 1:]).to(device)
        loss = model(x, y, loss_reduction="none").loss.double().cpu().numpy()
        for w, row in zip(batch, loss, strict=True):
            nats[w.start : w.stop] = row[w.start - w.context_start :]
            progress.update(w.stop - w.start)
    progress.close()
    return nats


@torch.no_grad()
def condensation(model: GPT, tokens: np.ndarray, device: torch.device) -> dict:
    """The paper's protocol on up to 100 evenly spaced sequences of 512 tokens, or of the model's context if it is shorter."""
    T = min(SEQUENCE_TOKENS, model.config.block_size, len(tokens))
    n = min(SEQUENCES, len(tokens) // T)
    starts = np.linspace(0, len(tokens) - T, n).astype(np.int64)
    collected = Condensation()
    batch_size = max(1, BATCH_TOKENS // T)
    for i in range(0, n, batch_size):
        x = torch.from_numpy(np.stack([tokens[s : s + T] for s in starts[i : i + batch_size]])).to(device)
        collected.update(model(x, return_hidden_states=True).hidden_states)
    return collected.result()


def evaluate(name: str, model: GPT, vocabulary, text: Text, stride: int, device: torch.device) -> Result:
    """All scores of one model on the text. The model is in eval mode and on the device."""
    tokens = text.encode(vocabulary)
    if len(tokens) < 2:
        raise InputError(
            f"{len(tokens)} tokens are too few to evaluate {name} on: give more --tokens, or another --data or --split"
        )
    stride = stride or max(1, model.config.block_size // 2)
    nats = token_nats(model, tokens, vocabulary.eos_id, stride, device)
    # A token belongs to the block of text in which it ends.
    ends = np.cumsum([len(vocabulary.token_bytes[token]) for token in tokens])
    block_nats = np.bincount(np.maximum(ends - 1, 0) // BLOCK_BYTES, weights=nats)
    total, n_bytes, words = float(nats.sum()), int(ends[-1]), sum(len(document.split()) for document in text.documents)
    scores = {
        "name": name,
        "tokens": len(tokens),
        "bytes": n_bytes,
        "words": words,
        "loss": total / len(tokens),
        "perplexity": perplexity(total, len(tokens)),
        "bits_per_byte": bits_per_byte(total, n_bytes),
        "word_perplexity": word_perplexity(total, words),
        "parameters": model.num_params(),
        "block_size": model.config.block_size,
        "condensation": condensation(model, tokens, device),
    }
    return Result(scores, block_nats)


def compare(results: list[Result]) -> str:
    """Difference of every run to the first in bits per byte, with a 95 % interval, as a sentence each."""
    first, lines = results[0], []
    n_bytes = np.full(len(first.block_nats), BLOCK_BYTES)
    n_bytes[-1] = first.scores["bytes"] - BLOCK_BYTES * (len(n_bytes) - 1)
    for other in results[1:]:
        difference, low, high = paired_bootstrap(first.block_nats, other.block_nats, n_bytes)
        verdict = "better" if high < 0 else "worse" if low > 0 else "no difference that this text can show"
        other.scores["versus_first"] = {"bits_per_byte": difference, "low": low, "high": high}
        lines.append(f"{other.scores['name']} against {first.scores['name']}: {difference:+.5f} bits/byte, "
                     f"95 % interval {low:+.5f} to {high:+.5f}: {verdict}")  # fmt: skip
    return "\n".join(lines)


def score_table(results: list[Result]) -> str:
    """One column per run."""
    scores = [result.scores for result in results]
    rows = [["tokens", *(f"{s['tokens']:,}" for s in scores)]]
    for label, key, digits in (("loss (nats/token)", "loss", 4), ("perplexity", "perplexity", 2), ("bits per byte", "bits_per_byte", 4),
                               ("word perplexity", "word_perplexity", 1)):  # fmt: skip
        rows.append([label, *(report.number(s[key], digits) for s in scores)])
    return report.table(["", *(s["name"] for s in scores)], rows)


def condensation_table(results: list[Result]) -> str:
    """Mean cosine per layer, one column per run, and the scores below."""
    all_scores = [result.scores["condensation"] for result in results]
    n_layer = max(len(s["mean_cosine_by_layer"]) for s in all_scores) - 1
    rows = []
    for layer in range(n_layer + 1):
        values = (s["mean_cosine_by_layer"] for s in all_scores)
        label = "embeddings" if layer == 0 else f"layer {layer}"
        rows.append([label, *(report.number(v[layer] if layer < len(v) else None, 3) for v in values)])
    for label, key in (
        ("last half, mean", "last_half_mean"),
        ("Spearman with depth", "spearman"),
        ("Kendall with depth", "kendall"),
    ):
        rows.append([label, *(report.number(s[key], 3) for s in all_scores)])
    return report.table(["mean cosine", *(result.scores["name"] for result in results)], rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folder (its best checkpoint is taken), or checkpoint file"
    )
    parser.add_argument(
        "--data", default="", metavar="TEXT", help="corpus to evaluate on; default: the first run's own"
    )
    parser.add_argument(
        "--split", choices=("val", "test"), default="val", help="held-out part of the corpus (default val)"
    )
    parser.add_argument(
        "--tokens", type=int, default=0, metavar="N", help="evaluate the first N tokens only; 0 = all (default)"
    )
    parser.add_argument("--stride", type=int, default=0, metavar="N", help="tokens a window advances by, 1 to the model's context; "
                        "smaller is slower and gives every token more context (default: half the context)")  # fmt: skip
    parser.add_argument(
        "--json", metavar="FILE", help="write all scores, condensation per layer included, to this file"
    )
    parser.add_argument("--figures", metavar="DIR", help="draw heatmap.png and cosine_by_layer.png into this folder")
    parser.add_argument(
        "--sample", metavar="TEXT", help="let every run continue this text by 200 tokens (temperature 0.8)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default auto")
    args = parser.parse_args(argv)
    if args.tokens < 0 or args.stride < 0:
        raise InputError("--tokens and --stride must be 0 or more")
    return args


def main(argv: list[str] | None = None) -> list[dict]:
    """Evaluate what the command line names; prints tables and returns the list of scores that --json writes."""
    args = parse(argv)
    device = pick_device(args.device)
    loaded = [checkpoint.load_run(run, device) for run in args.runs]
    text = Text.read(Dataset(find_corpus(args.data or loaded[0][2].data)), args.split, args.tokens)
    results = []
    for run, (model, vocabulary, _) in zip(args.runs, loaded, strict=True):
        results.append(evaluate(Path(run).name, model, vocabulary, text, args.stride, device))
    comparison = compare(results)
    print(score_table(results), condensation_table(results), sep="\n\n")
    measured = results[0].scores["condensation"]
    print(f"\ncondensation over {measured['sequences']} sequences of {measured['tokens_per_sequence']} tokens")
    if comparison:
        print("\n" + comparison)
    if args.sample is not None:
        for run, (model, vocabulary, _) in zip(args.runs, loaded, strict=True):
            prompt = torch.tensor([[vocabulary.eos_id, *vocabulary.encode(args.sample)]], device=device)
            out = model.generate(prompt, 200, temperature=0.8, seed=0, stop_token=vocabulary.eos_id)
            print(f"\n--- {Path(run).name}\n{vocabulary.decode(out[0].tolist())}")
    scores = [result.scores for result in results]
    if args.json:
        checkpoint.write_json(Path(args.json), scores)
    if args.figures:
        for path in report.draw_comparison(scores, Path(args.figures)):
            print(f"figure  {path}")
    return scores


def cli(argv: list[str] | None = None) -> int:
    try:
        main(argv)
    except InputError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"eval.py: {error.filename or 'input/output'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eval.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
