// Vector code of causal attention, computed in float. Included by instruction_sets.h.
//
// Forward: 32 queries are in the vector lanes and keys in the rows of the tiles (S^T = K Q^T, O^T = V^T P^T), so that
// the maximum and the sum over the keys need no reduction over lanes. Keys are processed in blocks of 256, with a
// running maximum.
// Backward: blocks of 128 queries, again in the lanes, times blocks of 64 keys; P is recomputed from the log-sum-exp:
//   dP^T = V dO^T,  dS^T = P^T (dP^T - sum(O dO)),  dV += P^T dO,  dK += dS^T Q,  dQ += dS K.
// Products skip masked pairs, except for about half a vector times half a register block per row.

#include "vector_tile.h"

constexpr int64_t kPanel = 32;   // queries side by side in a transposed block
constexpr int64_t kKeys = 256;   // forward, in a tile
constexpr int64_t kRowQueries = 128, kColumnKeys = 64;  // backward
constexpr int64_t kTileStride = kRowQueries + 16;       // no power of two, to avoid cache conflicts between rows

// 2^x for x <= 0 or slightly above, to a unit in the last place; NaN stays NaN; the result is at least 2^-126.
PAIR_INLINE F power_of_two(F x) {
  const F least = F{} - 126.0f;
  x = x < least ? least : x;
  const F shifted = x + 12582912.0f;  // 1.5 * 2^23: leaves the nearest integer in the last bits
  const F r = x - (shifted - 12582912.0f);
  F p = r * 1.52723049e-4f + 1.34104793e-3f;
  p = p * r + 9.61877499e-3f;
  p = p * r + 5.55029362e-2f;
  p = p * r + 2.40226448e-1f;
  p = p * r + 6.93147242e-1f;
  p = p * r + 1.0f;
  return p * (F)(((I)shifted << 23) + 0x3f800000);
}
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
// log(x) for normal x >= 1: two steps of Halley's method on 2^y = x, each of which triples the number of correct
// digits, from an initial guess with an error of 0.09.
PAIR_INLINE F logarithm(F x) {
  F y = __builtin_convertvector((I)x - 0x3f800000, F) * 1.1920929e-7f;
  for (int step = 0; step < 2; ++step) {
    const F t = x * power_of_two(-y);
    y += (t - 1.0f) / (t + 1.0f) * (2 * kLog2E);
  }
  return y * kLn2;
}

// Prefetches all cache lines of some rows, to be read or written: they are too far apart for the hardware prefetcher.
template <int kWrite, class T>
PAIR_INLINE void fetch(const T* row, int64_t stride, int64_t rows, int64_t width) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < rows; ++i, row += stride)
    for (int64_t d = 0; d < width; d += line) __builtin_prefetch(row + d, kWrite);
}

struct Range {
  int64_t begin, end;
};

// C (m x n) = or += A (m x depth) B (depth x n); A is read transposed if kTransposed, n is a multiple of the lanes.
// range(row, rows, column) returns the part of the depth to sum over, for the rows from row on and the vector at
// column; if it is empty, nothing is written. Ranges of neighbouring vectors have the same start, and the second does
// not end before the first.
template <bool kTransposed, class Function>
void product(int64_t m, int64_t n, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
             bool add, Function range) {
  constexpr auto all = std::make_integer_sequence<int, ROWS>();
  const int64_t groups = (m + ROWS - 1) / ROWS;  // of rows, of nearly equal size
  for (int64_t column = 0; column < n; column += 2 * W)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t row = g * m / groups, rows = (g + 1) * m / groups - row;
      const auto run = [&](auto vectors, int64_t at, Range k, bool add_here) {
        if (k.begin >= k.end) return;
        block_of<float, decltype(vectors)::value, kTransposed>(static_cast<int>(rows), all)(
            kTransposed ? a + k.begin * lda + row : a + row * lda + k.begin, lda, b + k.begin * ldb + at, ldb,
            k.end - k.begin, c + row * ldc + at, ldc, add_here);
      };
      const Range first = range(row, rows, column);
      if (column + W >= n) {
        run(std::integral_constant<int, 1>(), column, first, add);
        continue;
      }
      const Range second = range(row, rows, column + W);
      run(std::integral_constant<int, 2>(), column, first, add);
      run(std::integral_constant<int, 1>(), column + W, {std::max(first.end, second.begin), second.end},
          add || first.begin < first.end);
    }
}

