"""Prepared corpora, and the order in which training reads them.

`Dataset` opens a folder that data/prepare.py has written (shards.py has the format). `Batches` is a pure function of
(seed, index of the sequence): a run that is resumed, or uses a different number of processes or micro-steps,
reads the same tokens in the same order.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minidisp import InputError
from minidisp.shards import (
    COUNTED,
    EXAMPLES,
    EXAMPLES_FORMAT,
    FIRST,
    MASK,
    SPLITS,
    TEXT,
    Kind,
    Shard,
    files_state,
    open_shard,
    read_meta,
    sha256_of,
    token_dtype,
)
from minidisp.template import Template
from minidisp.tokenizer import load as load_tokenizer


class Column:
    """Several files as one array: the tokens of a split, or its masks. limit: exclusive upper bound of the values."""

    def __init__(self, parts: list[Shard], files: list[Path], limit: int, what: str):
        self._parts, self.files, self._limit, self._what = parts, files, limit, what
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Values start..stop-1 as int64, (stop - start,). Raises InputError, naming the file, if a value is too large.

        Values are checked when they are used, which costs two microseconds per sequence; checking on opening would have
        to read all files.
        """
        out = np.empty(stop - start, dtype=np.int64)
        i, done = int(np.searchsorted(self._ends, start, side="right")), 0
        while done < len(out):
            offset = start + done - int(self._ends[i]) + len(self._parts[i])
            part = self._parts[i][offset : offset + len(out) - done]
            if part.max() >= self._limit:
                at = offset + int(np.argmax(part >= self._limit))
                raise InputError(
                    f"{self.files[i]}: token {at:,} is {self._parts[i][at]:,}, but {self._what} "
                    f"{self._limit:,}: the file is damaged, prepare the corpus again"
                )
            out[done : done + len(part)] = part
            i, done = i + 1, done + len(part)
        return out


class Split:
    """One split of a corpus: its tokens and their counts.

    tokens, documents; bytes of the text as UTF-8 and whitespace-separated words, both without EOS. In a corpus of
    examples, bytes and words are those of the answers; `mask` has the bits COUNTED and FIRST of every token, otherwise
    it is None.
    """

    def __init__(self, name: str, meta: dict, columns: list[Column]):
        self.name, self.tokens, self.documents = name, meta["tokens"], meta["documents"]
        self.bytes, self.words = meta["bytes"], meta["words"]
        self._column, self.mask = columns[0], columns[1] if len(columns) > 1 else None

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 as int64, (stop - start,). IndexError unless 0 <= start <= stop <= tokens.

        Raises InputError, naming the shard, if a token is not in the vocabulary.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start}..{stop} of the {self.tokens} in split {self.name}")
        return self._column.slice(start, stop)

    @functools.cached_property
    def examples(self) -> np.ndarray:
        """The start of each example and the end of its last unmasked token, (documents, 2) int64; for examples only.

        Reads all masks. Raises InputError if they are damaged.
        """
        mask = self.mask.slice(0, self.tokens)
        starts, counted = np.flatnonzero(mask & FIRST), np.flatnonzero(mask & COUNTED)
        ends = np.append(starts[1:], self.tokens)
        last = np.searchsorted(counted, ends) - 1
        found = counted[last] if len(counted) else starts  # a first token is never counted
        if (
            len(starts) != self.documents
            or not self.documents
            or starts[0]
            or (last < 0).any()
            or (found <= starts).any()
        ):
            raise InputError(
                f"{self.mask.files[0]}: the mask of split {self.name} is damaged, prepare the corpus again"
            )
        return np.stack([starts, found + 1], axis=1)


