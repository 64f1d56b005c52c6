// The operators on the CPU as torch calls them: checks, outputs, and the kernels of this folder, which know no torch.
// Schemas and shapes are in minidisp/ops/, and so are the gradients but those of the layers, which are at the end of
// this file.
//
// This is the only file that includes torch's headers, which take longer to compile than all kernels together.

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../checks.h"
#include "attention.h"
#include "dispersion.h"
#include "host.h"
#include "layers.h"

// Declared here, as <ATen/autocast_mode.h> takes longer to compile than this file.
namespace at::autocast {
TORCH_API bool is_autocast_enabled(at::DeviceType device_type);
TORCH_API at::ScalarType get_autocast_dtype(at::DeviceType device_type);
TORCH_API at::Tensor cached_cast(at::ScalarType to_type, const at::Tensor& arg, at::DeviceType device_type);
}  // namespace at::autocast

namespace minidisp {

using at::Tensor;
using torch::jit::Stack;

// What the kernels ask for: host.h

namespace {

// Of the processor.
InstructionSet processor_instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return InstructionSet::amx;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "amx"};

}  // namespace

InstructionSet best_instruction_set() {
  static const InstructionSet all = processor_instruction_set();
  InstructionSet most = all;
  if (const char* value = std::getenv("MINIDISP_CPU"); value != nullptr && *value != 0) {
    const auto* const found = std::find(std::begin(kNames), std::end(kNames), std::string_view(value));
    TORCH_CHECK_VALUE(found != std::end(kNames), "MINIDISP_CPU is ", value,
                      ", but must be baseline, avx2, avx512 or amx");
    most = std::min(all, static_cast<InstructionSet>(found - kNames));
  }
#if defined(MINIDISP_ONLY)
  constexpr auto only = static_cast<InstructionSet>(MINIDISP_ONLY);
  TORCH_CHECK_VALUE(most >= std::min(only, InstructionSet::avx512), "the extension was compiled for ",
                    kNames[MINIDISP_ONLY], " alone, not for ", kNames[static_cast<int>(most)],
                    ": set MINIDISP_CPU before the start");
  return std::min(most, only);
#else
  return most;
#endif
}

int64_t threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

void run_in_parallel(int64_t begin, int64_t end, int64_t grain, void (*call)(const void*, int64_t, int64_t),
                     const void* function) {
  at::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) { call(function, first, last); });
}

Memory::Memory(int64_t bytes) {
  auto* const tensor = new at::Tensor(at::empty({bytes}, at::kByte));
  owner_ = tensor;
  data_ = tensor->mutable_data_ptr();
}
Memory::~Memory() { delete static_cast<at::Tensor*>(owner_); }