// Copies rows as floats, padded with zeros to whole vectors.
template <class T>
void copy_rows(const T* in, int64_t stride, int64_t count, int64_t width, float* out) {
  const int64_t padded = (width + W - 1) / W * W;
  fetch<0>(in, stride, count, width);
  for (int64_t i = 0; i < count; ++i, in += stride, out += padded)
    for_vectors(width, [&](int64_t d, auto part) PAIR_INLINE_LAMBDA { store(out + d, read(in + d, part)); });
}

bool all_finite(const float* x, int64_t count) {  // count: a multiple of the lanes
  F bad[2] = {};
  for (int64_t i = 0; i < count; i += W) bad[i / W % 2] += load<F>(x + i) * 0.0f;
  return sum_lanes(bad[0] + bad[1]) == 0;
}

// Transposes rows into panels of 32, out[panel][d][i], padded with zeros to whole panels; unless rows is null, also
// copies them as copy_rows does.
template <class T>
void transpose_rows(const T* in, int64_t stride, int64_t count, int64_t width, float* out, float* rows) {
  const int64_t padded = (width + W - 1) / W * W;
  fetch<0>(in, stride, count, width);
  for (int64_t i = 0; i < (count + kPanel - 1) / kPanel * kPanel; i += W, in += W * stride)
    for_vectors(width, [&](int64_t d, auto part) PAIR_INLINE_LAMBDA {
      F r[W];
      if (i + W <= count) {
#pragma GCC unroll 16
        for (int64_t l = 0; l < W; ++l) r[l] = read(in + l * stride + d, part);
      } else {
        for (int64_t l = 0; l < W; ++l) r[l] = i + l < count ? read(in + l * stride + d, part) : F{};
      }
      if (rows != nullptr)  // W rows at a time, for which the memory is large enough
#pragma GCC unroll 16
        for (int64_t l = 0; l < W; ++l) store(rows + (i + l) * padded + d, r[l]);
      transpose_step<float, 1>(r);
      float* p = out + i / kPanel * (kPanel * padded) + d * kPanel + i % kPanel;
#pragma GCC unroll 16
      for (int64_t l = 0; l < W; ++l) store(p + l * kPanel, r[l]);
    });
}

template <class T>
void write_rows(const float* in, int64_t count, int64_t width, float scale, T* out, int64_t stride) {
  const int64_t padded = (width + W - 1) / W * W;
  for (int64_t i = 0; i < count; ++i, in += padded, out += stride)
    for_vectors(width,
                [&](int64_t d, auto part) PAIR_INLINE_LAMBDA { write(out + d, load<F>(in + d) * scale, part); });
}

int64_t forward_floats(int64_t tokens, int64_t width) {
  const int64_t padded = (width + W - 1) / W * W;
  return 2 * tokens * padded + 2 * kPanel * padded + kKeys * kPanel;
}

// The running softmax of a block of queries: per query, the maximum and the sum over the keys so far.
struct Softmax {
  F most[kPanel / W], sum[kPanel / W];
};

