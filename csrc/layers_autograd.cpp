// The gradients of the operators in layers_cpu.cpp, in C++: they are called so often that Python's way would be seen in a step.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace minidisp {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Maybe = std::optional<Tensor>;

// The operator of that name, of any device.
#define MINIDISP_OP(name, ...) \
  ([]() -> const auto& {       \
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("minidisp::" name, "").typed<__VA_ARGS__>(); \
    return op;                 \
  }())

// What a backward pass gets from forward. Autograd does not see what it then computes, which create_graph=True would need.
variable_list saved_by(AutogradContext* ctx) {
  TORCH_CHECK(!at::GradMode::is_enabled(),
              "minidisp's layers have no second derivative: for create_graph=True set MINIDISP_FUSED=0 before the start");
  return ctx->get_saved_variables();
}

struct Norm : torch::autograd::Function<Norm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Maybe& bias, double eps, bool centred,
                        at::ScalarType dtype) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, weight});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["centred"] = centred;
    ctx->saved_data["bias"] = bias.has_value();
    const auto& op = MINIDISP_OP("norm", Tensor(const Tensor&, const Tensor&, const Maybe&, double, bool, at::ScalarType));
    return op.call(x, weight, bias, eps, centred, dtype);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = saved_by(ctx);
    const auto& op = MINIDISP_OP(
        "norm_backward", std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double, bool));
    const auto [grad, sums] =
        op.call(grads[0], saved[0], saved[1], ctx->saved_data["eps"].toDouble(), ctx->saved_data["centred"].toBool());
    const Tensor none;
    return {grad, sums[0].to(saved[1].scalar_type()), ctx->saved_data["bias"].toBool() ? sums[1].to(saved[1].scalar_type()) : none, none,
            none, none};
  }
};

struct Rotate : torch::autograd::Function<Rotate> {
  static Tensor forward(AutogradContext* ctx, const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight, const Tensor& cos,
                        const Tensor& sin, int64_t n_head, int64_t n_kv_head, double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({qkv, q_weight, k_weight, cos, sin});
    ctx->saved_data["n_head"] = n_head;
    ctx->saved_data["n_kv_head"] = n_kv_head;
    ctx->saved_data["eps"] = eps;
    const auto& op = MINIDISP_OP("rotate", Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                                                  int64_t, double));
    return op.call(qkv, q_weight, k_weight, cos, sin, n_head, n_kv_head, eps);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = saved_by(ctx);
    const auto& op =
        MINIDISP_OP("rotate_backward", std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                                  const Tensor&, const Tensor&, int64_t, int64_t, double));
    const auto [grad, sums] =
        op.call(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], ctx->saved_data["n_head"].toInt(),
                ctx->saved_data["n_kv_head"].toInt(), ctx->saved_data["eps"].toDouble());
    const Tensor none;
    return {grad, sums[0].to(saved[1].scalar_type()), sums[1].to(saved[2].scalar_type()), none, none, none, none, none};
  }
};

struct SquaredRelu : torch::autograd::Function<SquaredRelu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x});
    return MINIDISP_OP("squared_relu", Tensor(const Tensor&)).call(x);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {MINIDISP_OP("squared_relu_backward", Tensor(const Tensor&, const Tensor&)).call(grads[0], saved_by(ctx)[0])};
  }
};

struct Lookup : torch::autograd::Function<Lookup> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& values, const Tensor& slopes) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, slopes});
    return MINIDISP_OP("lookup", Tensor(const Tensor&, const Tensor&, const Tensor&)).call(x, values, slopes);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = saved_by(ctx);
    const auto& op = MINIDISP_OP("lookup_backward", Tensor(const Tensor&, const Tensor&, const Tensor&));
    return {op.call(grads[0], saved[0], saved[1]), Tensor(), Tensor()};
  }
};

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Maybe& bias) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, weight});
    ctx->saved_data["bias"] = bias ? static_cast<int64_t>(bias->scalar_type()) : -1;
    return MINIDISP_OP("linear", Tensor(const Tensor&, const Tensor&, const Maybe&)).call(x, weight, bias);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = saved_by(ctx);
    const auto& op =
        MINIDISP_OP("linear_backward", std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&));
    const auto [grad, weight, sums] = op.call(grads[0], saved[0], saved[1]);
    const int64_t bias = ctx->saved_data["bias"].toInt();
    return {grad, weight, bias < 0 ? Tensor() : sums.to(static_cast<at::ScalarType>(bias))};
  }
};

template <class Function, class... Arguments>
Tensor apply(Arguments... arguments) {
  return Function::apply(arguments...);
}

}  // namespace
}  // namespace minidisp

TORCH_LIBRARY_IMPL(minidisp, Autograd, m) {
  using namespace minidisp;
  m.impl("norm", apply<Norm, const Tensor&, const Tensor&, const Maybe&, double, bool, at::ScalarType>);
  m.impl("rotate", apply<Rotate, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, double>);
  m.impl("squared_relu", apply<SquaredRelu, const Tensor&>);
  m.impl("lookup", apply<Lookup, const Tensor&, const Tensor&, const Tensor&>);
  m.impl("linear", apply<Linear, const Tensor&, const Tensor&, const Maybe&>);
}
