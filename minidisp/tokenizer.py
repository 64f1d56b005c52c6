"""Lossless tokenizers: SentencePiece BPE, plain bytes, or the BPE of a Hugging Face model.

    tokenizer = load("data/pystdlib/tokenizer.model")       # detects which of the three is in the file
    ids = tokenizer.encode("def f():\\n")                    # list[int], no end-of-sequence id added
    tokenizer.decode(ids) == "def f():\\n"                   # for every str that UTF-8 can represent

Each id always represents the same bytes, so decoding concatenates them, and bytes can be counted token by token.
"""

import contextlib
import hashlib
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from minidisp import InputError, parse_json, printable, read_bytes

SPACE = "\u2581"  # SentencePiece represents a space by this character, and cannot distinguish the two
SENTENCE_CHARS = 2000  # approximate size of the pieces in which training text is passed on
BYTE_FILE = b'{"tokenizer": "byte", "version": 1}\n'
HUGGING_FACE_FILE = b'{"tokenizer": "huggingface", "version": 1,'  # how such a file starts: see HuggingFaceTokenizer
MAX_VOCAB = 1 << 20  # of a Hugging Face tokenizer; a larger number means a damaged file

# A text that does not survive encoding and decoding if a tokenizer normalises, strips, drops or adds anything.
_PROBE = "  a\t\tb \r\n\n\0 \ufb01 \u00c5 A\u030a \U0001f642 <unk></s> 20 3-4.5 (x) {y} B_c #!? c  "


class Tokenizer(ABC):
    """The common interface. token_bytes[i]: the bytes of id i, b"" for EOS. eos_token: the name of EOS in files."""

    vocab_size: int
    eos_id: int
    eos_token: str
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

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without EOS. UnicodeEncodeError (a ValueError) if it contains a lone surrogate."""

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """`encode` for every text; threads affects only the speed."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. An incomplete character, for example after truncation, becomes U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")


