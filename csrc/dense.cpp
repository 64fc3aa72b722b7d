#include "dense.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/bitwise_right_shift.h>
#include <ATen/ops/bitwise_xor.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "dropout.h"

namespace mixhead::dense {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Logical right shift of int64 entries.
Tensor shifted(const Tensor& x, int64_t bits) {
  const int64_t mask = static_cast<int64_t>(~uint64_t{0} >> bits);
  return at::bitwise_and(at::bitwise_right_shift(x, bits), mask);
}

Tensor splitmix64(Tensor x) {
  x = x + static_cast<int64_t>(0x9E3779B97F4A7C15ull);
  x = at::bitwise_xor(x, shifted(x, 30)) * static_cast<int64_t>(0xBF58476D1CE4E5B9ull);
  x = at::bitwise_xor(x, shifted(x, 27)) * static_cast<int64_t>(0x94D049BB133111EBull);
  return at::bitwise_xor(x, shifted(x, 31));
}

Tensor low32(const Tensor& x) { return at::bitwise_and(x, int64_t{0xFFFFFFFF}); }

Tensor xor_shift(const Tensor& x, int64_t bits) {
  return at::bitwise_xor(x, at::bitwise_right_shift(x, bits));
}

}  // namespace

Tensor products(const Tensor& query, const Tensor& key) {
  const auto b = query.size(0), heads = key.size(1), rows = query.size(2), depth = query.size(3);
  const auto groups = query.size(1) / heads;
  if (key.size(0) == b) {
    const auto folded = query.reshape({b, heads, groups * rows, depth});
    return at::matmul(folded, key.transpose(-2, -1)).view({b, heads, groups, rows, key.size(2)});
  }
  const auto folded = query.reshape({b, heads, groups * rows, depth})
                          .transpose(0, 1)
                          .reshape({heads, b * groups * rows, depth});
  return at::matmul(folded, key.squeeze(0).transpose(-2, -1))
      .view({heads, b, groups, rows, key.size(2)})
      .transpose(0, 1);
}

Tensor weighted_sum(const Tensor& weights, const Tensor& value) {
  const auto b = weights.size(0), heads = weights.size(1), groups = weights.size(2);
  const auto rows = weights.size(3), keys = weights.size(4), channels = value.size(3);
  if (value.size(0) == b) {
    return at::matmul(weights.reshape({b, heads, groups * rows, keys}), value)
        .view({b, heads * groups, rows, channels});
  }
  const auto folded = weights.transpose(0, 1).reshape({heads, b * groups * rows, keys});
  return at::matmul(folded, value.squeeze(0))
      .view({heads, b, groups, rows, channels})
      .transpose(0, 1)
      .reshape({b, heads * groups, rows, channels});
}

Tensor gather(const Tensor& source, const Tensor& index) {
  const auto b = index.size(0), heads = source.size(1), slots = source.size(2);
  const auto groups = index.size(1) / heads;
  const auto options = index.options();
  auto first = at::arange(heads, options).view({1, heads, 1, 1, 1});
  if (source.size(0) != 1) first = first + at::arange(b, options).view({b, 1, 1, 1, 1}) * heads;
  const auto flat = grouped(index, heads).clamp_min(0) + first * slots;
  return source.reshape({-1, source.size(3)})
      .index_select(0, flat.reshape({-1}))
      .view({b, heads, groups, index.size(2), index.size(3), source.size(3)});
}

Tensor grouped(const Tensor& per_query, int64_t heads) {
  const auto query_heads = per_query.size(1);
  if (query_heads == 1) return per_query.unsqueeze(1);
  return per_query.unflatten(1, {heads, query_heads / heads});
}

Tensor masked(const Tensor& scores, const Tensor& mask) {
  if (!mask.defined()) return scores;
  const auto fitted = grouped(mask, scores.size(1));
  if (fitted.scalar_type() != at::kBool) return scores + fitted;
  return scores.masked_fill(fitted.logical_not(), -kInfinity);
}

Tensor causal(const Tensor& scores, int64_t first_row, int64_t last_key) {
  const auto options = scores.options().dtype(at::kLong);
  const auto row = at::arange(first_row, first_row + scores.size(-2), options).unsqueeze(-1);
  const auto key = at::arange(scores.size(-1), options);
  return scores.masked_fill(key > row + last_key, -kInfinity);
}

Tensor without_self(const Tensor& scores, int64_t first_row) {
  const auto options = scores.options().dtype(at::kLong);
  const auto row = at::arange(first_row, first_row + scores.size(-2), options).unsqueeze(-1);
  return scores.masked_fill(row == at::arange(scores.size(-1), options), -kInfinity);
}

std::pair<Tensor, Tensor> softmax(const Tensor& scores) {
  if (scores.size(-1) == 0) {
    return {scores, scores.sum(-1, /*keepdim=*/true) - kInfinity};
  }
  auto maximum = scores.detach().amax(-1, /*keepdim=*/true);
  maximum = maximum.masked_fill(maximum == -kInfinity, 0.0);
  const auto weights = (scores - maximum).exp();
  const auto sum = weights.sum(-1, /*keepdim=*/true);
  const auto reads_nothing = sum == 0;
  const auto divisor = sum.masked_fill(reads_nothing, 1.0);
  const auto lse = (maximum + divisor.log()).masked_fill(reads_nothing, -kInfinity);
  return {weights / divisor, lse};
}

Tensor row_numbers(
    const Tensor& query, const chunked::Chunk& chunk, int64_t all_query_heads, int64_t all_rows) {
  const auto options = query.options().dtype(at::kLong);
  const auto first_head = chunk.head * (query.size(1) / chunk.heads);
  const auto batch = at::arange(chunk.batch, chunk.batch + query.size(0), options);
  const auto head = at::arange(first_head, first_head + query.size(1), options);
  const auto row = at::arange(chunk.row, chunk.row + chunk.rows, options);
  const auto heads = batch.view({-1, 1, 1, 1}) * all_query_heads + head.view({1, -1, 1, 1});
  return heads * all_rows + row.view({1, 1, -1, 1});
}

Tensor dropout_factors(
    const Tensor& scores, const Tensor& rows, int64_t seed, int64_t side, double p) {
  const auto stream = static_cast<int64_t>(dropout::stream(seed, side));
  const auto mixed = splitmix64(at::bitwise_xor(rows, stream));
  const auto first = low32(mixed), second = shifted(mixed, 32);
  const auto column = at::arange(scores.size(-1), rows.options());
  auto x = low32(column * int64_t{0x9E3779B1} + first);
  x = low32(xor_shift(x, 16) * int64_t{0x7FEB352D});
  x = at::bitwise_xor(x, second);
  x = low32(xor_shift(x, 15) * int64_t{0x846CA68B});
  x = xor_shift(x, 16);
  const auto kept = x >= static_cast<int64_t>(dropout::threshold(p));
  return kept.to(scores.scalar_type()) * (p < 1.0 ? 1.0 / (1.0 - p) : 0.0);
}

}  // namespace mixhead::dense
