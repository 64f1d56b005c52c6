"""From documents to pieces of text assigned to splits, a sample for the tokenizer, and token shards."""

import contextlib
import hashlib
import heapq
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data.sources import BadRow, Document
from minidisp import InputError
from minidisp.shards import COUNTED, EXAMPLES, FIRST, MASK, SPLITS, TEXT, ShardWriter
from minidisp.template import Messages, Template
from minidisp.tokenizer import Tokenizer

SHARD_TOKENS = 100_000_000
BATCH_CHARS = 1 << 23  # encoded at a time, by all threads together
BATCH_PIECES = 100_000  # likewise: a piece of a few characters and its tokens take 500 bytes
SAMPLE_PIECES = 500_000  # each takes 300 bytes in addition to its text
MAX_DOCUMENT_CHARS = 1 << 25  # a document is held in memory, as its hash decides the split
SAVE_EVERY_S = 10  # the most work that an interruption may lose


class Piece(NamedTuple):
    split: str
    text: str
    ends: bool  # the last piece of its document
    messages: list[dict[str, str]] | None = None  # of an example


def usable(
    items: Iterable[Document | BadRow], skip: bool, skipped: Counter, check: Callable[[Messages], object]
) -> Iterator[Document]:
    """The non-empty documents. Bad rows are raised, or with `skip` counted by reason in `skipped` (reset at each call).

    The first document determines whether the corpus consists of examples or of texts; documents of the other kind are
    bad rows, and so are examples for which `check` raises InputError.
    """
    skipped.clear()
    of_examples = None
    for item in items:
        if not isinstance(item, BadRow):
            blocks = iter(item.blocks)
            first = next(blocks, "")
            if not first:
                continue
            is_example = item.messages is not None
            of_examples = is_example if of_examples is None else of_examples
            item = _bad(item, of_examples, check) or item._replace(blocks=itertools.chain([first], blocks))
        if not isinstance(item, BadRow):
            yield item
        elif skip:
            skipped[item.reason] += 1
        else:
            raise item


def _bad(document: Document, of_examples: bool, check: Callable[[Messages], object]) -> BadRow | None:
    """The BadRow for a document that does not fit in a corpus of examples, or of texts; else None."""
    if (document.messages is not None) != of_examples:
        kinds = ("an example", "texts") if not of_examples else ("a text", "examples")
        fault = f"{kinds[0]} among {kinds[1]}: prepare them separately and train on both with --data NAME NAME"
        return BadRow("of another kind", f"{document.name}: {fault}")
    if of_examples:
        try:
            check(document.messages)
        except InputError as error:
            return BadRow("refused by the template", f"{document.name}: {error}")
    return None


def by_hash(documents: Iterable[Document]) -> Iterator[Piece]:
    """Assign each document as a whole to a split, by the hash of its text."""
    for document in documents:
        digest, blocks, size = hashlib.sha256(), [], 0
        for block in document.blocks:
            digest.update(block.encode("utf-8"))
            blocks.append(block)
            size += len(block)
            if size > MAX_DOCUMENT_CHARS:
                raise InputError(
                    f"{document.name}: more than {MAX_DOCUMENT_CHARS:,} characters in one document: split it, or pass "
                    "--one-document to join all documents and cut the text 90/5/5"
                )
        percent = int.from_bytes(digest.digest()[:8], "big") % 100
        split = "train" if percent < 90 else "val" if percent < 95 else "test"
        for i, block in enumerate(blocks, 1):
            yield Piece(split, block, i == len(blocks), document.messages)


def joined(documents: Iterable[Document]) -> Iterator[str]:
    """The text of all documents, separated by newlines."""
    for i, document in enumerate(documents):
        yield from itertools.chain(["\n"] if i else [], document.blocks)


