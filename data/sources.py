"""Any input as documents: text files, files of rows, folders of both, standard input, and data sets of the hub.

A reader yields documents, and a BadRow in the place of what cannot be used: whoever reads decides what becomes of it.
A file is read more than once, and has to be the same each time: see Input.
"""

import contextlib
import fnmatch
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

from tqdm import tqdm

from minidisp import InputError, is_plain

BLOCK_CHARS = 1 << 18  # files are read, and long ones encoded, in blocks of about this size
MAX_ROW_BYTES = 1 << 28  # of a line of .jsonl and a row of .json: it is held in memory
KINDS = {
    ".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet"
}  # fmt: skip
PACKED = (".gz", ".zst")
ENDINGS = f"only {' '.join(KINDS)} files are read, also as .gz and .zst"
BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    name: str  # for messages: a file, or a line of one
    blocks: Iterable[str]  # the text, in consecutive parts


class BadRow(InputError):
    """A row, or a file, that cannot be used. `reason` is one of a few, for the counts; the message says it in full."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Source(NamedTuple):
    description: str  # kept in meta.json; another one is another corpus
    documents: Callable[[], Iterator[Document | BadRow]]  # from the start at each call
    inputs: "list[Input] | None" = None  # the files that it reads; None: not known before it is read
    fetch: "Callable[[Path, int, bool], Source] | None" = None  # see hugging_face: what is expensive is read once


def say(line: str) -> None:
    """A line for the person at the terminal, beside the result on stdout."""
    print(line, file=sys.stderr, flush=True)


def printable(text: str | Path) -> str:
    """A text on one line, with an escape for what cannot be printed: bytes that are no UTF-8 in a file's name, newlines."""
    text = os.fsencode(text).decode("utf-8", errors="backslashreplace")
    return "".join(c if is_plain(c) else c.encode("unicode_escape").decode() for c in text)


# --- a file, the same each time that it is read -----------------------------------------------------------------------


