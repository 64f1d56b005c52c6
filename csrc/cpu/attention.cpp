// Causal attention on the CPU, forward and backward, computed blockwise: no T x T matrix is kept.
//
// The unit of work is a HeadGroup: one key and value head of one sequence with the query heads that read it. A thread
// processes its groups one after the other, and prefetches rows, since they are far apart in memory. attention_tile.h
// computes a group in float, attention_amx.cpp in bfloat16 on AMX tiles. Memory beyond the results: a few copies of a
// head per thread.

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "host.h"

namespace minidisp {
namespace {

struct Kernels {
  AttentionKernels in_float, in_bfloat16;
};

#define MINIDISP_TILE "attention_tile.h"
#include "instruction_sets.h"

// Parallelises the groups over the threads, with memory for each thread.
void run(const AttentionCall& s, const std::vector<HeadGroup>& groups, bool backward) {
  const Kernels& all = choose_kernels();
  const AttentionKernels& k = s.type == Type::float32 ? all.in_float : all.in_bfloat16;
  const bool tiles = s.type == Type::bfloat16 && best_instruction_set() == InstructionSet::amx;
  const AmxKernels* amx = tiles ? amx_kernels() : nullptr;
  const int64_t work = static_cast<int64_t>(groups.size());
  const int64_t threads = std::min<int64_t>(work, minidisp::threads());
  if (work == 0 || s.T == 0) return;
  int64_t floats = (backward ? k.backward_floats : k.forward_floats)(s.T, s.D);
  if (amx != nullptr) floats = std::max(floats, (backward ? amx->backward_floats : amx->forward_floats)(s.T, s.D));
  const int64_t each = (floats + 15) / 16 * 16 + 48;  // 48: avoids powers of two
  const Memory memory((threads * each + 16) * static_cast<int64_t>(sizeof(float)));
  const uintptr_t start = (reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64;
  parallel_for(0, threads, 1, [&](int64_t t, int64_t stop) {
    for (; t < stop; ++t)
      for (int64_t w = t * work / threads; w < (t + 1) * work / threads; ++w) {
        float* own = reinterpret_cast<float*>(start) + t * each;
        if (amx != nullptr && (backward ? amx->backward : amx->forward)(groups[w], own)) continue;
        (backward ? k.backward : k.forward)(groups[w], own);
      }
  });
}

template <class T>
std::vector<HeadGroup> head_groups(const AttentionCall& s) {
  const int64_t heads = s.n_head / s.n_kv_head;
  std::vector<HeadGroup> groups;
  groups.reserve(s.B * s.n_kv_head);
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t h = 0; h < s.n_kv_head; ++h) {
      HeadGroup g{};
      g.tokens = s.T, g.width = s.D, g.heads = heads;
      g.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(s.D)));
      const int64_t q = h * heads * s.D, k = (s.n_head + h) * s.D, v = (s.n_head + s.n_kv_head + h) * s.D;
      const T* x = static_cast<const T*>(s.qkv) + b * s.qkv_stride[0];
      g.q = x + q, g.k = x + k, g.v = x + v, g.stride = s.qkv_stride[1];
      g.out = static_cast<T*>(s.out) + b * s.out_stride[0] + q, g.out_stride = s.out_stride[1];
      g.lse = s.lse + (b * s.n_head + h * heads) * s.T;
      if (s.grad != nullptr) {
        g.grad_out = static_cast<const T*>(s.grad_out) + b * s.out_stride[0] + q;
        T* y = static_cast<T*>(s.grad) + b * s.grad_stride[0];
        g.grad_q = y + q, g.grad_k = y + k, g.grad_v = y + v, g.grad_stride = s.grad_stride[1];
      }
      groups.push_back(g);
    }
  return groups;
}

}  // namespace

void attention(const AttentionCall& s) {
  const auto groups = s.type == Type::float32 ? head_groups<float>(s) : head_groups<BFloat16>(s);
  run(s, groups, s.grad != nullptr);
}

}  // namespace minidisp
