"""Turn text into a corpus for train.py: a tokenizer, token shards and meta.json, in data/<name>/.

    python data/prepare.py                              # pystdlib: Python's standard library, 10 MB, needs no network
    python data/prepare.py wikitext2                    # or another built-in corpus, downloaded once
    python data/prepare.py --input books more.jsonl.gz --name books        # files, folders, patterns, - for a pipe
    python data/prepare.py --hf HuggingFaceFW/fineweb-edu:sample-10BT --limit 200000 --name fineweb

A document is a text file, a line of .jsonl, or a row of .json, .csv or .parquet. Documents are assigned to train, val
and test, 90/5/5, by the sha256 of their text, so a document and its copies always stay in the same split. A single
document is cut by position, at 90 and 95 % of its characters. Text is preserved byte for byte; empty documents are
dropped. The tokenizer is trained on at most 16 MB of the training split.

The text is streamed two or three times, so memory stays below 1 GB for a corpus of any size. The same text and options
give the same tokens on any number of cores. A corpus is built in a temporary folder next to its own and renamed at the
end; after an interruption, the same command resumes it. Downloads are kept in data/.downloads.
"""

import os
import sys

# Before other imports: a folder next to this file, such as a corpus named email, must not be imported as a module.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(path for path in sys.path if os.path.realpath(path) != HERE)]
if __name__ == "__main__":  # Ctrl-C while modules are imported
    __import__("minidisp").end_on_interrupt()

import argparse
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import sentencepiece

from data.downloads import BUILT_IN, DOWNLOADS, built_in
from data.files import changed, say
from data.hub import hugging_face
from data.pieces import SAVE_EVERY_S, Piece, by_hash, by_position, joined, survey, usable, write_shards
from data.sources import KINDS, READERS, BadRow, Document, Source, input_files
from minidisp import InputError, __version__, parse_json, printable, read_bytes
from minidisp.data import Corpora, Dataset
from minidisp.runtime import files
from minidisp.runtime.cli import Parser, exit_code
from minidisp.shards import EXAMPLES_FORMAT, FORMAT, MASK, SPLITS, is_resumable, read_meta
from minidisp.template import Messages, Template
from minidisp.tokenizer import ByteTokenizer, Tokenizer, load, train_sentencepiece

try:
    import fcntl
except ImportError:  # Windows: no lock against two processes that prepare the same corpus
    fcntl = None

DATA = Path(__file__).resolve().parent
VOCAB_SIZE, MAX_VOCAB_SIZE = 4096, 1 << 20
SAMPLE_BYTES = 16_000_000  # training text of the tokenizer; training takes up to 40 times as much memory
INPUTS, PROGRESS = "inputs.jsonl", "progress.json"
# The files of a corpus, which --overwrite may remove.
OWN_FILES = re.compile(
    r"meta\.json|tokenizer\.model|inputs\.jsonl|progress\.json|(train|val|test)_\d+\.(bin|mask)"
    r"|\.lock|\.building|\.download|lost\+found"
)


# --- a corpus, built atomically ---------------------------------------------------------------------------------------


def prepare(name: str) -> Path:
    """The folder of a built-in corpus with default options, which is prepared if it does not exist."""
    return prepare_corpus(name, built_in(name, DATA / ".downloads"), DATA / name)


def find_or_prepare(name: str) -> Path:
    """The folder of a corpus given by --data: a folder, a name in data/, or a built-in corpus, prepared if necessary.

    Raises InputError if there is no such corpus, or if the name is ambiguous: the corpus would then depend on the
    working directory.
    """
    given = Path(os.path.expanduser(name))
    found = {os.path.realpath(path): path for path in (given, DATA / name) if (path / "meta.json").is_file()}
    if len(found) == 2:
        raise InputError(
            f"--data {printable(name)} could be {printable(given.absolute())} or {printable(DATA / name)}: pass the "
            "full path"
        )
    if found:
        if name in BUILT_IN and given in found.values():
            say(f"--data {name} is the folder {given.absolute()}, not the built-in corpus of that name")
        return next(iter(found.values()))
    if name in BUILT_IN:
        print(f"preparing the corpus {name} (once):", flush=True)
        return prepare(name)
    shown, here = printable(name), given.exists()
    make = f"python data/prepare.py --input {shown if here else 'FILES'} --name NAME"
    if here or len(given.parts) != 1:
        relative = "" if given.is_absolute() else f", which is {printable(given.absolute())} from here"
        raise InputError(
            f"--data {shown}: no prepared corpus there{relative}; pass its path with --data PATH, "
            + (f"or prepare this text with {make}" if here else f"or prepare your own with {make}")
        )
    prepared = sorted(meta.parent.name for meta in DATA.glob("*/meta.json"))
    raise InputError(
        f"--data {shown}: no such corpus; built-in: {', '.join(BUILT_IN)}"
        + (f"; prepared: {', '.join(prepared)}" if prepared else "")
        + f"; or prepare your own with {make}"
    )


