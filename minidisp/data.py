"""The tokens of a corpus, and which of them each training step sees.

`Dataset` opens a folder that data/prepare.py has written (shards.py has the format). `Batches` is a pure function of
(seed, index of the sequence): a run that is resumed, or spread over another number of processes and micro-steps, sees
the same tokens in the same order.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minidisp import InputError
from minidisp.shards import SPLITS, open_shard, read_meta, sha256_of, token_dtype
from minidisp.tokenizer import load as load_tokenizer


class Split:
    """One split of a corpus: its tokens and their counts.

    tokens, documents; bytes of the text as UTF-8 and whitespace-separated words, neither counting EOS.
    """

    def __init__(self, name: str, meta: dict, shards: list[np.ndarray], files: list[Path], vocab_size: int):
        self.name, self._files, self._vocab_size = name, files, vocab_size
        self.tokens, self.documents = meta["tokens"], meta["documents"]
        self.bytes, self.words = meta["bytes"], meta["words"]
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 as int64, (stop - start,). IndexError unless 0 <= start <= stop <= tokens.

        Raises InputError naming the shard if one of them is not in the vocabulary. Tokens are checked here, when they
        are used: that costs two microseconds a sequence. A check on opening would have to read all shards.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start}..{stop} of the {self.tokens} in split {self.name}")
        out = np.empty(stop - start, dtype=np.int64)
        i, done = int(np.searchsorted(self._ends, start, side="right")), 0
        while done < len(out):
            offset = start + done - int(self._ends[i]) + len(self._shards[i])
            part = self._shards[i][offset : offset + len(out) - done]
            if part.max() >= self._vocab_size:
                at = offset + int(np.argmax(part >= self._vocab_size))
                raise InputError(
                    f"{self._files[i]}: token {at:,} is {self._shards[i][at]:,}, but the vocabulary has "
                    f"{self._vocab_size:,}: the file is damaged, prepare the corpus again"
                )
            out[done : done + len(part)] = part
            i, done = i + 1, done + len(part)
        return out


class Dataset:
    """A prepared corpus: `tokenizer`, `meta` (what meta.json says), `split(name)`, and `hash`, which identifies it.

    Opening checks that meta.json is complete and agrees with every shard's header and size, and that the tokenizer is
    the one the tokens were made with; it reads no tokens. Raises InputError naming the file that is wrong.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "meta.json"
        self.meta = meta = read_meta(path)
        self.tokenizer = load_tokenizer(self.folder / "tokenizer.model")
        if (self.tokenizer.hash, self.tokenizer.vocab_size) != (meta["tokenizer_sha256"], meta["vocab_size"]):
            raise InputError(f"{self.folder / 'tokenizer.model'} is not the tokenizer that {path} names")
        self._splits = {}
        for name, split in meta["splits"].items():
            shards, files = [], []
            for shard in split["shards"]:
                file = self.folder / shard["file"]
                tokens = open_shard(file)
                if (len(tokens), tokens.dtype) != (shard["tokens"], token_dtype(meta["vocab_size"])):
                    raise InputError(f"{file} holds {len(tokens):,} {tokens.dtype} tokens, not what {path.name} says")
                shards.append(tokens)
                files.append(file)
            self._splits[name] = Split(name, split, shards, files, meta["vocab_size"])
        contents = {name: [shard["sha256"] for shard in meta["splits"][name]["shards"]] for name in SPLITS}
        self.hash = hashlib.sha256(json.dumps([meta["tokenizer_sha256"], contents]).encode()).hexdigest()

    def split(self, name: str) -> Split:
        if name not in self._splits:
            raise InputError(f"there is no split {name!r}; there are {', '.join(SPLITS)}")
        return self._splits[name]

    def verify(self) -> None:
        """Read everything, and raise InputError naming the first shard whose sha256 is not the one in meta.json."""
        for split in self.meta["splits"].values():
            for shard in split["shards"]:
                file = self.folder / shard["file"]
                if sha256_of(file) != shard["sha256"]:
                    raise InputError(f"{file} has changed since it was written: its sha256 is another")


class Batches:
    """Training sequences of T = block_size tokens, in an order that depends on (seed, index) alone.

    An epoch cuts the N tokens into n = max(1, (N - 1) // T - 1) windows side by side, starting at a random offset (the
    one window given up is what leaves room for it), and visits each once, in random order. Sequence k of the run is
    window k % n of epoch k // n; both random choices come from a generator seeded with [seed, epoch].
    """

    def __init__(self, split: Split, block_size: int, seed: int):
        _check_length(split, block_size)
        self._split, self._T, self._seed = split, block_size, seed
        self._n = max(1, (split.tokens - 1) // block_size - 1)
        # A batch has sequences of one epoch, or of two where it crosses a boundary: keep both.
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


def micro_batches(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Sequences start..stop-1 in parts of at most `size`: (the first one, how many)."""
    for first in range(start, stop, size):
        yield first, min(size, stop - first)


def eval_windows(split: Split, block_size: int, n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The fixed validation set of training: windows spread evenly over the split, in its order, without overlap.

    n_tokens: how many tokens to predict, rounded down to whole windows but at least one; 0 = as many as there are.
    Returns x and y, int64, (windows, block_size); the same for every seed.
    """
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
    """Windows that predict every token 0..n_tokens-1 of a text exactly once, for perplexity with a sliding context.

    With stream = [EOS] + tokens, the model reads stream[context_start:stop], at most block_size tokens, and its outputs
    for tokens[start:stop], the last stop - start of them, count. With stride = block_size the windows lie side by side,
    and the first token of each has almost no context. A smaller stride gives every token but the first ones at least
    block_size - stride tokens of context, and costs block_size / stride times as much.

    >>> [tuple(window) for window in strided_windows(9, block_size=4, stride=2)]
    [(0, 0, 4), (2, 4, 6), (4, 6, 8), (5, 8, 9)]
    """
    if not 1 <= stride <= block_size:
        raise InputError(f"a stride of {stride} is none for windows of {block_size} tokens: take 1 to {block_size}")
    start, stop = 0, min(block_size, n_tokens)
    while start < stop:
        yield Window(max(0, stop - block_size), start, stop)
        start, stop = stop, min(stop + stride, n_tokens)
