"""Inputs as documents: text files, files of rows, and standard input.

A reader yields documents, and a BadRow for anything that cannot be used, which the caller raises or skips.
"""

import contextlib
import csv
import functools
import glob
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from data.files import DAMAGE, MAX_RATIO, MAX_UNPACKED, Bomb, Input, StandardInput, identity, matches, not_regular, say
from minidisp import InputError, printable
from minidisp.examples import FIELDS, Unusable, as_messages, as_text, text_of
from minidisp.runtime.limits import limited_memory

BLOCK_CHARS = 1 << 18  # files are read, and long ones encoded, in blocks of about this size
# Limits for a row, which is held in memory twice with up to four bytes per character: its size, and the number of
# commas and brackets, since a JSON value can take 170 bytes per comma.
MAX_ROW_BYTES, MAX_ROW_VALUES = 1 << 26, 2_000_000
MAX_PARQUET = 1 << 29  # bytes of memory for reading a few rows of Parquet
KINDS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
PACKED = {".gz": "gzip", ".zst": "zstd"}
ENDINGS = f"only {' '.join(KINDS)} files are read, optionally with .gz or .zst"
BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    name: str  # for messages: a file, or a line in it
    blocks: Iterable[str]  # the text, in consecutive parts
    messages: list[dict[str, str]] | None = None  # of an example, whose text is that of as_text, in one part
    fields: Sequence[str] = ()  # of an example: those of its row that it was recognised by


