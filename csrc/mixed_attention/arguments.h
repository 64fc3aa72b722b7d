#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

/// What every room of mixed_attention hands to the next: the arguments as they came, and the
/// differentiable ones in one fixed order.
namespace mixhead::mixed {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Arguments {
  Tensor query, key, value, memory_key, memory_value, mix;
  std::string_view rule;  // "gate" or "joint"
  OptionalTensor attn_mask, memory_mask, memory_index;
  double dropout_p;
  OptionalTensor seed;  // int64 scalar on the CPU; present exactly where dropout_p > 0
  bool is_causal;
  std::optional<double> scale;
  bool enable_gqa;

  bool joint() const { return rule == "joint"; }
  double scale_or_default() const;
};

/// Whether some query may not read some key.
bool excludes(const Arguments& args);
/// query, key, value, memory_key, memory_value: what may hold NaN that a row may not read.
std::array<Tensor, 5> operands(const Arguments& args);

/// query, key, value, memory_key, memory_value, mix, attn_mask, memory_mask.
constexpr size_t kDifferentiable = 8;
std::array<Tensor, kDifferentiable> differentiable(const Arguments& args);
Arguments with_differentiable(Arguments args, const std::array<Tensor, kDifferentiable>& tensors);

/// output, self_lse, memory_lse, and what the backward reads: self_output, memory_output.
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using OutputMask = std::array<bool, kDifferentiable>;

/// Throws c10::Error naming the first argument that does not fit. Works on symbolic shapes; reads
/// values (memory_index's range) only where the tensor has them.
void check(const Arguments& args);

/// Whether self_output and memory_output are wanted; see library.cpp.
std::array<bool, 2> kept_outputs(const Arguments& args, bool for_backward);

/// Calls of the operators through the dispatcher.
Forward call_forward(const Arguments& args, bool for_backward);
Gradients call_backward(
    const std::array<Tensor, 3>& grads, const Arguments& args, const Forward& forward,
    OutputMask output_mask);

/// Portable path, for checked arguments.
Forward forward_portable(const Arguments& args, bool for_backward);
Gradients backward_portable(
    const std::array<Tensor, 3>& grads, const Arguments& args, OutputMask output_mask);

/// output, self_lse, memory_lse in calls that PyTorch transforms; dropout draws from its generator.
std::tuple<Tensor, Tensor, Tensor> composite(const Arguments& args);

/// Portable path: gradients of <second_order, backward(grads, args)> with respect to the three
/// incoming gradients and the differentiable arguments, in that order.
std::vector<Tensor> double_backward(
    const Arguments& args, const std::array<Tensor, 3>& grads,
    const std::array<Tensor, kDifferentiable>& second_order,
    const std::array<bool, 3 + kDifferentiable>& needed);

/// The signature that every kernel of mixhead::mixed_attention has.
using PublicSignature = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    std::string_view, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double,
    bool, std::optional<double>, bool);

/// The signature that every kernel of mixhead::_mixed_attention_forward has.
using ForwardSignature = Forward(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    std::string_view, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double,
    const OptionalTensor&, bool, std::optional<double>, bool, bool);

/// The signature that every kernel of mixhead::_mixed_attention_backward has.
using BackwardSignature = Gradients(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    const Tensor&, const Tensor&, const Tensor&, std::string_view, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, double, const OptionalTensor&, bool,
    std::optional<double>, bool, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    const Tensor&, std::array<bool, 8>);

}  // namespace mixhead::mixed
