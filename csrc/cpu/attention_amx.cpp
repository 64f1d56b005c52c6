// Causal attention in bfloat16 on AMX tiles: products of bfloat16, sums in float; P and dS are rounded to bfloat16.
//
// All matrices are first laid out in tiles of 1 KiB (amx_tile.h describes A, B and C), then multiplied in blocks of
// 32 x 32. As in attention_tile.h, queries are in the vector lanes:
//   forward   S^T = K Q^T,  O^T = V^T P^T                                       32 queries times blocks of 512 keys
//   backward  dP^T = V dO^T,  dV += P^T dO,  dK += dS^T Q,  dQ^T += K^T dS^T    128 queries times blocks of 128 keys
// If the system does not permit AMX, or a value is NaN or Inf, attention_tile.h computes the group instead.

#include "attention.h"

#include "amx_tile.h"

#if defined(MINIDISP_AMX)

#include <algorithm>
#include <cmath>
#include <cstring>

MINIDISP_AMX_BEGIN

namespace minidisp {
namespace {

constexpr int64_t kBlock = 32;       // queries or keys
constexpr int64_t kKeys = 512;       // forward, per update of the running maximum
constexpr int64_t kSide = 4;         // backward, blocks per side of a square of scores
constexpr float kLog2E = 1.44269504f;

// Rows of a head, read 32 features at a time, padded with zeros beyond its width and its last token.
struct Rows {
  const Bits* first;
  int64_t stride, count, width;
  __m512i at(int64_t i, int64_t d) const {
    if (i >= count) return _mm512_setzero_si512();
    const int64_t left = width - d;
    return _mm512_maskz_loadu_epi16(left >= 32 ? 0xffffffffu : (1u << left) - 1, first + i * stride + d);
  }
  void fetch() const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < width; d += 32) _mm_prefetch(first + i * stride + d, _MM_HINT_T0);
  }
};

// Layouts of 32 tokens; depth: padded width / 32.
// A(token, feature): [token / 16][feature / 32].
void token_rows(const Rows& in, int64_t depth, Bits* out) {
  for (int64_t i = 0; i < kBlock; ++i)
    for (int64_t s = 0; s < depth; ++s)
      _mm512_store_si512(out + (i / 16 * depth + s) * kTile + i % 16 * 32, in.at(i, s * 32));
}
bool all_finite(const Rows& in) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 bad = 0;
  for (int64_t i = 0; i < in.count; ++i)
    for (int64_t d = 0; d < in.width; d += 32)
      bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(in.at(i, d), exponent), exponent);
  return bad == 0;
}
// B(feature, token), features in pairs: [token / 16][feature / 32]; and/or
// A(feature, token): [feature / 16], one tile of 32 tokens each, step apart.
template <bool kColumns, bool kRows>
void features_deep(const Rows& in, int64_t depth, Bits* columns, Bits* rows, int64_t step) {
  for (int64_t i = 0; i < kBlock; i += 16)
    for (int64_t s = 0; s < depth; ++s) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int64_t l = 0; l < 16; ++l) r[l] = in.at(i + l, s * 32);
      transpose16(r);
      if (kColumns)
#pragma GCC unroll 16
        for (int64_t l = 0; l < 16; ++l) _mm512_store_si512(columns + (i / 16 * depth + s) * kTile + l * 32, r[l]);
      if (kRows)
#pragma GCC unroll 16
        for (int64_t l = 0; l < 16; ++l) {
          Bits* p = rows + (2 * s + l / 8) * step + l % 8 * 64 + i;
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r[l]));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), _mm512_cvtepi32_epi16(_mm512_srli_epi32(r[l], 16)));
        }
    }
}
// B(token, feature), tokens in pairs: [feature / 16].
void tokens_deep(const Rows& in, int64_t depth, Bits* out) {
  for (int64_t i = 0; i < kBlock; i += 2)
    for (int64_t s = 0; s < depth; ++s) {
      const __m512i a = in.at(i, s * 32), b = in.at(i + 1, s * 32);
      const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(a));
      const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(a, 1));
      const __m512i low_b = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(b));
      const __m512i high_b = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(b, 1));
      _mm512_store_si512(out + 2 * s * kTile + i * 16, _mm512_or_si512(low, _mm512_slli_epi32(low_b, 16)));
      _mm512_store_si512(out + (2 * s + 1) * kTile + i * 16, _mm512_or_si512(high, _mm512_slli_epi32(high_b, 16)));
    }
}

