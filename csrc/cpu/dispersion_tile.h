// Vector code of the dispersion loss: products of small matrices, and the weights of a tile of pairs.
// Included by instruction_sets.h.

#include "vector_tile.h"

template <class V>
PAIR_INLINE V broadcast(float x) { return V{} + x; }

// The functions that dispersion_pair.h uses.
template <class V> PAIR_INLINE V lesser(V a, float b) { V w = broadcast<V>(b); return a < w ? a : w; }
template <class V> PAIR_INLINE V greater(V a, float b) { V w = broadcast<V>(b); return a > w ? a : w; }
template <class V> PAIR_INLINE V magnitude(V a) {
  using N = typename IntegerOf<V>::Type;
  return (V)((N)a & 0x7fffffff);
}
template <class V> PAIR_INLINE V choose(V sign, V negative, V positive) { return sign < 0.0f ? negative : positive; }
// 1 / sqrt(x), x > 0 and normal: an initial guess, then Newton steps, each of which doubles the number of correct
// digits.
template <class V> PAIR_INLINE V inverse_root(V x) {
#if defined(ROOT_GUESS)  // the processor's instruction, accurate to 14 (AVX-512) or 12 bits (AVX)
  constexpr int kSteps = VECTOR_BYTES == 64 ? 1 : 2;
  V y = ROOT_GUESS(x);
#else  // from the exponent, accurate to 3 %
  constexpr int kSteps = 3;
  using N = typename IntegerOf<V>::Type;
  V y = (V)(0x5f3759df - ((N)x >> 1));
#endif
  const V half = 0.5f * x;
  for (int step = 0; step < kSteps; ++step) y = y * (1.5f - half * y * y);
  return y;
}
// exp(x) for x <= 0, as 2^n exp(r) with |r| <= ln(2) / 2; x is at least -87.
template <class V> PAIR_INLINE V exponential(V x) {
  using N = typename IntegerOf<V>::Type;
  x = greater(x, -87.0f);
  V shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: leaves n, the nearest integer, in the last bits
  V n = shifted - 12582912.0f;
  V r = x - n * 0.693359375f + n * 2.12194440e-4f;
  V p = r * 1.98756915e-4f + 1.39819995e-3f;
  p = p * r + 8.33345192e-3f;
  p = p * r + 4.16657959e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  return p * (V)(((N)shifted << 23) + 0x3f800000);
}

#include "../dispersion_pair.h"

// C (m x n) = or += A (m x depth) B (depth x n), row-major; A is read transposed if kTransposed. n is a multiple of the
// lanes. upper: skips blocks entirely below the diagonal of C.
template <class T, bool kTransposed>
void multiply(int64_t m, int64_t n, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
              bool add, bool upper = false) {
  constexpr int W = lanes<T>();
  const int64_t groups = (m + ROWS - 1) / ROWS;  // of rows, of nearly equal size
  for (int64_t column = 0; column < n; column += kVectors * W) {
    const bool full = n - column >= kVectors * W;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t row = g * m / groups, rows = (g + 1) * m / groups - row;
      if (upper && row >= column + kVectors * W) break;
      const auto all = std::make_integer_sequence<int, ROWS>();
      const Block<T> block = full ? block_of<T, kVectors, kTransposed>(static_cast<int>(rows), all)
                                  : block_of<T, 1, kTransposed>(static_cast<int>(rows), all);
      block(kTransposed ? a + row : a + row * lda, lda, b + column, ldb, depth, c + row * ldc + column, ldc, add);
    }
  }
}

// out[k * ldo + i] = in[i * ldi + k] for i < n, k < depth; i is padded with zeros to a multiple of the lanes. Both are
// accessed for k up to the next multiple of the lanes after depth.
template <class T>
void transpose(const T* in, int64_t ldi, int64_t n, int64_t depth, T* out, int64_t ldo) {
  using V = typename VectorOf<T>::V;
  constexpr int W = lanes<T>();
  for (int64_t i = 0; i < n; i += W)
    for (int64_t k = 0; k < depth; k += W) {
      V r[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) r[l] = i + l < n ? load<V>(in + (i + l) * ldi + k) : V{};
      transpose_step<T, 1>(r);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) store(out + (k + l) * ldo + i, r[l]);
    }
}

