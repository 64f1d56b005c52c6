"""How a training begins and ends: processes join, signals are caught, and whatever goes wrong is one line and an exit code."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from minidisp import InputError
from minidisp.runtime.cli import make_printable
from minidisp.runtime.guard import Diverged, is_out_of_memory
from minidisp.runtime.processes import ALONE, World, is_launched, is_lost


def warn(text: str) -> None:
    print(f"train.py: {text}", file=sys.stderr, flush=True)


def run_command(command: Callable[[World], object]) -> int:
    """Call the command in the world that it was started in; returns the exit code.

    0 done; 2 bad usage or input; 3 the numbers stopped being finite; 128 + the number of a signal; 1 another process was lost.
    """
    make_printable()
    with ExitStack() as at_exit:
        world = ALONE
        try:
            world = World.join(at_exit)
            command(world)
            return 0
        except SystemExit as end:  # every process has its own
            return end.code
        except BaseException as error:
            code, message = explain(error, world)
        if world.first_to_speak():
            warn(message)
        if world.launched:
            at_exit.pop_all()  # the others may be gone: no taking leave of them
        return code


def explain(error: BaseException, world: World) -> tuple[int, str]:
    """Exit code and message of what ended a training; what is nobody's fault but the code's is raised again."""
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
        return 2, f"torch.compile failed: {reason}; --compile off goes on without"
    if isinstance(error, BrokenPipeError):
        return 2, "what read the output has ended, and so the run ends; --resume goes on from the last checkpoint"
    if world.size > 1 and is_lost(error):
        return 1, "another process was lost, and so the run ends; --resume goes on from the last checkpoint"
    if isinstance(error, OSError):
        where, why = error.filename or "input/output", error.strerror or error
        return 2, f"{where}: {why}; give another --out, or free some space"
    raise error


def stop(number: int, run: Path, step: int, saved_step: int | None, world: World) -> NoReturn:
    """End a run that a signal has stopped, and say how to go on. Raises SystemExit with 128 + the signal's number."""
    saved = "" if saved_step == step else f" (the last good one, step {saved_step}, is what is saved)"
    if saved_step is None:
        saved = " (nothing is saved: its numbers are not finite)"
    if world.main:
        name = signal.Signals(number).name
        print(
            f"stopped at step {step}{saved} by {name}; go on with: python train.py --resume --out {run}",
            file=sys.stderr,
        )
    raise SystemExit(128 + number)


def catch_signals(at_exit: ExitStack, world: World) -> list[signal.Signals]:
    """A list that the first SIGINT or SIGTERM is put into, for the loop to see; a second one ends the process at once.

    Only the main thread of a program may catch signals: in any other one, the list stays empty.
    """
    caught: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        return caught
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number, frame):
        caught.append(signal.Signals(number))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Not print: the signal may have come in the middle of another one, which cannot be entered twice.
        if world.main:
            os.write(2, f"{caught[-1].name}: finishing this step, then saving; once more to leave at once\n".encode())

    for number, handler in before.items():
        signal.signal(number, handle)
        if not world.launched:  # else torchrun's signal, when another process was lost, must not end this one unheard
            at_exit.callback(signal.signal, number, handler)
    return caught


def leave(code: int) -> NoReturn:
    """End the process; one of several, without taking the interpreter down.

    DistributedDataParallel and FSDP keep gloo's threads alive beyond destroy_process_group, and one that still has a tensor
    to free when the interpreter is half gone aborts the process, after everything went well.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        launched = is_launched()
    except InputError:  # which has been said
        launched = False
    if launched:
        os._exit(code)
    sys.exit(code)
