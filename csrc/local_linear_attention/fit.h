#pragma once

#include <vector>

#include "local_linear_attention/arguments.h"
#include "local_linear_attention/least_squares.h"

/// From the moments of each row's window to what the op returns, in differentiable ATen calls.
namespace mixhead::local_linear {

/// (output, slope, leverage, log_mass), D and Dv of the slope in one dimension. log_mass and
/// log_at_query, log K(q, q), are (..., 1).
std::vector<Tensor> fit(
    Moments moments, const Tensor& log_mass, const Tensor& log_at_query, double ridge);

/// The op's four outputs or their gradients as `fit` has them: (..., rows, X).
std::vector<Tensor> as_rows(const Grads& outputs);

/// The op's outputs, not yet written.
Grads empty_outputs(const Arguments& args);

}  // namespace mixhead::local_linear
