#include "kernel_attention/op.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/min.h>
#include <torch/library.h>

#include <cmath>

#include "checks.h"
#include "kernel_attention/arguments.h"
#include "kernel_attention/kernels.h"

namespace mixhead {
namespace kernels {
namespace {

constexpr const char* kOp = "kernel_attention";
using checks::equal;
using checks::shape;

void check_names(const Arguments& args) {
  const auto count = static_cast<int64_t>(args.kernel.size());
  MIXHEAD_CHECK(
      count == 1 || (count > 0 && equal(args.query.sym_size(-3), count)), kOp,
      "kernel must be one name or one for each of query's ", args.query.sym_size(-3),
      " heads, got ", count);
  for (const std::string& name : args.kernel) {
    std::string known;
    for (const auto& each : kKernelNames) known += (known.empty() ? "" : ", ") + std::string(each);
    MIXHEAD_CHECK(
        kernel_named(name).has_value(), kOp, "kernel must be one of ", known, ", got \"", name,
        "\"");
  }
}

void check_points(const Arguments& args) {
  const auto& [query, key, value] = std::tie(args.query, args.key, args.value);
  checks::points(kOp, "key", key, query);
  checks::points(kOp, "value", value, query);
  checks::key_heads(kOp, "key", key, query, args.enable_gqa);
  MIXHEAD_CHECK(
      equal(key.sym_size(-1), query.sym_size(-1)), kOp, "key must have ", query.sym_size(-1),
      " channels like query, got ", shape(key));
  MIXHEAD_CHECK(
      value.dim() == key.dim() && equal(value.sym_size(-3), key.sym_size(-3)) &&
          equal(value.sym_size(-2), key.sym_size(-2)),
      kOp, "value must have ", key.sym_size(-3), " heads, ", key.sym_size(-2), " rows and ",
      key.dim(), " dimensions like key, got ", shape(value));
  MIXHEAD_CHECK(
      !args.exclude_self || equal(query.sym_size(-2), key.sym_size(-2)), kOp, "key must have ",
      query.sym_size(-2), " rows like query with exclude_self, got ", shape(key));
}

void check_bandwidth(const Arguments& args) {
  if (!args.bandwidth) return;
  const auto& [query, bandwidth] = std::tie(args.query, *args.bandwidth);
  checks::companion(kOp, "bandwidth", bandwidth, query, "query", /*float32_too=*/true);
  const auto heads = query.sym_size(-3), channels = query.sym_size(-1);
  const bool fits = bandwidth.dim() == 0 ||
                    (bandwidth.dim() == 1 && equal(bandwidth.sym_size(0), heads)) ||
                    (bandwidth.dim() == 2 && equal(bandwidth.sym_size(0), heads) &&
                     equal(bandwidth.sym_size(1), channels));
  MIXHEAD_CHECK(
      fits, kOp, "bandwidth must be a scalar, (", heads, ",) or (", heads, ", ", channels,
      "), got ", shape(bandwidth));
  for (const std::string& name : args.kernel) {
    MIXHEAD_CHECK(
        name != "cosine" || bandwidth.dim() < 2, kOp, "bandwidth must be a scalar or (", heads,
        ",) with kernel \"cosine\", got one per channel ", shape(bandwidth));
  }
  if (!checks::has_values(bandwidth)) return;
  const auto smallest = at::min(bandwidth.detach()).item<double>();
  MIXHEAD_CHECK(smallest > 0.0, kOp, "bandwidth must be positive, got ", smallest);
}

}  // namespace

void check(const Arguments& args) {
  checks::dropout(kOp, args.dropout_p);
  MIXHEAD_CHECK(
      args.empty == "zero" || args.empty == "nan" || args.empty == "nearest", kOp,
      "empty must be \"zero\", \"nan\" or \"nearest\", got \"", args.empty, "\"");
  checks::query(kOp, args.query);
  check_points(args);
  check_names(args);
  check_bandwidth(args);
  if (!args.attn_mask) return;
  checks::mask(
      kOp, "attn_mask", *args.attn_mask, args.query,
      checks::like_query(
          args.query, {args.query.sym_size(-3), args.query.sym_size(-2), args.key.sym_size(-2)}));
}

std::array<Tensor, kDifferentiable> differentiable(const Arguments& args) {
  return {
      args.query, args.key, args.value, args.bandwidth.value_or(Tensor()),
      args.attn_mask.value_or(Tensor())};
}

Forward call_forward(const Arguments& args) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mixhead::_kernel_attention_forward", "")
                             .typed<ForwardSignature>();
  return op.call(
      args.query, args.key, args.value, args.bandwidth, args.kernel, args.attn_mask, args.is_causal,
      args.exclude_self, args.normalize, args.empty, args.dropout_p, args.seed, args.enable_gqa);
}

Gradients call_backward(
    const std::array<Tensor, 2>& grads, const Arguments& args, const Forward& forward,
    OutputMask output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mixhead::_kernel_attention_backward", "")
                             .typed<BackwardSignature>();
  const auto& [output, log_mass] = forward;
  return op.call(
      grads[0], grads[1], args.query, args.key, args.value, args.bandwidth, args.kernel,
      args.attn_mask, args.is_causal, args.exclude_self, args.normalize, args.empty, args.dropout_p,
      args.seed, args.enable_gqa, output, log_mass, output_mask);
}

}  // namespace kernels

std::tuple<at::Tensor, at::Tensor> kernel_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& bandwidth, const std::vector<std::string>& kernel,
    const KernelAttentionOptions& options) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mixhead::kernel_attention", "")
                             .typed<kernels::PublicSignature>();
  return op.call(
      query, key, value, bandwidth, c10::List<std::string>(kernel), options.attn_mask,
      options.is_causal, options.exclude_self, options.normalize, options.empty, options.dropout_p,
      options.enable_gqa);
}

}  // namespace mixhead