class Input:
    """A file as it was when this object was made: its first `bytes` bytes, also if others are appended meanwhile.

    InputError if there is no such file, and on reading if it has become shorter or another reading saw other bytes.
    """

    def __init__(self, path: str | Path, kind: str = "text", name: str = ""):
        self.path, self.kind, self.name = path, kind, name or printable(path)
        try:
            found = os.stat(path)
        except OSError as error:
            raise InputError(f"{self.name}: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            raise InputError(f"{self.name}: not a regular file; what comes out of a pipe can be read with --input -")
        self.bytes, self.times = found.st_size, [found.st_mtime_ns, found.st_ctime_ns]
        self.sha256: str | None = None  # known when the file has been read to its end
        self.has_grown = False  # at the end of a reading: there are more bytes than were read

    def record(self) -> dict:
        """What `changed` compares with later on."""
        return {"file": self.name, "bytes": self.bytes, "times": self.times, "sha256": self.sha256}

    def hash(self) -> str:
        """The sha256 of the content; reads the file unless it has been read already."""
        if self.sha256 is None:
            with self.open() as file:
                while file.read(1 << 20):
                    pass
        return self.sha256

    def open(self) -> BinaryIO:
        """The content, as bytes."""
        try:
            return io.BufferedReader(_FixedFile(self, self._raw()), 1 << 17)
        except OSError as error:
            raise InputError(f"{self.name}: {error.strerror}") from error

    def _raw(self) -> BinaryIO:
        return open(self.path, "rb", buffering=0)

    @contextlib.contextmanager
    def unpacked(self) -> Iterator[BinaryIO]:
        """The content, decompressed as the file's name says."""
        path = os.fspath(self.path).lower()
        with self.open() as file:
            if path.endswith(".gz"):
                yield gzip.GzipFile(fileobj=file)
            elif path.endswith(".zst"):
                yield io.BufferedReader(_Unzstd(file))
            else:
                yield file


class StandardInput(Input):
    """What standard input holds, copied to a file without a name in `folder`, which is gone when this process is."""

    def __init__(self, folder: Path, kind: str):
        if sys.stdin is None:
            raise InputError("--input -: there is no standard input")
        self.path, self.kind, self.name = "-", kind, "standard input"
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (lives as long as this object)
        shutil.copyfileobj(sys.stdin.buffer, self._file, 1 << 20)
        self._file.flush()
        self.bytes, self.times, self.sha256, self.has_grown = self._file.tell(), [], None, False

    def _raw(self) -> BinaryIO:
        self._file.seek(0)
        return os.fdopen(os.dup(self._file.fileno()), "rb", buffering=0)


class _FixedFile(io.RawIOBase):
    """The first bytes of a file, as many as its Input says, and checked at the end to be those of the last reading."""

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
        n = self._file.readinto(part)
        if not n:
            raise InputError(f"{self._source.name} became shorter while it was read: prepare it when it is at rest")
        self._digest.update(part[:n])
        self._left -= n
        if not self._left:
            self._finish()
        return n

    def _finish(self) -> None:
        source, found = self._source, self._digest.hexdigest()
        source.has_grown = os.fstat(self._file.fileno()).st_size > source.bytes
        if found != (source.sha256 or found):
            raise InputError(f"{source.name} changed while it was read: prepare it when it is at rest")
        source.sha256 = found

    def close(self) -> None:
        self._file.close()
        super().close()


class _Unzstd(io.RawIOBase):
    """The content of a zstd file of one or more frames. EOFError if the last one is cut off."""

    def __init__(self, file: BinaryIO):
        try:
            import zstandard
        except ImportError as error:
            raise InputError("a .zst file needs the optional package zstandard: pip install 'minidisp[zst]'") from error
        self._file, self._new_frame, self._damage = (
            file,
            zstandard.ZstdDecompressor().decompressobj,
            zstandard.ZstdError,
        )
        self._frame, self._packed, self._content = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._content:
            self._packed = self._packed or self._file.read(1 << 13)
            if not self._packed:
                if self._frame:
                    raise EOFError
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._content = memoryview(self._frame.decompress(self._packed))
            except self._damage as error:
                raise zlib.error(str(error)) from error
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._content))
        buffer[:n] = self._content[:n]
        self._content = self._content[n:]
        return n


DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)


def damaged(file: Input, where: str) -> BadRow:
    kind = next((packed[1:].replace("gz", "gzip").replace("zst", "zstd") for packed in PACKED
                 if os.fspath(file.path).lower().endswith(packed)), file.kind)  # fmt: skip
    return BadRow(f"damaged {kind}", f"{file.name}: damaged {kind} file, after {where}")


