"""Two operators that each return the dispersion loss and its gradient, and the choice between them.

    minidisp::dispersion           fused: C++ in csrc/, angular_spread, orthogonalization, l2_repel, decorrelation
    minidisp::dispersion_streamed  streamed: plain PyTorch (streamed.py), on any device; those and perplexity_entropy

Both take (z, variant, tau, clamp, eps, need_grad) and return (loss, gradient, ...). The loss is a scalar, so one pass
over the pairs of tokens computes it together with its gradient, and backward only multiplies by a scalar. No T x T
matrix is kept. z (B, T, C); float64 is computed in float64 (streamed only), all other dtypes in float32. Loss and
gradient are returned in the dtype they were computed in. On CUDA, the fused operator leaves the last step of the
gradient to minidisp::dispersion_backward.

Unless torch.get_float32_matmul_precision() is "highest", the fused operator may round products: to float16 on the
tensor cores of a GPU (docs/gpu.md), to bfloat16 on AMX tiles (docs/fused_loss.md), there also under autocast.

choose() returns the implementation that would run, and builds nothing; select() also finds or builds the extension if
it would be used.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minidisp import InputError
from minidisp.ops import FUSED_DEVICES, build, registered, streamed

FUSED_VARIANTS = ("angular_spread", "orthogonalization", "l2_repel", "decorrelation")
STREAMED_VARIANTS = (*FUSED_VARIANTS, "perplexity_entropy")
IMPLEMENTATIONS = ("auto", "fused", "streamed", "reference")

# Both operators: schemas, shapes for the compiler, and backward


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
    ctx.set_materialize_grads(False)  # otherwise backward would allocate zeros as large as z for their gradients
    finished = len(output) == 2 or z.device.type != "cuda"
    ctx.save_for_backward(*([output[1]] if finished else [*output[1:], z]))


def _backward(ctx, grad_loss: Tensor | None, *_):
    if grad_loss is None:  # no gradient flows into the loss
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
    # Multiplied in float32 and then rounded, so that the gradient scale prevents underflow in float16.
    return ((grad * grad_loss).to(ctx.dtype), *[None] * 5)


ARGUMENTS = "(Tensor z, str variant, float tau, float clamp, float eps, bool need_grad)"


def _define(name: str, results: str, fake: Callable) -> None:
    torch.library.define(name, f"{ARGUMENTS} -> {results}")
    torch.library.register_fake(name, fake)
    torch.library.register_autograd(name, _backward, setup_context=_save)


_define("minidisp::dispersion_streamed", "(Tensor, Tensor)", _fake)
torch.library.impl("minidisp::dispersion_streamed", "CompositeExplicitAutograd")(streamed.dispersion)

# z: float32, bfloat16 or float16, any strides. Returns the loss, a float32 scalar, and two tensors for backward, empty
# unless need_grad. On the CPU: the gradient, float32 (B, T, C), and an empty tensor. On CUDA: a product of that shape
# and a float32 state, from which dispersion_backward computes the gradient.
_define("minidisp::dispersion", "(Tensor, Tensor, Tensor)", _fused_fake)
# CUDA only: the gradient times upstream, a float32 scalar, in the shape and dtype of z.
torch.library.define(
    "minidisp::dispersion_backward",
    "(Tensor upstream, Tensor z, Tensor product, Tensor state, str variant) -> Tensor",
)
torch.library.register_fake("minidisp::dispersion_backward", lambda upstream, z, *_: z.new_empty(z.shape))


def run(chosen: str, z: Tensor, variant: str, tau: float, clamp: float, eps: float) -> Tensor:
    """The loss by one of the operators: "streamed", or "fused", for which the extension must have been found."""
    operator = torch.ops.minidisp.dispersion if chosen == "fused" else torch.ops.minidisp.dispersion_streamed
    need_grad = torch.is_grad_enabled() and z.requires_grad
    loss = operator(z, variant, tau, clamp, eps, need_grad)[0]
    if not torch.compiler.is_compiling() and need_grad and z.grad_fn is not None:
        # Autograd runs the most recently created nodes first, which are the losses of all layers. Each should instead
        # run when the gradient of its z arrives from the layer above: the two are then added while in the cache, and
        # the scaled gradients of all layers are never in memory at once.
        loss.grad_fn._set_sequence_nr(z.grad_fn._sequence_nr())
    return loss


# Choice of the implementation


def check_name(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise InputError(f"unknown dispersion impl {impl!r}: choose one of {', '.join(IMPLEMENTATIONS)}")


def choose(impl: str, variant: str, dtype: torch.dtype, device_type: str, missing: str = "") -> tuple[str, str]:
    """The implementation, "fused", "streamed" or "reference", and why it is not a faster one; "" if it was requested.

    Does not look for the extension. impl: a name in IMPLEMENTATIONS. dtype, device_type: of z.
    missing: why the extension is not available; "" if it is.
    """
    check_name(impl)
    if impl == "reference":
        return "reference", ""
    if variant not in STREAMED_VARIANTS:
        return "reference", f"{variant} has no other implementation"
    if impl == "streamed":
        return "streamed", ""
    if variant not in FUSED_VARIANTS:
        return "streamed", f"the extension does not support {variant}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "streamed", f"the extension does not support {str(dtype).removeprefix('torch.')}"
    if device_type not in FUSED_DEVICES:
        return "streamed", f"the extension does not run on {device_type}"
    return ("streamed", missing) if missing else ("fused", "")


def select(impl: str, variant: str, dtype: torch.dtype, device_type: str) -> tuple[str, str]:
    """Like choose, but finds or builds the extension if it would be used, and falls back if it is not available.

    Raises InputError if impl is fused and the extension is not available.
    """
    chosen, why = choose(impl, variant, dtype, device_type)
    if chosen == "fused" and (missing := registered(device_type)):
        if impl == "fused":
            raise InputError(f"impl='fused' cannot be used on {device_type}: {missing} (impl='auto' streams instead)")
        return choose(impl, variant, dtype, device_type, missing)
    return chosen, why


def describe(impl: str, variant: str, dtype: torch.dtype, device_type: str) -> str:
    """The result of select in words: "fused", "streamed in PyTorch: no C++ compiler was found", ...

    Includes the path of the extension if this process has built it.
    """
    chosen, why = select(impl, variant, dtype, device_type)
    if chosen == "fused":
        found = build.find_or_build(device_type)
        return f"fused, {found.about} ({found.path}){found.note}" if found.about.startswith("compiled now") else "fused"
    words = {"streamed": "streamed in PyTorch", "reference": "plain PyTorch"}[chosen]
    return f"{words}: {why}" if why else words
