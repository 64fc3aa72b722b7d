#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace mixhead {

/// Options of matching_attention. Aggregate: `{.dustbin = score, .iterations = 200}`.
struct MatchingAttentionOptions {
  /// Mass of each row, broadcasts to (B, Hq, L); absent: 1 each.
  std::optional<at::Tensor> row_mass = std::nullopt;
  /// Mass of each column, broadcasts to (B, Hq, S), scaled to the total of the rows; absent: equal.
  /// With a dustbin the masses count as they are, and absent means 1 each.
  std::optional<at::Tensor> column_mass = std::nullopt;
  /// Log-kernel of every point with a row and a column more that take what stays unmatched: () or
  /// (Hq,).
  std::optional<at::Tensor> dustbin = std::nullopt;
  /// Sinkhorn iterations at most; 0 is the row softmax. After the first 50, where they crawl, every
  /// second one is a Newton step (Brauer et al. 2017).
  int64_t iterations = 50;
  /// Ends the iterations once no column misses its mass by more than this share of it.
  double tolerance = 1e-6;
};

/// Attention by entropic optimal transport (Sinkhorn 1964, Cuturi 2013): the plan
///
///   P_ij = exp(row_potential_i + log K(q_i, k_j) + column_potential_j)
///
/// has the row sums row_mass and the column sums column_mass, and
///
///   output_i = sum_j P_ij v_j / row_mass_i.
///
/// query (B, Hq, L, D), key (B, Hq, S, D), value (B, Hq, S, Dv), the last two also without B;
/// bandwidth and kernel as in kernel_attention. With a dustbin (Sarlin et al. 2020, SuperGlue) its
/// row holds the total of the columns and its column the total of the rows; its value is 0.
///
/// The plan is never stored: each half of an iteration is one pass of kernel_attention. Gradients
/// are those of the converged plan, by the implicit function theorem.
///
/// Returns output (B, Hq, L, Dv), row_potential (B, Hq, L) and column_potential (B, Hq, S), float32
/// (float64 for float64); -inf for a point without mass or partner. The column potentials, the
/// dustbin's among them, sum to 0. Throws c10::Error naming the argument where one does not fit.
std::tuple<at::Tensor, at::Tensor, at::Tensor> matching_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& bandwidth, const std::vector<std::string>& kernel,
    const MatchingAttentionOptions& options = {});

}  // namespace mixhead