class BadRow(InputError):
    """A row or file that cannot be used. `reason`: a short one, by which such rows are counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Source(NamedTuple):
    description: str  # stored in meta.json; a different one means a different corpus
    documents: Callable[[], Iterator[Document | BadRow]]  # starts over at each call
    inputs: list[Input] | None = None  # the files that it reads; None: unknown before reading
    fetch: "Callable[[Path, int, bool], Source] | None" = None  # copies a remote source to a file; see hugging_face


# --- readers, one per file format -------------------------------------------------------------------------------------


def damaged(file: Input, where: str, error: Exception) -> BadRow:
    if isinstance(error, Bomb):
        return BadRow("too long", f"{file.name}, after {where}: {error}")
    kind = next((kind for ending, kind in PACKED.items() if file.name.lower().endswith(ending)), file.kind)
    return BadRow(f"damaged {kind}", f"{file.name}: damaged {kind} file, after {where}")


def blocks_of(file: TextIO) -> Iterator[str]:
    """The text of an open file in blocks that end at a line end, unless a line is very long."""
    while block := file.read(BLOCK_CHARS):
        yield block + file.readline(BLOCK_CHARS)


def text_document(name: str, text: str) -> Document:
    """A document from a text in memory."""
    if len(text) <= BLOCK_CHARS:
        return Document(name, [text])
    return Document(name, blocks_of(io.StringIO(text, newline="")))


def text_blocks(file: Input) -> Iterator[str]:
    """The text of a UTF-8 file in blocks, without a byte-order mark. Raises BadRow if it is not text."""
    lines = 1
    try:
        # Invalid bytes become lone surrogates, which are not valid UTF-8, so encoding a block again locates them.
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
        raise damaged(file, f"line {lines}", error) from error


def _no_text(file: Input, block: str, lines: int, at: int) -> BadRow:
    line = lines + block.count("\n", 0, at)
    start = block[:2].encode("utf-8", "surrogateescape")[:2] if lines == 1 else b""
    if start in (b"\xff\xfe", b"\xfe\xff"):
        return BadRow("UTF-16", f"{file.name}: UTF-16 text, not UTF-8: convert it (iconv -f UTF-16 -t UTF-8)")
    if start == b"\x1f\x8b":
        return BadRow("binary", f"{file.name}: a gzip file whose name does not end in .gz: rename or decompress it")
    if block[at] == "\0":
        return BadRow("binary", f"{file.name}: a binary file, not text: line {line} has a NUL byte")
    return BadRow("not UTF-8", f"{file.name}: not UTF-8 text, in line {line}: convert it, or leave it out")


def text_file(path: str | Path) -> Iterator[Document]:
    """A UTF-8 file as one document."""
    yield Document(printable(path), text_blocks(Input(path)))


def row(record: object, field: str, flag: str, where: str) -> Document | BadRow:
    """A row as a document: the string in record[field], the record itself if it is a string, or else an example."""
    text = record
    if isinstance(record, dict):
        if field not in record:
            try:
                messages = as_messages(record) if field == "text" else None
            except Unusable as error:
                return BadRow(error.reason, f"{where}: {error}")
            if messages:
                return Document(where, [as_text(messages)], messages, [name for name in FIELDS if name in record])
            fields = printable(", ".join(map(str, [*record][:20]))[:200]) or "none at all"
            return BadRow("no such field", f"{where}: no field {field!r}, only {fields}; see {flag}")
        text = record[field]
    elif not isinstance(record, str):
        return BadRow("not an object", f"{where}: not a JSON object")
    try:
        return text_document(where, text_of(text, field))
    except Unusable as error:
        return BadRow(error.reason, f"{where}: {error}")


def text_rows(file: Input, field: str) -> Iterator[Document | BadRow]:
    yield Document(file.name, text_blocks(file))


def jsonl_rows(file: Input, field: str) -> Iterator[Document | BadRow]:
    """One document per line of JSON; blank lines are skipped."""
    number = blank = 0
    try:
        with file.unpacked() as lines:
            while line := lines.readline(MAX_ROW_BYTES):
                number += 1
                blank = 0 if line.strip() else blank + 1
                if blank > MAX_ROW_VALUES:
                    yield BadRow("too long", f"{file.name}, line {number}: more than {MAX_ROW_VALUES:,} blank lines")
                    return
                item = _jsonl_row(line.removeprefix(BOM) if number == 1 else line, field, file.name, number)
                if item and not (isinstance(item, BadRow) and file.has_grown and not line.endswith(b"\n")):
                    yield item  # otherwise a blank line, or a last line that is still being written
                while len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):  # skip the rest of an overlong line
                    line = lines.readline(MAX_ROW_BYTES)
    except DAMAGE as error:
        yield damaged(file, f"line {number}", error)


def _jsonl_row(line: bytes, field: str, name: str, number: int) -> Document | BadRow | None:
    where = f"{name}, line {number}"
    if not line.strip():
        return None
    if len(line) == MAX_ROW_BYTES:
        return BadRow("too long", f"{where}: longer than {MAX_ROW_BYTES:,} bytes")
    if len(line) > MAX_ROW_VALUES and _values(line) > MAX_ROW_VALUES:
        return BadRow("too many values", f"{where}: more than {MAX_ROW_VALUES:,} commas and brackets in one row")
    try:
        return row(json.loads(line.decode("utf-8")), field, "--field", where)
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"{name}: not UTF-8 text ({error.reason}), in line {number}")
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", f"{where}: not JSON ({error})")


def _values(json_text: str | bytes) -> int:
    """An upper bound of the number of JSON values: commas and brackets, including those inside strings."""
    return sum(map(json_text.count, ",[{" if isinstance(json_text, str) else b",[{"))


def json_rows(file: Input, field: str) -> Iterator[Document | BadRow]:
    """One document per element of each JSON array, or per value if there is no array; read incrementally."""
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
                if array and buffer.startswith("]", at):  # another array may follow, in concatenated files
                    array, at = None, at + 1
                    continue
                try:
                    value, end = decode(buffer, at)
                    if end == len(buffer) and buffer[-1] not in '}]"':
                        raise ValueError("it may continue")
                except (ValueError, RecursionError) as error:  # invalid or incomplete
                    buffer, at = buffer[at:], 0
                    left = MAX_ROW_BYTES - len(buffer)
                    more = text.read(min(max(BLOCK_CHARS, len(buffer)), left)) if left > 0 else ""
                    if not more:
                        if buffer or array:
                            yield BadRow("not JSON", f"{where}: not JSON ({error})")
                        return
                    buffer += more
                    if len(buffer) > MAX_ROW_VALUES and _values(buffer) > MAX_ROW_VALUES:
                        fault = f"more than {MAX_ROW_VALUES:,} commas and brackets in one row, or not JSON"
                        yield BadRow("too many values", f"{where}: {fault}")
                        return
                    continue
                number, at = number + 1, end
                yield row(value, field, "--field", where)
    except UnicodeDecodeError as error:
        yield BadRow("not UTF-8", f"{file.name}: not UTF-8 text ({error.reason}), after row {number}")
    except DAMAGE as error:
        yield damaged(file, f"row {number}", error)


def csv_rows(file: Input, field: str) -> Iterator[Document | BadRow]:
    """One document per row; the first row names the columns, which are separated by commas, semicolons or tabs."""
    number, taken, values, line, delimiter = 0, 0, 0, "", ""
    csv.field_size_limit(MAX_ROW_BYTES)

    def lines(text: TextIO) -> Iterator[str]:
        """The lines of the file. Raises BadRow if those of one row exceed the limits."""
        nonlocal taken, values, line
        while line := text.readline(MAX_ROW_BYTES):
            taken, values = taken + len(line), values + 1 + line.count(delimiter or ",")
            if taken >= MAX_ROW_BYTES or values > MAX_ROW_VALUES:
                fault = f"more than {MAX_ROW_BYTES:,} characters or {MAX_ROW_VALUES:,} columns and lines"
                fault += "; is a quote not closed?"
                raise BadRow("too long", f"{file.name}, row {number + 1}: {fault}")
            yield line

    try:
        with (
            file.unpacked() as unpacked,
            io.TextIOWrapper(unpacked, "utf-8-sig", "surrogateescape", newline="") as text,
        ):
            first = next(lines(text), "")
            delimiter = max(",;\t", key=first.count)
            rows = csv.reader(itertools.chain([first], lines(text)), delimiter=delimiter, strict=True)
            names = None
            while True:
                taken = values = 0
                where = f"{file.name}, row {number + 1}"
                try:
                    found = next(rows, None)
                except csv.Error as error:
                    number += 1
                    yield BadRow("not CSV", f"{where}: not CSV ({error})")
                    continue
                if found is None or (file.has_grown and not line.endswith(("\n", "\r"))):
                    return  # the end, or a last row that is still being written
                if names is None:
                    names = found
                elif found:  # otherwise a blank line
                    number += 1
                    if not all(map(_is_utf8, found)):
                        yield BadRow("not UTF-8", f"{where}: not UTF-8 text")
                    elif len(found) == len(names):
                        yield row(dict(zip(names, found, strict=True)), field, "--field", where)
                    else:
                        yield BadRow(
                            "not CSV", f"{where}: {len(found):,} columns, not {len(names):,} as in the first row"
                        )
    except BadRow as bad:
        yield bad
    except DAMAGE as error:
        yield damaged(file, f"row {number}", error)


def _is_utf8(text: str) -> bool:
    """Whether a text that was decoded with "surrogateescape" contains no invalid bytes."""
    return text.isascii() or not re.search("[\udc80-\udcff]", text)


def parquet_rows(file: Input, field: str) -> Iterator[Document | BadRow]:
    """One document per row of a Parquet file."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # the others reserve 1 GiB of address space at once
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("a .parquet file needs the optional package pyarrow: pip install pyarrow") from error
    number = 0
    file.check()  # as Parquet is not read sequentially
    try:
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(file.raw())
            with limited_memory(MAX_PARQUET):
                table = stack.enter_context(pyarrow.parquet.ParquetFile(opened))
            names = table.schema_arrow.names
            columns = [field] if field in names else [name for name in names if name in FIELDS and field == "text"]
            if not columns:
                message = f"{file.name}: no column {field!r}, only {printable(', '.join(names[:20]))}; see --field"
                yield BadRow("no such field", message)
                return
            if fault := _bomb(table.metadata, columns):
                yield BadRow("too long", f"{file.name}: {fault}")
                return
            batches = table.iter_batches(batch_size=8, columns=columns, use_threads=False)
            while True:
                with limited_memory(MAX_PARQUET):  # the sizes in its directory need not be true
                    batch = next(batches, None)
                if batch is None:
                    return
                for values in batch.to_struct_array():
                    number += 1
                    where = f"{file.name}, row {number}"
                    try:
                        yield row(values.as_py(), field, "--field", where)
                    except UnicodeDecodeError as error:
                        yield BadRow("not UTF-8", f"{where}: not UTF-8 text ({error.reason})")
    except MemoryError as error:
        limit = f"{MAX_PARQUET >> 20:,} MiB"
        raise InputError(
            f"{file.name}, after row {number}: out of memory, or the next rows need more than {limit} ({error})"
        ) from error
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: column names that are not UTF-8
        yield damaged(file, f"row {number}", error)