// 2^x for x <= 0 or slightly above, with an error of 3e-6, far below that of rounding to bfloat16.
inline __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  // in this order NaN stays NaN
  const __m512 magic = _mm512_set1_ps(12582912.0f), shifted = _mm512_add_ps(x, magic);
  const __m512 r = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(9.58538242e-3f), r, _mm512_set1_ps(5.59066273e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4024038e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93124175e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  // Adds the integer part to the exponent. For NaN, the lower bits of shifted are 0, so nothing is added.
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
}
// log2(x) for normal x >= 1, as in attention_tile.h.
inline __m512 binary_logarithm(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  __m512 y = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_castps_si512(x), _mm512_castps_si512(one)));
  y = _mm512_mul_ps(y, _mm512_set1_ps(1.1920929e-7f));
  for (int step = 0; step < 2; ++step) {
    const __m512 t = _mm512_mul_ps(x, power_of_two(_mm512_sub_ps(_mm512_setzero_ps(), y)));
    const __m512 change = _mm512_div_ps(_mm512_sub_ps(t, one), _mm512_add_ps(t, one));
    y = _mm512_fmadd_ps(change, _mm512_set1_ps(2 * kLog2E), y);
  }
  return y;
}

inline __mmask16 sees(int64_t key, int64_t query) {  // which of 16 queries from query on attend to the key
  const int64_t first = std::clamp<int64_t>(key - query, 0, 16);
  return static_cast<__mmask16>(0xffffu << first);
}

// Writes C(feature, query) of 32 queries, tiles [feature / 16][query / 16], times factor[query / 16], to head rows.
void write_columns(const float* c, int64_t count, int64_t width, const __m512 factor[2], Bits* out, int64_t stride) {
  for (int64_t h = 0; h < 2; ++h)
    for (int64_t d = 0; d < width; d += 32) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int64_t l = 0; l < 16; ++l) {
        const float* p = c + (d / 16 + l / 8) * kTile + h * 256 + l % 8 * 32;
        r[l] = pairs(_mm512_mul_ps(factor[h], _mm512_load_ps(p)), _mm512_mul_ps(factor[h], _mm512_load_ps(p + 16)));
      }
      transpose16(r);
      const __mmask32 part = width - d >= 32 ? 0xffffffffu : (1u << (width - d)) - 1;
      for (int64_t l = 0; l < 16 && h * 16 + l < count; ++l)
        _mm512_mask_storeu_epi16(out + (h * 16 + l) * stride + d, part, r[l]);
    }
}

// Writes C(key, feature) of 32 keys, tiles [feature / 32][key / 16][feature / 16 % 2], times factor, to rows of a head.
void write_rows(const float* c, int64_t count, int64_t width, float factor, Bits* out, int64_t stride) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < width; d += 32) {
      const float* p = c + d * 32 + i / 16 * 512 + i % 16 * 16;
      const __m512 low = _mm512_mul_ps(f, _mm512_load_ps(p)), high = _mm512_mul_ps(f, _mm512_load_ps(p + 256));
      const __m512bh x = _mm512_cvtne2ps_pbh(high, low);
      const __mmask32 part = width - d >= 32 ? 0xffffffffu : (1u << (width - d)) - 1;
      _mm512_mask_storeu_epi16(out + i * stride + d, part, (__m512i)x);
    }
}

