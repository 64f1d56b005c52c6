"""Operators: what minidisp computes in C++ and CUDA, one file per operator, with schema, shapes, gradient and choice.

    dispersion.py     the dispersion loss and its gradient; streamed.py: the same in plain PyTorch
    cross_entropy.py  the loss of rows of logits and its gradient (CUDA)
    attention.py      causal self-attention (CPU)
    layers.py         norms, rotary positions, activations, linear layers (CPU)
    build.py          finds the extension, csrc/ compiled, or builds it

registered(device) is the one question that all of them ask. `python -m minidisp.ops` prints what runs here, and checks it.
"""

import contextlib
import functools
import re
import signal
import subprocess
import sys

import torch

from minidisp.ops import build

FUSED_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}  # where the extension has kernels; the dispatcher's name for each


def registered(device_type: str) -> str:
    """Find the extension, or build it now. Returns "" if its operators run on that kind of device, otherwise why not.

    On a GPU the kernels are checked once, before they are first used.
    """
    found = build.find_or_build(device_type)
    if not found.path:
        return found.about + found.note
    if not torch._C._dispatch_has_kernel_for_dispatch_key("minidisp::dispersion", FUSED_DEVICES[device_type]):
        return f"the extension was built without {device_type}{found.note}"
    return check_cuda() if device_type == "cuda" else ""


# torch.compile treats the answer as a constant instead of tracing the search for the extension. This is all that
# torch.compiler.assume_constant_result does, but that imports the compiler.
registered._dynamo_marked_constant = True


CHECK_SECONDS = 300  # in which the check must be done
TRY_AGAIN = 75  # exit code of a check that could not be made: out of memory, a card that others hold


@functools.cache
def check_cuda() -> str:
    """Why the CUDA kernels cannot be trusted on this kind of GPU; "" if they compute what they should.

    Checked once per build and GPU, in a child process: an illegal access would leave this one without CUDA. What came
    out is remembered, unless the child could not check anything, or was killed.
    """
    name = torch.cuda.get_device_name()
    try:
        folder = build.make_cache_folder()
        log = folder / f"check-{re.sub(r'[^A-Za-z0-9]+', '-', name)}.log"
        with contextlib.nullcontext() if log.exists() else build.locked(folder / "check.lock"):
            if not log.exists():  # still, now that nobody else is at it
                print(f"minidisp: checking the CUDA kernels on this GPU ({name}), once", file=sys.stderr, flush=True)
                said, code = _run_check()
                if code in (TRY_AGAIN, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL):
                    why = (said.strip().splitlines() or [f"the check was ended by signal {-code}"])[-1]
                    return f"the CUDA kernels could not be checked this time: {why}"
                written = log.with_name(f"{log.name}.tmp")
                written.write_text(f"{said}{'passed' if code == 0 else 'FAILED'}\n")
                written.replace(log)  # whole: others read it without the lock
            passed = log.read_text().endswith("passed\n")
    except OSError as error:  # no place to write
        return f"the CUDA kernels could not be checked: {build.first_line(error)}; {build.OTHER_FOLDER}"
    return "" if passed else f"the CUDA kernels failed their check on this GPU; see {log} (delete it to try again)"


def _run_check() -> tuple[str, int]:
    """What the child process said, and its exit code; 1 if it did not end in time."""
    command = [sys.executable, "-m", "minidisp.ops", "check", f"cuda:{torch.cuda.current_device()}"]
    try:
        child = subprocess.run(
            command, env=build.child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=CHECK_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""  # bytes, whatever text says
        return f"{said.decode(errors='replace')}no end after {CHECK_SECONDS} s\n", 1
    return child.stdout, child.returncode
