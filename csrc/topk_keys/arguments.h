#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "cpu/topk.h"

/// What every room of topk_keys hands to the next.
namespace mixhead::topk {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

using cpu::Metric;
std::optional<Metric> metric_named(std::string_view name);

struct Arguments {
  Tensor query, key;
  int64_t k;
  OptionalTensor mask;
  std::string_view metric;
};

/// query, key, mask.
constexpr size_t kDifferentiable = 3;
std::array<Tensor, kDifferentiable> differentiable(const Arguments& args);

using Forward = std::tuple<Tensor, Tensor>;  // scores, indices
using Gradients = std::tuple<Tensor, Tensor, Tensor>;
using OutputMask = std::array<bool, kDifferentiable>;

/// Throws c10::Error naming the first argument that does not fit. Works on symbolic shapes.
void check(const Arguments& args);

/// Calls of the operators through the dispatcher.
Forward call_forward(const Arguments& args);
Gradients call_backward(
    const Tensor& grad_scores, const Arguments& args, const Tensor& indices,
    OutputMask output_mask);

/// On any device, in ATen calls.
Forward forward_portable(
    const Tensor& query, const Tensor& key, int64_t k, const OptionalTensor& mask,
    std::string_view metric);

/// (scores, indices) in calls that PyTorch transforms.
Forward composite(const Arguments& args);

/// Portable path: gradients of <second_order, backward(grad_scores, args)> with respect to
/// grad_scores and the differentiable arguments, in that order.
std::vector<Tensor> double_backward(
    const Arguments& args, const Tensor& indices, const Tensor& grad_scores,
    const std::array<Tensor, kDifferentiable>& second_order,
    const std::array<bool, 1 + kDifferentiable>& needed);

/// Of the public op and of the one below autograd.
using ForwardSignature =
    Forward(const Tensor&, const Tensor&, int64_t, const OptionalTensor&, std::string_view);
using BackwardSignature = Gradients(
    const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, std::string_view,
    const Tensor&, OutputMask);

}  // namespace mixhead::topk
