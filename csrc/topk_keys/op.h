#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace mixhead {

/// Options of topk_keys. Aggregate: `{.metric = "cosine"}`.
struct TopkKeysOptions {
  /// bool (true: may read) or additive float, broadcasts to (B, Hq, L, M). An additive mask adds to
  /// the score.
  std::optional<at::Tensor> mask = std::nullopt;
  /// "dot" (q.k), "cosine" (of the angle; 0 for a zero vector) or "l2" (-|q - k|^2).
  std::string metric = "dot";
};

/// The k keys of highest score of each query, exactly, without an L x M tensor.
///
/// query (B, Hq, L, D); key (H, M, D) shared by the batch or (B, H, M, D); Hq is a multiple of H,
/// and query head h reads key head h / (Hq / H). Returns scores (B, Hq, L, k), sorted from high to
/// low, in float32 (float64 for float64), and indices (B, Hq, L, k), int64; of equal scores the
/// lower index comes first. Where fewer than k keys may be read, score -inf and index -1 fill up.
/// NaN counts as the highest score, as in at::topk. The scores are differentiable in query, key
/// and a float mask, twice; indices feed mixed_attention's memory_index.
/// Throws c10::Error naming the argument where one does not fit.
std::tuple<at::Tensor, at::Tensor> topk_keys(
    const at::Tensor& query, const at::Tensor& key, int64_t k, const TopkKeysOptions& options = {});

}  // namespace mixhead
