#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

/// What every room of matching_attention hands to the next.
namespace mixhead::matching {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Names = c10::List<std::string>;

struct Arguments {
  Tensor query, key, value;
  OptionalTensor bandwidth;
  Names kernel;
  OptionalTensor row_mass, column_mass, dustbin;
  int64_t iterations;
  double tolerance;
};

using Matching = std::tuple<Tensor, Tensor, Tensor>;  // output, row_potential, column_potential

/// Throws c10::Error naming the first argument that does not fit. Works on symbolic shapes; reads
/// values (the signs of bandwidth and masses) only where the tensor has them.
void check(const Arguments& args);

/// The two sets of points and the kernel between them. Of the two, query has the batch dimensions.
struct Points {
  Tensor query, key;
  OptionalTensor bandwidth;
  Names kernel;
  OptionalTensor dustbin;

  Points transposed() const;
  Points detached() const;
};

/// The same with the batch dimensions on key too, as values that differ over the batch need.
Points with_batch(Points points);

/// Potentials and masses along the points of one side, the dustbin's behind them where there is
/// one: (B..., Hq, L) or (B..., Hq, L + 1).
struct Sides {
  Tensor row, column;
};

/// The part of a side that belongs to points, without the dustbin.
Tensor points_of(const Points& points, const Tensor& side);

/// One pass of kernel_attention under the weights exp(log K_ij + bias_j) of row i. The dustbin has
/// the value 0.
struct Pass {
  Tensor mean;      // weighted mean of the values, (B..., Hq, L, Dv)
  Tensor log_sums;  // log of the sum of the weights, along the row side
};
Pass pass(const Points& points, const Tensor& value, const Tensor& bias);
Tensor log_sums(const Points& points, const Tensor& bias);

/// The potential of the rows with which their sums are exp(log_mass); -inf for a row that reaches
/// no column.
Tensor potential(const Tensor& log_mass, const Tensor& log_sums);

/// Calls of the operators through the dispatcher.
Tensor call_sinkhorn(
    const Points& points, const Sides& log_mass, int64_t iterations, double tolerance);
Tensor call_solve(const Points& points, const Sides& potential, const Tensor& right_side);

using PublicSignature = Matching(
    const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Names&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, int64_t, double);
using SinkhornSignature = Tensor(
    const Tensor&, const Tensor&, const OptionalTensor&, const Names&, const OptionalTensor&,
    const Tensor&, const Tensor&, int64_t, double);
using SolveSignature = Tensor(
    const Tensor&, const Tensor&, const OptionalTensor&, const Names&, const OptionalTensor&,
    const Tensor&, const Tensor&, const Tensor&);

}  // namespace mixhead::matching
