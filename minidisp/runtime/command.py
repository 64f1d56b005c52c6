"""How train.py starts and ends: joins the processes, catches signals, and turns failures into one line and a code."""

import errno
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from minidisp import InputError
from minidisp.runtime.cli import complain, flush_or_discard, is_out_of_memory, take_over
from minidisp.runtime.guard import Diverged
from minidisp.runtime.processes import ALONE, World, is_launched, is_lost


def warn(text: str) -> None:
    complain("train.py", text)


def run_command(command: Callable[[World], object]) -> int:
    """Call the command with the World that the environment describes; returns the exit code.

    0: success. 1: lost the connection to another process. 2: invalid usage or input. 3: diverged (NaN or Inf).
    128 + n: stopped by signal n.
    """
    take_over()
    with ExitStack() as at_exit:
        world = ALONE
        try:
            world = World.join(at_exit)
            command(world)
            sys.stdout.flush()
            return 0
        except SystemExit as end:  # raised in every process
            return end.code
        except BaseException as error:
            code, message = explain(error, world)
        if world.first_to_speak():
            warn(message)
        if world.launched:
            at_exit.pop_all()  # other processes may be gone: exit without waiting for them
        return code


_ADVICE = {  # if a file of the run cannot be written
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "; free some space, or give another --out"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG), "; give another --out"
    ),
}


def explain(error: BaseException, world: World) -> tuple[int, str]:
    """Exit code and message for the exception that ended a run. An error in the code itself is re-raised."""
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, Diverged):
        return 3, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error):
        return 2, "out of memory: lower --batch-size, --block-size or the size of the model"
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        reason = " ".join(str(error).split())[:300]
        return 2, f"torch.compile failed: {reason}; pass --compile off to train without it"
    if isinstance(error, BrokenPipeError):
        return 2, "stdout was closed, so the run stops; --resume continues from the last checkpoint"
    if world.size > 1 and is_lost(error):
        return 1, "lost another process, so the run stops; --resume continues from the last checkpoint"
    if isinstance(error, OSError):
        advice = _ADVICE.get(error.errno, "") if error.filename else ""
        return 2, f"{error.filename or 'input/output'}: {error.strerror or error}{advice}"
    raise error


def stop(number: int, run: Path, step: int, saved_step: int | None, world: World) -> NoReturn:
    """End a run after a signal and print the command that resumes it. Raises SystemExit with 128 + signal number."""
    saved = "" if saved_step == step else f" (the last good checkpoint, of step {saved_step}, is kept)"
    if saved_step is None:
        saved = " (nothing was saved: its loss or weights are NaN or Inf)"
    if world.main:
        name = signal.Signals(number).name
        again = shlex.join(["python", "train.py", "--resume", "--out", str(run)])
        warn(f"stopped at step {step}{saved} by {name}; continue with: {again}")
    raise SystemExit(128 + number)


def catch_signals(at_exit: ExitStack, world: World) -> list[signal.Signals]:
    """A list to which the first SIGINT or SIGTERM is appended, for the loop to check; a second one ends the process.

    Signals that the process was started to ignore stay ignored: shells do this with SIGINT for background jobs of
    scripts. Only the main thread can handle signals; in any other thread, the list stays empty.
    """
    caught: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        return caught
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    at_once = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

    def handle(number, frame):
        caught.append(signal.Signals(number))
        for other in before:
            signal.signal(other, at_once[other])
        # os.write, since print is not reentrant and the signal may have interrupted one.
        if world.main:
            os.write(2, f"{caught[-1].name}: finishing this step, then saving; repeat it to stop at once\n".encode())

    for number, handler in before.items():
        signal.signal(number, handle)
        if not world.launched:  # under torchrun, a signal after the loss of another process must not hide the message
            at_exit.callback(signal.signal, number, handler)
    return caught


def leave(code: int) -> NoReturn:
    """End the process; if it is one of several, without the interpreter's cleanup.

    DistributedDataParallel and FSDP keep gloo's threads alive after destroy_process_group. A thread that frees a tensor
    while the interpreter shuts down aborts the process, although the run has succeeded.
    """
    flush_or_discard()
    try:
        launched = is_launched()
    except InputError:  # already reported
        launched = False
    if launched:
        os._exit(code)
    sys.exit(code)
