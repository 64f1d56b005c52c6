// The dispersion loss and its gradient on the CPU, in one pass over the pairs of tokens.
//
// A sequence's loss is a sum over pairs of a function of S_ij = u_i.u_j, u_i the unit vectors (l2_repel: of the distance).
// The tokens are cut into blocks of 128. For each pair of blocks I <= J:
//   S = U_I U_J^T             a tile of 128 x 128, a product of small matrices in registers
//   W = weight of each pair   in place of S, while the values are summed
//   G_I += W U_J,  G_J += W^T U_I
// Then G, divided by the sum and taken back through the normalisation, is the gradient: 3 L^2 D multiply-adds, no L x L matrix.
// Every tile is summed from zero before it is added, as a blocked product would. Sequences are dealt out to the threads; those
// that remain, or a single one, are shared pair of blocks by pair of blocks, with one G per thread, added up in a fixed order:
// for a given number of threads the result is always the same.
// l2_repel does all this in double, as differences of nearly equal tokens need it, on copies of small pieces of z.
// Memory beyond the gradient: per thread U and G, 2 L D floats (l2_repel: G in double), and tiles of half a megabyte.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "dispersion.h"

namespace minidisp {
namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kTileStride = kBlock + 16;  // off the powers of two, whose rows would fight for the same cache lines
constexpr int64_t kDepth = 256;               // of the pieces in which S is summed
constexpr int64_t kWideDepth = 128;           // the same in double
constexpr int64_t kPad = 16;                  // floats in the longest vector

// The vector code, one set per kind of processor.
struct Kernels {
  using Multiply = void (*)(int64_t, int64_t, int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, bool, bool);
  using WideMultiply =
      void (*)(int64_t, int64_t, int64_t, const double*, int64_t, const double*, int64_t, double*, int64_t, bool, bool);
  Multiply multiply, multiply_transposed;
  WideMultiply wide_multiply, wide_multiply_transposed;
  void (*transpose)(const float*, int64_t, int64_t, int64_t, float*, int64_t);
  void (*wide_transpose)(const double*, int64_t, int64_t, int64_t, double*, int64_t);
  double (*weigh_cosines)(const Options&, double, float*, int64_t, int64_t, int64_t, bool, bool);
  double (*weigh_distances)(double, const double*, const double*, double*, int64_t, int64_t, int64_t, bool, bool);
  float (*largest)(const float*, int64_t, int64_t, int64_t, bool);
  float (*unit_row)(const Options&, float*, int64_t, float*, float*);
  void (*gradient_row)(const Options&, float* const*, int, const float*, int64_t, float, float, float, float*);
};

#define PAIR_INLINE inline __attribute__((always_inline))
#define PAIR_INLINE_LAMBDA __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MINIDISP_X86_DISPATCH
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#define VECTOR_BYTES 64
#define ROWS 14
#define ROOT_GUESS(x) __builtin_ia32_rsqrt14ps512_mask(x, x, -1)
#include "dispersion_tile.h"
}  // namespace avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define VECTOR_BYTES 32
#define ROWS 6
#define ROOT_GUESS(x) __builtin_ia32_rsqrtps256(x)
#include "dispersion_tile.h"
}  // namespace avx2
#pragma GCC pop_options
#endif
namespace baseline {
#define VECTOR_BYTES 16
#if defined(__aarch64__)
#define ROWS 12
#else
#define ROWS 6
#endif
#include "dispersion_tile.h"
}  // namespace baseline

