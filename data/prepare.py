"""Turn text into a corpus for train.py: a tokenizer, token shards and meta.json, in data/<name>/.

    python data/prepare.py                              # pystdlib: this Python's own library, 10 MB, needs no network
    python data/prepare.py wikitext2                    # or another built-in corpus, downloaded once
    python data/prepare.py --input 'books/*.txt' more.jsonl.gz --name books
    python data/prepare.py --hf HuggingFaceFW/fineweb-edu:sample-10BT --limit 200000 --name fineweb

A file is one document, a line of a .jsonl file is one. Documents go to train, val and test, 90/5/5, by the sha256 of
their text: a document never changes sides, and its copies stay with it. A single document is cut by position, at 90
and 95 % of its characters. Text is kept as it is, to the last byte; empty documents are left out. The tokenizer is
trained on the training split only, on at most 16 MB of it.

The text is streamed, twice or three times, so memory stays below 1 GB whatever the corpus. The same text and options
give the same files, byte for byte, on any number of cores. A corpus is built next to its place and renamed at the end;
downloads stay in data/.downloads.
"""

import argparse
import contextlib
import functools
import glob
import gzip
import hashlib
import heapq
import http.client
import io
import itertools
import json
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import sentencepiece
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, when this file is run as a script

from minidisp import InputError, __version__
from minidisp.data import FORMAT, SPLITS, Dataset, ShardWriter, sha256_of
from minidisp.tokenizer import ByteTokenizer, Tokenizer, load, train_sentencepiece

try:
    import fcntl
except ImportError:  # Windows: two processes that prepare one corpus at once are not kept apart there
    fcntl = None

DATA = Path(__file__).resolve().parent
VOCAB_SIZE = 4096
SHARD_TOKENS = 100_000_000
BLOCK_CHARS = 1 << 18  # files are read, and long ones encoded, in blocks of about this size
BATCH_CHARS = 1 << 23  # encoded at a time, by all threads together
SAMPLE_BYTES = 16_000_000  # training text of the tokenizer; the trainer takes up to 40 times as much memory
MAX_DOCUMENT_CHARS = 1 << 25  # to be hashed before a document is placed, it is held in memory
TEXT_SUFFIXES, JSON_SUFFIXES = (".txt", ".md", ".py"), (".jsonl", ".jsonl.gz")


class Document(NamedTuple):
    name: str  # for messages: a file, or a line of one
    blocks: Iterable[str]  # the text, in consecutive parts


class Source(NamedTuple):
    description: str  # kept in meta.json; another one is another corpus
    documents: Callable[[], Iterator[Document]]  # from the start at each call
    once: bool = False  # reading is expensive: keep a copy while preparing


class Piece(NamedTuple):
    split: str
    text: str
    ends: bool  # the last piece of its document


# --- sources: where documents come from -------------------------------------------------------------------------------


def blocks_of(file: TextIO) -> Iterator[str]:
    """The text of an open file in blocks that end where a line ends, unless a line is very long."""
    while block := file.read(BLOCK_CHARS):
        yield block + file.readline(BLOCK_CHARS)