class ByteTokenizer(Tokenizer):
    """One id per UTF-8 byte, and 256 for EOS."""

    vocab_size = 257
    eos_id = 256
    eos_token = "</s>"

    def __init__(self):
        super().__init__(BYTE_FILE)
        self.token_bytes = [bytes([i]) for i in range(256)] + [b""]

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback. Raises ValueError if the model is damaged or would change the text."""

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
        self.eos_token = self._model.id_to_piece(self.eos_id)
        self.token_bytes = [self._bytes_of(i) for i in range(self.vocab_size)]
        byte_ids = {token: i for i, token in enumerate(self.token_bytes) if self._model.is_byte(i)}
        if len(byte_ids) < 256:
            raise ValueError("this SentencePiece model has no byte fallback, so it cannot encode every text")
        # Encoded as bytes here: a literal U+2581, which SentencePiece would treat as a space, and the space itself if
        # it has no piece (too rare in the training text), as SentencePiece would fall back to the bytes of U+2581.
        self._spelled = {SPACE: [byte_ids[bytes([byte])] for byte in SPACE.encode("utf-8")]}
        if self._model.piece_to_id(SPACE) == self._model.unk_id():
            self._spelled[" "] = [byte_ids[b" "]]
        self._spelled_here = re.compile(f"([{''.join(self._spelled)}])")
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ValueError("this SentencePiece model normalises text; train it with identity normalisation")

    def _bytes_of(self, i: int) -> bytes:
        if self._model.is_control(i) or self._model.is_unknown(i):
            return b""
        piece = self._model.id_to_piece(i)
        if self._model.is_byte(i):  # written <0x41>
            return bytes([int(piece[3:-1], 16)])
        return piece.replace(SPACE, " ").encode("utf-8")

    def as_merges(self) -> tuple[list[str], list[tuple[str, str]]]:
        """The same BPE in the form of the package tokenizers: the pieces ordered by id, and the merges by rank.

        Spaces are written as spaces. SentencePiece merges any two neighbours that form a piece: the best piece first,
        then from left to right. So every split of a piece into two pieces becomes a merge. Different splits of a piece
        get different ranks here, while SentencePiece only considers the position. This could only matter if a piece
        occurred twice, overlapping and split differently; no such case was found (the tests try every text of 11
        letters). Raises ValueError if the model is not a BPE.
        """
        pieces = [self._model.id_to_piece(i) for i in range(self.vocab_size)]
        plain = {}
        for i, piece in enumerate(pieces):
            if not (self._model.is_control(i) or self._model.is_unknown(i) or self._model.is_byte(i)):
                pieces[i] = piece.replace(SPACE, " ")
                plain[pieces[i]] = self._model.get_score(i)
        by_rank = sorted(plain, key=plain.get, reverse=True)
        if [-plain[piece] for piece in by_rank] != [*range(len(by_rank))]:  # a unigram model has log p instead of ranks
            raise ValueError("this SentencePiece model is not a BPE, so it has no merges")
        merges = [
            (piece[:cut], piece[cut:])
            for piece in by_rank
            for cut in range(1, len(piece))
            if piece[:cut] in plain and piece[cut:] in plain
        ]
        return pieces, merges

    def encode(self, text: str) -> list[int]:
        text.encode("utf-8")  # raises UnicodeEncodeError; SentencePiece's own behaviour depends on its version
        ids = []
        for part in self._spelled_here.split(text):
            ids += self._spelled.get(part) or self._model.encode(part)
        return ids

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        for text in texts:
            text.encode("utf-8")
        split = [self._spelled_here.split(text) for text in texts]  # text, spelled, text, ..., text
        encoded = iter(self._model.encode([part for parts in split for part in parts[::2]], num_threads=threads))
        batch = []
        for parts in split:
            ids = next(encoded)
            for spelled in parts[1::2]:
                ids = ids + self._spelled[spelled] + next(encoded)
            batch.append(ids)
        return batch


class HuggingFaceTokenizer(Tokenizer):
    """The BPE of a Hugging Face model, run by the package tokenizers: byte-level as in GPT-2, or with byte fallback.

    To be lossless, it differs from transformers in two ways: names of special tokens in a text, such as <|endoftext|>,
    are plain text, and Unicode is not normalised (to NFC, as Qwen3 does). Raises ValueError if the tokenizer is of
    another kind, is damaged, or changes the text in another way.
    """

    # Settings next to tokenizer.json. They are not used here, but kept for export.
    FILES = (
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.json",
        "chat_template.jinja",
        "additional_chat_templates/*.jinja",
        "generation_config.json",
    )

    @staticmethod
    def pack(tokenizer_json: dict, eos_token: str, vocab_size: int, files: dict[str, str] | None = None) -> bytes:
        """Combine the files of a Hugging Face tokenizer into one.

        tokenizer_json: the content of tokenizer.json. vocab_size: the number of rows of the model's embedding, which
        may exceed the number of tokens; 0 = the number of tokens. files: the contents of FILES, and of config.json the
        entries about special tokens.
        """
        values = {"eos_token": eos_token, "vocab_size": vocab_size, "tokenizer_json": tokenizer_json}
        rest = json.dumps({**values, **({"files": files} if files else {})})
        return HUGGING_FACE_FILE + b" " + rest[1:].encode() + b"\n"

    @property
    def hash(self) -> str:
        """The hash of the file without settings, as they do not affect the ids."""
        if not self.files:
            return super().hash
        return hashlib.sha256(self.pack(self.tokenizer_json, self.eos_token, self._rows)).hexdigest()

    def __init__(self, serialized: bytes):
        super().__init__(serialized)
        try:
            import tokenizers
        except ImportError:
            raise ValueError("a Hugging Face tokenizer needs the package tokenizers: pip install tokenizers") from None
        try:
            packed = parse_json(serialized, "this tokenizer")
            eos_token, rows, self.tokenizer_json = (
                packed[key] for key in ("eos_token", "vocab_size", "tokenizer_json")
            )
            if type(eos_token) is not str or type(rows) is not int or not 0 <= rows <= MAX_VOCAB:
                raise TypeError("eos_token or vocab_size")
            self.files = _check_files(packed.get("files", {}))
            added = self.tokenizer_json.get("added_tokens") or []
            # Added tokens for which the embedding has no row, which transformers accepts, are treated as text here.
            self.without_row = [token["content"] for token in added if rows and token["id"] >= rows]
            names = {token["content"] for token in added} - {*self.without_row}
            in_bytes = _check_kind(self.tokenizer_json, eos_token)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a tokenizer file, or a damaged one ({type(error).__name__}: {error})") from error
        self.eos_token, self._rows = eos_token, rows
        # Used here to map text to ids only, without normalisation, added tokens, truncation or padding.
        unused = dict.fromkeys(("normalizer", "post_processor", "truncation", "padding"))
        self.as_used = {**self.tokenizer_json, **unused, "added_tokens": [t for t in added if t["content"] in names]}
        with _errors_of_tokenizers("not a tokenizer file, or a damaged one"):
            self._model = tokenizers.Tokenizer.from_str(json.dumps(self.as_used))
        self.eos_id = self._model.token_to_id(eos_token)
        if self.eos_id is None:
            no_row = eos_token in self.without_row
            why = "has no row in the model's embedding" if no_row else "is not one of this tokenizer's tokens"
            raise ValueError(f"the end-of-sequence token {eos_token!r} {why}")
        self._model.add_special_tokens([tokenizers.AddedToken(eos_token, normalized=False)])
        self._model.encode_special_tokens = True  # encode their names in a text as text
        ids = self._model.get_vocab()
        n_tokens = max(ids.values()) + 1
        self.vocab_size = rows or n_tokens
        if self.vocab_size < n_tokens or n_tokens > MAX_VOCAB:
            raise ValueError(f"this tokenizer has {n_tokens:,} tokens, but its model only {self.vocab_size:,}")
        self.token_bytes = [b""] * self.vocab_size  # stays empty for special tokens and unused rows
        special = {token.content for token in self._model.get_added_tokens_decoder().values() if token.special}
        for token in ids.keys() - special:
            self.token_bytes[ids[token]] = token.encode("utf-8") if token in names else _bytes_of(token, in_bytes)
        if not {*self.token_bytes} >= {bytes([byte]) for byte in range(256)}:
            raise ValueError("this tokenizer has no token for some bytes, so it cannot encode every text")
        for text in (_PROBE, _PROBE.strip(), eos_token):
            self.encode(text)
        if self.eos_id in self.encode(eos_token):
            raise ValueError(f"this tokenizer encodes the text {eos_token!r} as its end-of-sequence token")

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode. Also raises InputError if this tokenizer drops or changes part of the text."""
        text.encode("utf-8")  # raises UnicodeEncodeError
        with _errors_of_tokenizers("this tokenizer cannot encode the text"):
            ids = self._model.encode(text, add_special_tokens=False).ids
        return self._checked(text, ids)

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        for text in texts:
            text.encode("utf-8")
        size = max(1, len(texts)) if threads > 1 else 1  # several are encoded on all processors
        batch = []
        with _errors_of_tokenizers("this tokenizer cannot encode the text"):
            for start in range(0, len(texts), size):  # fast: without offsets
                batch += self._model.encode_batch_fast(texts[start : start + size], add_special_tokens=False)
        return [self._checked(text, encoded.ids) for text, encoded in zip(texts, batch, strict=True)]

    def _checked(self, text: str, ids: list[int]) -> list[int]:
        # Checked for every text, as the file does not tell: a pattern in it may drop digits, for example.
        if b"".join(map(self.token_bytes.__getitem__, ids)) != text.encode("utf-8"):
            raise InputError(f"this tokenizer changes the text {text[:40]!a}: it adds, strips or replaces something")
        return ids