def _bomb(metadata: "pyarrow.parquet.FileMetaData", names: list[str]) -> str:  # noqa: F821
    """The error if one of these columns in a Parquet file decompresses to an implausible size; else ""."""
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for column in map(group.column, range(group.num_columns)):
            size, packed, name = column.total_uncompressed_size, column.total_compressed_size, column.path_in_schema
            if name.startswith(tuple(names)) and size > MAX_UNPACKED and size > MAX_RATIO * packed:
                return f"{packed:,} bytes of column {printable(name)!r} decompress to {size:,}, which is not text"
    return ""


READERS = {"text": text_rows, "jsonl": jsonl_rows, "json": json_rows, "csv": csv_rows, "parquet": parquet_rows}


# --- the files of a corpus --------------------------------------------------------------------------------------------


def kind_of(path: str) -> str:
    """The format of a file by its suffix: a key of READERS, or "" if unknown."""
    name = path.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    kind = KINDS.get(os.path.splitext(name)[1], "")
    return "" if kind == "parquet" and path.lower().endswith((*PACKED,)) else kind  # Parquet compresses internally


def input_files(
    patterns: list[str], field: str = "text", kind: str = "", skip: bool = False, folder: Path | None = None
) -> Source:
    """The files for names, folders and glob patterns, in this order and sorted within each, every file once.

    kind: their format, a key of READERS; "" = by suffix, and text for standard input, which is written as -. skip: read
    text files completely before yielding them, so that an invalid one yields only a BadRow and no document. folder:
    where standard input is copied to, as it is read more than once; by default the system's temporary folder.
    """
    inputs, left_out = _inputs(patterns, kind, folder)
    for reason, names in sorted(left_out.items()):
        more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
        say(f"left out, {reason}: {', '.join(names[:5])}{more}")

    def documents() -> Iterator[Document | BadRow]:
        for file in inputs:
            if skip and file.kind == "text" and (bad := _fault(file)):
                yield bad
            else:
                yield from READERS[file.kind](file, field)

    has_rows = field != "text" and any(file.kind != "text" for file in inputs)
    description = " ".join("standard input" if pattern == "-" else printable(pattern) for pattern in patterns)
    description += (f", read as {kind}" if kind else "") + (f", field {printable(field)}" if has_rows else "")
    return Source(description, documents, inputs)


