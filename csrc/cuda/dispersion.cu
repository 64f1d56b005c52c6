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

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>

#include "../checks.h"
#include "../dispersion.h"

#if defined(__CUDACC__)
#include "device.h"
#endif

namespace minidisp {
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
}  // namespace minidisp

#include "dispersion_token.h"
#include "dispersion_tile.h"

namespace minidisp {
namespace {

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

struct Workspace {  // at most 112 MB in total
  int64_t tile_weights = 64 << 20, tile_tokens = 48 << 20;  // bytes, by tiles: W, x
  int64_t weights = 16 << 20, tokens = 36 << 20;            // bytes, by blocks: W, U
  int64_t longest_row = 8192;                               // of W, by blocks
  int64_t sequences = 65535;                                // per batch: guaranteed to work in cuBLAS
};

constexpr double kSmallestTau = 0.05;      // of angular_spread on tensor cores
constexpr int64_t kTokensPerFeature = 64;  // at most, of the other variants on tensor cores

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t blocks_for_warps(int64_t warps) { return divide_up(warps, kWarps); }
template <class T>
T* pointer(const at::Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }

// z with its state: (centre, mean, norm, length, degree, scale), one after the other, in float32.
int64_t state_size(int64_t B, int64_t T, int64_t C) { return B * (C + 4 * T + 1); }
Tokens describe(const at::Tensor& z, const at::Tensor& state) {
  const int64_t B = z.size(0), T = z.size(1), C = z.size(2), in_16_bytes = 16 / z.element_size();
  Tokens k{z.const_data_ptr(), {z.stride(0), z.stride(1), z.stride(2)}, T, C};
  k.packed = C % 8 == 0 && z.stride(2) == 1 && z.stride(0) % in_16_bytes == 0 && z.stride(1) % in_16_bytes == 0 &&
             reinterpret_cast<uintptr_t>(k.z) % 16 == 0;
  k.centre = pointer<float>(state);
  k.mean = k.centre + B * C;
  k.norm = k.mean + B * T;
  k.length = k.norm + B * T;
  k.degree = k.length + B * T;
  k.scale = k.degree + B * T;
  return k;
}

// One forward call. T: the type of z.
template <class T>
struct Call {
  const at::Tensor& z;
  const Options o;
  const bool need_grad, exact;
  const Workspace space;
  const at::Tensor state, product;
  const int64_t B = z.size(0), L = z.size(1), D = z.size(2);
  const bool by_distance = o.variant == Variant::l2_repel, centring = o.variant == Variant::decorrelation;
  const at::TensorOptions options = z.options();
  const Tokens known = describe(z, state);

  template <class U>
  at::Tensor empty(at::IntArrayRef sizes) const {
    return at::empty(sizes, options.dtype(c10::CppTypeToScalarType<U>::value));
  }

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
    const int64_t number = by_distance ? sizeof(float) : sizeof(c10::Half);
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
  void for_strips(const Tiling& t, int64_t g, const at::Tensor& weights, Weigh weigh, Apply apply) const {
    const int64_t tiles = divide_up(L, t.tile);
    int64_t first_slot = 0;
    for (Strip strip{0, 0, tiles}; strip.I0 < tiles; strip.I0 = strip.I1) {
      strip.I1 = std::min(tiles, strip.I0 + t.rows);
      const int64_t height = strip.height() * t.tile, width = strip.width() * t.tile;
      Weight* upper = need_grad ? pointer<Weight>(weights) : nullptr;
      weigh(strip, upper, need_grad ? upper + g * height * width : nullptr, first_slot);
      first_slot += strip.size();
      if (!need_grad) continue;
      const int64_t i = strip.I0 * t.tile, m = std::min(height, L - i), beyond = L - i - m;
      const at::Tensor w = weights.narrow(0, 0, g * height * width).view({g, height, width});
      apply(w.narrow(1, 0, m).narrow(2, 0, L - i), i, i);
      if (beyond == 0) continue;
      const at::Tensor v = weights.narrow(0, g * height * width, g * (width - height) * height);
      apply(v.view({g, width - height, height}).narrow(1, 0, beyond).narrow(2, 0, m), i + m, i);
    }
  }
  template <class Weight>
  at::Tensor tile_weights(const Tiling& t) const {
    const int64_t tiles = divide_up(L, t.tile), columns = t.rows == tiles ? tiles : 2 * tiles;
    return empty<Weight>({need_grad ? t.n * t.tile * t.tile * t.rows * columns : 0});
  }

