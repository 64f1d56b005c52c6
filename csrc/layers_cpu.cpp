// What a block computes besides matrix products and attention, each in one pass over memory, forward and backward: norms,
// queries and keys made ready, activations, and the gradient of a linear layer's weight. layers_tile.h does the work per row.
//
// Gradients of weights are summed by each thread for itself and then over the threads, in their order.

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <optional>
#include <utility>

#include "cpu.h"
#include "layers.h"

namespace minidisp {
namespace {

struct Kernels {
  LayerKernels norms[2][2];  // [x in bfloat16][out in bfloat16]
  RowKernels rows[2];        // [in bfloat16]
  BFloat16Kernels bfloat16;
};

#define MINIDISP_TILE "layers_tile.h"
#include "instruction_sets.h"

constexpr int64_t kGrain = 1 << 15;  // numbers that are worth a thread

bool in_bfloat16(at::ScalarType type) {
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16, "minidisp computes layers in float32 and bfloat16, not ", type);
  return type == at::kBFloat16;
}

at::Tensor weights(const at::Tensor& weight, int64_t width) {
  TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == width, "weights must be ", width, ", not ", weight.sizes());
  return weight.to(at::kFloat).contiguous();
}

// function(begin, end, sums) for shares of the rows; returns (2, width), the sum of what each left in its sums.
template <class Function>
at::Tensor summed(int64_t rows, int64_t row_size, int64_t width, Function function) {
  const int64_t threads =
      at::in_parallel_region() ? 1 : std::clamp<int64_t>(rows * row_size / kGrain, 1, at::get_num_threads());
  at::Tensor sums = at::zeros({threads, 2, width}, at::kFloat);
  float* memory = sums.mutable_data_ptr<float>();
  at::parallel_for(0, threads, 1, [&](int64_t t, int64_t stop) {
    for (; t < stop; ++t) function(t * rows / threads, (t + 1) * rows / threads, memory + t * 2 * width);
  });
  return sums.sum(0);
}

at::Tensor norm(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, double eps, bool centred,
                at::ScalarType dtype) {
  TORCH_CHECK_VALUE(input.dim() >= 1 && input.size(-1) > 0, "a norm takes rows of numbers, not ", input.sizes());
  const at::Tensor x = input.contiguous(), w = weights(weight, x.size(-1));
  const at::Tensor b = bias ? weights(*bias, x.size(-1)) : at::Tensor();
  const at::Tensor out = at::empty(x.sizes(), x.options().dtype(dtype));
  NormWork n{};
  n.width = x.size(-1), n.eps = static_cast<float>(eps), n.centred = centred;
  n.x = x.const_data_ptr(), n.weight = w.const_data_ptr<float>(), n.bias = bias ? b.const_data_ptr<float>() : nullptr;
  n.out = out.mutable_data_ptr();
  const LayerKernels& k = choose_kernels().norms[in_bfloat16(x.scalar_type())][in_bfloat16(dtype)];
  at::parallel_for(0, x.numel() / n.width, kGrain / n.width + 1, [&](int64_t begin, int64_t end) { k.norm(n, begin, end); });
  return out;
}

std::tuple<at::Tensor, at::Tensor> norm_backward(const at::Tensor& grad_out, const at::Tensor& input, const at::Tensor& weight,
                                                 double eps, bool centred) {
  const at::Tensor x = input.contiguous(), g = grad_out.contiguous(), w = weights(weight, x.size(-1));
  TORCH_CHECK_VALUE(g.sizes() == x.sizes(), "the gradient must be ", x.sizes(), ", not ", g.sizes());
  const at::Tensor grad = at::empty(x.sizes(), x.options());
  NormWork n{};
  n.width = x.size(-1), n.eps = static_cast<float>(eps), n.centred = centred;
  n.x = x.const_data_ptr(), n.weight = w.const_data_ptr<float>(), n.grad = g.const_data_ptr(), n.grad_x = grad.mutable_data_ptr();
  const LayerKernels& k = choose_kernels().norms[in_bfloat16(x.scalar_type())][in_bfloat16(g.scalar_type())];
  const auto pass = [&](int64_t begin, int64_t end, float* sums) { k.norm_backward(n, begin, end, sums); };
  return {grad, summed(x.numel() / n.width, n.width, n.width, pass)};
}

