// The operator itself, in differentiable calls: both derivatives are those of kernel_attention,
// except through the column potentials, which hold by an equation instead of a formula.
#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/slice.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <limits>

#include "checks.h"
#include "differentiate.h"
#include "kernel_attention/arguments.h"
#include "kernel_attention/op.h"
#include "matching_attention/curvature.h"
#include "wide_dtype.h"

namespace mixhead::matching {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// The linear map M^+ at a fixed plan; symmetric, so it is its own derivative.
class Solve : public torch::autograd::Function<Solve> {
 public:
  static Tensor forward(
      AutogradContext* ctx, const Tensor& right_side, const Points& points,
      const Sides& potential) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["kernel"] = points.kernel;
    ctx->save_for_backward(
        {points.query, points.key, points.bandwidth.value_or(Tensor()),
         points.dustbin.value_or(Tensor()), potential.row, potential.column});
    return call_solve(points, potential, right_side);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Points points{
        saved[0], saved[1], differentiate::optional(saved[2]),
        ctx->saved_data["kernel"].to<Names>(), differentiate::optional(saved[3])};
    return {Solve::apply(grads[0], points, Sides{saved[4], saved[5]}), Tensor(), Tensor()};
  }
};

/// Masses along both sides, the total of each the same.
Sides masses(const Arguments& args, const Points& points) {
  const auto along = [&](const OptionalTensor& mass, const c10::SymInt& count) {
    const auto sizes = checks::like_query(points.query, {points.query.sym_size(-3), count});
    return mass ? mass->to(points.query.scalar_type()).expand_symint(sizes)
                : at::ones_symint(sizes, points.query.options());
  };
  const auto row = along(args.row_mass, points.query.sym_size(-2));
  const auto column = along(args.column_mass, points.key.sym_size(-2));
  const auto row_total = row.sum(-1, /*keepdim=*/true);
  const auto column_total = column.sum(-1, /*keepdim=*/true);
  if (points.dustbin) return {at::cat({row, column_total}, -1), at::cat({column, row_total}, -1)};
  return {row, column * (row_total / column_total.masked_fill(column_total == 0, 1.0))};
}

Tensor log_of(const Tensor& mass) {
  const auto none = mass == 0;
  return mass.masked_fill(none, 1.0).log().masked_fill(
      none, -std::numeric_limits<double>::infinity());
}

/// Gradients of <weight, mean(x)> with respect to query, key, bandwidth, dustbin and weight, where
/// mean_i is the mean over the columns under exp(log K_ij + column_j).
variable_list gradients_of_means(
    const Points& points, const Tensor& weight, const Tensor& x, const Tensor& column,
    const std::array<bool, 4>& needed) {
  const auto rows = with_batch(points);
  const kernels::Arguments args{
      .query = rows.query,
      .key = rows.key,
      .value = points_of(points, x).unsqueeze(-1),
      .bandwidth = points.bandwidth,
      .kernel = points.kernel,
      .attn_mask = points_of(points, column).unsqueeze(-2),
      .is_causal = false,
      .exclude_self = false,
      .normalize = true,
      .empty = "zero",
      .dropout_p = 0.0,
      .seed = std::nullopt,
      .enable_gqa = false};
  const auto [value_mean, sums] = kernel_attention(
      args.query, args.key, args.value, args.bandwidth, args.kernel.vec(),
      {.attn_mask = args.attn_mask});
  auto mean = value_mean.squeeze(-1), of_mean = points_of(points, weight);
  auto of_sums = at::zeros_like(sums);
  Tensor of_dustbin;
  if (points.dustbin) {
    // mean_i = (1 - share_i) mean_i(points) + share_i x_dustbin, share_i a sigmoid
    const auto last = at::slice(x, -1, -1), row_weight = of_mean;
    const auto score = points.dustbin->unsqueeze(-1) + at::slice(column, -1, -1);
    const auto share = (score - sums).sigmoid();
    of_mean = row_weight * (1.0 - share);
    const auto of_score = row_weight * (last - mean) * share * (1.0 - share);
    of_sums = -of_score;
    of_dustbin = at::sum_to(of_score.sum(-1), points.dustbin->sym_sizes());
    mean = at::cat(
        {mean + share * (last - mean), (column.softmax(-1) * x).sum(-1, /*keepdim=*/true)}, -1);
  }
  const auto g = kernels::call_backward(
      {of_mean.unsqueeze(-1), of_sums}, args, {value_mean, sums},
      {needed[0], needed[1], false, needed[2], false});
  auto of_key = std::get<1>(g);
  while (needed[1] && of_key.dim() > points.key.dim()) of_key = of_key.sum(0);
  const auto asked = [&](size_t i, const Tensor& gradient) {
    return needed[i] ? gradient : Tensor();
  };
  return {
      asked(0, std::get<0>(g)), asked(1, of_key), asked(2, std::get<3>(g)), asked(3, of_dustbin),
      mean};
}