namespace {

// The dispersion loss

// Returns the loss, its gradient or nothing, and nothing: minidisp/ops/dispersion.py.
std::tuple<at::Tensor, at::Tensor, at::Tensor> dispersion_loss(const at::Tensor& z, c10::string_view variant,
                                                               double tau, double clamp, double eps, bool need_grad) {
  const Options options = checked_options(z, variant, tau, clamp, eps);
  const bool may_round = at::autocast::is_autocast_enabled(at::kCPU) || allows_rounding([] {
                           return at::globalContext().float32MatmulPrecision() != at::Float32MatmulPrecision::HIGHEST;
                         });
  const at::TensorOptions floats = z.options().dtype(at::kFloat);
  const at::Tensor grad = at::empty(need_grad ? z.sizes() : at::IntArrayRef({0}), floats);
  const double loss =
      dispersion(token_vectors(z), options, may_round, need_grad ? grad.mutable_data_ptr<float>() : nullptr);
  const at::Tensor value = at::empty({}, floats);
  *value.mutable_data_ptr<float>() = static_cast<float>(loss);  // at::full would refuse what overflows
  return {value, grad, at::empty({0}, floats)};
}

// Causal attention

AttentionCall checked_call(const at::Tensor& qkv, int64_t n_head, int64_t n_kv_head) {
  TORCH_CHECK_VALUE(qkv.scalar_type() == at::kFloat || qkv.scalar_type() == at::kBFloat16,
                    "minidisp::causal_attention takes float32 and bfloat16, not ", qkv.scalar_type());
  TORCH_CHECK_VALUE(n_kv_head >= 1 && n_head >= 1 && n_head % n_kv_head == 0, "n_head ", n_head,
                    " must be a multiple of n_kv_head ", n_kv_head);
  const int64_t heads = n_head + 2 * n_kv_head;
  TORCH_CHECK_VALUE(qkv.dim() == 3 && qkv.size(2) > 0 && qkv.size(2) % heads == 0,
                    "qkv must be (B, T, (n_head + 2 n_kv_head) D) with ", heads, " heads in all, not ", qkv.sizes());
  const int64_t D = qkv.size(2) / heads;
  TORCH_CHECK_VALUE(D <= 256, "minidisp::causal_attention takes heads of up to 256 channels, not ", D);
  AttentionCall call{};
  call.type = type_of(qkv), call.B = qkv.size(0), call.T = qkv.size(1), call.D = D, call.n_head = n_head,
  call.n_kv_head = n_kv_head;
  return call;
}

// Rows may be anywhere, the features of a row must lie side by side.
at::Tensor with_rows(const at::Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : x.contiguous(); }

void set_tensors(AttentionCall& call, const at::Tensor& qkv, const at::Tensor& out, const at::Tensor& lse) {
  call.qkv = qkv.const_data_ptr(), call.qkv_stride[0] = qkv.stride(0), call.qkv_stride[1] = qkv.stride(1);
  call.out = out.data_ptr(), call.out_stride[0] = out.stride(0), call.out_stride[1] = out.stride(1);
  call.lse = static_cast<float*>(lse.data_ptr());
}

std::tuple<at::Tensor, at::Tensor> causal_attention(const at::Tensor& packed, int64_t n_head, int64_t n_kv_head) {
  AttentionCall call = checked_call(packed, n_head, n_kv_head);
  const at::Tensor qkv = with_rows(packed);
  const at::Tensor out = at::empty({call.B, call.T, n_head * call.D}, qkv.options());
  const at::Tensor lse = at::empty({call.B, n_head, call.T}, qkv.options().dtype(at::kFloat));
  set_tensors(call, qkv, out, lse);
  attention(call);
  return {out, lse};
}

at::Tensor causal_attention_backward(const at::Tensor& grad_out, const at::Tensor& packed, const at::Tensor& out,
                                     const at::Tensor& lse, int64_t n_head, int64_t n_kv_head) {
  AttentionCall call = checked_call(packed, n_head, n_kv_head);
  TORCH_CHECK_VALUE(grad_out.sizes() == out.sizes() && grad_out.scalar_type() == packed.scalar_type(),
                    "the gradient must be as the output, ", out.sizes(), " of ", packed.scalar_type(), ", not ",
                    grad_out.sizes(), " of ", grad_out.scalar_type());
  const at::Tensor qkv = with_rows(packed), g = grad_out.contiguous(), o = out.contiguous(), l = lse.contiguous();
  const at::Tensor grad = at::empty(qkv.sizes(), qkv.options());
  set_tensors(call, qkv, o, l);
  call.grad_out = g.const_data_ptr();
  call.grad = grad.mutable_data_ptr(), call.grad_stride[0] = grad.stride(0), call.grad_stride[1] = grad.stride(1);
  attention(call);
  return grad;
}

// Under autocast: in its dtype, as scaled_dot_product_attention.
void attention_autocast(const c10::OperatorHandle& op, Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  c10::IValue& qkv = stack->at(stack->size() - 3);
  qkv = at::autocast::cached_cast(at::autocast::get_autocast_dtype(at::kCPU), qkv.toTensor(), at::kCPU);
  op.callBoxed(stack);
}

std::string instruction_set() {
  switch (best_instruction_set()) {
    case InstructionSet::amx: return amx_kernels() != nullptr ? "amx" : "avx512";
    case InstructionSet::avx512: return "avx512";
    case InstructionSet::avx2: return "avx2";
    default: return "baseline";
  }
}

// What a block computes besides matrix products and attention, each in one pass over memory, forward and backward.
// Gradients of weights are summed by each thread for itself and then over the threads, in their order.

constexpr int64_t kGrain = 1 << 15;  // numbers that are worth a thread

bool in_bfloat16(at::ScalarType type) {
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16,
                    "minidisp computes layers in float32 and bfloat16, not ", type);
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

at::Tensor norm(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, double eps,
                bool centred, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(input.dim() >= 1 && input.size(-1) > 0, "a norm takes rows of numbers, not ", input.sizes());
  const at::Tensor x = input.contiguous(), w = weights(weight, x.size(-1));
  const at::Tensor b = bias ? weights(*bias, x.size(-1)) : at::Tensor();
  const at::Tensor out = at::empty(x.sizes(), x.options().dtype(dtype));
  NormWork n{};
  n.width = x.size(-1), n.eps = static_cast<float>(eps), n.centred = centred;
  n.x = x.const_data_ptr(), n.weight = w.const_data_ptr<float>(), n.bias = bias ? b.const_data_ptr<float>() : nullptr;
  n.out = out.mutable_data_ptr();
  const LayerKernels& k = layer_kernels().norms[in_bfloat16(x.scalar_type())][in_bfloat16(dtype)];
  at::parallel_for(0, x.numel() / n.width, kGrain / n.width + 1,
                   [&](int64_t begin, int64_t end) { k.norm(n, begin, end); });
  return out;
}

std::tuple<at::Tensor, at::Tensor> norm_backward(const at::Tensor& grad_out, const at::Tensor& input,
                                                 const at::Tensor& weight, double eps, bool centred) {
  const at::Tensor x = input.contiguous(), g = grad_out.contiguous(), w = weights(weight, x.size(-1));
  TORCH_CHECK_VALUE(g.sizes() == x.sizes(), "the gradient must be ", x.sizes(), ", not ", g.sizes());
  const at::Tensor grad = at::empty(x.sizes(), x.options());
  NormWork n{};
  n.width = x.size(-1), n.eps = static_cast<float>(eps), n.centred = centred;
  n.x = x.const_data_ptr(), n.weight = w.const_data_ptr<float>(), n.grad = g.const_data_ptr(),
  n.grad_x = grad.mutable_data_ptr();
  const LayerKernels& k = layer_kernels().norms[in_bfloat16(x.scalar_type())][in_bfloat16(g.scalar_type())];
  const auto pass = [&](int64_t begin, int64_t end, float* sums) { k.norm_backward(n, begin, end, sums); };
  return {grad, summed(x.numel() / n.width, n.width, n.width, pass)};
}

RotateWork rotate_work(const at::Tensor& qkv, const at::Tensor& q_weight, const at::Tensor& k_weight,
                       const at::Tensor& cos, const at::Tensor& sin, int64_t n_head, int64_t n_kv_head, double eps) {
  TORCH_CHECK_VALUE(
      n_head >= 1 && n_kv_head >= 1 && qkv.dim() == 3 && qkv.size(2) > 0 && qkv.size(2) % (n_head + 2 * n_kv_head) == 0,
      "qkv must be (B, T, (n_head + 2 n_kv_head) D), not ", qkv.sizes());
  RotateWork r{};
  r.n_head = n_head, r.n_kv_head = n_kv_head, r.width = qkv.size(2) / (n_head + 2 * n_kv_head), r.tokens = qkv.size(1);
  TORCH_CHECK_VALUE(r.width % 2 == 0, "rotary positions need an even number of channels, not ", r.width);
  for (const at::Tensor* table : {&cos, &sin})
    TORCH_CHECK_VALUE(table->dim() == 2 && table->size(0) == r.tokens && table->size(1) == r.width &&
                          table->scalar_type() == at::kFloat && table->is_contiguous(),
                      "rotations must be contiguous float32 (", r.tokens, ", ", r.width, "), not ", table->sizes());
  r.eps = static_cast<float>(eps);
  r.qkv = qkv.const_data_ptr(), r.q_weight = q_weight.const_data_ptr<float>(),
  r.k_weight = k_weight.const_data_ptr<float>();
  r.cos = cos.const_data_ptr<float>(), r.sin = sin.const_data_ptr<float>();
  return r;
}

int64_t head_width(const at::Tensor& qkv, int64_t n_head, int64_t n_kv_head) {
  return n_head + 2 * n_kv_head > 0 && qkv.dim() == 3 ? qkv.size(2) / (n_head + 2 * n_kv_head) : 0;
}

at::Tensor rotate(const at::Tensor& packed, const at::Tensor& q_weight, const at::Tensor& k_weight,
                  const at::Tensor& cos, const at::Tensor& sin, int64_t n_head, int64_t n_kv_head, double eps) {
  const int64_t D = head_width(packed, n_head, n_kv_head);
  const at::Tensor qkv = packed.contiguous(), q = weights(q_weight, D), k = weights(k_weight, D);
  RotateWork r = rotate_work(qkv, q, k, cos, sin, n_head, n_kv_head, eps);
  const at::Tensor out = at::empty(qkv.sizes(), qkv.options());
  r.out = out.mutable_data_ptr();
  const RowKernels& kernels = layer_kernels().rows[in_bfloat16(qkv.scalar_type())];
  at::parallel_for(0, qkv.size(0) * r.tokens, kGrain / qkv.size(2) + 1,
                   [&](int64_t begin, int64_t end) { kernels.rotate(r, begin, end); });
  return out;
}

std::tuple<at::Tensor, at::Tensor> rotate_backward(const at::Tensor& grad_out, const at::Tensor& packed,
                                                   const at::Tensor& q_weight, const at::Tensor& k_weight,
                                                   const at::Tensor& cos, const at::Tensor& sin, int64_t n_head,
                                                   int64_t n_kv_head, double eps) {
  const int64_t D = head_width(packed, n_head, n_kv_head);
  const at::Tensor qkv = packed.contiguous(), g = grad_out.contiguous(), q = weights(q_weight, D),
                   k = weights(k_weight, D);
  RotateWork r = rotate_work(qkv, q, k, cos, sin, n_head, n_kv_head, eps);
  TORCH_CHECK_VALUE(g.sizes() == qkv.sizes() && g.scalar_type() == qkv.scalar_type(),
                    "the gradient must be as the input, ", qkv.sizes(), " of ", qkv.scalar_type(), ", not ", g.sizes(),
                    " of ", g.scalar_type());
  const at::Tensor grad = at::empty(qkv.sizes(), qkv.options());
  r.grad = g.const_data_ptr(), r.grad_qkv = grad.mutable_data_ptr();
  const RowKernels& kernels = layer_kernels().rows[in_bfloat16(qkv.scalar_type())];
  const auto pass = [&](int64_t begin, int64_t end, float* sums) { kernels.rotate_backward(r, begin, end, sums); };
  return {grad, summed(qkv.size(0) * r.tokens, qkv.size(2), D, pass)};
}

at::Tensor squared_relu(const at::Tensor& input) {
  const at::Tensor x = input.contiguous(), out = at::empty(x.sizes(), x.options());
  const RowKernels& k = layer_kernels().rows[in_bfloat16(x.scalar_type())];
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    k.squared_relu(x.const_data_ptr(), out.mutable_data_ptr(), begin, end);
  });
  return out;
}

