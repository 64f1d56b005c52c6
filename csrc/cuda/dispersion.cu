// The dispersion loss and its gradient on CUDA devices, sm_80 and later, in one pass over the pairs of tokens.
//
// As on the CPU, a sequence's loss is a sum over pairs of a function of S_ij = u_i.u_j with u_i = z_i / length_i
// (l2_repel: of the distance), whose derivative W_ij gives the gradient G = W U. Three phases, for as many sequences,
// or rows of a long one, as fit into a fixed workspace:
//   A  S and W
//   B  W U, a batched matrix product
//   C  in backward: G times the upstream gradient, backpropagated through the normalisation
//
// By tiles, on tensor cores: angular_spread, orthogonalization and decorrelation, unless torch's float32 matmul
// precision is "highest". 16 bits are too few for the u of nearly parallel tokens, which are mostly equal; but the
// pairs depend on the differences. With m the mean of u over the sequence, u' = u - m and a_i = u'_i.m,
//   S_ij = u'_i.u'_j + a_i + a_j + |m|^2        G_i = sum_j W_ij u'_j + (sum_j W_ij) m
// hold exactly, and only the products of u' are in float16, with float32 sums; everything else is float32. Each u'_i is
// stored times a power of two, so that none underflows. Rounding errors are then relative to the differences.
//   Tolerance: the error of the gradient is at most 2e-3 of its norm (measured: 3e-4 to 9e-4 for random tokens, 1e-5 to
//   1e-4 for nearly parallel ones), that of the loss 5e-4 (1 + |loss|) (measured: 1e-6 from 17 features on). If the
//   tokens form tight groups that are far apart, of spread s < 0.1, the error of the gradient may be 2e-4 / s of its
//   norm, which is small in this case. angular_spread multiplies the error of a cosine by 1 / tau: tau < 0.05 is
//   computed by blocks. The gradients of the other two suffer from cancellation, with an error of 2e-4 sqrt(T / C):
//   T > 64 C is computed by blocks.
//   Memory traffic per sequence: z is read from memory three times; x and W (2 T^2 bytes) are written and read once,
//   through the L2 cache of large devices, for which a group of sequences is small enough; W U is written and read
//   once, the gradient written once.
// By blocks, in exact float32 at any precision setting: the same three variants in all other cases. S is a cuBLAS
// product and W overwrites it, in blocks of at most 16 MB of rows I and columns J >= I; the gradient is computed from W
// and W^T.
// l2_repel, in exact float32: by tiles of 64 x 64 pairs, whose distances are sums of squared differences.
//
// The same input gives the same bits: sums over pairs are in double, one slot per tile or row, added in a fixed order;
// no atomics. Nothing synchronises with the device. Memory beyond the gradient: at most 112 MB, and a few numbers per
// token, for any B, T and C (l2_repel: more from T = 65,536 on). Without nvcc, this file is plain C++:
// tests/cuda_emulator.cpp runs it on the CPU.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "host.h"
#include "operators.h"

#if defined(__CUDACC__)
#include "device.h"
#endif

namespace minidisp::cuda {
namespace {

// The functions that dispersion_pair.h uses. rsqrtf and expf are accurate to 2 units in the last place, as on the CPU.
#define PAIR_INLINE __device__ __forceinline__
PAIR_INLINE float lesser(float a, float b) { return fminf(a, b); }
PAIR_INLINE float greater(float a, float b) { return fmaxf(a, b); }
PAIR_INLINE float magnitude(float a) { return fabsf(a); }
PAIR_INLINE float choose(float sign, float negative, float positive) { return sign < 0.0f ? negative : positive; }
PAIR_INLINE float inverse_root(float x) { return rsqrtf(x); }
PAIR_INLINE float exponential(float x) { return expf(x); }
#include "../dispersion_pair.h"

struct Largest {  // the cosine itself, to find the largest
  PAIR_INLINE void operator()(float c, float* value, float* weight) const { *value = c, *weight = 0; }
};

}  // namespace
}  // namespace minidisp::cuda

#include "dispersion_token.h"
#include "dispersion_tile.h"

namespace minidisp::cuda {
namespace {

__global__ void fill_numbers(double* to, int64_t size, double value) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n < size) to[n] = value;
}

// Kernels by blocks