class Dataset:
    """A prepared corpus: `tokenizer`, `meta` (the content of meta.json), `split(name)`, and `hash`, which identifies
    it.

    template: the prompt template of a corpus of examples, else None. parts, weights: itself with weight 1, as in
    `Corpora`. Opening checks that meta.json is complete and agrees with every shard's header and size, and that the
    tokenizer is the one used for the tokens; no tokens are read. Raises InputError with the name of the bad file.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.parts, self.weights = Path(folder), [self], [1]
        path = self.folder / "meta.json"
        self.meta = meta = read_meta(path)
        self.tokenizer = load_tokenizer(self.folder / "tokenizer.model")
        if (self.tokenizer.hash, self.tokenizer.vocab_size) != (meta["tokenizer_sha256"], meta["vocab_size"]):
            raise InputError(f"{self.folder / 'tokenizer.model'} is not the tokenizer recorded in {path}")
        of_examples = meta["format"] == EXAMPLES_FORMAT
        vocab_size, self.template = meta["vocab_size"], None
        if of_examples:
            try:
                self.template = Template.from_meta(meta["template"], self.tokenizer)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
        self._splits = {}
        for name, split in meta["splits"].items():
            kind = EXAMPLES if of_examples else TEXT
            columns = [self._open(split["shards"], kind, token_dtype(vocab_size), vocab_size, "the vocabulary has")]
            if of_examples:
                columns.append(self._open(split["masks"], MASK, np.dtype("u1"), COUNTED + FIRST + 1, "flags are below"))
            self._splits[name] = Split(name, split, columns)
        contents = {name: [file["sha256"] for file in self._files(name)] for name in SPLITS}
        identity = [meta["tokenizer_sha256"], contents] + ([meta["template"]] if of_examples else [])
        self.hash = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def _open(self, listed: list[dict], kind: Kind, dtype: np.dtype, limit: int, what: str) -> Column:
        parts, files = [], []
        for entry in listed:
            file = self.folder / entry["file"]
            part = open_shard(file, kind)
            if (len(part), part.dtype) != (entry["tokens"], dtype):
                raise InputError(f"{file} contains {len(part):,} {part.dtype} tokens, which does not match meta.json")
            parts.append(part)
            files.append(file)
        return Column(parts, files, limit, what)

    def _files(self, split: str) -> list[dict]:
        entries = self.meta["splits"][split]
        return entries["shards"] + (entries["masks"] if self.template else [])

    @property
    def files_state(self) -> str:
        """See shards.files_state."""
        return files_state(self.folder)

    def split(self, name: str) -> Split:
        if name not in self._splits:
            raise InputError(f"there is no split {name!r}; there are {', '.join(SPLITS)}")
        return self._splits[name]

    def verify(self) -> None:
        """Read everything; raise InputError with the first file whose sha256 differs from that in meta.json."""
        for entry in (entry for split in SPLITS for entry in self._files(split)):
            file = self.folder / entry["file"]
            if sha256_of(file) != entry["sha256"]:
                raise InputError(f"{file} has changed since it was written: its sha256 does not match")


class Corpora:
    """A mixture of corpora: weights[i] of every sum(weights) windows are from parts[i].

    Raises InputError unless all have the same tokenizer and, for examples, the same prompt template.
    """

    def __init__(self, parts: Sequence[Dataset], weights: Sequence[int]):
        self.parts, self.weights = parts, weights
        first = parts[0]
        for part in parts[1:]:
            if part.tokenizer.hash != first.tokenizer.hash:
                raise InputError(
                    f"--data: {part.folder} has a different tokenizer from {first.folder}: prepare one of them again "
                    "with the other's, --tokenizer-from"
                )
        templates = [part for part in parts if part.template]
        for part in templates[1:]:
            if part.template.to_meta() != templates[0].template.to_meta():
                raise InputError(f"--data: {part.folder} has a different prompt template from {templates[0].folder}")
        self.folder, self.tokenizer = first.folder, first.tokenizer
        self.template = templates[0].template if templates else None
        self.meta = {"name": " ".join(part.meta["name"] for part in parts)}
        self.hash = hashlib.sha256("".join(part.hash for part in parts).encode()).hexdigest()

    @property
    def files_state(self) -> str:
        """Those of the parts."""
        return " ".join(part.files_state for part in self.parts)

    def verify(self) -> None:
        """See Dataset.verify."""
        for part in self.parts:
            part.verify()


class Batches:
    """Training sequences of T = block_size tokens, in an order that depends on (seed, index) alone.

    An epoch splits the N tokens into n = max(1, (N - 1) // T - 1) adjacent windows, starting at a random offset (giving
    up one window makes room for the offset), and visits each once, in random order. Sequence k of the run is window k %
    n of epoch k // n; both random choices come from a generator seeded with [seed, epoch].
    """

    def __init__(self, split: Split, block_size: int, seed: int):
        _check_length(split, block_size)
        self._split, self._T, self._seed = split, block_size, seed
        self._n = max(1, (split.tokens - 1) // block_size - 1)
        # A batch spans at most two epochs: cache both.
        self._epoch_starts = functools.lru_cache(maxsize=2)(self._starts)

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences first..first+count-1 of the run: x and y, int64, (count, T); y is x one token later."""
        xy = np.empty((count, self._T + 1), dtype=np.int64)
        for row, k in enumerate(range(first, first + count)):
            start = self._epoch_starts(k // self._n)[k % self._n]
            xy[row] = self._split.slice(start, start + self._T + 1)
        return xy[:, :-1].copy(), xy[:, 1:].copy()

    def _starts(self, epoch: int) -> np.ndarray:
        """First token of each window of an epoch, in the order of the visits, (n,)."""
        rng = np.random.default_rng([self._seed, epoch])
        offset = rng.integers(self._split.tokens - self._n * self._T)  # at most N - 1 - n T: the last target exists
        return offset + self._T * rng.permutation(self._n)


class Examples:
    """Training sequences of T = block_size tokens packed from examples; a function of (seed, index).

    An example is used up to its last unmasked token. One longer than T is truncated at the start; `cut` counts these.
    Examples are shuffled once with the seed and packed into n windows (see `pack`). The rest of a window is filled with
    the start of other examples, with all targets masked. Sequence k of the run is window k % n of epoch k // n, in an
    order drawn from a generator seeded with [seed, epoch].
    packing: see Config. chosen: these examples only, in this order.
    """

    def __init__(
        self, split: Split, block_size: int, seed: int, packing: str = "separate", chosen: Sequence[int] | None = None
    ):
        self._split, self._T, self._seed, self._packing = split, block_size, seed, packing
        starts, self._ends = split.examples.T
        self._starts = np.maximum(starts, self._ends - block_size - 1)
        self.cut = int((self._starts > starts).sum())
        self.sizes = self._ends - self._starts - 1  # positions that each example takes in a window
        if chosen is None:
            chosen = np.random.default_rng(seed).permutation(len(starts))
        chosen = np.asarray(chosen, dtype=np.int64)
        sizes = [block_size] * len(chosen) if packing == "none" else self.sizes[chosen]
        self._windows = [[int(chosen[i]) for i in window] for window in pack(sizes, block_size)]
        self._epoch_order = functools.lru_cache(maxsize=2)(self._order)

    @property
    def n(self) -> int:
        return len(self._windows)

    def batch(self, first: int, count: int) -> tuple[np.ndarray, ...]:
        """Sequences first..first+count-1 of the run: x, y and segments, int64, (count, T).

        y is x shifted by one token, -1 where masked. segments numbers the examples of a window from 0; with packing
        "joined", tokens may attend to earlier examples, and there are no segments.
        """
        columns = self._read([self._epoch_order(k // self.n)[k % self.n] for k in range(first, first + count)])
        return columns[:2] if self._packing == "joined" else columns

    def all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every window once, in packing order; returns the same as `batch`."""
        return self._read(range(self.n))

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self.n)

    def _read(self, windows: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x, y, segments = np.empty((3, len(windows), self._T), dtype=np.int64)
        for row, window in enumerate(windows):
            at, segment, example, examples = 0, 0, 0, self._windows[window]
            while at < self._T:
                own = segment < len(examples)
                example = examples[segment] if own else (example + 1) % len(self._starts)
                start, size = int(self._starts[example]), min(int(self.sizes[example]), self._T - at)
                tokens, place = self._split.slice(start, start + size + 1), (row, slice(at, at + size))
                counted = self._split.mask.slice(start + 1, start + size + 1) & COUNTED
                x[place], segments[place] = tokens[:-1], segment
                y[place] = np.where(counted, tokens[1:], -1) if own else -1
                at, segment = at + size, segment + 1
        return x, y, segments


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Best-fit packing of items of these lengths, each at most `room`, into windows of size `room`; returns item
    indices.

    >>> pack([5, 4, 3, 2, 6], room=8)
    [[0, 2], [1, 3], [4]]
    """
    windows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # windows by remaining room
    rooms = 0  # bit r: some window has r left; the lowest set bit >= `length` is the best fit
    for i, length in enumerate(map(int, lengths)):
        if fitting := rooms >> length:
            left = length + (fitting & -fitting).bit_length() - 1
            window = with_room[left].pop()
            if not with_room[left]:
                rooms ^= 1 << left
        else:
            left, window = room, len(windows)
            windows.append([])
        windows[window].append(i)
        left -= length
        if left:
            with_room[left].append(window)
            rooms |= 1 << left
    return windows


@functools.cache
def interleaved(weights: tuple[int, ...]) -> list[tuple[int, int]]:
    """One cycle of a mixture: (corpus, index within that corpus), with corpus i weights[i] times, evenly spread."""
    # The j-th of w sequences is placed at (j + 1/2) / w of the cycle.
    places = sorted(((2 * j + 1) / w, i, j) for i, w in enumerate(weights) for j in range(w))
    return [(i, j) for _, i, j in places]


def shares(weights: Sequence[int], first: int, count: int) -> dict[str, list[float]]:
    """For metrics.jsonl: the share of each corpus in these sequences of a run; {} for a single corpus."""
    cycle = interleaved(tuple(weights))
    corpora = [cycle[k % len(cycle)][0] for k in range(first, first + count)]
    return {"share_by_corpus": [corpora.count(i) / count for i in range(len(weights))]} if len(weights) > 1 else {}


class Mixture:
    """Training sequences from several corpora, weights[i] of corpus i in every sum(weights), evenly spread.

    Each corpus is read in its own order, independent of the other corpora.
    """

    def __init__(self, parts: Sequence[Batches | Examples], weights: Sequence[int]):
        self.parts, self._weights = parts, weights
        self._segmented = any(len(part.batch(0, 1)) == 3 for part in parts)
        self._cycle = interleaved(tuple(weights))

    def batch(self, first: int, count: int) -> tuple[np.ndarray, ...]:
        """Sequences first..first+count-1 of the run: x, y, and segments if a part has them, int64, (count, T)."""
        rows: list[tuple[np.ndarray, ...]] = []
        for cycle, place in (divmod(k, len(self._cycle)) for k in range(first, first + count)):
            i, j = self._cycle[place]
            rows.append(self.parts[i].batch(cycle * self._weights[i] + j, 1))
        if self._segmented:
            rows = [row if len(row) == 3 else (*row, np.zeros_like(row[0])) for row in rows]
        return tuple(np.concatenate(columns) for columns in zip(*rows, strict=True))


def training_batches(
    dataset: Dataset | Corpora, block_size: int, seed: int, packing: str
) -> Batches | Examples | Mixture:
    """The training sequences for --data; see Config for packing."""
    parts = [
        Examples(part.split("train"), block_size, seed, packing)
        if part.template
        else Batches(part.split("train"), block_size, seed)
        for part in dataset.parts
    ]
    return parts[0] if len(parts) == 1 else Mixture(parts, dataset.weights)


def micro_batches(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Split sequences start..stop-1 into parts of at most `size`, yielded as (first, count)."""
    for first in range(start, stop, size):
        yield first, min(size, stop - first)


def eval_windows(split: Split, block_size: int, n_tokens: int) -> tuple[np.ndarray, ...]:
    """The fixed validation set of training: non-overlapping windows, evenly spaced over the split, in order.

    n_tokens: the number of tokens to predict, rounded down to full windows but at least one window; 0 = all.
    Returns x and y, int64, (windows, block_size); for examples, x, y and segments (see `Examples`) of evenly
    spaced examples with about n_tokens tokens in total. Independent of the seed.
    """
    if getattr(split, "mask", None) is not None:
        n, tokens = split.documents, int(Examples(split, block_size, 0, chosen=()).sizes.sum())
        n = max(1, min(n, round(n * n_tokens / tokens))) if n_tokens else n
        return Examples(split, block_size, 0, chosen=[i * split.documents // n for i in range(n)]).all()
    _check_length(split, block_size)
    most = (split.tokens - 1) // block_size
    windows = max(1, min(n_tokens // block_size, most)) if n_tokens else most
    starts = [i * (split.tokens - 1) // windows for i in range(windows)]
    xy = np.stack([split.slice(start, start + block_size + 1) for start in starts])
    return xy[:, :-1].copy(), xy[:, 1:].copy()


def _check_length(split: Split, block_size: int) -> None:
    if split.tokens < block_size + 1:
        raise InputError(
            f"split {split.name} has {split.tokens:,} tokens, but a sequence with its target takes {block_size + 1:,}: "
            "use a smaller --block-size or more text"
        )


class Window(NamedTuple):
    context_start: int
    start: int
    stop: int


def strided_windows(n_tokens: int, block_size: int, stride: int) -> Iterator[Window]:
    """Windows that predict every token 0..n_tokens-1 of a text exactly once, for perplexity with a sliding window.

    With stream = [EOS] + tokens, the model reads stream[context_start:stop], at most block_size tokens, and only
    its outputs for tokens[start:stop], the last stop - start of them, are scored. With stride = block_size the windows
    are adjacent, and the first token of each has almost no context. A smaller stride gives every token but the first
    ones at least block_size - stride tokens of context, and costs block_size / stride times as much.

    >>> [tuple(window) for window in strided_windows(9, block_size=4, stride=2)]
    [(0, 0, 4), (2, 4, 6), (4, 6, 8), (5, 8, 9)]
    """
    if not 1 <= stride <= block_size:
        raise InputError(
            f"the stride is {stride}, but for windows of {block_size} tokens must be from 1 to {block_size}"
        )
    start, stop = 0, min(block_size, n_tokens)
    while start < stop:
        yield Window(max(0, stop - block_size), start, stop)
        start, stop = stop, min(stop + stride, n_tokens)
