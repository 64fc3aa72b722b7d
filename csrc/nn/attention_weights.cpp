#include "nn/attention_weights.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sigmoid.h>

#include <cmath>
#include <limits>

namespace mixhead::nn {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

at::Tensor softmax_weights(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& lse,
    const std::optional<at::Tensor>& mask, bool is_causal) {
  const int64_t heads = key.size(-3);
  const at::Tensor grouped = query.unflatten(-3, {heads, query.size(-3) / heads});
  at::Tensor scores =
      at::matmul(grouped, key.unsqueeze(-3).transpose(-2, -1)).flatten(-4, -3).to(lse.dtype());
  scores = scores / std::sqrt(static_cast<double>(query.size(-1)));
  if (mask) {
    scores = mask->scalar_type() == at::kBool ? scores.masked_fill(mask->logical_not(), -infinity)
                                              : scores + *mask;
  }
  if (is_causal) {
    const int64_t length = scores.size(-2), keys = scores.size(-1);
    const at::Tensor all = at::ones({length, keys}, scores.options().dtype(at::kBool));
    scores = scores.masked_fill(all.triu(keys - length + 1), -infinity);
  }
  // A row that reads nothing has every score and its log-sum-exp at -inf; their difference would
  // be NaN.
  return at::exp(scores - lse.masked_fill(lse == -infinity, 0.0).unsqueeze(-1));
}

/// The memory's share w of a query's attention, broadcastable to (B, Hq, L, 1).
at::Tensor memory_share(
    const at::Tensor& mix, const at::Tensor& self_lse, const at::Tensor& memory_lse,
    const std::string& rule) {
  const at::Tensor reads_nothing_self = (self_lse == -infinity).unsqueeze(-1);
  const at::Tensor reads_nothing_memory = (memory_lse == -infinity).unsqueeze(-1);
  at::Tensor logit = mix.to(self_lse.dtype());
  if (rule == "joint") {
    logit = logit + memory_lse.unsqueeze(-1).masked_fill(reads_nothing_memory, 0.0) -
            self_lse.unsqueeze(-1).masked_fill(reads_nothing_self, 0.0);
  }
  const at::Tensor share = at::sigmoid(logit).mean(-1, /*keepdim=*/true);
  return share.masked_fill(reads_nothing_self, 1.0).masked_fill(reads_nothing_memory, 0.0);
}

}  // namespace

at::Tensor mixed_attention_weights(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& memory_key,
    const at::Tensor& mix, const at::Tensor& self_lse, const at::Tensor& memory_lse,
    const MixedAttentionOptions& options) {
  const at::Tensor self_weights =
      softmax_weights(query, key, self_lse, options.attn_mask, options.is_causal);
  const at::Tensor memory_weights =
      softmax_weights(query, memory_key, memory_lse, options.memory_mask, false);
  const at::Tensor share = memory_share(mix, self_lse, memory_lse, options.rule);
  return at::cat({(1 - share) * self_weights, share * memory_weights}, -1).to(query.dtype());
}

}  // namespace mixhead::nn