// Writes rows of u, of the sequences from b on, from token i on: (sequences, rows, C), one warp per row.
template <class T>
__global__ void fill_rows(Tokens k, int64_t b, int64_t i, int64_t rows, int64_t all_rows, float* out) {
  const int64_t n = global_warp();
  if (n >= all_rows) return;
  b += n / rows;
  i += n % rows;
  const T* z = token<T>(k, b, i);
  const float mean = k.mean[b * k.T + i], length = k.length[b * k.T + i];
  for (int64_t d = lane(); d < k.C; d += 32)
    out[n * k.C + d] = (static_cast<float>(z[d * k.stride[2]]) - mean) / length;
}

__device__ __forceinline__ AngularSpread shifted(AngularSpread pair, double shift) {
  pair.shift = static_cast<float>(shift);
  return pair;
}
template <class Pair>
__device__ __forceinline__ Pair shifted(Pair pair, double) { return pair; }

// Replaces products by weights and adds the values of each row's pairs j > i to sums[b][i] (Largest: keeps the
// largest), one warp per row. s holds rows x columns products per sequence from b on, of tokens from i0 on with tokens
// from j0 on; pairs in the square of the rows themselves (j0 == i0) are stored twice, but summed once.
template <class Pair>
__global__ void weigh(Tokens k, Pair pair, const double* shift, int64_t b, int64_t i0, int64_t j0, int64_t rows,
                      int64_t columns, int64_t all_rows, bool need_grad, float* s, double* sums) {
  constexpr bool kFind = std::is_same_v<Pair, Largest>;
  const int64_t n = global_warp();
  if (n >= all_rows) return;
  b += n / rows;
  const int64_t i = i0 + n % rows;
  s += n * columns;
  pair = shifted(pair, shift[b]);
  double sum = kFind ? -2 : 0;
  for (int64_t c = lane(); c < columns; c += 32) {
    const int64_t j = j0 + c;
    float value, weight;
    pair(s[c], &value, &weight);
    if constexpr (kFind) sum = j != i && value > sum ? value : sum;
    else if (j > i) sum += value;
    if (!kFind && need_grad) s[c] = j == i ? 0 : weight;
  }
  sum = kFind ? warp_max(sum) : warp_sum(sum);
  if (lane() == 0) {
    double& slot = sums[b * k.T + i];
    slot = kFind ? fmax(slot, sum) : slot + sum;
  }
}

// Launchers

constexpr double kSmallestTau = 0.05;      // of angular_spread on tensor cores
constexpr int64_t kTokensPerFeature = 64;  // at most, of the other variants on tensor cores

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t blocks_for_warps(int64_t warps) { return divide_up(warps, kWarps); }

// z with its state: (centre, mean, norm, length, degree, scale), one after the other.
Tokens describe(const TokenVectors& z, float* state) {
  const auto [B, T, C] = z.size;
  const auto* stride = z.stride;
  const int64_t in_16_bytes = z.type == Type::float32 ? 4 : 8;
  Tokens k{z.data, {stride[0], stride[1], stride[2]}, T, C};
  k.packed = C % 8 == 0 && stride[2] == 1 && stride[0] % in_16_bytes == 0 && stride[1] % in_16_bytes == 0 &&
             reinterpret_cast<uintptr_t>(k.z) % 16 == 0;
  k.centre = state;
  k.mean = k.centre + B * C;
  k.norm = k.mean + B * T;
  k.length = k.norm + B * T;
  k.degree = k.length + B * T;
  k.scale = k.degree + B * T;
  return k;
}

Matrices matrices(float* data, int64_t n, int64_t rows, int64_t columns) {
  return {Type::float32, data, {n, rows, columns}, {rows * columns, columns, 1}};
}
Matrices matrices(__half* data, int64_t n, int64_t rows, int64_t columns) {
  return {Type::float16, data, {n, rows, columns}, {rows * columns, columns, 1}};
}

// One forward call. T: the type of z.
template <class T>
struct Call {
  const TokenVectors& z;
  const Options o;
  const bool need_grad, exact;
  const Workspace space;
  float *const product, *const state;
  const int64_t B = z.size[0], L = z.size[1], D = z.size[2];
  const bool by_distance = o.variant == Variant::l2_repel, centring = o.variant == Variant::decorrelation;
  const Tokens known = describe(z, state);

  // Runs f with the pair weights of the variant.
  template <class F>
  void with_pair(F f) const {
    const float limit = static_cast<float>(1 - o.clamp), shift = static_cast<float>(o.smallest_angle());
    if (o.variant == Variant::angular_spread) f(AngularSpread{limit, shift, static_cast<float>(1 / (kPi * o.tau))});
    else if (o.variant == Variant::orthogonalization) f(Orthogonalization{limit});
    else f(Decorrelation{});
  }

