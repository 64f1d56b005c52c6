"""The two fast implementations of the dispersion loss, as torch operators, and the choice between them.

    minidisp::dispersion           fused: C++ in csrc/, angular_spread, orthogonalization, l2_repel, decorrelation
    minidisp::dispersion_streamed  streamed: plain PyTorch (streamed.py), on any device; those and perplexity_entropy

Both take (z, variant, tau, clamp, eps, need_grad) and return (loss, gradient, ...). The loss is a scalar, so one pass
over the pairs of tokens yields it together with its gradient, which backward only multiplies by a number. No T x T
matrix is kept. float64 z is computed in float64 (streamed only), all other dtypes in float32; loss and gradient come in
the computing dtype. On CUDA, the fused operator leaves the last step to minidisp::dispersion_backward.

Where torch.get_float32_matmul_precision() is not "highest", the fused operator may round products: to float16 on the
tensor cores of a GPU (docs/gpu.md), to bfloat16 on the matrix tiles of a CPU (docs/fused_loss.md), there also under
autocast.

choose() says what would run and builds nothing; select() also finds or builds the extension (build.py) where the answer
depends on it. On a GPU the kernels are checked once, before they are first used. `python -m minidisp.ops` shows it all.
"""

import contextlib
import functools
import re
import signal
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from minidisp import InputError
from minidisp.ops import build, streamed

FUSED_VARIANTS = ("angular_spread", "orthogonalization", "l2_repel", "decorrelation")
STREAMED_VARIANTS = (*FUSED_VARIANTS, "perplexity_entropy")
FUSED_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}  # and what the dispatcher calls them
IMPLEMENTATIONS = ("auto", "fused", "streamed", "reference")

# Both operators: shapes for the compiler, and backward