/// M^+ x as a function of the plan too: a step of Newton's method from the solution, which changes
/// no value and has the derivative.
Tensor solve(const Points& points, const Sides& potential, const Tensor& right_side) {
  const auto fixed = points.detached();
  const Sides at{potential.row.detach(), potential.column.detach()};
  auto x = Solve::apply(right_side, fixed, at);
  if (!c10::GradMode::is_enabled()) return x;
  const auto product = Curvature(points, potential).times(x.detach());
  return x - Solve::apply(product - product.detach(), fixed, at);
}

/// The column potentials as a function of the arguments: the root of c - column_mass, with c the
/// column sums where the row potentials follow. With M x = the incoming gradient, the gradients of
/// the arguments are those of <x, column_mass - c> at fixed potentials, and
/// <x, c> = sum_i row_mass_i mean_i(x) with the mean that kernel_attention takes.
class ColumnPotential : public torch::autograd::Function<ColumnPotential> {
 public:
  static Tensor forward(
      AutogradContext* ctx, const Tensor& query, const Tensor& key, const OptionalTensor& bandwidth,
      const OptionalTensor& dustbin, const Tensor& row_mass, const Tensor& column_mass,
      const Names& kernel, int64_t iterations, double tolerance) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto column = call_sinkhorn(
        {query, key, bandwidth, kernel, dustbin}, {log_of(row_mass), log_of(column_mass)},
        iterations, tolerance);
    ctx->saved_data["kernel"] = kernel;
    ctx->save_for_backward(
        {query, key, bandwidth.value_or(Tensor()), dustbin.value_or(Tensor()), row_mass,
         column_mass, column});
    return column;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Points points{
        saved[0], saved[1], differentiate::optional(saved[2]),
        ctx->saved_data["kernel"].to<Names>(), differentiate::optional(saved[3])};
    const auto &row_mass = saved[4], &column = saved[6];
    const auto needed = differentiate::needed_gradients(
        ctx, std::array<Tensor, 4>{saved[0], saved[1], saved[2], saved[3]});
    const auto row = potential(log_of(row_mass), log_sums(points, column));
    const auto x = solve(points, {row, column}, grads[0]);
    auto g = gradients_of_means(points, -row_mass, x, column, needed);
    return {g[0], g[1], g[2], g[3], -g[4], x, Tensor(), Tensor(), Tensor()};
  }
};

OptionalTensor cast(const OptionalTensor& tensor, at::ScalarType dtype) {
  return tensor ? OptionalTensor(tensor->to(dtype)) : std::nullopt;
}

Matching matching_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& row_mass, const OptionalTensor& column_mass,
    const OptionalTensor& dustbin, int64_t iterations, double tolerance) {
  const Arguments args{query,    key,         value,   bandwidth,  kernel,
                       row_mass, column_mass, dustbin, iterations, tolerance};
  check(args);
  const auto dtype = wide_dtype(query);
  const Points points{
      query.to(dtype), key.to(dtype), cast(bandwidth, dtype), args.kernel, cast(dustbin, dtype)};
  const auto mass = masses(args, points);
  const auto log_row_mass = log_of(mass.row);
  auto column = at::zeros_like(mass.column);
  if (iterations > 0) {
    column = ColumnPotential::apply(
        points.query, points.key, points.bandwidth, points.dustbin, mass.row, mass.column,
        points.kernel, iterations, tolerance);
  }
  const auto [output, sums] = pass(points, value.to(dtype), column);
  return {
      output.to(query.scalar_type()), points_of(points, potential(log_row_mass, sums)),
      points_of(points, column)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, CompositeImplicitAutograd, m) {
  m.impl("matching_attention", matching_attention);
}

}  // namespace mixhead::matching