at::Tensor squared_relu_backward(const at::Tensor& grad_out, const at::Tensor& input) {
  const at::Tensor x = input.contiguous(), g = grad_out.contiguous(), out = at::empty(x.sizes(), x.options());
  TORCH_CHECK_VALUE(g.sizes() == x.sizes() && g.scalar_type() == x.scalar_type(), "the gradient must be as the input");
  const RowKernels& k = layer_kernels().rows[in_bfloat16(x.scalar_type())];
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    k.squared_relu_backward(g.const_data_ptr(), x.const_data_ptr(), out.mutable_data_ptr(), begin, end);
  });
  return out;
}

// A function of one bfloat16 number takes 65,536 values: reading them from a table is faster than computing them, and
// exact.
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
  const auto backward = layer_kernels().bfloat16.lookup_backward;
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    backward(g.const_data_ptr(), x.const_data_ptr(), slopes.const_data_ptr<float>(), out.mutable_data_ptr(), begin,
             end);
  });
  return out;
}

// oneDNN's product, or nothing where it has none for bfloat16: that is seen by trying, since it goes by more than the
// processor.
using Product = c10::OperatorHandle;

Tensor multiply(const Product& product, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  Stack stack{x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), ""};
  product.callBoxed(stack);
  return stack[0].toTensor();
}

