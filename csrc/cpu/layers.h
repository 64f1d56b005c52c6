// The interface of the vector code of a block's small operators (layers_tile.h). Rows are tokens.

#pragma once

#include <cstdint>

namespace minidisp {

// LayerNorm (centred) or RMSNorm of rows of `width` numbers; float or bfloat16 in and out, computed in float.
struct NormWork {
  int64_t width;
  float eps;
  bool centred;
  const void* x;
  const float *weight, *bias;  // bias may be nullptr
  void* out;
  // backward only
  const void* grad;  // of out
  void* grad_x;
};

// RMSNorm of each head of the queries and the keys, and their rotary positions; the values are copied.
// A row: n_head queries, n_kv_head keys, n_kv_head values, of `width` channels each; row r is token r % tokens.
struct RotateWork {
  int64_t n_head, n_kv_head, width, tokens;
  float eps;
  const void* qkv;
  const float *q_weight, *k_weight;
  const float *cos, *sin;  // (tokens, width)
  void* out;
  // backward only
  const void* grad;
  void* grad_qkv;
};

// Each processes rows [begin, end). sums: (2, width) float, to which the gradients of the weights are added: of weight
// and bias, or of the weights of queries and keys.
struct LayerKernels {
  void (*norm)(const NormWork&, int64_t begin, int64_t end);
  void (*norm_backward)(const NormWork&, int64_t begin, int64_t end, float* sums);
};
struct RowKernels {  // for one dtype; ranges are in rows or numbers
  void (*rotate)(const RotateWork&, int64_t begin, int64_t end);
  void (*rotate_backward)(const RotateWork&, int64_t begin, int64_t end, float* sums);
  void (*squared_relu)(const void* x, void* out, int64_t begin, int64_t end);  // max(x, 0)^2 of numbers [begin, end)
  void (*squared_relu_backward)(const void* grad, const void* x, void* out, int64_t begin, int64_t end);
};
struct BFloat16Kernels {
  // grad times slopes[bits of x]
  void (*lookup_backward)(const void* grad, const void* x, const float* slopes, void* out, int64_t begin, int64_t end);
  // Copies columns [begin, end) of g (rows, columns) to rows of out, and computes their sums.
  void (*transpose)(const void* g, int64_t rows, int64_t columns, void* out, float* sums, int64_t begin, int64_t end);
};

struct BlockKernels {
  LayerKernels norms[2][2];  // [x in bfloat16][out in bfloat16]
  RowKernels rows[2];        // [in bfloat16]
  BFloat16Kernels bfloat16;
};
const BlockKernels& layer_kernels();  // for the highest instruction set

}  // namespace minidisp
