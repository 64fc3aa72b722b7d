#include "nn/mixed_multihead_attention.h"

#include <torch/nn/functional/linear.h>
#include <torch/nn/init.h>

#include <initializer_list>

#include "mixed_attention/op.h"
#include "nn/attention_weights.h"

namespace mixhead::nn {
namespace {

constexpr const char* layer = "MixedMultiheadAttention: ";

void check_choice(
    const char* name, const std::string& choice, std::initializer_list<const char*> allowed) {
  std::string listed;
  for (const char* other : allowed) {
    if (choice == other) {
      return;
    }
    listed += (listed.empty() ? "'" : ", '") + std::string(other) + "'";
  }
  TORCH_CHECK(false, layer, name, " must be one of ", listed, ", got '", choice, "'");
}

void check_memory_width(const torch::Tensor& memory, int64_t width) {
  TORCH_CHECK(
      memory.size(-1) == width, layer, "memory must be (M, ", width, ") or (B, M, ", width,
      "), got ", memory.sizes());
}

void check_gate(const MixedMultiheadAttentionOptions& options) {
  check_choice("rule", options.rule(), {"gate", "joint"});
  check_choice("gate", options.gate(), {"head", "token", "channel"});
  check_choice("memory_projection", options.memory_projection(), {"shared", "own"});
  TORCH_CHECK(
      options.rule() != "joint" || options.gate() != "channel", layer,
      "gate='channel' needs rule='gate', got rule='joint', whose softmax has one weight for all "
      "channels");
}

}  // namespace

MixedMultiheadAttentionImpl::MixedMultiheadAttentionImpl(MixedMultiheadAttentionOptions options)
    : MultiheadFrame(std::move(options)) {
  reset();
}

void MixedMultiheadAttentionImpl::reset() {
  check_frame();
  check_gate(options);
  register_projections();
  const int64_t mix_width = options.gate() == "channel" ? head_dim() : 1;
  mix = parameter("mix", true, {options.num_heads(), 1, mix_width});
  mix_weight = parameter(
      "mix_weight", options.gate() == "token", {options.num_heads(), options.embed_dim()});
  if (options.memory_projection() == "own") {
    const auto projection =
        torch::nn::LinearOptions(options.embed_dim(), kv_dim()).bias(options.bias());
    memory_k_proj = register_module("memory_k_proj", torch::nn::Linear(projection));
    memory_v_proj = register_module("memory_v_proj", torch::nn::Linear(projection));
  }
  reset_parameters();
}

void MixedMultiheadAttentionImpl::reset_parameters() {
  reset_projections();
  for (const auto& projection : {memory_k_proj, memory_v_proj}) {
    if (!projection.is_empty()) {
      torch::nn::init::xavier_uniform_(projection->weight);
      if (projection->bias.defined()) {
        torch::nn::init::zeros_(projection->bias);
      }
    }
  }
  torch::nn::init::constant_(mix, options.initial_mix());
  if (mix_weight.defined()) {
    torch::nn::init::zeros_(mix_weight);
  }
}

void MixedMultiheadAttentionImpl::pretty_print(std::ostream& stream) const {
  print_frame(stream);
  stream << ", rule='" << options.rule() << "', gate='" << options.gate()
         << "', memory_projection='" << options.memory_projection() << "')";
}

std::tuple<torch::Tensor, torch::Tensor> MixedMultiheadAttentionImpl::forward(
    const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value,
    const torch::Tensor& key_padding_mask, bool need_weights, const torch::Tensor& attn_mask,
    bool average_attn_weights, bool is_causal, const torch::Tensor& memory,
    const torch::Tensor& memory_mask) {
  torch::Tensor memory_key, memory_value;
  if (memory.defined()) {
    std::tie(memory_key, memory_value) = project_memory(memory);
  } else {
    memory_key = memory_value = query.new_zeros({options.num_kv_heads(), 0, head_dim()});
  }
  return attend(
      query, key, value, memory_key, memory_value, key_padding_mask, need_weights, attn_mask,
      average_attn_weights, is_causal, memory_mask);
}

std::tuple<torch::Tensor, torch::Tensor> MixedMultiheadAttentionImpl::attend(
    torch::Tensor query, torch::Tensor key, torch::Tensor value, const torch::Tensor& memory_key,
    const torch::Tensor& memory_value, const torch::Tensor& key_padding_mask, bool need_weights,
    const torch::Tensor& attn_mask, bool average_attn_weights, bool is_causal,
    const torch::Tensor& memory_mask) {
  check_input(query, key, value);
  const bool batched = query.dim() == 3;
  query = batch_first(query);
  key = batch_first(key);
  value = batch_first(value);
  MixedAttentionOptions attention{
      .rule = options.rule(),
      .attn_mask = mask(query, key, key_padding_mask, attn_mask, batched),
      .dropout_p = is_training() ? options.dropout() : 0.0,
      .is_causal = is_causal && !attn_mask.defined(),
      .enable_gqa = grouped()};
  if (memory_mask.defined()) {
    attention.memory_mask = memory_mask;
  }
  const torch::Tensor logit = mix_logit(query);
  query = query_heads(query);
  key = key_heads(key);
  value = value_heads(value);
  extend(key, value, attention.attn_mask, attention.is_causal, query.size(-2));
  auto [heads, self_lse, memory_lse] =
      mixed_attention(query, key, value, memory_key, memory_value, logit, attention);
  torch::Tensor weights;
  if (need_weights) {
    weights =
        mixed_attention_weights(query, key, memory_key, logit, self_lse, memory_lse, attention);
    weights = returned_weights(weights, batched, average_attn_weights);
  }
  return {output(heads, batched), weights};
}

std::tuple<torch::Tensor, torch::Tensor> MixedMultiheadAttentionImpl::project_memory(
    const torch::Tensor& memory) {
  TORCH_CHECK(
      memory.dim() == 2 || memory.dim() == 3, layer, "memory must have 2 or 3 dimensions, got ",
      memory.sizes());
  if (!memory_k_proj.is_empty()) {
    check_memory_width(memory, options.embed_dim());
    return {split_key_heads(memory_k_proj(memory)), split_key_heads(memory_v_proj(memory))};
  }
  TORCH_CHECK(
      options.kdim() == options.vdim(), layer,
      "memory_projection='shared' needs one width for keys and values, got kdim=", options.kdim(),
      " and vdim=", options.vdim());
  check_memory_width(memory, options.kdim());
  return {key_heads(memory), value_heads(memory)};
}

torch::Tensor MixedMultiheadAttentionImpl::mix_logit(const torch::Tensor& query) const {
  if (!mix_weight.defined()) {
    return mix;
  }
  return mix + torch::nn::functional::linear(query, mix_weight).transpose(1, 2).unsqueeze(-1);
}

}  // namespace mixhead::nn