// Turns the scores in column c of a tile (end keys from key on, queries from query on) into exp(scale (score -
// maximum)). Returns the factor by which earlier sums must be multiplied.
PAIR_INLINE F exponentials(Softmax& s, int64_t c, float* tile, int64_t key, int64_t end, int64_t query, float scale) {
  I lane;
  for (int l = 0; l < W; ++l) lane[l] = l;
  lane += static_cast<int32_t>(query - key);                          // the last key that each lane attends to
  const int64_t whole = std::clamp<int64_t>(query - key + 1, 0, end);  // keys that all of them attend to
  const F none = F{} - std::numeric_limits<float>::infinity();
  F most[4] = {s.most[c], none, none, none}, sum[4] = {};
  int64_t j = 0;
  for (; j + 4 <= whole; j += 4)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      const F x = load<F>(tile + (j + u) * kPanel);
      most[u] = x > most[u] ? x : most[u];
    }
  for (; j < end; ++j) {
    F x = load<F>(tile + j * kPanel);
    x = lane >= static_cast<int32_t>(j) ? x : none;
    most[0] = x > most[0] ? x : most[0];
  }
  for (int u = 1; u < 4; ++u) most[0] = most[u] > most[0] ? most[u] : most[0];
  const F factor = power_of_two((s.most[c] - most[0]) * (scale * kLog2E));
  for (j = 0; j + 4 <= whole; j += 4)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      const F p = power_of_two((load<F>(tile + (j + u) * kPanel) - most[0]) * (scale * kLog2E));
      sum[u] += p;
      store(tile + (j + u) * kPanel, p);
    }
  for (; j < end; ++j) {
    F p = power_of_two((load<F>(tile + j * kPanel) - most[0]) * (scale * kLog2E));
    p = lane >= static_cast<int32_t>(j) ? p : F{};
    sum[0] += p;
    store(tile + j * kPanel, p);
  }
  s.most[c] = most[0];
  s.sum[c] = s.sum[c] * factor + ((sum[0] + sum[1]) + (sum[2] + sum[3]));
  return factor;
}

// The output of count queries of head h from token i on. qt, ot: one panel each; tile: kKeys x kPanel.
template <class T>
void forward_block(const HeadGroup& g, int64_t h, int64_t i, int64_t count, const float* k, const float* v, float* qt,
                   float* ot, float* tile) {
  const int64_t D = g.width, padded = (D + W - 1) / W * W;
  T* out = static_cast<T*>(g.out) + h * D + i * g.out_stride;
  fetch<1>(out, g.out_stride, count, D);
  transpose_rows(static_cast<const T*>(g.q) + h * D + i * g.stride, g.stride, count, D, qt, nullptr);
  Softmax s;
  for (int64_t c = 0; c < kPanel / W; ++c) s.most[c] = F{} - std::numeric_limits<float>::infinity(), s.sum[c] = F{};
  for (int64_t j = 0; j < i + count; j += kKeys) {
    const int64_t keys = std::min(kKeys, i + count - j);
    // How many of these keys the vector of queries at column attends to.
    const auto seen = [&](int64_t column) {
      return column < count ? std::clamp<int64_t>(i + std::min(column + W, count) - j, 0, keys) : 0;
    };
    product<false>(keys, kPanel, k + j * padded, padded, qt, kPanel, tile, kPanel, false,
                   [&](int64_t row, int64_t, int64_t column) { return Range{0, row < seen(column) ? D : 0}; });
    for (int64_t c = 0; c < kPanel / W; ++c) {
      if (seen(c * W) == 0) continue;
      const F factor = exponentials(s, c, tile + c * W, j, seen(c * W), i + c * W, g.scale);
      if (j > 0)
        for (int64_t d = 0; d < D; ++d)
          store(ot + d * kPanel + c * W, load<F>(ot + d * kPanel + c * W) * factor);
    }
    product<true>(D, kPanel, v + j * padded, padded, tile, kPanel, ot, kPanel, j > 0,
                  [&](int64_t, int64_t, int64_t column) { return Range{0, seen(column)}; });
  }
  for (int64_t c = 0; c * W < count; ++c) {
    const F inverse = 1.0f / s.sum[c];
    const int64_t valid = std::min(W, count - c * W);
    for_vectors(D, [&](int64_t d, auto part) PAIR_INLINE_LAMBDA {
      F r[W];
#pragma GCC unroll 16
      for (int64_t l = 0; l < W; ++l) r[l] = load<F>(ot + (d + l) * kPanel + c * W) * inverse;
      transpose_step<float, 1>(r);
      T* row = out + c * W * g.out_stride + d;
      if (valid == W) {
#pragma GCC unroll 16
        for (int64_t l = 0; l < W; ++l) write(row + l * g.out_stride, r[l], part);
      } else {
        for (int64_t l = 0; l < valid; ++l) write(row + l * g.out_stride, r[l], part);
      }
    });
    write(g.lse + h * g.tokens + i + c * W, s.most[c] * g.scale + logarithm(s.sum[c]), valid);
  }
}

