#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

/// The portable path's driver. An op gives a differentiable formula for a part of its queries that
/// is dense in the keys; the functions here run it part by part, so that memory stays linear in the
/// keys, and derive from it, by autograd on each part, the backward and the second derivative.
namespace mixhead::chunked {

using at::Tensor;

/// The part of the problem one call of the formula covers: [batch, batch + batches) of the
/// flattened leading dimensions, key heads [head, head + heads), query rows [row, row + rows).
struct Chunk {
  int64_t batch, batches, head, heads, row, rows;
};

/// query: (B..., Hq, L, X), each size possibly 1. key: (B..., H, S, X) or without leading
/// dimensions.
enum class Axes { query, key };

struct Operand {
  Tensor tensor;  // may be undefined; then its slices are
  Axes axes;
};

/// What the formula gets: each operand's slice as (batches or 1, heads or 1, rows, X) in the
/// accumulation dtype where floating. What it gives: tensors (batches, query heads, rows, X).
using Formula = std::function<std::vector<Tensor>(const std::vector<Tensor>&, const Chunk&)>;

struct Problem {
  Problem(const Tensor& query, int64_t key_heads, int64_t row_elements, int64_t head_elements);

  c10::DimVector batch_shape;  // leading dimensions of the query, {1} where it has none
  int64_t heads;               // key heads
  int64_t groups;              // query heads for each key head
  int64_t rows;
  int64_t row_elements;   // what one query row of one head needs at a time
  int64_t head_elements;  // what the keys of one (batch, head) need at a time
  at::ScalarType accumulate;

  std::vector<Operand> operands;
  Formula formula;
};

/// The formula in one piece, in calls that PyTorch differentiates and transforms: its results as
/// (B..., Hq, L, X), in the accumulation dtype.
std::vector<Tensor> composite(const Problem& problem, const Tensor& query);

/// Runs the formula and writes its results to `outputs`, (B..., Hq, L, X) each.
void forward(const Problem& problem, const std::vector<Tensor>& outputs);

/// Gradients of the operands, undefined where not needed, accumulated in the accumulation dtype and
/// returned in the operand's own. grads[i] belongs to the formula's output i.
std::vector<Tensor> backward(
    const Problem& problem, const std::vector<Tensor>& grads, const std::vector<bool>& needed);

/// Gradients of <second_order, backward(grads, operands)> with respect to grads, then the operands.
std::vector<Tensor> double_backward(
    const Problem& problem, const std::vector<Tensor>& grads,
    const std::vector<Tensor>& second_order, const std::vector<bool>& needed);

}  // namespace mixhead::chunked