// Replaces the products in a tile (m x n, row-major) by the weights of the pairs and returns the sum of their values,
// each pair once. A diagonal tile is computed above its diagonal and mirrored; the diagonal itself gets no weight.
// pair(x, i, j, &value, &weight) is called with one vector of products, those of row i and the columns from j on.
template <class T, class Pair>
double weigh(T* tile, int64_t ld, int64_t m, int64_t n, bool diagonal, bool need_grad, Pair pair) {
  using V = typename VectorOf<T>::V;
  using Mask = typename VectorOf<T>::Mask;
  constexpr int W = lanes<T>();
  Mask lane;
  for (int l = 0; l < W; ++l) lane[l] = l;
  V total{}, lost{};  // Kahan summation: rounding errors of thousands of equal values would add up
  for (int64_t i = 0; i < m; ++i) {
    V row{};
    for (int64_t j = diagonal ? i / W * W : 0; j < n; j += W) {
      V value, weight;
      pair(load<V>(tile + i * ld + j), i, j, &value, &weight);
      if (diagonal || j + W > n) {
        using Index = std::decay_t<decltype(lane[0])>;
        const Index first = static_cast<Index>(diagonal ? i - j : -1), stop = static_cast<Index>(n - j);
        const Mask wanted = (lane > first) & (lane < stop);
        value = wanted ? value : V{};
        weight = wanted ? weight : V{};
      }
      row += value;
      if (need_grad) store(tile + i * ld + j, weight);
    }
    row -= lost;
    const V sum = total + row;
    lost = (sum - total) - row;
    total = sum;
  }
  if (diagonal && need_grad)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < i; ++j) tile[i * ld + j] = tile[j * ld + i];
  return sum_lanes(total);
}

// The largest product of a pair.
inline float largest(const float* tile, int64_t ld, int64_t m, int64_t n, bool diagonal) {
  float most = -2;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = diagonal ? i + 1 : 0; j < n; ++j) most = std::max(most, tile[i * ld + j]);
  return most;
}

double weigh_cosines(const Options& o, double shift, float* tile, int64_t ld, int64_t m, int64_t n, bool diagonal,
                     bool need_grad) {
  const auto run = [&](auto pair) {
    return weigh<float>(tile, ld, m, n, diagonal, need_grad,
                        [&](F c, int64_t, int64_t, F* value, F* weight) PAIR_INLINE_LAMBDA { pair(c, value, weight); });
  };
  const float limit = static_cast<float>(1 - o.clamp);
  if (o.variant == Variant::angular_spread)
    return run(AngularSpread{limit, static_cast<float>(shift), static_cast<float>(1 / (kPi * o.tau))});
  if (o.variant == Variant::orthogonalization) return run(Orthogonalization{limit});
  return run(Decorrelation{});
}

// l2_repel: exp(-||z_i - z_j||^2 / tau) from the products and the squared norms of the tile's rows and columns.
double weigh_distances(double tau, const double* row_square, const double* column_square, double* tile, int64_t ld,
                       int64_t m, int64_t n, bool diagonal, bool need_grad) {
  return weigh<double>(tile, ld, m, n, diagonal, need_grad,
                       [&](D product, int64_t i, int64_t j, D* value, D* weight) PAIR_INLINE_LAMBDA {
                         const D x = (2 * product - row_square[i] - load<D>(column_square + j)) * (1 / tau);
                         const HalfF small = __builtin_convertvector(x > -100.0 ? x : D{} - 100.0, HalfF);
                         *value = *weight = __builtin_convertvector(exponential(lesser(small, 0.0f)), D);
                       });
}

