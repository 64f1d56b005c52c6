"""The training loss and the cross-entropy of the output layer.

`plain` is the training loss of each token; edit it for label smoothing or a z-loss. While it is the cross-entropy,
large vocabularies use `chunked`, which is faster. Otherwise `plain` itself is computed, chunk by chunk, so the model is
always trained with `plain`. Evaluation always reports the cross-entropy. Changes to the logits, such as a soft cap,
belong in GPT.logits, which sampling and export use as well.
"""

import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from minidisp.ops.attention import compute_dtype
from minidisp.ops.cross_entropy import fuses

IGNORE = -1  # a masked target
CHUNKED_MIN_VOCAB: int | None = 1024  # smallest vocabulary that is computed in chunks; not worth it for 256 bytes


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    """The training loss of each token, (N,), from logits (N, V), float32 or float64, and targets (N,) int64.

    Targets may be IGNORE; the values returned there are ignored.
    """
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE)


def cross_entropy(
    x: Tensor,
    targets: Tensor,
    logits: Callable[[Tensor], Tensor],
    vocab_size: int,
    weight: Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """The training loss, or with reduction="none" the cross-entropy of each token, in nats.

    x: hidden states after the final norm, (N, C). targets: (N,) int64, IGNORE where masked. logits: the output layer,
    from (N, C) to (N, V). weight: (V, C), if the logits are x @ weight.T and `plain` is the cross-entropy; otherwise
    None. Returns the mean of `plain` over the unmasked targets, a scalar, or the cross-entropy of each token, (N,), 0
    where masked; in float32 (float64 if x is).
    """
    large = CHUNKED_MIN_VOCAB is not None and vocab_size >= CHUNKED_MIN_VOCAB
    if reduction == "mean" and weight is not None and large:
        return chunked(x, weight, targets)

    def losses(x: Tensor, targets: Tensor) -> Tensor:
        z = logits(x)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if reduction == "none":
            return F.cross_entropy(z, targets, reduction="none", ignore_index=IGNORE)
        return plain(z, targets)

    if large:  # recomputed in the backward pass, so the logits are never fully materialised
        size = chunk_tokens(x)
        pieces = zip(x.split(size), targets.split(size), strict=True)
        found = torch.cat([recompute(losses, *piece, use_reentrant=False) for piece in pieces])
    else:
        found = losses(x, targets)
    if reduction == "none":
        return found
    counted = targets != IGNORE
    return found.where(counted, 0).sum() / counted.sum()


@torch.inference_mode(False)
@torch.enable_grad()
def can_be_chunked(logits: Callable[[Tensor], Tensor], head: nn.Linear, parameters: list[nn.Parameter]) -> bool:
    """Whether `chunked` computes the training loss for this output layer, determined by a numerical probe.

    True if `plain` is the cross-entropy, and logits(x) is x @ head.weight.T and depends on no other parameter.
    """
    if head.weight.is_meta:
        return False
    V, C = head.weight.shape
    x = torch.arange(1, 1 + 2 * C).sin().view(2, C).to(head.weight)
    # Logits of magnitude up to 60, so that a soft cap has a visible effect.
    probe = torch.outer(torch.arange(1, 1 + V, device=x.device).sin().to(x), x[0]) * (60 / x[0].square().sum())
    probe = nn.Parameter(probe)
    kept, head.weight = head.weight, probe
    try:
        found = logits(x)
    finally:
        head.weight = kept
    wanted = [p for p in parameters if p.requires_grad]
    others = torch.autograd.grad(found.sum(), wanted, allow_unused=True) if wanted and found.requires_grad else []
    linear = torch.equal(found, F.linear(x, probe)) and all(grad is None for grad in others)
    return linear and _is_cross_entropy(plain)


@functools.cache
def _is_cross_entropy(plain: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether `chunked` equals the mean of `plain`, including gradients; compared in float64."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(6, 4, dtype=torch.float64, generator=generator)
    weight = torch.randn(9, 4, dtype=torch.float64, generator=generator)
    targets = torch.tensor([3, 0, IGNORE, 8, 5, 5])
    found = []
    for form in (lambda x, w: plain(x @ w.T, targets)[targets != IGNORE].mean(), lambda x, w: chunked(x, w, targets)):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = form(*inputs)
        found.append([loss, *torch.autograd.grad(loss, inputs)])
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*found, strict=True))


def describe() -> str:
    """A description of the training loss."""
    if _is_cross_entropy(plain):
        return "cross-entropy"
    if is_other_distribution():
        return "-log p of a distribution other than softmax(GPT.logits), which sampling and export use (loss.py: plain)"
    return "not the cross-entropy, which evaluation reports (loss.py: plain)"


def is_other_distribution() -> bool:
    """Whether `plain` is -log p of a distribution other than softmax(logits), as with a soft cap; a numerical probe.

    If so, the trained distribution is not that of GPT.logits, which sampling and export use. With a regulariser such as
    label smoothing or a z-loss, the result is False: exp(-plain) then does not sum to 1 over the targets.
    """
    z = 20 * torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = torch.stack([plain(z, torch.full((5,), target)) for target in range(7)], dim=1).neg().exp()
    return torch.allclose(p.sum(1), torch.ones_like(p[:, 0])) and not torch.allclose(p, z.softmax(1), rtol=1e-6)


