"""Tokens on disk, and which of them a training step sees.

A corpus is a folder, written by data/prepare.py: meta.json, tokenizer.model, and for each of train, val and test its
tokens in shards train_000.bin, train_001.bin, ... A document is followed by EOS. A shard is 64 bytes of header (magic,
version, bytes per token, number of tokens), then the tokens, uint16 or uint32; everything little-endian.

Batches are a pure function of (seed, index of the sequence): a run that is resumed, or spread over other numbers of
processes and micro-steps, sees the same tokens in the same order.
"""

import functools
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minidisp import InputError, is_plain, parse_json, read_bytes
from minidisp.tokenizer import load as load_tokenizer

SPLITS = ("train", "val", "test")
FORMAT = 1  # of shards and of meta.json
MAGIC = b"minidisp"
HEADER = struct.Struct("<8sIIQ40x")


def token_dtype(vocab_size: int) -> np.dtype:
    """What tokens are stored as: uint16 while they fit."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Streams the tokens of one split into files of at most shard_tokens tokens each.

    Use as a context manager. `shards` lists the finished files as meta.json does: file, tokens, sha256. A file has its
    final name only when it is complete and on the disk; after an exception the unfinished one is removed, unless `state`
    was asked for: a writer that is given this state goes on there.
    """

    def __init__(self, folder: str | Path, split: str, vocab_size: int, shard_tokens: int, state: dict | None = None):
        self.shards: list[dict] = []
        self._folder, self._split, self._shard_tokens = Path(folder), split, shard_tokens
        self._vocab_size, self._dtype = vocab_size, token_dtype(vocab_size)
        self._file = None
        self._tokens = 0  # in the current file
        self._keep = False
        if state:
            self.shards = state["shards"]
            if state["tokens"]:
                self._open_again(state["tokens"])

    def state(self) -> dict:
        """The finished shards, and how many tokens of the next one are on the disk."""
        self._keep = True
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"shards": list(self.shards), "tokens": self._tokens if self._file is not None else 0}

    def _open_again(self, tokens: int) -> None:
        path = self._path()
        finished = path.with_suffix("")
        if finished.exists():  # after the state was taken
            os.replace(finished, path)
        self._file, self._tokens = open(path, "r+b", buffering=1 << 20), tokens  # noqa: SIM115 (outlives the call)
        end = HEADER.size + tokens * self._dtype.itemsize
        if os.fstat(self._file.fileno()).st_size < end:
            self._file.close()
            raise InputError(f"{path} is not as it was left: run this again to start over")
        self._file.truncate(end)
        self._file.seek(end)

    def _path(self) -> Path:
        return self._folder / f"{self._split}_{len(self.shards):03d}.bin.tmp"

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, failed, *_):
        if self._file is None:
            return
        if failed:
            self._file.close()
            if not self._keep:
                os.unlink(self._file.name)
        else:
            self._finish()

    def write(self, ids: list[int]) -> None:
        """Append token ids; ValueError if one is not in the vocabulary."""
        tokens = np.array(ids, dtype=np.int64)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            raise ValueError(f"token ids {tokens.min()}..{tokens.max()} for a vocabulary of {self._vocab_size}")
        tokens = tokens.astype(self._dtype)
        while len(tokens):
            if self._file is None:
                self._file, self._tokens = open(self._path(), "wb", buffering=1 << 20), 0  # noqa: SIM115 (outlives the call)
                self._file.write(bytes(HEADER.size))  # written last, when the number of tokens is known
            now, tokens = np.split(tokens, [self._shard_tokens - self._tokens])
            self._file.write(now.tobytes())
            self._tokens += len(now)
            if self._tokens == self._shard_tokens:
                self._finish()

    def _finish(self) -> None:
        file, self._file = self._file, None
        with file:
            file.seek(0)
            file.write(HEADER.pack(MAGIC, FORMAT, self._dtype.itemsize, self._tokens))
            file.flush()
            os.fsync(file.fileno())
        path = Path(file.name).with_suffix("")
        os.replace(file.name, path)
        self.shards.append({"file": path.name, "tokens": self._tokens, "sha256": sha256_of(path)})


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, mapped rather than read. InputError naming the file if it is not a whole, sound shard."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise InputError(f"{path} is not a token shard")
    try:
        with open(path, "rb") as file:
            header, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise InputError(f"{path} is not a token shard")
    _, version, itemsize, tokens = HEADER.unpack(header)
    if version != FORMAT or itemsize not in (2, 4):
        raise InputError(f"{path} is a shard of version {version}, not {FORMAT}; prepare the corpus again")
    if size != HEADER.size + itemsize * tokens or tokens == 0:
        raise InputError(f"{path} is truncated or damaged: {size:,} bytes cannot be its {tokens:,} tokens")
    # A plain array on top of the map: slicing np.memmap itself costs several times as much.
    return np.asarray(np.memmap(path, dtype=f"<u{itemsize}", mode="r", offset=HEADER.size, shape=(tokens,)))


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
        self.meta = meta = _read_meta(path)
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


_META_FIELDS = {
    "corpus": {
        "name": str,
        "source": str,
        "versions": dict,
        "options": dict,
        "tokenizer_sha256": str,
        "vocab_size": int,
        "splits": dict,
    },
    "split": {"documents": int, "tokens": int, "bytes": int, "words": int, "shards": list},
    "shard": {"file": str, "tokens": int, "sha256": str},
}


def _read_meta(path: Path) -> dict:
    """What a meta.json says, or InputError unless all fields have their types and the shards add up to their split."""
    if not path.exists():
        raise InputError(f"{path.parent} is not a prepared corpus: it has no {path.name}")
    meta = parse_json(read_bytes(path), path)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise InputError(f"{path} is not the meta.json of a corpus of format {FORMAT}; prepare the corpus again")

    def check(what: str, value: object) -> None:
        for key, kind in _META_FIELDS[what].items():
            found = value.get(key) if isinstance(value, dict) else None
            if (
                type(found) is not kind
                or (kind is int and not 0 <= found < 1 << 63)
                or (kind is str and not is_plain(found))
            ):
                raise InputError(f"{path}: {what} {key} is missing or not a valid {kind.__name__}")

    check("corpus", meta)
    if sorted(meta["splits"]) != sorted(SPLITS):
        raise InputError(f"{path}: the splits are not {', '.join(SPLITS)}")
    for name, split in meta["splits"].items():
        check("split", split)
        for shard in split["shards"]:
            check("shard", shard)
            if not re.fullmatch(r"\w[\w.-]*", shard["file"], re.ASCII):  # no path, no device, nothing hidden
                raise InputError(f"{path}: shard {shard['file']!a:.60} is not in the same folder")
        if not split["tokens"] or sum(shard["tokens"] for shard in split["shards"]) != split["tokens"]:
            raise InputError(f"{path}: the shards of split {name} do not add up to its {split['tokens']:,} tokens")
    return meta


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
