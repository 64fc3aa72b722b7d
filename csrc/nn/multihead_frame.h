#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

namespace mixhead::nn {

/// As TORCH_ARG, for a base of options: the setter returns the options that derive from it.
#define MIXHEAD_MULTIHEAD_ARG(T, name)      \
 public:                                    \
  Options& name(T value) {                  \
    name##_ = value;                        \
    return static_cast<Options&>(*this);    \
  }                                         \
  const T& name() const { return name##_; } \
                                            \
 private:                                   \
  T name##_

/// The options that every multihead layer has.
template <typename Options>
class MultiheadOptions {
  /// Width E of the queries and of the output.
  MIXHEAD_MULTIHEAD_ARG(int64_t, embed_dim);
  /// Query heads Hq; divides embed_dim.
  MIXHEAD_MULTIHEAD_ARG(int64_t, num_heads);
  /// Probability with which an attention weight is dropped in training.
  MIXHEAD_MULTIHEAD_ARG(double, dropout) = 0.0;
  /// Whether the projections have biases.
  MIXHEAD_MULTIHEAD_ARG(bool, bias) = true;
  /// A learned key and value behind the sequence, which every query may read.
  MIXHEAD_MULTIHEAD_ARG(bool, add_bias_kv) = false;
  /// A key and a value of zeros behind the sequence.
  MIXHEAD_MULTIHEAD_ARG(bool, add_zero_attn) = false;
  /// Width of the keys; embed_dim by default.
  MIXHEAD_MULTIHEAD_ARG(int64_t, kdim);
  /// Width of the values; embed_dim by default.
  MIXHEAD_MULTIHEAD_ARG(int64_t, vdim);
  /// Inputs and output are (B, L, E), not (L, B, E).
  MIXHEAD_MULTIHEAD_ARG(bool, batch_first) = false;
  /// Key/value heads H, a divisor of num_heads; num_heads by default.
  MIXHEAD_MULTIHEAD_ARG(int64_t, num_kv_heads);

  friend Options;
  MultiheadOptions(int64_t embed_dim, int64_t num_heads)
      : embed_dim_(embed_dim),
        num_heads_(num_heads),
        kdim_(embed_dim),
        vdim_(embed_dim),
        num_kv_heads_(num_heads) {}
};

#undef MIXHEAD_MULTIHEAD_ARG

/// The frame of torch::nn::MultiheadAttention around an attention operator: projections, masks and
/// shapes. A layer `Impl` derives from it with its `LayerOptions`, names itself in
/// `Impl::layer_name`, and in reset() registers the projections, then its own parameters.
template <typename Impl, typename LayerOptions>
class MultiheadFrame : public torch::nn::Cloneable<Impl> {
 public:
  LayerOptions options;
  torch::Tensor in_proj_weight;
  torch::Tensor in_proj_bias;
  torch::Tensor q_proj_weight;
  torch::Tensor k_proj_weight;
  torch::Tensor v_proj_weight;
  torch::Tensor bias_k;
  torch::Tensor bias_v;
  torch::nn::Linear out_proj{nullptr};

 protected:
  using Tensors = std::tuple<torch::Tensor, torch::Tensor, torch::Tensor>;

  int64_t head_dim() const { return options.embed_dim() / options.num_heads(); }
  int64_t kv_dim() const { return options.num_kv_heads() * head_dim(); }
  bool grouped() const { return options.num_kv_heads() != options.num_heads(); }

  /// Throws c10::Error naming the layer and the option that does not fit.
  void check_frame() const;
  void register_projections();
  /// A parameter that is not wanted is registered as undefined, as torch::nn::MultiheadAttention
  /// does.
  torch::Tensor parameter(const char* name, bool wanted, torch::IntArrayRef shape);
  void reset_projections();
  void print_frame(std::ostream& stream) const;

  void check_input(
      const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value) const;
  /// An input (L, B, E), (B, L, E) or (L, E) as (B, L, E).
  torch::Tensor batch_first(const torch::Tensor& tokens) const;
  /// The operator's mask for query and key, which are batch first.
  std::optional<at::Tensor> mask(
      const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& key_padding_mask,
      const torch::Tensor& attn_mask, bool batched) const;
  /// Heads (B, Hq or H, L or S, D) of tokens (B, L or S, width).
  torch::Tensor query_heads(const torch::Tensor& query) const;
  torch::Tensor key_heads(const torch::Tensor& key) const;
  torch::Tensor value_heads(const torch::Tensor& value) const;
  torch::Tensor split_key_heads(const torch::Tensor& projected) const;
  /// Appends the heads of add_bias_kv and add_zero_attn to keys and values (B, H, S, D), with the
  /// mask and the causality that go with them. `rows`: queries.
  void extend(
      torch::Tensor& key, torch::Tensor& value, std::optional<at::Tensor>& mask, bool& is_causal,
      int64_t rows) const;
  /// The output in the layout of the query, from heads (B, Hq, L, D).
  torch::Tensor output(const torch::Tensor& heads, bool batched);
  /// Weights (B, Hq, L, S) as torch::nn::MultiheadAttention returns them.
  torch::Tensor returned_weights(torch::Tensor weights, bool batched, bool average) const;

 private:
  friend Impl;
  explicit MultiheadFrame(LayerOptions options) : options(std::move(options)) {}

  torch::Tensor project_rows(
      const torch::Tensor& tokens, const torch::Tensor& weight, int64_t start,
      int64_t length) const;
};

}  // namespace mixhead::nn