@contextlib.contextmanager
def _errors_of_tokenizers(what: str) -> Iterator[None]:
    """Raise InputError for any error in the package tokenizers.

    Its errors are plain Exceptions. A panic of its Rust code is a BaseException, preceded by a backtrace on file
    descriptor 2, which is suppressed.
    """
    try:
        with _no_stderr():
            yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # KeyboardInterrupt or SystemExit
        raise InputError(f"{what} ({printable(str(error))[:200]})") from None


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_files(files: object) -> dict[str, str]:
    """The settings in a tokenizer file; TypeError unless they are strings with expected file names, and InputError
    unless the .json files hold JSON objects.
    """
    names = (*HuggingFaceTokenizer.FILES, "config.json")
    patterns = [re.escape(name).replace(r"\*", r"[\w. -]+") for name in names]
    named = isinstance(files, dict) and all(re.fullmatch("|".join(patterns), name) for name in files)
    if not named or not all(isinstance(text, str) for text in files.values()):
        raise TypeError("files")
    for name, text in files.items():
        if name.endswith(".json") and not isinstance(parse_json(text.encode("utf-8"), f"its {name}"), dict):
            raise TypeError(name)
    return files


def _check_kind(tokenizer_json: dict, eos_token: str) -> bool:
    """Whether a tokenizer.json is byte-level; otherwise it has byte fallback.

    Raises ValueError if it is neither, is not a BPE, or loses text.
    """
    model = tokenizer_json["model"]
    if model.get("type") not in ("BPE", None) or model.get("dropout"):
        kind = str(model.get("type"))[:40]
        raise ValueError(f"only BPE tokenizers without dropout are supported; this one is of type {kind}")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("this tokenizer marks words inside its tokens, so they do not represent bytes")
    for token in tokenizer_json.get("added_tokens") or []:
        if (token["lstrip"] or token["rstrip"]) and not (token["special"] or token["content"] == eos_token):
            raise ValueError(
                f"this tokenizer strips the spaces around its token {token['content']!r}: text would be lost"
            )
    if changes := {*_kinds(tokenizer_json.get("normalizer"))} - {"NFC"}:
        raise ValueError(f"this tokenizer normalises the text ({', '.join(sorted(changes))})")
    decoder = _kinds(tokenizer_json.get("decoder"))
    if "ByteLevel" in decoder:
        return True
    if not (model.get("byte_fallback") and decoder == ["ByteFallback", "Fuse"]):
        raise ValueError(
            "this BPE is neither byte-level, like those of GPT-2 and Qwen3, nor does it have byte fallback"
        )
    return False


