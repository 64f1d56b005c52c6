// Causal attention on the CPU, forward and backward, tile by tile: no T x T matrix is kept.
//
// A piece of work is one key and value head of one sequence with the query heads that read it; a thread computes its pieces one
// after the other and fetches the rows of the next one meanwhile, as they lie far apart. attention_tile.h says what happens to a
// piece in float, attention_amx.cpp in bfloat16 on matrix tiles. Memory beyond the results: per thread some copies of a head.

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "cpu.h"

namespace minidisp {
namespace {

struct Kernels {
  AttentionKernels in_float, in_bfloat16;
};

#define MINIDISP_TILE "attention_tile.h"
#include "instruction_sets.h"

struct Sizes {
  int64_t B, T, D, n_head, n_kv_head;
};

Sizes checked_sizes(const at::Tensor& qkv, int64_t n_head, int64_t n_kv_head) {
  TORCH_CHECK_VALUE(qkv.scalar_type() == at::kFloat || qkv.scalar_type() == at::kBFloat16,
                    "minidisp::causal_attention takes float32 and bfloat16, not ", qkv.scalar_type());
  TORCH_CHECK_VALUE(n_kv_head >= 1 && n_head >= 1 && n_head % n_kv_head == 0, "n_head ", n_head,
                    " must be a multiple of n_kv_head ", n_kv_head);
  const int64_t heads = n_head + 2 * n_kv_head;
  TORCH_CHECK_VALUE(qkv.dim() == 3 && qkv.size(2) > 0 && qkv.size(2) % heads == 0,
                    "qkv must be (B, T, (n_head + 2 n_kv_head) D) with ", heads, " heads in all, not ", qkv.sizes());
  const int64_t D = qkv.size(2) / heads;
  TORCH_CHECK_VALUE(D <= 256, "minidisp::causal_attention takes heads of up to 256 channels, not ", D);
  return {qkv.size(0), qkv.size(1), D, n_head, n_kv_head};
}

// All pieces of work, dealt out to the threads, with memory for each thread.
void run(const Sizes& s, const std::vector<HeadGroup>& groups, const at::Tensor& qkv, bool backward) {
  const Kernels& all = choose_kernels();
  const AttentionKernels& k = qkv.scalar_type() == at::kFloat ? all.in_float : all.in_bfloat16;
  const bool tiles = qkv.scalar_type() == at::kBFloat16 && best_instruction_set() == InstructionSet::amx;
  const AmxKernels* amx = tiles ? amx_kernels() : nullptr;
  const int64_t work = static_cast<int64_t>(groups.size());
  const int64_t threads = std::min<int64_t>(work, at::in_parallel_region() ? 1 : at::get_num_threads());
  if (work == 0 || s.T == 0) return;
  int64_t floats = (backward ? k.backward_floats : k.forward_floats)(s.T, s.D);
  if (amx != nullptr) floats = std::max(floats, (backward ? amx->backward_floats : amx->forward_floats)(s.T, s.D));
  const int64_t each = (floats + 15) / 16 * 16 + 48;  // 48: off the powers of two
  const at::Tensor memory = at::empty({threads * each + 16}, qkv.options().dtype(at::kFloat));
  const uintptr_t start = (reinterpret_cast<uintptr_t>(memory.mutable_data_ptr()) + 63) / 64 * 64;
  at::parallel_for(0, threads, 1, [&](int64_t t, int64_t stop) {
    for (; t < stop; ++t)
      for (int64_t w = t * work / threads; w < (t + 1) * work / threads; ++w) {
        float* own = reinterpret_cast<float*>(start) + t * each;
        if (amx != nullptr && (backward ? amx->backward : amx->forward)(groups[w], own)) continue;
        (backward ? k.backward : k.forward)(groups[w], own);
      }
  });
}

template <class T>
std::vector<HeadGroup> head_groups(const Sizes& s, const at::Tensor& qkv, const at::Tensor& out, const at::Tensor& lse,
                                   const at::Tensor* grad_out, const at::Tensor* grad) {
  const int64_t heads = s.n_head / s.n_kv_head;
  std::vector<HeadGroup> groups;
  groups.reserve(s.B * s.n_kv_head);
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t h = 0; h < s.n_kv_head; ++h) {
      HeadGroup g{};
      g.tokens = s.T, g.width = s.D, g.heads = heads;
      g.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(s.D)));
      const int64_t q = h * heads * s.D, k = (s.n_head + h) * s.D, v = (s.n_head + s.n_kv_head + h) * s.D;
      const T* x = static_cast<const T*>(qkv.const_data_ptr()) + b * qkv.stride(0);
      g.q = x + q, g.k = x + k, g.v = x + v, g.stride = qkv.stride(1);
      g.out = static_cast<T*>(out.data_ptr()) + b * out.stride(0) + q, g.out_stride = out.stride(1);
      g.lse = static_cast<float*>(lse.data_ptr()) + (b * s.n_head + h * heads) * s.T;
      if (grad != nullptr) {
        g.grad_out = static_cast<const T*>(grad_out->const_data_ptr()) + b * out.stride(0) + q;
        T* y = static_cast<T*>(grad->mutable_data_ptr()) + b * grad->stride(0);
        g.grad_q = y + q, g.grad_k = y + k, g.grad_v = y + v, g.grad_stride = grad->stride(1);
      }
      groups.push_back(g);
    }
  return groups;
}

