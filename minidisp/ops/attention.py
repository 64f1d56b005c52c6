"""Causal self-attention, and the choice of its implementation.

    minidisp::causal_attention           fused: C++ in csrc/, on a CPU, float32 and bfloat16, head dimension up to 256
    minidisp::causal_attention_backward  its gradient
    torch                                scaled_dot_product_attention: everything else

The operator reads queries, keys and values from a single tensor, the output of one linear layer, and returns their
gradient as one tensor too. Scores are scaled by 1 / sqrt(D). Under autocast it computes in autocast's dtype, like
torch. choose() returns the implementation that would run, and why it is not the operator.
MINIDISP_CPU=baseline|avx2|avx512|amx sets the highest instruction set that the operator may use; float32 results differ
only in rounding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minidisp.ops import registered

FUSED_DTYPES = (torch.float32, torch.bfloat16)
FUSED_MOST_WIDTH = 256  # channels of a head

# A KV cache: a function that appends keys and values, (B, 2 n_kv_head, T, D), to the cached ones and returns all; and
# a mask of those that a token attends to, (B, 1, T, T) bool, or None for all up to the token.
Kept = tuple[Callable[[Tensor], Tensor], Tensor | None]


def _fake(qkv: Tensor, n_head: int, n_kv_head: int) -> tuple[Tensor, Tensor]:
    B, T, width = qkv.shape
    D = width // (n_head + 2 * n_kv_head)
    return qkv.new_empty(B, T, n_head * D), qkv.new_empty((B, n_head, T), dtype=torch.float32)


def _fake_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int, n_kv_head: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # otherwise backward would allocate zeros for the gradient of lse
    ctx.save_for_backward(inputs[0], *output)
    ctx.heads = inputs[1:]


def _backward(ctx, grad: Tensor | None, _):
    if grad is None:  # no gradient flows into the output
        return None, None, None
    if torch.is_grad_enabled():  # only under create_graph=True
        raise RuntimeError(
            "the attention operator has no second derivative: for create_graph=True, start with MINIDISP_FUSED=0"
        )
    return torch.ops.minidisp.causal_attention_backward(grad, *ctx.saved_tensors, *ctx.heads), None, None


# qkv (B, T, (n_head + 2 n_kv_head) D): per token the queries, the keys and the values, float32 or bfloat16, rows at any
# stride. Returns the output (B, T, n_head D) and, for backward, the log-sum-exp of the scaled scores, float32
# (B, n_head, T).
torch.library.define("minidisp::causal_attention", "(Tensor qkv, int n_head, int n_kv_head) -> (Tensor, Tensor)")
torch.library.define(
    "minidisp::causal_attention_backward",
    "(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int n_head, int n_kv_head) -> Tensor",
)
torch.library.register_fake("minidisp::causal_attention", _fake)
torch.library.register_fake("minidisp::causal_attention_backward", _fake_backward)
torch.library.register_autograd("minidisp::causal_attention", _backward, setup_context=_save)
# The highest instruction set that the CPU operators use here: baseline, avx2, avx512 or amx.
torch.library.define("minidisp::instruction_set", "() -> str")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of x are computed: autocast's if enabled, otherwise that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype


def choose(
    dtype: torch.dtype, device_type: str, width: int, dropout: float = 0.0, cached: bool = False
) -> tuple[str, str]:
    """The implementation of attention, "fused" or "torch", and why it is not fused. Does not look for the extension.

    dtype: the compute dtype, autocast's if enabled. width: channels of a head, D.
    """
    if device_type != "cpu":
        return "torch", f"the operator does not run on {device_type}"
    if cached or dropout > 0:
        return "torch", "the operator does not support " + ("a cache" if cached else "dropout")
    if dtype not in FUSED_DTYPES:
        return "torch", f"the operator does not support {str(dtype).removeprefix('torch.')}"
    if width > FUSED_MOST_WIDTH:
        return "torch", f"the operator does not support heads of more than {FUSED_MOST_WIDTH} channels"
    return "fused", ""


def has_tiles() -> bool:
    """Whether the operators use AMX tiles. The extension must have been found."""
    return torch.ops.minidisp.instruction_set() == "amx"


has_tiles._dynamo_marked_constant = True


def torch_is_faster(dtype: torch.dtype, tokens: int, gradient: bool) -> bool:
    """Whether torch is faster than the operator, whose extension must have been found.

    It is in bfloat16 without AMX, in a forward pass without a backward pass, from 512 tokens on (docs/speed.md).
    """
    # tokens is tested last: otherwise torch.compile would recompile for other lengths even where they are irrelevant.
    return dtype == torch.bfloat16 and not gradient and not has_tiles() and tokens >= 512


def causal_attention(
    qkv: Tensor, n_head: int, n_kv_head: int, dropout: float = 0.0, kept: Kept | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(D) + causal mask) V of every head: (B, T, (n_head + 2 n_kv_head) D) -> (B, T, n_head D).

    qkv: per token the queries of all heads, then the keys, then the values. n_kv_head: a divisor of n_head; query heads
    share keys and values in groups. dropout: probability, of the attention weights. kept: a KV cache; without a mask,
    T must be 1 or the cache empty.
    """
    dtype, tokens, width = compute_dtype(qkv), qkv.shape[1], qkv.shape[2] // (n_head + 2 * n_kv_head)
    gradient = torch.is_grad_enabled() and qkv.requires_grad
    chosen, _ = choose(dtype, qkv.device.type, width, dropout, kept is not None)
    if chosen == "fused" and not registered("cpu") and not torch_is_faster(dtype, tokens, gradient):
        return torch.ops.minidisp.causal_attention(qkv, n_head, n_kv_head)[0]
    return torch_attention(qkv, n_head, n_kv_head, dropout, kept)


def torch_attention(qkv: Tensor, n_head: int, n_kv_head: int, dropout: float = 0.0, kept: Kept | None = None) -> Tensor:
    """causal_attention by torch's scaled_dot_product_attention, on any device."""
    B, T, width = qkv.shape
    heads = n_head + 2 * n_kv_head
    q, kv = qkv.reshape(B, T, heads, width // heads).transpose(1, 2).split((n_head, 2 * n_kv_head), dim=1)
    mask = None
    if kept is not None:
        append, mask = kept
        kv = append(kv)
    k, v = kv.chunk(2, dim=1)
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and T > 1,  # a single new token attends to the whole cache
        enable_gqa=n_kv_head != n_head,
    )
    return y.transpose(1, 2).reshape(B, T, n_head * (width // heads))
