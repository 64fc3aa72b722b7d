#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

/// What every room of kernel_attention hands to the next.
namespace mixhead::kernels {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Names = c10::List<std::string>;

struct Arguments {
  Tensor query, key, value;
  OptionalTensor bandwidth;
  Names kernel;
  OptionalTensor attn_mask;
  bool is_causal, exclude_self, normalize;
  std::string_view empty;  // "zero", "nan" or "nearest"
  double dropout_p;
  OptionalTensor seed;  // int64 scalar on the CPU; present exactly where dropout_p > 0
  bool enable_gqa;
};

/// Whether some query may not read some key.
bool excludes(const Arguments& args);

/// query, key, value, bandwidth, attn_mask.
constexpr size_t kDifferentiable = 5;
std::array<Tensor, kDifferentiable> differentiable(const Arguments& args);

using Forward = std::tuple<Tensor, Tensor>;  // output, log_mass
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using OutputMask = std::array<bool, kDifferentiable>;

/// Throws c10::Error naming the first argument that does not fit. Works on symbolic shapes; reads
/// values (the bandwidth's sign) only where the tensor has them.
void check(const Arguments& args);

/// Calls of the operators through the dispatcher.
Forward call_forward(const Arguments& args);
Gradients call_backward(
    const std::array<Tensor, 2>& grads, const Arguments& args, const Forward& forward,
    OutputMask output_mask);

/// Portable path, for checked arguments.
Forward forward_portable(const Arguments& args);
Gradients backward_portable(
    const std::array<Tensor, 2>& grads, const Arguments& args, OutputMask output_mask);

/// output, log_mass in calls that PyTorch transforms; dropout draws from its generator.
Forward composite(const Arguments& args);

/// Portable path: gradients of <second_order, backward(grads, args)> with respect to the two
/// incoming gradients and the differentiable arguments, in that order.
std::vector<Tensor> double_backward(
    const Arguments& args, const std::array<Tensor, 2>& grads,
    const std::array<Tensor, kDifferentiable>& second_order,
    const std::array<bool, 2 + kDifferentiable>& needed);

using PublicSignature = Forward(
    const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Names&,
    const OptionalTensor&, bool, bool, bool, std::string_view, double, bool);
using ForwardSignature = Forward(
    const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Names&,
    const OptionalTensor&, bool, bool, bool, std::string_view, double, const OptionalTensor&, bool);
using BackwardSignature = Gradients(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    const OptionalTensor&, const Names&, const OptionalTensor&, bool, bool, bool, std::string_view,
    double, const OptionalTensor&, bool, const Tensor&, const Tensor&, std::array<bool, 5>);

}  // namespace mixhead::kernels
