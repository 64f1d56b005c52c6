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

  // The losses of rows of logits (N, V), float32 (N,), 0 where the target (int64) is ignored; with need_grad, the logits become the
  // gradient of their sum. CUDA only.
  m.def("cross_entropy_(Tensor(a!) logits, Tensor targets, int ignored, bool need_grad) -> Tensor");

  // Causal self-attention, scores scaled by 1 / sqrt(D). qkv (B, T, (n_head + 2 n_kv_head) D): per token the queries, the keys and
  // the values, float32 or bfloat16, rows at any stride. Returns the output (B, T, n_head D) and the log-sum-exp of the scaled
  // scores, float32 (B, n_head, T), which backward needs to return the gradient of qkv.
  m.def("causal_attention(Tensor qkv, int n_head, int n_kv_head) -> (Tensor, Tensor)");
  m.def(
      "causal_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int n_head, int n_kv_head) -> Tensor");
  // What a block does besides (layers_cpu.cpp), in float32 and bfloat16, computed in float32. Backward returns the gradient of the
  // input, and those of the weights as the rows of one float32 tensor (2, width).
  // LayerNorm (centred) or RMSNorm over the last dimension, the output in dtype.
  m.def("norm(Tensor x, Tensor weight, Tensor? bias, float eps, bool centred, ScalarType dtype) -> Tensor");
  m.def("norm_backward(Tensor grad_out, Tensor x, Tensor weight, float eps, bool centred) -> (Tensor, Tensor)");
  // RMSNorm of every head of the queries and keys in qkv, as above, then rotary positions: cos and sin are float32 (T, D).
  m.def(
      "rotate(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, int n_head, int n_kv_head, float eps) -> Tensor");
  m.def(
      "rotate_backward(Tensor grad_out, Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, int n_head, "
      "int n_kv_head, float eps) -> (Tensor, Tensor)");
  m.def("squared_relu(Tensor x) -> Tensor");
  m.def("squared_relu_backward(Tensor grad_out, Tensor x) -> Tensor");
  // Any function of one number, in bfloat16: values (65536) in bfloat16 and slopes (65536) in float32, by the bits of x.
  m.def("lookup(Tensor x, Tensor values, Tensor slopes) -> Tensor");
  m.def("lookup_backward(Tensor grad_out, Tensor x, Tensor slopes) -> Tensor");
  // x weight^T + bias in bfloat16. Backward returns the gradients of x and weight, and that of bias in float32.
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_backward(Tensor grad_out, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)");
  // The best instructions that these use here: baseline, avx2, avx512 or amx.
  m.def("instruction_set() -> str");
}
