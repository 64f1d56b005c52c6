"""Evaluate runs: perplexity, condensation and samples of one, or of several side by side on the same held-out text.

    python eval.py runs/NAME
    python eval.py runs/BASELINE runs/OTHER --split test --json results.json
    python eval.py runs/BASELINE runs/OTHER --html report.html --figures figures
    python eval.py runs/NAME --sample "def main("
    python eval.py --hf FOLDER --data NAME

Every token of the split is predicted exactly once, from as much text before it as fits: windows are as long as the model's
context, and each one advances by --stride tokens. The first token of the split follows an end-of-document token.
Exit codes: 0 done; 2 bad usage or input.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from minidisp import InputError, hf, report
from minidisp.config import Config, to_dict
from minidisp.data import Dataset, strided_windows
from minidisp.metrics import FullCondensation, bits_per_byte, paired_bootstrap, perplexity, word_perplexity
from minidisp.model import GPT
from minidisp.runtime import checkpoint
from minidisp.runtime.cli import Parser, exit_code
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


class Subject(NamedTuple):
    """What is evaluated: a model, and what is known of its training."""

    name: str
    model: GPT  # in eval mode, on the device
    tokenizer: object
    config: dict | None  # settings of its training
    metrics: list[dict]  # lines of its metrics.jsonl, none if there is no such file


class Result(NamedTuple):
    scores: dict  # what goes into the JSON file
    block_nats: np.ndarray  # nats per block of BLOCK_BYTES of text, to compare runs with
    token_nats: np.ndarray  # nats per token


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
    """FullCondensation of up to 100 evenly spaced sequences of 512 tokens, or of the model's context if it is shorter."""
    T = min(SEQUENCE_TOKENS, model.config.block_size, len(tokens))
    n = min(SEQUENCES, len(tokens) // T)
    starts = np.linspace(0, len(tokens) - T, n).astype(np.int64)
    collected = FullCondensation()
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
        "tokenizer": vocabulary.hash,
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
    return Result(scores, block_nats, nats)


def compare(results: list[Result]) -> list[str]:
    """What the text says about every run against the first, in a line each; the numbers go into the scores, too.

    versus_first: difference in bits per byte, low and high end of its 95 % interval, verdict; and where the tokens are the
    same ones, the difference in nats per token and the share of tokens that the run predicts better (ties count half).
    """
    first, lines = results[0], []
    n_bytes = np.full(len(first.block_nats), BLOCK_BYTES)
    n_bytes[-1] = first.scores["bytes"] - BLOCK_BYTES * (len(n_bytes) - 1)
    for other in results[1:]:
        difference, low, high = paired_bootstrap(first.block_nats, other.block_nats, n_bytes)
        verdict = "better" if high < 0 else "worse" if low > 0 else "no difference"
        if math.isnan(low):
            verdict = "too little text to tell"
        versus = {"bits_per_byte": difference, "low": low, "high": high, "verdict": verdict}
        remarks = []
        if verdict in ("better", "worse"):
            share = difference / first.scores["bits_per_byte"]
            remarks.append(f"{abs(share):.1%} {'fewer' if share < 0 else 'more'} bits")
        if other.scores["tokenizer"] == first.scores["tokenizer"]:
            per_token = other.token_nats - first.token_nats
            versus["nats_per_token"] = float(per_token.mean())
            versus["tokens_better"] = float((per_token < 0).mean() + (per_token == 0).mean() / 2)
            remarks.append(f"{versus['tokens_better']:.0%} of the tokens predicted better")
        lines.append(
            f"{other.scores['name']} against {first.scores['name']}: {difference:+.5f} bits/byte, 95 % interval {low:+.5f} to "
            f"{high:+.5f}: {verdict}" + (" that this text can show" if verdict == "no difference" else "")
            + (f" ({', '.join(remarks)})" if remarks else "")
        )  # fmt: skip
        other.scores["versus_first"] = versus
    return lines


def run_names(runs: list[str]) -> list[str]:
    """Names as short as they can be told apart: the last part of the path, or more of them."""
    paths = [Path(run).resolve() for run in runs]
    parts = 1
    while len({path.parts[-parts:] for path in paths}) < len(set(paths)):
        parts += 1
    return ["/".join(path.parts[-parts:]) for path in paths]


def load_subjects(runs: list[str], folders: list[str], block_size: int, device: torch.device) -> list[Subject]:
    """Run folders or checkpoint files, and Hugging Face models behind them, as evaluation needs them.

    block_size: the context of the Hugging Face models in tokens, 0 = their own.
    """
    subjects, names = [], run_names([*runs, *folders])
    for run, name in zip(runs, names, strict=False):
        model, vocabulary, config = checkpoint.load_run(run, device)
        metrics = checkpoint.find(run).parent / "metrics.jsonl"
        lines = report.read_metrics(metrics) if metrics.is_file() else []
        subjects.append(Subject(name, model, vocabulary, _recipe(config), lines))
    for folder, name in zip(folders, names[len(runs) :], strict=True):
        subjects.append(Subject(name, *hf.load(folder, device, block_size), None, []))
    return subjects


def _recipe(config: Config) -> dict:
    """The settings that make a run what it is."""
    return {key: value for key, value in to_dict(config).items() if key not in ("out", "resume", "overwrite")}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="run folder (its best checkpoint is taken), or checkpoint file"
    )
    parser.add_argument("--hf", action="append", default=[], metavar="DIR", help="a GPT-2 or Qwen3 model: its Hugging Face folder, or "
                        "owner/name on the hub, with its own tokenizer; may be repeated")  # fmt: skip
    parser.add_argument(
        "--block-size", type=int, default=0, metavar="N", help="context of the --hf models in tokens; 0 = their own"
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
    parser.add_argument("--layers", action="store_true", help="print the further metrics layer by layer, too")
    parser.add_argument(
        "--figures",
        metavar="DIR",
        help="draw heat maps, cosine by layer and loss by step into this folder, as PNG and PDF",
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="write everything, with the course of the training, as one page that opens offline",
    )
    parser.add_argument(
        "--sample", metavar="TEXT", help="let every run continue this text by 200 tokens (temperature 0.8)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default auto")
    args = parser.parse_args(argv)
    if args.tokens < 0 or args.stride < 0 or args.block_size < 0:
        raise InputError("--tokens, --stride and --block-size must be 0 or more")
    if not args.runs and not (args.hf and args.data):
        raise InputError("give a RUN, or --hf DIR with --data NAME (python eval.py --help lists the flags)")
    return args


def main(argv: list[str] | None = None) -> list[dict]:
    """Evaluate what the command line names; prints tables and returns the list of scores that --json writes."""
    args = parse(argv)
    device = pick_device(args.device)
    subjects = load_subjects(args.runs, args.hf, args.block_size, device)
    corpus = Dataset(find_corpus(args.data or subjects[0].config["data"]))
    text = Text.read(corpus, args.split, args.tokens)
    results = [evaluate(s.name, s.model, s.tokenizer, text, args.stride, device) for s in subjects]
    comparison = compare(results)
    scores = [result.scores for result in results]
    names = [subject.name for subject in subjects]
    tables = [report.score_table(scores), report.condensation_table(scores), report.further_table(scores)]
    settings = report.settings_table(names, [subject.config for subject in subjects])
    if settings.rows:
        tables.insert(0, settings)
    layers = [report.layer_table(s) for s in scores]
    print(*tables, *(layers if args.layers else ()), sep="\n\n")
    if comparison:
        print("", *comparison, sep="\n")
    if args.sample is not None:
        for subject in subjects:
            prompt = torch.tensor([[subject.tokenizer.eos_id, *subject.tokenizer.encode(args.sample)]], device=device)
            out = subject.model.generate(prompt, 200, temperature=0.8, seed=0, stop_token=subject.tokenizer.eos_id)
            print(f"\n--- {subject.name}\n{subject.tokenizer.decode(out[0].tolist())}")
    if args.json:
        checkpoint.write_json(Path(args.json), scores)
    metrics = [subject.metrics for subject in subjects]
    if args.figures:
        for path in report.draw_comparison(scores, metrics, Path(args.figures)):
            print(f"figure  {path}")
    if args.html:
        measured_on = (
            f"{corpus.meta['name']}, {args.split} split: {scores[0]['bytes']:,} bytes, {scores[0]['words']:,} words"
        )
        layers.append(report.settings_table(names, [subject.config for subject in subjects], differing=False))
        page = report.html_page(measured_on, comparison, tables, layers, scores, metrics)
        checkpoint.write_atomic(Path(args.html), lambda file: file.write(page.encode()))
        print(f"page    {args.html}")
    return scores


def cli(argv: list[str] | None = None) -> int:
    return exit_code("eval.py", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(cli())