template <class T>
void forward(const HeadGroup& g, float* memory) {
  const int64_t n = g.tokens, D = g.width, padded = (D + W - 1) / W * W;
  float *k = memory, *v = k + n * padded, *qt = v + n * padded, *ot = qt + kPanel * padded;
  float* tile = ot + kPanel * padded;
  for (int64_t h = 0; h < g.heads; ++h)
    for (int64_t i = 0; i < n; i += kPanel) {
      const int64_t count = std::min(kPanel, n - i);
      if (h == 0) {
        copy_rows(static_cast<const T*>(g.k) + i * g.stride, g.stride, count, D, k + i * padded);
        copy_rows(static_cast<const T*>(g.v) + i * g.stride, g.stride, count, D, v + i * padded);
      }
      // 0 * Inf is NaN: the mask alone would not hide NaN or Inf in a value from earlier queries.
      const int64_t block = all_finite(v + i * padded, count * padded) ? count : 1;
      for (int64_t first = i; first < i + count; first += block)
        forward_block<T>(g, h, first, block, k, v, qt, ot, tile);
    }
}

int64_t backward_floats(int64_t tokens, int64_t width) {
  const int64_t padded = (width + W - 1) / W * W;
  return 4 * tokens * padded + 5 * kRowQueries * padded + 2 * kColumnKeys * kTileStride + 2 * kRowQueries;
}

// sum(O dO) per query. Rows beyond count get 0.
template <class T>
void sum_products(const T* out, int64_t stride, const float* grad, int64_t count, int64_t width, float* delta) {
  const int64_t padded = (width + W - 1) / W * W;
  for (int64_t i = 0; i < kRowQueries; i += W) {
    F r[W] = {};
    for (int64_t l = 0; l < W && i + l < count; ++l)
      for_vectors(width, [&](int64_t d, auto part) PAIR_INLINE_LAMBDA {
        r[l] += read(out + (i + l) * stride + d, part) * load<F>(grad + (i + l) * padded + d);
      });
    transpose_step<float, 1>(r);
    F sum{};
    for (int64_t l = 0; l < W; ++l) sum += r[l];
    store(delta + i, sum);
  }
}

// Turns the scores (in p) and dP (in ds) of a tile into P and dS: rows are keys from key on, columns queries from query
// on.
void weigh(float* p, float* ds, int64_t keys, int64_t queries, int64_t key, int64_t query, float scale,
           const float* lse, const float* delta) {
  I lane;
  for (int l = 0; l < W; ++l) lane[l] = l;
  for (int64_t j = 0; j < keys; ++j, p += kTileStride, ds += kTileStride)
    for (int64_t i = 0; i < queries; i += W) {
      const int64_t first = key + j - query - i;  // the first lane that attends to the key
      F weight{}, slope{};
      if (first < W) {
        weight = power_of_two((load<F>(p + i) * scale - load<F>(lse + i)) * kLog2E);
        slope = weight * (load<F>(ds + i) - load<F>(delta + i));
        if (first > 0) {
          weight = lane >= static_cast<int32_t>(first) ? weight : F{};
          slope = lane >= static_cast<int32_t>(first) ? slope : F{};
        }
      }
      store(p + i, weight);
      store(ds + i, slope);
    }
}