def file_blocks(path: str | Path) -> Iterator[str]:
    """The text of a UTF-8 file, unchanged, in blocks."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for block in blocks_of(file):
                if "\0" in block:
                    raise InputError(f"{path}: a binary file (it has NUL bytes), not text")
                yield block
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}); convert it, or leave it out") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def text_file(path: str | Path) -> Iterator[Document]:
    yield Document(str(path), file_blocks(path))


def text_document(name: str, text: str) -> Document:
    return Document(name, blocks_of(io.StringIO(text, newline="")))


def json_lines(path: str | Path, field: str) -> Iterator[Document]:
    """One document per line of a .jsonl or .jsonl.gz file; blank lines are skipped."""
    number = 0
    try:
        with (gzip.open if str(path).lower().endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                if line.strip():
                    yield text_document(where, text_field(_parse(line, where), field, "--field", where))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}), after line {number}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged gzip file, after line {number}") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def _parse(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error


def text_field(record: object, field: str, flag: str, where: str) -> str:
    """record[field], or InputError if that is not a text."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: not a JSON object")
    if field not in record:
        raise InputError(f"{where}: no field {field!r} but {', '.join(map(str, record)) or 'none at all'}; see {flag}")
    text = record[field]
    if not isinstance(text, str):
        raise InputError(f"{where}: field {field!r} is not a text but {json.dumps(text, default=str)[:40]}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell what is not Unicode: "\ud83d"
        raise InputError(f"{where}: field {field!r} has half a surrogate pair at character {error.start}") from error
    return text


def input_files(patterns: list[str], field: str) -> Source:
    """The files that match the glob patterns, in the order of the patterns and sorted within each, every file once."""
    paths: dict[str, None] = {}
    for pattern in patterns:
        matches = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        matches = [path for path in matches if os.path.isfile(path)]
        if not matches:
            raise InputError(f"--input {pattern}: no such file")
        paths |= dict.fromkeys(matches)
    for path in paths:
        if not path.lower().endswith(TEXT_SUFFIXES + JSON_SUFFIXES):
            raise InputError(f"{path}: only {' '.join(TEXT_SUFFIXES + JSON_SUFFIXES)} files are read")

    def documents() -> Iterator[Document]:
        for path in paths:
            yield from text_file(path) if path.lower().endswith(TEXT_SUFFIXES) else json_lines(path, field)

    from_json = any(path.lower().endswith(JSON_SUFFIXES) for path in paths)
    return Source(" ".join(patterns) + (f", field {field}" if from_json else ""), documents)


def hugging_face(spec: str, column: str) -> Source:
    """The train split of a dataset NAME or NAME:CONFIG of the Hugging Face hub, one document per row."""
    try:
        import datasets
    except ImportError as error:
        raise InputError("--hf needs the optional package datasets: pip install 'minidisp[datasets]'") from error
    name, _, config = spec.partition(":")

    def documents() -> Iterator[Document]:
        try:
            rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
            for number, row in enumerate(rows, 1):
                where = f"--hf {spec}, row {number}"
                yield text_document(where, text_field(row, column, "--hf-column", where))
        except InputError:
            raise
        except Exception as error:  # of datasets, of its hub client, of a dozen file formats
            reason = str(error).partition("\n")[0]
            raise InputError(f"--hf {spec}: {type(error).__name__}: {reason}") from error

    return Source(f"Hugging Face dataset {spec}, column {column}", documents, once=True)


def standard_library() -> Source:
    """The library of the Python that runs this: real text of some size that is on every machine already."""
    root = Path(sysconfig.get_path("stdlib"))
    # Without tests, other people's packages, and what is generated: tables of characters and the text of help().
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
    paths = [path for path in root.rglob("*.py") if path.is_file() and not skipped & set(path.relative_to(root).parts)]
    if not paths:
        raise InputError(f"this Python has no library sources in {root}; choose another corpus")
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    description = f"standard library of {platform.python_implementation()} {platform.python_version()}"
    return Source(description, lambda: itertools.chain.from_iterable(map(text_file, paths)))


def wikitext(path: Path) -> Iterator[Document]:
    """The articles of a WikiText archive; one starts at the blank line before its " = Title = "."""
    with zipfile.ZipFile(path) as archive:
        for file_name in ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"):
            member = next(name for name in archive.namelist() if name.endswith(file_name))
            with io.TextIOWrapper(archive.open(member), encoding="utf-8", newline="\n") as lines:
                article: list[str] = []
                for line in lines:
                    if re.fullmatch(r" = [^=].* = \n", line) and article and not article[-1].strip():
                        blank = article.pop()
                        if article:
                            yield text_document(member, "".join(article))
                        article = [blank]
                    article.append(line)
                yield text_document(member, "".join(article))


def tinystories(path: Path) -> Iterator[Document]:
    """The stories of TinyStoriesV2-GPT4-train.txt, without the line breaks around the separators."""
    rest = ""
    for block in itertools.chain(file_blocks(path), ["<|endoftext|>"]):
        *stories, rest = (rest + block).split("<|endoftext|>")
        yield from (text_document(str(path), story.strip()) for story in stories if story.strip())


class Download(NamedTuple):
    read: Callable[[Path], Iterator[Document]]
    url: str
    bytes: int
    sha256: str


# Addresses that name a commit, so that the file behind them cannot change.
GITHUB, HUB = "https://raw.githubusercontent.com", "https://huggingface.co/datasets"
DOWNLOADS = {
    "shakespeare": Download(
        text_file,
        f"{GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
        1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "wikitext2": Download(
        wikitext,
        f"{HUB}/ggml-org/ci/resolve/927b3642933080f1b0e811e2f916e14c292992f9/wikitext-2-raw-v1.zip",
        4_721_645,
        "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
    ),
    "wikitext103": Download(
        wikitext,
        f"{HUB}/mattdangerw/wikitext-103-raw/resolve/3555105b17ae31cc619a136fac72dbe2865c3738/wikitext-103-raw-v1.zip",
        191_984_949,
        "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
    ),
    "tinystories": Download(
        tinystories,
        f"{HUB}/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-GPT4-train.txt",
        2_227_753_162,
        "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
    ),
}
BUILT_IN = ("pystdlib", *DOWNLOADS)


def built_in(name: str, downloads: Path, file: Path | None = None) -> Source:
    """A built-in corpus. What has to be downloaded goes to the folder `downloads`, or is the given file."""
    if name == "pystdlib":
        return standard_library()
    wanted = DOWNLOADS[name]

    @functools.cache  # so that only the first of several readings downloads and checks
    def path() -> Path:
        if not file:
            return download(name, downloads)
        check_download(file, wanted)
        return file

    return Source(wanted.url, lambda: wanted.read(path()))


# --- downloads --------------------------------------------------------------------------------------------------------

ATTEMPTS, PAUSE_S, TIMEOUT_S = 5, 2, 30


def download(name: str, folder: Path) -> Path:
    """The downloaded file of a built-in corpus, checked; a download that was cut off is continued."""
    wanted = DOWNLOADS[name]
    target = folder / f"{name}-{wanted.url.rpartition('/')[2]}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        part.touch()
        by_hand = f"or download it elsewhere and run python data/prepare.py {name} --source FILE"
        for attempt in range(ATTEMPTS):
            if part.stat().st_size >= wanted.bytes:
                break
            time.sleep(PAUSE_S if attempt else 0)
            try:
                _download_rest(wanted, part)
            except urllib.error.HTTPError as error:
                raise InputError(f"{wanted.url}: HTTP {error.code} {error.reason}; try later, {by_hand}") from error
            except urllib.error.URLError as error:
                raise InputError(f"cannot reach {wanted.url} ({error.reason}); go online, {by_hand}") from error
            except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
                _say(f"{wanted.url}: {error or 'cut off'}")
        if (size := part.stat().st_size) < wanted.bytes:
            have = f"{size:,} of {wanted.bytes:,} bytes"
            raise InputError(f"{wanted.url}: cut off after {have}; run this again to continue, {by_hand}")
        part.replace(target)
    try:
        check_download(target, wanted)
    except InputError:
        target.unlink()  # the next run downloads it again
        raise
    return target


def _download_rest(wanted: Download, part: Path) -> None:
    """Append to `part` what it lacks, or all of it if the server cannot continue in the middle."""
    have = part.stat().st_size
    request = urllib.request.Request(wanted.url, headers={"User-Agent": "minidisp", "Range": f"bytes={have}-"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if resumed else 0
        progress = tqdm(desc=part.stem, total=wanted.bytes, initial=have, unit="B", unit_scale=True, disable=None)
        with open(part, "ab" if resumed else "wb") as file, progress:
            # No more than a block past the announced end: that much shows that it is another file.
            while have <= wanted.bytes and (block := _read(response)):
                file.write(block)
                have += len(block)
                progress.update(len(block))


def _read(response) -> bytes:
    try:
        return response.read(1 << 16)
    except OSError as error:  # whatever it is, not to be confused with a full disk
        raise ConnectionError(error) from error


def check_download(path: Path, wanted: Download) -> None:
    """InputError unless the file has the size and the sha256 of the original."""
    try:
        size, sha256 = path.stat().st_size, sha256_of(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if (size, sha256) != (wanted.bytes, wanted.sha256):
        raise InputError(
            f"{path} is not the file of {wanted.url}: {size:,} bytes with sha256 {sha256}, "
            f"not {wanted.bytes:,} bytes with sha256 {wanted.sha256}"
        )


# --- from documents to pieces, a sample of them, and shards -----------------------------------------------------------


def by_hash(documents: Iterable[Document]) -> Iterator[Piece]:
    """Every document as a whole to the split that its text, or the corpus, says."""
    for document in documents:
        digest, blocks, size = hashlib.sha256(), [], 0
        for block in document.blocks:
            digest.update(block.encode("utf-8"))
            blocks.append(block)
            size += len(block)
            if size > MAX_DOCUMENT_CHARS:
                raise InputError(
                    f"{document.name}: more than {MAX_DOCUMENT_CHARS:,} characters in one document; "
                    "split it up, or stream everything as one text that is cut 90/5/5 with --one-document"
                )
        percent = int.from_bytes(digest.digest()[:8], "big") % 100
        split = "train" if percent < 90 else "val" if percent < 95 else "test"
        for i, block in enumerate(blocks, 1):
            yield Piece(split, block, ends=i == len(blocks))


def joined(documents: Iterable[Document]) -> Iterator[str]:
    """The text of all documents, with a newline between one and the next."""
    for i, document in enumerate(documents):
        yield from itertools.chain(["\n"] if i else [], document.blocks)


def by_position(blocks: Iterable[str], chars: int) -> Iterator[Piece]:
    """One text of so many characters, cut into three documents at 90 and 95 %."""
    ends = [("train", chars * 90 // 100), ("val", chars * 95 // 100), ("test", chars)]
    position = 0
    for block in blocks:
        while block:
            split, end = ends[0]
            text, block = block[: end - position], block[end - position :]
            position += len(text)
            yield Piece(split, text, ends=position == end)
            if position == end:
                ends.pop(0)


def survey(pieces: Iterable[Piece], sample_bytes: int) -> tuple[dict[str, int], int, list[str]]:
    """Documents per split, characters in all, and a sample of the training text of about sample_bytes.

    The sample is the pieces with the smallest hashes, in the order of the corpus: whatever the order and the size of
    the corpus, every piece has the same chance, and no random number is involved.
    """
    documents, chars, sampled = dict.fromkeys(SPLITS, 0), 0, 0
    heap: list[tuple[int, int, int, str]] = []  # minus the hash, number, bytes, text: the largest hash on top
    for number, piece in enumerate(_progress("reading", pieces)):
        documents[piece.split] += piece.ends
        chars += len(piece.text)
        if piece.split == "train" and sample_bytes:
            text = piece.text.encode("utf-8")
            rank = int.from_bytes(hashlib.sha256(text).digest()[8:16], "big")  # the first 8 bytes chose the split
            heapq.heappush(heap, (-rank, number, len(text), piece.text))
            sampled += len(text)
            while sampled - heap[0][2] >= sample_bytes:
                sampled -= heapq.heappop(heap)[2]
    return documents, chars, [text for _, _, _, text in sorted(heap, key=lambda entry: entry[1])]


def write_shards(pieces: Iterable[Piece], chars: int, tokenizer: Tokenizer, folder: Path, workers: int) -> dict:
    """Encode and write everything; returns the `splits` of meta.json. chars: the length of it all, for the display."""
    splits = {name: {"documents": 0, "tokens": 0, "bytes": 0, "words": 0, "shards": []} for name in SPLITS}
    token_bytes = [len(token) for token in tokenizer.token_bytes]
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(ShardWriter(folder, name, tokenizer.vocab_size, SHARD_TOKENS)) for name in SPLITS
        }
        for batch in _batches(_progress("encoding", pieces, chars)):
            encoded = tokenizer.encode_batch([piece.text for piece in batch], threads=workers)
            for piece, ids in zip(batch, encoded, strict=True):
                counts, n_bytes = splits[piece.split], len(piece.text.encode("utf-8"))
                if sum(map(token_bytes.__getitem__, ids)) != n_bytes:
                    raise InputError(f"the tokenizer changes the text {piece.text[:40]!r}...; use another one")
                if piece.ends:
                    ids.append(tokenizer.eos_id)
                writers[piece.split].write(ids)
                counts["documents"] += piece.ends
                counts["tokens"] += len(ids)
                counts["bytes"] += n_bytes
                counts["words"] += len(piece.text.split())
    for name, writer in writers.items():
        splits[name]["shards"] = writer.shards
    return splits


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, chars = [], 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _progress(verb: str, pieces: Iterable[Piece], chars: int | None = None) -> Iterator[Piece]:
    with tqdm(desc=verb, total=chars, unit="char", unit_scale=True, leave=False, disable=None) as progress:
        for piece in pieces:
            yield piece
            progress.update(len(piece.text))


# --- a corpus, whole or not at all ------------------------------------------------------------------------------------


def prepare(name: str) -> Path:
    """The folder of a built-in corpus with default options, prepared now unless it is there."""
    return prepare_corpus(name, built_in(name, DATA / ".downloads"), DATA / name)


def find_or_prepare(name: str) -> Path:
    """The folder of the corpus that --data names: a folder, a name in data/, or a built-in corpus, prepared now.

    Raises InputError if there is no such corpus.
    """
    given = Path(os.path.expanduser(name))
    for folder in (given, DATA / name):
        if (folder / "meta.json").is_file():
            return folder
    if name in BUILT_IN:
        print(f"preparing the corpus {name}, once:", flush=True)
        return prepare(name)
    by_hand = "prepare your own with python data/prepare.py --input FILES --name NAME"
    if len(given.parts) != 1:
        relative = "" if given.is_absolute() else f", which is {given.absolute()} from here"
        raise InputError(
            f"--data {name}: no prepared corpus there{relative}; say where it is with --data PATH, or {by_hand}"
        )
    prepared = sorted(meta.parent.name for meta in DATA.glob("*/meta.json"))
    raise InputError(
        f"--data {name}: no such corpus; built in are {', '.join(BUILT_IN)}"
        + (f", prepared {', '.join(prepared)}" if prepared else "")
        + f"; or {by_hand}"
    )


def prepare_corpus(
    name: str,
    source: Source,
    out: Path,
    tokenizer: str | Tokenizer = "sentencepiece",
    vocab_size: int = VOCAB_SIZE,
    one_document: bool = False,
    limit: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Prepare a corpus in the folder `out`, unless it is there with the same options; returns out.

    tokenizer: "sentencepiece" to train one of vocab_size tokens, "byte", or one to use as it is.
    one_document: join all documents and cut the whole by position. limit: take the first documents only, 0 = all.
    workers: threads that encode, by default one per core; they do not change the result.
    Raises InputError, with nothing left behind, if the text, the options or the disk do not allow it.
    """
    options = {
        "tokenizer": tokenizer if isinstance(tokenizer, str) else tokenizer.hash,
        "vocab_size": vocab_size if tokenizer == "sentencepiece" else 0,
        "one_document": one_document,
        "limit": limit,
    }
    workers = workers or _cores()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            if _is_there(out, source, options, overwrite):
                return out
            with _built_aside(out) as build:
                meta = {"format": FORMAT, "name": name, "source": source.description, "options": options}
                meta |= _build(build, source, options, tokenizer, workers)
                (build / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
                Dataset(build)
            _print_table(out, meta)
    except OSError as error:
        raise InputError(f"cannot write {error.filename or out}: {error.strerror}") from error
    return out


def _build(folder: Path, source: Source, options: dict, tokenizer: str | Tokenizer, workers: int) -> dict:
    """Write tokenizer and shards; returns the rest of meta.json."""

    def documents() -> Iterator[Document]:
        return itertools.islice(source.documents(), options["limit"] or None)

    copy = folder / "documents.jsonl"
    if source.once:
        with open(copy, "w", encoding="utf-8") as file:
            for document in tqdm(documents(), desc="downloading", unit="doc", leave=False, disable=None):
                file.write(json.dumps({"text": "".join(document.blocks)}) + "\n")
        source = source._replace(documents=lambda: json_lines(copy, "text"))
    first = list(itertools.islice(documents(), 2))
    cut_chars = 0
    if options["one_document"] or len(first) == 1:
        cut_chars = sum(map(len, joined(documents())))
        if cut_chars < 20:
            raise InputError(f"{source.description}: {cut_chars} characters are too few to be cut 90/5/5")

    def pieces() -> Iterator[Piece]:
        return by_position(joined(documents()), cut_chars) if cut_chars else by_hash(documents())

    counts, chars, sample = survey(pieces(), SAMPLE_BYTES if tokenizer == "sentencepiece" else 0)
    if not chars:
        raise InputError(f"{source.description}: there is no text")
    if empty := [name for name in SPLITS if not counts[name]]:
        raise InputError(
            f"{source.description}: {sum(counts.values())} documents leave nothing for {' and '.join(empty)}: "
            "add documents, or use --one-document to join them and cut the whole 90/5/5"
        )
    if tokenizer == "sentencepiece":
        _say(f"training a tokenizer of {options['vocab_size']:,} tokens on {sum(map(len, sample)):,} characters")
        tokenizer = train_sentencepiece(sample, options["vocab_size"])
    elif tokenizer == "byte":
        tokenizer = ByteTokenizer()
    tokenizer.save(folder / "tokenizer.model")
    _say(f"encoding {chars:,} characters, {workers} threads")
    splits = write_shards(pieces(), chars, tokenizer, folder, workers)
    copy.unlink(missing_ok=True)
    return {
        "split_by": "position" if cut_chars else "hash",
        "versions": {"minidisp": __version__, "sentencepiece": sentencepiece.__version__},
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": tokenizer.hash,
        "splits": splits,
    }


def _is_there(out: Path, source: Source, options: dict, overwrite: bool) -> bool:
    """Whether `out` holds this very corpus, intact. InputError if it holds anything else that is not to be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "meta.json").is_file():
        raise InputError(f"{out} is there and is no corpus: choose another --out")
    if overwrite:
        return False
    dataset = Dataset(out)
    wanted = {"source": source.description, **options}
    found = {"source": dataset.meta["source"], **dataset.meta["options"]}
    if different := [key for key in wanted if wanted[key] != found.get(key)]:
        key = different[0]
        raise InputError(
            f"{out} is there, but with {key} {found.get(key)!r}, not {wanted[key]!r}: "
            "replace it with --overwrite, or choose another --out"
        )
    dataset.verify()
    _say(f"{out} is there already, and intact; --overwrite prepares it again")
    return True


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Wait until no other process prepares `out`; the next one waits for us. The lock dies with its process."""
    if fcntl is None:
        yield
        return
    path = out.with_name(f".{out.name}.lock")
    while True:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(path, "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(f"waiting for another process that prepares {out}")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:  # the file systems of some clusters have no locks
                _say(f"cannot lock {path} ({error.strerror}): do not prepare this corpus twice at the same time")
            # The one we waited for has removed the file it had locked: start over with a new one.
            if _is_at(file, path):
                try:
                    yield
                finally:
                    path.unlink()
                return


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether an open file is the one at the path. Asked in one go: between two questions another process may remove it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _built_aside(out: Path) -> Iterator[Path]:
    """A folder next to `out` that takes its place when the block ends, and vanishes if the block fails."""
    build, old = out.with_name(f".{out.name}.building"), out.with_name(f".{out.name}.old")
    for stale in (build, old):  # of a process that was killed: we hold the lock
        if stale.exists():
            shutil.rmtree(stale)
    try:
        build.mkdir()
        yield build
        if out.exists():
            out.rename(old)
        build.rename(out)
    except BaseException:
        shutil.rmtree(build, ignore_errors=True)  # what went wrong before is the error to report
        raise
    if old.exists():
        shutil.rmtree(old)


def _print_table(out: Path, meta: dict) -> None:
    print(f"{out}: {meta['source']}, split by {meta['split_by']}, vocabulary {meta['vocab_size']:,}")
    print(f"{'split':5} {'documents':>10} {'tokens':>14} {'bytes':>15} {'words':>14} {'bytes/token':>12}")
    for name, split in meta["splits"].items():
        counts = f"{split['documents']:>10,} {split['tokens']:>14,} {split['bytes']:>15,} {split['words']:>14,}"
        print(f"{name:5} {counts} {split['bytes'] / split['tokens']:>12.3f}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- command line -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message} (see --help)")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the flags; InputError where they contradict each other."""
    parser = _Parser(
        prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    sizes = ", ".join(f"{name} ({download.bytes / 1e6:,.0f} MB)" for name, download in DOWNLOADS.items())
    add = parser.add_argument_group("where the text comes from").add_argument
    add("corpus", nargs="?", choices=BUILT_IN, metavar="NAME", help=f"pystdlib (the default), or downloaded: {sizes}")
    add("--source", type=Path, metavar="FILE", help="the file of a built-in corpus, if you downloaded it yourself")
    add("--input", nargs="+", metavar="GLOB", help=f"your own files: {' '.join(TEXT_SUFFIXES + JSON_SUFFIXES)}")
    add("--field", default="text", help="with --input: the field of .jsonl lines that holds the text (default: text)")
    add("--hf", metavar="NAME[:CONFIG]", help="the train split of a Hugging Face dataset; needs pip install datasets")
    add("--hf-column", default="text", metavar="NAME", help="with --hf: the column that holds the text (default: text)")
    add("--limit", type=_number(0), default=0, metavar="N", help="take only the first N documents (default 0: all)")
    add("--one-document", action="store_true", help="join all documents, a newline between, and cut the whole 90/5/5")
    add = parser.add_argument_group("tokenizer").add_argument
    add("--tokenizer", metavar="KIND", help="sentencepiece: train a BPE (the default); byte; or hf:DIR, that of a Hugging "
        "Face model, a folder or owner/name on the hub")  # fmt: skip
    add("--vocab-size", type=_number(1), metavar="N", help=f"tokens of the SentencePiece BPE (default {VOCAB_SIZE})")
    add("--tokenizer-from", metavar="FILE", help="use this tokenizer.model, of another corpus or run, instead")
    add = parser.add_argument_group("where the corpus goes").add_argument
    add("--name", help="name of the corpus, with --input and --hf")
    add("--out", type=Path, metavar="DIR", help="folder of the corpus (default: data/NAME)")
    add("--overwrite", action="store_true", help="replace a corpus that is there")
    add("--workers", type=_number(1), metavar="N", help="threads that encode (default: one per core)")
    args = parser.parse_args(argv)

    own = [flag for flag, value in (("--input", args.input), ("--hf", args.hf)) if value]
    if len(own) + (args.corpus is not None) > 1:
        parser.error("prepare one corpus at a time: NAME, --input or --hf")
    if own:
        if not args.name:
            parser.error(f"{own[0]} needs --name NAME for the corpus")
        if args.name in BUILT_IN or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", args.name):
            parser.error(f"--name {args.name}: use letters, digits, '.', '-' and '_', and not a built-in name")
    elif args.name:
        parser.error("--name goes with --input and --hf; --out DIR puts a built-in corpus elsewhere")
    if args.source and args.corpus not in DOWNLOADS:
        parser.error(f"--source goes with a corpus that is downloaded: {', '.join(DOWNLOADS)}")
    if args.tokenizer_from and (args.tokenizer or args.vocab_size):
        parser.error("--tokenizer-from brings its own kind and size: leave out --tokenizer and --vocab-size")
    if args.tokenizer and args.tokenizer not in ("sentencepiece", "byte") and not args.tokenizer.startswith("hf:"):
        parser.error(f"--tokenizer {args.tokenizer}: give sentencepiece, byte, or hf:DIR")
    if args.tokenizer not in (None, "sentencepiece") and args.vocab_size:
        parser.error(f"--tokenizer {args.tokenizer} brings its own size: leave out --vocab-size")
    return args


def _number(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    try:
        args = parse_args(argv)
        name = args.name or args.corpus or "pystdlib"
        out = (args.out or DATA / name).resolve()
        if args.input:
            source = input_files(args.input, args.field)
        elif args.hf:
            source = hugging_face(args.hf, args.hf_column)
        else:
            source = built_in(name, out.parent / ".downloads", args.source)
        tokenizer = load(args.tokenizer_from) if args.tokenizer_from else args.tokenizer or "sentencepiece"
        if args.tokenizer and args.tokenizer.startswith("hf:"):
            from minidisp import hf  # brings torch

            tokenizer = hf.load_tokenizer(args.tokenizer.removeprefix("hf:"))
        prepare_corpus(
            name,
            source,
            out,
            tokenizer=tokenizer,
            vocab_size=args.vocab_size or VOCAB_SIZE,
            one_document=args.one_document,
            limit=args.limit,
            workers=args.workers,
            overwrite=args.overwrite,
        )
    except InputError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare.py: interrupted, no corpus was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a terminated process cleans up, too
    sys.exit(main())