inline Rows rows_of(const void* base, int64_t offset, int64_t stride, int64_t i, const HeadGroup& g) {
  return {static_cast<const Bits*>(base) + offset + i * stride, stride, std::min(kBlock, g.tokens - i), g.width};
}
inline void fetch_to_write(Bits* out, int64_t stride, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < width; d += 32) __builtin_prefetch(out + i * stride + d, 1);
}
int64_t forward_floats(int64_t tokens, int64_t width) {
  const int64_t n = up(tokens, kBlock), D = up(width, 32);
  return n * D + kBlock * D / 2 + kBlock * D + kKeys * kBlock + kKeys * kBlock / 2;  // K and V, Q^T, O^T, S^T, P^T
}

// Turns the scores of 32 keys from key on and 32 queries from query on into exp(scale score - most), in pairs of keys.
inline void exponentials(const float* s, int64_t key, int64_t query, float scale, const __m512 most[2], __m512 sum[2],
                         Bits* p) {
  const __m512 factor = _mm512_set1_ps(scale * kLog2E);
  const bool diagonal = key == query;
  for (int64_t h = 0; h < 2; ++h) {
    __m512 total[2] = {};
#pragma GCC unroll 4
    for (int64_t r = 0; r < kBlock; r += 2) {
      const float* row = s + r / 16 * 512 + h * 256 + r % 16 * 16;
      __m512 even = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(row), factor, most[h]));
      __m512 odd = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(row + 16), factor, most[h]));
      if (diagonal) {
        even = _mm512_maskz_mov_ps(sees(r, h * 16), even);
        odd = _mm512_maskz_mov_ps(sees(r + 1, h * 16), odd);
      }
      total[0] = _mm512_add_ps(total[0], even);
      total[1] = _mm512_add_ps(total[1], odd);
      _mm512_store_si512(p + h * kTile + r * 16, pairs(even, odd));
    }
    sum[h] = _mm512_add_ps(sum[h], _mm512_add_ps(total[0], total[1]));
  }
}

void forward_block(const HeadGroup& g, int64_t h, int64_t i, const Bits* k, const Bits* v, Bits* qt, float* ot,
                   float* s, Bits* p) {
  const int64_t depth = up(g.width, 32) / 32, n = up(g.tokens, kBlock), count = std::min(kBlock, g.tokens - i);
  Bits* out = static_cast<Bits*>(g.out) + h * g.width + i * g.out_stride;
  fetch_to_write(out, g.out_stride, count, g.width);
  features_deep<true, false>(rows_of(g.q, h * g.width, g.stride, i, g), depth, qt, nullptr, 0);
  const __m512 factor = _mm512_set1_ps(g.scale * kLog2E), none = _mm512_set1_ps(-INFINITY);
  __m512 most[2] = {none, none}, sum[2] = {};
  for (int64_t j = 0; j <= i; j += kKeys) {
    const int64_t stop = std::min(i + kBlock, j + kKeys);
    __m512 now[2] = {none, none};
    for (int64_t b = j; b < stop; b += kBlock) {
      float* c = s + (b - j) * kBlock;
      multiply_block(k + b / 16 * depth * kTile, depth * kTile, qt, kTile, depth * kTile, depth, c, 512, false);
      __m512 apart[8] = {none, none, none, none, none, none, none, none};  // [r % 4][half], to hide latency
      const auto maxima = [&](auto seen) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int64_t r = 0; r < kBlock; ++r)
#pragma GCC unroll 2
          for (int64_t half = 0; half < 2; ++half) {
            __m512& most_here = apart[r % 4 * 2 + half];
            const float* x = c + r / 16 * 512 + half * 256 + r % 16 * 16;
            most_here = _mm512_mask_max_ps(most_here, seen(r, half * 16), most_here, _mm512_load_ps(x));
          }
      };
      if (b == i) maxima(sees);
      else maxima([](int64_t, int64_t) __attribute__((always_inline)) { return static_cast<__mmask16>(0xffff); });
      for (int64_t u = 0; u < 8; ++u) now[u % 2] = _mm512_max_ps(now[u % 2], apart[u]);
    }
    for (int64_t half = 0; half < 2; ++half) {
      const __m512 larger = _mm512_max_ps(most[half], _mm512_mul_ps(now[half], factor));
      const __m512 less = j > 0 ? power_of_two(_mm512_sub_ps(most[half], larger)) : _mm512_set1_ps(1.0f);
      most[half] = larger;
      sum[half] = _mm512_mul_ps(sum[half], less);
      if (j > 0)
        for (int64_t d = 0; d < depth * 32; ++d) {
          float* x = ot + d / 16 * 512 + half * 256 + d % 16 * 16;
          _mm512_store_ps(x, _mm512_mul_ps(_mm512_load_ps(x), less));
        }
    }
    for (int64_t b = j; b < stop; b += kBlock)
      exponentials(s + (b - j) * kBlock, b, i, g.scale, most, sum, p + (b - j) * kBlock);
    asm volatile("" ::: "memory");
    for (int64_t d = 0; d < depth; ++d)
      multiply_block(v + (2 * d * (n / kBlock) + j / kBlock) * kTile, n / kBlock * kTile, p, 2 * kTile, kTile,
                     (stop - j) / kBlock, ot + d * 1024, 512, j > 0);
  }
  const __m512 one = _mm512_set1_ps(1.0f), inverse[2] = {_mm512_div_ps(one, sum[0]), _mm512_div_ps(one, sum[1])};
  write_columns(ot, count, g.width, inverse, out, g.out_stride);
  for (int64_t half = 0; half < 2 && half * 16 < count; ++half)
    _mm512_mask_storeu_ps(
        g.lse + h * g.tokens + i + half * 16, first_of(count - half * 16),
        _mm512_mul_ps(_mm512_add_ps(most[half], binary_logarithm(sum[half])), _mm512_set1_ps(1 / kLog2E)));
}

