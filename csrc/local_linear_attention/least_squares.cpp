#include "local_linear_attention/least_squares.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_inv_ex.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>
#include <c10/core/GradMode.h>

#include <limits>

namespace mixhead::local_linear {
namespace {

double epsilon(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                        : std::numeric_limits<float>::epsilon();
}

Tensor identity_like(const Tensor& square) { return at::eye(square.size(-1), square.options()); }

/// NaN gives NaN, not an error.
Tensor inverted(const Tensor& square) { return std::get<0>(at::linalg_inv_ex(square)); }

/// The projector on the null space of a symmetric matrix whose diagonal is 1 or 0.
Tensor null_projector(const Tensor& correlation) {
  const auto finite = correlation.isfinite().all(-1, true).all(-2, true);
  const auto [values, vectors] =
      at::linalg_eigh(at::where(finite, correlation, identity_like(correlation)));
  const auto largest = values.narrow(-1, values.size(-1) - 1, 1);
  const auto null = values <= largest * (epsilon(values) * static_cast<double>(values.size(-1)));
  const auto basis = vectors.masked_fill(null.logical_not().unsqueeze(-2), 0.0);
  return at::matmul(basis, basis.transpose(-2, -1));
}

/// `null`, the projector on the null space N of `correlation`, as a function of it:
/// N(C + dC) = N - N dC C^+ - C^+ dC N + O(dC^2) where the rank stays the same.
Tensor moving(const Tensor& null, const Tensor& correlation) {
  const auto detached = correlation.detach();
  const auto pseudo_inverse = inverted(detached + null) - null;
  const auto turned = at::matmul(at::matmul(null, correlation), pseudo_inverse);
  return null - turned - turned.transpose(-2, -1);
}

/// The pseudo-inverse of the covariance, and where it is singular the projector on its null space,
/// from those of the correlation: covariance = scale correlation scale', scale (..., D, 1).
std::pair<Tensor, Tensor> unscaled(
    const Tensor& scale, const Tensor& null, const Tensor& pseudo_inverse, bool singular) {
  const auto inner = pseudo_inverse / (scale * scale.transpose(-2, -1));
  if (!singular) return {inner, {}};
  // The covariance's null space is spanned by the columns of null / scale, which are not
  // orthonormal.
  const auto identity = identity_like(null);
  const auto basis = null / scale;
  const auto gram = at::matmul(basis.transpose(-2, -1), basis);
  const auto projector =
      at::matmul(at::matmul(basis, inverted(gram + identity - null)), basis.transpose(-2, -1));
  const auto range = identity - projector;
  return {at::matmul(at::matmul(range, inner), range), projector};
}

}  // namespace

Tensor with_ridge(const Tensor& covariance, const Tensor& penalty) {
  return covariance + identity_like(covariance) * penalty;
}

// Channels are brought to spread 1, so that what counts as singular does not depend on their units;
// one that varies by no more than the rounding of its mean is constant. Which space is null is
// decided outside the graph: eigenvectors have no derivative where eigenvalues are equal. Then
//
//   C^+ = (C + N)^-1 - N,  N the projector on the null space of C,
//
// is differentiable, and its derivative right wherever the rank stays the same (Golub & Pereyra
// 1973).
Fit least_squares(const Moments& moments) {
  const auto& [mean, covariance, value, cross] = moments;
  Tensor scale, constant, null;
  {
    c10::AutoGradMode no_grad(false);
    const auto spread = covariance.diagonal(0, -2, -1).unsqueeze(-1).clamp_min(0.0).sqrt();
    const auto flat = spread <= mean.abs() * (32.0 * epsilon(mean));
    scale = spread.masked_fill(flat, 1.0);
    constant = flat.logical_or(flat.transpose(-2, -1));
  }
  const auto correlation =
      (covariance / (scale * scale.transpose(-2, -1))).masked_fill(constant, 0.0);
  {
    c10::AutoGradMode no_grad(false);
    null = null_projector(correlation);
  }
  const bool singular = null.any().item<bool>();
  if (singular) null = moving(null, correlation);
  const auto pseudo_inverse = inverted(correlation + null) - null;
  const auto [inverse_covariance, projector] = unscaled(scale, null, pseudo_inverse, singular);

  const auto row = mean.transpose(-2, -1);
  const auto slope = at::matmul(inverse_covariance, cross);
  const auto intercept = value - at::matmul(row, slope);
  const auto corner = at::matmul(at::matmul(row, inverse_covariance), mean) + 1.0;
  if (!singular) return {intercept, slope, corner};
  // How far the query stands from the affine hull of its data: along there (intercept, slope) may
  // be moved with no change at the data.
  const auto beside = at::matmul(projector, mean);
  const auto shrink = (at::matmul(beside.transpose(-2, -1), beside) + 1.0).reciprocal();
  const auto shrunk = intercept * shrink;
  return {shrunk, slope + at::matmul(beside, shrunk), corner * shrink * shrink};
}

}  // namespace mixhead::local_linear
