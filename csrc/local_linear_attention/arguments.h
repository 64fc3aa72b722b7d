#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

/// What every room of local_linear_attention hands to the next.
namespace mixhead::local_linear {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Names = c10::List<std::string>;

struct Arguments {
  Tensor query, key, value;
  OptionalTensor bandwidth;
  Names kernel;
  OptionalTensor attn_mask;
  bool is_causal, exclude_self;
  double ridge;
};

/// query, key, value, bandwidth, attn_mask.
constexpr size_t kDifferentiable = 5;
std::array<Tensor, kDifferentiable> differentiable(const Arguments& args);

constexpr size_t kOutputs = 4;
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // output, slope, leverage, log_mass
using Grads = std::array<Tensor, kOutputs>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using OutputMask = std::array<bool, kDifferentiable>;

/// Throws c10::Error naming the first argument that does not fit. Works on symbolic shapes; reads
/// values (the bandwidth's sign) only where the tensor has them.
void check(const Arguments& args);

/// Calls of the operators through the dispatcher.
Forward call_forward(const Arguments& args);
Gradients call_backward(const Grads& grads, const Arguments& args, OutputMask output_mask);

/// The portable path; on the CPU for what its engine does not do.
/// Whether some query may not read some key, and an operand or a gradient is not finite: then only
/// the portable path keeps what is excluded out.
bool reads_around_nan(const Arguments& args, at::TensorList grads);

/// The outputs in calls that PyTorch transforms.
Forward composite(const Arguments& args);

Forward forward_portable(const Arguments& args);
Gradients backward_portable(const Grads& grads, const Arguments& args, OutputMask output_mask);

/// Portable path: gradients of <second_order, backward(grads, args)> with respect to the incoming
/// gradients and the differentiable arguments, in that order.
std::vector<Tensor> double_backward(
    const Arguments& args, const Grads& grads,
    const std::array<Tensor, kDifferentiable>& second_order,
    const std::array<bool, kOutputs + kDifferentiable>& needed);

/// Of the public op and of the one below autograd.
using ForwardSignature = Forward(
    const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Names&,
    const OptionalTensor&, bool, bool, double);
using BackwardSignature = Gradients(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    const Tensor&, const OptionalTensor&, const Names&, const OptionalTensor&, bool, bool, double,
    OutputMask);

}  // namespace mixhead::local_linear