RotateWork rotate_work(const at::Tensor& qkv, const at::Tensor& q_weight, const at::Tensor& k_weight, const at::Tensor& cos,
                       const at::Tensor& sin, int64_t n_head, int64_t n_kv_head, double eps) {
  TORCH_CHECK_VALUE(n_head >= 1 && n_kv_head >= 1 && qkv.dim() == 3 && qkv.size(2) > 0 && qkv.size(2) % (n_head + 2 * n_kv_head) == 0,
                    "qkv must be (B, T, (n_head + 2 n_kv_head) D), not ", qkv.sizes());
  RotateWork r{};
  r.n_head = n_head, r.n_kv_head = n_kv_head, r.width = qkv.size(2) / (n_head + 2 * n_kv_head), r.tokens = qkv.size(1);
  TORCH_CHECK_VALUE(r.width % 2 == 0, "rotary positions need an even number of channels, not ", r.width);
  for (const at::Tensor* table : {&cos, &sin})
    TORCH_CHECK_VALUE(table->dim() == 2 && table->size(0) == r.tokens && table->size(1) == r.width &&
                          table->scalar_type() == at::kFloat && table->is_contiguous(),
                      "rotations must be contiguous float32 (", r.tokens, ", ", r.width, "), not ", table->sizes());
  r.eps = static_cast<float>(eps);
  r.qkv = qkv.const_data_ptr(), r.q_weight = q_weight.const_data_ptr<float>(), r.k_weight = k_weight.const_data_ptr<float>();
  r.cos = cos.const_data_ptr<float>(), r.sin = sin.const_data_ptr<float>();
  return r;
}

int64_t head_width(const at::Tensor& qkv, int64_t n_head, int64_t n_kv_head) {
  return n_head + 2 * n_kv_head > 0 && qkv.dim() == 3 ? qkv.size(2) / (n_head + 2 * n_kv_head) : 0;
}

at::Tensor rotate(const at::Tensor& packed, const at::Tensor& q_weight, const at::Tensor& k_weight, const at::Tensor& cos,
                  const at::Tensor& sin, int64_t n_head, int64_t n_kv_head, double eps) {
  const int64_t D = head_width(packed, n_head, n_kv_head);
  const at::Tensor qkv = packed.contiguous(), q = weights(q_weight, D), k = weights(k_weight, D);
  RotateWork r = rotate_work(qkv, q, k, cos, sin, n_head, n_kv_head, eps);
  const at::Tensor out = at::empty(qkv.sizes(), qkv.options());
  r.out = out.mutable_data_ptr();
  const RowKernels& kernels = choose_kernels().rows[in_bfloat16(qkv.scalar_type())];
  at::parallel_for(0, qkv.size(0) * r.tokens, kGrain / qkv.size(2) + 1,
                   [&](int64_t begin, int64_t end) { kernels.rotate(r, begin, end); });
  return out;
}

std::tuple<at::Tensor, at::Tensor> rotate_backward(const at::Tensor& grad_out, const at::Tensor& packed, const at::Tensor& q_weight,
                                                   const at::Tensor& k_weight, const at::Tensor& cos, const at::Tensor& sin,
                                                   int64_t n_head, int64_t n_kv_head, double eps) {
  const int64_t D = head_width(packed, n_head, n_kv_head);
  const at::Tensor qkv = packed.contiguous(), g = grad_out.contiguous(), q = weights(q_weight, D), k = weights(k_weight, D);
  RotateWork r = rotate_work(qkv, q, k, cos, sin, n_head, n_kv_head, eps);
  TORCH_CHECK_VALUE(g.sizes() == qkv.sizes() && g.scalar_type() == qkv.scalar_type(), "the gradient must be as the input, ",
                    qkv.sizes(), " of ", qkv.scalar_type(), ", not ", g.sizes(), " of ", g.scalar_type());
  const at::Tensor grad = at::empty(qkv.sizes(), qkv.options());
  r.grad = g.const_data_ptr(), r.grad_qkv = grad.mutable_data_ptr();
  const RowKernels& kernels = choose_kernels().rows[in_bfloat16(qkv.scalar_type())];
  const auto pass = [&](int64_t begin, int64_t end, float* sums) { kernels.rotate_backward(r, begin, end, sums); };
  return {grad, summed(qkv.size(0) * r.tokens, qkv.size(2), D, pass)};
}

at::Tensor squared_relu(const at::Tensor& input) {
  const at::Tensor x = input.contiguous(), out = at::empty(x.sizes(), x.options());
  const RowKernels& k = choose_kernels().rows[in_bfloat16(x.scalar_type())];
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    k.squared_relu(x.const_data_ptr(), out.mutable_data_ptr(), begin, end);
  });
  return out;
}

at::Tensor squared_relu_backward(const at::Tensor& grad_out, const at::Tensor& input) {
  const at::Tensor x = input.contiguous(), g = grad_out.contiguous(), out = at::empty(x.sizes(), x.options());
  TORCH_CHECK_VALUE(g.sizes() == x.sizes() && g.scalar_type() == x.scalar_type(), "the gradient must be as the input");
  const RowKernels& k = choose_kernels().rows[in_bfloat16(x.scalar_type())];
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    k.squared_relu_backward(g.const_data_ptr(), x.const_data_ptr(), out.mutable_data_ptr(), begin, end);
  });
  return out;
}

