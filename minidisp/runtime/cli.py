"""Shared by all commands: hints for misspelt flags, output that is safe on any terminal, exit codes, Ctrl-C."""

import argparse
import difflib
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

import minidisp
from minidisp import InputError, printable

NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|-inf|-nan", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises one-line InputErrors and suggests the closest flag for a misspelt one.

    elsewhere: flags of other programs, in kebab-case without the dashes -> the equivalent flag here.
    """

    def __init__(self, *args, elsewhere: dict[str, str] | None = None, **options):
        super().__init__(*args, **options)
        self.elsewhere = elsewhere or {}
        self.add_argument("--version", action="version", version=f"minidisp {minidisp.__version__}")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """Treats a word such as -1e-3 after a flag as its value; before Python 3.14, argparse takes it for a flag."""
        words: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            if words and re.fullmatch(r"--[\w-]+", words[-1]) and NEGATIVE_NUMBER.fullmatch(word):
                words[-1] += f"={word}"
            else:
                words.append(word)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            words = message.split(": ", 1)[1].split()
            if not words:  # as from "$UNSET"
                raise InputError("an argument is empty: leave it out, or give it a value")
            word = words[0]
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(word.split("=")[0], known, n=1)
            if (name := word.split("=")[0].lstrip("-").replace("_", "-")) in self.elsewhere:
                near = [f"--{self.elsewhere[name]}"]
            message = f"unknown argument {word}" + (f", did you mean {near[0]}?" if near else "")
        raise InputError(f"{message} (python {self.prog} --help lists the flags)")


def take_over() -> None:
    """The first call of every command: restores signal handling, makes warnings one line, and makes stdout and stderr
    accept any text.

    Characters that their encoding lacks are written as escapes such as \\u2014: Windows consoles, pipes and LANG=C
    support few characters, and a sample or a file name may contain any. Closed streams (`>&-`, pythonw, some services)
    are replaced by /dev/null, and so are their descriptors: otherwise the next file to be opened would get the
    descriptor, and everything that is printed.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {printable(message, MOST_OF_A_MESSAGE)}\n"
    if signal.getsignal(signal.SIGINT) is minidisp.end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # open returns the lowest free one: this
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115, open until the process ends
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # the streams of a notebook take any text
            stream.reconfigure(errors="backslashreplace")


MOST_OF_A_MESSAGE = 1200  # characters


def complain(prog: str, message: str) -> None:
    """Print a message on stderr as one line, without characters that could control the terminal."""
    print(f"{prog}: {printable(message, MOST_OF_A_MESSAGE)}", file=sys.stderr, flush=True)


def exit_code(prog: str, command: Callable[[], object]) -> int:
    """Run a command and return its exit code: 0 on success, 2 for invalid input, 130 if interrupted.

    Errors are reported as one line on stderr, without a traceback.
    """
    take_over()
    try:
        command()
        sys.stdout.flush()
    except InputError as error:
        code, message = 2, str(error)
    except BrokenPipeError:
        code, message = 2, "stdout was closed before everything was printed"
    except OSError as error:
        code, message = 2, f"{error.filename or 'input/output'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code, message = 2, "out of memory: use a smaller model, fewer tokens at a time, or a machine with more memory"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    else:
        return 0
    flush_or_discard()
    complain(prog, message)
    return code


def flush_or_discard() -> None:
    """Flush stdout. If that fails, discard the rest: otherwise Python would retry at exit and print a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means out of memory: CUDA and Python have types for it, torch on a CPU only messages."""
    signs = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "ALLOC_FAILED", "out of memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
