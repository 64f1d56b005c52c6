"""Measuring a model: on held-out text, on minimal pairs, and by how it goes on with a text.

Models are in eval mode and on `device`. Nats are -log p, natural logarithm. What a number means stands in metrics.py.
"""

import glob
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from minidisp import InputError, is_plain, parse_json, printable, read_bytes
from minidisp.comparison import Comparison, Measure, Run, bootstrap_mean, compare, paired_bootstrap
from minidisp.data import Dataset, strided_windows
from minidisp.decoding import PrefixTree
from minidisp.metrics import (
    FullCondensation,
    bits_per_byte,
    distinct_ngrams,
    minimal_pair_values,
    perplexity,
    repeated_ngrams,
    word_perplexity,
)
from minidisp.model import GPT
from minidisp.runtime.device import to_device

SEQUENCES, SEQUENCE_TOKENS = 100, 512  # the paper's condensation protocol
BLOCK_BYTES = 1024  # what the bootstrap resamples
BATCH_TOKENS = 4096  # per forward pass
ROW_TOKENS = 96  # of sentences that share their beginnings: more would share more, and cost more attention
PROMPT_TOKENS, CONTINUATION_TOKENS, TOP_P = 32, 128, 0.95  # of `writing`; the first two as in arXiv 2202.06417
ROWS = 64  # sequences that are generated at a time


def short_names(paths: list[str]) -> list[str]:
    """The shortest names that differ: the last part of each path, or more parts; printable whatever the path's bytes."""
    resolved = [Path(path).resolve() for path in paths]
    parts = 1
    while len({path.parts[-parts:] for path in resolved}) < len(set(resolved)):
        parts += 1
    return [printable("/".join(path.parts[-parts:])) for path in resolved]


# --- held-out text ----------------------------------------------------------------------------------------------------


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
    token_nats: np.ndarray  # nats per token


@torch.no_grad()
def token_nats(model: GPT, tokens: np.ndarray, eos_id: int, stride: int, device: torch.device) -> np.ndarray:
    """-log p of every token given the text before it, (N,) float64."""
    stream = np.concatenate(([eos_id], tokens))
    nats = np.full(len(tokens), np.nan)
    windows = list(strided_windows(len(tokens), model.config.block_size, stride))
    batch_size = max(1, BATCH_TOKENS // model.config.block_size)
    progress = tqdm(total=len(tokens), unit="token", unit_scale=True, leave=False, disable=None)
    batches, losses = [], []
    while windows:
        # Windows of one batch have one length; only the first ones and the last one differ.
        length = windows[0].stop - windows[0].context_start
        batch = [w for w in windows[:batch_size] if w.stop - w.context_start == length]
        windows = windows[len(batch) :]
        rows = to_device(np.stack([stream[w.context_start : w.stop + 1] for w in batch]), device)
        losses.append(model(rows[:, :-1], rows[:, 1:], loss_reduction="none").loss)
        batches.append(batch)
        progress.update(sum(w.stop - w.start for w in batch))
    progress.close()
    for batch, loss in zip(batches, fetched_at_once(losses), strict=True):
        for w, row in zip(batch, loss, strict=True):
            nats[w.start : w.stop] = row[w.start - w.context_start :]
    return nats


def fetched_at_once(tensors: list[torch.Tensor]) -> list[np.ndarray]:
    """The tensors in float64 on the CPU; another device is waited for once."""
    if not tensors:
        return []
    flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu().double()
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape).numpy() for piece, tensor in zip(pieces, tensors, strict=True)]


