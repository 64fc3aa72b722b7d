#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "chunked.h"
#include "dense.h"
#include "topk_keys/arguments.h"
#include "wide_dtype.h"

namespace mixhead::topk {
namespace {

using chunked::Axes;
using chunked::Chunk;
using chunked::Problem;
using Tensors = std::vector<Tensor>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Rows of length 1; a zero row stays zero, with derivative 0.
Tensor unit(const Tensor& x) {
  const auto square = (x * x).sum(-1, /*keepdim=*/true);
  return x / square.masked_fill(square == 0, 1.0).sqrt();
}

/// -|q - k|^2 (b, heads, groups, rows, M), by subtraction: right for near points far from the
/// origin. Some keys at a time, as the differences have D times as many elements as the result.
Tensor minus_squared_distance(const Tensor& query, const Tensor& key) {
  const auto q = dense::grouped(query, key.size(1)).unsqueeze(-2);
  const auto k = key.unsqueeze(2).unsqueeze(2);
  const auto keys = key.size(2), block = std::max<int64_t>((int64_t{1} << 20) / query.numel(), 1);
  Tensors parts;
  for (int64_t first = 0; first < std::max<int64_t>(keys, 1); first += block) {
    const auto difference = q - k.narrow(-2, first, std::min(block, keys - first));
    parts.push_back(-(difference * difference).sum(-1));
  }
  return at::cat(parts, -1);
}

/// The scores of all keys.
Tensor similarity(Metric metric, const Tensor& query, const Tensor& key) {
  if (metric == Metric::l2) return minus_squared_distance(query, key);
  if (metric == Metric::dot) return dense::products(query, key);
  const auto norm = at::linalg_vector_norm(key, 2, {-1}).unsqueeze(2).unsqueeze(2);
  return dense::products(unit(query), key) / norm.masked_fill(norm == 0, 1.0);
}

/// Which k entries of each row are the highest, NaN above all and of equal ones the first. At least
/// k columns.
Tensor highest(const Tensor& scores, int64_t k) {
  const auto last = std::get<0>(at::topk(scores, k)).narrow(-1, k - 1, 1);
  const auto is_nan = scores.isnan(), nan_is_last = last.isnan();
  const auto above = (scores > last).logical_or(is_nan.logical_and(nan_is_last.logical_not()));
  const auto equal = (scores == last).logical_or(is_nan.logical_and(nan_is_last));
  const auto room = k - above.sum(-1, /*keepdim=*/true);
  return above.logical_or(equal.logical_and(equal.cumsum(-1) <= room));
}

/// (scores, indices) of one chunk; in: query, key, mask.
Tensors search(const Tensors& in, Metric metric, int64_t k) {
  auto scores = dense::masked(similarity(metric, in[0], in[1]), in[2]);
  if (scores.size(-1) < k) {
    scores = at::constant_pad_nd(scores, {0, k - scores.size(-1)}, -kInfinity);
  }
  auto sizes = scores.sizes().vec();
  sizes.back() = k;
  const auto found = highest(scores, k).nonzero().select(-1, -1).view(sizes);
  const auto [sorted, order] = scores.gather(-1, found).sort(/*stable=*/true, -1, true);
  const auto indices = found.gather(-1, order).masked_fill(sorted == -kInfinity, -1);
  return {sorted.flatten(1, 2), indices.flatten(1, 2)};
}

/// The same by sorting all scores: every result's size is known, which vmap needs.
Tensors search_by_sorting(const Tensors& in, Metric metric, int64_t k) {
  auto scores = dense::masked(similarity(metric, in[0], in[1]), in[2]);
  if (scores.size(-1) < k) {
    scores = at::constant_pad_nd(scores, {0, k - scores.size(-1)}, -kInfinity);
  }
  const auto [sorted, order] = scores.sort(/*stable=*/true, -1, true);
  const auto best = sorted.narrow(-1, 0, k);
  const auto indices = order.narrow(-1, 0, k).masked_fill(best == -kInfinity, -1);
  return {best.flatten(1, 2), indices.flatten(1, 2)};
}

/// The scores of the keys that `indices` name, differentiable; in: query, key, mask, indices.
Tensors named_scores(const Tensors& in, Metric metric) {
  const auto &key = in[1], &indices = in[3];
  const auto named = dense::gather(key, indices);
  const auto query = dense::grouped(in[0], key.size(1)).unsqueeze(-2);
  Tensor scores;
  if (metric == Metric::l2) {
    const auto difference = query - named;
    scores = -(difference * difference).sum(-1);
  } else if (metric == Metric::dot) {
    scores = (query * named).sum(-1);
  } else {
    scores = (unit(query) * unit(named)).sum(-1);
  }
  const auto index = dense::grouped(indices, key.size(1));
  if (in[2].defined() && in[2].is_floating_point()) {
    auto sizes = index.sizes().vec();
    sizes.back() = key.size(2);
    const auto mask = dense::grouped(in[2], key.size(1)).expand(sizes);
    scores = scores + mask.gather(-1, index.clamp_min(0));
  }
  return {scores.masked_fill(index < 0, -kInfinity).flatten(1, 2)};
}

Problem search_problem(const Arguments& args, Metric metric) {
  const auto keys = args.key.size(-2), channels = args.query.size(-1);
  Problem problem(args.query, args.key.size(-3), 4 * (keys + args.k) + channels, keys * channels);
  const auto tensors = differentiable(args);
  constexpr std::array<Axes, kDifferentiable> axes{Axes::query, Axes::key, Axes::query};
  for (size_t i = 0; i < kDifferentiable; ++i) problem.operands.push_back({tensors[i], axes[i]});
  problem.formula = [metric, k = args.k](const Tensors& in, const Chunk& /*chunk*/) {
    return search(in, metric, k);
  };
  return problem;
}

Problem scores_problem(const Arguments& args, const Tensor& indices) {
  const auto metric = *metric_named(args.metric);
  auto problem = search_problem(args, metric);
  const bool float_mask = args.mask && args.mask->is_floating_point();
  problem.row_elements = 3 * args.k * args.query.size(-1) + (float_mask ? args.key.size(-2) : 0);
  problem.operands.push_back({indices, Axes::query});
  problem.formula = [metric](const Tensors& in, const Chunk& /*chunk*/) {
    return named_scores(in, metric);
  };
  return problem;
}

Gradients backward_portable(
    const Tensor& grad_scores, const Tensor& query, const Tensor& key, const OptionalTensor& mask,
    std::string_view metric, const Tensor& indices, OutputMask output_mask) {
  const Arguments args{query, key, indices.size(-1), mask, metric};
  std::vector<bool> needed(output_mask.begin(), output_mask.end());
  needed.push_back(false);  // indices
  std::vector<Tensor> g(kDifferentiable);
  // Nothing was found where there is no key; gather would need one.
  if (key.size(-2) > 0) g = chunked::backward(scores_problem(args, indices), {grad_scores}, needed);
  for (size_t i = 0; i < kDifferentiable; ++i) {
    if (g[i].defined()) continue;
    const auto& of = i == 0 ? query : i == 1 ? key : mask.value_or(Tensor());
    g[i] = output_mask[i] ? at::zeros_like(of) : at::empty({0}, query.options());
  }
  return {g[0], g[1], g[2]};
}

}  // namespace

Forward forward_portable(
    const Tensor& query, const Tensor& key, int64_t k, const OptionalTensor& mask,
    std::string_view metric) {
  const Arguments args{query, key, k, mask, metric};
  check(args);
  at::DimVector sizes(query.sizes().begin(), query.sizes().end() - 1);
  sizes.push_back(k);
  const auto scores = at::empty(sizes, query.options().dtype(wide_dtype(query)));
  const auto indices = at::empty(sizes, query.options().dtype(at::kLong));
  if (k > 0) chunked::forward(search_problem(args, *metric_named(metric)), {scores, indices});
  return {scores, indices};
}

Forward composite(const Arguments& args) {
  check(args);
  const auto metric = *metric_named(args.metric);
  auto problem = search_problem(args, metric);
  problem.formula = [metric, k = args.k](const Tensors& in, const Chunk& /*chunk*/) {
    return search_by_sorting(in, metric, k);
  };
  const auto all = chunked::composite(problem, args.query);
  return {all[0], all[1]};
}

std::vector<Tensor> double_backward(
    const Arguments& args, const Tensor& indices, const Tensor& grad_scores,
    const std::array<Tensor, kDifferentiable>& second_order,
    const std::array<bool, 1 + kDifferentiable>& needed) {
  std::vector<Tensor> partners(second_order.begin(), second_order.end());
  partners.emplace_back();
  std::vector<bool> all(needed.begin(), needed.end());
  all.push_back(false);
  if (args.key.size(-2) == 0) return std::vector<Tensor>(1 + kDifferentiable);
  auto result =
      chunked::double_backward(scores_problem(args, indices), {grad_scores}, partners, all);
  result.pop_back();  // indices
  return result;
}

TORCH_LIBRARY_IMPL(mixhead, CompositeExplicitAutograd, m) {
  m.impl("_topk_keys_forward", forward_portable);
  m.impl("_topk_keys_backward", backward_portable);
}

}  // namespace mixhead::topk
