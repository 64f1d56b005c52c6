// angular_spread on AMX tiles: dispersion_amx.cpp implements it, dispersion.cpp decides when to use it.

#pragma once

#include <cstdint>

#include "../dispersion.h"

namespace minidisp {

constexpr int64_t kTileTokens = 32;  // tokens are laid out in groups of this size
constexpr int kSpreadDegree = 8;

// exp((shift - angle) / (pi tau)) as a polynomial in the cosine, which is clamped to [-limit, limit].
struct SpreadFit {
  float limit, coefficient[kSpreadDegree + 1];
  float weight(double cosine) const;  // of a pair: the polynomial divided by the sine
};
SpreadFit fit_spread(const Options& options, double shift);

// Unit vectors of tokens as AMX tiles in bfloat16: the centred ones, u' = u - mean, as rows and as columns, for the
// products S; u itself, in pairs of tokens, for the gradient. side_i = u'_i.mean + |mean|^2 / 2, so that
// S_ij = u'_i.u'_j + side_i + side_j. Each group of 32 tokens has 32 * width numbers in each of the first three.
struct SpreadTiles {
  uint16_t *rows, *columns, *pairs;
  float* side;
};

struct SpreadKernels {
  // The mean of `tokens` rows of u, stride apart and padded with zeros to width, a multiple of 32.
  void (*mean)(const float* u, int64_t stride, int64_t tokens, int64_t width, float* out);
  // Lays out the rows of u in the groups first to stop.
  void (*lay_out)(const float* u, int64_t stride, int64_t tokens, int64_t width, const float* mean, int64_t first,
                  int64_t stop, const SpreadTiles& out);
  // The sum of the values of the pairs of tokens i to i + m and j to j + n, each pair once; all four are multiples of
  // 32 except at the end. Unless g is null, the weights minus centre, times the other token, are added to the rows of g
  // of both ranges, up to a multiple of 32 rows. first: this is the first pair to write to the rows from j on, so they
  // are overwritten.
  double (*sum_pair)(const SpreadFit& fit, float centre, const SpreadTiles& tiles, int64_t width, int64_t i, int64_t m,
                     int64_t j, int64_t n, float* g, int64_t stride, bool first, uint16_t* memory);
  int64_t (*memory)(int64_t most);  // number of uint16_t that sum_pair needs for m, n <= most
};
const SpreadKernels* spread_kernels();  // nullptr if the processor or the system does not support AMX

}  // namespace minidisp
