"""Causal self-attention, and the one place that chooses what computes it.

    minidisp::causal_attention           fused: C++ in csrc/, on a CPU, float32 and bfloat16, heads of up to 256 channels
    minidisp::causal_attention_backward  its gradient
    torch                                scaled_dot_product_attention: everything else

The operator reads queries, keys and values from one tensor, as a linear layer makes it, and its gradient is written there
as one tensor too. Scores are scaled by 1 / sqrt(D). Under autocast it computes in autocast's dtype, like torch's.
choose() says what would run, and why not the operator. MINIDISP_CPU=baseline|avx2|avx512|amx names the best instructions
that the operator may use; the results of float32 differ in rounding only.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minidisp.ops import registered

FUSED_DTYPES = (torch.float32, torch.bfloat16)
FUSED_MOST_WIDTH = 256  # channels of a head

# How a cache takes part: what adds keys and values, (B, n_kv_head, T, D) each, to those kept before and returns all; and
# which of all a token sees, (B, 1, T, T) bool, or None: all before it.
Kept = tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], Tensor | None]


def _fake(qkv: Tensor, n_head: int, n_kv_head: int) -> tuple[Tensor, Tensor]:
    B, T, width = qkv.shape
    D = width // (n_head + 2 * n_kv_head)
    return qkv.new_empty(B, T, n_head * D), qkv.new_empty((B, n_head, T), dtype=torch.float32)


def _fake_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int, n_kv_head: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or backward is handed zeros for its gradient
    ctx.save_for_backward(inputs[0], *output)
    ctx.heads = inputs[1:]


def _backward(ctx, grad: Tensor | None, _):
    if grad is None:  # what uses the output has no gradient
        return None, None, None
    if torch.is_grad_enabled():  # only under create_graph=True
        raise RuntimeError(
            "the attention operator has no second derivative: for create_graph=True set MINIDISP_FUSED=0 before the start"
        )
    return torch.ops.minidisp.causal_attention_backward(grad, *ctx.saved_tensors, *ctx.heads), None, None


# qkv (B, T, (n_head + 2 n_kv_head) D): per token the queries, the keys and the values, float32 or bfloat16, rows at any
# stride. Returns the output (B, T, n_head D) and the log-sum-exp of the scaled scores, float32 (B, n_head, T), from which
# backward computes the gradient of qkv.
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
    """The dtype that matrix products of x have: autocast's where it is on, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype


def choose(
    dtype: torch.dtype, device_type: str, width: int, dropout: float = 0.0, cached: bool = False
) -> tuple[str, str]:
    """What computes attention, "fused" or "torch", and why not the former. Nothing is looked for or built.

    dtype: in which it is computed, autocast's where autocast is on. width: channels of a head, D.
    """
    if device_type != "cpu":
        return "torch", f"the operator does not run on {device_type}"
    if cached or dropout > 0:
        return "torch", "the operator has no " + ("cache" if cached else "dropout")
    if dtype not in FUSED_DTYPES:
        return "torch", f"the operator does not compute in {str(dtype).removeprefix('torch.')}"
    if width > FUSED_MOST_WIDTH:
        return "torch", f"the operator has no heads of more than {FUSED_MOST_WIDTH} channels"
    return "fused", ""


def has_tiles() -> bool:
    """Whether the operators, which must have been found, use matrix tiles (AMX)."""
    return torch.ops.minidisp.instruction_set() == "amx"


has_tiles._dynamo_marked_constant = True


def torch_is_faster(dtype: torch.dtype, tokens: int, gradient: bool) -> bool:
    """Whether torch's form is the faster one where the operator, which must have been found, could compute, too.

    It is in bfloat16 without matrix tiles (AMX), for a forward pass that no backward one follows, from 512 tokens on
    (docs/speed.md).
    """
    # The tokens come last: torch.compile need not look at their number, and compile anew for others, where it does not matter.
    return dtype == torch.bfloat16 and not gradient and not has_tiles() and tokens >= 512


def causal_attention(
    qkv: Tensor, n_head: int, n_kv_head: int, dropout: float = 0.0, kept: Kept | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(D) + causal mask) V of every head: (B, T, (n_head + 2 n_kv_head) D) -> (B, T, n_head D).

    qkv: per token the queries of all heads, then the keys, then the values. n_kv_head: a divisor of n_head; query heads
    share keys and values in groups. dropout: probability, of the weights. kept: of a cache; without a mask, T must be 1
    or the cache empty.
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
    q, k, v = qkv.reshape(B, T, heads, width // heads).transpose(1, 2).split((n_head, n_kv_head, n_kv_head), dim=1)
    mask = None
    if kept is not None:
        append, mask = kept
        k, v = append(k, v)
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and T > 1,  # a single new token sees everything that was kept
        enable_gqa=n_kv_head != n_head,
    )
    return y.transpose(1, 2).reshape(B, T, n_head * (width // heads))
