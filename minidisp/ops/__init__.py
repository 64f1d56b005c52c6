"""Custom operators in C++ and CUDA, one file each, with schema, shapes, gradient and the choice of implementation.

    dispersion.py     the dispersion loss and its gradient; streamed.py: the same in plain PyTorch
    cross_entropy.py  the loss of rows of logits and its gradient (CUDA)
    attention.py      causal self-attention (CPU)
    layers.py         norms, rotary positions, activations, linear layers (CPU)
    build.py          finds the extension (compiled from csrc/), or builds it

All of them call registered(device). `python -m minidisp.ops` prints which implementations run here, and tests them.
"""

import contextlib
import functools
import re
import signal
import subprocess
import sys
from collections.abc import Callable

import torch

from minidisp.ops import build

FUSED_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}  # devices with kernels in the extension -> dispatch key


def registered(device_type: str) -> str:
    """Find the extension or build it. Returns "" if its operators run on that type of device, otherwise the reason.

    On a GPU, the kernels are checked once, before their first use.
    """
    found = build.find_or_build(device_type)
    if not found.path:
        return found.about + found.note
    if not has_kernels(device_type):
        return f"the extension was built without {device_type}{found.note}"
    return check_cuda() if device_type == "cuda" else ""


# torch.compile treats the result as a constant instead of tracing the search for the extension. This is all that
# torch.compiler.assume_constant_result does, but calling that would import the compiler.
registered._dynamo_marked_constant = True


def untraced(function: Callable) -> Callable:
    """function, which torch.compile calls instead of tracing it. Without torch.compile, the function itself, since
    torch.compiler.disable takes two seconds to import the compiler.
    """
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


@functools.cache
def has_kernels(device_type: str) -> bool:
    """Whether the loaded extension has kernels for that type of device. Cached, as torch takes 8 us to look it up."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("minidisp::dispersion", FUSED_DEVICES[device_type])


def processor_has(instructions: str) -> bool:
    """Whether this processor has these instructions, such as "amx_bf16", as far as torch can tell."""
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get(instructions))


CHECK_SECONDS = 300  # timeout of the check
TRY_AGAIN = 75  # exit code of a check that could not run: out of memory, or the GPU is in use


@functools.cache
def check_cuda() -> str:
    """Why the CUDA kernels cannot be used on this GPU model; "" if their results are correct.

    Checked once per build and GPU model, in a child process, since an illegal memory access makes CUDA unusable in the
    process. The result is saved, unless the check could not run or was killed.
    """
    name = torch.cuda.get_device_name()
    try:
        folder = build.make_cache_folder()
        log = folder / f"check-{re.sub(r'[^A-Za-z0-9]+', '-', name)}.log"
        with contextlib.nullcontext() if log.exists() else build.locked(folder / "check.lock"):
            if not log.exists():  # still, now that no other process is checking
                print(f"minidisp: checking the CUDA kernels on this GPU ({name}), once", file=sys.stderr, flush=True)
                said, code = _run_check()
                if code in (TRY_AGAIN, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL):
                    why = (said.strip().splitlines() or [f"the check was stopped by signal {-code}"])[-1]
                    return f"the CUDA kernels could not be checked this time: {why}"
                written = log.with_name(f"{log.name}.tmp")
                written.write_text(f"{said}{'passed' if code == 0 else 'FAILED'}\n")
                written.replace(log)  # atomic: other processes read it without the lock
            passed = log.read_text().endswith("passed\n")
    except OSError as error:  # cannot write there
        return f"the CUDA kernels could not be checked: {build.first_line(error)}; {build.OTHER_FOLDER}"
    return "" if passed else f"the CUDA kernels failed their check on this GPU; see {log} (delete it to try again)"


def _run_check() -> tuple[str, int]:
    """The output of the child process and its exit code; 1 after a timeout."""
    command = [sys.executable, "-m", "minidisp.ops", "check", f"cuda:{torch.cuda.current_device()}"]
    try:
        child = subprocess.run(
            command, env=build.child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=CHECK_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""  # bytes, even with text=True
        return f"{said.decode(errors='replace')}timed out after {CHECK_SECONDS} s\n", 1
    return child.stdout, child.returncode