std::optional<Product> find_product() {
  const auto product = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  if (!product) return std::nullopt;
  const Tensor tried = at::zeros({16, 16}, at::kBFloat16);
  try {
    multiply(*product, tried, tried, std::nullopt);
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
  const at::Tensor g = grad_out.contiguous().view({-1, weight.size(0)}),
                   x = input.contiguous().view({-1, weight.size(1)});
  TORCH_CHECK_VALUE(in_bfloat16(g.scalar_type()) && in_bfloat16(x.scalar_type()), "minidisp::linear takes bfloat16");
  const int64_t rows = g.size(0), columns = g.size(1);
  const at::Tensor transposed = at::empty({columns, rows}, g.options()),
                   sums = at::empty({columns}, g.options().dtype(at::kFloat));
  const auto transpose = layer_kernels().bfloat16.transpose;
  at::parallel_for(0, (columns + 63) / 64, kGrain / (64 * std::max<int64_t>(rows, 1)) + 1,
                   [&](int64_t begin, int64_t end) {
                     transpose(g.const_data_ptr(), rows, columns, transposed.mutable_data_ptr(),
                               sums.mutable_data_ptr<float>(), begin * 64, std::min(columns, end * 64));
                   });
  return {at::mm(g, weight).view(input.sizes()), at::mm(transposed, x), sums};
}

// Gradients of the layers, in C++: they are called so often that Python's way would show in a step.

using torch::autograd::variable_list;

// Calls an operator of ours. Its results are left on the stack.
Stack call(const char* name, Stack arguments) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  op.callBoxed(arguments);
  return arguments;
}

