#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/matmul.h>
#include <torch/library.h>

#include <cmath>

#include "chunked.h"
#include "dense.h"
#include "exact_rows.h"
#include "kernel_attention/log_kernel.h"
#include "local_linear_attention/arguments.h"
#include "local_linear_attention/fit.h"

namespace mixhead::local_linear {
namespace {

using chunked::Axes;
using chunked::Chunk;
using chunked::Problem;
using Tensors = std::vector<Tensor>;

/// What the formula needs beside the operands, fixed for one call of the op.
struct Constants {
  std::vector<Kernel> kernels;  // one, or one for each head
  bool is_causal, exclude_self, exact;
  double ridge, default_bandwidth;
  int64_t rows, keys;
};

/// k - q, (b, heads, groups, rows, D, S): keys innermost, along which all sums run.
Tensor offsets(const Tensor& query, const Tensor& key) {
  const auto q = dense::grouped(query, key.size(1)).unsqueeze(-1);
  return key.transpose(-2, -1).contiguous().unsqueeze(2).unsqueeze(2) - q;
}

/// Moments of the offsets and values under `weights` (b, heads, groups, rows, S) that sum to 1.
/// Second moments are about the mean, in a second pass: windows are small against their distance
/// from the origin, and from the query where it stands outside of its data. The weighted offsets
/// add up to 0 but for rounding, which the level of the values would magnify.
Moments moments(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& weights) {
  const auto offset = offsets(query, key);
  const auto mean = at::matmul(offset, weights.unsqueeze(-1));
  const auto centred = offset - mean;
  const auto weighted = centred * weights.unsqueeze(-2);
  const auto rows = query.size(2), channels = query.size(3);
  const auto level = value.detach().mean(-2, /*keepdim=*/true);
  return {
      .mean = mean.flatten(1, 2),
      .covariance = at::matmul(weighted, centred.transpose(-2, -1)).flatten(1, 2),
      .value = dense::weighted_sum(weights, value).unsqueeze(-2),
      .cross =
          dense::weighted_sum(weighted.flatten(3, 4), value - level).unflatten(2, {rows, channels}),
      .query = query.unsqueeze(-1)};
}

/// (output, slope, leverage, log_mass) of one chunk, D and Dv of the slope in one dimension; in:
/// query, key, value, bandwidth, attn_mask.
Tensors formula(const Tensors& in, const Chunk& chunk, const Constants& constants) {
  const auto &query = in[0], &key = in[1], &value = in[2];
  const auto bandwidth = in[3].defined()
                             ? in[3]
                             : at::full({1, 1, 1, 1}, constants.default_bandwidth, query.options());
  auto scores =
      dense::masked(kernels::log_kernels(constants.kernels, query, key, bandwidth, chunk), in[4]);
  if (constants.is_causal) {
    scores = dense::causal(scores, chunk.row, constants.keys - constants.rows);
  }
  if (constants.exclude_self) scores = dense::without_self(scores, chunk.row);
  const auto [weights, log_mass] = dense::softmax(scores);
  const auto at_query = kernels::log_kernels_at_query(constants.kernels, query, bandwidth, chunk);
  return fit(
      moments(query, key, value, weights), log_mass.flatten(1, 2), at_query, constants.ridge);
}

/// The formula where an operand is not finite: each row with keys of its own.
Tensors exact_formula(const Tensors& in, const Chunk& chunk, Constants constants) {
  const auto &query = in[0], &key = in[1], &value = in[2];
  const auto readable = exact_rows::readable_pairs(
      in[4], query, key, chunk,
      {constants.is_causal, constants.exclude_self, constants.keys - constants.rows});
  const auto groups = query.size(1) / chunk.heads;
  constants.is_causal = constants.exclude_self = false;
  auto results = formula(
      {exact_rows::of_rows(query, query), exact_rows::of_keys(key, readable, query),
       exact_rows::of_keys(value, readable, query), exact_rows::of_rows(in[3], query),
       exact_rows::of_mask(in[4], readable, query)},
      {0, query.size(0) * query.size(2), chunk.head * groups, query.size(1), 0, 1}, constants);
  for (auto& result : results) result = exact_rows::joined(result, query);
  return results;
}

/// `grads`: what comes in, of a derivative.
Problem problem_of(const Arguments& args, at::TensorList grads = {}, bool transformed = false) {
  const bool exact = !transformed && reads_around_nan(args, grads);
  const auto channels = args.query.size(-1), wide = args.value.size(-1);
  const Constants constants{
      .kernels = kernels::kernels_named(args.kernel),
      .is_causal = args.is_causal,
      .exclude_self = args.exclude_self,
      .exact = exact,
      .ridge = args.ridge,
      .default_bandwidth = std::pow(static_cast<double>(channels), 0.25),
      .rows = args.query.size(-2),
      .keys = args.key.size(-2)};
  Problem problem(
      args.query, args.key.size(-3),
      constants.keys * (3 * channels + 2 + (exact ? 2 * (channels + wide) : 0)) +
          channels * (4 * channels + 2 * wide),
      constants.keys * (2 * channels + wide));
  auto tensors = differentiable(args);
  tensors[3] = kernels::bandwidth_operand(tensors[3]);
  constexpr std::array<Axes, kDifferentiable> axes{
      Axes::query, Axes::key, Axes::key, Axes::query, Axes::query};
  for (size_t i = 0; i < kDifferentiable; ++i) problem.operands.push_back({tensors[i], axes[i]});
  problem.formula = [constants](const Tensors& in, const Chunk& chunk) {
    return constants.exact ? exact_formula(in, chunk, constants) : formula(in, chunk, constants);
  };
  return problem;
}

}  // namespace

bool reads_around_nan(const Arguments& args, at::TensorList grads) {
  const bool excludes = args.is_causal || args.exclude_self || args.attn_mask;
  return excludes && args.key.size(-2) > 0 &&
         !(exact_rows::all_finite({args.query, args.key, args.value}) &&
           exact_rows::all_finite(grads));
}

Forward forward_portable(const Arguments& args) {
  check(args);
  const auto outputs = empty_outputs(args);
  chunked::forward(problem_of(args), as_rows(outputs));
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

Gradients backward_portable(const Grads& grads, const Arguments& args, OutputMask output_mask) {
  auto g = chunked::backward(
      problem_of(args, grads), as_rows(grads),
      std::vector<bool>(output_mask.begin(), output_mask.end()));
  if (g[3].defined()) g[3] = g[3].view(args.bandwidth->sizes());
  for (auto& gradient : g) {
    if (!gradient.defined()) gradient = at::empty({0}, args.query.options());
  }
  return {g[0], g[1], g[2], g[3], g[4]};
}

Forward composite(const Arguments& args) {
  check(args);
  const auto all = chunked::composite(problem_of(args, {}, /*transformed=*/true), args.query);
  const auto dtype = args.query.scalar_type();
  const auto channels = args.query.size(-1), wide = args.value.size(-1);
  return {
      all[0].to(dtype), all[1].unflatten(-1, {channels, wide}).to(dtype), all[2].squeeze(-1),
      all[3].squeeze(-1)};
}

std::vector<Tensor> double_backward(
    const Arguments& args, const Grads& grads,
    const std::array<Tensor, kDifferentiable>& second_order,
    const std::array<bool, kOutputs + kDifferentiable>& needed) {
  Tensors partners(second_order.begin(), second_order.end());
  partners[3] = kernels::bandwidth_operand(partners[3]);
  auto result = chunked::double_backward(
      problem_of(args, grads), as_rows(grads), partners,
      std::vector<bool>(needed.begin(), needed.end()));
  for (size_t i = 0; i < kOutputs; ++i) {
    if (result[i].defined()) result[i] = result[i].view(grads[i].sizes());
  }
  auto& of_bandwidth = result[kOutputs + 3];
  if (of_bandwidth.defined()) of_bandwidth = of_bandwidth.view(args.bandwidth->sizes());
  return result;
}

namespace {

Forward forward_op(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& attn_mask, bool is_causal, bool exclude_self,
    double ridge) {
  return forward_portable(
      {query, key, value, bandwidth, kernel, attn_mask, is_causal, exclude_self, ridge});
}

Gradients backward_op(
    const Tensor& grad_output, const Tensor& grad_slope, const Tensor& grad_leverage,
    const Tensor& grad_log_mass, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& bandwidth, const Names& kernel, const OptionalTensor& attn_mask,
    bool is_causal, bool exclude_self, double ridge, OutputMask output_mask) {
  return backward_portable(
      {grad_output, grad_slope, grad_leverage, grad_log_mass},
      {query, key, value, bandwidth, kernel, attn_mask, is_causal, exclude_self, ridge},
      output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, CompositeExplicitAutograd, m) {
  m.impl("_local_linear_attention_forward", forward_op);
  m.impl("_local_linear_attention_backward", backward_op);
}

}  // namespace mixhead::local_linear
