#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/randint.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

/// What the autograd rooms of all ops share.
namespace mixhead::differentiate {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

template <size_t n>
bool any_requires_grad(const std::array<Tensor, n>& tensors) {
  for (const auto& tensor : tensors) {
    if (tensor.defined() && tensor.requires_grad()) return true;
  }
  return false;
}

/// Which of an op's differentiable arguments autograd asks a gradient for. Only arguments that are
/// present have an edge; those of these begin at `edge`.
template <size_t n>
std::array<bool, n> needed_gradients(
    torch::autograd::AutogradContext* ctx, const std::array<Tensor, n>& arguments,
    size_t edge = 0) {
  std::array<bool, n> needed{};
  for (size_t i = 0; i < n; ++i) {
    if (arguments[i].defined()) needed[i] = ctx->needs_input_grad(edge++);
  }
  return needed;
}

/// The same of a backward op: first its incoming gradients, then the op's arguments.
template <size_t incoming, size_t n>
std::array<bool, incoming + n> needed_second_gradients(
    torch::autograd::AutogradContext* ctx, const std::array<Tensor, n>& arguments) {
  std::array<bool, incoming + n> needed{};
  for (size_t i = 0; i < incoming; ++i) needed[i] = ctx->needs_input_grad(i);
  const auto of_arguments = needed_gradients(ctx, arguments, incoming);
  std::copy(of_arguments.begin(), of_arguments.end(), needed.begin() + incoming);
  return needed;
}

/// The first tensors of a list.
template <size_t n>
std::array<Tensor, n> first(const torch::autograd::variable_list& list) {
  std::array<Tensor, n> tensors;
  std::copy_n(list.begin(), n, tensors.begin());
  return tensors;
}

/// Gradients as autograd takes them.
template <class... Tensors>
torch::autograd::variable_list list_of(const std::tuple<Tensors...>& gradients) {
  return std::apply(
      [](const auto&... each) { return torch::autograd::variable_list{each...}; }, gradients);
}

/// The same of a function whose last argument, the op's `Arguments`, has no gradient; what was not
/// needed, of which a backward op gives an empty tensor, is undefined.
template <size_t n, class... Tensors>
torch::autograd::variable_list list_of(
    const std::tuple<Tensors...>& gradients, const std::array<bool, n>& needed) {
  auto list = list_of(gradients);
  for (size_t i = 0; i < n; ++i) {
    if (!needed[i]) list[i] = Tensor();
  }
  list.emplace_back();
  return list;
}

/// Dropout's randomness enters here, by PyTorch's generator; below, everything is a pure function.
inline OptionalTensor draw_seed(double dropout_p) {
  if (dropout_p == 0.0) return std::nullopt;
  return at::randint(
      0, std::numeric_limits<int64_t>::max(), {}, at::TensorOptions().dtype(at::kLong));
}

/// The identity of `tensor`, as if it depended on `variables`; its derivative is an error.
class Refuse : public torch::autograd::Function<Refuse> {
 public:
  static Tensor forward(
      torch::autograd::AutogradContext* ctx, const Tensor& tensor, at::TensorList /*variables*/,
      const std::string& message) {
    ctx->saved_data["message"] = message;
    return tensor.view_as(tensor);
  }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& /*grads*/) {
    TORCH_CHECK(false, ctx->saved_data["message"].toStringRef());
  }
};

/// Second derivatives are computed on detached parts of the arguments; where a graph of them is
/// asked for, this makes a third derivative an error instead of silently zero.
inline torch::autograd::variable_list refuse_third_derivative(
    const char* op, torch::autograd::variable_list gradients, at::TensorList variables) {
  if (!c10::GradMode::is_enabled()) return gradients;
  std::vector<Tensor> present;
  for (const auto& variable : variables) {
    if (variable.defined()) present.push_back(variable);
  }
  for (auto& gradient : gradients) {
    if (!gradient.defined()) continue;
    gradient = Refuse::apply(
        gradient, at::TensorList(present),
        std::string(op) + ": the third derivative is not available");
  }
  return gradients;
}

}  // namespace mixhead::differentiate