def _fake(z: Tensor, variant: str, tau: float, clamp: float, eps: float, need_grad: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return z.new_empty((), dtype=dtype), z.new_empty(z.shape if need_grad else (0,), dtype=dtype)


def _fused_fake(z: Tensor, variant: str, tau: float, clamp: float, eps: float, need_grad: bool) -> tuple[Tensor, ...]:
    loss, product = _fake(z, variant, tau, clamp, eps, need_grad)
    B, T, C = z.shape
    return loss, product, product.new_empty(B * (C + 4 * T + 1) if need_grad and z.device.type == "cuda" else 0)


def _save(ctx, inputs, output) -> None:
    z, ctx.variant = inputs[:2]
    ctx.dtype = z.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or backward is handed zeros for the gradients of these, as large as z
    finished = len(output) == 2 or z.device.type != "cuda"
    ctx.save_for_backward(*([output[1]] if finished else [*output[1:], z]))


def _backward(ctx, grad_loss: Tensor | None, *_):
    if grad_loss is None:  # what uses the loss has no gradient
        return (None,) * 6
    if torch.is_grad_enabled():  # only under create_graph=True
        raise RuntimeError(
            "the fused and streamed dispersion losses have no second derivative: "
            "for create_graph=True use impl='reference'"
        )
    grad, *rest = ctx.saved_tensors
    if rest:
        state, z = rest
        return (torch.ops.minidisp.dispersion_backward(grad_loss, z, grad, state, ctx.variant), *[None] * 5)
    # Multiplied in float32 and then rounded, so that float16 profits from the scale of a gradient scaler.
    return ((grad * grad_loss).to(ctx.dtype), *[None] * 5)


def _register(name: str, fake: Callable) -> None:
    torch.library.register_fake(name, fake)
    torch.library.register_autograd(name, _backward, setup_context=_save)


torch.library.define(
    "minidisp::dispersion_streamed",
    "(Tensor z, str variant, float tau, float clamp, float eps, bool need_grad) -> (Tensor, Tensor)",
)
torch.library.impl("minidisp::dispersion_streamed", "CompositeExplicitAutograd")(streamed.dispersion)
_register("minidisp::dispersion_streamed", _fake)


def dispersion(chosen: str, z: Tensor, variant: str, tau: float, clamp: float, eps: float) -> Tensor:
    """The loss by one of the operators: "streamed", or "fused", whose extension must have been found."""
    operator = torch.ops.minidisp.dispersion if chosen == "fused" else torch.ops.minidisp.dispersion_streamed
    need_grad = torch.is_grad_enabled() and z.requires_grad
    loss = operator(z, variant, tau, clamp, eps, need_grad)[0]
    if not torch.compiler.is_compiling() and need_grad and z.grad_fn is not None:
        # Autograd runs what was computed last first, which would be the losses of all layers. Each had better wait until
        # the gradient of its z has come from the layers above: then it is added while that is in the caches, and the
        # scaled gradients of the layers are not all there at once.
        loss.grad_fn._set_sequence_nr(z.grad_fn._sequence_nr())
    return loss


# Which implementation


def check_name(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise InputError(f"unknown dispersion impl {impl!r}: choose one of {', '.join(IMPLEMENTATIONS)}")


def choose(impl: str, variant: str, dtype: torch.dtype, device_type: str, missing: str = "") -> tuple[str, str]:
    """What computes a loss, "fused", "streamed" or "reference", and why not a faster one; "" if it was asked for.

    Nothing is looked for or built. impl: a name in IMPLEMENTATIONS. dtype, device_type: of z.
    missing: why the extension is not there; "" if it is.
    """
    check_name(impl)
    if impl == "reference":
        return "reference", ""
    if variant not in STREAMED_VARIANTS:
        return "reference", f"{variant} has no other form"
    if impl == "streamed":
        return "streamed", ""
    if variant not in FUSED_VARIANTS:
        return "streamed", f"the extension has no {variant}"
    if dtype == torch.float64:
        return "streamed", "the extension has no float64"
    if device_type not in FUSED_DEVICES:
        return "streamed", f"the extension does not run on {device_type}"
    return ("streamed", missing) if missing else ("fused", "")


def select(impl: str, variant: str, dtype: torch.dtype, device_type: str) -> tuple[str, str]:
    """As choose, of what is there: finds the extension, or builds it, if and only if it would be used.

    Raises InputError if impl is fused and the extension is not to be had.
    """
    chosen, why = choose(impl, variant, dtype, device_type)
    if chosen == "fused" and (missing := find_or_build(device_type)):
        if impl == "fused":
            raise InputError(f"impl='fused' cannot be used on {device_type}: {missing} (impl='auto' streams instead)")
        return choose(impl, variant, dtype, device_type, missing)
    return chosen, why


def describe(impl: str, variant: str, dtype: torch.dtype, device_type: str) -> str:
    """As select, in words: "fused", "streamed in PyTorch: no C++ compiler was found", ...

    The path of the extension is part of them if this process has built it.
    """
    chosen, why = select(impl, variant, dtype, device_type)
    if chosen == "fused":
        found = build.find_or_build(device_type)
        return f"fused, {found.about} ({found.path}){found.note}" if found.about.startswith("built now") else "fused"
    words = {"streamed": "streamed in PyTorch", "reference": "plain PyTorch"}[chosen]
    return f"{words}: {why}" if why else words


def find_or_build(device_type: str) -> str:
    """Find the extension or build it, now at the latest. Returns "", or why a kind of device cannot use it."""
    found = build.find_or_build(device_type)
    if not found.path:
        return found.about + found.note
    register_fused()
    if not torch._C._dispatch_has_kernel_for_dispatch_key("minidisp::dispersion", FUSED_DEVICES[device_type]):
        return f"the extension was built without {device_type}{found.note}"
    return check_cuda() if device_type == "cuda" else ""


# torch.compile takes the answer for a constant instead of tracing the search for the extension. This is all that
# torch.compiler.assume_constant_result does, but that imports the compiler.
find_or_build._dynamo_marked_constant = True


@functools.cache
def register_fused() -> None:
    """Give the operator of the extension, which has been loaded, its shapes and its gradient."""
    _register("minidisp::dispersion", _fused_fake)
    torch.library.register_fake("minidisp::dispersion_backward", lambda upstream, z, *_: z.new_empty(z.shape))


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
