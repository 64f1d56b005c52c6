// The schema of the operator, once for all devices. A file per device registers what computes it (dispersion_cpu.cpp),
// and minidisp/ops/__init__.py its shapes without data (for torch.compile) and its gradient.

#include <torch/library.h>

TORCH_LIBRARY(minidisp, m) {
  // z (B, T, C): float32, bfloat16 or float16, any strides. Returns the loss, a float32 scalar, and what backward needs
  // of it; empty unless need_grad. On the CPU, that is the gradient, float32 (B, T, C), and nothing. On CUDA, it is a
  // product of that shape, from which dispersion_backward makes the gradient, and the state that it needs for that,
  // float32.
  m.def("dispersion(Tensor z, str variant, float tau, float clamp, float eps, bool need_grad) -> (Tensor, Tensor, Tensor)");
  // The gradient times upstream, a float32 scalar, in the shape and type of z. CUDA only.
  m.def("dispersion_backward(Tensor upstream, Tensor z, Tensor product, Tensor state, str variant) -> Tensor");
}