// Computes a row of u from a row of z (possibly in place), padded with zeros to a multiple of the lanes: divided by
// length = norm + eps; for decorrelation, centred first, where a constant row becomes zeros. Returns NaN if the row has
// NaN or Inf, else 0.
float unit_row(const Options& o, const float* z, float* u, int64_t D_, float* norm, float* length) {
  constexpr int W = lanes<float>();
  const int64_t padded = (D_ + W - 1) / W * W;
  double eps = o.eps;
  F bad{}, squares{};
  if (o.variant == Variant::decorrelation) {
    F sum{}, most{}, rest{};
    for (int64_t d = 0; d < padded; d += W) {
      const F x = load<F>(z + d);
      bad += x * 0.0f;
      sum += x;
      most = magnitude(x) > most ? magnitude(x) : most;
    }
    const float mean = static_cast<float>(sum_lanes(sum) / static_cast<double>(D_));
    for (int64_t d = 0; d < padded; d += W) store(u + d, load<F>(z + d) - mean);
    for (int64_t d = D_; d < padded; ++d) u[d] = 0;
    for (int64_t d = 0; d < padded; d += W) {
      const F x = magnitude(load<F>(u + d));
      rest = x > rest ? x : rest;
    }
    float largest_before = 0, largest_after = 0;
    for (int l = 0; l < W; ++l) {
      largest_before = std::max(largest_before, most[l]);
      largest_after = std::max(largest_after, rest[l]);
    }
    if (largest_after <= 4 * std::numeric_limits<float>::epsilon() * largest_before) std::fill(u, u + padded, 0.0f);
    eps = 0;
    z = u;
  }
  for (int64_t d = 0; d < padded; d += W) squares += load<F>(z + d) * load<F>(z + d);
  const double square = sum_lanes(squares);
  if (!std::isfinite(square))
    for (int64_t d = 0; d < padded; d += W) bad += load<F>(z + d) * 0.0f;
  *norm = static_cast<float>(std::sqrt(square));
  *length = static_cast<float>(*norm + eps);
  if (*length == 0) *length = std::numeric_limits<float>::infinity();  // no direction, so no gradient
  const float inverse = 1 / *length;
  if (std::isnormal(inverse))  // multiplies, since dividing the whole row would cost more than all of the above
    for (int64_t d = 0; d < padded; d += W) store(u + d, load<F>(z + d) * inverse);
  else
    for (int64_t d = 0; d < padded; d += W) store(u + d, load<F>(z + d) / *length);
  return static_cast<float>(sum_lanes(bad));
}

// The gradient of a row of z from that of u, which is the sum of parts (padded like u) and, unless base is null,
// base - centre u: backpropagated through the division and the centring.
void gradient_row(const Options& o, float* const* parts, int n_parts, const float* base, float centre, const float* u,
                  int64_t D_, float norm, float length, float scale, float* out) {
  constexpr int W = lanes<float>();
  const int64_t padded = (D_ + W - 1) / W * W, whole = D_ / W * W;
  float* g = parts[0];
  for (int p = 1; p < n_parts; ++p)
    for (int64_t d = 0; d < padded; d += W) store(g + d, load<F>(g + d) + load<F>(parts[p] + d));
  if (base != nullptr)
    for (int64_t d = 0; d < padded; d += W)
      store(g + d, load<F>(g + d) + (load<F>(base + d) - load<F>(u + d) * centre));
  F dot{}, g_sum{}, u_sum{};
  for (int64_t d = 0; d < padded; d += W) {
    const F x = load<F>(g + d), y = load<F>(u + d);
    dot += x * y;
    g_sum += x;
    u_sum += y;
  }
  const float radial = norm == 0 ? 0.0f : static_cast<float>(sum_lanes(dot) * scale / norm);
  const float inverse = scale / length;
  float mean = 0;  // of the gradient of the centred row; the mean of u is not 0 if mostly rounding errors are left
  if (o.variant == Variant::decorrelation && norm != 0)
    mean = static_cast<float>((sum_lanes(g_sum) * inverse - sum_lanes(u_sum) * radial) / static_cast<double>(D_));
  for (int64_t d = 0; d < whole; d += W) store(out + d, load<F>(g + d) * inverse - load<F>(u + d) * radial - mean);
  for (int64_t d = whole; d < D_; ++d) out[d] = g[d] * inverse - u[d] * radial - mean;
}

const Kernels kernels = {
    multiply<float, false>, multiply<float, true>, multiply<double, false>, multiply<double, true>, transpose<float>,
    transpose<double>,      weigh_cosines,         weigh_distances,         largest,                unit_row,
    gradient_row};
