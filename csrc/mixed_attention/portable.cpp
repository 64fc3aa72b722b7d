#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <limits>

#include "chunked.h"
#include "dense.h"
#include "exact_rows.h"
#include "mixed_attention/arguments.h"
#include "wide_dtype.h"

namespace mixhead::mixed {
namespace {

using chunked::Axes;
using chunked::Chunk;
using chunked::Problem;
using Tensors = std::vector<Tensor>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Side {
  Tensor output;  // (b, Hq, rows, Dv)
  Tensor lse;     // (b, Hq, rows, 1)
};

/// What the formula needs beside the operands, fixed for one call of the op.
struct Constants {
  bool joint, is_causal;
  int64_t query_heads, rows, keys;
  double scale, dropout_p;
  int64_t seed;
  bool transformed, exact;
};

/// The dropped weights and the log-sum-exp (before dropout) of one side's masked scores.
std::pair<Tensor, Tensor> weights_of(
    const Tensor& scores, int64_t side, const Tensor& query, const Chunk& chunk,
    const Constants& constants) {
  auto [weights, lse] = dense::softmax(scores);
  if (constants.transformed) {
    weights = at::dropout(weights, constants.dropout_p, constants.dropout_p > 0.0);
  } else if (constants.dropout_p > 0.0 && scores.size(-1) > 0) {
    const auto rows = dense::grouped(
        dense::row_numbers(query, chunk, constants.query_heads, constants.rows), scores.size(1));
    weights =
        weights * dense::dropout_factors(weights, rows, constants.seed, side, constants.dropout_p);
  }
  return {weights, lse.flatten(1, 2)};
}

/// One side where an operand is not finite: each row with keys of its own.
Side attend_exactly(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask, int64_t side,
    const Chunk& chunk, const Constants& constants) {
  const auto readable = exact_rows::readable_pairs(
      mask, query, key, chunk,
      {constants.is_causal && side == 0, false, constants.keys - constants.rows});
  const auto own_key = exact_rows::of_keys(key, readable, query);
  auto scores = dense::products(exact_rows::of_rows(query, query), own_key) * constants.scale;
  scores = dense::masked(scores, exact_rows::of_mask(mask, readable, query));
  auto [weights, lse] = dense::softmax(scores);
  if (constants.dropout_p > 0.0) {
    const auto rows = exact_rows::of_rows(
        dense::row_numbers(query, chunk, constants.query_heads, constants.rows), query);
    weights = weights * dense::dropout_factors(
                            weights, dense::grouped(rows, query.size(1)), constants.seed, side,
                            constants.dropout_p);
  }
  const auto output = dense::weighted_sum(weights, exact_rows::of_keys(value, readable, query));
  return {exact_rows::joined(output, query), exact_rows::joined(lse.flatten(1, 2), query)};
}

Side attend_sequence(const Tensors& in, const Chunk& chunk, const Constants& constants) {
  const auto &query = in[0], &key = in[1], &value = in[2], &mask = in[6];
  if (constants.exact && key.size(2) > 0) {
    return attend_exactly(query, key, value, mask, 0, chunk, constants);
  }
  auto scores = dense::masked(dense::products(query, key) * constants.scale, mask);
  if (constants.is_causal) {
    scores = dense::causal(scores, chunk.row, constants.keys - constants.rows);
  }
  const auto [weights, lse] = weights_of(scores, 0, query, chunk, constants);
  return {dense::weighted_sum(weights, value), lse};
}

Side attend_memory(const Tensors& in, const Chunk& chunk, const Constants& constants) {
  const auto &query = in[0], &key = in[3], &value = in[4], &mask = in[7];
  if (constants.exact && key.size(2) > 0) {
    return attend_exactly(query, key, value, mask, 1, chunk, constants);
  }
  const auto scores = dense::masked(dense::products(query, key) * constants.scale, mask);
  const auto [weights, lse] = weights_of(scores, 1, query, chunk, constants);
  return {dense::weighted_sum(weights, value), lse};
}

/// Memory attention where each query reads only the slots it names.
Side attend_named_slots(const Tensors& in, const Chunk& chunk, const Constants& constants) {
  const auto &query = in[0], &key = in[3], &value = in[4], &mask = in[7], &index = in[8];
  const auto heads = key.size(1);
  // What a query may not read is 0, whatever the slot holds.
  auto readable = dense::grouped(index, heads) >= 0;
  Tensor own_mask;
  if (mask.defined()) {
    const auto wide = mask.expand({index.size(0), index.size(1), index.size(2), key.size(2)});
    own_mask = dense::grouped(wide.gather(-1, index.clamp_min(0)), heads);
    const bool boolean = own_mask.scalar_type() == at::kBool;
    readable = readable & (boolean ? own_mask : own_mask != -kInfinity);
  }
  const auto blocked = readable.logical_not();
  const auto keys = dense::gather(key, index).masked_fill(blocked.unsqueeze(-1), 0.0);
  const auto values = dense::gather(value, index).masked_fill(blocked.unsqueeze(-1), 0.0);
  auto scores = (keys * dense::grouped(query, heads).unsqueeze(-2)).sum(-1) * constants.scale;
  if (mask.defined() && own_mask.is_floating_point()) scores = scores + own_mask;
  scores = scores.masked_fill(blocked, -kInfinity);
  const auto [weights, lse] = weights_of(scores, 1, query, chunk, constants);
  return {(values * weights.unsqueeze(-1)).sum(-2).flatten(1, 2), lse};
}

/// w: sigmoid(mix), or with rule "joint" sigmoid(mix + l_m - l_s); 0 or 1 where one side is empty.
Tensor memory_weight(const Tensor& mix, const Side& self, const Side& memory, bool joint) {
  const auto self_empty = self.lse == -kInfinity, memory_empty = memory.lse == -kInfinity;
  auto logit = mix;
  if (joint) {
    logit = mix + (memory.lse - self.lse).masked_fill(self_empty.logical_or(memory_empty), 0.0);
  }
  const auto weight = at::where(self_empty, 1.0, at::sigmoid(logit));
  return at::where(memory_empty, 0.0, weight);
}

/// (output, self_lse, memory_lse, self_output, memory_output) of one chunk; see library.cpp.
Tensors formula(const Tensors& in, const Chunk& chunk, const Constants& constants) {
  const auto self = attend_sequence(in, chunk, constants);
  const bool named = in[8].defined() && in[3].size(2) > 0;
  const auto memory =
      named ? attend_named_slots(in, chunk, constants) : attend_memory(in, chunk, constants);
  const auto weight = memory_weight(in[5], self, memory, constants.joint);
  const auto output = self.output * (1.0 - weight) + memory.output * weight;
  return {output, self.lse, memory.lse, constants.joint ? output : self.output, memory.output};
}

/// `grads`: what comes in, of a derivative.
Problem problem_of(const Arguments& args, at::TensorList grads = {}, bool transformed = false) {
  const auto keys = args.key.size(-2), slots = args.memory_key.size(-2);
  const auto depth = args.query.size(-1) + args.value.size(-1);
  const bool exact = !transformed && excludes(args) &&
                     !(exact_rows::all_finite(operands(args)) && exact_rows::all_finite(grads));
  const auto each = exact ? depth : 1;
  const auto named = args.memory_index ? args.memory_index->size(-1) * depth : slots * each;
  Problem problem(
      args.query, args.key.size(-3), keys * each + named + depth, (keys + slots) * depth);
  const auto tensors = differentiable(args);
  constexpr std::array<Axes, kDifferentiable> axes{Axes::query, Axes::key,  Axes::key,
                                                   Axes::key,   Axes::key,  Axes::query,
                                                   Axes::query, Axes::query};
  for (size_t i = 0; i < kDifferentiable; ++i) problem.operands.push_back({tensors[i], axes[i]});
  problem.operands.push_back({args.memory_index.value_or(Tensor()), Axes::query});
  const Constants constants{
      args.joint(),
      args.is_causal,
      args.query.size(-3),
      args.query.size(-2),
      keys,
      args.scale_or_default(),
      args.dropout_p,
      args.seed ? args.seed->item<int64_t>() : 0,
      transformed,
      exact};
  problem.formula = [constants](const Tensors& in, const Chunk& chunk) {
    return formula(in, chunk, constants);
  };
  return problem;
}

Forward portable_forward_op(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& memory_key,
    const Tensor& memory_value, const Tensor& mix, std::string_view rule,
    const OptionalTensor& attn_mask, const OptionalTensor& memory_mask,
    const OptionalTensor& memory_index, double dropout_p, const OptionalTensor& seed,
    bool is_causal, std::optional<double> scale, bool enable_gqa, bool for_backward) {
  const Arguments args{query,     key,  value,     memory_key,  memory_value,
                       mix,       rule, attn_mask, memory_mask, memory_index,
                       dropout_p, seed, is_causal, scale,       enable_gqa};
  check(args);
  return forward_portable(args, for_backward);
}

Gradients portable_backward_op(
    const Tensor& grad_output, const Tensor& grad_self_lse, const Tensor& grad_memory_lse,
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& memory_key,
    const Tensor& memory_value, const Tensor& mix, std::string_view rule,
    const OptionalTensor& attn_mask, const OptionalTensor& memory_mask,
    const OptionalTensor& memory_index, double dropout_p, const OptionalTensor& seed,
    bool is_causal, std::optional<double> scale, bool enable_gqa, const Tensor& /*output*/,
    const Tensor& /*self_lse*/, const Tensor& /*memory_lse*/, const Tensor& /*self_output*/,
    const Tensor& /*memory_output*/, std::array<bool, 8> output_mask) {
  const Arguments args{query,     key,  value,     memory_key,  memory_value,
                       mix,       rule, attn_mask, memory_mask, memory_index,
                       dropout_p, seed, is_causal, scale,       enable_gqa};
  return backward_portable({grad_output, grad_self_lse, grad_memory_lse}, args, output_mask);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> composite(const Arguments& args) {
  check(args);
  const auto all = chunked::composite(problem_of(args, {}, /*transformed=*/true), args.query);
  return {all[0].to(args.query.scalar_type()), all[1].squeeze(-1), all[2].squeeze(-1)};
}

Forward forward_portable(const Arguments& args, bool for_backward) {
  const auto& query = args.query;
  at::DimVector rows(query.sizes().begin(), query.sizes().end() - 1), wide = rows;
  wide.push_back(args.value.size(-1));
  const auto lse_options = query.options().dtype(wide_dtype(query));
  const auto output = at::empty(wide, query.options());
  const auto self_lse = at::empty(rows, lse_options), memory_lse = at::empty(rows, lse_options);
  const auto keep = kept_outputs(args, for_backward);
  const at::DimVector none{0};
  const auto self_output = at::empty(keep[0] ? wide : none, lse_options);
  const auto memory_output = at::empty(keep[1] ? wide : none, lse_options);
  std::vector<Tensor> outputs{output, self_lse.unsqueeze(-1), memory_lse.unsqueeze(-1)};
  if (keep[0]) outputs.push_back(self_output);
  if (keep[1]) outputs.push_back(memory_output);
  chunked::forward(problem_of(args), outputs);
  return {output, self_lse, memory_lse, self_output, memory_output};
}

Gradients backward_portable(
    const std::array<Tensor, 3>& grads, const Arguments& args, OutputMask output_mask) {
  std::vector<bool> needed(output_mask.begin(), output_mask.end());
  needed.push_back(false);  // memory_index
  auto g = chunked::backward(
      problem_of(args, grads), {grads[0], grads[1].unsqueeze(-1), grads[2].unsqueeze(-1)}, needed);
  for (auto& gradient : g) {
    if (!gradient.defined()) gradient = at::empty({0}, args.query.options());
  }
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]};
}

std::vector<Tensor> double_backward(
    const Arguments& args, const std::array<Tensor, 3>& grads,
    const std::array<Tensor, kDifferentiable>& second_order,
    const std::array<bool, 3 + kDifferentiable>& needed) {
  Tensors partners(second_order.begin(), second_order.end());
  partners.emplace_back();  // memory_index
  std::vector<bool> wanted(needed.begin(), needed.end());
  wanted.push_back(false);
  auto result = chunked::double_backward(
      problem_of(args, grads), {grads[0], grads[1].unsqueeze(-1), grads[2].unsqueeze(-1)}, partners,
      wanted);
  for (size_t i = 1; i < 3; ++i) {
    if (result[i].defined()) result[i] = result[i].squeeze(-1);
  }
  result.pop_back();
  return result;
}

TORCH_LIBRARY_IMPL(mixhead, CompositeExplicitAutograd, m) {
  m.impl("_mixed_attention_forward", portable_forward_op);
  m.impl("_mixed_attention_backward", portable_backward_op);
}

}  // namespace mixhead::mixed