def changed(before: list[dict], inputs: list[Input]) -> str:
    """What differs between the files that a corpus was made from and those there are now; "" if nothing does.

    Files are compared by size and times, and only where these leave it open by their content.
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


# --- readers, one for each kind of file -------------------------------------------------------------------------------


def blocks_of(file: TextIO) -> Iterator[str]:
    """The text of an open file in blocks that end where a line ends, unless a line is very long."""
    while block := file.read(BLOCK_CHARS):
        yield block + file.readline(BLOCK_CHARS)


def text_document(name: str, text: str) -> Document:
    return Document(name, blocks_of(io.StringIO(text, newline="")))


def text_blocks(file: Input) -> Iterator[str]:
    """The text of a UTF-8 file, unchanged but for a byte-order mark at its start, in blocks. BadRow if it is no text."""
    lines = 1
    try:
        # Bytes that are no UTF-8 become half surrogate pairs, which no UTF-8 text has: that tells where they are.
        with (
            file.unpacked() as unpacked,
            io.TextIOWrapper(unpacked, "utf-8-sig", "surrogateescape", newline="") as text,
        ):
            for block in blocks_of(text):
                try:
                    block.encode("utf-8")
                except UnicodeEncodeError as error:
                    if not (file.has_grown and len(block) - error.start < 4 and not text.read(1)):
                        raise _no_text(file, block, lines, error.start) from error
                    block = block[: error.start]  # the end of a character that is still being written
                if "\0" in block:
                    raise _no_text(file, block, lines, block.index("\0"))
                yield block
                lines += block.count("\n")
    except DAMAGE as error:
        raise damaged(file, f"line {lines}") from error


def _no_text(file: Input, block: str, lines: int, at: int) -> BadRow:
    line = lines + block.count("\n", 0, at)
    start = block[:2].encode("utf-8", "surrogateescape")[:2] if lines == 1 else b""
    if start in (b"\xff\xfe", b"\xfe\xff"):
        return BadRow("UTF-16", f"{file.name}: UTF-16 text, not UTF-8; convert it (iconv -f UTF-16 -t UTF-8)")
    if start == b"\x1f\x8b":
        return BadRow("binary", f"{file.name}: a gzip file without .gz at the end of its name")
    if block[at] == "\0":
        return BadRow("binary", f"{file.name}: a binary file (it has NUL bytes, the first in line {line}), not text")
    return BadRow("not UTF-8", f"{file.name}: not UTF-8 text, in line {line}; convert it, or leave it out")


def text_file(path: str | Path) -> Iterator[Document]:
    """The document that a UTF-8 file is."""
    yield Document(printable(path), text_blocks(Input(path)))


def row(record: object, field: str, flag: str, where: str) -> Document | BadRow:
    """The document of record[field], or of the record itself if that is a text."""
    text = record
    if isinstance(record, dict):
        if field not in record:
            fields = ", ".join(map(str, record)) or "none at all"
            return BadRow("no such field", f"{where}: no field {field!r} but {fields}; see {flag}")
        text = record[field]
    elif not isinstance(record, str):
        return BadRow("not an object", f"{where}: not a JSON object")
    if not isinstance(text, str):
        reason = "null" if text is None else "not a text"
        return BadRow(reason, f"{where}: field {field!r} is not a text but {json.dumps(text, default=str)[:40]}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell what is not Unicode: "\ud83d"
        fault = f"half a surrogate pair at character {error.start}"
        return BadRow("half a surrogate pair", f"{where}: field {field!r} has {fault}")
    return text_document(where, text)


def text_rows(file: Input, field: str) -> Iterator[Document | BadRow]:
    yield Document(file.name, text_blocks(file))


def jsonl_rows(file: Input, field: str) -> Iterator[Document | BadRow]:
    """One document per line of JSON; blank lines are skipped."""
    number = 0
    try:
        with file.unpacked() as lines:
            while line := lines.readline(MAX_ROW_BYTES):
                number += 1
                item = _jsonl_row(line.removeprefix(BOM) if number == 1 else line, field, file.name, number)
                while len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):  # the rest of a line that is too long
                    line = lines.readline(MAX_ROW_BYTES)
                if item and not (isinstance(item, BadRow) and file.has_grown and not line.endswith(b"\n")):
                    yield item  # else blank, or a last line that is still being written
    except DAMAGE:
        yield damaged(file, f"line {number}")


def _jsonl_row(line: bytes, field: str, name: str, number: int) -> Document | BadRow | None:
    where = f"{name}, line {number}"
    if not line.strip():
        return None
    if len(line) == MAX_ROW_BYTES:
        return BadRow("too long", f"{where}: longer than {MAX_ROW_BYTES:,} bytes")
    try:
        return row(json.loads(line.decode("utf-8")), field, "--field", where)
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"{name}: not UTF-8 text ({error.reason}), in line {number}")
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", f"{where}: not JSON ({error})")


def json_rows(file: Input, field: str) -> Iterator[Document | BadRow]:
    """One document per element of a JSON array, or per value if there is a sequence of them; read piece by piece."""
    decode, blank = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    number, at, buffer, array = 0, 0, "", None
    try:
        with file.unpacked() as unpacked, io.TextIOWrapper(unpacked, "utf-8-sig", newline="") as text:
            while True:
                at = blank.match(buffer, at).end()
                where = f"{file.name}, row {number + 1}"
                if array is None and at < len(buffer):
                    array = buffer[at] == "["
                    at += array
                    continue
                if array and buffer.startswith("]", at):
                    return
                try:
                    value, end = decode(buffer, at)
                    if end == len(buffer) and buffer[-1] not in '}]"':
                        raise ValueError("it may go on")
                except (ValueError, RecursionError) as error:  # not JSON, or not all of it
                    buffer, at = buffer[at:], 0
                    more = text.read(max(BLOCK_CHARS, len(buffer))) if len(buffer) < MAX_ROW_BYTES else ""
                    if not more:
                        if buffer or array:
                            yield BadRow("not JSON", f"{where}: not JSON ({error})")
                        return
                    buffer += more
                    continue
                number, at = number + 1, end
                yield row(value, field, "--field", where)
    except UnicodeDecodeError as error:
        yield BadRow("not UTF-8", f"{file.name}: not UTF-8 text ({error.reason}), after row {number}")
    except DAMAGE:
        yield damaged(file, f"row {number}")


def parquet_rows(file: Input, field: str) -> Iterator[Document | BadRow]:
    """One document per row of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            "a .parquet file needs the optional package pyarrow: pip install 'minidisp[parquet]'"
        ) from error
    number = 0
    file.hash()
    try:
        with open(file.path, "rb") as opened, pyarrow.parquet.ParquetFile(opened) as table:
            if field not in (names := table.schema_arrow.names):
                message = f"{file.name}: no column {field!r} but {', '.join(names)}; see --field"
                yield BadRow("no such field", message)
                return
            for batch in table.iter_batches(batch_size=1000, columns=[field]):
                for value in batch.column(0):
                    number += 1
                    where = f"{file.name}, row {number}"
                    try:
                        yield row({field: value.as_py()}, field, "--field", where)
                    except UnicodeDecodeError as error:
                        yield BadRow("not UTF-8", f"{where}: not UTF-8 text ({error.reason})")
    except (pyarrow.ArrowException, OSError):
        yield damaged(file, f"row {number}")


