"""The files of a prepared corpus: token shards, masks and meta.json.

A corpus is a folder, written by data/prepare.py: meta.json, tokenizer.model, and the tokens of train, val and test in
shards train_000.bin, train_001.bin, ... Every document is followed by EOS. A shard is a header of 64 bytes (magic,
version, bytes per token, number of tokens) and then the tokens as uint16 or uint32, little-endian.

In a corpus of examples (dialogues), a document is a row rendered with the prompt template, and each shard has a mask
next to it, train_000.mask: a header of the same form, and one byte per token with the bits COUNTED and FIRST.
"""

import errno
import functools
import hashlib
import os
import re
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minidisp import InputError, is_plain, parse_json, read_bytes

SPLITS = ("train", "val", "test")
FORMAT, EXAMPLES_FORMAT = 1, 2  # version of shards and meta.json, for text and for examples
MAGIC = b"minidisp"
HEADER = struct.Struct("<8sIIQ40x")
PENDING_TOKENS = 1 << 16  # buffered before writing
COUNTED, FIRST = 1, 2  # bits of a mask: the token is a target; it is the first one of its example


class Kind(NamedTuple):
    """A type of file: its suffix and the fields of its header."""

    suffix: str
    magic: bytes
    version: int
    itemsizes: tuple[int, ...]


TEXT = Kind("bin", MAGIC, FORMAT, (2, 4))
EXAMPLES = Kind("bin", MAGIC, EXAMPLES_FORMAT, (2, 4))
MASK = Kind("mask", b"minimask", EXAMPLES_FORMAT, (1,))


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of stored tokens: uint16 if the vocabulary fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _dtype(vocab_size: int, kind: Kind) -> np.dtype:
    return np.dtype("u1") if kind is MASK else token_dtype(vocab_size)


class ShardWriter:
    """Writes the tokens of one split to files of at most shard_tokens tokens each.

    Use as a context manager. `shards` lists the finished files as in meta.json: file, tokens, sha256. A file gets its
    final name only once it is complete and synced to disk. On an exception the unfinished file is removed, unless
    `state()` has been called or a state was passed. state: the result of `state()`, to continue from there. kind: TEXT
    or EXAMPLES; or MASK, for which vocab_size is 4.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        vocab_size: int,
        shard_tokens: int,
        state: dict | None = None,
        kind: Kind = TEXT,
    ):
        self.shards: list[dict] = []
        self._folder, self._split, self._shard_tokens, self._kind = Path(folder), split, shard_tokens, kind
        self._vocab_size, self._dtype = vocab_size, _dtype(vocab_size, kind)
        self._pending: list[int] = []  # buffered, not yet written
        self._file = None
        self._tokens = 0  # written to the current file
        self._keep = bool(state)
        if state:
            self.shards = state["shards"]
            if state["tokens"]:
                self._open_again(state["tokens"])

    def state(self) -> dict:
        """The finished shards, and the number of tokens of the next one that are on disk."""
        self._keep = True
        self._flush()
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"shards": list(self.shards), "tokens": self._tokens if self._file is not None else 0}

    def _open_again(self, tokens: int) -> None:
        path = self._path()
        finished = path.with_suffix("")
        if finished.exists():  # it was completed after the state was saved
            os.replace(finished, path)
        self._file, self._tokens = open(path, "r+b", buffering=1 << 20), tokens  # noqa: SIM115 (outlives the call)
        end = HEADER.size + tokens * self._dtype.itemsize
        self._file.truncate(end)
        self._file.seek(end)

    def _path(self) -> Path:
        return self._folder / f"{self._split}_{len(self.shards):03d}.{self._kind.suffix}.tmp"

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, failed, *_):
        if not failed:
            self._flush()
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
        if ids and not 0 <= min(ids) <= max(ids) < self._vocab_size:
            raise ValueError(f"token ids {min(ids)}..{max(ids)} for a vocabulary of {self._vocab_size}")
        self._pending += ids  # buffered, as documents may be short and small writes are slow
        if len(self._pending) >= min(PENDING_TOKENS, self._shard_tokens):
            self._flush()

    def _flush(self) -> None:
        tokens, self._pending = np.array(self._pending, dtype=self._dtype), []
        while len(tokens):
            if self._file is None:
                self._file = open(self._path(), "wb", buffering=1 << 20)  # noqa: SIM115 (outlives the call)
                self._file.write(bytes(HEADER.size))  # filled in at the end, when the number of tokens is known
                self._tokens = 0
            now, tokens = np.split(tokens, [self._shard_tokens - self._tokens])
            self._file.write(now.tobytes())
            self._tokens += len(now)
            if self._tokens == self._shard_tokens:
                self._finish()

    def _finish(self) -> None:
        file, self._file = self._file, None
        with file:
            file.seek(0)
            file.write(HEADER.pack(self._kind.magic, self._kind.version, self._dtype.itemsize, self._tokens))
            file.flush()
            os.fsync(file.fileno())
        path = Path(file.name).with_suffix("")
        os.replace(file.name, path)
        self.shards.append({"file": path.name, "tokens": self._tokens, "sha256": sha256_of(path)})


def is_resumable(folder: Path, split: str, vocab_size: int, state: dict, kind: Kind = TEXT) -> bool:
    """Whether the files in a ShardWriter's `state` exist in the folder, with at least the recorded tokens."""
    written = [(folder / shard["file"], shard["tokens"]) for shard in state["shards"]]
    if state["tokens"]:
        unfinished = folder / f"{split}_{len(written):03d}.{kind.suffix}.tmp"
        written.append((unfinished if unfinished.exists() else unfinished.with_suffix(""), state["tokens"]))
    itemsize = _dtype(vocab_size, kind).itemsize
    return all(path.is_file() and path.stat().st_size >= HEADER.size + itemsize * tokens for path, tokens in written)