// Sums of gradients, row `row` of (2, width), in the dtype of the weight that they are of.
Tensor gradient_of(const Tensor& weight, const c10::IValue& sums, int64_t row) {
  return sums.toTensor().select(0, row).to(weight.scalar_type());
}

// The gradients of an operator's arguments, of which it is told all; undefined ones for those that have none.
using Backward = void (*)(const Tensor& grad, const Stack& arguments, variable_list& gradients);

void norm_gradients(const Tensor& grad, const Stack& a, variable_list& gradients) {
  const Stack out = call("minidisp::norm_backward", {grad, a[0], a[1], a[3], a[4]});
  gradients[0] = out[0].toTensor();
  gradients[1] = gradient_of(a[1].toTensor(), out[1], 0);
  if (!a[2].isNone()) gradients[2] = gradient_of(a[1].toTensor(), out[1], 1);
}
void rotate_gradients(const Tensor& grad, const Stack& a, variable_list& gradients) {
  const Stack out = call("minidisp::rotate_backward", {grad, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]});
  gradients[0] = out[0].toTensor();
  gradients[1] = gradient_of(a[1].toTensor(), out[1], 0);
  gradients[2] = gradient_of(a[2].toTensor(), out[1], 1);
}
void squared_relu_gradients(const Tensor& grad, const Stack& a, variable_list& gradients) {
  gradients[0] = call("minidisp::squared_relu_backward", {grad, a[0]})[0].toTensor();
}
void lookup_gradients(const Tensor& grad, const Stack& a, variable_list& gradients) {
  gradients[0] = call("minidisp::lookup_backward", {grad, a[0], a[2]})[0].toTensor();
}
void linear_gradients(const Tensor& grad, const Stack& a, variable_list& gradients) {
  const Stack out = call("minidisp::linear_backward", {grad, a[0], a[1]});
  gradients[0] = out[0].toTensor(), gradients[1] = out[1].toTensor();
  if (!a[2].isNone()) gradients[2] = out[2].toTensor().to(a[2].toTensor().scalar_type());
}