def open_corpora(corpora: list[tuple[str, int]]) -> Dataset | Corpora:
    """Open the corpora of --data, given as (corpus, weight) pairs. Raises InputError."""
    parts = [Dataset(find_or_prepare(name)) for name, _ in corpora]
    return parts[0] if len(parts) == 1 else Corpora(parts, [weight for _, weight in corpora])


def prepare_corpus(
    name: str,
    source: Source,
    out: Path,
    tokenizer: str | Tokenizer = "sentencepiece",
    vocab_size: int = 0,
    one_document: bool = False,
    limit: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    *,
    skip_bad_rows: bool = False,
) -> Path:
    """Prepare a corpus in the folder `out`, unless it exists with the same options and input; returns out.

    tokenizer: "sentencepiece" to train one, "byte", or an existing one. vocab_size: exact vocabulary size of the one to
    train; 0 = at most VOCAB_SIZE, or fewer tokens if the text does not yield that many.
    one_document: join all documents and cut the text by position. limit: use the first documents only, 0 = all.
    workers: threads for encoding, by default one per core; they do not change the result.
    Raises InputError, leaving nothing behind, if the text or the options are invalid or the disk is full.
    """
    options = {
        "tokenizer": tokenizer if isinstance(tokenizer, str) else tokenizer.hash,
        "vocab_size": (vocab_size or VOCAB_SIZE) if tokenizer == "sentencepiece" else 0,
        "one_document": one_document,
        "limit": limit,
        "bad_rows": "skip" if skip_bad_rows else "stop",
    }
    workers = workers or _cores()
    versions = {"minidisp": __version__, "sentencepiece": sentencepiece.__version__}
    meta = {"format": FORMAT, "name": name, "source": source.description, "options": options, "versions": versions}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            files.recover(out)
            if _is_there(out, source, options, overwrite):
                return out
            build = files.build_folder(out)
            copy = build.with_name(build.name.replace("building", "download"))
            reading = source.fetch(copy, limit, skip_bad_rows) if source.fetch else source
            left_off = _left_off(build, meta, reading)
            if build.exists() and not left_off:
                shutil.rmtree(build)
            with _built(build, out):
                finished = _build(build, reading, meta, left_off, tokenizer, bool(vocab_size), workers)
                if source.inputs:
                    lines = (json.dumps(file.record()) + "\n" for file in source.inputs)
                    (build / INPUTS).write_text("".join(lines), encoding="utf-8")
                files.write_json(build / "meta.json", finished)
                Dataset(build)
            copy.unlink(missing_ok=True)
    except BadRow as bad:
        raise InputError(f"{bad}; to skip and count such rows, pass --bad-rows skip") from bad
    except OSError as error:
        no_access = error.errno in (errno.EACCES, errno.EROFS)
        elsewhere = "; choose another folder with python data/prepare.py --out DIR, for --data DIR" if no_access else ""
        raise InputError(f"cannot write {error.filename or out}: {error.strerror or error}{elsewhere}") from error
    _print_table(out, finished)
    return out