def chunked(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean of cross_entropy, chunk by chunk, so the logits are never fully materialised. A single operator for
    torch.compile.

    x: (N, C), weight: (V, C), targets: (N,) int64, IGNORE where masked. Returns a scalar, nats per unmasked target, in
    float32 (float64 if x is). The forward pass also computes the gradients, while the logits of a chunk exist. The
    backward pass only scales them, in place, so it can run once per forward pass. Matrix products use autocast's dtype,
    or that of x; sums over tokens and over the vocabulary use the dtype of the result.
    """
    wanted = [torch.is_grad_enabled() and value.requires_grad for value in (x, weight)]
    return torch.ops.minidisp.linear_cross_entropy(x, weight, targets, compute_dtype(x), *wanted)[0]


def _chunked(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, its gradients times the number of unmasked targets (empty unless wanted), and that number.

    dtype: of the matrix products.
    """
    wide = torch.promote_types(dtype, torch.float32)
    x, weight = x.to(dtype), weight.to(dtype)  # no copy in float32
    targets = targets.contiguous()
    size = max(1, min(chunk_tokens(x), len(x)))
    x_grad = x.new_empty(x.shape if want_x else 0)
    weight_grad = weight.new_empty(weight.shape if want_weight else 0, dtype=wide)
    fused = fuses(x, dtype)
    # One buffer for all chunks: the operating system maps new memory of this size page by page, which is slow.
    # The fused operator reads 16 bytes at a time, so its rows are aligned to 16 bytes.
    logits = x.new_empty(size, -(-len(weight) // 8) * 8 if fused else len(weight))[:, : len(weight)]
    wide_logits = None if fused or dtype == wide else torch.empty_like(logits, dtype=wide)
    weight_product = None if dtype == wide or not want_weight or x.is_cuda else torch.empty_like(weight)
    total = x.new_zeros((), dtype=wide)
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        x_rows, product = x[rows], logits[: len(x[rows])]
        torch.mm(x_rows, weight.T, out=product)
        if fused:
            total += torch.ops.minidisp.cross_entropy_(product, targets[rows], IGNORE, want_x or want_weight).sum()
        else:
            z = product if wide_logits is None else wide_logits[: len(x_rows)]
            total += _cross_entropy_(product, z, targets[rows], want_x or want_weight)
        if want_x:
            torch.mm(product, weight, out=x_grad[rows])
        if want_weight and dtype == wide:
            weight_grad.addmm_(product.T, x_rows, beta=int(start > 0))
        elif want_weight and x.is_cuda:  # accumulates in float32
            torch.ops.aten.addmm.dtype_out(weight_grad, product.T, x_rows, wide, beta=int(start > 0), out=weight_grad)
        elif want_weight:
            torch.mm(product.T, x_rows, out=weight_product)
            weight_grad = weight_grad.copy_(weight_product) if start == 0 else weight_grad.add_(weight_product)
    if want_weight and not len(x):
        weight_grad.zero_()
    number = (targets != IGNORE).sum()
    return total / number, x_grad, weight_grad, number


def _cross_entropy_(logits: Tensor, z: Tensor, targets: Tensor, need_grad: bool) -> Tensor:
    """The sum of the losses; with need_grad, replaces logits by its gradient, like csrc/cuda/cross_entropy.cu on CUDA.

    z: a buffer for the logits in the dtype of the sums, or logits itself if it has that dtype. It successively holds
    the logits, their exponentials, and the gradient, softmax - one-hot.
    """
    counted = (targets != IGNORE).unsqueeze(1)
    targets = torch.where(counted, targets.unsqueeze(1), 0)
    z.copy_(logits)
    z -= z.amax(1, keepdim=True)
    at_target = z.gather(1, targets)
    exp_sum = z.exp_().sum(1, keepdim=True)
    loss = torch.where(counted, exp_sum.log() - at_target, 0).sum()
    if need_grad:
        z *= counted / exp_sum
        logits.copy_(z.scatter_add_(1, targets, -counted.to(z.dtype)))
    return loss


def _shapes(x, weight, targets, dtype, want_x, want_weight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    x_grad = x.new_empty(x.shape if want_x else 0, dtype=dtype)
    weight_grad = weight.new_empty(weight.shape if want_weight else 0, dtype=wide)
    return x.new_empty((), dtype=wide), x_grad, weight_grad, targets.new_empty(())


def _save(ctx, inputs, output) -> None:
    x, weight, *_, ctx.want_x, ctx.want_weight = inputs
    ctx.dtypes = x.dtype, weight.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # otherwise zeros as large as the weight are allocated for their gradients
    ctx.save_for_backward(*output[1:])


def _backward(ctx, upstream: Tensor | None, *_):
    if upstream is None:  # the loss needs no gradient
        return (None,) * 6
    if torch.is_grad_enabled():  # only with create_graph=True
        raise RuntimeError("the chunked cross-entropy has no second derivative: set CHUNKED_MIN_VOCAB = None")
    x_grad, weight_grad, number = ctx.saved_tensors
    scale = torch.where(number > 0, upstream / number, 0)  # no gradient if all targets are masked, as with `plain`
    x_grad = x_grad.to(ctx.dtypes[0]) * scale if ctx.want_x else None
    # In place, as it may be the largest tensor of all.
    weight_grad = weight_grad.mul_(scale).to(ctx.dtypes[1]) if ctx.want_weight else None
    return x_grad, weight_grad, None, None, None, None


torch.library.define(
    "minidisp::linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor targets, ScalarType dtype, bool want_x, bool want_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("minidisp::linear_cross_entropy", "CompositeExplicitAutograd")(_chunked)
torch.library.register_fake("minidisp::linear_cross_entropy", _shapes)
torch.library.register_autograd("minidisp::linear_cross_entropy", _backward, setup_context=_save)


def chunk_tokens(x: Tensor) -> int:
    """Tokens per chunk: few on a CPU, so that their logits fit in its caches; else enough to keep the device busy."""
    return 512 if x.device.type == "cpu" else 2048
