"""The files of a prepared corpus: token shards and meta.json.

A corpus is a folder, written by data/prepare.py: meta.json, tokenizer.model, and the tokens of train, val and test in
shards train_000.bin, train_001.bin, ... Every document is followed by EOS. A shard is a header of 64 bytes (magic,
version, bytes per token, number of tokens) and then the tokens as uint16 or uint32, little-endian.
"""

import hashlib
import os
import re
import struct
from pathlib import Path

import numpy as np

from minidisp import InputError, is_plain, parse_json, read_bytes

SPLITS = ("train", "val", "test")
FORMAT = 1  # of shards and of meta.json
MAGIC = b"minidisp"
HEADER = struct.Struct("<8sIIQ40x")


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of stored tokens: uint16 if the vocabulary fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Streams the tokens of one split into files of at most shard_tokens tokens each.

    Use as a context manager. `shards` lists the finished files as meta.json does: file, tokens, sha256. A file has its
    final name only when it is complete and on the disk. After an exception the unfinished file is removed, unless `state`
    was called or given: a writer that is given a state continues from there.
    """

    def __init__(self, folder: str | Path, split: str, vocab_size: int, shard_tokens: int, state: dict | None = None):
        self.shards: list[dict] = []
        self._folder, self._split, self._shard_tokens = Path(folder), split, shard_tokens
        self._vocab_size, self._dtype = vocab_size, token_dtype(vocab_size)
        self._file = None
        self._tokens = 0  # in the current file
        self._keep = bool(state)
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


def is_resumable(folder: Path, split: str, vocab_size: int, state: dict) -> bool:
    """Whether the files that a ShardWriter's `state` speaks of are in the folder, and as long as it says."""
    written = [(folder / shard["file"], shard["tokens"]) for shard in state["shards"]]
    if state["tokens"]:
        unfinished = folder / f"{split}_{len(written):03d}.bin.tmp"
        written.append((unfinished if unfinished.exists() else unfinished.with_suffix(""), state["tokens"]))
    itemsize = token_dtype(vocab_size).itemsize
    return all(path.is_file() and path.stat().st_size >= HEADER.size + itemsize * tokens for path, tokens in written)


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


def read_meta(path: Path) -> dict:
    """The content of a meta.json. Raises InputError unless all fields have their types and the shards add up."""
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