const Kernels& choose_kernels() {
#if defined(MINIDISP_X86_DISPATCH)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return avx512::kernels;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kernels;
#endif
  return baseline::kernels;
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// n features of a token, from feature d on, as float or double.
template <class From, class To>
void read_as(const void* z, int64_t offset, int64_t stride, int64_t n, To* out) {
  const From* p = static_cast<const From*>(z) + offset;
  if (stride == 1)
    for (int64_t d = 0; d < n; ++d) out[d] = static_cast<To>(static_cast<float>(p[d]));
  else
    for (int64_t d = 0; d < n; ++d) out[d] = static_cast<To>(static_cast<float>(p[d * stride]));
}

template <class To>
void read_token(const at::Tensor& z, int64_t b, int64_t i, int64_t d, int64_t n, To* out) {
  const int64_t offset = b * z.stride(0) + i * z.stride(1) + d * z.stride(2);
  if (z.scalar_type() == at::kFloat) read_as<float>(z.const_data_ptr(), offset, z.stride(2), n, out);
  else if (z.scalar_type() == at::kBFloat16) read_as<c10::BFloat16>(z.const_data_ptr(), offset, z.stride(2), n, out);
  else read_as<c10::Half>(z.const_data_ptr(), offset, z.stride(2), n, out);
}

// What one thread works with. Threads that share a sequence use the first one's u, norm and so on, and a G each.
struct Scratch {
  float *u, *norm, *length, *tile, *panel;                                               // by cosines
  float* g;
  double *wide_g, *mean, *square, *wide_tile, *wide_panel, *wide_rows, *wide_columns;    // by distances
  double sum, square_sum;
  float most, bad;
};

// One call: the sizes, and the phases through which a sequence goes.
struct Call {
  const at::Tensor& z;
  const Options o;
  const bool need_grad;
  float* const grad;
  const Kernels& k;
  const int64_t B = z.size(0), L = z.size(1), D = z.size(2);
  const bool by_distance = o.variant == Variant::l2_repel;
  const int64_t width = round_up(by_distance ? D + 1 : D, kPad);  // by distances, column D counts: the sum of the weights
  const int64_t stride = width % 64 == 0 ? width + kPad : width;

  int64_t scratch_bytes() const {
    const int64_t rows = round_up(L, kPad);
    if (by_distance)
      return 8 * ((need_grad ? L * stride : 0) + round_up(D, kPad) + rows + kBlock * kTileStride +
                  kWideDepth * kTileStride + 2 * kBlock * (kWideDepth + kPad));
    return 4 * ((need_grad ? 2 : 1) * L * stride + 2 * rows + kBlock * kTileStride + kDepth * kTileStride);
  }

  Scratch lay_out(char* memory) const {
    Scratch s{};
    const int64_t rows = round_up(L, kPad);
    if (by_distance) {
      double* p = reinterpret_cast<double*>(memory);
      const auto take = [&](int64_t n) { return std::exchange(p, p + n); };
      s.wide_tile = take(kBlock * kTileStride);
      s.wide_panel = take(kWideDepth * kTileStride);
      s.wide_rows = take(kBlock * (kWideDepth + kPad));
      s.wide_columns = take(kBlock * (kWideDepth + kPad));
      s.mean = take(round_up(D, kPad));
      s.square = take(rows);
      s.wide_g = p;
    } else {
      float* p = reinterpret_cast<float*>(memory);
      const auto take = [&](int64_t n) { return std::exchange(p, p + n); };
      s.tile = take(kBlock * kTileStride);
      s.panel = take(kDepth * kTileStride);
      s.norm = take(rows);
      s.length = take(rows);
      s.u = take(L * stride);
      s.g = p;
    }
    return s;
  }

  // Phase 1, by distances only: the mean token.
  void find_mean(Scratch& s, int64_t b) const {
    std::fill(s.mean, s.mean + D, 0.0);
    for (int64_t i = 0; i < L; ++i)
      for (int64_t d = 0; d < D; d += kWideDepth) {
        const int64_t n = std::min(kWideDepth, D - d);
        read_token(z, b, i, d, n, s.wide_rows);
        for (int64_t e = 0; e < n; ++e) s.mean[d + e] += s.wide_rows[e];
      }
    for (int64_t d = 0; d < D; ++d) s.mean[d] /= static_cast<double>(L);
  }

  // Phase 2: unit vectors, or squared norms, of the tokens from i to stop. first owns them, s remembers what else is learnt.
  void prepare(Scratch& s, const Scratch& first, int64_t b, int64_t i, int64_t stop) const {
    s.bad = 0;
    s.square_sum = 0;
    for (; i < stop; ++i) {
      if (!by_distance) {
        float* u = first.u + i * stride;
        read_token(z, b, i, 0, D, u);
        std::fill(u + D, u + width, 0.0f);
        s.bad += k.unit_row(o, u, D, first.norm + i, first.length + i);
        continue;
      }
      double square = 0;
      for (int64_t d = 0; d < D; d += kWideDepth) {
        const int64_t n = std::min(kWideDepth, D - d);
        read_token(z, b, i, d, n, s.wide_rows);
        for (int64_t e = 0; e < n; ++e) {
          const double x = s.wide_rows[e], centred = x - first.mean[d + e];
          s.square_sum += x * x;
          square += centred * centred;
        }
      }
      first.square[i] = square;
      s.bad += static_cast<float>(square * 0);
    }
  }

  // Rows of z as double, centred, with ones in column D and zeros beyond: features d to d + n of the tokens from i on.
  void read_centred(const Scratch& first, int64_t b, int64_t i, int64_t rows, int64_t d, int64_t n, double* out) const {
    for (int64_t r = 0; r < rows; ++r, out += kWideDepth + kPad) {
      const int64_t real = std::min(n, D - d);
      if (real > 0) read_token(z, b, i + r, d, real, out);
      for (int64_t e = 0; e < real; ++e) out[e] -= first.mean[d + e];
      for (int64_t e = std::max<int64_t>(real, 0); e < n; ++e) out[e] = d + e == D ? 1.0 : 0.0;
    }
  }

  // S of the blocks that begin at tokens i and j and have m and n of them.
  void products(Scratch& s, const Scratch& first, int64_t b, int64_t i, int64_t j, int64_t m, int64_t n) const {
    const bool diagonal = i == j;
    if (by_distance) {
      constexpr int64_t ld = kWideDepth + kPad;
      const int64_t padded = round_up(D, kPad);
      for (int64_t d = 0; d < padded; d += kWideDepth) {
        const int64_t depth = std::min(kWideDepth, padded - d);
        read_centred(first, b, i, m, d, depth, s.wide_rows);
        if (!diagonal) read_centred(first, b, j, n, d, depth, s.wide_columns);
        k.wide_transpose(diagonal ? s.wide_rows : s.wide_columns, ld, n, depth, s.wide_panel, kTileStride);
        // Column D, the ones, takes no part in the products.
        k.wide_multiply(m, round_up(n, kPad), std::min(depth, D - d), s.wide_rows, ld, s.wide_panel, kTileStride,
                        s.wide_tile, kTileStride, d > 0, diagonal);
      }
    } else {
      for (int64_t d = 0; d < width; d += kDepth) {
        const int64_t depth = std::min(kDepth, width - d);
        k.transpose(first.u + j * stride + d, stride, n, depth, s.panel, kTileStride);
        k.multiply(m, round_up(n, kPad), depth, first.u + i * stride + d, stride, s.panel, kTileStride, s.tile,
                   kTileStride, d > 0, diagonal);
      }
    }
  }

  // Phases 3 and 4: all that is done with part of the pairs of blocks: find the largest cosine, or sum values and weights.
  template <class Function>
  void for_pairs(int64_t block, int64_t part, int64_t parts, Function function) const {
    for (int64_t number = part; number < block_pairs((L + block - 1) / block); number += parts) {
      int64_t I, J;
      block_pair(number, &I, &J);
      const int64_t i = I * block, j = J * block;
      function(i, j, std::min(block, L - i), std::min(block, L - j));
    }
  }

  void find_largest(Scratch& s, const Scratch& first, int64_t b, int64_t block, int64_t part, int64_t parts) const {
    s.most = -2;
    for_pairs(block, part, parts, [&](int64_t i, int64_t j, int64_t m, int64_t n) {
      products(s, first, b, i, j, m, n);
      s.most = std::max(s.most, k.largest(s.tile, kTileStride, m, n, i == j));
    });
  }

  void sum_pairs(Scratch& s, const Scratch& first, int64_t b, double shift, int64_t block, int64_t part,
                 int64_t parts) const {
    s.sum = 0;
    if (need_grad && by_distance) std::fill(s.wide_g, s.wide_g + L * stride, 0.0);
    if (need_grad && !by_distance) std::fill(s.g, s.g + L * stride, 0.0f);
    for_pairs(block, part, parts, [&](int64_t i, int64_t j, int64_t m, int64_t n) {
      const bool diagonal = i == j;
      products(s, first, b, i, j, m, n);
      if (by_distance) {
        s.sum += k.weigh_distances(o.tau, first.square + i, first.square + j, s.wide_tile, kTileStride, m, n, diagonal,
                                   need_grad);
        if (!need_grad) return;
        constexpr int64_t ld = kWideDepth + kPad;
        for (int64_t d = 0; d < width; d += kWideDepth) {
          const int64_t depth = std::min(kWideDepth, width - d);
          read_centred(first, b, j, n, d, depth, s.wide_columns);
          k.wide_multiply(m, depth, n, s.wide_tile, kTileStride, s.wide_columns, ld, s.wide_g + i * stride + d, stride,
                          true, false);
          if (diagonal) continue;
          read_centred(first, b, i, m, d, depth, s.wide_rows);
          k.wide_multiply_transposed(n, depth, m, s.wide_tile, kTileStride, s.wide_rows, ld, s.wide_g + j * stride + d,
                                     stride, true, false);
        }
      } else {
        s.sum += k.weigh_cosines(o, shift, s.tile, kTileStride, m, n, diagonal, need_grad);
        if (!need_grad) return;
        k.multiply(m, width, n, s.tile, kTileStride, first.u + j * stride, stride, s.g + i * stride, stride, true, false);
        if (diagonal) return;
        k.multiply_transposed(n, width, m, s.tile, kTileStride, first.u + i * stride, stride, s.g + j * stride, stride,
                              true, false);
      }
    });
  }

  // Phase 5: the gradient of the tokens from i to stop, from everybody's G. sum is over the pairs i < j.
  void finish(Scratch* all, int64_t n, int64_t b, double sum, int64_t i, int64_t stop) const {
    const double tokens = static_cast<double>(L), pairs = tokens * (tokens - 1), batch = static_cast<double>(B);
    std::vector<float*> parts(n);
    for (; i < stop; ++i) {
      float* out = grad + (b * L + i) * D;
      if (by_distance) {
        double* g = all[0].wide_g + i * stride;
        for (int64_t t = 1; t < n; ++t)
          for (int64_t d = 0; d <= D; ++d) g[d] += all[t].wide_g[i * stride + d];
        const double scale = 4 / (o.tau * (2 * sum + tokens) * batch);
        const double pull = 0.2 / (batch * tokens * static_cast<double>(D));
        read_token(z, b, i, 0, D, out);
        for (int64_t d = 0; d < D; ++d) {
          const double x = out[d];
          out[d] = static_cast<float>(scale * (g[d] - g[D] * (x - all[0].mean[d])) + pull * x);
        }
      } else {
        double scale = 2 / (kPi * o.tau * 2 * sum);
        if (o.variant == Variant::orthogonalization) scale = 4 / (kPi * pairs);
        if (o.variant == Variant::decorrelation) scale = 4 / pairs;
        for (int64_t t = 0; t < n; ++t) parts[t] = all[t].g + i * stride;
        k.gradient_row(o, parts.data(), static_cast<int>(n), all[0].u + i * stride, D, all[0].norm[i], all[0].length[i],
                       static_cast<float>(scale / batch), out);
      }
    }
  }

  double loss(double sum, double square_sum, double shift) const {
    const double tokens = static_cast<double>(L), pairs = tokens * (tokens - 1);
    if (o.variant == Variant::angular_spread) return std::log(2 * sum / pairs) - shift / (kPi * o.tau);
    if (by_distance)
      return std::log((2 * sum + tokens) / (tokens * tokens)) + 0.1 * square_sum / (tokens * static_cast<double>(D));
    return 2 * sum / pairs;
  }

  // A whole sequence by n threads, each with a Scratch; split(f) runs f(t) for every t < n.
  template <class Split>
  double sequence(Scratch* all, int64_t n, int64_t b, Split split) const {
    const int64_t block = n > 1 && L < 4 * kBlock ? kBlock / 2 : kBlock;  // smaller ones are easier to share
    if (by_distance) find_mean(all[0], b);
    split([&](int64_t t) { prepare(all[t], all[0], b, t * L / n, (t + 1) * L / n); });
    double bad = 0, sum = 0, square_sum = 0, shift = o.smallest_angle();
    for (int64_t t = 0; t < n; ++t) bad += all[t].bad, square_sum += all[t].square_sum;
    if (bad != 0 || std::isnan(bad)) {
      if (need_grad) std::fill(grad + b * L * D, grad + (b + 1) * L * D, std::numeric_limits<float>::quiet_NaN());
      return std::numeric_limits<double>::quiet_NaN();
    }
    if (o.shift_must_be_found()) {
      split([&](int64_t t) { find_largest(all[t], all[0], b, block, t, n); });
      double most = o.clamp - 1;
      for (int64_t t = 0; t < n; ++t) most = std::max(most, static_cast<double>(all[t].most));
      shift = std::acos(std::min(most, 1 - o.clamp));
    }
    split([&](int64_t t) { sum_pairs(all[t], all[0], b, shift, block, t, n); });
    for (int64_t t = 0; t < n; ++t) sum += all[t].sum;
    if (need_grad) split([&](int64_t t) { finish(all, n, b, sum, t * L / n, (t + 1) * L / n); });
    return loss(sum, square_sum, shift);
  }
};

std::tuple<at::Tensor, at::Tensor> dispersion(const at::Tensor& z, c10::string_view variant, double tau, double clamp,
                                              double eps, bool need_grad) {
  const Options options = checked_options(z, variant, tau, clamp, eps);
  at::Tensor grad = at::empty(need_grad ? z.sizes() : at::IntArrayRef({0}), z.options().dtype(at::kFloat));
  static const Kernels& kernels = choose_kernels();
  const Call call{z, options, need_grad, need_grad ? grad.mutable_data_ptr<float>() : nullptr, kernels};

  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t bytes = round_up(call.scratch_bytes(), 64) + 192;  // 192: off the powers of two, again
  const at::Tensor memory = at::empty({threads * bytes + 64}, z.options().dtype(at::kByte));
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory.data_ptr()) % 64);
  char* start = static_cast<char*>(memory.data_ptr()) + (misaligned ? 64 - misaligned : 0);
  std::vector<Scratch> all(threads);
  for (int64_t t = 0; t < threads; ++t) all[t] = call.lay_out(start + t * bytes);

  const auto split = [&](const auto& function) {
    at::parallel_for(0, threads, 1, [&](int64_t t, int64_t stop) {
      for (; t < stop; ++t) function(t);
    });
  };
  const auto alone = [](const auto& function) { function(0); };
  const int64_t dealt = call.B / threads * threads;
  std::vector<double> losses(call.B);
  if (dealt > 0)
    split([&](int64_t t) {
      for (int64_t b = t; b < dealt; b += threads) losses[b] = call.sequence(&all[t], 1, b, alone);
    });
  for (int64_t b = dealt; b < call.B; ++b) losses[b] = call.sequence(all.data(), threads, b, split);

  double loss = 0;
  for (double x : losses) loss += x;
  return {at::full({}, loss / static_cast<double>(call.B), z.options().dtype(at::kFloat)), grad};
}

}  // namespace
}  // namespace minidisp

TORCH_LIBRARY_IMPL(minidisp, CPU, m) { m.impl("dispersion", minidisp::dispersion); }
