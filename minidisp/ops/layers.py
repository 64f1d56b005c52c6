"""The layers of a block other than attention, and the choice of their implementation.

    linear, layer_norm, rms_norm, rotate_heads, gelu, squared_relu

fused: operators in csrc/cpu/layers*, on a CPU: each makes one pass over memory, forward and backward, and returns the
dtype that the next matrix product takes, so that no casts are needed. torch: PyTorch's own functions, everywhere else,
and under torch.compile, which fuses them. fuses() chooses between the two, which differ only in rounding.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from minidisp.ops import registered
from minidisp.ops.attention import compute_dtype


def _fake_like(x: Tensor, *_) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _fake_norm_backward(grad: Tensor, x: Tensor, *_) -> tuple[Tensor, Tensor]:
    return _fake_like(x), x.new_empty((2, x.shape[-1]), dtype=torch.float32)


def _fake_rotate_backward(grad: Tensor, qkv: Tensor, q_weight: Tensor, *_) -> tuple[Tensor, Tensor]:
    return _fake_like(qkv), qkv.new_empty((2, len(q_weight)), dtype=torch.float32)


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def _fake_linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_like(x), _fake_like(weight), x.new_empty(len(weight), dtype=torch.float32)


EITHER = (torch.float32, torch.bfloat16)
# Float32 and bfloat16, computed in float32. Backward returns the gradient of the input, and those of the weights as the
# rows of one float32 tensor (2, width). Autograd is registered in C++.
OPERATORS = {
    # LayerNorm (centred) or RMSNorm over the last dimension, the output in dtype
    "norm": (
        "(Tensor x, Tensor weight, Tensor? bias, float eps, bool centred, ScalarType dtype) -> Tensor", _fake_norm
    ),
    "norm_backward": (
        "(Tensor grad_out, Tensor x, Tensor weight, float eps, bool centred) -> (Tensor, Tensor)", _fake_norm_backward
    ),
    # RMSNorm of every head of the queries and keys in qkv, then rotary positions: cos and sin are float32 (T, D)
    "rotate": (
        "(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, int n_head, int n_kv_head, float eps)"
        " -> Tensor", _fake_like
    ),
    "rotate_backward": (
        "(Tensor grad_out, Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, int n_head,"
        " int n_kv_head, float eps) -> (Tensor, Tensor)", _fake_rotate_backward
    ),
    "squared_relu": ("(Tensor x) -> Tensor", _fake_like),
    "squared_relu_backward": ("(Tensor grad_out, Tensor x) -> Tensor", _fake_like),
    # any function of a bfloat16 number, from tables of its values (bfloat16) and derivatives (float32) by the bits of x
    "lookup": ("(Tensor x, Tensor values, Tensor slopes) -> Tensor", _fake_like),
    "lookup_backward": ("(Tensor grad_out, Tensor x, Tensor slopes) -> Tensor", _fake_like),
    # x weight^T + bias in bfloat16; backward returns the gradients of x and weight, and that of bias in float32
    "linear": ("(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _fake_linear),
    "linear_backward": (
        "(Tensor grad_out, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)", _fake_linear_backward
    ),
}  # fmt: skip
for _name, (_schema, _fake) in OPERATORS.items():
    torch.library.define(f"minidisp::{_name}", _schema)
    torch.library.register_fake(f"minidisp::{_name}", _fake)


def fuses(x: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)) -> bool:
    """Whether to use the operators for x: on a CPU, if its compute dtype is in dtypes, and not under torch.compile.

    Finds or builds the extension only if the other conditions hold. LayerNorm, GELU and linear layers use torch in
    float32, where it is as fast.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or compute_dtype(x) not in dtypes:
        return False
    return x.dtype in EITHER and not registered("cpu")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias; x (..., in), weight (out, in), bias (out,)."""
    # Without gradients, F.linear is better, since autocast caches the weights that it casts; in training they change.
    if not torch.is_grad_enabled() or not fuses(x):
        return F.linear(x, weight, bias)
    dtype = compute_dtype(x)
    return torch.ops.minidisp.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm over the last dimension. dtype: of the fused operator's output; default: the compute dtype."""
    if fuses(x):
        return torch.ops.minidisp.norm(x, weight, bias, eps, True, dtype or compute_dtype(x))
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """RMSNorm over the last dimension. dtype: of the fused operator's output; default: the compute dtype."""
    if fuses(x, EITHER):
        return torch.ops.minidisp.norm(x, weight, None, eps, False, dtype or compute_dtype(x))
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate_heads(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, n_head: int, n_kv_head: int, eps: float
) -> Tensor:
    """RMSNorm, then rotary positions (arXiv 2104.09864), of every query and key head in qkv; values are unchanged.

    qkv: (B, T, (n_head + 2 n_kv_head) D). Channel i of a head is paired with channel i + D/2. weights: (D,). cos, sin:
    (T, D), or (B, 1, T, D) with positions per sequence; the operator needs the former in float32. Computed in float32,
    returned in the dtype of qkv.
    """
    if cos.ndim == 2 and cos.dtype == torch.float32 and fuses(qkv, EITHER):
        return torch.ops.minidisp.rotate(qkv, q_weight, k_weight, cos, sin, n_head, n_kv_head, eps)
    heads = qkv.unflatten(-1, (-1, len(q_weight))).transpose(1, 2)  # (B, heads, T, D)
    q, k, v = heads.split((n_head, n_kv_head, n_kv_head), dim=1)
    q, k = (rotate(F.rms_norm(x, w.shape, w, eps), cos, sin) for x, w in ((q, q_weight), (k, k_weight)))
    return torch.cat((q.to(v.dtype), k.to(v.dtype), v), dim=1).transpose(1, 2).flatten(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x (B, H, T, D), in float32."""
    a, b = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU, exact with approximate="none", or its approximation "tanh"; fused from a table of torch's own values."""
    if x.dtype == torch.bfloat16 and fuses(x):
        return torch.ops.minidisp.lookup(x, *gelu_tables(approximate))
    return F.gelu(x, approximate=approximate)


@functools.cache
def gelu_tables(approximate: str) -> tuple[Tensor, Tensor]:
    """GELU (bfloat16) and its derivative (float32) of all bfloat16 numbers, indexed by their bits."""
    with torch.inference_mode(False), torch.no_grad():  # the cached tables must not be inference tensors
        x = torch.arange(1 << 16, device="cpu").to(torch.int16).view(torch.bfloat16)
        slopes = torch.ops.aten.gelu_backward(
            torch.ones_like(x, dtype=torch.float32), x.float(), approximate=approximate
        )
        return F.gelu(x, approximate=approximate), slopes


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (arXiv 2109.08668)."""
    return torch.ops.minidisp.squared_relu(x) if fuses(x, EITHER) else F.relu(x).square()