  // Tensor cores. sums: (B, pairs of tiles).
  void by_tiles(const Tiling& t, const at::Tensor& sums) const {
    const int64_t tiles = divide_up(L, kTile), chunks = divide_up(L, kRows);
    const at::Tensor weights = tile_weights<c10::Half>(t);
    const at::Tensor degrees = empty<float>({weights.numel() / kTile});
    const at::Tensor x = empty<c10::Half>({t.n, L, width()});
    const at::Tensor inverse = empty<float>({t.n, L}), offset = empty<float>({t.n, L});
    const at::Tensor unit_sums = empty<float>({t.n * chunks, D}), half_square = empty<float>({t.n});
    const Centred centred{pointer<c10::Half>(x), pointer<float>(inverse), pointer<float>(offset), L, width()};
    for (int64_t b = 0; b < B; b += t.n) {
      const int64_t g = std::min(t.n, B - b);
      launch(measure<T>, g * chunks, kThreads, 0, known, b, static_cast<int>(chunks), centring, centring ? 0.0 : o.eps,
             pointer<float>(unit_sums));
      launch(find_centre, g, kThreads, 0, known, b, static_cast<int>(chunks),
             static_cast<const float*>(pointer<float>(unit_sums)), pointer<float>(half_square));
      launch(centre_tokens<T>, blocks_for_warps(g * L), kThreads, 0, known, b, g * L,
             static_cast<const float*>(pointer<float>(half_square)), centred);
      for_strips<c10::Half>(
          t, g, weights,
          [&](const Strip& strip, c10::Half* upper, c10::Half* lower, int64_t first_slot) {
            with_pair([&](auto pair) {
              launch(weigh_tiles<decltype(pair)>, g * strip.size(), kThreads, kTileBytes, centred, pair, strip,
                     static_cast<float>(t.scale), need_grad, upper, lower, pointer<float>(degrees),
                     pointer<double>(sums) + b * sums.size(1) + first_slot, sums.size(1));
            });
            if (!need_grad) return;
            const int64_t rows = g * (L - strip.I0 * kTile);
            launch(add_degrees, divide_up(rows, kThreads), kThreads, 0, strip, L, rows,
                   static_cast<const float*>(pointer<float>(degrees)), known.degree + b * L);
          },
          [&](const at::Tensor& w, int64_t i, int64_t j) {
            multiply(product.narrow(0, b, g).narrow(1, i, w.size(1)), w,
                     x.narrow(0, 0, g).narrow(1, j, w.size(2)).narrow(2, 0, D), j > 0);
          });
    }
  }

  // l2_repel. sums: (B, pairs of tiles).
  void by_differences(const Tiling& t, const at::Tensor& sums) const {
    const int64_t chunks = divide_up(L, kRows);
    const at::Tensor weights = tile_weights<float>(t);
    launch(measure<T>, B * chunks, kThreads, 0, known, 0, static_cast<int>(chunks), false, 0.0, nullptr);
    for (int64_t b = 0; b < B; b += t.n) {
      const int64_t g = std::min(t.n, B - b);
      for_strips<float>(
          t, g, weights,
          [&](const Strip& strip, float* upper, float* lower, int64_t first_slot) {
            launch(weigh_distances<T>, g * strip.size(), kThreads, 0, known, b, 1 / o.tau, strip, need_grad, upper,
                   lower, pointer<double>(sums) + b * sums.size(1) + first_slot, sums.size(1));
          },
          [&](const at::Tensor& w, int64_t i, int64_t j) {
            const int64_t blocks = g * divide_up(w.size(1), kSmallTile) * divide_up(D, kSmallTile);
            launch(add_differences<T>, blocks, kThreads, 0, known, b, i, w.size(1), j, w.size(2), j > 0,
                   static_cast<const float*>(pointer<float>(w)), w.stride(1), w.stride(0), pointer<float>(product));
          });
    }
  }

