#pragma once

#include <ATen/core/Tensor.h>

/// Least squares of degree 1 from the moments of each row's data, in differentiable ATen calls.
namespace mixhead::local_linear {

using at::Tensor;

/// Of data (x_j, v_j) under weights that sum to 1 (or are all 0); "..." stands for the rows.
struct Moments {
  Tensor mean;        // (..., D, 1): of x
  Tensor covariance;  // (..., D, D): of x about its mean
  Tensor value;       // (..., 1, Dv): mean of v
  Tensor cross;       // (..., D, Dv): of x about its mean with v
  Tensor query;       // (..., D, 1): what x is an offset from; tells rounding from spread
};

struct Fit {
  Tensor intercept;       // (..., 1, Dv): the fit at x = 0
  Tensor slope;           // (..., D, Dv)
  Tensor inverse_corner;  // (..., 1, 1): e1'(X'WX)^-1 e1, the weight there of a datum at x = 0
};

/// `covariance` with `penalty` (..., 1, 1) on its diagonal: ridge regression on the slope alone.
Tensor with_ridge(const Tensor& covariance, const Tensor& penalty);

/// slope = C^-1 cross, intercept = value - mean' slope, corner = 1 + mean' C^-1 mean with C the
/// covariance. Where C is singular: the minimum-norm (intercept, slope) and the corner of the
/// pseudo-inverse, (X'WX)^+ of rows (1, x_j).
Fit least_squares(const Moments& moments);

}  // namespace mixhead::local_linear
