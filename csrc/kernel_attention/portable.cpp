#include <ATen/TensorOperators.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "chunked.h"
#include "dense.h"
#include "exact_rows.h"
#include "kernel_attention/arguments.h"
#include "kernel_attention/log_kernel.h"
#include "wide_dtype.h"

namespace mixhead::kernels {
namespace {

using chunked::Axes;
using chunked::Chunk;
using chunked::Problem;
using Tensors = std::vector<Tensor>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// What the formula needs beside the operands, fixed for one call of the op.
struct Constants {
  std::vector<Kernel> kernels;  // one, or one for each query head
  bool is_causal, exclude_self, normalize, nan_where_empty, nearest_where_empty;
  int64_t query_heads, rows, keys;
  double dropout_p;
  int64_t seed;
  bool transformed, exact;
  Tensor row_numbers = {};  // where the rows of a chunk are no longer those of the call
};

/// Scores with the keys that a query may not read at -inf, an additive mask added.
Tensor readable(Tensor scores, const Tensor& mask, const Chunk& chunk, const Constants& constants) {
  scores = dense::masked(scores, mask);
  if (constants.is_causal) {
    scores = dense::causal(scores, chunk.row, constants.keys - constants.rows);
  }
  if (constants.exclude_self) scores = dense::without_self(scores, chunk.row);
  return scores;
}

/// The value of the nearest readable key of each row, 0 where none is readable.
Tensor nearest_value(
    const Tensors& in, const Tensor& bandwidth, const Chunk& chunk, const Constants& constants) {
  const auto &query = in[0], &key = in[1], &value = in[2];
  const auto distance = squared_distance(query.detach(), key.detach(), bandwidth.detach());
  const auto blocked =
      readable(at::zeros_like(distance), in[4], chunk, constants).detach() == -kInfinity;
  const auto [smallest, index] = distance.masked_fill(blocked, kInfinity).min(-1);
  const auto found = dense::gather(value, index.flatten(1, 2).unsqueeze(-1)).squeeze(-2);
  return found.masked_fill(blocked.all(-1).unsqueeze(-1), 0.0).flatten(1, 2);
}

/// (output, log_mass) of one chunk; in: query, key, value, bandwidth, attn_mask.
Tensors formula(
    const Tensors& in, const Chunk& chunk, const Constants& constants, double default_bandwidth) {
  const auto &query = in[0], &key = in[1], &value = in[2];
  const auto bandwidth =
      in[3].defined() ? in[3] : at::full({1, 1, 1, 1}, default_bandwidth, query.options());
  const auto scores = readable(
      log_kernels(constants.kernels, query, key, bandwidth, chunk), in[4], chunk, constants);
  auto [weights, grouped_mass] = dense::softmax(scores);
  const auto log_mass = grouped_mass.flatten(1, 2);
  if (constants.transformed) {
    weights = at::dropout(weights, constants.dropout_p, constants.dropout_p > 0.0);
  } else if (constants.dropout_p > 0.0 && scores.size(-1) > 0) {
    const auto rows = constants.row_numbers.defined()
                          ? constants.row_numbers
                          : dense::row_numbers(query, chunk, constants.query_heads, constants.rows);
    weights = weights * dense::dropout_factors(
                            weights, dense::grouped(rows, key.size(1)), constants.seed, 0,
                            constants.dropout_p);
  }
  auto output = dense::weighted_sum(weights, value);
  if (!constants.normalize) return {output * log_mass.exp(), log_mass};
  const auto empty = log_mass == -kInfinity;
  if (constants.nan_where_empty) {
    output = output.masked_fill(empty, std::numeric_limits<double>::quiet_NaN());
  }
  if (constants.nearest_where_empty && scores.size(-1) > 0) {
    output = at::where(empty, nearest_value(in, bandwidth, chunk, constants), output);
  }
  return {output, log_mass};
}

/// The formula where an operand is not finite: each row with keys of its own.
Tensors exact_formula(
    const Tensors& in, const Chunk& chunk, Constants constants, double default_bandwidth) {
  const auto &query = in[0], &key = in[1], &value = in[2];
  const auto readable = exact_rows::readable_pairs(
      in[4], query, key, chunk,
      {constants.is_causal, constants.exclude_self, constants.keys - constants.rows});
  const auto groups = query.size(1) / chunk.heads;
  if (constants.dropout_p > 0.0) {
    constants.row_numbers = exact_rows::of_rows(
        dense::row_numbers(query, chunk, constants.query_heads, constants.rows), query);
  }
  constants.is_causal = constants.exclude_self = false;
  const auto results = formula(
      {exact_rows::of_rows(query, query), exact_rows::of_keys(key, readable, query),
       exact_rows::of_keys(value, readable, query), exact_rows::of_rows(in[3], query),
       exact_rows::of_mask(in[4], readable, query)},
      {0, query.size(0) * query.size(2), chunk.head * groups, query.size(1), 0, 1}, constants,
      default_bandwidth);
  return {exact_rows::joined(results[0], query), exact_rows::joined(results[1], query)};
}

/// `grads`: what comes in, of a derivative.
Problem problem_of(const Arguments& args, at::TensorList grads = {}, bool transformed = false) {
  const bool exact = !transformed && excludes(args) && args.key.size(-2) > 0 &&
                     !(exact_rows::all_finite({args.query, args.key, args.value}) &&
                       exact_rows::all_finite(grads));
  Constants constants{
      .kernels = kernels_named(args.kernel),
      .is_causal = args.is_causal,
      .exclude_self = args.exclude_self,
      .normalize = args.normalize,
      .nan_where_empty = args.empty == "nan",
      .nearest_where_empty = args.empty == "nearest",
      .query_heads = args.query.size(-3),
      .rows = args.query.size(-2),
      .keys = args.key.size(-2),
      .dropout_p = args.dropout_p,
      .seed = args.seed ? args.seed->item<int64_t>() : 0,
      .transformed = transformed,
      .exact = exact};
  const bool distances =
      std::any_of(constants.kernels.begin(), constants.kernels.end(), is_distance);
  const auto channels = args.query.size(-1), depth = channels + args.value.size(-1);
  Problem problem(
      args.query, args.key.size(-3),
      constants.keys * (exact       ? 2 * depth
                        : distances ? channels
                                    : 1) +
          depth,
      constants.keys * depth);
  auto tensors = differentiable(args);
  tensors[3] = bandwidth_operand(tensors[3]);
  constexpr std::array<Axes, kDifferentiable> axes{
      Axes::query, Axes::key, Axes::key, Axes::query, Axes::query};
  for (size_t i = 0; i < kDifferentiable; ++i) problem.operands.push_back({tensors[i], axes[i]});
  const auto default_bandwidth = std::pow(static_cast<double>(channels), 0.25);
  problem.formula = [constants, default_bandwidth](const Tensors& in, const Chunk& chunk) {
    return constants.exact ? exact_formula(in, chunk, constants, default_bandwidth)
                           : formula(in, chunk, constants, default_bandwidth);
  };
  return problem;
}

Forward portable_forward_op(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& attn_mask, bool is_causal, bool exclude_self,
    bool normalize, std::string_view empty, double dropout_p, const OptionalTensor& seed,
    bool enable_gqa) {
  const Arguments args{query,        key,       value, bandwidth, kernel, attn_mask, is_causal,
                       exclude_self, normalize, empty, dropout_p, seed,   enable_gqa};
  check(args);
  return forward_portable(args);
}

Gradients portable_backward_op(
    const Tensor& grad_output, const Tensor& grad_log_mass, const Tensor& query, const Tensor& key,
    const Tensor& value, const OptionalTensor& bandwidth, const Names& kernel,
    const OptionalTensor& attn_mask, bool is_causal, bool exclude_self, bool normalize,
    std::string_view empty, double dropout_p, const OptionalTensor& seed, bool enable_gqa,
    const Tensor& /*output*/, const Tensor& /*log_mass*/, std::array<bool, 5> output_mask) {
  return backward_portable(
      {grad_output, grad_log_mass},
      {query, key, value, bandwidth, kernel, attn_mask, is_causal, exclude_self, normalize, empty,
       dropout_p, seed, enable_gqa},
      output_mask);
}

}  // namespace

Forward forward_portable(const Arguments& args) {
  const auto& query = args.query;
  at::DimVector rows(query.sizes().begin(), query.sizes().end() - 1), wide = rows;
  wide.push_back(args.value.size(-1));
  const auto output = at::empty(wide, query.options());
  const auto log_mass = at::empty(rows, query.options().dtype(wide_dtype(query)));
  chunked::forward(problem_of(args), {output, log_mass.unsqueeze(-1)});
  return {output, log_mass};
}

Gradients backward_portable(
    const std::array<Tensor, 2>& grads, const Arguments& args, OutputMask output_mask) {
  auto g = chunked::backward(
      problem_of(args, grads), {grads[0], grads[1].unsqueeze(-1)},
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
  return {all[0].to(args.query.scalar_type()), all[1].squeeze(-1)};
}

std::vector<Tensor> double_backward(
    const Arguments& args, const std::array<Tensor, 2>& grads,
    const std::array<Tensor, kDifferentiable>& second_order,
    const std::array<bool, 2 + kDifferentiable>& needed) {
  Tensors partners(second_order.begin(), second_order.end());
  partners[3] = bandwidth_operand(partners[3]);
  auto result = chunked::double_backward(
      problem_of(args, grads), {grads[0], grads[1].unsqueeze(-1)}, partners,
      std::vector<bool>(needed.begin(), needed.end()));
  if (result[1].defined()) result[1] = result[1].squeeze(-1);
  if (result[5].defined()) result[5] = result[5].view(args.bandwidth->sizes());
  return result;
}

TORCH_LIBRARY_IMPL(mixhead, CompositeExplicitAutograd, m) {
  m.impl("_kernel_attention_forward", portable_forward_op);
  m.impl("_kernel_attention_backward", portable_backward_op);
}

}  // namespace mixhead::kernels