  // Exact cosines. pair: of the variant, or Largest, and then without B. shift: (B,). sums: (B, T).
  template <class Pair>
  void by_blocks(Pair pair, const at::Tensor& shift, const at::Tensor& sums) const {
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
    const at::Tensor buffer = empty<float>({n * (resident ? L : columns + rows) * D});
    const at::Tensor products = empty<float>({n * rows * columns});

    for (int64_t b = 0; b < B; b += n) {
      const int64_t g = std::min(n, B - b);
      const auto fill = [&](int64_t offset, int64_t i, int64_t count) {  // (g, count, D) at an offset of the buffer
        const at::Tensor out = buffer.narrow(0, offset, g * count * D).view({g, count, D});
        launch(fill_rows<T>, blocks_for_warps(g * count), kThreads, 0, known, b, i, count, g * count,
               pointer<float>(out));
        return out;
      };
      const auto apply = [&](int64_t i, const at::Tensor& w, const at::Tensor& u, bool add) {
        multiply(product.narrow(0, b, g).narrow(1, i, w.size(1)), w, u, add);
      };
      const at::Tensor all = resident ? fill(0, 0, L) : at::Tensor();
      for (int64_t i = 0; i < L; i += rows) {
        const int64_t m = std::min(rows, L - i);
        const at::Tensor here = resident ? all.narrow(1, i, m) : fill(0, i, m);
        for (int64_t j = i; j < L; j += columns) {
          const int64_t count = std::min(columns, L - j);
          const at::Tensor there = resident ? all.narrow(1, j, count) : fill(g * m * D, j, count);
          const at::Tensor s = products.narrow(0, 0, g * m * count).view({g, m, count});
          multiply(s, here, there.mT(), false);
          launch(weigh<Pair>, blocks_for_warps(g * m), kThreads, 0, known, pair,
                 static_cast<const double*>(pointer<double>(shift)), b, i, j, m, count, g * m, weights_wanted,
                 pointer<float>(s), pointer<double>(sums));
          if (!weights_wanted) continue;
          apply(i, s, there, i > 0 || j > i);
          const int64_t skip = j == i ? m : 0;  // the square of the rows themselves is already done
          if (skip < count) apply(j + skip, s.narrow(2, skip, count - skip).mT(), here, i > 0);
        }
      }
    }
  }

