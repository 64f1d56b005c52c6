"""Datasets on the Hugging Face hub as documents."""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data.files import Input, say
from data.sources import BadRow, Document, Source, row, text_document
from minidisp import InputError, printable
from minidisp.runtime.files import open_own

STATE_EVERY = 1000  # rows


class _Fetched(NamedTuple):
    """The content of a file of fetched rows: lines with the source, texts, bad rows, and states of the stream."""

    rows: int = 0
    texts: int = 0
    state: dict | None = None  # the latest state of the stream, after state_rows rows
    state_rows: int = 0
    ended: bool = False

    @classmethod
    def of(cls, copy: Path, source: str, skip: bool) -> "_Fetched":
        """Truncate the file to where fetching can resume; to its start if it is from another source."""
        found, kept, bad = cls(), 0, False
        with open(copy, "a+b", opener=open_own) as file:
            file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):  # incomplete, as the process was killed
                    break
                value = json.loads(line)
                if not kept and value != {"source": source}:
                    break
                kept += len(line)
                if isinstance(value, str):
                    found = found._replace(rows=found.rows + 1, texts=found.texts + (value != ""))
                elif "bad" in value:
                    found, bad = found._replace(rows=found.rows + 1), True
                elif "state" in value:
                    found = found._replace(state=value["state"], state_rows=found.rows)
                found = found._replace(ended=value == {"end": True})
            if bad and not skip:  # the skipped rows must now raise an error
                found, kept = cls(), 0
            file.truncate(kept)
            if not kept:
                file.write(json.dumps({"source": source}).encode() + b"\n")
        return found


def hugging_face(spec: str, column: str, split: str = "train") -> Source:
    """A split of the dataset NAME or NAME:CONFIG on the Hugging Face hub, one document per row.

    Its `fetch` streams the rows into a file, and resumes if an earlier call for the same file was interrupted.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError("--hf needs the optional package datasets: pip install datasets") from error
    name, _, config = spec.partition(":")
    description = printable(
        f"Hugging Face dataset {spec}, column {column}" + (f", split {split}" if split != "train" else "")
    )

    def stream_after(done: _Fetched) -> tuple[object, Iterable[dict]]:
        stream = datasets.load_dataset(name, config or None, split=split, streaming=True)
        if done.state is not None:  # otherwise all earlier rows are read again
            stream.load_state_dict(done.state)
        rest = done.rows - done.state_rows
        return stream, itertools.islice(stream, rest, None) if rest else stream

    def fetch(copy: Path, limit: int, skip: bool) -> Source:
        """Fetch `limit` documents, 0 = all, into the file `copy`. skip: skip bad rows instead of raising an error."""
        done = _Fetched.of(copy, description, skip)
        rows, texts = done.rows, done.texts
        if rows:
            say(f"--hf {spec}: resuming after {rows:,} rows")
        progress = tqdm(desc="downloading", unit="doc", initial=rows, leave=False, disable=None)
        with open(copy, "a", encoding="utf-8", opener=open_own) as file, progress:

            def write(value: object) -> None:
                file.write(json.dumps(value) + "\n")

            try:
                if not done.ended and not 0 < limit <= texts:
                    stream, records = stream_after(done)
                    for record in records:
                        item = row(record, column, "--hf-column", f"--hf {spec}, row {rows + 1}")
                        if isinstance(item, BadRow) and not skip:
                            raise item
                        value = {"bad": item.reason} if isinstance(item, BadRow) else "".join(item.blocks)
                        write(value)
                        rows, texts = rows + 1, texts + (isinstance(item, Document) and value != "")
                        progress.update()
                        if rows % STATE_EVERY == 0:
                            if hasattr(stream, "state_dict"):
                                write({"state": stream.state_dict()})
                            file.flush()
                        if 0 < limit <= texts:
                            break
                    else:
                        write({"end": True})
            except InputError:
                raise
            except Exception as error:  # from datasets, its hub client, or a file format
                reason = str(error).partition("\n")[0]
                kept = f"; {rows:,} rows are saved: run the same command again to resume" if rows else ""
                raise InputError(f"--hf {spec}: {type(error).__name__}: {reason}{kept}") from error
            finally:
                if not rows:
                    copy.unlink()

        if not rows:
            raise InputError(f"--hf {spec}: split {split} has no rows")

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