READERS = {"text": text_rows, "jsonl": jsonl_rows, "json": json_rows, "parquet": parquet_rows}


# --- which files ------------------------------------------------------------------------------------------------------


def kind_of(path: str) -> str:
    """How to read a file, by its name: a key of READERS, or "" where the name does not say."""
    name = path.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    kind = KINDS.get(os.path.splitext(name)[1], "")
    return "" if kind == "parquet" and path.lower().endswith(PACKED) else kind  # it is compressed inside


def input_files(
    patterns: list[str], field: str = "text", kind: str = "", skip: bool = False, folder: Path | None = None
) -> Source:
    """The files that names, folders and glob patterns mean, in this order and sorted within each, every file once.

    kind: how to read them, a key of READERS; "" = as their names say, and text for standard input, which is written -.
    skip: a text file that turns out to be none gives a BadRow and no document, so it is read to its end beforehand.
    folder: where standard input is copied to, as it is read more than once; by default the system's place for that.
    """
    inputs: list[Input] = []
    names, left_out = {}, {}  # of each file, the name that it is read under; of each that is not read, why
    for pattern in dict.fromkeys(map(os.path.expanduser, patterns)):
        if pattern == "-":
            inputs.append(StandardInput(folder, kind or "text"))
            continue
        found = len(names)
        for path in _matches(pattern):
            name, file_kind = printable(path), kind or kind_of(path)
            if path != pattern and not os.path.isfile(path):
                left_out[name] = "is not a regular file" if os.path.exists(path) else "is a link that leads nowhere"
            elif not file_kind and os.path.isdir(pattern):
                left_out[name] = "does not end like a text"
            elif not file_kind:
                raise InputError(f"{name}: {ENDINGS}; see --format")
            elif (identity := _identity(path)) not in names:
                names[identity] = name
                inputs.append(Input(path, file_kind))
            elif names[identity] != name:
                left_out[name] = f"is the same file as {names[identity]}"
        if len(names) == found and not any(" same file " in reason for reason in left_out.values()):
            why = "; ".join(f"{name} {reason}" for name, reason in [*left_out.items()][:1]) or "it is empty"
            raise InputError(f"--input {printable(pattern)}: nothing to read there: {why} ({ENDINGS}; see --format)")
    for number, (name, reason) in enumerate(left_out.items(), 1):
        if number == 5 < len(left_out):
            say(f"left out, too: {len(left_out) - 4:,} more files")
            break
        say(f"left out: {name} {reason}")

    def documents() -> Iterator[Document | BadRow]:
        for file in inputs:
            if skip and file.kind == "text" and (bad := _fault(file)):
                yield bad
            else:
                yield from READERS[file.kind](file, field)

    has_rows = any(file.kind != "text" for file in inputs)
    return Source(" ".join(map(printable, patterns)) + (f", field {field}" if has_rows else ""), documents, inputs)