class Shard:
    """The tokens of a file, read on access: shard[start:stop] is an array of `dtype`.

    Not memory-mapped: mappings need address space and a descriptor per file, some file systems do not support them, and
    truncating a mapped file kills the process without a message. Few files are open at a time. Raises InputError,
    naming the file, if it cannot be read or has been replaced since it was first opened.
    """

    def __init__(self, path: Path, dtype: np.dtype, tokens: int):
        self._path, self.dtype, self._tokens = path, dtype, tokens
        self._identity = _identity(os.stat(path))

    def __len__(self) -> int:
        return self._tokens

    def __getitem__(self, index: int | slice) -> np.ndarray:
        if not isinstance(index, slice):
            return self[index : index + 1][0]
        start, stop, _ = index.indices(self._tokens)
        first, size = HEADER.size + start * self.dtype.itemsize, max(0, stop - start) * self.dtype.itemsize
        parts = []
        try:
            file = _opened(self._path, self._identity)
            while size:
                part = _pread(file.descriptor, size, first)
                if not part:
                    raise InputError(f"{self._path} was truncated: restore it, or prepare the corpus again")
                parts.append(part)
                first, size = first + len(part), size - len(part)
        except OSError as error:
            raise InputError(f"{self._path}: {_reason(error)}") from None
        return np.frombuffer(b"".join(parts) if len(parts) != 1 else parts[0], dtype=self.dtype)


class _File:
    """An open file, closed when it is garbage-collected."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self):
        os.close(self.descriptor)


@functools.lru_cache(maxsize=32)
def _opened(path: Path, identity: tuple) -> _File:
    file = _File(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)))
    if _identity(os.fstat(file.descriptor)) != identity:
        raise InputError(f"{path} was replaced or its size changed since this process started: start it again")
    return file


def _identity(found: os.stat_result) -> tuple:
    return found.st_dev, found.st_ino, found.st_size


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # Windows
    return os.read(descriptor, size)


def _reason(error: OSError) -> str:
    hint = "; raise the limit of open files (ulimit -n)" if error.errno == errno.EMFILE else ""
    return f"{error.strerror or error}{hint}"


def files_state(folder: Path) -> str:
    """sha256 of the names, sizes and modification times of a corpus's shards, which changes when they are written."""
    files = (*folder.glob("*.bin"), *folder.glob("*.mask"))
    found = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return hashlib.sha256(repr(found).encode()).hexdigest()


