// angular_spread on AMX tiles: products of bfloat16, sums in float.
//
// bfloat16 has 8 bits: too few for the unit vectors u of nearly parallel tokens, which are mostly equal, and for the
// weights W, which are too. So only the differences are rounded: u' = u - m with the mean token m, and W - c with the
// weight c at the cosine |m|^2:
//   S_ij = u'_i.u'_j + u'_i.m + u'_j.m + |m|^2
//   G_i = sum_j W_ij u_j = sum_j (W_ij - c) u_j + c (L m - u_i),    j != i
// This helps least if the tokens form tight groups that are far apart.
// All matrices are first laid out in tiles of 1 KiB, then multiplied in blocks of 32 x 32. For each pair of blocks, W
// is stored as rows, and transposed; then G_I += (W - c) U_J and G_J += (W - c)^T U_I. The value of a pair is a
// polynomial in its cosine, since clamp and tau are restricted to where the function is smooth.

#include <algorithm>
#include <cmath>

#include "amx_tile.h"
#include "dispersion_amx.h"

namespace minidisp {

// Interpolates at Chebyshev nodes, by discrete orthogonality, and converts from Chebyshev polynomials to powers.
SpreadFit fit_spread(const Options& options, double shift) {
  constexpr int n = kSpreadDegree + 1;
  const double limit = 1 - options.clamp;
  double power[n] = {}, before[n] = {}, now[n] = {};  // of x = cosine / limit: the sum, T_k-1 and T_k
  now[0] = 1;
  for (int k = 0; k < n; ++k) {
    double a = 0;
    for (int i = 0; i < n; ++i) {
      const double angle = kPi * (i + 0.5) / n;
      a += std::exp((shift - std::acos(limit * std::cos(angle))) / (kPi * options.tau)) * std::cos(k * angle);
    }
    a *= (k == 0 ? 1.0 : 2.0) / n;
    for (int p = 0; p <= k; ++p) power[p] += a * now[p];
    double next[n] = {};  // T_k+1 = 2 x T_k - T_k-1, and T_1 = x
    for (int p = 0; p < n; ++p) next[p] = (p > 0 ? (k == 0 ? 1 : 2) * now[p - 1] : 0.0) - before[p];
    for (int p = 0; p < n; ++p) before[p] = now[p], now[p] = next[p];
  }
  SpreadFit fit{static_cast<float>(limit), {}};
  for (int p = 0; p < n; ++p) fit.coefficient[p] = static_cast<float>(power[p] / std::pow(limit, p));
  return fit;
}

float SpreadFit::weight(double cosine) const {
  const double c = std::min<double>(std::max<double>(cosine, -limit), limit);
  double value = 0;
  for (int p = kSpreadDegree; p >= 0; --p) value = value * c + coefficient[p];
  return static_cast<float>(value / std::sqrt(1 - c * c));
}

#if defined(MINIDISP_AMX)

MINIDISP_AMX_BEGIN

namespace {

constexpr int64_t kGroup = kTileTokens;

void mean(const float* u, int64_t stride, int64_t tokens, int64_t width, float* out) {
  constexpr int64_t kRows = 32;  // summed separately: rounding errors of thousands of equal numbers would add up
  for (int64_t d = 0; d < width; d += 16) _mm512_storeu_ps(out + d, _mm512_setzero_ps());
  for (int64_t i = 0; i < tokens; i += kRows)
    for (int64_t d = 0; d < width; d += 16) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t r = i; r < std::min(i + kRows, tokens); ++r)
        sum = _mm512_add_ps(sum, _mm512_loadu_ps(u + r * stride + d));
      _mm512_storeu_ps(out + d, _mm512_add_ps(_mm512_loadu_ps(out + d), sum));
    }
  const __m512 count = _mm512_set1_ps(static_cast<float>(tokens));
  for (int64_t d = 0; d < width; d += 16)
    _mm512_storeu_ps(out + d, _mm512_div_ps(_mm512_loadu_ps(out + d), count));
}