def by_position(blocks: Iterable[str], chars: int) -> Iterator[Piece]:
    """One text of `chars` characters, cut into three documents at 90 and 95 %."""
    ends = [("train", chars * 90 // 100), ("val", chars * 95 // 100), ("test", chars)]
    position = 0
    for block in blocks:
        while block:
            if not ends:
                raise InputError("the text grew while it was read: prepare it when nothing writes to it")
            split, end = ends[0]
            text, block = block[: end - position], block[end - position :]
            position += len(text)
            yield Piece(split, text, ends=position == end)
            if position == end:
                ends.pop(0)


def survey(pieces: Iterable[Piece], sample_bytes: int) -> tuple[dict[str, int], int, list[str]]:
    """Documents per split, total characters, and a sample of the training text, about sample_bytes or SAMPLE_PIECES.

    The sample consists of the pieces with the smallest hashes, in the order of the corpus. So each piece has the same
    chance, regardless of the order and size of the corpus, without random numbers.
    """
    documents, chars, sampled = dict.fromkeys(SPLITS, 0), 0, 0
    is_full = False  # then pieces with a larger hash than all in the sample are skipped
    heap: list[tuple[int, int, int, str]] = []  # (-hash, number, bytes, text), so the largest hash is on top
    for number, piece in enumerate(_progress("reading", pieces)):
        documents[piece.split] += piece.ends
        chars += len(piece.text)
        if piece.split == "train" and sample_bytes:
            text = piece.text.encode("utf-8")
            rank = int.from_bytes(hashlib.sha256(text).digest()[8:16], "big")  # the first 8 bytes chose the split
            if is_full and -rank < heap[0][0]:
                continue
            heapq.heappush(heap, (-rank, number, len(text), piece.text))
            sampled += len(text)
            while sampled - heap[0][2] >= sample_bytes or len(heap) > SAMPLE_PIECES:
                sampled -= heapq.heappop(heap)[2]
                is_full = True
    return documents, chars, [text for _, _, _, text in sorted(heap, key=lambda entry: entry[1])]


def write_shards(
    pieces: Iterable[Piece],
    chars: int,
    tokenizer: Tokenizer,
    folder: Path,
    workers: int,
    done: dict,
    save: Callable[[dict], None],
    template: Template | None,
) -> dict:
    """Encode and write all pieces; returns the `splits` of meta.json. chars: their total length, for the progress bar.

    `save` is called regularly with the progress so far; pass it as `done` to resume from there. template: for a corpus
    of examples, which is written with masks; bytes and words are then those of the answers.
    """
    zero = {"documents": 0, "tokens": 0, "bytes": 0, "words": 0, **({"counted": 0} if template else {})}
    n_pieces, splits = done.get("pieces", 0), done.get("splits") or {name: dict(zero) for name in SPLITS}
    shards, mask_shards, saved = done.get("shards", {}), done.get("masks", {}), time.monotonic()
    with contextlib.ExitStack() as stack:
        open_writer = lambda *options: stack.enter_context(ShardWriter(folder, *options))  # noqa: E731
        kind, size = EXAMPLES if template else TEXT, tokenizer.vocab_size
        writers = {name: open_writer(name, size, SHARD_TOKENS, shards.get(name), kind) for name in SPLITS}
        masks = {}
        if template:
            limit = COUNTED + FIRST + 1
            masks = {name: open_writer(name, limit, SHARD_TOKENS, mask_shards.get(name), MASK) for name in SPLITS}
        rest = itertools.islice(_progress("encoding", pieces, chars), n_pieces, None)
        for batch in _batches(rest):
            encode = _encode_examples if template else _encode_texts
            for piece, encoded in zip(batch, encode(batch, tokenizer, template, workers), strict=True):
                counts = splits[piece.split]
                writers[piece.split].write(encoded.ids)
                if template:
                    masks[piece.split].write(encoded.mask)
                    counts["counted"] += sum(flags & COUNTED for flags in encoded.mask)
                counts["documents"] += piece.ends
                counts["tokens"] += len(encoded.ids)
                counts["bytes"] += encoded.bytes
                counts["words"] += encoded.words
            n_pieces += len(batch)
            if time.monotonic() - saved >= SAVE_EVERY_S:
                shards = {name: writer.state() for name, writer in writers.items()}
                mask_shards = {name: writer.state() for name, writer in masks.items()}
                save({"pieces": n_pieces, "splits": splits, "shards": shards, "masks": mask_shards})
                saved = time.monotonic()
    files = {name: {"shards": writer.shards} for name, writer in writers.items()}
    return {
        name: {**splits[name], **files[name], **({"masks": masks[name].shards} if masks else {})} for name in SPLITS
    }


class _Encoded(NamedTuple):
    ids: list[int]
    mask: list[int] | None  # of an example
    bytes: int
    words: int


def _encode_texts(batch: list[Piece], tokenizer: Tokenizer, template: None, workers: int) -> Iterator[_Encoded]:
    lengths = [len(token) for token in tokenizer.token_bytes]
    encoded = tokenizer.encode_batch([piece.text for piece in batch], threads=workers)
    for piece, ids in zip(batch, encoded, strict=True):
        n_bytes = len(piece.text.encode("utf-8"))
        if sum(map(lengths.__getitem__, ids)) != n_bytes:
            raise InputError(f"the tokenizer changes the text {piece.text[:40]!a}...: use another one")
        yield _Encoded([*ids, tokenizer.eos_id] if piece.ends else ids, None, n_bytes, len(piece.text.split()))


def _encode_examples(batch: list[Piece], tokenizer: Tokenizer, template: Template, workers: int) -> Iterator[_Encoded]:
    for piece in batch:
        ids, counted = template.render(piece.messages)
        answers = [message["content"] for message in piece.messages if message["role"] == "assistant"]
        mask = [COUNTED * counts for counts in counted]
        mask[0] |= FIRST
        n_bytes = sum(len(tokenizer.token_bytes[i]) for i, counts in zip(ids, counted, strict=True) if counts)
        yield _Encoded(ids, mask, n_bytes, sum(len(answer.split()) for answer in answers))


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, chars = [], 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= BATCH_CHARS or len(batch) >= BATCH_PIECES:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _progress(verb: str, pieces: Iterable[Piece], chars: int | None = None) -> Iterator[Piece]:
    with tqdm(desc=verb, total=chars, unit="char", unit_scale=True, leave=False, disable=None) as progress:
        for piece in pieces:
            yield piece
            progress.update(len(piece.text))
