#include "local_linear_attention/fit.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>

#include <limits>

#include "wide_dtype.h"

namespace mixhead::local_linear {

std::vector<Tensor> fit(
    Moments moments, const Tensor& log_mass, const Tensor& log_at_query, double ridge) {
  const auto empty = log_mass == -std::numeric_limits<double>::infinity();
  const auto finite_mass = log_mass.masked_fill(empty, 0.0);
  if (ridge > 0.0) {
    // The weights sum to 1 here, not to the mass. Beyond e^80 the slope is 0 anyhow.
    const auto penalty = (-finite_mass).clamp_max(80.0).exp() * ridge;
    moments.covariance = with_ridge(moments.covariance, penalty.unsqueeze(-1));
  }
  const auto fitted = least_squares(moments);
  // Far from all data it would be infinite, and long before that its gradient.
  const bool is_double = finite_mass.scalar_type() == at::kDouble;
  const auto log_leverage = log_at_query - finite_mass + fitted.inverse_corner.squeeze(-1).log();
  const auto settled = log_leverage.detach().clamp_max(is_double ? 700.0 : 80.0);
  const auto leverage =
      at::where(settled > (is_double ? 300.0 : 40.0), settled, log_leverage).exp();
  return {
      fitted.intercept.squeeze(-2), fitted.slope.flatten(-2), leverage.masked_fill(empty, 0.0),
      log_mass};
}

std::vector<Tensor> as_rows(const Grads& outputs) {
  return {outputs[0], outputs[1].flatten(-2), outputs[2].unsqueeze(-1), outputs[3].unsqueeze(-1)};
}

Grads empty_outputs(const Arguments& args) {
  const auto &query = args.query, &value = args.value;
  const at::DimVector rows(query.sizes().begin(), query.sizes().end() - 1);
  at::DimVector output_sizes = rows, slope_sizes = rows;
  output_sizes.push_back(value.size(-1));
  slope_sizes.push_back(query.size(-1));
  slope_sizes.push_back(value.size(-1));
  const auto wide = query.options().dtype(wide_dtype(query));
  return {
      at::empty(output_sizes, query.options()), at::empty(slope_sizes, query.options()),
      at::empty(rows, wide), at::empty(rows, wide)};
}

}  // namespace mixhead::local_linear
