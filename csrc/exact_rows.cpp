#include "exact_rows.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>

#include "dense.h"

namespace mixhead::exact_rows {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// (b or 1, heads, groups or 1, rows or 1, ...) as (b * rows, Hq, ...).
Tensor by_rows(const Tensor& grouped, const Tensor& query) {
  const auto b = query.size(0), query_heads = query.size(1), rows = query.size(2);
  at::DimVector all(grouped.sizes()), flat{b * rows, query_heads};
  all[0] = b, all[2] = query_heads / all[1], all[3] = rows;
  flat.append(all.begin() + 4, all.end());
  return grouped.expand(all).movedim(3, 1).reshape(flat);
}

}  // namespace

bool all_finite(at::TensorList tensors) {
  for (const auto& tensor : tensors) {
    if (!tensor.defined() || !tensor.is_floating_point()) continue;
    if (!at::isfinite(tensor.detach()).all().item<bool>()) return false;
  }
  return true;
}

bool seems_finite(const Tensor& tensor) {
  return !tensor.defined() || tensor.numel() == 0 || std::isfinite(tensor.sum().item<double>());
}

Tensor readable_pairs(
    const Tensor& mask, const Tensor& query, const Tensor& key, const chunked::Chunk& chunk,
    const Exclusion& exclusion) {
  const auto heads = key.size(1), keys = key.size(2), rows = query.size(2);
  auto readable = at::ones({1, heads, 1, rows, keys}, query.options().dtype(at::kBool));
  if (mask.defined()) {
    const auto fitted = dense::grouped(mask, heads);
    readable = readable & (fitted.scalar_type() == at::kBool ? fitted : fitted != -kInfinity);
  }
  const auto options = query.options().dtype(at::kLong);
  const auto row = at::arange(chunk.row, chunk.row + rows, options).unsqueeze(-1);
  const auto column = at::arange(keys, options);
  if (exclusion.is_causal) readable = readable & (column <= row + exclusion.last_key);
  if (exclusion.exclude_self) readable = readable & (column != row);
  return readable;
}

Tensor of_rows(const Tensor& per_query, const Tensor& query) {
  if (!per_query.defined()) return per_query;
  return by_rows(dense::grouped(per_query, query.size(1)), query).unsqueeze(2);
}

Tensor of_keys(const Tensor& per_key, const Tensor& readable, const Tensor& query) {
  const auto own = per_key.unsqueeze(2).unsqueeze(2);
  return by_rows(at::where(readable.unsqueeze(-1), own, at::zeros({}, own.options())), query);
}

Tensor of_mask(const Tensor& mask, const Tensor& readable, const Tensor& query) {
  const bool additive = mask.defined() && mask.scalar_type() != at::kBool;
  const auto zero = at::zeros({}, query.options());
  const auto added = additive ? dense::grouped(mask, readable.size(1)) : zero;
  return by_rows(at::where(readable, added, zero - kInfinity), query).unsqueeze(2);
}

Tensor joined(const Tensor& result, const Tensor& query) {
  return result.squeeze(2).unflatten(0, {query.size(0), query.size(2)}).transpose(1, 2);
}

}  // namespace mixhead::exact_rows
