// One pass over the kernel between two sets of points, in differentiable calls of kernel_attention.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/slice.h>

#include <limits>
#include <vector>

#include "kernel_attention/op.h"
#include "matching_attention/arguments.h"

namespace mixhead::matching {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

OptionalTensor detach(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->detach()) : std::nullopt;
}

}  // namespace

Points Points::transposed() const {
  const auto leading = query.sym_sizes().slice(0, query.dim() - 3);
  c10::SymDimVector sizes(leading.begin(), leading.end());
  const auto own = key.sym_sizes().slice(key.dim() - 3);
  sizes.append(own.begin(), own.end());
  return {key.expand_symint(sizes), query, bandwidth, kernel, dustbin};
}

Points with_batch(Points points) {
  if (points.key.dim() < points.query.dim()) points.key = points.transposed().query;
  return points;
}

Points Points::detached() const {
  return {query.detach(), key.detach(), detach(bandwidth), kernel, detach(dustbin)};
}

Tensor points_of(const Points& points, const Tensor& side) {
  return points.dustbin ? at::slice(side, -1, 0, -1) : side;
}

Pass pass(const Points& points, const Tensor& value, const Tensor& bias) {
  const auto [mean, sums] = kernel_attention(
      points.query, points.key, value, points.bandwidth, points.kernel.vec(),
      {.attn_mask = points_of(points, bias).unsqueeze(-2)});
  if (!points.dustbin) return {mean, sums};
  const auto score = points.dustbin->to(sums.scalar_type()).unsqueeze(-1);
  const auto with_dustbin = at::logaddexp(sums, score + at::slice(bias, -1, -1));
  const auto share = (sums - with_dustbin).masked_fill(sums == -kInfinity, -kInfinity).exp();
  const auto dustbin_sum = score + bias.logsumexp(-1, /*keepdim=*/true);
  return {mean * share.unsqueeze(-1), at::cat({with_dustbin, dustbin_sum}, -1)};
}

Tensor log_sums(const Points& points, const Tensor& bias) {
  return pass(points, at::slice(points.key, -1, 0, 0), bias).log_sums;
}

Tensor potential(const Tensor& log_mass, const Tensor& log_sums) {
  return (log_mass - log_sums).masked_fill(log_sums == -kInfinity, -kInfinity);
}

}  // namespace mixhead::matching
