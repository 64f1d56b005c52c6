// The schema of the operator, once for all devices. A file per device registers what computes it (dispersion_cpu.cpp),
// and minidisp/ops/__init__.py its shapes without data (for torch.compile) and its gradient.

#include <torch/library.h>

TORCH_LIBRARY(minidisp, m) {
  // z (B, T, C): float32, bfloat16 or float16, any strides. Returns the loss, a float32 scalar, and its gradient, float32
  // (B, T, C), which is empty unless need_grad.
  m.def("dispersion(Tensor z, str variant, float tau, float clamp, float eps, bool need_grad) -> (Tensor, Tensor)");
}
