// bfloat16 and float16 as stored in memory. Conversions to float are exact.

#pragma once

#include <cstdint>
#include <cstring>

#include "../type.h"

namespace minidisp {

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct BFloat16 {
  uint16_t bits;
  static BFloat16 of(float x) {  // rounded to the nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &x, sizeof wide);
    return {static_cast<uint16_t>(x == x ? (wide + 0x7fff + (wide >> 16 & 1)) >> 16 : 0x7fc0)};
  }
  explicit operator float() const { return float_of_bits(static_cast<uint32_t>(bits) << 16); }
};

struct Half {
  uint16_t bits;
  explicit operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    const uint32_t offset = rest >= 0x7c00 ? 224u << 23 : 112u << 23;  // infinity and NaN: to the largest exponent
    const float below = static_cast<float>(rest) * 0x1p-24f;           // denormal
    uint32_t wide;
    std::memcpy(&wide, &below, sizeof wide);
    return float_of_bits(sign | (rest < 0x0400 ? wide : (rest << 13) + offset));
  }
};

}  // namespace minidisp