def open_shard(path: Path, kind: Kind = TEXT) -> Shard:
    """The tokens of a shard, or the bytes of a mask, read on access.

    Raises InputError, naming the file, if it is incomplete, damaged, or of another kind.
    """
    what = "a mask" if kind is MASK else "a token shard"
    if path.exists() and not path.is_file():  # opening a pipe would block
        raise InputError(f"{path} is not {what}")
    try:
        with open(path, "rb") as file:
            header, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: {_reason(error)}") from error
    if len(header) < HEADER.size or not header.startswith(kind.magic):
        raise InputError(f"{path} is not {what}")
    _, version, itemsize, tokens = HEADER.unpack(header)
    if version != kind.version or itemsize not in kind.itemsizes:
        raise InputError(f"{path} is {what} of version {version}, not {kind.version}: prepare the corpus again")
    if size != HEADER.size + itemsize * tokens or tokens == 0:
        raise InputError(f"{path} is truncated or damaged: its {size:,} bytes do not match its {tokens:,} tokens")
    return Shard(path, np.dtype(f"<u{itemsize}"), tokens)


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
    "examples": {"template": dict},
    "split of examples": {"counted": int, "masks": list},
}


def read_meta(path: Path) -> dict:
    """The content of a meta.json. Raises InputError if a field is missing or invalid, or the shards do not add up."""
    if not path.exists():
        raise InputError(f"{path.parent} is not a prepared corpus: it has no {path.name}")
    meta = parse_json(read_bytes(path), path)
    of_examples = isinstance(meta, dict) and meta.get("format") == EXAMPLES_FORMAT and "template" in meta
    if not isinstance(meta, dict) or (meta.get("format") != FORMAT and not of_examples):
        raise InputError(
            f"{path} is not the meta.json of a corpus of format {FORMAT} (text) or {EXAMPLES_FORMAT} (examples): "
            "prepare the corpus again"
        )

    def check(what: str, value: object) -> None:
        for key, kind in _META_FIELDS[what].items():
            found = value.get(key) if isinstance(value, dict) else None
            valid = type(found) is kind
            valid = valid and (kind is not int or 0 <= found < 1 << 63) and (kind is not str or is_plain(found))
            if not valid:
                raise InputError(f"{path}: {what} {key} is missing or not a valid {kind.__name__}")

    check("corpus", meta)
    if of_examples:
        check("examples", meta)
    if sorted(meta["splits"]) != sorted(SPLITS):
        raise InputError(f"{path}: the splits are not {', '.join(SPLITS)}")
    for name, split in meta["splits"].items():
        check("split", split)
        if of_examples:
            check("split of examples", split)
        for shard in split["shards"] + (split["masks"] if of_examples else []):
            check("shard", shard)
            if not re.fullmatch(r"\w[\w.-]*", shard["file"], re.ASCII):  # no path, device or hidden file
                raise InputError(f"{path}: shard {shard['file']!a:.60} is not in the same folder")
        if not split["tokens"] or sum(shard["tokens"] for shard in split["shards"]) != split["tokens"]:
            raise InputError(f"{path}: the shards of split {name} do not add up to its {split['tokens']:,} tokens")
        if of_examples and [mask["tokens"] for mask in split["masks"]] != [
            shard["tokens"] for shard in split["shards"]
        ]:
            raise InputError(f"{path}: the masks of split {name} do not match its shards")
    return meta
