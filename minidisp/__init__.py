"""minidisp: small language models trained from scratch, with and without the dispersion loss (arXiv 2602.00217).

from minidisp import dispersion_loss, DispersionLoss, GPT, GPTConfig, load
"""

import importlib
import json
import os
import re
import signal
import stat
import sys
from pathlib import Path

__version__ = "0.1.0"


def end_on_interrupt() -> None:
    """Make Ctrl-C end a command with one line and exit code 130 during its imports, which take seconds.

    No files are open at that point. runtime.cli.take_over restores the handler. An ignored SIGINT stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)


def end_at_once(number, frame) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


if sys.argv[:1] == ["-m"]:  # python -m minidisp.hf, for example, imports this package before its own first line
    end_on_interrupt()


class InputError(ValueError):
    """Invalid user input. The message is one line that says what is wrong, where, and what to do.

    Commands print it without a traceback and exit with code 2.
    """


def read_bytes(path: str | Path, most: int = 1 << 30) -> bytes:
    """The content of a file of at most `most` bytes. Raises InputError, naming the file, if it cannot be read."""
    try:
        found = os.stat(path)  # before opening, as opening a pipe would block
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise InputError(f"{path}: not a regular file")
        if found.st_size > most:
            raise InputError(f"{path} is too large: {found.st_size:,} bytes, where at most {most:,} are expected")
        with open(path, "rb") as file:
            return file.read()  # not read(most), for which Python would allocate that much
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


MOST_VALUES = 1 << 23  # of a JSON file; a value can take 170 bytes, and the largest tokenizer.json has 2 million


def parse_json(text: bytes, where: str | Path) -> object:
    """Parse UTF-8 JSON. Raises InputError, starting with `where`, if it is invalid, has NaN or duplicate keys, or so
    many values that Python would need gigabytes for them.
    """
    if len(text) > MOST_VALUES and (found := sum(map(text.count, (b",", b"[", b"{")))) > MOST_VALUES:
        raise InputError(
            f"{where} is too large: {found:,} commas and brackets, where at most {MOST_VALUES:,} are expected"
        )

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    def unique(pairs: list[tuple[str, object]]) -> dict:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"duplicate key {ascii(twice)[:40]}")
        return values

    try:
        return json.loads(text.decode("utf-8"), parse_constant=no_number, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is damaged, or not JSON: {error}") from None


# Not printable for Python, but part of normal text: the joiners of Persian, Indic scripts and emoji, and other spaces.
TEXT = "\u200c\u200d\xa0\u2009\u202f\u3000"
# Printable for Python, but invisible: fillers, and variation selectors, in which a whole message can be hidden.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0d\uffa0\U000e0100-\U000e01ef]"
)


def is_plain(text: str) -> bool:
    """Whether an untrusted text can be printed and used in a path unchanged, as `printable` would escape only TEXT."""
    return printable(text, keep=TEXT) == text


def printable(text: str | Path, most: int | None = None, keep: str = "") -> str:
    """The text on one line, with escapes such as \\x1b for characters that a terminal or a browser would interpret, or
    that are invisible: control characters, line separators, bidirectional marks and overrides, zero-width characters,
    tags, fillers, private and unassigned code points, and lone surrogates, which cannot be encoded.

    most: maximum number of characters; the middle of a longer text is left out. keep: characters not to escape, for
    example a newline; TEXT in the text of a model or a person.
    """
    text = _shortened(str(text), most)  # before escaping, which is slow for megabytes
    if text.isprintable() and not _INVISIBLE.search(text):
        return text
    shown = (c if c in keep or (c.isprintable() and not _INVISIBLE.match(c)) else _escape(c) for c in text)
    return _shortened("".join(shown), most)


def _shortened(text: str, most: int | None) -> str:
    if most is None or len(text) <= most:
        return text
    return f"{text[: most // 2]} [...] {text[len(text) - most // 2 + 7 :]}"


def _escape(character: str) -> str:
    code = ord(character)  # Python decodes an invalid UTF-8 byte in a file name as U+DC00 + the byte
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()


# Public names are imported on first use, so that importing a small part, such as the tokenizer, does not import torch.
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