// Rows may be anywhere, the features of a row must lie side by side.
at::Tensor with_rows(const at::Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : x.contiguous(); }

std::tuple<at::Tensor, at::Tensor> causal_attention(const at::Tensor& packed, int64_t n_head, int64_t n_kv_head) {
  const Sizes s = checked_sizes(packed, n_head, n_kv_head);
  const at::Tensor qkv = with_rows(packed);
  const at::Tensor out = at::empty({s.B, s.T, n_head * s.D}, qkv.options());
  const at::Tensor lse = at::empty({s.B, n_head, s.T}, qkv.options().dtype(at::kFloat));
  const auto groups = qkv.scalar_type() == at::kFloat ? head_groups<float>(s, qkv, out, lse, nullptr, nullptr)
                                                      : head_groups<c10::BFloat16>(s, qkv, out, lse, nullptr, nullptr);
  run(s, groups, qkv, false);
  return {out, lse};
}

at::Tensor causal_attention_backward(const at::Tensor& grad_out, const at::Tensor& packed, const at::Tensor& out,
                                     const at::Tensor& lse, int64_t n_head, int64_t n_kv_head) {
  const Sizes s = checked_sizes(packed, n_head, n_kv_head);
  TORCH_CHECK_VALUE(grad_out.sizes() == out.sizes() && grad_out.scalar_type() == packed.scalar_type(),
                    "the gradient must be as the output, ", out.sizes(), " of ", packed.scalar_type(), ", not ",
                    grad_out.sizes(), " of ", grad_out.scalar_type());
  const at::Tensor qkv = with_rows(packed), g = grad_out.contiguous(), o = out.contiguous(), l = lse.contiguous();
  const at::Tensor grad = at::empty(qkv.sizes(), qkv.options());
  const auto groups = qkv.scalar_type() == at::kFloat ? head_groups<float>(s, qkv, o, l, &g, &grad)
                                                      : head_groups<c10::BFloat16>(s, qkv, o, l, &g, &grad);
  run(s, groups, qkv, true);
  return grad;
}

// Under autocast: in its dtype, as scaled_dot_product_attention.
std::tuple<at::Tensor, at::Tensor> causal_attention_autocast(const at::Tensor& qkv, int64_t n_head, int64_t n_kv_head) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("minidisp::causal_attention", "")
                             .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, int64_t, int64_t)>();
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  return op.call(at::autocast::cached_cast(at::autocast::get_autocast_dtype(at::kCPU), qkv, at::kCPU), n_head, n_kv_head);
}

std::string instruction_set() {
  switch (best_instruction_set()) {
    case InstructionSet::amx: return amx_kernels() != nullptr ? "amx" : "avx512";
    case InstructionSet::avx512: return "avx512";
    case InstructionSet::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace
}  // namespace minidisp

TORCH_LIBRARY_IMPL(minidisp, CompositeExplicitAutograd, m) { m.impl("instruction_set", minidisp::instruction_set); }

TORCH_LIBRARY_IMPL(minidisp, CPU, m) {
  m.impl("causal_attention", minidisp::causal_attention);
  m.impl("causal_attention_backward", minidisp::causal_attention_backward);
}

TORCH_LIBRARY_IMPL(minidisp, AutocastCPU, m) { m.impl("causal_attention", minidisp::causal_attention_autocast); }
