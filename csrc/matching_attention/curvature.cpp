#include "matching_attention/curvature.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/slice.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

namespace mixhead::matching {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

Averages::Averages(const Points& points, const Tensor& bias)
    : points_(with_batch(points)), bias_(bias) {
  if (!points.dustbin) return;
  const auto score = points.dustbin->to(bias.scalar_type()).unsqueeze(-1);
  const auto sums = points_of(points, log_sums(points_, bias));
  dustbin_share_ = (score + at::slice(bias, -1, -1) - sums).exp();
  dustbin_weights_ = bias.softmax(-1);
}

Tensor Averages::of(const Tensor& x) const {
  auto mean = pass(points_, points_of(points_, x).unsqueeze(-1), bias_).mean.squeeze(-1);
  if (!points_.dustbin) return mean;
  const auto of_dustbin = (dustbin_weights_ * x).sum(-1, /*keepdim=*/true);
  return at::cat({mean + dustbin_share_ * at::slice(x, -1, -1), of_dustbin}, -1);
}

Curvature::Curvature(const Points& points, const Sides& potential)
    : live(potential.column > -kInfinity),
      column_sums((potential.column + log_sums(points.transposed(), potential.row)).exp()),
      by_row_(points, potential.column),
      by_column_(points.transposed(), potential.row) {}

Tensor Curvature::times(const Tensor& x) const {
  const auto product = column_sums * (x - by_column_.of(by_row_.of(x)));
  return at::where(live, product, at::zeros_like(product));
}

Tensor centered(const Tensor& x, const Tensor& live) {
  const auto count = live.sum(-1, /*keepdim=*/true).clamp_min(1);
  return x - at::where(live, x, at::zeros_like(x)).sum(-1, /*keepdim=*/true) / count;
}

}  // namespace mixhead::matching
