"""Text to token ids and back without loss: a SentencePiece BPE and a plain byte tokenizer behind one interface.

    tokenizer = load("data/pystdlib/tokenizer.model")       # recognises which of the two the file holds
    ids = tokenizer.encode("def f():\\n")                    # list[int], no end-of-sequence id added
    tokenizer.decode(ids) == "def f():\\n"                   # for every str that UTF-8 can represent

An id stands for the same bytes wherever it occurs: decoding is a join, and bits per byte are counted token by token.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from minidisp import InputError

SPACE = "\u2581"  # SentencePiece writes a space as this character, and so cannot tell the two apart
SENTENCE_CHARS = 2000  # training text is fed in pieces of about this size
BYTE_FILE = b'{"tokenizer": "byte", "version": 1}\n'

# What a tokenizer that normalises, strips or prepends anything would change.
_PROBE = "  a\t\tb \r\n\n\0 \ufb01 \u00c5 A\u030a \U0001f642 <unk></s> c  "


class Tokenizer:
    """What both kinds share. vocab_size and eos_id are ints; token_bytes[i] is what id i stands for, b"" for EOS."""

    vocab_size: int
    eos_id: int
    token_bytes: list[bytes]

    def __init__(self, serialized: bytes):
        self._serialized = serialized

    @property
    def hash(self) -> str:
        """sha256 of the tokenizer's file, 64 hexadecimal digits."""
        return hashlib.sha256(self._serialized).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the file that `load` reads."""
        Path(path).write_bytes(self._serialized)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without EOS. UnicodeEncodeError (a ValueError) if it holds half a surrogate pair."""
        raise NotImplementedError

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """`encode` of every text; threads changes the speed, never the ids."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. A character whose bytes are incomplete, as a cut can leave it, becomes U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")


class ByteTokenizer(Tokenizer):
    """One id per UTF-8 byte, and 256 for EOS."""

    vocab_size = 257
    eos_id = 256

    def __init__(self):
        super().__init__(BYTE_FILE)
        self.token_bytes = [bytes([i]) for i in range(256)] + [b""]

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback. ValueError where the model is damaged or would change the text."""

    def __init__(self, serialized: bytes):
        super().__init__(serialized)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        except RuntimeError as error:
            raise ValueError("not a tokenizer file, or a damaged one") from error
        self.vocab_size = self._model.vocab_size()
        if self.vocab_size == 0:  # an empty file is a valid, empty protocol buffer
            raise ValueError("not a tokenizer file, or a damaged one")
        self.eos_id = self._model.eos_id()
        if self.eos_id < 0:
            raise ValueError("this SentencePiece model has no end-of-sequence token")
        self.token_bytes = [self._bytes_of(i) for i in range(self.vocab_size)]
        byte_ids = {token: i for i, token in enumerate(self.token_bytes) if self._model.is_byte(i)}
        if len(byte_ids) < 256:
            raise ValueError("this SentencePiece model has no byte fallback, so it cannot encode every text")
        self._space_ids = [byte_ids[bytes([byte])] for byte in SPACE.encode("utf-8")]
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ValueError("this SentencePiece model normalises text; train it with identity normalisation")

    def _bytes_of(self, i: int) -> bytes:
        if self._model.is_control(i) or self._model.is_unknown(i):
            return b""
        piece = self._model.id_to_piece(i)
        if self._model.is_byte(i):  # written <0x41>
            return bytes([int(piece[3:-1], 16)])
        return piece.replace(SPACE, " ").encode("utf-8")

    def encode(self, text: str) -> list[int]:
        text.encode("utf-8")  # raises the error promised above; what SentencePiece does here depends on its version
        first, *rest = text.split(SPACE)  # a literal U+2581 is spelled in bytes, as SentencePiece takes it for a space
        ids = self._model.encode(first)
        for part in rest:
            ids += self._space_ids + self._model.encode(part)
        return ids

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        if any(SPACE in text for text in texts):  # too rare to be worth a fast path
            return super().encode_batch(texts)
        for text in texts:
            text.encode("utf-8")
        return self._model.encode(texts, num_threads=threads)


def load(path: str | Path) -> Tokenizer:
    """The tokenizer saved in a file. InputError naming the file if it is missing, damaged or something else."""
    try:
        serialized = Path(path).read_bytes()
        return ByteTokenizer() if serialized == BYTE_FILE else SentencePieceTokenizer(serialized)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """A BPE with byte fallback from the texts; the same texts in the same order give the same file.

    vocab_size counts everything: <unk>, EOS, 256 bytes, every character that is not rare (99.95 % of the text), merges.
    InputError if there is no text, or if vocab_size is smaller or larger than what the text calls for.
    Words are split at spaces and between letters, digits and punctuation, but a run of spaces can be one token, as
    source code wants it. The whole text is held in memory several times over; give a sample of a large corpus.
    """
    model = io.BytesIO()
    # A list, because an exception inside an iterator would come back through SentencePiece as something else.
    sentences = [sentence for text in texts for sentence in _sentences(text) if sentence.strip("\r\n")]
    if not sentences:
        raise InputError("there is no text to train a tokenizer on")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=1 << 20,  # bytes; a longer sentence would be left out without a word
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,  # the file records it, so a number of cores here would change the file's hash
            minloglevel=2,
        )
    except RuntimeError as error:
        if found := re.search(r"too high \(.*<= (\d+)", str(error)):
            raise InputError(
                f"this text gives at most {found[1]} different tokens, not {vocab_size}: "
                f"lower --vocab-size to {found[1]}, or add text"
            ) from error
        if found := re.search(r"smaller than required_chars. \S+ vs (\d+)", str(error)):
            raise InputError(
                f"a vocabulary of {vocab_size} cannot hold the characters of this text: "
                f"raise --vocab-size to {found[1]} or more, or use --tokenizer byte"
            ) from error
        if vocab_size < 258:
            raise InputError(f"a vocabulary of {vocab_size} cannot hold the 256 bytes, EOS and <unk>") from error
        raise
    return SentencePieceTokenizer(model.getvalue())


def _sentences(text: str) -> Iterator[str]:
    """Consecutive lines in pieces of about SENTENCE_CHARS.

    Not line by line: the newlines have to stay inside, or none would get into the vocabulary.
    """
    # The trainer drops NUL, leaves out every sentence with U+2585, and would take U+2581 for a space.
    text = text.translate({0: " ", 0x2585: " ", ord(SPACE): " "})
    start = 0
    while start < len(text):
        newline = text.find("\n", start + SENTENCE_CHARS, start + 2 * SENTENCE_CHARS)
        stop = newline if newline > 0 else start + 2 * SENTENCE_CHARS
        yield text[start:stop]  # the newline opens the next piece; the trainer strips it from the end of one
        start = stop