def _matches(pattern: str) -> list[str]:
    """The paths that a name, a folder or a glob pattern means. What is there under this name is meant, not a pattern."""
    if os.path.isdir(pattern):
        return sorted(_expand(pattern, ["**"]))
    if os.path.islink(pattern) and not os.path.exists(pattern):
        raise InputError(
            f"--input {printable(pattern)}: a link to {printable(os.readlink(pattern))}, which is not there"
        )
    if os.path.lexists(pattern):
        return [pattern]
    found = sorted({*_expand("", [*Path(pattern).parts])})
    if files := [path for path in found if not os.path.isdir(path)]:
        return files
    if found:
        raise InputError(f"--input {printable(pattern)}: only folders match; name a folder to read all that is in it")
    raise InputError(f"--input {printable(pattern)}: no such file")


def _expand(prefix: str, parts: list[str]) -> Iterator[str]:
    """What glob finds below `prefix`; but a part with brackets is a name first, and ** enters a folder only once."""
    if not parts:
        yield prefix
        return
    part, *rest = parts
    if part == "**":
        for folder in _folders(prefix):
            yield from _expand(folder, rest or ["*"])
    elif os.path.lexists(path := os.path.join(prefix, part)):
        yield from _expand(path, rest)
    elif glob.has_magic(part) and os.path.isdir(prefix or "."):
        for name in fnmatch.filter(os.listdir(prefix or "."), part):
            if part.startswith(".") or not name.startswith("."):
                yield from _expand(os.path.join(prefix, name), rest)


def _folders(folder: str) -> Iterator[str]:
    """A folder and all those below it, without hidden ones; each once, whatever links lead to it."""
    waiting, seen = [folder], set()
    while waiting:
        folder = waiting.pop()
        if os.path.isdir(folder or ".") and (real := os.path.realpath(folder)) not in seen:
            seen.add(real)
            yield folder
            waiting += [os.path.join(folder, name) for name in os.listdir(folder or ".") if not name.startswith(".")]


def _identity(path: str) -> object:
    """The same for all paths and hard links that lead to one file."""
    found = os.stat(path)  # file systems without inodes have no hard links
    return (found.st_dev, found.st_ino) if found.st_nlink > 1 else os.path.realpath(path)


def _fault(file: Input) -> BadRow | None:
    """Why a text file is no text."""
    try:
        for _ in text_blocks(file):
            pass
    except BadRow as bad:
        return bad
    return None


# --- Hugging Face -----------------------------------------------------------------------------------------------------

STATE_EVERY = 1000  # rows


