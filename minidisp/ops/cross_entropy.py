"""The cross-entropy of rows of logits and its gradient, as an operator on CUDA.

minidisp::cross_entropy_  C++ in csrc/cuda/cross_entropy.cu; minidisp/loss.py calls it between its matrix products
"""

import torch
from torch import Tensor

from minidisp.ops import registered

# logits (N, V), float32, bfloat16 or float16, rows at any stride; targets (N,) int64. Returns the losses, float32 (N,),
# 0 for ignored targets. With need_grad, the gradient of their sum overwrites the logits.
torch.library.define(
    "minidisp::cross_entropy_", "(Tensor(a!) logits, Tensor targets, int ignored, bool need_grad) -> Tensor"
)


def fuses(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the operator computes the loss of logits of that dtype on x's device. Finds or builds the extension."""
    return x.is_cuda and dtype != torch.float64 and not registered("cuda")