  struct Tiling {
    bool possible;
    int64_t tile, n, rows;  // sequences at once, rows of tiles at once
    double scale;           // of the weights as they are stored
  };

  Tiling tiling() const {
    Tiling t{};
    const int64_t number = by_distance ? sizeof(float) : sizeof(__half);
    t.tile = by_distance ? kSmallTile : kTile;
    // Keeps weights below 2^15 in float16: they are at most 1 / sin(smallest angle), times an inverse of at most 2.
    t.scale = by_distance ? 1 : centring ? 1 << 14 : (1 << 14) * std::sin(o.smallest_angle());
    const int64_t tiles = divide_up(L, t.tile), tile_bytes = t.tile * t.tile * number;
    t.n = need_grad ? space.tile_weights / (tiles * tiles * tile_bytes) : B;
    t.rows = t.n > 0 ? tiles : std::min(tiles, space.tile_weights / (2 * tiles * tile_bytes));
    t.n = std::clamp<int64_t>(t.n, 1, space.sequences);
    if (by_distance) t.rows = std::max<int64_t>(t.rows, 1);
    else t.n = std::min(t.n, space.tile_tokens / (L * width() * number));
    t.possible = t.n > 0 && t.rows > 0;
    if (t.possible) t.n = divide_up(B, divide_up(B, t.n));  // groups of about the same size
    return t;
  }
  int64_t width() const { return 8 * divide_up(D, 8); }  // of a row of x

  // Calls weigh(strip, upper, lower, first slot) and, if need_grad, apply(w, its first token, the other ones', add) on
  // both pieces of W, (g, rows, columns), for all strips of the g current sequences.
  template <class Weight, class Weigh, class Apply>
  void for_strips(const Tiling& t, int64_t g, Weight* upper, Weigh weigh, Apply apply) const {
    const int64_t tiles = divide_up(L, t.tile);
    int64_t first_slot = 0;
    for (Strip strip{0, 0, tiles}; strip.I0 < tiles; strip.I0 = strip.I1) {
      strip.I1 = std::min(tiles, strip.I0 + t.rows);
      const int64_t height = strip.height() * t.tile, width = strip.width() * t.tile;
      Weight* const lower = upper + (need_grad ? g * height * width : 0);
      weigh(strip, upper, lower, first_slot);
      first_slot += strip.size();
      if (!need_grad) continue;
      const int64_t i = strip.I0 * t.tile, m = std::min(height, L - i), beyond = L - i - m;
      apply(matrices(upper, g, height, width).narrow(1, 0, m).narrow(2, 0, L - i), i, i);
      if (beyond == 0) continue;
      apply(matrices(lower, g, width - height, height).narrow(1, 0, beyond).narrow(2, 0, m), i + m, i);
    }
  }
  int64_t weights_size(const Tiling& t) const {  // of both pieces of W
    const int64_t tiles = divide_up(L, t.tile), columns = t.rows == tiles ? tiles : 2 * tiles;
    return need_grad ? t.n * t.tile * t.tile * t.rows * columns : 0;
  }

  // Tensor cores. sums: (B, slots), slots: pairs of tiles.
  void by_tiles(const Tiling& t, double* sums, int64_t slots) const {
    const int64_t chunks = divide_up(L, kRows);
    const Array<__half> weights(weights_size(t)), x(t.n * L * width());
    const Array<float> degrees(weights_size(t) / kTile), inverse(t.n * L), offset(t.n * L);
    const Array<float> unit_sums(t.n * chunks * D), half_square(t.n);
    const Centred centred{x.data(), inverse.data(), offset.data(), L, width()};
    for (int64_t b = 0; b < B; b += t.n) {
      const int64_t g = std::min(t.n, B - b);
      launch(measure<T>, g * chunks, kThreads, 0, known, b, static_cast<int>(chunks), centring, centring ? 0.0 : o.eps,
             unit_sums.data());
      launch(find_centre, g, kThreads, 0, known, b, static_cast<int>(chunks),
             static_cast<const float*>(unit_sums.data()), half_square.data());
      launch(centre_tokens<T>, blocks_for_warps(g * L), kThreads, 0, known, b, g * L,
             static_cast<const float*>(half_square.data()), centred);
      const Matrices tokens = matrices(x.data(), g, L, width()).narrow(2, 0, D);
      const Matrices products = matrices(product, B, L, D).narrow(0, b, g);
      for_strips(
          t, g, weights.data(),
          [&](const Strip& strip, __half* upper, __half* lower, int64_t first_slot) {
            with_pair([&](auto pair) {
              launch(weigh_tiles<decltype(pair)>, g * strip.size(), kThreads, kTileBytes, centred, pair, strip,
                     static_cast<float>(t.scale), need_grad, upper, lower, degrees.data(),
                     sums + b * slots + first_slot, slots);
            });
            if (!need_grad) return;
            const int64_t rows = g * (L - strip.I0 * kTile);
            launch(add_degrees, divide_up(rows, kThreads), kThreads, 0, strip, L, rows,
                   static_cast<const float*>(degrees.data()), known.degree + b * L);
          },
          [&](const Matrices& w, int64_t i, int64_t j) {
            multiply(products.narrow(1, i, w.size[1]), w, tokens.narrow(1, j, w.size[2]), j > 0);
          });
    }
  }

