"""Input files: finding them by name, folder or pattern, and reading each in the state in which it was found."""

import contextlib
import fnmatch
import glob
import gzip
import hashlib
import io
import os
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from minidisp import InputError, printable

MAX_WINDOW = 1 << 28  # of a zstd file, held in memory; zstd -19 uses 8 MiB, --ultra and --long 128 MiB
MAX_UNPACKED, MAX_RATIO = 1 << 28, 200  # a file or Parquet column that exceeds both its size and ratio is rejected
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)  # errors on reading a damaged compressed file


class Bomb(EOFError):
    """A compressed file expands to so much more than its size that it cannot be text."""


def say(line: str) -> None:
    """Print a status message to stderr, as stdout is for the result."""
    print(printable(line), file=sys.stderr, flush=True)


# --- a file whose content is the same at each reading -----------------------------------------------------------------


def not_regular(name: str) -> InputError:
    return InputError(f"{name}: not a regular file; to read from a pipe, use --input -")


class Input:
    """A file as it was when this object was created: its first `bytes` bytes, even if more are appended later.

    Raises InputError if the file does not exist, and on reading if it was truncated or changed since an earlier
    reading.
    """

    def __init__(self, path: str | Path, kind: str = "text", name: str = ""):
        self.path, self.kind, self.name = path, kind, name or printable(path)
        try:
            found = os.stat(path)
        except OSError as error:
            raise InputError(f"{self.name}: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would block
            raise not_regular(self.name)
        self.bytes, self.times = found.st_size, [found.st_mtime_ns, found.st_ctime_ns]
        self.sha256: str | None = None  # known once the file has been read to its end
        self.has_grown = False  # whether the file was larger than `bytes` at the end of a reading

    def record(self) -> dict:
        """The record for a later comparison by `changed`."""
        return {"file": self.name, "bytes": self.bytes, "times": self.times, "sha256": self.sha256}

    def hash(self) -> str:
        """The sha256 of the content; reads the file if it has not been read yet."""
        if self.sha256 is None:
            self.check()
        return self.sha256

    def check(self) -> None:
        """Read the whole file; raises InputError if it changed since an earlier reading."""
        with self.open() as file:
            while file.read(1 << 20):
                pass

    def open(self) -> BinaryIO:
        """The content, as bytes."""
        try:
            return io.BufferedReader(_FixedFile(self, self.raw()), 1 << 17)
        except OSError as error:
            raise InputError(f"{self.name}: {error.strerror}") from error

    def raw(self) -> BinaryIO:
        """The file itself, for readers that need to seek."""
        return open(self.path, "rb", buffering=0)

    @contextlib.contextmanager
    def unpacked(self) -> Iterator[BinaryIO]:
        """The content, decompressed according to the file's suffix."""
        path = os.fspath(self.path).lower()
        with self.open() as file:
            if path.endswith(".gz"):
                yield io.BufferedReader(_Bounded(gzip.GzipFile(fileobj=file), self.bytes), 1 << 17)
            elif path.endswith(".zst"):
                yield io.BufferedReader(_Bounded(_Unzstd(file), self.bytes), 1 << 17)
            else:
                yield file


class StandardInput(Input):
    """Standard input, copied to a temporary file in `folder` that disappears with this process."""

    def __init__(self, folder: Path, kind: str):
        if sys.stdin is None:
            raise InputError("--input -: there is no standard input")
        self.path, self.kind, self.name = "-", kind, "standard input"
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (outlives the call)
        shutil.copyfileobj(sys.stdin.buffer, self._file, 1 << 20)
        self._file.flush()
        self.bytes, self.times, self.sha256, self.has_grown = self._file.tell(), [], None, False

    def raw(self) -> BinaryIO:
        self._file.seek(0)
        return os.fdopen(os.dup(self._file.fileno()), "rb", buffering=0)


class _FixedFile(io.RawIOBase):
    """The first `bytes` bytes of an Input; at the end, checks that they are those of the earlier readings."""

    def __init__(self, source: Input, file: BinaryIO):
        self._source, self._file, self._left, self._digest = source, file, source.bytes, hashlib.sha256()
        if not self._left:
            self._finish()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if not self._left:
            return 0
        part = memoryview(buffer)[: self._left]
        try:
            n = self._file.readinto(part)
        except OSError as error:
            raise InputError(f"{self._source.name}: {error.strerror}") from error
        if not n:
            raise InputError(f"{self._source.name} was truncated while it was read: run this again when it is complete")
        self._digest.update(part[:n])
        self._left -= n
        if not self._left:
            self._finish()
        return n

    def _finish(self) -> None:
        source, found = self._source, self._digest.hexdigest()
        source.has_grown = os.fstat(self._file.fileno()).st_size > source.bytes
        if found != (source.sha256 or found):
            raise InputError(f"{source.name} changed while it was read: run this again when it is complete")
        source.sha256 = found

    def close(self) -> None:
        self._file.close()
        super().close()


class _Unzstd(io.RawIOBase):
    """The content of a zstd file of one or more frames. Raises EOFError if the last one is incomplete."""

    def __init__(self, file: BinaryIO):
        try:
            import zstandard
        except ImportError as error:
            raise InputError("a .zst file needs the optional package zstandard: pip install zstandard") from error
        self._file, self._damage = file, zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj
        self._frame, self._packed, self._content = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._content:
            self._packed = self._packed or self._file.read(256)  # this can decompress to 8 MiB
            if not self._packed:
                if self._frame:
                    raise EOFError
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._content = memoryview(self._frame.decompress(self._packed))
            except self._damage as error:
                if "memory" in str(error):
                    raise InputError(
                        f"a .zst file needs a window of more than {MAX_WINDOW:,} bytes: recompress it without --long"
                    ) from error
                raise zlib.error(str(error)) from error
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._content))
        buffer[:n] = self._content[:n]
        self._content = self._content[n:]
        return n