def _build(
    folder: Path, source: Source, meta: dict, left_off: dict, tokenizer: str | Tokenizer, exact: bool, workers: int
) -> dict:
    """Write tokenizer and shards, or resume writing them; returns the content of meta.json.

    left_off: see `_left_off`. exact: the vocabulary must have exactly the requested size.
    """
    options, skipped, started = meta["options"], Counter(), time.monotonic()
    template_of = functools.cache(Template.of)

    def check(messages: Messages) -> None:
        # A tokenizer that is trained here has no template of its own, and PLAIN rejects nothing.
        if isinstance(tokenizer, Tokenizer):
            template_of(tokenizer).render(messages)

    def documents() -> Iterator[Document]:
        found = usable(source.documents(), options["bad_rows"] == "skip", skipped, check)
        return itertools.islice(found, options["limit"] or None)

    def pieces() -> Iterator[Piece]:
        return by_position(joined(documents()), known["cut_chars"]) if known["cut_chars"] else by_hash(documents())

    if left_off:
        known, encoded = left_off["known"], left_off["encoded"]
        for file, record in zip(source.inputs, left_off["inputs"], strict=True):
            file.sha256 = record["sha256"]  # so that changed content is detected
        say(f"resuming the interrupted preparation after {encoded['pieces']:,} pieces of the text")
        tokenizer = load(folder / "tokenizer.model")
        template = Template.from_meta(known["template"], tokenizer) if known["template"] else None
    else:
        encoded = {}
        first = next(documents(), None)
        of_examples = bool(first and first.messages)
        if of_examples and options["one_document"]:
            raise InputError(
                f"{meta['source']}: --one-document joins texts, but these are examples: leave out the flag"
            )
        known = {"cut_chars": 0 if of_examples else _chars_to_cut(documents, options["one_document"], meta["source"])}
        counts, known["chars"], sample = survey(pieces(), SAMPLE_BYTES if tokenizer == "sentencepiece" else 0)
        known["skipped"] = dict(skipped)
        _check_splits(documents, counts, meta["source"], known, of_examples)
        if tokenizer == "sentencepiece":
            size = options["vocab_size"]
            say(f"training a tokenizer of {size:,} tokens on {sum(map(len, sample)):,} characters")
            tokenizer = train_sentencepiece(sample, size, exact)
            if tokenizer.vocab_size < size:
                say(f"this text yields no more than {tokenizer.vocab_size:,} tokens: the vocabulary is smaller")
        elif tokenizer == "byte":
            tokenizer = ByteTokenizer()
        tokenizer.save(folder / "tokenizer.model")
        template = template_of(tokenizer) if of_examples else None
        known |= {"template": template.to_meta() if template else None, "fields": first.fields}

    def save(encoded: dict) -> None:
        if source.inputs is None:
            return  # without records of the inputs, a resumed run could not tell whether the text is the same
        inputs = [file.record() for file in source.inputs]
        state = {"meta": meta, "inputs": inputs, "known": known, "vocab_size": tokenizer.vocab_size, "encoded": encoded}
        files.write_json(folder / PROGRESS, state)

    if time.monotonic() - started >= SAVE_EVERY_S and not encoded:
        save({"pieces": 0})
    say(f"encoding {known['chars']:,} characters with {workers} threads")
    splits = write_shards(pieces(), known["chars"], tokenizer, folder, workers, encoded, save, template)
    return {
        **meta,
        **(
            {"format": EXAMPLES_FORMAT, "template": template.to_meta(), "fields": known.get("fields", [])}
            if template
            else {}
        ),
        "split_by": "position" if known["cut_chars"] else "hash",
        "skipped": known["skipped"],
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": tokenizer.hash,
        "splits": splits,
    }


def _chars_to_cut(documents: Callable[[], Iterator[Document]], one_document: bool, where: str) -> int:
    """The length of the text if it is cut by position (a single document, or all joined to one); otherwise 0."""
    if not one_document and len([*itertools.islice(documents(), 2)]) != 1:
        return 0
    chars = sum(map(len, joined(documents())))
    if chars < 20:
        raise InputError(f"{where}: {chars} characters are too few to be cut 90/5/5: add text")
    return chars


def _check_splits(
    documents: Callable[[], Iterator[Document]], counts: dict, where: str, known: dict, of_examples: bool
) -> None:
    """Raise InputError unless every split has a document."""
    if not known["chars"]:
        left_out = f"; left out: {_listed(known['skipped'])}" if known["skipped"] else ""
        raise InputError(f"{where}: there is no text{left_out or ': 0 characters are too few'}")
    if empty := [name for name in SPLITS if not counts[name]]:
        n = sum(counts.values())
        different = len({hashlib.sha256("".join(document.blocks).encode()).digest() for document in documents()})
        texts = "one and the same text" if different == 1 else f"copies of {different} texts"
        joining = "" if of_examples else ", or pass --one-document to join them and cut the text 90/5/5"
        raise InputError(
            f"{where}: {n} documents leave nothing for {' and '.join(empty)}"
            + (f", as they are all {texts}" if different < n else "")
            + f": add documents{joining}"
        )