  // l2_repel. sums: (B, slots), slots: pairs of tiles.
  void by_differences(const Tiling& t, double* sums, int64_t slots) const {
    const int64_t chunks = divide_up(L, kRows);
    const Array<float> weights(weights_size(t));
    launch(measure<T>, B * chunks, kThreads, 0, known, 0, static_cast<int>(chunks), false, 0.0, nullptr);
    for (int64_t b = 0; b < B; b += t.n) {
      const int64_t g = std::min(t.n, B - b);
      for_strips(
          t, g, weights.data(),
          [&](const Strip& strip, float* upper, float* lower, int64_t first_slot) {
            launch(weigh_distances<T>, g * strip.size(), kThreads, 0, known, b, 1 / o.tau, strip, need_grad, upper,
                   lower, sums + b * slots + first_slot, slots);
          },
          [&](const Matrices& w, int64_t i, int64_t j) {
            const int64_t blocks = g * divide_up(w.size[1], kSmallTile) * divide_up(D, kSmallTile);
            launch(add_differences<T>, blocks, kThreads, 0, known, b, i, w.size[1], j, w.size[2], j > 0,
                   static_cast<const float*>(w.data), w.stride[1], w.stride[0], product);
          });
    }
  }

  // Exact cosines. pair: of the variant, or Largest, and then without B. shift: (B,). sums: (B, T).
  template <class Pair>
  void by_blocks(Pair pair, const double* shift, double* sums) const {
    const bool weights_wanted = need_grad && !std::is_same_v<Pair, Largest>;
    const int64_t size = sizeof(float), most_columns = std::min(L, space.longest_row);
    const int64_t token_rows = std::max<int64_t>(2, space.tokens / (D * size));
    // A quarter, so that most of the lower triangle is skipped.
    const int64_t quarter = std::min(L, std::max<int64_t>(kTile, divide_up(L, 4)));
    const int64_t pairs = space.weights / size;
    // The buffer holds either all tokens of n sequences, or those of a block of rows and those of a block of columns.
    const bool resident = token_rows >= L;
    const int64_t most = std::min(B, space.sequences);
    const int64_t fit = std::min(token_rows / L, pairs / (most_columns * quarter));
    const int64_t n = resident ? std::clamp<int64_t>(fit, 1, most) : 1;
    const int64_t columns = resident ? most_columns : std::clamp<int64_t>(token_rows * 4 / 5, 1, most_columns);
    const int64_t rows = std::clamp<int64_t>(std::min(pairs / (n * columns), resident ? L : token_rows - columns), 1,
                                             std::min(quarter, columns));
    const Array<float> buffer(n * (resident ? L : columns + rows) * D), weights(n * rows * columns);

    for (int64_t b = 0; b < B; b += n) {
      const int64_t g = std::min(n, B - b);
      // Rows of u, (g, count, D), written to an offset of the buffer.
      const auto unit_rows = [&](int64_t offset, int64_t i, int64_t count) {
        float* const out = buffer.data() + offset;
        launch(fill_rows<T>, blocks_for_warps(g * count), kThreads, 0, known, b, i, count, g * count, out);
        return matrices(out, g, count, D);
      };
      const Matrices products = matrices(product, B, L, D).narrow(0, b, g);
      const auto apply = [&](int64_t i, const Matrices& w, const Matrices& u, bool add) {
        multiply(products.narrow(1, i, w.size[1]), w, u, add);
      };
      const Matrices all = resident ? unit_rows(0, 0, L) : Matrices{};
      for (int64_t i = 0; i < L; i += rows) {
        const int64_t m = std::min(rows, L - i);
        const Matrices here = resident ? all.narrow(1, i, m) : unit_rows(0, i, m);
        for (int64_t j = i; j < L; j += columns) {
          const int64_t count = std::min(columns, L - j);
          const Matrices there = resident ? all.narrow(1, j, count) : unit_rows(g * m * D, j, count);
          const Matrices s = matrices(weights.data(), g, m, count);
          multiply(s, here, there.mT(), false);
          launch(weigh<Pair>, blocks_for_warps(g * m), kThreads, 0, known, pair, shift, b, i, j, m, count, g * m,
                 weights_wanted, weights.data(), sums);
          if (!weights_wanted) continue;
          apply(i, s, there, i > 0 || j > i);
          const int64_t skip = j == i ? m : 0;  // the square of the rows themselves is already done
          if (skip < count) apply(j + skip, s.narrow(2, skip, count - skip).mT(), here, i > 0);
        }
      }
    }
  }

