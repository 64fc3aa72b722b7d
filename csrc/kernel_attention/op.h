#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace mixhead {

/// Options of kernel_attention. Aggregate: `{.is_causal = true, .empty = "nan"}`.
struct KernelAttentionOptions {
  /// bool (true: may read) or additive float, broadcasts to (B, Hq, L, S). An additive mask adds to
  /// log K: a prior weight of a data point.
  std::optional<at::Tensor> attn_mask = std::nullopt;
  /// Query i reads keys up to S - L + i.
  bool is_causal = false;
  /// Key i is left out for query i (leave-one-out); needs L == S.
  bool exclude_self = false;
  /// False: the plain sum over keys of K v.
  bool normalize = true;
  /// What a normalized row of no mass gives: "zero", "nan", or "nearest", the value of the nearest
  /// readable key (0 where none is readable).
  std::string empty = "zero";
  /// Probability with which a weight is dropped, in [0, 1]; reproducible under torch::manual_seed.
  double dropout_p = 0.0;
  /// Hq may be a multiple of H; query head h then reads key head h / (Hq / H).
  bool enable_gqa = false;
};

/// Nadaraya-Watson kernel regression (Nadaraya 1964, Watson 1964):
///
///   output_i = sum_j K(q_i, k_j) v_j / sum_j K(q_i, k_j),  log_mass_i = log sum_j K(q_i, k_j)
///
/// query (B, Hq, L, D); key (B, H, S, D) and value (B, H, S, Dv), or both without B: points shared
/// by the batch. bandwidth h > 0 in the units of query and key: (), (Hq,) or (Hq, D), one per
/// channel (not for "cosine"); absent means D^(1/4), with which "dot" is scaled dot-product
/// attention. kernel: one name, or one for each query head, with u = norm((q - k) / h):
///
///   dot          exp((q/h).(k/h))           cauchy        1 / (1 + u^2)
///   cosine       exp(cos(q, k) / h^2)       epanechnikov  max(0, 1 - u^2)
///   gaussian     exp(-u^2 / 2)              tricube       max(0, 1 - u^3)^3
///   laplacian    exp(-u)                    boxcar        1 if u <= 1 else 0
///   matern32     (1 + sqrt(3) u) exp(-sqrt(3) u)
///   matern52     (1 + sqrt(5) u + 5 u^2 / 3) exp(-sqrt(5) u)
///
/// The cosine of a zero vector is 0; "boxcar" has no gradient to query, key and bandwidth; at the
/// cusp of "laplacian" the subgradient is 0.
///
/// Returns output (B, Hq, L, Dv), and log_mass (B, Hq, L) in float32 (float64 for float64), -inf
/// for a row of no mass; both are differentiable, twice. Memory use is linear in S. Throws
/// c10::Error naming the argument where one does not fit.
std::tuple<at::Tensor, at::Tensor> kernel_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& bandwidth, const std::vector<std::string>& kernel,
    const KernelAttentionOptions& options = {});

}  // namespace mixhead