// A recorded call: an operator's arguments, kept for backward. Autograd does not see what that computes, which
// create_graph=True would need. torch::autograd::Function does the same, but what it instantiates takes longer to
// compile than all of this file.
struct Recorded final : torch::autograd::Node {
  Backward gradients_of = nullptr;
  Stack others;                // the arguments, with None for the tensors
  std::vector<size_t> places;  // of the tensors
  std::vector<torch::autograd::SavedVariable> tensors;
  bool released = false;

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(
        !at::GradMode::is_enabled(),
        "minidisp's layers have no second derivative: for create_graph=True set MINIDISP_FUSED=0 before the start");
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    variable_list of_tensors(places.size());
    if (!grads[0].defined()) return of_tensors;
    Stack arguments = others;
    for (size_t i = 0; i < places.size(); ++i) arguments[places[i]] = tensors[i].unpack();
    variable_list gradients(arguments.size());
    gradients_of(grads[0], arguments, gradients);
    for (size_t i = 0; i < places.size(); ++i) of_tensors[i] = gradients[places[i]];
    return of_tensors;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    released = true;
    tensors.clear();
  }
};

// torch holds nodes by c10::intrusive_ptr; before 2.13, by std::shared_ptr.
using NodePointer = decltype(torch::autograd::Edge::function);
template <class Pointer>
Pointer new_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) return std::make_shared<Recorded>();
  else return c10::make_intrusive<Recorded>();
}

template <Backward kBackward>
void recorded(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const Stack arguments(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
  variable_list tensors;
  for (const c10::IValue& argument : arguments)
    if (argument.isTensor()) tensors.push_back(argument.toTensor());
  for (const Tensor& tensor : tensors)
    TORCH_CHECK(!tensor._fw_grad(/*level=*/0).defined(),
                "minidisp's layers have no forward-mode derivative: set MINIDISP_FUSED=0 before the start");
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(*stack);
  }
  if (!at::GradMode::is_enabled() || !torch::autograd::any_variable_requires_grad(tensors)) return;
  const NodePointer pointer = new_node<NodePointer>();
  auto& node = static_cast<Recorded&>(*pointer);
  node.gradients_of = kBackward;
  node.set_next_edges(torch::autograd::collect_next_edges(tensors));
  node.others = arguments;
  for (size_t i = 0; i < count; ++i) {
    if (!arguments[i].isTensor()) continue;
    node.places.push_back(i);
    node.tensors.emplace_back(arguments[i].toTensor(), /*is_output=*/false);
    node.others[i] = c10::IValue();
  }
  Tensor out = stack->back().toTensor();
  torch::autograd::create_gradient_edge(out, pointer);
}

// Registration. A function is wrapped to take its arguments from the dispatcher's stack here: torch's own wrappers,
// which also serve callers in C++, would take longer to compile than all of this file.