  static void fill(double* to, int64_t size, double value) {
    launch(fill_numbers, divide_up(size, kThreads), kThreads, 0, to, size, value);
  }

  void run(double* losses) const {
    const Tiling t = tiling();
    const bool rounds_too_much =
        o.variant == Variant::angular_spread ? o.tau < kSmallestTau : L > kTokensPerFeature * D;
    const bool on_tensor_cores = !exact && !by_distance && !rounds_too_much && t.possible;
    const int64_t slots = by_distance || on_tensor_cores ? block_pairs(divide_up(L, t.tile)) : L;
    const Array<double> shift(B), sums(B * slots);
    fill(shift.data(), B, o.smallest_angle());
    fill(sums.data(), B * slots, 0);
    if (by_distance) {
      fill_with_zeros(state, state_size(z) * sizeof(float));  // most of it is not used
      by_differences(t, sums.data(), slots);
    } else if (on_tensor_cores) {
      by_tiles(t, sums.data(), slots);
    } else {
      const int64_t chunks = divide_up(L, kRows);
      fill_with_zeros(state, state_size(z) * sizeof(float));  // U itself is multiplied, so centre and degree are 0
      launch(measure<T>, B * chunks, kThreads, 0, known, 0, static_cast<int>(chunks), centring,
             centring ? 0.0 : o.eps, nullptr);
      if (o.shift_must_be_found()) {
        const Array<double> most(B * L);
        fill(most.data(), B * L, -2);
        by_blocks(Largest{}, shift.data(), most.data());
        launch(find_shift, B, kThreads, 0, static_cast<const double*>(most.data()), L, o.clamp, shift.data());
      }
      with_pair([&](auto pair) { by_blocks(pair, shift.data(), sums.data()); });
    }
    launch(finish_sequence, B, kThreads, 0, known, o.variant, o.tau, on_tensor_cores ? t.scale : 1.0,
           static_cast<const double*>(sums.data()), slots, static_cast<const double*>(shift.data()),
           static_cast<double>(B), losses);
  }
};

// Runs f with the type of z.
template <class F>
void with_type(const TokenVectors& z, F f) {
  switch (z.type) {
    case Type::float32: return f(float());
    case Type::bfloat16: return f(__nv_bfloat16());
    case Type::float16: return f(__half());
  }
}

}  // namespace

int64_t state_size(const TokenVectors& z) {
  const auto [B, T, C] = z.size;
  return B * (C + 4 * T + 1);
}

void dispersion(const TokenVectors& z, const Options& options, bool need_grad, bool exact, const Workspace& space,
                float* product, float* state, double* losses) {
  with_type(z, [&](auto type) {
    Call<decltype(type)>{z, options, need_grad, exact, space, product, state}.run(losses);
  });
}

void dispersion_backward(const TokenVectors& z, Variant variant, const float* upstream, const float* product,
                         float* state, void* grad) {
  const auto [B, T, C] = z.size;
  const int64_t warps = B * T, numbers = warps * C;
  const Tokens k = describe(z, state);
  with_type(z, [&](auto type) {
    using U = decltype(type);
    if (variant == Variant::l2_repel)
      launch(finish_distances<U>, blocks_for_warps(warps), kThreads, 0, k, warps,
             static_cast<float>(0.2 / static_cast<double>(numbers)), upstream, product, static_cast<U*>(grad));
    else
      launch(finish_tokens<U>, blocks_for_warps(warps), kThreads, 0, k, warps, variant == Variant::decorrelation,
             upstream, product, static_cast<U*>(grad));
  });
}

}  // namespace minidisp::cuda