@torch.no_grad()
def condensation(model: GPT, tokens: np.ndarray, device: torch.device) -> dict:
    """FullCondensation of up to 100 evenly spaced sequences of 512 tokens, or of the model's context if it is
    shorter."""
    T = min(SEQUENCE_TOKENS, model.config.block_size, len(tokens))
    n = min(SEQUENCES, len(tokens) // T)
    starts = np.linspace(0, len(tokens) - T, n).astype(np.int64)
    collected = FullCondensation()
    batch_size = max(1, BATCH_TOKENS // T)
    for i in range(0, n, batch_size):
        x = to_device(np.stack([tokens[s : s + T] for s in starts[i : i + batch_size]]), device)
        collected.update(model(x, return_hidden_states=True).hidden_states)
    return collected.result()


def score_text(name: str, model: GPT, vocabulary, text: Text, stride: int, device: torch.device) -> Result:
    """All scores of one model on the text. stride: tokens that a window advances by, 0 = half the context.

    Raises InputError if the text is too short, or the context, or the stride too long.
    """
    if model.config.block_size < 2:
        raise InputError(
            f"{name} has a context of one token, which has no cosine with another: give --block-size 2 or more"
        )
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
        "condensation": condensation(model, tokens, device),
    }
    return Result(scores, block_nats, nats)


def text_measure(results: list[Result]) -> Measure:
    """Bits per byte of every run, and what two runs differ by on the same text."""
    n_bytes = np.full(len(results[0].block_nats), BLOCK_BYTES)
    n_bytes[-1] = results[0].scores["bytes"] - BLOCK_BYTES * (len(n_bytes) - 1)

    def difference(i: int, j: int) -> tuple[float, float, float]:
        return paired_bootstrap(results[i].block_nats, results[j].block_nats, n_bytes)

    def remark(i: int, j: int) -> str:
        first, other = results[i], results[j]
        share = other.scores["bits_per_byte"] / first.scores["bits_per_byte"] - 1
        remarks = [f"{abs(share):.1%} {'fewer' if share < 0 else 'more'} bits"]
        if tokens := _by_token(first, other):
            remarks.append(f"{tokens['tokens_better']:.0%} of the tokens predicted better")
        return ", ".join(remarks)

    values = [result.scores["bits_per_byte"] for result in results]
    return Measure("bits_per_byte", values, difference, "text", "bits/byte", lower_is_better=True, remark=remark)


def compare_texts(runs: list[Run], results: list[Result]) -> Comparison:
    """Every run against the first; the numbers go into the scores, too.

    versus_first: difference in bits per byte, low and high end of its 95 % interval over the text, verdict; and where the
    tokens are the same, the difference in nats per token and the share of tokens that the run predicts better (ties count
    half).
    """
    found = compare(runs, text_measure(results))
    for other, versus in zip(results[1:], found.versus_first, strict=True):
        broken = not (np.isfinite(other.block_nats).all() and np.isfinite(results[0].block_nats).all())
        versus |= {"verdict": "undefined"} if broken else _by_token(results[0], other)
        other.scores["versus_first"] = versus
    return found


def _by_token(first: Result, other: Result) -> dict[str, float]:
    """The difference in nats per token, and the share of tokens that `other` predicts better; {} for other tokens."""
    if other.scores["tokenizer"] != first.scores["tokenizer"]:
        return {}
    per_token = other.token_nats - first.token_nats
    better = float((per_token < 0).mean() + (per_token == 0).mean() / 2)
    return {"nats_per_token": float(per_token.mean()), "tokens_better": better}


# --- minimal pairs ----------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two sentences that differ in one thing, of which one is right."""

    good: str
    bad: str
    file: str  # name of the file it is from
    term: str | None  # what it is about, and the field of linguistics that this belongs to
    field: str | None


def read_pairs(pattern: str) -> list[Pair]:
    """The minimal pairs of all files that the pattern names, in their order; the form is that of BLiMP (arXiv
    1912.00582).

    A line is a JSON object with sentence_good and sentence_bad, and maybe field, linguistics_term and UID. Raises
    InputError naming file and line of one that is not.
    """
    pattern = os.path.expanduser(pattern)
    if os.path.isfile(pattern):
        files = [pattern]
    elif os.path.isdir(pattern):
        files = sorted(glob.glob(os.path.join(glob.escape(pattern), "*.jsonl")))
    else:
        files = [file for file in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(file)]
    if not files:
        raise InputError(f"--minimal-pairs {pattern}: there is no such file")
    pairs = []
    for file, name in zip(files, short_names(files), strict=True):
        for number, line in enumerate(read_bytes(file).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
            if line.strip():
                pairs.append(_parse_pair(line, f"{file}, line {number},", name.removesuffix(".jsonl")))
    if not pairs:
        raise InputError(f"--minimal-pairs {pattern}: no pair is in {', '.join(files[:3])}")
    return pairs


def _parse_pair(line: bytes, where: str, name: str) -> Pair:
    record = parse_json(line, where)
    if not isinstance(record, dict):
        raise InputError(f"{where} is no minimal pair: it must be an object with sentence_good and sentence_bad")
    for key in ("sentence_good", "sentence_bad", "field", "linguistics_term", "UID"):
        value = record.get(key)
        if value is None and not key.startswith("sentence"):
            continue
        if not isinstance(value, str) or not value.strip() or not is_plain(value):
            raise InputError(f"{where} is no minimal pair: its {key} is missing, or no plain text of one line")
    return Pair(
        record["sentence_good"], record["sentence_bad"], name, record.get("linguistics_term"), record.get("field")
    )


class Forest(NamedTuple):
    """Sentences that begin alike, in one row of the model: what they share is there once."""

    tokens: list[int]
    targets: list[int]  # what is to be predicted behind each token
    parents: list[int]  # see PrefixTree
    depth: list[int]
    sentences: list[tuple[int, list[int]]]  # index of each, and the places of its tokens


def plant(texts: list[list[int]], eos_id: int) -> list[Forest]:
    """Rows of up to ROW_TOKENS tokens, or one longer sentence, that hold all the texts, each of at least one token."""
    rows, last = [], []
    for i in sorted(range(len(texts)), key=texts.__getitem__):  # so that neighbours share most
        ids = texts[i]
        shared = next((n for n, (a, b) in enumerate(zip(ids, last, strict=False)) if a != b), min(len(ids), len(last)))
        if not rows or len(rows[-1].tokens) + len(ids) - shared > ROW_TOKENS:
            rows.append(Forest([], [], [], [], []))
            shared, path = 0, []
        row, new = rows[-1], len(rows[-1].tokens)
        path = [*path[:shared], *range(new, new + len(ids) - shared)]
        row.tokens.extend([eos_id, *ids][shared:-1])
        row.targets.extend(ids[shared:])
        row.parents.extend(path[max(0, depth - 1)] for depth in range(shared, len(ids)))
        row.depth.extend(range(shared, len(ids)))
        row.sentences.append((i, path))
        last = ids
    return rows


@torch.no_grad()
def sentence_nats(model: GPT, vocabulary, sentences: list[str], device: torch.device) -> np.ndarray:
    """-log p of whole sentences, each after EOS as a text begins in training, (N,) float64.

    A sentence that occurs again, or begins like another one, is not computed again. Rows of one length go through the
    model together, so that nothing is padded. A sentence longer than the context is read in windows that overlap by
    half.
    """
    distinct = {sentence: i for i, sentence in enumerate(dict.fromkeys(sentences))}
    texts = vocabulary.encode_batch(list(distinct), threads=torch.get_num_threads())
    block_size, nats = model.config.block_size, np.zeros(len(texts))
    for i, ids in enumerate(texts):
        if len(ids) > block_size:
            nats[i] = token_nats(model, np.array(ids), vocabulary.eos_id, max(1, block_size // 2), device).sum()
    short = [i for i, ids in enumerate(texts) if len(ids) <= block_size]
    by_length = {}
    for row in plant([texts[i] for i in short], vocabulary.eos_id):
        by_length.setdefault(len(row.tokens), []).append(row)
    planted, losses = [], []
    progress = tqdm(total=len(short), unit="sentence", unit_scale=True, leave=False, disable=None)
    for length, rows in by_length.items():
        size = max(1, BATCH_TOKENS // length)
        for batch in (rows[start : start + size] for start in range(0, len(rows), size)):
            fields = np.array([[row[field] for row in batch] for field in range(4)], dtype=np.int64)
            idx, targets, parents, depth = to_device(fields, device)
            losses.append(model(idx, targets, loss_reduction="none", tree=PrefixTree(parents, depth)).loss)
            planted += batch
            progress.update(sum(len(row.sentences) for row in batch))
    progress.close()
    row_losses = [row for loss in fetched_at_once(losses) for row in loss]
    for row, row_loss in zip(planted, row_losses, strict=True):
        for i, path in row.sentences:
            nats[short[i]] = row_loss[path].sum()
    return nats[[distinct[sentence] for sentence in sentences]]


def score_pairs(model: GPT, vocabulary, pairs: list[Pair], device: torch.device) -> np.ndarray:
    """What every pair counts, (N,): see minimal_pair_values."""
    nats = sentence_nats(model, vocabulary, [s for pair in pairs for s in (pair.good, pair.bad)], device)
    return minimal_pair_values(-nats[0::2], -nats[1::2])


def summarise_pairs(pairs: list[Pair], values: list[np.ndarray]) -> list[dict]:
    """Of every model: accuracy and interval over all pairs, and by_field, by_term and by_file of those that have one.

    values: what every pair counts, an array per model. From the second model on, versus_first is the paired difference.
    """

    def summary(which: np.ndarray, model: int) -> dict:
        accuracy, low, high = bootstrap_mean(values[model][which])
        scores = {"pairs": len(which), "accuracy": accuracy, "low": low, "high": high}
        if model:
            difference, low, high = bootstrap_mean(values[model][which] - values[0][which])
            scores["versus_first"] = {"accuracy": difference, "low": low, "high": high}
        return scores

    summaries = [summary(np.arange(len(pairs)), model) for model in range(len(values))]
    for key in ("field", "term", "file"):
        members: dict[str, list[int]] = {}
        for i, pair in enumerate(pairs):
            if (name := getattr(pair, key)) is not None:
                members.setdefault(name, []).append(i)
        for model, scores in enumerate(summaries):
            scores[f"by_{key}"] = {name: summary(np.array(which), model) for name, which in sorted(members.items())}
    return summaries


def compare_pairs(runs: list[Run], values: list[np.ndarray], summaries: list[dict]) -> Comparison:
    """Every run against the first; the verdict goes into the summary, too. values: as for summarise_pairs."""

    def difference(i: int, j: int) -> tuple[float, float, float]:
        return bootstrap_mean(values[j] - values[i])

    accuracy = [summary["accuracy"] for summary in summaries]
    measure = Measure("accuracy", accuracy, difference, "pairs", "% of the minimal pairs", percent=True)
    found = compare(runs, measure)
    for summary, versus in zip(summaries[1:], found.versus_first, strict=True):
        summary["versus_first"]["verdict"] = versus["verdict"]
    return found


# --- how it writes ----------------------------------------------------------------------------------------------------


def choose_texts(text: Text, vocabularies: list, count: int) -> tuple[list[str], str]:
    """`count` held-out documents, evenly spread over those that are long enough for `writing` in every tokenizer.

    Where there are fewer, stretches of the text, side by side. Returns them, and which of the two they are. Raises
    InputError if the text is too short for that.
    """
    least = PROMPT_TOKENS + CONTINUATION_TOKENS
    lengths = np.full(len(text.documents), least)
    for vocabulary in vocabularies:
        tokens = text.encode(vocabulary)
        ends = np.append(np.flatnonzero(tokens == vocabulary.eos_id), len(tokens))[: len(lengths)]
        lengths = np.minimum(lengths, np.diff(ends, prepend=-1) - 1)
    long = np.flatnonzero(lengths >= least)
    if len(long) >= count:
        which = long[np.linspace(0, len(long) - 1, count).round().astype(int)]
        return [text.documents[i] for i in which], "documents"
    joined = "".join(text.documents)
    size = len(joined) // count
    stretches = [joined[i * size : (i + 1) * size] for i in range(count)]
    if any(len(vocabulary.encode(stretch)) < least for vocabulary in vocabularies for stretch in stretches):
        raise InputError(
            f"--texts {count}: the text is too short for so many times {least} tokens: give a lower number"
        )
    return stretches, "stretches of the text"


@torch.no_grad()
def writing(model: GPT, vocabulary, texts: list[str], seed: int, device: torch.device) -> dict:
    """How often a model repeats itself: {way: {rep_2, rep_3, rep_4, distinct_1, distinct_2}}, see metrics.py.

    The ways are true (how the text goes on), greedy, and nucleus (top-p 0.95, temperature 1). A prompt is EOS and the
    first 32 tokens of a text; each continuation has 128 tokens, and EOS counts as one.
    """
    encoded = np.array([vocabulary.encode(text)[: PROMPT_TOKENS + CONTINUATION_TOKENS] for text in texts])
    prompts = np.insert(encoded[:, :PROMPT_TOKENS], 0, vocabulary.eos_id, axis=1)
    ways = {"true": encoded[:, PROMPT_TOKENS:]}
    for way, options in (("greedy", {"temperature": 0.0}), ("nucleus", {"temperature": 1.0, "top_p": TOP_P})):
        parts = []
        for start in range(0, len(prompts), ROWS):
            idx = to_device(prompts[start : start + ROWS], device)
            out = model.generate(idx, CONTINUATION_TOKENS, seed=seed + start, **options)
            parts.append(out[:, prompts.shape[1] :])
        ways[way] = torch.cat(parts).cpu().numpy()
    return {
        way: {
            **{f"rep_{n}": float(np.mean([repeated_ngrams(row, n) for row in rows])) for n in (2, 3, 4)},
            **{f"distinct_{n}": distinct_ngrams(rows, n) for n in (1, 2)},
        }
        for way, rows in ways.items()
    }
