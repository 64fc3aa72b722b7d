// The iterations that find the potentials, and the linear system of their derivative. Every device;
// each product with the plan is a pass of kernel_attention.
#include <ATen/TensorOperators.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <limits>
#include <utility>

#include "matching_attention/curvature.h"

namespace mixhead::matching {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kPlainIterations = 50;  // before the first step of Newton's method
constexpr int kSolveIterations = 1000, kPatience = 50;

Tensor inner_product(const Tensor& x, const Tensor& y) { return (x * y).sum(-1, /*keepdim=*/true); }

/// M^+ x by conjugate gradients (Hestenes & Stiefel 1952), preconditioned by the column sums; one
/// system for each batch entry and head. The residual is made smaller by the factor `tolerance`.
Tensor conjugate_gradients(
    const Points& points, const Sides& potential, const Tensor& right_side, double tolerance) {
  const auto zero = at::zeros_like(right_side), zeros = zero.sum(-1, /*keepdim=*/true);
  auto x = zero;
  if (right_side.numel() == 0 || !right_side.any().item<bool>()) return x;
  const Curvature matrix(points, potential);
  const auto in_range = [&](const Tensor& y) {
    return at::where(matrix.live, centered(y, matrix.live), zero);
  };
  const auto preconditioner = at::where(matrix.live, 1.0 / matrix.column_sums, zero);
  auto residual = in_range(right_side);
  auto direction = residual * preconditioner;
  auto rho = inner_product(residual, direction);
  const auto enough = rho * (tolerance * tolerance);
  auto least = rho, since_least = zeros;  // rounding may end the progress before the tolerance does
  for (int i = 0; i < kSolveIterations; ++i) {
    const auto product = matrix.times(direction);
    const auto curvature = inner_product(direction, product);
    const Tensor active =
        (rho > enough).logical_and(curvature > 0).logical_and(since_least < kPatience);
    if (!active.any().item().toBool()) break;
    const auto step = at::where(active, rho / curvature, zeros);
    x = x + step * direction;
    residual = in_range(residual - step * product);
    const auto scaled = residual * preconditioner;
    const auto next = inner_product(residual, scaled);
    direction = scaled + at::where(active, next / rho, zeros) * direction;
    rho = next;
    since_least = at::where(rho < least, zeros, since_least + 1.0);
    least = at::minimum(least, rho);
  }
  return in_range(x) + rho * 0.0;  // what is not finite ends the loop, and is not swallowed
}

Tensor solve(
    const Tensor& query, const Tensor& key, const OptionalTensor& bandwidth, const Names& kernel,
    const OptionalTensor& dustbin, const Tensor& row_potential, const Tensor& column_potential,
    const Tensor& right_side) {
  return conjugate_gradients(
      {query, key, bandwidth, kernel, dustbin}, {row_potential, column_potential}, right_side,
      right_side.scalar_type() == at::kDouble ? 1e-13 : 1e-6);
}

/// By what share of its mass the worst column of each problem missed it, (B..., Hq, 1): a column
/// potential moves by the logarithm of mass over sum.
Tensor miss(const Tensor& before, const Tensor& after) {
  const auto error = (before - after).expm1().abs().masked_fill(before == after, 0.0);
  return error.amax(-1, /*keepdim=*/true);
}

/// Sinkhorn's iterations. Where they crawl (small bandwidths), every second one becomes a step of
/// Newton's method, M x = mass - sums (Brauer, Clason, Lorenz & Wirth 2017); it is taken back where
/// it misses more than before, and tried more and more seldom.
Tensor sinkhorn(
    const Tensor& query, const Tensor& key, const OptionalTensor& bandwidth, const Names& kernel,
    const OptionalTensor& dustbin, const Tensor& log_row_mass, const Tensor& log_column_mass,
    int64_t iterations, double tolerance) {
  const Points points{query, key, bandwidth, kernel, dustbin};
  const auto transposed = points.transposed();
  auto column = at::zeros_like(log_column_mass);
  if (column.numel() == 0) return column;
  Tensor last, crawls, retreat;
  int64_t next_newton = kPlainIterations, pause = 2;
  const double rounding = column.scalar_type() == at::kDouble ? 1e-11 : 1e-5;
  for (int64_t i = 0; i < iterations; ++i) {
    const auto row = potential(log_row_mass, log_sums(points, column));
    auto next = potential(log_column_mass, log_sums(transposed, row));
    const auto error = miss(column, next);
    if (error.max().item<double>() <= tolerance) {
      column = std::move(next);
      break;
    }
    if (retreat.defined()) {
      const Tensor worse = crawls.logical_and((error < last).logical_not());
      next = at::where(worse, retreat, next);
      if (worse.any().item().toBool()) next_newton = i + (pause *= 2);
      retreat = Tensor();
    } else if (i >= next_newton) {
      crawls = (error < 0.5).logical_and(error > (0.7 * last).clamp_min(rounding));
      const auto sums = (log_column_mass + column - next).exp();
      const auto lack = at::where(crawls, log_column_mass.exp() - sums, at::zeros_like(sums));
      retreat = next;
      next =
          at::where(crawls, column + conjugate_gradients(points, {row, column}, lack, 1e-2), next);
    }
    last = error;
    column = next;
  }
  return centered(column, column > -kInfinity);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, CompositeExplicitAutograd, m) {
  m.impl("_matching_attention_sinkhorn", sinkhorn);
  m.impl("_matching_attention_solve", solve);
}

}  // namespace mixhead::matching
