// The part of angular_spread that matrix tiles (AMX) compute on the CPU: dispersion_amx.cpp says how, dispersion.cpp when.

#pragma once

#include <cstdint>

#include "../dispersion.h"

namespace minidisp {

constexpr int64_t kTileTokens = 32;  // tokens are laid out in groups of so many
constexpr int kSpreadDegree = 8;

// exp((shift - angle) / (pi tau)) as a polynomial in the cosine, which is held in [-limit, limit].
struct SpreadFit {
  float limit, coefficient[kSpreadDegree + 1];
  float weight(double cosine) const;  // of a pair: the polynomial divided by the sine
};
SpreadFit fit_spread(const Options& options, double shift);

// Unit vectors of tokens as matrix tiles, bfloat16: of the centred ones u' = u - mean, for the products S, as rows and as columns;
// of u itself, for the gradient, in pairs of tokens. side_i = u'_i.mean + |mean|^2 / 2, so that S_ij = u'_i.u'_j + side_i + side_j.
// Each group of 32 tokens takes 32 * width numbers of the first three.
struct SpreadTiles {
  uint16_t *rows, *columns, *pairs;
  float* side;
};

struct SpreadKernels {
  // The mean of `tokens` rows of u, which are stride apart and padded with zeros to width, a multiple of 32.
  void (*mean)(const float* u, int64_t stride, int64_t tokens, int64_t width, float* out);
  // Lays out the rows of u of groups first to stop.
  void (*lay_out)(const float* u, int64_t stride, int64_t tokens, int64_t width, const float* mean, int64_t first, int64_t stop,
                  const SpreadTiles& out);
  // The sum of the values of the pairs of tokens i to i + m and j to j + n, multiples of 32 but at the end, each pair once. Unless
  // g is null, the weights less centre, times the other tokens, are added to its rows of both, up to a multiple of 32 of them; or
  // become those of tokens j and on, if the pair is the first to write there.
  double (*sum_pair)(const SpreadFit& fit, float centre, const SpreadTiles& tiles, int64_t width, int64_t i, int64_t m, int64_t j,
                     int64_t n, float* g, int64_t stride, bool first, uint16_t* memory);
  int64_t (*memory)(int64_t most);  // uint16_t that sum_pair needs for m, n <= most
};
const SpreadKernels* spread_kernels();  // nullptr where the processor or the system has no tiles

}  // namespace minidisp
