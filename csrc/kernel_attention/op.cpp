#include "kernel_attention/op.h"

#include <torch/library.h>

#include <tuple>

#include "checks.h"
#include "find_operator.h"
#include "kernel_attention/arguments.h"
#include "kernel_attention/kernel_checks.h"

namespace mixhead {
namespace kernels {
namespace {

constexpr const char* kOp = "kernel_attention";

}  // namespace

void check(const Arguments& args) {
  checks::dropout(kOp, args.dropout_p);
  MIXHEAD_CHECK(
      args.empty == "zero" || args.empty == "nan" || args.empty == "nearest", kOp,
      "empty must be \"zero\", \"nan\" or \"nearest\", got \"", args.empty, "\"");
  const auto& [query, key] = std::tie(args.query, args.key);
  checks::query(kOp, query);
  kernel_checks::points(kOp, query, key, args.value, args.enable_gqa);
  kernel_checks::names(kOp, query, args.kernel);
  kernel_checks::bandwidth(kOp, query, args.kernel, args.bandwidth);
  kernel_checks::readable(kOp, query, key, args.exclude_self, args.attn_mask);
}

bool excludes(const Arguments& args) {
  return args.is_causal || args.exclude_self || args.attn_mask;
}

std::array<Tensor, kDifferentiable> differentiable(const Arguments& args) {
  return {
      args.query, args.key, args.value, args.bandwidth.value_or(Tensor()),
      args.attn_mask.value_or(Tensor())};
}

Forward call_forward(const Arguments& args) {
  static const auto op = find_operator<ForwardSignature>("mixhead::_kernel_attention_forward");
  return op.call(
      args.query, args.key, args.value, args.bandwidth, args.kernel, args.attn_mask, args.is_causal,
      args.exclude_self, args.normalize, args.empty, args.dropout_p, args.seed, args.enable_gqa);
}

Gradients call_backward(
    const std::array<Tensor, 2>& grads, const Arguments& args, const Forward& forward,
    OutputMask output_mask) {
  static const auto op = find_operator<BackwardSignature>("mixhead::_kernel_attention_backward");
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
  static const auto op = find_operator<kernels::PublicSignature>("mixhead::kernel_attention");
  return op.call(
      query, key, value, bandwidth, c10::List<std::string>(kernel), options.attn_mask,
      options.is_causal, options.exclude_self, options.normalize, options.empty, options.dropout_p,
      options.enable_gqa);
}

}  // namespace mixhead