template <class T>
T argument_as(const c10::IValue& value) {
  using Plain = std::decay_t<T>;
  if constexpr (std::is_same_v<Plain, Tensor>) return value.toTensor();
  else if constexpr (std::is_same_v<Plain, std::optional<Tensor>>)
    return value.isNone() ? Plain() : Plain(value.toTensor());
  else if constexpr (std::is_same_v<Plain, double>) return value.toDouble();
  else if constexpr (std::is_same_v<Plain, int64_t>) return value.toInt();
  else if constexpr (std::is_same_v<Plain, bool>) return value.toBool();
  else if constexpr (std::is_same_v<Plain, at::ScalarType>) return value.toScalarType();
  else return value.toStringView();
}

template <class... Results>
void push(Stack& stack, const std::tuple<Results...>& results) {
  std::apply([&](const auto&... result) { (stack.emplace_back(result), ...); }, results);
}
template <class Result>
void push(Stack& stack, const Result& result) {
  stack.emplace_back(result);
}

template <class Result, class... Arguments, size_t... I>
void call_with(Result (*function)(Arguments...), Stack& stack, std::index_sequence<I...>) {
  constexpr size_t count = sizeof...(Arguments);
  const size_t first = stack.size() - count;
  const Result result = function(argument_as<std::decay_t<Arguments>>(stack[first + I])...);
  torch::jit::drop(stack, count);
  push(stack, result);
}
template <class Result, class... Arguments>
void call_on(Result (*function)(Arguments...), Stack& stack) {
  call_with(function, stack, std::index_sequence_for<Arguments...>());
}

template <auto kFunction>
void boxed(const c10::OperatorHandle& /*op*/, Stack* stack) {
  call_on(kFunction, *stack);
}

}  // namespace
}  // namespace minidisp

#define MINIDISP_IMPL(name, function) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&minidisp::function>())

TORCH_LIBRARY_IMPL(minidisp, CompositeExplicitAutograd, m) {
  MINIDISP_IMPL("instruction_set", boxed<minidisp::instruction_set>);
}

TORCH_LIBRARY_IMPL(minidisp, CPU, m) {
  MINIDISP_IMPL("dispersion", boxed<minidisp::dispersion_loss>);
  MINIDISP_IMPL("causal_attention", boxed<minidisp::causal_attention>);
  MINIDISP_IMPL("causal_attention_backward", boxed<minidisp::causal_attention_backward>);
  MINIDISP_IMPL("norm", boxed<minidisp::norm>);
  MINIDISP_IMPL("norm_backward", boxed<minidisp::norm_backward>);
  MINIDISP_IMPL("rotate", boxed<minidisp::rotate>);
  MINIDISP_IMPL("rotate_backward", boxed<minidisp::rotate_backward>);
  MINIDISP_IMPL("squared_relu", boxed<minidisp::squared_relu>);
  MINIDISP_IMPL("squared_relu_backward", boxed<minidisp::squared_relu_backward>);
  MINIDISP_IMPL("lookup", boxed<minidisp::lookup>);
  MINIDISP_IMPL("lookup_backward", boxed<minidisp::lookup_backward>);
  MINIDISP_IMPL("linear", boxed<minidisp::linear>);
  MINIDISP_IMPL("linear_backward", boxed<minidisp::linear_backward>);
}

TORCH_LIBRARY_IMPL(minidisp, AutocastCPU, m) { MINIDISP_IMPL("causal_attention", attention_autocast); }

TORCH_LIBRARY_IMPL(minidisp, Autograd, m) {
  MINIDISP_IMPL("norm", recorded<minidisp::norm_gradients>);
  MINIDISP_IMPL("rotate", recorded<minidisp::rotate_gradients>);
  MINIDISP_IMPL("squared_relu", recorded<minidisp::squared_relu_gradients>);
  MINIDISP_IMPL("lookup", recorded<minidisp::lookup_gradients>);
  MINIDISP_IMPL("linear", recorded<minidisp::linear_gradients>);
}