def _inputs(patterns: list[str], kind: str, folder: Path | None) -> tuple[list[Input], dict[str, list[str]]]:
    """The files to read, and the names of those that are left out, by reason."""
    inputs: list[Input] = []
    read_as: dict[object, str] = {}  # file identity -> name under which it is read
    left_out: dict[str, list[str]] = {}
    # Whether a folder is a prepared corpus or a run, which may be next to the text.
    is_ours = functools.cache(lambda folder: os.path.isfile(os.path.join(folder, "tokenizer.model")))
    for pattern in dict.fromkeys(map(os.path.expanduser, patterns)):
        if pattern == "-":
            inputs.append(StandardInput(folder, kind or "text"))
            continue
        why_not, outside = "it is empty", 0
        root = Path(pattern)
        while not os.path.isdir(pattern) and glob.has_magic(os.fspath(root)):
            root = root.parent
        root = os.path.join(os.path.realpath(root), "")
        for path in matches(pattern):
            name, file_kind = printable(path), kind or kind_of(path)
            if not os.path.isfile(path):
                if path == pattern:
                    raise not_regular(name)
                reason = "not a regular file" if os.path.exists(path) else "a broken link"
            elif os.path.isdir(pattern) and is_ours(os.path.dirname(path)):
                reason = "part of a corpus or a run"
            elif file_kind:
                why_not, file_id = "", identity(path)
                if file_id not in read_as:
                    read_as[file_id] = name
                    inputs.append(Input(path, file_kind))
                    outside += path != pattern and not os.path.realpath(path).startswith(root)
                elif read_as[file_id] != name:
                    left_out.setdefault("the same file as another", []).append(f"{name} ({read_as[file_id]})")
                continue
            elif os.path.isdir(pattern):
                reason = "of another format"
            else:
                raise InputError(f"{name}: {ENDINGS}; see --format")
            left_out.setdefault(reason, []).append(name)
            why_not = why_not and f"{name} is {reason}"
        if outside:
            say(f"{pattern}: {outside:,} files are outside this folder, reached by links; they are read too")
        if why_not:
            raise InputError(f"--input {printable(pattern)}: nothing to read: {why_not} ({ENDINGS}; see --format)")
    return inputs, left_out


def _fault(file: Input) -> BadRow | None:
    """The error of a file that is not valid text; else None."""
    try:
        for _ in text_blocks(file):
            pass
    except BadRow as bad:
        return bad
    return None