def _left_off(folder: Path, meta: dict, source: Source) -> dict:
    """The saved state of an interrupted preparation of this corpus in `folder`; {} if there is none to resume from."""
    if folder.is_dir() and any(path.is_symlink() for path in folder.iterdir()):
        return {}  # a preparation creates no links, and must not write through one
    try:
        state = parse_json(read_bytes(folder / PROGRESS), PROGRESS)
    except InputError:  # interrupted before the first save
        return {}
    if not isinstance(state, dict) or state.get("meta") != meta or source.inputs is None:
        return {}
    shards, masks = (state["encoded"].get(name, {}) for name in ("shards", "masks"))
    intact = all(is_resumable(folder, split, state["vocab_size"], written) for split, written in shards.items())
    intact = intact and all(is_resumable(folder, split, 4, written, MASK) for split, written in masks.items())
    return state if intact and not changed(state["inputs"], source.inputs) else {}


def _is_there(out: Path, source: Source, options: dict, overwrite: bool) -> bool:
    """Whether `out` is exactly this corpus, intact. Raises InputError if it is anything else, unless to be replaced."""
    if files.is_free(out):
        return False
    if not (out / "meta.json").is_file():
        raise InputError(f"{out} exists and is not a corpus: choose another --out")
    if overwrite:
        if foreign := sorted(path.name for path in out.iterdir() if not OWN_FILES.fullmatch(path.name)):
            raise InputError(
                f"{out} also contains {printable(foreign[0])}, which --overwrite would remove: move it, or choose "
                "another --out"
            )
        return False
    dataset = Dataset(out)
    wanted = {"source": source.description, **options}
    # A default that was once part of the description.
    found = {
        "bad_rows": "stop",
        **dataset.meta["options"],
        "source": dataset.meta["source"].removesuffix(", field text"),
    }
    if different := [key for key in wanted if wanted[key] != found.get(key)]:
        key = different[0]
        raise InputError(
            f"{out} already exists, but with {key} {found.get(key)!r}, not {wanted[key]!r}: "
            "replace it with --overwrite, or choose another --out"
        )
    if (out / INPUTS).is_file() and source.inputs is not None:
        records = [parse_json(line, out / INPUTS) for line in read_bytes(out / INPUTS).splitlines()]
        kinds = {"file": str, "bytes": int, "times": list, "sha256": str}
        if not all(
            isinstance(record, dict) and all(type(record.get(key)) is kind for key, kind in kinds.items())
            for record in records
        ):
            raise InputError(f"{out / INPUTS} is damaged: prepare the corpus again with --overwrite")
        if change := changed(records, source.inputs):
            raise InputError(
                f"{out} already exists, but its input has changed ({change}): "
                "replace it with --overwrite, or choose another --out"
            )
    elif source.inputs:
        say(f"{out} has no record of its input: if that has changed since, pass --overwrite")
    dataset.verify()
    say(f"{out} already exists and is intact; to prepare it again, pass --overwrite")
    return True


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """A lock on `out`: waits for another process that prepares it. The lock is released if its process dies."""
    if fcntl is None:
        yield
        return
    path = out.with_name(f".{out.name}.lock") if os.access(out.parent, os.W_OK) or not out.is_dir() else out / ".lock"
    while True:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(path, "a", opener=files.open_own))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that prepares {out}")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:  # some cluster file systems do not support locks
                say(f"cannot lock {path} ({error.strerror}): do not prepare this corpus in two processes at once")
            # The process we waited for removed the lock file: start over with a new one.
            if _is_at(file, path):
                try:
                    yield
                finally:
                    path.unlink()
                return


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether an open file is the one at the path, which another process may remove at any time."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _built(build: Path, out: Path) -> Iterator[None]:
    """Create the folder `build` if necessary, and move it to `out` at the end of the block.

    If the block fails, saved progress is kept, so that the same command resumes it.
    """
    try:
        build.mkdir(exist_ok=True)
        yield
        if not (build / INPUTS).exists():
            (out / INPUTS).unlink(missing_ok=True)  # of the corpus that is replaced
        files.put_in_place(build, out, "meta.json")
    except BaseException:
        if (build / PROGRESS).exists():
            say("interrupted; run the same command again to resume")
        else:
            shutil.rmtree(build, ignore_errors=True)  # report the original error, not one of the clean-up
        raise
    (out / PROGRESS).unlink(missing_ok=True)
    splits = read_meta(out / "meta.json")["splits"].values()
    current = {file["file"] for split in splits for file in split["shards"] + split.get("masks", [])}
    for path in (*out.glob("*.bin"), *out.glob("*.mask")):
        if OWN_FILES.fullmatch(path.name) and path.name not in current:  # of a longer corpus that was replaced
            path.unlink()


