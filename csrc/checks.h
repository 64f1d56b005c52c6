// Torch's tensors as the kernels take them, and checks of the dispersion loss. Shared by the bindings of both devices.

#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "dispersion.h"

namespace minidisp {

// Of float32, bfloat16 or float16.
inline Type type_of(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat      ? Type::float32
         : x.scalar_type() == at::kBFloat16 ? Type::bfloat16
                                            : Type::float16;
}

inline TokenVectors token_vectors(const at::Tensor& z) {
  return {
      type_of(z), z.const_data_ptr(), {z.size(0), z.size(1), z.size(2)}, {z.stride(0), z.stride(1), z.stride(2)}};
}

// Whether torch's settings allow rounding in products; false if torch raises an error, as it does when its older and
// newer settings are mixed.
template <class Question>
bool allows_rounding(Question question) {
  try {
    return question();
  } catch (const c10::Error&) {
    return false;
  }
}

// The options of a call, checked; raises ValueError.
inline Options checked_options(const at::Tensor& z, c10::string_view variant, double tau, double clamp, double eps) {
  Options options{Variant::angular_spread, tau, clamp, eps};
  TORCH_CHECK_VALUE(parse_variant(std::string_view(variant.data(), variant.size()), &options.variant),
                    "minidisp::dispersion does not know the variant ", variant);
  TORCH_CHECK_VALUE(z.dim() == 3 && z.size(0) >= 1 && z.size(1) >= 2 && z.size(2) >= 1,
                    "z must be (B, T, C) with B >= 1, T >= 2 and C >= 1, not ", z.sizes());
  const at::ScalarType dtype = z.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                    "minidisp::dispersion takes float32, bfloat16 and float16, not ", dtype);
  return options;
}

}  // namespace minidisp