template <class T>
void backward(const HeadGroup& g, float* memory) {
  const int64_t n = g.tokens, D = g.width, padded = (D + W - 1) / W * W, rows = kRowQueries * padded;
  float *k = memory, *v = k + n * padded, *dk = v + n * padded, *dv = dk + n * padded;
  float *qt = dv + n * padded, *gt = qt + rows, *q = gt + rows, *go = q + rows, *dq = go + rows;
  float *p = dq + rows, *ds = p + kColumnKeys * kTileStride, *lse = ds + kColumnKeys * kTileStride;
  float* delta = lse + kRowQueries;
  T *grad_k = static_cast<T*>(g.grad_k), *grad_v = static_cast<T*>(g.grad_v);
  for (int64_t h = 0; h < g.heads; ++h)
    for (int64_t i = 0; i < n; i += kRowQueries) {
      const int64_t count = std::min(kRowQueries, n - i);
      const int64_t at = h * D + i * g.stride, out_at = h * D + i * g.out_stride;
      T* grad_q = static_cast<T*>(g.grad_q) + h * D + i * g.grad_stride;
      if (h == 0) {
        copy_rows(static_cast<const T*>(g.k) + i * g.stride, g.stride, count, D, k + i * padded);
        copy_rows(static_cast<const T*>(g.v) + i * g.stride, g.stride, count, D, v + i * padded);
      }
      fetch<1>(grad_q, g.grad_stride, count, D);
      fetch<1>(grad_k + i * g.grad_stride, g.grad_stride, count, D);
      fetch<1>(grad_v + i * g.grad_stride, g.grad_stride, count, D);
      transpose_rows(static_cast<const T*>(g.q) + at, g.stride, count, D, qt, q);
      transpose_rows(static_cast<const T*>(g.grad_out) + out_at, g.out_stride, count, D, gt, go);
      sum_products(static_cast<const T*>(g.out) + out_at, g.out_stride, go, count, D, delta);
      std::copy_n(g.lse + h * n + i, count, lse);
      std::fill(lse + count, lse + kRowQueries, 0.0f);
      for (int64_t j = 0; j < i + count; j += kColumnKeys) {
        const int64_t keys = std::min(kColumnKeys, i + count - j);
        const int64_t shift = j - i;          // query c attends to key r if r + shift <= c
        const bool fresh = h == 0 && j >= i;  // nothing has been written to dk and dv yet
        for (int64_t panel = 0; panel < count; panel += kPanel) {
          const auto seen = [&](int64_t row, int64_t, int64_t column) {
            return Range{0, row + shift < panel + column + W ? D : 0};
          };
          product<false>(keys, kPanel, k + j * padded, padded, qt + panel * padded, kPanel, p + panel, kTileStride,
                         false, seen);
          product<false>(keys, kPanel, v + j * padded, padded, gt + panel * padded, kPanel, ds + panel, kTileStride,
                         false, seen);
        }
        weigh(p, ds, keys, count, j, i, g.scale, lse, delta);
        const auto from = [&](int64_t row, int64_t, int64_t) {
          return Range{std::max<int64_t>(0, row + shift), count};
        };
        product<false>(keys, padded, p, kTileStride, go, padded, dv + j * padded, padded, !fresh, from);
        product<false>(keys, padded, ds, kTileStride, q, padded, dk + j * padded, padded, !fresh, from);
        product<true>(count, padded, ds, kTileStride, k + j * padded, padded, dq, padded, j > 0,
                      [&](int64_t row, int64_t rows, int64_t) { return Range{0, std::min(keys, row + rows - shift)}; });
      }
      write_rows(dq, count, D, g.scale, grad_q, g.grad_stride);
    }
  write_rows(dk, n, D, g.scale, grad_k, g.grad_stride);
  write_rows(dv, n, D, 1.0f, grad_v, g.grad_stride);
}

const Kernels kernels = {{forward<float>, backward<float>, forward_floats, backward_floats},
                         {forward<BFloat16>, backward<BFloat16>, forward_floats, backward_floats}};
