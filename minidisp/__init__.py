"""minidisp: small language models trained from scratch, with and without the dispersion loss (arXiv 2602.00217).

from minidisp import dispersion_loss, DispersionLoss, GPT, GPTConfig, load
"""

import importlib
import json
import os
import stat
import unicodedata
from pathlib import Path

__version__ = "0.1.0"


class InputError(ValueError):
    """What the user gave cannot be used: the message is one line that says what, where, and what to do.

    Commands print it without a traceback and exit with code 2.
    """


def read_bytes(path: str | Path, most: int = 1 << 30) -> bytes:
    """The content of a file of at most `most` bytes. Raises InputError naming the file if it cannot be read."""
    try:
        found = os.stat(path)  # before it is opened: a pipe would wait for ever
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise InputError(f"{path}: not a regular file")
        if found.st_size > most:
            raise InputError(f"{path}: {found.st_size:,} bytes are too many for such a file")
        with open(path, "rb") as file:
            return file.read(most)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def parse_json(text: bytes, where: str | Path) -> object:
    """What UTF-8 JSON says. Raises InputError starting with `where` if it is no JSON, or has NaN or a key twice."""

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is no number in JSON")

    def unique(pairs: list[tuple[str, object]]) -> dict:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {ascii(twice)[:40]} stands there twice")
        return values

    try:
        return json.loads(text.decode("utf-8"), parse_constant=no_number, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is damaged, or not JSON: {error}") from None


def is_plain(text: str) -> bool:
    """Whether a text from a file can be printed and used in a path: no control characters, no half surrogate pairs."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def printable(text: str | Path) -> str:
    """A text on one line, with an escape for what cannot be printed: bytes that are no UTF-8 in a file's name, newlines."""
    return "".join(c if is_plain(c) else _escape(c) for c in str(text))


def _escape(character: str) -> str:
    code = ord(character)  # Python writes a byte of a name that is no UTF-8 as U+DC00 + the byte
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()


# The public names load on first use, so that importing a small part (the tokenizer, say) does not import torch.
_HOME = {
    "GPT": "model",
    "GPTConfig": "model",
    "dispersion_loss": "dispersion",
    "DispersionLoss": "dispersion",
    "load": "runtime.checkpoint",
}
__all__ = ["InputError", *_HOME]


def __getattr__(name: str):
    if name == "hf":
        return importlib.import_module("minidisp.hf")
    if name not in _HOME:
        raise AttributeError(f"module 'minidisp' has no attribute '{name}'")
    return getattr(importlib.import_module(f"minidisp.{_HOME[name]}"), name)