def _bytes_of(token: str, in_bytes: bool) -> bytes:
    """The bytes of a token: one per character if in_bytes; else those of its text, or the byte written as <0x41>."""
    try:
        if in_bytes:
            return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        raise ValueError(f"the token {token!r} does not represent bytes") from None
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.encode("utf-8")


def _kinds(part: dict | None) -> list[str]:
    """The types of the steps in a part of a tokenizer.json."""
    if part is None:
        return []
    steps = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
    return [part["type"]] if steps is None else [kind for step in steps for kind in _kinds(step)]


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE represents bytes: printable Latin-1 as itself, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF = _byte_alphabet()


def load(path: str | Path) -> Tokenizer:
    """The tokenizer saved in a file. Raises InputError, naming the file, if it is missing, damaged or another file."""
    serialized = read_bytes(path)
    try:
        if serialized == BYTE_FILE:
            return ByteTokenizer()
        if serialized.startswith(HUGGING_FACE_FILE):
            return HuggingFaceTokenizer(serialized)
        if Path(path).suffix == ".json" and serialized.lstrip().startswith(b"{"):
            folder = Path(path).absolute().parent
            raise ValueError(f"a Hugging Face tokenizer needs its whole folder: use --tokenizer hf:{folder}")
        return SentencePieceTokenizer(serialized)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: a damaged tokenizer file: a piece is not UTF-8") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def train_sentencepiece(texts: Iterable[str], vocab_size: int, exact: bool = True) -> SentencePieceTokenizer:
    """Train a BPE with byte fallback; the same texts in the same order give the same file.

    vocab_size includes <unk>, EOS, 256 bytes, all characters but rare ones (99.95 % of the text), and merges. Raises
    InputError if there is no text, or vocab_size is too small or too large for it. With exact=False it is a target: the
    vocabulary is smaller if the text yields fewer tokens, and if its characters would take more than three quarters of
    it, the rarer ones use byte fallback.
    Words are split at spaces and between letters, digits and punctuation, but a run of spaces can be one token, which
    suits source code. Several copies of the text are held in memory: pass a sample of a large corpus.
    """
    # A list, as SentencePiece would replace an exception raised by an iterator.
    sentences = [sentence for text in texts for sentence in _sentences(text) if sentence.strip("\r\n")]
    if not sentences:
        raise InputError("there is no text to train a tokenizer on")
    if vocab_size < 258:
        raise InputError(f"--vocab-size is {vocab_size}, but must be at least 258, for 256 bytes, EOS and <unk>")
    rare = ""
    while True:
        try:
            return SentencePieceTokenizer(_train(sentences, vocab_size))
        except RuntimeError as error:
            most = re.search(r"too high \(.*<= (\d+)", str(error))
            least = re.search(r"smaller than required_chars. \S+ vs (\d+)", str(error))
            if most and not exact:
                vocab_size = int(most[1])
            elif least and not exact and not rare and vocab_size >= 262:
                counts = Counter(character for text in sentences for character in text if character not in "\r\n")
                frequent = [character for character, _ in counts.most_common((vocab_size - 258) * 3 // 4 - 2)]
                rare = "".join(counts.keys() - frequent)
                parts = (part for text in sentences for part in re.split(f"[{re.escape(rare)}]", text))
                sentences = [part for part in parts if part.strip("\r\n")]
            elif most:
                raise InputError(
                    f"this text yields at most {most[1]} tokens, not {vocab_size}: "
                    f"lower --vocab-size to {most[1]}, or add text"
                ) from error
            elif least:
                raise InputError(
                    f"a vocabulary of {vocab_size} is too small for the characters of this text: "
                    f"raise --vocab-size to {least[1]} or more, or use --tokenizer byte"
                ) from error
            else:
                raise


def _train(sentences: list[str], vocab_size: int) -> bytes:
    """The file of a SentencePiece BPE. Raises RuntimeError if the size does not suit the text."""
    model = io.BytesIO()
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
        max_sentence_length=1 << 20,  # bytes; longer sentences would be silently dropped
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        num_threads=1,  # stored in the file, so the number of cores would change its hash
        minloglevel=2,
    )
    return model.getvalue()


def _sentences(text: str) -> Iterator[str]:
    """The text in pieces of several lines, about SENTENCE_CHARS each.

    With single lines, no newline would be inside a piece, and so none would get into the vocabulary.
    """
    # The trainer drops NUL and every sentence with U+2585, and treats U+2581 as a space.
    text = text.translate({0: " ", 0x2585: " ", ord(SPACE): " "})
    start = 0
    while start < len(text):
        newline = text.find("\n", start + SENTENCE_CHARS, start + 2 * SENTENCE_CHARS)
        stop = newline if newline > 0 else start + 2 * SENTENCE_CHARS
        yield text[start:stop]  # the newline starts the next piece; at the end of a piece the trainer strips it
        start = stop


def to_tokenizer(tokenizer: Tokenizer) -> tuple[dict, str]:
    """(tokenizer.json, end-of-sequence token) for the package tokenizers: a BPE with byte fallback, without
    normaliser, pre-tokenizer or post-processor.

    Pieces contain literal spaces, so U+2581 is not a space and falls back to its three bytes, as it does here. Raises
    InputError if the tokenizer is a SentencePiece model of another kind.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.as_used, tokenizer.eos_token
    if isinstance(tokenizer, ByteTokenizer):
        pieces, merges = [*(f"<0x{byte:02X}>" for byte in range(256)), "</s>"], []
    else:
        try:
            pieces, merges = tokenizer.as_merges()
        except ValueError as error:
            raise InputError(f"tokenizer.model cannot be exported: {error}") from None
    flags = {"special": True, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}
    silent = [i for i, token in enumerate(tokenizer.token_bytes) if not token]  # end of sequence, <unk>
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": True,
        "ignore_merges": False,
    }
    tokenizer_json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": pieces[i], **flags} for i in silent],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": model | {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges},
    }
    return tokenizer_json, pieces[tokenizer.eos_id]
