#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace mixhead {

/// Options of mixed_attention. Aggregate: `{.rule = "joint", .is_causal = true}`.
///
/// Letters: B batch (any number of leading dimensions), Hq query heads, H key/value heads,
/// L queries, S keys, M memory slots, K slots a query names, D head size, Dv value head size.
struct MixedAttentionOptions {
  /// "gate": w = sigmoid(mix). "joint": w = sigmoid(mix + memory_lse - self_lse), which is one
  /// softmax over both key sets with mix added to the memory's scores.
  std::string rule = "gate";
  /// bool (true: may read) or additive float, broadcasts to (B, Hq, L, S).
  std::optional<at::Tensor> attn_mask = std::nullopt;
  /// bool (true: may read) or additive float, broadcasts to (B, Hq, L, M).
  std::optional<at::Tensor> memory_mask = std::nullopt;
  /// int64 (B, Hq, L, K), -1 for none: each query reads only these slots. A slot named twice counts
  /// twice.
  std::optional<at::Tensor> memory_index = std::nullopt;
  /// Probability with which an attention weight of either side is dropped, in [0, 1]; reproducible
  /// under torch::manual_seed.
  double dropout_p = 0.0;
  /// Query i reads keys up to S - L + i; the memory is never causal.
  bool is_causal = false;
  /// Factor of the scores; 1 / sqrt(D) where absent.
  std::optional<double> scale = std::nullopt;
  /// Hq may be a multiple of H; query head h then reads key head h / (Hq / H).
  bool enable_gqa = false;
};

/// Attention over a sequence mixed with attention over an external memory:
///
///   output = (1 - w) A_s + w A_m
///
/// where A_s, self_lse are softmax attention over the sequence and its log-sum-exp, A_m, memory_lse
/// the same over the memory, and w is given by MixedAttentionOptions::rule (gating after Wu et al.,
/// "Memorizing Transformers", 2022).
///
/// query (B, Hq, L, D), key (B, H, S, D), value (B, H, S, Dv); memory_key (H, M, D) and
/// memory_value (H, M, Dv) shared by the batch, or (B, H, M, D) and (B, H, M, Dv); M may be 0.
/// mix is a logit that broadcasts to (B, Hq, L, 1), or with rule "gate" to (B, Hq, L, Dv).
/// A row that may read nothing on one side takes everything from the other; one that may read
/// nothing at all gives output 0.
///
/// Returns output (B, Hq, L, Dv), self_lse (B, Hq, L), memory_lse (B, Hq, L); the log-sum-exps in
/// float32 (float64 for float64), -inf where a row may read nothing. All are differentiable, twice.
/// Memory use is linear in S and M. Throws c10::Error naming the argument where one does not fit.
std::tuple<at::Tensor, at::Tensor, at::Tensor> mixed_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& memory_key, const at::Tensor& memory_value, const at::Tensor& mix,
    const MixedAttentionOptions& options = {});

}  // namespace mixhead