// A function of one bfloat16 number takes 65,536 values: reading them from a table is faster than computing them, and exact.
constexpr int64_t kNumbers = 1 << 16;

void check_table(const at::Tensor& x, const at::Tensor& table, at::ScalarType type) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kBFloat16, "a table is of bfloat16 numbers, not ", x.scalar_type());
  TORCH_CHECK_VALUE(table.numel() == kNumbers && table.scalar_type() == type && table.is_contiguous(),
                    "the table must be 65,536 contiguous numbers of ", type);
}

at::Tensor lookup(const at::Tensor& input, const at::Tensor& values, const at::Tensor& /*slopes*/) {
  check_table(input, values, at::kBFloat16);
  const at::Tensor x = input.contiguous(), out = at::empty(x.sizes(), x.options());
  const auto* in = static_cast<const uint16_t*>(x.const_data_ptr());
  const auto* table = static_cast<const uint16_t*>(values.const_data_ptr());
  auto* y = static_cast<uint16_t*>(out.mutable_data_ptr());
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) y[i] = table[in[i]];
  });
  return out;
}

at::Tensor lookup_backward(const at::Tensor& grad_out, const at::Tensor& input, const at::Tensor& slopes) {
  check_table(input, slopes, at::kFloat);
  const at::Tensor x = input.contiguous(), g = grad_out.contiguous(), out = at::empty(x.sizes(), x.options());
  TORCH_CHECK_VALUE(g.sizes() == x.sizes() && g.scalar_type() == x.scalar_type(), "the gradient must be as the input");
  const auto* in = static_cast<const uint16_t*>(x.const_data_ptr());
  const auto backward = choose_kernels().bfloat16.lookup_backward;
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    backward(g.const_data_ptr(), x.const_data_ptr(), slopes.const_data_ptr<float>(), out.mutable_data_ptr(), begin, end);
  });
  return out;
}

// oneDNN's product, or nothing where it has none for bfloat16: that is seen by trying, since it goes by more than the processor.
using ProductOf = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, c10::string_view,
                             c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>);
using Product = c10::TypedOperatorHandle<ProductOf>;

at::Tensor multiply(const Product& product, const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  return product.call(x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

std::optional<Product> find_product() {
  const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  if (!found) return std::nullopt;
  const Product product = found->typed<ProductOf>();
  const at::Tensor tried = at::zeros({16, 16}, at::kBFloat16);
  try {
    multiply(product, tried, tried, std::nullopt);
  } catch (const std::exception&) {
    return std::nullopt;
  }
  return product;
}

// oneDNN's form adds the bias inside the product; at::linear fills the output with it first.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  if (!at::globalContext().userEnabledMkldnn()) return at::linear(x, weight, bias);
  static const std::optional<Product> product = find_product();
  return product ? multiply(*product, x, weight, bias) : at::linear(x, weight, bias);
}

// The product with a transposed matrix would transpose it more slowly, and the bias needs its sums anyway.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(const at::Tensor& grad_out, const at::Tensor& input,
                                                               const at::Tensor& weight) {
  const at::Tensor g = grad_out.contiguous().view({-1, weight.size(0)}), x = input.contiguous().view({-1, weight.size(1)});
  TORCH_CHECK_VALUE(in_bfloat16(g.scalar_type()) && in_bfloat16(x.scalar_type()), "minidisp::linear takes bfloat16");
  const int64_t rows = g.size(0), columns = g.size(1);
  const at::Tensor transposed = at::empty({columns, rows}, g.options()), sums = at::empty({columns}, g.options().dtype(at::kFloat));
  const auto transpose = choose_kernels().bfloat16.transpose;
  at::parallel_for(0, (columns + 63) / 64, kGrain / (64 * std::max<int64_t>(rows, 1)) + 1, [&](int64_t begin, int64_t end) {
    transpose(g.const_data_ptr(), rows, columns, transposed.mutable_data_ptr(), sums.mutable_data_ptr<float>(), begin * 64,
              std::min(columns, end * 64));
  });
  return {at::mm(g, weight).view(input.sizes()), at::mm(transposed, x), sums};
}

}  // namespace
}  // namespace minidisp

TORCH_LIBRARY_IMPL(minidisp, CPU, m) {
  m.impl("norm", minidisp::norm);
  m.impl("norm_backward", minidisp::norm_backward);
  m.impl("rotate", minidisp::rotate);
  m.impl("rotate_backward", minidisp::rotate_backward);
  m.impl("squared_relu", minidisp::squared_relu);
  m.impl("squared_relu_backward", minidisp::squared_relu_backward);
  m.impl("lookup", minidisp::lookup);
  m.impl("lookup_backward", minidisp::lookup_backward);
  m.impl("linear", minidisp::linear);
  m.impl("linear_backward", minidisp::linear_backward);
}