class _Bounded(io.RawIOBase):
    """The content of a compressed file of that many bytes. Raises Bomb if it is larger than any text could be."""

    def __init__(self, unpacked: io.RawIOBase, packed_bytes: int):
        self._unpacked, self._packed_bytes, self._bytes = unpacked, packed_bytes, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        n = self._unpacked.readinto(buffer)
        self._bytes += n
        if self._bytes > max(MAX_UNPACKED, MAX_RATIO * self._packed_bytes):
            raise Bomb(f"{self._packed_bytes:,} bytes expand to more than {self._bytes - n:,}, so it is not text")
        return n


def changed(before: list[dict], inputs: list[Input]) -> str:
    """The first difference between the files that a corpus was made from and the current ones; "" if there is none.

    Files are compared by size and times, and by content only if these differ or are unknown.
    """
    known, now = {record["file"]: record for record in before}, {file.name for file in inputs}
    for name in known:
        if name not in now:
            return f"{name} is gone"
    for file in inputs:
        record = known.get(file.name)
        if record is None:
            return f"{file.name} is new"
        if record["bytes"] != file.bytes:
            return f"{file.name} has changed: {file.bytes:,} bytes, not {record['bytes']:,}"
        if (record["times"] != file.times or not file.times) and record["sha256"] != file.hash():
            return f"{file.name} has changed"
    return ""


# --- finding files ----------------------------------------------------------------------------------------------------


def matches(pattern: str) -> list[str]:
    """The files for a path, folder or glob pattern. An existing path takes precedence over a pattern."""
    if os.path.isdir(pattern):
        return sorted(path for path in _expand(pattern, ["**"]) if not os.path.isdir(path))
    if os.path.islink(pattern) and not os.path.exists(pattern):
        raise InputError(
            f"--input {printable(pattern)}: a link to {printable(os.readlink(pattern))}, which does not exist"
        )
    if os.path.lexists(pattern):
        return [pattern]
    found = sorted({*_expand("", [*Path(pattern).parts])} - {""})
    if files := [path for path in found if not os.path.isdir(path)]:
        return files
    if found:
        raise InputError(f"--input {printable(pattern)}: only folders match: pass a folder to read all files in it")
    try:
        os.lstat(pattern)
    except PermissionError as error:
        raise InputError(f"--input {printable(pattern)}: {error.strerror}") from error
    except OSError as error:
        raise InputError(f"--input {printable(pattern)}: no such file") from error
    return [pattern]  # created in the meantime


def _expand(prefix: str, parts: list[str]) -> Iterator[str]:
    """Like glob below `prefix`, but an existing name takes precedence over a pattern, and ** enters a folder once."""
    if not parts:
        yield prefix
        return
    part, *rest = parts
    if part == "**":
        for folder in _folders(prefix):
            if rest:
                yield from _expand(folder, rest)
            else:
                yield from (os.path.join(folder, name) for name in _listed(folder))
    elif os.path.lexists(path := os.path.join(prefix, part)):
        yield from _expand(path, rest)
    elif glob.has_magic(part) and os.path.isdir(prefix or "."):
        for name in fnmatch.filter(os.listdir(prefix or "."), part):
            if part.startswith(".") or not name.startswith("."):
                yield from _expand(os.path.join(prefix, name), rest)


def _folders(folder: str) -> Iterator[str]:
    """A folder and all non-hidden folders below it; each once, even if several links lead to it."""
    waiting, seen = [folder], set()
    while waiting:
        folder = waiting.pop()
        if os.path.isdir(folder or ".") and (real := os.path.realpath(folder)) not in seen:
            seen.add(real)
            yield folder
            waiting += [os.path.join(folder, name) for name in _listed(folder)]


def _listed(folder: str) -> list[str]:
    """The non-hidden names in a folder."""
    return [name for name in os.listdir(folder or ".") if not name.startswith(".")]


def identity(path: str) -> tuple[int, int] | str:
    """A key that is equal for all paths and hard links to one file."""
    found = os.stat(path)  # file systems without inodes have no hard links
    return (found.st_dev, found.st_ino) if found.st_nlink > 1 else os.path.realpath(path)
