#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "chunked.h"

/// What a row may not read has no effect on it, NaN and infinity included. Products with a weight
/// of 0 do not keep that promise, 0 * NaN being NaN. Where an operand is not finite the portable
/// formulas therefore give each query row keys of its own, in which those it may not read are 0:
/// the row becomes a batch entry of one row, and the formula itself stays as it is.
namespace mixhead::exact_rows {

using at::Tensor;

/// Whether every entry of the floating tensors is finite; undefined ones are.
bool all_finite(at::TensorList tensors);

/// Whether a result is finite, by its sum: cheap, and false where the sum overflows.
bool seems_finite(const Tensor& tensor);

/// Pairs that may be read, (b or 1, heads, groups or 1, rows or 1, keys).
struct Exclusion {
  bool is_causal, exclude_self;
  int64_t last_key;  // of row 0, with is_causal
};
Tensor readable_pairs(
    const Tensor& mask, const Tensor& query, const Tensor& key, const chunked::Chunk& chunk,
    const Exclusion& exclusion);

/// (b or 1, Hq or 1, rows or 1, X) of every row of `query` (b, Hq, rows, D): (b * rows, Hq, 1, X).
Tensor of_rows(const Tensor& per_query, const Tensor& query);
/// The keys or values (b or 1, heads, S, X) of every row, 0 where it may not read them:
/// (b * rows, Hq, S, X).
Tensor of_keys(const Tensor& per_key, const Tensor& readable, const Tensor& query);
/// The additive mask (b * rows, Hq, 1, S): -inf where a row may not read.
Tensor of_mask(const Tensor& mask, const Tensor& readable, const Tensor& query);
/// Results (b * rows, Hq, 1, X) as (b, Hq, rows, X).
Tensor joined(const Tensor& result, const Tensor& query);

}  // namespace mixhead::exact_rows
