#pragma once

#include <torch/arg.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any_value.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <ostream>
#include <string>
#include <tuple>

#include "multihead_frame.h"

namespace mixhead::nn {

/// Options of MixedMultiheadAttention:
/// `MixedMultiheadAttentionOptions(512, 8).batch_first(true).gate("token")`.
struct MixedMultiheadAttentionOptions : MultiheadOptions<MixedMultiheadAttentionOptions> {
  MixedMultiheadAttentionOptions(int64_t embed_dim, int64_t num_heads)
      : MultiheadOptions(embed_dim, num_heads) {}

  /// "gate" or "joint", as in mixhead::mixed_attention.
  TORCH_ARG(std::string, rule) = "gate";
  /// "head", "token" or "channel" (with rule "gate" only).
  TORCH_ARG(std::string, gate) = "head";
  /// "shared": the projections of key and value; "own": memory_k_proj and memory_v_proj.
  TORCH_ARG(std::string, memory_projection) = "shared";
  /// Initial value of mix; 0 opens a gate by half.
  TORCH_ARG(double, initial_mix) = 0.0;
};

/// torch::nn::MultiheadAttention whose heads can also read an external memory; the twin of Python's
/// mixhead.MixedMultiheadAttention, with its parameter names and initialisation.
///
///   head_h = (1 - w_h) A_s + w_h A_m,  w_h = sigmoid(g_h), or sigmoid(g_h + l_m - l_s) for "joint"
///
/// with the logit g_h by gate: "head" mix[h]; "token" mix[h] + <mix_weight[h], x> for the query's
/// token x before projection; "channel" mix[h, 0, c] for each channel. Gating after Wu et al.,
/// "Memorizing Transformers", 2022. Throws c10::Error where an option does not fit.
class MixedMultiheadAttentionImpl
    : public MultiheadFrame<MixedMultiheadAttentionImpl, MixedMultiheadAttentionOptions> {
 public:
  static constexpr const char* layer_name = "MixedMultiheadAttention";

  MixedMultiheadAttentionImpl(int64_t embed_dim, int64_t num_heads)
      : MixedMultiheadAttentionImpl(MixedMultiheadAttentionOptions(embed_dim, num_heads)) {}
  explicit MixedMultiheadAttentionImpl(MixedMultiheadAttentionOptions options);

  void reset() override;
  /// Initial values, drawn as torch::nn::MultiheadAttention draws them.
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// query (L, B, E), key (S, B, kdim), value (S, B, vdim); with batch_first (B, L, E) and so on;
  /// or without B. An undefined tensor stands for an argument that is left out.
  ///
  /// Two meanings of a bool mask: in key_padding_mask (B, S) and attn_mask (L, S) or (B * Hq, L, S)
  /// true means blocked, as in torch::nn::MultiheadAttention; in memory_mask, which broadcasts to
  /// (B, Hq, L, M), true means may read, as in mixhead::mixed_attention. A float mask is added.
  ///
  /// is_causal: query i reads keys up to S - L + i; where attn_mask is given, that mask alone
  /// decides. memory: (M, E) shared by the batch, or (B, M, E), projected here.
  ///
  /// Returns the output, shaped like query, and the weights over [sequence, memory] (undefined
  /// without need_weights): (B, L, S + M), or (B, Hq, L, S + M) where not averaged. They sum to 1,
  /// and to 0 for a query that may read nothing, whose output heads are 0.
  std::tuple<torch::Tensor, torch::Tensor> forward(
      const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value,
      const torch::Tensor& key_padding_mask = {}, bool need_weights = true,
      const torch::Tensor& attn_mask = {}, bool average_attn_weights = true, bool is_causal = false,
      const torch::Tensor& memory = {}, const torch::Tensor& memory_mask = {});

  /// forward with a memory that is projected already: memory_key and memory_value (H, M, D) shared
  /// by the batch, or (B, H, M, D).
  std::tuple<torch::Tensor, torch::Tensor> attend(
      torch::Tensor query, torch::Tensor key, torch::Tensor value, const torch::Tensor& memory_key,
      const torch::Tensor& memory_value, const torch::Tensor& key_padding_mask = {},
      bool need_weights = true, const torch::Tensor& attn_mask = {},
      bool average_attn_weights = true, bool is_causal = false,
      const torch::Tensor& memory_mask = {});

  /// The keys and values (H, M, D) or (B, H, M, D) of memory tokens (M, E) or (B, M, E).
  std::tuple<torch::Tensor, torch::Tensor> project_memory(const torch::Tensor& memory);

  torch::Tensor mix;
  torch::Tensor mix_weight;
  torch::nn::Linear memory_k_proj{nullptr};
  torch::nn::Linear memory_v_proj{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {3, torch::nn::AnyValue(torch::Tensor())}, {4, torch::nn::AnyValue(true)},
      {5, torch::nn::AnyValue(torch::Tensor())}, {6, torch::nn::AnyValue(true)},
      {7, torch::nn::AnyValue(false)}, {8, torch::nn::AnyValue(torch::Tensor())},
      {9, torch::nn::AnyValue(torch::Tensor())})

 private:
  torch::Tensor mix_logit(const torch::Tensor& query) const;
};

TORCH_MODULE(MixedMultiheadAttention);

}  // namespace mixhead::nn
