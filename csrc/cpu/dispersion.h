// The interface of the dispersion loss on the CPU.

#pragma once

#include "../dispersion.h"

namespace minidisp {

// The mean of the sequences' losses. grad (B, T, C): overwritten with its gradient, unless null. may_round: products
// may be rounded to bfloat16.
double dispersion(const TokenVectors& z, const Options& options, bool may_round, float* grad);

}  // namespace minidisp
