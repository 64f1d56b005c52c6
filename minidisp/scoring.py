"""Evaluation of a model on held-out text, and of repetition in the text that it generates.

Models are in eval mode and on `device`. Nats are -log p with the natural logarithm. metrics.py defines the metrics.
"""

from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from minidisp import InputError
from minidisp.comparison import Comparison, Measure, Run, compare, paired_bootstrap
from minidisp.data import Dataset, strided_windows
from minidisp.metrics import (
    FullCondensation,
    bits_per_byte,
    distinct_ngrams,
    perplexity,
    repeated_ngrams,
    word_perplexity,
)
from minidisp.model import GPT
from minidisp.runtime.device import to_device
from minidisp.shards import COUNTED
from minidisp.tasks import Passage, score

SEQUENCES, SEQUENCE_TOKENS = 100, 512  # the paper's condensation protocol
BLOCK_BYTES = 1024  # size of the blocks of text that the bootstrap resamples
BATCH_TOKENS = 4096  # per forward pass
PROMPT_TOKENS, CONTINUATION_TOKENS, TOP_P = 32, 128, 0.95  # of `writing`; the first two as in arXiv 2202.06417
ROWS = 64  # sequences that are generated at a time


# --- held-out text ----------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """Held-out text, the same for all models."""

    documents: list[str]
    ends: bool  # whether the last document is complete, and thus followed by EOS
    tokens: np.ndarray  # the corpus's own tokens, (N,) int64
    tokenizer: object

    @classmethod
    def read(cls, dataset: Dataset, split: str, limit: int) -> "Text":
        """The first `limit` tokens of a split (0 = all), without a partial UTF-8 character at the end."""
        source, tokenizer = dataset.split(split), dataset.tokenizer
        tokens = source.slice(0, min(limit, source.tokens) if limit else source.tokens)
        if not limit:
            refuse_lost_bytes(_bytes_of(tokenizer, tokens), source.bytes, f"the tokenizer of {dataset.folder}")
        while len(tokens) and not _whole(b"".join(tokenizer.token_bytes[token] for token in tokens[-4:])):
            tokens = tokens[:-1]
        ends = np.flatnonzero(tokens == tokenizer.eos_id)
        pieces = np.split(tokens, ends + 1)
        documents = [tokenizer.decode(piece.tolist()) for piece in pieces if len(piece)]
        return cls(documents, len(ends) > 0 and ends[-1] == len(tokens) - 1, tokens, tokenizer)

    @classmethod
    def of(cls, text: str, tokenizer) -> "Text":
        """Any text, as one document without an end."""
        found = cls([text], False, np.array([], dtype=np.int64), None)
        return found._replace(tokens=found._encoded(tokenizer), tokenizer=tokenizer)

    def encode(self, tokenizer) -> np.ndarray:
        """The text encoded with another tokenizer, (M,) int64; every document ends with its EOS."""
        return self.tokens if tokenizer.hash == self.tokenizer.hash else self._encoded(tokenizer)

    def _encoded(self, tokenizer) -> np.ndarray:
        encoded: list[int] = []
        for document in self.documents:
            encoded += [*tokenizer.encode(document), tokenizer.eos_id]
        tokens = np.array(encoded if self.ends else encoded[:-1], dtype=np.int64)
        n_bytes = sum(len(document.encode("utf-8")) for document in self.documents)
        refuse_lost_bytes(_bytes_of(tokenizer, tokens), n_bytes, "a tokenizer")
        return tokens


def _bytes_of(tokenizer, tokens: np.ndarray) -> int:
    return sum(len(tokenizer.token_bytes[token]) for token in tokens.tolist())


def refuse_lost_bytes(found: int, wanted: int, whose: str) -> None:
    """Raise InputError unless the tokens represent every byte of the text, as losses per byte would be wrong."""
    if found != wanted:
        raise InputError(
            f"{whose} preserves only {found:,} of the {wanted:,} bytes of this text, so losses per byte cannot be "
            "computed"
        )


class Examples(NamedTuple):
    """Held-out examples; only their completions are scored, each example on its own."""

    passages: list[Passage]
    tokens: np.ndarray  # of all examples, including prompts, (N,) int64
    tokenizer: object

    @classmethod
    def read(cls, dataset: Dataset, split: str, limit: int) -> "Examples":
        """The examples of a split, up to `limit` tokens in total (0 = all)."""
        source = dataset.split(split)
        places = source.examples.tolist()
        if limit:
            places = [place for place in places if place[1] <= limit] or places[:1]
        passages = []
        for start, end in places:
            counted = (source.mask.slice(start, end) & COUNTED).astype(bool).tolist()
            passages.append(Passage(source.slice(start, end).tolist(), counted))
        return cls(passages, source.slice(0, places[-1][1]), dataset.tokenizer)