bool forward(const HeadGroup& g, float* memory) {
  const int64_t n = up(g.tokens, kBlock), D = up(g.width, 32), depth = D / 32;
  Bits *k = reinterpret_cast<Bits*>(memory), *v = k + n * D, *qt = v + n * D, *p = qt + kBlock * D;
  float *ot = reinterpret_cast<float*>(p + kKeys * kBlock), *s = ot + kBlock * D;
  const Tiles tiles;
  for (int64_t h = 0; h < g.heads; ++h)
    for (int64_t i = 0; i < g.tokens; i += kBlock) {
      if (h == 0) {
        const Rows values = rows_of(g.v, 0, g.stride, i, g), keys = rows_of(g.k, 0, g.stride, i, g);
        keys.fetch(), values.fetch();
        if (!all_finite(values)) return false;  // 0 * Inf is NaN: attention_tile.h handles this
        token_rows(keys, depth, k + i * D);
        features_deep<false, true>(values, depth, nullptr, v + i / kBlock * kTile, n / kBlock * kTile);
      }
      forward_block(g, h, i, k, v, qt, ot, s, p);
    }
  return true;
}

int64_t backward_floats(int64_t tokens, int64_t width) {
  const int64_t n = up(tokens, kBlock * kSide), D = up(width, 32), side = kBlock * kSide;
  return n * D * 3 / 2 + 2 * n * D + 2 * side * D + side * D + 3 * side * side / 2 + 2048 + 2 * side;
}

// Turns S^T (s) and dP^T (dp) of 32 keys and 32 queries into P^T and dS^T: as rows (A) in p and ds, and dS^T also in
// pairs of keys (B).
inline void weigh(const float* s, const float* dp, bool diagonal, float scale, const float* lse, const float* delta,
                  Bits* p, Bits* ds, int64_t down, Bits* ds_pairs) {
  const __m512 factor = _mm512_set1_ps(scale * kLog2E);
#pragma GCC unroll 2
  for (int64_t r = 0; r < kBlock; r += 2) {
    __m512 weight[2][2], slope[2][2];  // [row][half]
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; ++half) {
      const __m512 l = _mm512_load_ps(lse + half * 16), e = _mm512_load_ps(delta + half * 16);
#pragma GCC unroll 2
      for (int64_t u = 0; u < 2; ++u) {
        const int64_t at = (r + u) / 16 * 512 + half * 256 + (r + u) % 16 * 16;
        __m512 w = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(s + at), factor, l));
        __m512 x = _mm512_mul_ps(w, _mm512_sub_ps(_mm512_load_ps(dp + at), e));
        if (diagonal) {
          w = _mm512_maskz_mov_ps(sees(r + u, half * 16), w);
          x = _mm512_maskz_mov_ps(sees(r + u, half * 16), x);
        }
        weight[u][half] = w;
        slope[u][half] = x;
      }
      _mm512_store_si512(ds_pairs + half * kTile + r * 16, pairs(slope[0][half], slope[1][half]));
    }
