#include "nn/multihead_frame.h"

#include <torch/nn/functional/linear.h>
#include <torch/nn/init.h>

#include "nn/kernel_multihead_attention.h"
#include "nn/masks.h"
#include "nn/mixed_multihead_attention.h"

namespace mixhead::nn {

template <typename Impl, typename LayerOptions>
void MultiheadFrame<Impl, LayerOptions>::check_frame() const {
  const auto check_positive = [](const char* name, int64_t number) {
    TORCH_CHECK(number > 0, Impl::layer_name, ": ", name, " must be positive, got ", number);
  };
  check_positive("embed_dim", options.embed_dim());
  check_positive("num_heads", options.num_heads());
  check_positive("num_kv_heads", options.num_kv_heads());
  check_positive("kdim", options.kdim());
  check_positive("vdim", options.vdim());
  TORCH_CHECK(
      options.embed_dim() % options.num_heads() == 0, Impl::layer_name,
      ": embed_dim must be a multiple of num_heads, got ", options.embed_dim(), " and ",
      options.num_heads());
  TORCH_CHECK(
      options.num_heads() % options.num_kv_heads() == 0, Impl::layer_name,
      ": num_heads must be a multiple of num_kv_heads, got ", options.num_heads(), " and ",
      options.num_kv_heads());
  TORCH_CHECK(
      options.dropout() >= 0 && options.dropout() <= 1, Impl::layer_name,
      ": dropout must be in [0, 1], got ", options.dropout());
}

template <typename Impl, typename LayerOptions>
torch::Tensor MultiheadFrame<Impl, LayerOptions>::parameter(
    const char* name, bool wanted, torch::IntArrayRef shape) {
  return this->register_parameter(name, wanted ? torch::empty(shape) : torch::Tensor(), wanted);
}

template <typename Impl, typename LayerOptions>
void MultiheadFrame<Impl, LayerOptions>::register_projections() {
  const int64_t embed_dim = options.embed_dim();
  const bool packed = options.kdim() == embed_dim && options.vdim() == embed_dim;
  in_proj_weight = parameter("in_proj_weight", packed, {embed_dim + 2 * kv_dim(), embed_dim});
  q_proj_weight = parameter("q_proj_weight", !packed, {embed_dim, embed_dim});
  k_proj_weight = parameter("k_proj_weight", !packed, {kv_dim(), options.kdim()});
  v_proj_weight = parameter("v_proj_weight", !packed, {kv_dim(), options.vdim()});
  in_proj_bias = parameter("in_proj_bias", options.bias(), {embed_dim + 2 * kv_dim()});
  bias_k = parameter("bias_k", options.add_bias_kv(), {1, 1, kv_dim()});
  bias_v = parameter("bias_v", options.add_bias_kv(), {1, 1, kv_dim()});
  const auto square = torch::nn::LinearOptions(embed_dim, embed_dim).bias(options.bias());
  out_proj = this->register_module("out_proj", torch::nn::Linear(square));
}

template <typename Impl, typename LayerOptions>
void MultiheadFrame<Impl, LayerOptions>::reset_projections() {
  for (const auto& weight : {in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight}) {
    if (weight.defined()) {
      torch::nn::init::xavier_uniform_(weight);
    }
  }
  if (in_proj_bias.defined()) {
    torch::nn::init::zeros_(in_proj_bias);
    torch::nn::init::zeros_(out_proj->bias);
  }
  for (const auto& bias : {bias_k, bias_v}) {
    if (bias.defined()) {
      torch::nn::init::xavier_normal_(bias);
    }
  }
}

template <typename Impl, typename LayerOptions>
void MultiheadFrame<Impl, LayerOptions>::print_frame(std::ostream& stream) const {
  stream << std::boolalpha << "mixhead::nn::" << Impl::layer_name
         << "(embed_dim=" << options.embed_dim() << ", num_heads=" << options.num_heads()
         << ", num_kv_heads=" << options.num_kv_heads() << ", dropout=" << options.dropout()
         << ", kdim=" << options.kdim() << ", vdim=" << options.vdim()
         << ", batch_first=" << options.batch_first();
}

template <typename Impl, typename LayerOptions>
void MultiheadFrame<Impl, LayerOptions>::check_input(
    const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value) const {
  TORCH_CHECK(
      query.dim() == 2 || query.dim() == 3, Impl::layer_name,
      ": query must have 2 or 3 dimensions, got ", query.sizes());
  const auto check = [&](const char* name, const torch::Tensor& tensor, int64_t width) {
    TORCH_CHECK(
        tensor.dim() == query.dim() && tensor.size(-1) == width, Impl::layer_name, ": ", name,
        " must have ", query.dim(), " dimensions, the last of ", width, ", got ", tensor.sizes());
  };
  check("query", query, options.embed_dim());
  check("key", key, options.kdim());
  check("value", value, options.vdim());
}

template <typename Impl, typename LayerOptions>
torch::Tensor MultiheadFrame<Impl, LayerOptions>::batch_first(const torch::Tensor& tokens) const {
  if (tokens.dim() == 2) {
    return tokens.unsqueeze(0);
  }
  return options.batch_first() ? tokens : tokens.transpose(0, 1);
}

template <typename Impl, typename LayerOptions>
std::optional<at::Tensor> MultiheadFrame<Impl, LayerOptions>::mask(
    const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& key_padding_mask,
    const torch::Tensor& attn_mask, bool batched) const {
  const bool add_batch = key_padding_mask.defined() && !batched;
  return sequence_mask(
      Impl::layer_name, add_batch ? key_padding_mask.unsqueeze(0) : key_padding_mask, attn_mask,
      query.size(0), options.num_heads(), query.size(1), key.size(1));
}

template <typename Impl, typename LayerOptions>
torch::Tensor MultiheadFrame<Impl, LayerOptions>::query_heads(const torch::Tensor& query) const {
  return project_rows(query, q_proj_weight, 0, options.embed_dim())
      .unflatten(-1, {options.num_heads(), head_dim()})
      .transpose(-3, -2);
}

template <typename Impl, typename LayerOptions>
torch::Tensor MultiheadFrame<Impl, LayerOptions>::key_heads(const torch::Tensor& key) const {
  return split_key_heads(project_rows(key, k_proj_weight, options.embed_dim(), kv_dim()));
}

template <typename Impl, typename LayerOptions>
torch::Tensor MultiheadFrame<Impl, LayerOptions>::value_heads(const torch::Tensor& value) const {
  return split_key_heads(
      project_rows(value, v_proj_weight, options.embed_dim() + kv_dim(), kv_dim()));
}

template <typename Impl, typename LayerOptions>
torch::Tensor MultiheadFrame<Impl, LayerOptions>::split_key_heads(
    const torch::Tensor& projected) const {
  return projected.unflatten(-1, {options.num_kv_heads(), head_dim()}).transpose(-3, -2);
}

template <typename Impl, typename LayerOptions>
void MultiheadFrame<Impl, LayerOptions>::extend(
    torch::Tensor& key, torch::Tensor& value, std::optional<at::Tensor>& mask, bool& is_causal,
    int64_t rows) const {
  const int64_t keys = key.size(-2);
  int64_t added = 0;
  const auto append = [&](const torch::Tensor& more_keys, const torch::Tensor& more_values) {
    key = torch::cat({key, more_keys.expand({key.size(0), -1, -1, -1})}, -2);
    value = torch::cat({value, more_values.expand({value.size(0), -1, -1, -1})}, -2);
    ++added;
  };
  if (bias_k.defined()) {
    append(split_key_heads(bias_k), split_key_heads(bias_v));
  }
  if (options.add_zero_attn()) {
    const auto zeros = key.new_zeros({1, key.size(1), 1, key.size(3)});
    append(zeros, zeros);
  }
  if (added == 0) {
    return;
  }
  if (is_causal) {
    const auto past =
        torch::ones({rows, keys}, key.options().dtype(torch::kBool)).tril(keys - rows);
    mask = mask ? both(past, *mask) : past;
    is_causal = false;
  }
  if (mask) {
    const bool boolean = mask->scalar_type() == torch::kBool;
    mask = torch::constant_pad_nd(*mask, {0, added}, boolean ? 1 : 0);
  }
}

template <typename Impl, typename LayerOptions>
torch::Tensor MultiheadFrame<Impl, LayerOptions>::project_rows(
    const torch::Tensor& tokens, const torch::Tensor& weight, int64_t start, int64_t length) const {
  return torch::nn::functional::linear(
      tokens, in_proj_weight.defined() ? in_proj_weight.narrow(0, start, length) : weight,
      in_proj_bias.defined() ? in_proj_bias.narrow(0, start, length) : torch::Tensor());
}

template <typename Impl, typename LayerOptions>
torch::Tensor MultiheadFrame<Impl, LayerOptions>::output(const torch::Tensor& heads, bool batched) {
  const torch::Tensor output = out_proj(heads.transpose(1, 2).flatten(2));
  if (!batched) {
    return output.squeeze(0);
  }
  return options.batch_first() ? output : output.transpose(0, 1);
}

template <typename Impl, typename LayerOptions>
torch::Tensor MultiheadFrame<Impl, LayerOptions>::returned_weights(
    torch::Tensor weights, bool batched, bool average) const {
  weights = average ? weights.mean(1) : weights;
  return batched ? weights : weights.squeeze(0);
}

template class MultiheadFrame<MixedMultiheadAttentionImpl, MixedMultiheadAttentionOptions>;
template class MultiheadFrame<KernelMultiheadAttentionImpl, KernelMultiheadAttentionOptions>;

}  // namespace mixhead::nn
