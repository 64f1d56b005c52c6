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

  // Causal self-attention, scores scaled by 1 / sqrt(D). qkv (B, T, (n_head + 2 n_kv_head) D): per token the queries, the keys and
  // the values, float32 or bfloat16, rows at any stride. Returns the output (B, T, n_head D) and the log-sum-exp of the scaled
  // scores, float32 (B, n_head, T), which backward needs to return the gradient of qkv.
  m.def("causal_attention(Tensor qkv, int n_head, int n_kv_head) -> (Tensor, Tensor)");
  m.def(
      "causal_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int n_head, int n_kv_head) -> Tensor");
  // The best instructions that these two use here: baseline, avx2, avx512 or amx.
  m.def("instruction_set() -> str");
}
