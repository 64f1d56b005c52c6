// Shared by the devices: tokens, the options of a call, and the order of the pairs of token blocks of a sequence.
// The weights of the pairs are in dispersion_pair.h.

#pragma once

#include <cmath>
#include <cstdint>
#include <string_view>

#include "type.h"

#if defined(__CUDACC__)
#define MINIDISP_BOTH __host__ __device__
#else
#define MINIDISP_BOTH
#endif

namespace minidisp {

struct TokenVectors {  // (B, T, C), at any strides, in elements
  Type type;
  const void* data;
  int64_t size[3], stride[3];
};

enum class Variant { angular_spread, orthogonalization, l2_repel, decorrelation };

constexpr double kPi = 3.14159265358979323846;
constexpr double kLargestExponent = 80;  // exp(-80) is still a normal float32

struct Options {
  Variant variant;
  double tau, clamp, eps;

  bool angular() const { return variant == Variant::angular_spread || variant == Variant::orthogonalization; }
  // The smallest angle that the clamp allows, in radians; the largest is pi minus this.
  double smallest_angle() const { return std::acos(1 - clamp); }
  // angular_spread sums exp((shift - angle) / (pi tau)). The smallest possible angle is a good shift, unless all angles
  // are so much larger that every exponential underflows. Then the smallest angle in the data has to be found first.
  bool shift_must_be_found() const {
    return variant == Variant::angular_spread && (kPi - 2 * smallest_angle()) / (kPi * tau) > kLargestExponent;
  }
};

// Returns false if the name is unknown.
inline bool parse_variant(std::string_view name, Variant* variant) {
  if (name == "angular_spread") *variant = Variant::angular_spread;
  else if (name == "orthogonalization") *variant = Variant::orthogonalization;
  else if (name == "l2_repel") *variant = Variant::l2_repel;
  else if (name == "decorrelation") *variant = Variant::decorrelation;
  else return false;
  return true;
}

// The pairs of blocks I <= J of a sequence are numbered column by column: (0,0) (0,1) (1,1) (0,2) (1,2) (2,2) ...
MINIDISP_BOTH inline int64_t block_pairs(int64_t blocks) { return blocks * (blocks + 1) / 2; }

MINIDISP_BOTH inline void block_pair(int64_t number, int64_t* I, int64_t* J) {
  int64_t j = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(number) + 1) - 1) / 2);
  while (block_pairs(j) > number) --j;  // corrects rounding of the square root
  while (block_pairs(j + 1) <= number) ++j;
  *J = j;
  *I = number - block_pairs(j);
}

}  // namespace minidisp
