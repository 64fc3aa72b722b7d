#include "topk_keys/op.h"

#include <torch/library.h>

#include "checks.h"
#include "find_operator.h"
#include "topk_keys/arguments.h"

namespace mixhead {
namespace topk {
namespace {

constexpr const char* kOp = "topk_keys";
using checks::equal;
using checks::shape;

}  // namespace

std::optional<Metric> metric_named(std::string_view name) {
  if (name == "dot") return Metric::dot;
  if (name == "cosine") return Metric::cosine;
  if (name == "l2") return Metric::l2;
  return std::nullopt;
}

void check(const Arguments& args) {
  const auto &query = args.query, &key = args.key;
  MIXHEAD_CHECK(args.k >= 0, kOp, "k must be at least 0, got ", args.k);
  MIXHEAD_CHECK(
      metric_named(args.metric).has_value(), kOp,
      "metric must be \"dot\", \"cosine\" or \"l2\", got \"", args.metric, "\"");
  checks::query(kOp, query);
  checks::points(kOp, "key", key, query);
  const auto heads = key.sym_size(-3);
  MIXHEAD_CHECK(
      checks::at_least_one(heads) && equal(query.sym_size(-3) % heads, 0), kOp,
      "key must have a number of heads that divides query's ", query.sym_size(-3), ", got ",
      shape(key));
  MIXHEAD_CHECK(
      equal(key.sym_size(-1), query.sym_size(-1)), kOp, "key must have ", query.sym_size(-1),
      " channels like query, got ", shape(key));
  if (!args.mask) return;
  checks::mask(
      kOp, "mask", *args.mask, query,
      checks::like_query(query, {query.sym_size(-3), query.sym_size(-2), key.sym_size(-2)}));
}

std::array<Tensor, kDifferentiable> differentiable(const Arguments& args) {
  return {args.query, args.key, args.mask.value_or(Tensor())};
}

Forward call_forward(const Arguments& args) {
  static const auto op = find_operator<ForwardSignature>("mixhead::_topk_keys_forward");
  return op.call(args.query, args.key, args.k, args.mask, args.metric);
}

Gradients call_backward(
    const Tensor& grad_scores, const Arguments& args, const Tensor& indices,
    OutputMask output_mask) {
  static const auto op = find_operator<BackwardSignature>("mixhead::_topk_keys_backward");
  return op.call(grad_scores, args.query, args.key, args.mask, args.metric, indices, output_mask);
}

}  // namespace topk

std::tuple<at::Tensor, at::Tensor> topk_keys(
    const at::Tensor& query, const at::Tensor& key, int64_t k, const TopkKeysOptions& options) {
  static const auto op = find_operator<topk::ForwardSignature>("mixhead::topk_keys");
  return op.call(query, key, k, options.mask, options.metric);
}

}  // namespace mixhead