// Lays out 16 tokens, of which the first `count` are real, with 32 features: a tile of rows, a tile of columns, and
// half of each of two tiles in pairs of tokens. Adds u'.mean to along.
inline void lay_out_tile(const float* u, int64_t stride, int64_t count, const float* mean, Bits* rows, Bits* columns,
                         Bits* pairs, __m512 along[16]) {
  const __m512 m0 = _mm512_loadu_ps(mean), m1 = _mm512_loadu_ps(mean + 16);
  __m512i r[16];
  __m512 x0[2], x1[2];
#pragma GCC unroll 16
  for (int64_t l = 0; l < 16; ++l) {
    const __mmask16 real = l < count ? 0xffff : 0;
    x0[l % 2] = _mm512_maskz_loadu_ps(real, u + l * stride);
    x1[l % 2] = _mm512_maskz_loadu_ps(real, u + l * stride + 16);
    const __m512 y0 = _mm512_maskz_sub_ps(real, x0[l % 2], m0), y1 = _mm512_maskz_sub_ps(real, x1[l % 2], m1);
    along[l] = _mm512_fmadd_ps(y1, m1, _mm512_fmadd_ps(y0, m0, along[l]));
    r[l] = (__m512i)_mm512_cvtne2ps_pbh(y1, y0);
    _mm512_store_si512(rows + l * 32, r[l]);
    if (l % 2 == 1) {
      _mm512_store_si512(pairs + l / 2 * 32, minidisp::pairs(x0[0], x0[1]));
      _mm512_store_si512(pairs + kTile + l / 2 * 32, minidisp::pairs(x1[0], x1[1]));
    }
  }
  transpose16(r);
#pragma GCC unroll 16
  for (int64_t l = 0; l < 16; ++l) _mm512_store_si512(columns + l * 32, r[l]);
}

void lay_out(const float* u, int64_t stride, int64_t tokens, int64_t width, const float* mean, int64_t first,
             int64_t stop, const SpreadTiles& out) {
  const int64_t depth = width / 32;
  __m512 squares = _mm512_setzero_ps();
  for (int64_t d = 0; d < width; d += 16) {
    const __m512 x = _mm512_loadu_ps(mean + d);
    squares = _mm512_fmadd_ps(x, x, squares);
  }
  const float half_square = _mm512_reduce_add_ps(squares) / 2;
  for (int64_t i = first * kGroup; i < stop * kGroup; i += 16) {
    __m512 along[16] = {};
    for (int64_t s = 0; s < depth; ++s) {
      const int64_t at = (i / 16 * depth + s) * kTile;
      Bits* pairs = out.pairs + (i / kGroup * depth + s) * 2 * kTile + i % kGroup * 16;
      lay_out_tile(u + i * stride + s * 32, stride, tokens - i, mean + s * 32, out.rows + at, out.columns + at, pairs,
                   along);
    }
    for (int64_t l = 0; l < 16; ++l) out.side[i + l] = _mm512_reduce_add_ps(along[l]) + half_square;
  }
}

// Turns 32 x 32 products, 2 x 2 tiles, into W - c: as rows in w, with groups of 16 rows `down` apart, and transposed in
// wt in the same way. Returns the sum of the values. kPart: some rows or columns are padding, or it is a diagonal
// block, which contains each pair twice.
template <bool kPart>
inline double weigh(const SpreadFit& f, float centre, const float* s, const float* row_side, const float* column_side,
                    int64_t rows, int64_t columns, bool diagonal, Bits* w, int64_t down, Bits* wt, int64_t wt_down) {
  const __m512 most = _mm512_set1_ps(f.limit), least = _mm512_set1_ps(-f.limit), one = _mm512_set1_ps(1.0f);
  const __m512 c = _mm512_set1_ps(centre);
  const __m512 side[2] = {_mm512_loadu_ps(column_side), _mm512_loadu_ps(column_side + 16)};
  __m512 total[2] = {};
  __m512i across[2][16];
#pragma GCC unroll 2
  for (int64_t r = 0; r < 32; r += 2) {
    __m512 x[2][2], value[2][2], weight[2][2];  // [row][half]
#pragma GCC unroll 2
    for (int64_t u = 0; u < 2; ++u)
#pragma GCC unroll 2
      for (int64_t h = 0; h < 2; ++h) {
        const __m512 product = _mm512_load_ps(s + (r + u) / 16 * 512 + h * 256 + (r + u) % 16 * 16);
        const __m512 cosine = _mm512_add_ps(product, _mm512_add_ps(side[h], _mm512_set1_ps(row_side[r + u])));
        x[u][h] = _mm512_min_ps(_mm512_max_ps(cosine, least), most);
        value[u][h] = _mm512_set1_ps(f.coefficient[kSpreadDegree]);
      }
#pragma GCC unroll 8
    for (int p = kSpreadDegree - 1; p >= 0; --p)
#pragma GCC unroll 2
      for (int64_t u = 0; u < 2; ++u)
#pragma GCC unroll 2
        for (int64_t h = 0; h < 2; ++h)
          value[u][h] = _mm512_fmadd_ps(value[u][h], x[u][h], _mm512_set1_ps(f.coefficient[p]));
#pragma GCC unroll 2
    for (int64_t u = 0; u < 2; ++u)
#pragma GCC unroll 2
      for (int64_t h = 0; h < 2; ++h) {
        const __m512 inverse_sine = _mm512_rsqrt14_ps(_mm512_fnmadd_ps(x[u][h], x[u][h], one));
        weight[u][h] = _mm512_fmsub_ps(value[u][h], inverse_sine, c);
        if (kPart) {
          __mmask16 real = r + u < rows ? first_of(std::max<int64_t>(columns - 16 * h, 0)) : 0;
          if (diagonal && (r + u) / 16 == h) real &= static_cast<__mmask16>(~(1u << (r + u) % 16));
          value[u][h] = _mm512_maskz_mov_ps(real, value[u][h]);
          weight[u][h] = _mm512_maskz_mov_ps(real, weight[u][h]);
        }
        total[h] = _mm512_add_ps(total[h], value[u][h]);
      }
    if (w == nullptr) continue;
#pragma GCC unroll 2
    for (int64_t u = 0; u < 2; ++u)
      _mm512_store_si512(w + (r + u) / 16 * down + (r + u) % 16 * 32,
                         (__m512i)_mm512_cvtne2ps_pbh(weight[u][1], weight[u][0]));
    if (!diagonal)
#pragma GCC unroll 2
      for (int64_t h = 0; h < 2; ++h) across[h][r / 2] = pairs(weight[0][h], weight[1][h]);
  }
  if (w != nullptr && !diagonal)
    for (int64_t h = 0; h < 2; ++h) {
      transpose16(across[h]);
#pragma GCC unroll 16
      for (int64_t l = 0; l < 16; ++l) _mm512_store_si512(wt + h * wt_down + l * 32, across[h][l]);
    }
  return _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1])) * (diagonal ? 0.5 : 1.0);
}