def _whole(tail: bytes) -> bool:
    """Whether these bytes end at a UTF-8 character boundary; they may begin inside a character."""
    try:
        tail.lstrip(bytes(range(0x80, 0xC0))).decode()
    except UnicodeDecodeError as error:
        return error.reason != "unexpected end of data"
    return True


class Result(NamedTuple):
    scores: dict  # as in the JSON file
    block_nats: np.ndarray  # nats per block of text or per example, for comparing runs
    block_bytes: np.ndarray  # bytes per block
    token_nats: np.ndarray | None  # nats per token; None if some tokens are masked


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
        batch, windows = windows[:batch_size], windows[batch_size:]  # all windows of a text have the same length
        rows = to_device(np.stack([stream[w.context_start : w.stop + 1] for w in batch]), device)
        scored = max(w.stop - w.start for w in batch)
        losses.append(model(rows[:, :-1], rows[:, -scored:], loss_reduction="none").loss)
        batches.append(batch)
        progress.update(sum(w.stop - w.start for w in batch))
    progress.close()
    for batch, loss in zip(batches, fetched_at_once(losses), strict=True):
        for w, row in zip(batch, loss, strict=True):
            nats[w.start : w.stop] = row[len(row) - (w.stop - w.start) :]
    return nats


def fetched_at_once(tensors: list[torch.Tensor]) -> list[np.ndarray]:
    """The tensors in float64 on the CPU, copied with a single device synchronisation."""
    if not tensors:
        return []
    flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu().double()
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape).numpy() for piece, tensor in zip(pieces, tensors, strict=True)]


