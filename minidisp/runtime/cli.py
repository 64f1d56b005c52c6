"""What all commands share: hints for misspelt flags, streams and messages that suit any terminal, exit codes, Ctrl-C."""

import argparse
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import minidisp
from minidisp import InputError, printable

NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|-inf|-nan", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors of one line, with the nearest flag for a misspelt one.

    elsewhere: flags of other programs, in kebab-case without the dashes, and what they are called here.
    """

    def __init__(self, *args, elsewhere: dict[str, str] | None = None, **options):
        super().__init__(*args, **options)
        self.elsewhere = elsewhere or {}
        self.add_argument("--version", action="version", version=f"minidisp {minidisp.__version__}")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """A word such as -1e-3 behind a flag is its value: before Python 3.14, argparse takes it for another flag."""
        words: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            if words and re.fullmatch(r"--[\w-]+", words[-1]) and NEGATIVE_NUMBER.fullmatch(word):
                words[-1] += f"={word}"
            else:
                words.append(word)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            word = message.split(": ", 1)[1].split()[0]
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(word.split("=")[0], known, n=1)
            if (name := word.split("=")[0].lstrip("-").replace("_", "-")) in self.elsewhere:
                near = [f"--{self.elsewhere[name]}"]
            message = f"unknown argument {word}" + (f", did you mean {near[0]}?" if near else "")
        raise InputError(f"{message} (python {self.prog} --help lists the flags)")


def take_over() -> None:
    """What a command does first: signals act as usual again, and stdout and stderr take any text.

    What their encoding lacks is written as an escape, such as \\u2014: consoles on Windows, pipes and LANG=C know few
    characters, and a sample or a file name may hold any. Streams that are closed (`>&-`, pythonw, some services) become
    /dev/null, and so do their descriptors: the next file that is opened would get them, and whatever is printed with it.
    """
    if signal.getsignal(signal.SIGINT) is minidisp.end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest that is free: this one
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115, for as long as the process lives
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # the streams of a notebook take any text
            stream.reconfigure(errors="backslashreplace")


MOST_OF_A_MESSAGE = 1200  # characters


def complain(prog: str, message: str) -> None:
    """Print a message on stderr, as one line in which nothing can command a terminal."""
    print(f"{prog}: {printable(message, MOST_OF_A_MESSAGE)}", file=sys.stderr, flush=True)


def exit_code(prog: str, command: Callable[[], object]) -> int:
    """Run a command and return its exit code: 0; 2 for input that cannot be used; 130 when it is interrupted.

    What went wrong is one line on stderr, without a traceback.
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
        code, message = (
            2,
            "out of memory: take a smaller model or fewer tokens at a time, or a machine with more memory",
        )
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    else:
        return 0
    flush_or_discard()
    complain(prog, message)
    return code


def flush_or_discard() -> None:
    """Flush stdout; if that fails, send the rest nowhere, or Python would try again when it ends, and print a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: CUDA and Python have types for it, torch on a CPU only words."""
    signs = ("can't allocate memory", "not enough memory", "ALLOC_FAILED", "out of memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
