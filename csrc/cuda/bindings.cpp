// The operators on CUDA devices as torch calls them: checks, outputs, and the kernels of this folder, which know no
// torch. Schemas, shapes and gradients are in minidisp/ops/.
//
// This is the only file that includes torch's headers, and nvcc does not compile it. tests/cuda_emulator.cpp defines
// MINIDISP_EMULATOR and includes everything but what needs a GPU.

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#if !defined(MINIDISP_EMULATOR)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "../checks.h"
#include "host.h"
#include "operators.h"

namespace minidisp::cuda {

namespace {

at::Device current_device() {
#if defined(MINIDISP_EMULATOR)
  return at::kCPU;
#else
  return {at::kCUDA, c10::cuda::current_device()};
#endif
}

at::Tensor tensor_of(const Matrices& x) {
  const at::Device device = current_device();
  const at::TensorOptions options = at::device(device).dtype(x.type == Type::float32 ? at::kFloat : at::kHalf);
  return at::for_blob(x.data, x.size).strides(x.stride).options(options).target_device(device).make_tensor();
}

}  // namespace

// What the launchers ask for: host.h

void fail(const char* message) { TORCH_CHECK(false, message); }

Memory::Memory(int64_t bytes) {
  auto* const tensor = new at::Tensor(at::empty({bytes}, at::device(current_device()).dtype(at::kByte)));
  owner_ = tensor;
  data_ = tensor->mutable_data_ptr();
}
Memory::~Memory() { delete static_cast<at::Tensor*>(owner_); }

#if !defined(MINIDISP_EMULATOR)
CUstream_st* current_stream() { return c10::cuda::getCurrentCUDAStream(); }

void check(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }

void multiply(const Matrices& c, const Matrices& left, const Matrices& right, bool add) {
  at::Tensor out = tensor_of(c);
  const at::Tensor a = tensor_of(left), b = tensor_of(right);
  if (c.type == left.type) {
    if (add) at::baddbmm_out(out, out, a, b);
    else at::bmm_out(out, a, b);
  } else {
    if (add) at::baddbmm_out(out, out, a, b, out.scalar_type());
    else at::bmm_out(out, a, b, out.scalar_type());
  }
}
#endif

namespace {

// The loss, and for backward the product W U or W U', (B, T, C), and the state. exact: without tensor cores.
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_in(const at::Tensor& z, c10::string_view variant, double tau,
                                                          double clamp, double eps, bool need_grad, bool exact,
                                                          const Workspace& space) {
  const Options options = checked_options(z, variant, tau, clamp, eps);
  at::AutoDispatchBelowAutograd no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::NoTF32Guard no_tf32;
  const TokenVectors tokens = token_vectors(z);
  const at::TensorOptions floats = z.options().dtype(at::kFloat);
  const at::Tensor product = at::empty(need_grad ? z.sizes() : at::IntArrayRef({0}), floats);
  const at::Tensor state = at::empty({state_size(tokens)}, floats);
  const at::Tensor losses = at::empty({z.size(0)}, floats.dtype(at::kDouble));
  dispersion(tokens, options, need_grad, exact, space, product.mutable_data_ptr<float>(),
             state.mutable_data_ptr<float>(), losses.mutable_data_ptr<double>());
  return {losses.mean().to(at::kFloat), product, need_grad ? state : at::empty({0}, floats)};
}

at::Tensor backward_in(const at::Tensor& upstream, const at::Tensor& z, const at::Tensor& product,
                       const at::Tensor& state, c10::string_view variant_name) {
  Variant variant;
  TORCH_CHECK_VALUE(parse_variant(std::string_view(variant_name.data(), variant_name.size()), &variant),
                    "minidisp::dispersion_backward does not know the variant ", variant_name);
  const TokenVectors tokens = token_vectors(z);
  TORCH_CHECK_VALUE(upstream.numel() == 1 && upstream.scalar_type() == at::kFloat && product.sizes() == z.sizes() &&
                        state.dim() == 1 && state.numel() == state_size(tokens),
                    "minidisp::dispersion_backward takes the results of the forward call with this z");
  const at::Tensor grad = at::empty(z.sizes(), z.options());
  dispersion_backward(tokens, variant, upstream.const_data_ptr<float>(), product.const_data_ptr<float>(),
                      state.mutable_data_ptr<float>(), grad.mutable_data_ptr());
  return grad;
}

// logits (N, V), rows at any stride; targets (N,) int64. Returns the losses, float32 (N,).
at::Tensor cross_entropy_in(const at::Tensor& logits, const at::Tensor& targets, int64_t ignored, bool need_grad) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.stride(1) == 1 && targets.dim() == 1 && targets.is_contiguous() &&
                        targets.size(0) == logits.size(0) && targets.scalar_type() == at::kLong &&
                        targets.device() == logits.device(),
                    "minidisp::cross_entropy_ takes logits (N, V) with contiguous rows, and int64 targets (N,) on the "
                    "same device");
  const at::ScalarType dtype = logits.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "minidisp::cross_entropy_ takes float32, bfloat16 or float16, not ", dtype);
  const at::Tensor losses = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
  cross_entropy({type_of(logits), logits.mutable_data_ptr(), logits.size(0), logits.size(1), logits.stride(0)},
                targets.const_data_ptr<int64_t>(), ignored, need_grad, losses.mutable_data_ptr<float>());
  return losses;
}

}  // namespace
}  // namespace minidisp::cuda

#if !defined(MINIDISP_EMULATOR)
namespace minidisp::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& z, c10::string_view variant, double tau,
                                                       double clamp, double eps, bool need_grad) {
  const c10::cuda::CUDAGuard guard(z.device());
  const bool exact = !allows_rounding([] { return at::globalContext().allowTF32CuBLAS(); });
  return forward_in(z, variant, tau, clamp, eps, need_grad, exact, Workspace());
}

at::Tensor backward(const at::Tensor& upstream, const at::Tensor& z, const at::Tensor& product, const at::Tensor& state,
                    c10::string_view variant) {
  const c10::cuda::CUDAGuard guard(z.device());
  return backward_in(upstream, z, product, state, variant);
}

at::Tensor cross_entropy_(const at::Tensor& logits, const at::Tensor& targets, int64_t ignored, bool need_grad) {
  const c10::cuda::CUDAGuard guard(logits.device());
  return cross_entropy_in(logits, targets, ignored, need_grad);
}

}  // namespace
}  // namespace minidisp::cuda

TORCH_LIBRARY_IMPL(minidisp, CUDA, m) {
  m.impl("dispersion", minidisp::cuda::forward);
  m.impl("dispersion_backward", minidisp::cuda::backward);
  m.impl("cross_entropy_", minidisp::cuda::cross_entropy_);
}
#endif
