// The interface of the dispersion loss on the CPU.

#pragma once

#include "../dispersion.h"
#include "numbers.h"

namespace minidisp {

struct TokenVectors {  // (B, T, C), at any strides, in elements
  Type type;
  const void* data;
  int64_t size[3], stride[3];
};

// The mean of the sequences' losses. grad (B, T, C): overwritten with its gradient, unless null. may_round: products
// may be rounded to bfloat16.
double dispersion(const TokenVectors& z, const Options& options, bool may_round, float* grad);

}  // namespace minidisp
