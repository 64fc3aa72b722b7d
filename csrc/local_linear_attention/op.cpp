#include "local_linear_attention/op.h"

#include <torch/library.h>

#include <cmath>

#include "checks.h"
#include "find_operator.h"
#include "kernel_attention/kernel_checks.h"
#include "local_linear_attention/arguments.h"

namespace mixhead {
namespace local_linear {
namespace {

constexpr const char* kOp = "local_linear_attention";
using checks::equal;

}  // namespace

void check(const Arguments& args) {
  const auto &query = args.query, &key = args.key;
  MIXHEAD_CHECK(
      std::isfinite(args.ridge) && args.ridge >= 0.0, kOp,
      "ridge must be finite and at least 0, got ", args.ridge);
  checks::query(kOp, query);
  checks::points(kOp, "key", key, query);
  MIXHEAD_CHECK(
      equal(key.sym_size(-3), query.sym_size(-3)), kOp, "key must have ", query.sym_size(-3),
      " heads like query, got ", checks::shape(key));
  kernel_checks::points(kOp, query, key, args.value, /*enable_gqa=*/false);
  kernel_checks::names(kOp, query, args.kernel);
  kernel_checks::bandwidth(kOp, query, args.kernel, args.bandwidth);
  kernel_checks::readable(kOp, query, key, args.exclude_self, args.attn_mask);
}

std::array<Tensor, kDifferentiable> differentiable(const Arguments& args) {
  return {
      args.query, args.key, args.value, args.bandwidth.value_or(Tensor()),
      args.attn_mask.value_or(Tensor())};
}

Forward call_forward(const Arguments& args) {
  static const auto op =
      find_operator<ForwardSignature>("mixhead::_local_linear_attention_forward");
  return op.call(
      args.query, args.key, args.value, args.bandwidth, args.kernel, args.attn_mask, args.is_causal,
      args.exclude_self, args.ridge);
}

Gradients call_backward(const Grads& grads, const Arguments& args, OutputMask output_mask) {
  static const auto op =
      find_operator<BackwardSignature>("mixhead::_local_linear_attention_backward");
  return op.call(
      grads[0], grads[1], grads[2], grads[3], args.query, args.key, args.value, args.bandwidth,
      args.kernel, args.attn_mask, args.is_causal, args.exclude_self, args.ridge, output_mask);
}

}  // namespace local_linear

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> local_linear_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& bandwidth, const std::vector<std::string>& kernel,
    const LocalLinearAttentionOptions& options) {
  static const auto op =
      find_operator<local_linear::ForwardSignature>("mixhead::local_linear_attention");
  return op.call(
      query, key, value, bandwidth, c10::List<std::string>(kernel), options.attn_mask,
      options.is_causal, options.exclude_self, options.ridge);
}

}  // namespace mixhead