@torch.no_grad()
def condensation(model: GPT, tokens: np.ndarray, device: torch.device) -> dict:
    """FullCondensation of up to 100 evenly spaced sequences of 512 tokens, or the model's context if shorter."""
    T = min(SEQUENCE_TOKENS, model.config.block_size, len(tokens))
    n = min(SEQUENCES, len(tokens) // T)
    starts = np.linspace(0, len(tokens) - T, n).astype(np.int64)
    collected = FullCondensation()
    batch_size = max(1, BATCH_TOKENS // T)
    for i in range(0, n, batch_size):
        x = to_device(np.stack([tokens[s : s + T] for s in starts[i : i + batch_size]]), device)
        collected.update(model(x, return_hidden_states=True).hidden_states)
    return collected.result()


def score_text(
    name: str, model: GPT, tokenizer, texts: dict[str, Text | Examples], stride: int, device: torch.device
) -> Result:
    """All scores of one model on the texts together and, if there are several, on each text by name.

    stride: tokens by which the sliding window over plain text advances; 0 = half the context. Raises InputError if a
    text or the context is too short, or the stride too long.
    """
    if model.config.block_size < 2:
        raise InputError(f"{name} has a context of one token, but a cosine needs two: pass --block-size 2 or more")
    parts, streams = {}, []
    for part, text in texts.items():
        measure = _score_examples if isinstance(text, Examples) else _score_plain
        parts[part], tokens = measure(name, model, tokenizer, text, stride, device)
        streams.append(tokens)
    whole = _joined([*parts.values()])
    scores = {"name": name, "tokenizer": tokenizer.hash, **whole.scores}
    if len(parts) > 1:
        scores["corpora"] = {part: result.scores for part, result in parts.items()}
    return whole._replace(scores={**scores, "condensation": condensation(model, np.concatenate(streams), device)})


def _score_plain(
    name: str, model: GPT, tokenizer, text: Text, stride: int, device: torch.device
) -> tuple[Result, np.ndarray]:
    tokens = text.encode(tokenizer)
    if len(tokens) < 2:
        raise InputError(
            f"{len(tokens)} tokens are too few to evaluate {name}: pass a larger --tokens, or another --data or --split"
        )
    stride = stride or max(1, model.config.block_size // 2)
    nats = token_nats(model, tokens, tokenizer.eos_id, stride, device)
    # A token belongs to the block of text in which it ends.
    ends = np.cumsum([len(tokenizer.token_bytes[token]) for token in tokens])
    block_nats = np.bincount(np.maximum(ends - 1, 0) // BLOCK_BYTES, weights=nats)
    block_bytes = np.full(len(block_nats), BLOCK_BYTES)
    block_bytes[-1] = ends[-1] - BLOCK_BYTES * (len(block_nats) - 1)
    words = sum(len(document.split()) for document in text.documents)
    return Result(_scores(float(nats.sum()), len(tokens), int(ends[-1]), words), block_nats, block_bytes, nats), tokens


def _score_examples(
    name: str, model: GPT, tokenizer, examples: Examples, stride: int, device: torch.device
) -> tuple[Result, np.ndarray]:
    if tokenizer.hash != examples.tokenizer.hash:
        raise InputError(
            f"{name} has a different tokenizer from the corpus of examples: pass --data with a corpus for its tokenizer"
        )
    nats = score(model, examples.passages, device).nats
    answers = [[token for token, counts in zip(*passage, strict=True) if counts] for passage in examples.passages]
    n_bytes = np.array([sum(len(tokenizer.token_bytes[token]) for token in ids) for ids in answers])
    words = sum(len(tokenizer.decode(ids).split()) for ids in answers)
    scores = _scores(float(nats.sum()), sum(map(len, answers)), int(n_bytes.sum()), words)
    return Result(scores, nats, n_bytes, None), examples.tokens


def _joined(parts: list[Result]) -> Result:
    """Merge the results of several texts."""
    if len(parts) == 1:
        return parts[0]
    nats = float(sum(part.block_nats.sum() for part in parts))
    counts = (sum(part.scores[key] for part in parts) for key in ("tokens", "bytes", "words"))
    blocks = (np.concatenate([getattr(part, key) for part in parts]) for key in ("block_nats", "block_bytes"))
    return Result(_scores(nats, *counts), *blocks, None)


def _scores(nats: float, tokens: int, n_bytes: int, words: int) -> dict:
    return {
        "tokens": tokens,
        "bytes": n_bytes,
        "words": words,
        "loss": nats / tokens,
        "perplexity": perplexity(nats, tokens),
        "bits_per_byte": bits_per_byte(nats, n_bytes),
        "word_perplexity": word_perplexity(nats, words),
    }


def text_measure(results: list[Result]) -> Measure:
    """Bits per byte of every run, and the difference of two runs on the same text."""

    def difference(i: int, j: int) -> tuple[float, float, float]:
        return paired_bootstrap(results[i].block_nats, results[j].block_nats, results[i].block_bytes)

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
    """Compare every run with the first; also stores the results in the scores.

    versus_first: difference in bits per byte, lower and upper end of its 95 % interval over the text, verdict; and with
    equal tokenizers the difference in nats per token and the share of tokens that the run predicts better (ties count
    half).
    """
    found = compare(runs, text_measure(results))
    for other, versus in zip(results[1:], found.versus_first, strict=True):
        broken = not (np.isfinite(other.block_nats).all() and np.isfinite(results[0].block_nats).all())
        versus |= {"verdict": "undefined"} if broken else _by_token(results[0], other)
        other.scores["versus_first"] = versus
    return found


def _by_token(first: Result, other: Result) -> dict[str, float]:
    """The difference in nats per token, and the share of tokens that `other` predicts better; {} if the tokenizers
    differ.
    """
    if other.scores["tokenizer"] != first.scores["tokenizer"] or first.token_nats is None:
        return {}
    per_token = other.token_nats - first.token_nats
    better = float((per_token < 0).mean() + (per_token == 0).mean() / 2)
    return {"nats_per_token": float(per_token.mean()), "tokens_better": better}


# --- repetition in generated text -------------------------------------------------------------------------------------


def choose_texts(text: Text, tokenizers: list, count: int) -> tuple[list[str], str]:
    """`count` held-out documents, evenly spaced among those long enough for `writing` in every tokenizer.

    If there are too few, consecutive pieces of the text instead. Returns the texts and which of the two they are.
    Raises InputError if the text is too short for either.
    """
    least = PROMPT_TOKENS + CONTINUATION_TOKENS
    lengths = np.full(len(text.documents), least)
    for tokenizer in tokenizers:
        tokens = text.encode(tokenizer)
        ends = np.append(np.flatnonzero(tokens == tokenizer.eos_id), len(tokens))[: len(lengths)]
        lengths = np.minimum(lengths, np.diff(ends, prepend=-1) - 1)
    long = np.flatnonzero(lengths >= least)
    if len(long) >= count:
        which = long[np.linspace(0, len(long) - 1, count).round().astype(int)]
        return [text.documents[i] for i in which], "documents"
    joined = "".join(text.documents)
    size = len(joined) // count
    stretches = (joined[i * size : (i + 1) * size] for i in range(count))  # lazily: the count may be huge
    if not size or any(len(tokenizer.encode(stretch)) < least for stretch in stretches for tokenizer in tokenizers):
        raise InputError(
            f"--texts {count}: the text is too short for this many pieces of {least} tokens: pass a lower number"
        )
    return [joined[i * size : (i + 1) * size] for i in range(count)], "stretches of the text"


@torch.no_grad()
def writing(model: GPT, tokenizer, texts: list[str], seed: int, device: torch.device) -> dict:
    """Repetition metrics of generated text: {way: {rep_2, rep_3, rep_4, distinct_1, distinct_2}}, see metrics.py.

    The ways are true (the actual continuation), greedy, and nucleus (top-p 0.95, temperature 1). A prompt is EOS and
    the first 32 tokens of a text; each continuation has 128 tokens, including any EOS.
    """
    encoded = np.array([tokenizer.encode(text)[: PROMPT_TOKENS + CONTINUATION_TOKENS] for text in texts])
    prompts = np.insert(encoded[:, :PROMPT_TOKENS], 0, tokenizer.eos_id, axis=1)
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