#pragma GCC unroll 2
    for (int64_t u = 0; u < 2; ++u) {
      const int64_t at = (r + u) / 16 * down + (r + u) % 16 * 32;
      _mm512_store_si512(p + at, (__m512i)_mm512_cvtne2ps_pbh(weight[u][1], weight[u][0]));
      _mm512_store_si512(ds + at, (__m512i)_mm512_cvtne2ps_pbh(slope[u][1], slope[u][0]));
    }
  }
}

// sum(O dO) of a row.
inline float sum_products(const Bits* x, const Bits* y, int64_t width) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t d = 0; d < width; d += 32) {
    const __mmask32 part = width - d >= 32 ? 0xffffffffu : (1u << (width - d)) - 1;
    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(part, x + d),
                           (__m512bh)_mm512_maskz_loadu_epi16(part, y + d));
  }
  return _mm512_reduce_add_ps(sum);
}

bool backward(const HeadGroup& g, float* memory) {
  constexpr int64_t side = kBlock * kSide;
  const int64_t n = up(g.tokens, side), D = up(g.width, 32), depth = D / 32, blocks = n / kBlock;
  // Of all keys: K and V as rows, and K^T. Of a block of queries: Q^T and dO^T, Q and dO in pairs of tokens; P^T, dS^T,
  // and dS^T in pairs of keys.
  Bits *k = reinterpret_cast<Bits*>(memory), *v = k + n * D, *kt = v + n * D, *qt = kt + n * D, *gt = qt + side * D;
  Bits *q = gt + side * D, *go = q + side * D, *p = go + side * D, *ds = p + side * side, *ds_pairs = ds + side * side;
  float *dk = reinterpret_cast<float*>(ds_pairs + side * side), *dv = dk + n * D, *dqt = dv + n * D;
  float *s = dqt + side * D, *dp = s + 1024, *lse = dp + 1024, *delta = lse + side;
  const Tiles tiles;
  for (int64_t h = 0; h < g.heads; ++h)
    for (int64_t i = 0; i < g.tokens; i += side) {
      const int64_t i_blocks = (std::min(side, g.tokens - i) + kBlock - 1) / kBlock, head = h * g.width;
      for (int64_t b = 0; b < i_blocks; ++b) {
        const int64_t t = i + b * kBlock;
        const Rows queries = rows_of(g.q, head, g.stride, t, g);
        const Rows grads = rows_of(g.grad_out, head, g.out_stride, t, g);
        const Rows outs = rows_of(g.out, head, g.out_stride, t, g);
        queries.fetch(), grads.fetch(), outs.fetch();
        if (h == 0) {
          const Rows keys = rows_of(g.k, 0, g.stride, t, g), values = rows_of(g.v, 0, g.stride, t, g);
          keys.fetch(), values.fetch();
          token_rows(keys, depth, k + t * D);
          token_rows(values, depth, v + t * D);
          features_deep<false, true>(keys, depth, nullptr, kt + t / kBlock * kTile, blocks * kTile);
        }
        features_deep<true, false>(queries, depth, qt + b * kBlock * D, nullptr, 0);
        features_deep<true, false>(grads, depth, gt + b * kBlock * D, nullptr, 0);
        tokens_deep(queries, depth, q + b * kBlock * D);
        tokens_deep(grads, depth, go + b * kBlock * D);
        for (int64_t l = 0; l < kBlock; ++l) {
          const bool real = l < outs.count;
          lse[b * kBlock + l] = real ? g.lse[h * g.tokens + t + l] * kLog2E : INFINITY;
          delta[b * kBlock + l] =
              real ? sum_products(outs.first + l * outs.stride, grads.first + l * grads.stride, g.width) : 0.0f;
        }
        fetch_to_write(static_cast<Bits*>(g.grad_q) + head + t * g.grad_stride, g.grad_stride, outs.count, g.width);
        fetch_to_write(static_cast<Bits*>(g.grad_k) + t * g.grad_stride, g.grad_stride, outs.count, g.width);
        fetch_to_write(static_cast<Bits*>(g.grad_v) + t * g.grad_stride, g.grad_stride, outs.count, g.width);
      }
      for (int64_t j = 0; j <= i; j += side) {
        const bool diagonal = i == j;
        const int64_t j_blocks = diagonal ? i_blocks : kSide;
        for (int64_t c = 0; c < j_blocks; ++c)
          for (int64_t b = diagonal ? c : 0; b < i_blocks; ++b) {
            const int64_t key = (j + c * kBlock) * D;
            multiply_block(k + key, depth * kTile, qt + b * kBlock * D, kTile, depth * kTile, depth, s, 512, false);
            multiply_block(v + key, depth * kTile, gt + b * kBlock * D, kTile, depth * kTile, depth, dp, 512, false);
            const int64_t at = (2 * c * kSide + b) * kTile;
            weigh(s, dp, diagonal && b == c, g.scale, lse + b * kBlock, delta + b * kBlock, p + at, ds + at,
                  kSide * kTile, ds_pairs + (b * kSide + c) * 2 * kTile);
          }
        asm volatile("" ::: "memory");
        for (int64_t c = 0; c < j_blocks; ++c) {
          const int64_t b = diagonal ? c : 0, at = (2 * c * kSide + b) * kTile, key = (j + c * kBlock) * D;
          const bool add = h > 0 || !diagonal;
          for (int64_t d = 0; d < depth; ++d) {
            const int64_t right = (b * kBlock * D) + 2 * d * kTile;
            multiply_block(p + at, kSide * kTile, go + right, kBlock * D, kTile, i_blocks - b, dv + key + d * 1024,
                           512, add);
            multiply_block(ds + at, kSide * kTile, q + right, kBlock * D, kTile, i_blocks - b, dk + key + d * 1024,
                           512, add);
          }
        }
        for (int64_t b = 0; b < i_blocks; ++b)
          for (int64_t d = 0; d < depth; ++d)
            multiply_block(kt + (2 * d * blocks + j / kBlock) * kTile, blocks * kTile, ds_pairs + b * kSide * 2 * kTile,
                           2 * kTile, kTile, diagonal ? b + 1 : kSide, dqt + b * kBlock * D + d * 1024, 512, j > 0);
      }
      const __m512 scale[2] = {_mm512_set1_ps(g.scale), _mm512_set1_ps(g.scale)};
      for (int64_t b = 0; b < i_blocks; ++b) {
        const int64_t t = i + b * kBlock;
        write_columns(dqt + b * kBlock * D, std::min(kBlock, g.tokens - t), g.width, scale,
                      static_cast<Bits*>(g.grad_q) + head + t * g.grad_stride, g.grad_stride);
      }
    }
  for (int64_t t = 0; t < g.tokens; t += kBlock) {
    const int64_t count = std::min(kBlock, g.tokens - t), at = t * g.grad_stride;
    write_rows(dk + t * D, count, g.width, g.scale, static_cast<Bits*>(g.grad_k) + at, g.grad_stride);
    write_rows(dv + t * D, count, g.width, 1.0f, static_cast<Bits*>(g.grad_v) + at, g.grad_stride);
  }
  return true;
}

const AmxKernels kernels = {forward, backward, forward_floats, backward_floats};

}  // namespace

MINIDISP_AMX_END

const AmxKernels* amx_kernels() { return amx_permitted() ? &kernels : nullptr; }

}  // namespace minidisp

#else

namespace minidisp {
const AmxKernels* amx_kernels() { return nullptr; }
}  // namespace minidisp

#endif
