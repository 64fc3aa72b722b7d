#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace mixhead {

/// Options of local_linear_attention. Aggregate: `{.exclude_self = true, .ridge = 1e-6}`.
struct LocalLinearAttentionOptions {
  /// bool (true: may read) or additive float, broadcasts to (B, Hq, L, S). An additive mask adds to
  /// log K: a prior weight of a data point.
  std::optional<at::Tensor> attn_mask = std::nullopt;
  /// Query i reads keys up to S - L + i.
  bool is_causal = false;
  /// Key i is left out for query i (leave-one-out); needs L == S.
  bool exclude_self = false;
  /// Penalty, at least 0, of the squared slope; the intercept is free.
  double ridge = 0.0;
};

/// Local-linear kernel regression (Stone 1977; Fan & Gijbels 1996, section 3.1): kernel-weighted
/// least squares of degree 1 around each query,
///
///   (a_i, b_i) = argmin sum_j K(q_i, k_j) |v_j - a - b'(k_j - q_i)|^2 + ridge |b|^2
///
/// query (B, H, L, D); key (B, H, S, D) and value (B, H, S, Dv), or both without B: points shared
/// by the batch. bandwidth h > 0 in the units of query and key: (), (H,) or (H, D); absent means
/// D^(1/4). kernel: one name of kernel_attention, or one for each head.
///
/// Returns
///   output    a, (B, H, L, Dv)
///   slope     b, (B, H, L, D, Dv): the marginal effects, in value's units for one of key's
///   leverage  K(q, q) e1'(X'WX + ridge)^-1 e1, (B, H, L), with rows (1, k_j - q_i) in X: the
///             weight that a key placed at the query carries in its own fit
///   log_mass  log sum_j K(q_i, k_j), (B, H, L)
///
/// the last two in float32 (float64 for float64). A singular X'WX (fewer keys in the window than
/// D + 1, a constant channel) has the minimum-norm solution, as of its pseudo-inverse. A row of no
/// mass gives 0, and log_mass -inf. Throws c10::Error naming the argument where one does not fit.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> local_linear_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& bandwidth, const std::vector<std::string>& kernel,
    const LocalLinearAttentionOptions& options = {});

}  // namespace mixhead
