"""What all commands share: hints for misspelt flags, output that any terminal can print, and exit codes."""

import argparse
import difflib
import sys
from collections.abc import Callable
from typing import NoReturn

from minidisp import InputError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors of one line, with the nearest flag for a misspelt one.

    elsewhere: flags of other programs, in kebab-case without the dashes, and what they are called here.
    """

    def __init__(self, *args, elsewhere: dict[str, str] | None = None, **options):
        super().__init__(*args, **options)
        self.elsewhere = elsewhere or {}

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            word = message.split(": ", 1)[1].split()[0]
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(word.split("=")[0], known, n=1)
            if (name := word.split("=")[0].lstrip("-").replace("_", "-")) in self.elsewhere:
                near = [f"--{self.elsewhere[name]}"]
            message = f"unknown argument {word}" + (f", did you mean {near[0]}?" if near else "")
        raise InputError(f"{message} (python {self.prog} --help lists the flags)")


def make_printable() -> None:
    """Let stdout and stderr take any text: what their encoding lacks is written as an escape, such as \\u2014.

    Consoles on Windows, pipes and LANG=C know few characters, and a sample or a file name may hold any.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # the streams of a notebook take any text
            stream.reconfigure(errors="backslashreplace")


def exit_code(prog: str, command: Callable[[], object]) -> int:
    """Run a command and return its exit code: 0; 2 for input that cannot be used; 130 when it is interrupted.

    What went wrong is one line on stderr, without a traceback.
    """
    make_printable()
    try:
        command()
    except InputError as error:
        code, message = 2, str(error)
    except OSError as error:
        code, message = 2, f"{error.filename or 'input/output'}: {error.strerror or error}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    else:
        return 0
    print(f"{prog}: {message}", file=sys.stderr)
    return code