class _Fetched(NamedTuple):
    """What a file of fetched rows holds. Its lines: the source, then texts, bad rows, now and then where the stream is."""

    rows: int = 0
    texts: int = 0
    state: dict | None = None  # of the stream, after these rows
    ended: bool = False

    @classmethod
    def of(cls, copy: Path, source: str, skip: bool) -> "_Fetched":
        """Cut the file back to where fetching can go on, which is its start if it is of another source."""
        found, at_state, kept, bad = cls(), (cls(), 0), 0, False
        with open(copy, "a+b") as file:
            file.seek(0)
            for line in file:
                try:
                    value = json.loads(line)
                except ValueError:  # the last one, torn when the process was killed
                    break
                if not kept and value != {"source": source}:
                    break
                kept += len(line)
                if isinstance(value, str):
                    found = found._replace(rows=found.rows + 1, texts=found.texts + 1)
                elif "bad" in value:
                    found, bad = found._replace(rows=found.rows + 1), True
                elif "state" in value:
                    found = found._replace(state=value["state"])
                    at_state = found, kept
                found = found._replace(ended="end" in value)
            if bad and not skip:  # the rows that were left out are wanted now, or an error
                found, kept = cls(), 0
            elif found.state is not None and not found.ended:
                found, kept = at_state
            file.truncate(kept)
            if not kept:
                file.write(json.dumps({"source": source}).encode() + b"\n")
        return found


def hugging_face(spec: str, column: str, split: str = "train") -> Source:
    """A split of a data set NAME or NAME:CONFIG of the Hugging Face hub, one document per row.

    Its `fetch` streams the rows into a file, and goes on where an earlier call for the same file was cut off.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError("--hf needs the optional package datasets: pip install 'minidisp[datasets]'") from error
    name, _, config = spec.partition(":")
    description = printable(
        f"Hugging Face dataset {spec}, column {column}" + (f", split {split}" if split != "train" else "")
    )

    def stream_after(done: _Fetched) -> Iterable[dict]:
        stream = datasets.load_dataset(name, config or None, split=split, streaming=True)
        if done.state is not None:
            stream.load_state_dict(done.state)
        elif done.rows:
            return stream.skip(done.rows) if hasattr(stream, "skip") else itertools.islice(stream, done.rows, None)
        return stream

    def fetch(copy: Path, limit: int, skip: bool) -> Source:
        """Bring `limit` documents, or all for 0, to the file `copy`. skip: bad rows are left out."""
        done = _Fetched.of(copy, description, skip)
        rows, texts = done.rows, done.texts
        if rows:
            say(f"--hf {spec}: going on after {rows:,} rows")
        stream = None
        progress = tqdm(desc="downloading", unit="doc", initial=rows, leave=False, disable=None)
        with open(copy, "a", encoding="utf-8") as file, progress:

            def write(value: object) -> None:
                file.write(json.dumps(value) + "\n")

            def write_state() -> None:
                if hasattr(stream, "state_dict"):
                    write({"state": stream.state_dict()})
                file.flush()

            try:
                if not done.ended and not 0 < limit <= texts:
                    stream = stream_after(done)
                    for record in stream:
                        item = row(record, column, "--hf-column", f"--hf {spec}, row {rows + 1}")
                        if isinstance(item, BadRow) and not skip:
                            raise item
                        write({"bad": item.reason} if isinstance(item, BadRow) else "".join(item.blocks))
                        rows, texts = rows + 1, texts + isinstance(item, Document)
                        progress.update()
                        if rows % STATE_EVERY == 0:
                            write_state()
                        if texts == limit:
                            break
                    else:
                        write({"end": True})
            except InputError:
                raise
            except Exception as error:  # of datasets, of its hub client, of a dozen file formats
                reason = str(error).partition("\n")[0]
                kept = ""
                if rows:
                    write_state()
                    kept = f"; {rows:,} rows are kept: type the same command again to go on"
                raise InputError(f"--hf {spec}: {type(error).__name__}: {reason}{kept}") from error
            finally:
                if not rows:
                    copy.unlink()

        def documents() -> Iterator[Document | BadRow]:
            with open(copy, "rb") as lines:
                for number, line in enumerate(lines):
                    value, where = json.loads(line), f"--hf {spec}, document {number}"
                    if isinstance(value, str):
                        yield text_document(where, value)
                    elif "bad" in value:
                        yield BadRow(value["bad"], where)

        return Source(description, documents, [Input(copy)])

    return Source(description, lambda: iter(()), None, fetch)
