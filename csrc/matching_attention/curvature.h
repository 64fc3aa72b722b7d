#pragma once

#include "matching_attention/arguments.h"

namespace mixhead::matching {

/// Weighted mean over the columns of a quantity x that they have, the weights of row i being
/// exp(log K_ij + bias_j).
class Averages {
 public:
  Averages(const Points& points, const Tensor& bias);
  Tensor of(const Tensor& x) const;

 private:
  Points points_;
  Tensor bias_, dustbin_share_, dustbin_weights_;
};

/// M = diag(c) - P' diag(1/r) P with the row and column sums r, c of the plan P: how the column
/// sums change with the column potentials while the row potentials follow. Symmetric, and takes a
/// constant to 0. A column of potential -inf takes no part. In differentiable calls.
class Curvature {
 public:
  Curvature(const Points& points, const Sides& potential);
  Tensor times(const Tensor& x) const;

  Tensor live;         // the columns that take part
  Tensor column_sums;  // c

 private:
  Averages by_row_, by_column_;
};

/// The dual does not change where all column potentials grow by a number and all row potentials
/// shrink by it. Those of the live columns are made to sum to 0; the others are left as they are.
Tensor centered(const Tensor& x, const Tensor& live);

}  // namespace mixhead::matching