def _print_table(out: Path, meta: dict) -> None:
    of_examples = meta["format"] == EXAMPLES_FORMAT
    source = meta["source"] + (f", examples of {', '.join(meta['fields'])}" if of_examples else "")
    print(f"{printable(out)}: {source}, split by {meta['split_by']}, vocabulary {meta['vocab_size']:,}")
    documents, tokens = ("examples", "counted") if of_examples else ("documents", "tokens")
    print(f"{'split':5} {documents:>10} {tokens:>14} {'bytes':>15} {'words':>14} {'bytes/token':>12}")
    for name, split in meta["splits"].items():
        tokens = split["counted"] if of_examples else split["tokens"]
        counts = f"{split['documents']:>10,} {tokens:>14,} {split['bytes']:>15,} {split['words']:>14,}"
        print(f"{name:5} {counts} {split['bytes'] / tokens:>12.3f}")
    if of_examples:
        total = sum(split["tokens"] for split in meta["splits"].values())
        print(f"only tokens of assistant turns are counted; {total:,} tokens in total")
    if meta["skipped"]:
        print(f"left out: {_listed(meta['skipped'])}")


def _listed(skipped: dict[str, int]) -> str:
    """Bad rows by reason, on one line."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- command line -----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the flags. Raises InputError if they contradict each other."""
    parser = Parser(
        prog="data/prepare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sizes = ", ".join(f"{name} ({download.bytes / 1e6:,.0f} MB)" for name, download in DOWNLOADS.items())
    add = parser.add_argument_group("input").add_argument
    add("corpus", nargs="?", metavar="NAME", help=f"built-in corpus: pystdlib (default), or a download: {sizes}")
    add("--source", metavar="FILE", help="file of a built-in corpus that you downloaded yourself")
    add(
        "--input",
        nargs="+",
        metavar="PATH",
        help=f"your own text: files ({' '.join(KINDS)}, optionally with .gz or .zst), folders of such files, patterns, "
        "or - for standard input",
    )
    add("--format", choices=READERS, help="format of --input (default: by suffix; text for standard input)")
    add("--field", default="text", help="with --input: the field of a row that contains the text (default: text)")
    add("--hf", metavar="NAME[:CONFIG]", help="dataset on the Hugging Face hub; needs pip install datasets")
    add("--hf-split", default="train", metavar="NAME", help="with --hf: the split to use (default: train)")
    add("--hf-column", default="text", metavar="NAME", help="with --hf: column that contains the text (default: text)")
    add(
        "--bad-rows",
        choices=("stop", "skip"),
        default="stop",
        help="on a row without text, a file that is not UTF-8, or similar: stop with an error (default), or skip and "
        "count it",
    )
    add("--limit", type=_number(0), default=0, metavar="N", help="use only the first N documents (default 0: all)")
    add("--one-document", action="store_true", help="join all documents with newlines and cut the text 90/5/5")
    add = parser.add_argument_group("tokenizer").add_argument
    add(
        "--tokenizer",
        metavar="KIND",
        help="sentencepiece: train a BPE (default); byte; or hf:DIR, the tokenizer of a Hugging Face model, a folder "
        "or owner/name on the hub",
    )
    add(
        "--vocab-size",
        type=_number(1, MAX_VOCAB_SIZE),
        metavar="N",
        help=f"vocabulary size of the SentencePiece BPE (default {VOCAB_SIZE}, or fewer if the text yields fewer)",
    )
    add("--tokenizer-from", metavar="PATH", help="use the tokenizer.model of another corpus or run (file or folder)")
    add = parser.add_argument_group("output").add_argument
    add("--name", help="name of the corpus, with --input and --hf (default: that of the folder --out)")
    add("--out", metavar="DIR", help="folder of the corpus (default: data/NAME)")
    add("--overwrite", action="store_true", help="replace an existing corpus")
    add("--workers", type=_number(1), metavar="N", help="threads for encoding (default: one per core)")
    args = parser.parse_args(argv)

    if args.corpus not in (None, *BUILT_IN):
        parser.error(
            f"{printable(args.corpus)} is not a built-in corpus ({', '.join(BUILT_IN)}): for your own text, use --input"
        )
    own = [flag for flag, value in (("--input", args.input), ("--hf", args.hf)) if value]
    if len(own) + (args.corpus is not None) > 1:
        parser.error("prepare one corpus at a time: NAME, --input or --hf")
    if own:
        if not args.name and not args.out:
            parser.error(f"{own[0]} needs --name NAME, for the folder data/NAME, or --out DIR")
        if args.name and (args.name in BUILT_IN or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", args.name)):
            parser.error(
                f"--name {printable(args.name)}: use letters, digits, '.', '-' and '_', and not a built-in name"
            )
    elif args.name:
        parser.error("--name needs --input or --hf: for a built-in corpus, choose the folder with --out DIR")
    if args.source and args.corpus not in DOWNLOADS:
        parser.error(f"--source needs the NAME of a corpus that is downloaded: {', '.join(DOWNLOADS)}")
    if not own and args.bad_rows == "skip":
        parser.error("--bad-rows needs --input or --hf")
    if not args.hf and (args.hf_split, args.hf_column) != ("train", "text"):
        parser.error("--hf-split and --hf-column need --hf")
    if args.field != "text" and not args.input:
        parser.error("--field needs --input" + (": with --hf, use --hf-column" if args.hf else ""))
    if args.format and not args.input:
        parser.error("--format needs --input")
    if args.tokenizer_from and (args.tokenizer or args.vocab_size):
        parser.error("--tokenizer-from determines the tokenizer: leave out --tokenizer and --vocab-size")
    if args.tokenizer and args.tokenizer not in ("sentencepiece", "byte") and not args.tokenizer.startswith("hf:"):
        parser.error(f"--tokenizer {args.tokenizer} is unknown: pass sentencepiece, byte, or hf:DIR")
    if args.tokenizer not in (None, "sentencepiece") and args.vocab_size:
        parser.error(f"--tokenizer {args.tokenizer} has a fixed vocabulary: leave out --vocab-size")
    return args


def _number(least: int, most: int = sys.maxsize) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text[:20]) < least:
            raise argparse.ArgumentTypeError(f"{text!r:.60} is not an integer of at least {least}")
        if int(text[:20]) > most:
            raise argparse.ArgumentTypeError(f"{text:.60} is more than {most}")
        return int(text)

    return number


def _tokenizer(args: argparse.Namespace) -> str | Tokenizer:
    """The tokenizer argument of prepare_corpus, from --tokenizer and --tokenizer-from."""
    if args.tokenizer_from:
        path = Path(os.path.expanduser(args.tokenizer_from))
        if path.is_dir() and not (path / "tokenizer.model").exists() and (path / "tokenizer.json").exists():
            path /= "tokenizer.json"  # load() rejects it with a hint
        return load(path / "tokenizer.model" if path.is_dir() else path)
    if args.tokenizer and args.tokenizer.startswith("hf:"):
        from minidisp import hf  # imports torch

        return hf.load_tokenizer(os.path.expanduser(args.tokenizer.removeprefix("hf:")))
    return args.tokenizer or "sentencepiece"


def command(argv: list[str] | None) -> None:
    """Prepare the corpus of a command line."""
    args = parse_args(argv)
    out = Path(os.path.realpath(os.path.expanduser(args.out or DATA / (args.name or args.corpus or "pystdlib"))))
    name = args.name or args.corpus or (printable(out.name) if args.input or args.hf else "pystdlib")
    if not out.name:
        raise InputError(f"--out {out} is the root folder: choose a folder for the corpus alone")
    skip = args.bad_rows == "skip"
    folder = next((path for path in (out, out.parent) if path.is_dir() and os.access(path, os.W_OK)), None)
    if args.input:
        source = input_files(args.input, args.field, args.format or "", skip, folder)
    elif args.hf:
        source = hugging_face(args.hf, args.hf_column, args.hf_split)
    else:
        file = Path(os.path.expanduser(args.source)) if args.source else None
        source = built_in(name, out.parent / ".downloads", file)
    prepare_corpus(
        name,
        source,
        out,
        tokenizer=_tokenizer(args),
        vocab_size=args.vocab_size or 0,
        one_document=args.one_document,
        limit=args.limit,
        workers=args.workers,
        overwrite=args.overwrite,
        skip_bad_rows=skip,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    return exit_code("prepare.py", lambda: command(argv))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a terminated process cleans up, too
    sys.exit(main())
