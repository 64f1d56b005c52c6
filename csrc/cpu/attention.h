// The arguments of causal attention, and the unit of work that its implementations share.

#pragma once

#include <cstdint>

#include "numbers.h"

namespace minidisp {

// All heads of all sequences: forward, or backward if grad is not null. Strides of sequences and tokens are in
// elements; features are contiguous. type: float32 or bfloat16, of everything but lse.
struct AttentionCall {
  Type type;
  int64_t B, T, D, n_head, n_kv_head;
  const void* qkv;
  int64_t qkv_stride[2];
  void* out;  // read by backward
  int64_t out_stride[2];
  float* lse;  // (B, n_head, T)
  // backward only
  const void* grad_out;  // strides as out
  void* grad;            // of qkv
  int64_t grad_stride[2];
};
void attention(const AttentionCall& call);

// One key and value head of one sequence, with the query heads that read it. Rows are tokens; strides are in elements,
// and the features of a row are contiguous. Elements are float or bfloat16; sums are always float.
struct HeadGroup {
  int64_t tokens, width, heads;  // T, D, and query heads
  float scale;                   // of the scores
  const void *q, *k, *v;         // query head h starts at q + h * width
  int64_t stride;
  void* out;  // (T, heads * width), laid out like q
  int64_t out_stride;
  float* lse;  // (heads, T): log of the sum of exp(scale * score)
  // backward only
  const void* grad_out;  // strides as out
  void *grad_q, *grad_k, *grad_v;
  int64_t grad_stride;
};

using AttentionPass = void (*)(const HeadGroup& group, float* memory);

struct AttentionKernels {
  AttentionPass forward, backward;
  int64_t (*forward_floats)(int64_t tokens, int64_t width);  // size of the memory of a pass, which is 64-byte aligned
  int64_t (*backward_floats)(int64_t tokens, int64_t width);
};

// In bfloat16 on AMX tiles. A pass returns false if the vector code has to compute the group.
struct AmxKernels {
  bool (*forward)(const HeadGroup& group, float* memory);
  bool (*backward)(const HeadGroup& group, float* memory);
  int64_t (*forward_floats)(int64_t tokens, int64_t width);
  int64_t (*backward_floats)(int64_t tokens, int64_t width);
};
const AmxKernels* amx_kernels();  // nullptr if the processor or the system does not support AMX

}  // namespace minidisp