int64_t memory(int64_t most) { return 2048 + 2 * up(most, kGroup) * up(most, kGroup); }

double sum_pair(const SpreadFit& fit, float centre, const SpreadTiles& tiles, int64_t width, int64_t i, int64_t m,
                int64_t j, int64_t n, float* g, int64_t stride, bool first, Bits* memory) {
  const Tiles configured;
  const int64_t depth = width / 32;
  const int64_t m_groups = (m + kGroup - 1) / kGroup, n_groups = (n + kGroup - 1) / kGroup;
  float* s = reinterpret_cast<float*>(memory);
  Bits *w = memory + 2048, *wt = i == j ? w : w + up(m, kGroup) * up(n, kGroup);
  double sum = 0;
  for (int64_t a = 0; a < m_groups; ++a)
    for (int64_t b = i == j ? a : 0; b < n_groups; ++b) {
      const int64_t row = i + a * kGroup, column = j + b * kGroup, rows = m - a * kGroup, columns = n - b * kGroup;
      multiply_block(tiles.rows + row * width, depth * kTile, tiles.columns + column * width, kTile, depth * kTile,
                     depth, s, 512, false);
      Bits* to = g != nullptr ? w + (2 * a * n_groups + b) * kTile : nullptr;
      const auto run = row == column || rows < kGroup || columns < kGroup ? weigh<true> : weigh<false>;
      sum += run(fit, centre, s, tiles.side + row, tiles.side + column, rows, columns, row == column, to,
                 n_groups * kTile, wt + (2 * b * m_groups + a) * kTile, m_groups * kTile);
    }
  if (g == nullptr) return sum;
  asm volatile("" ::: "memory");
  const auto multiply = [&](const Bits* weights, int64_t to, int64_t to_groups, int64_t from, int64_t from_groups,
                            bool add) {
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t a = 0; a < to_groups; ++a)
        multiply_block(weights + 2 * a * from_groups * kTile, from_groups * kTile,
                       tiles.pairs + from * width + 2 * d * kTile, 2 * depth * kTile, kTile, from_groups,
                       g + (to + a * kGroup) * stride + d * 32, 16 * stride, add, 16, stride);
  };
  multiply(w, i, m_groups, j, n_groups, i != j || !first);
  if (i != j) multiply(wt, j, n_groups, i, m_groups, !first);
  return sum;
}

const SpreadKernels kernels = {mean, lay_out, sum_pair, memory};

}  // namespace

MINIDISP_AMX_END

const SpreadKernels* spread_kernels() { return amx_permitted() ? &kernels : nullptr; }

#else

const SpreadKernels* spread_kernels() { return nullptr; }

#endif

}  // namespace minidisp
