#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

#include "chunked.h"

/// Attention of a part of the queries, dense in the keys, in differentiable ATen calls: what the
/// portable formulas are written with. Scores and weights are (b, heads, groups, rows, keys), where
/// query head h belongs to key head h / groups.
namespace mixhead::dense {

using at::Tensor;

/// query (b, heads * groups, rows, D) against key (b or 1, heads, S, D): the products, unscaled. A
/// key shared by the batch is not expanded.
Tensor products(const Tensor& query, const Tensor& key);

/// weights (b, heads, groups, rows, S) times value (b or 1, heads, S, Dv): (b, Hq, rows, Dv).
Tensor weighted_sum(const Tensor& weights, const Tensor& value);

/// Rows index (b, heads * groups, rows, K) of source (b or 1, heads, S, X), -1 read as 0:
/// (b, heads, groups, rows, K, X).
Tensor gather(const Tensor& source, const Tensor& index);

/// (b or 1, Hq or 1, rows or 1, X) in the layout of the scores.
Tensor grouped(const Tensor& per_query, int64_t heads);

/// Masked scores: -inf where a bool mask says no, plus an additive one. `mask` may be undefined.
Tensor masked(const Tensor& scores, const Tensor& mask);

/// Scores with keys after last_key + row left out; row counts from `first_row`.
Tensor causal(const Tensor& scores, int64_t first_row, int64_t last_key);

/// Scores with key i left out for row i; row counts from `first_row`.
Tensor without_self(const Tensor& scores, int64_t first_row);

/// Softmax weights and log-sum-exp (last dimension 1). A row that reads nothing has weights 0 and
/// lse -inf, and finite derivatives.
std::pair<Tensor, Tensor> softmax(const Tensor& scores);

/// Each query row's number (batch * Hq + head) * L + query, the counter of dropout: of the rows of
/// `query` (b, Hq of the chunk, rows, D), as (b, Hq of the chunk, rows, 1).
Tensor row_numbers(
    const Tensor& query, const chunked::Chunk& chunk, int64_t all_query_heads, int64_t all_rows);

/// Factors 0 or 1 / (1 - p) in the shape of `scores` by the counter of dropout.h. `rows` holds each
/// query row's number and broadcasts to the scores.
Tensor dropout_factors(
    const Tensor& scores, const Tensor& rows, int64_t seed, int64_t side, double p);

}  // namespace mixhead::dense
