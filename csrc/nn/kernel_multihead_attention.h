#pragma once

#include <torch/arg.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any_value.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include "multihead_frame.h"

namespace mixhead::nn {

/// Options of KernelMultiheadAttention:
/// `KernelMultiheadAttentionOptions(512, 8).batch_first(true).kernel({"laplacian"})`.
struct KernelMultiheadAttentionOptions : MultiheadOptions<KernelMultiheadAttentionOptions> {
  KernelMultiheadAttentionOptions(int64_t embed_dim, int64_t num_heads)
      : MultiheadOptions(embed_dim, num_heads) {}

  /// One name, or one for each query head; see mixhead::kernel_attention.
  TORCH_ARG(std::vector<std::string>, kernel) = {"gaussian"};
  /// Initial bandwidth in the units of the projected queries and keys: (), (Hq,) or (Hq, D);
  /// undefined means D^(1/4).
  TORCH_ARG(torch::Tensor, bandwidth);
  /// Whether log_bandwidth is a parameter; otherwise it is a buffer.
  TORCH_ARG(bool, learn_bandwidth) = true;
};

/// torch::nn::MultiheadAttention whose heads are kernel regressions (Nadaraya 1964, Watson 1964),
/// each with its own kernel and bandwidth; the twin of Python's mixhead.KernelMultiheadAttention,
/// with its parameter names and initialisation.
///
///   head_h = sum_j K_h(q_i, k_j) v_j / sum_j K_h(q_i, k_j),
///   bandwidth_h = D^(1/4) exp(log_bandwidth_h)
///
/// With kernel "dot" and the default bandwidth it equals torch::nn::MultiheadAttention. Throws
/// c10::Error where an option does not fit.
class KernelMultiheadAttentionImpl
    : public MultiheadFrame<KernelMultiheadAttentionImpl, KernelMultiheadAttentionOptions> {
 public:
  static constexpr const char* layer_name = "KernelMultiheadAttention";

  KernelMultiheadAttentionImpl(int64_t embed_dim, int64_t num_heads)
      : KernelMultiheadAttentionImpl(KernelMultiheadAttentionOptions(embed_dim, num_heads)) {}
  explicit KernelMultiheadAttentionImpl(KernelMultiheadAttentionOptions options);

  void reset() override;
  /// Initial values, drawn as torch::nn::MultiheadAttention draws them.
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// query (L, B, E), key (S, B, kdim), value (S, B, vdim); with batch_first (B, L, E) and so on;
  /// or without B. An undefined tensor stands for an argument that is left out. In
  /// key_padding_mask (B, S) and attn_mask (L, S) or (B * Hq, L, S) a bool true means blocked, as
  /// in torch::nn::MultiheadAttention; a float mask is added to log K. is_causal: query i reads
  /// keys up to S - L + i; where attn_mask is given, that mask alone decides.
  ///
  /// Returns the output, shaped like query, and the weights (undefined without need_weights):
  /// (B, L, S), or (B, Hq, L, S) where not averaged. They sum to 1, and to 0 for a query without
  /// mass, whose heads are 0.
  std::tuple<torch::Tensor, torch::Tensor> forward(
      torch::Tensor query, torch::Tensor key, torch::Tensor value,
      const torch::Tensor& key_padding_mask = {}, bool need_weights = true,
      const torch::Tensor& attn_mask = {}, bool average_attn_weights = true,
      bool is_causal = false);

  /// The bandwidths (Hq,) or (Hq, D), positive.
  torch::Tensor bandwidth() const;

  torch::Tensor log_bandwidth;

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {3, torch::nn::AnyValue(torch::Tensor())}, {4, torch::nn::AnyValue(true)},
      {5, torch::nn::AnyValue(torch::Tensor())}, {6, torch::nn::AnyValue(true)},
      {7, torch::nn::AnyValue(false)})

 private:
  void check_kernel() const;
  torch::Tensor initial_bandwidth() const;
};

TORCH_MODULE(KernelMultiheadAttention);

}  // namespace mixhead::nn