  at::Tensor run() const {
    const Tiling t = tiling();
    const bool rounds_too_much =
        o.variant == Variant::angular_spread ? o.tau < kSmallestTau : L > kTokensPerFeature * D;
    const bool on_tensor_cores = !exact && !by_distance && !rounds_too_much && t.possible;
    const int64_t slots = by_distance || on_tensor_cores ? block_pairs(divide_up(L, t.tile)) : L;
    const auto numbers = [&](at::IntArrayRef sizes, double value) {
      return at::full(sizes, value, options.dtype(at::kDouble));
    };
    const at::Tensor shift = numbers({B}, o.smallest_angle()), sums = numbers({B, slots}, 0);
    const at::Tensor losses = empty<double>({B});
    if (by_distance) {
      state.zero_();  // most of it is not used
      by_differences(t, sums);
    } else if (on_tensor_cores) {
      by_tiles(t, sums);
    } else {
      const int64_t chunks = divide_up(L, kRows);
      state.zero_();  // U itself is multiplied, so centre and degree are 0
      launch(measure<T>, B * chunks, kThreads, 0, known, 0, static_cast<int>(chunks), centring,
             centring ? 0.0 : o.eps, nullptr);
      if (o.shift_must_be_found()) {
        const at::Tensor most = numbers({B, L}, -2);
        by_blocks(Largest{}, shift, most);
        launch(find_shift, B, kThreads, 0, static_cast<const double*>(pointer<double>(most)), L, o.clamp,
               pointer<double>(shift));
      }
      with_pair([&](auto pair) { by_blocks(pair, shift, sums); });
    }
    launch(finish_sequence, B, kThreads, 0, known, o.variant, o.tau, on_tensor_cores ? t.scale : 1.0,
           static_cast<const double*>(pointer<double>(sums)), slots, static_cast<const double*>(pointer<double>(shift)),
           static_cast<double>(B), pointer<double>(losses));
    return losses.mean().to(at::kFloat);
  }
};

// Runs f with the type of z.
template <class F>
auto with_type(const at::Tensor& z, F f) {
  if (z.scalar_type() == at::kFloat) return f(float());
  if (z.scalar_type() == at::kBFloat16) return f(c10::BFloat16());
  return f(c10::Half());
}

// The loss, and for backward the product W U or W U', (B, T, C), and the state. exact: without tensor cores.
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_in(const at::Tensor& z, c10::string_view variant, double tau,
                                                          double clamp, double eps, bool need_grad, bool exact,
                                                          const Workspace& space) {
  const Options options = checked_options(z, variant, tau, clamp, eps);
  at::AutoDispatchBelowAutograd no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::NoTF32Guard no_tf32;
  const auto floats = z.options().dtype(at::kFloat);
  const at::Tensor product = at::empty(need_grad ? z.sizes() : at::IntArrayRef({0}), floats);
  const at::Tensor state = at::empty({state_size(z.size(0), z.size(1), z.size(2))}, floats);
  const at::Tensor loss = with_type(z, [&](auto type) {
    return Call<decltype(type)>{z, options, need_grad, exact, space, state, product}.run();
  });
  return {loss, product, need_grad ? state : at::empty({0}, floats)};
}

at::Tensor backward_in(const at::Tensor& upstream, const at::Tensor& z, const at::Tensor& product,
                       const at::Tensor& state, c10::string_view variant_name) {
  Variant variant;
  const int64_t B = z.size(0), T = z.size(1), C = z.size(2), warps = B * T;
  TORCH_CHECK_VALUE(parse_variant(std::string_view(variant_name.data(), variant_name.size()), &variant),
                    "minidisp::dispersion_backward does not know the variant ", variant_name);
  TORCH_CHECK_VALUE(upstream.numel() == 1 && upstream.scalar_type() == at::kFloat && product.sizes() == z.sizes() &&
                        state.dim() == 1 && state.numel() == state_size(B, T, C),
                    "minidisp::dispersion_backward takes the results of the forward call with this z");
  const at::Tensor grad = at::empty(z.sizes(), z.options());
  const Tokens k = describe(z, state);
  const float *const factor = pointer<float>(upstream), *const w = pointer<float>(product);
  with_type(z, [&](auto type) {
    using U = decltype(type);
    if (variant == Variant::l2_repel)
      launch(finish_distances<U>, blocks_for_warps(warps), kThreads, 0, k, warps,
             static_cast<float>(0.2 / static_cast<double>(warps * C)), factor, w, pointer<U>(grad));
    else
      launch(finish_tokens<U>, blocks_for_warps(warps), kThreads, 0, k, warps, variant == Variant::decorrelation,
             factor, w, pointer<U>(grad));
  });
  return grad;
}

#if defined(__CUDACC__)
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& z, c10::string_view variant, double tau,
                                                       double clamp, double eps, bool need_grad) {
  const c10::cuda::CUDAGuard guard(z.device());
  const bool exact = !allows_rounding([] { return at::globalContext().allowTF32CuBLAS(); });
  return forward_in(z, variant, tau, clamp, eps, need_grad, exact, Workspace());
}

at::Tensor backward(const at::Tensor& upstream, const at::Tensor& z, const at::Tensor& product, const at::Tensor& state,
                    c10::string_view variant) {
  const c10::cuda::CUDAGuard guard(z.device());
  return backward_in(upstream, z, product, state, variant);
}
#endif

}  // namespace
}  // namespace minidisp

#if defined(__CUDACC__)
TORCH_LIBRARY_IMPL(minidisp, CUDA, m) {
  m.impl("dispersion", minidisp::forward);
  m.impl("dispersion_backward", minidisp::backward);
}
#endif
