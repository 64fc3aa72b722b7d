#include "nn/mixed_multihead_attention.h"

#include <torch/nn/functional/linear.h>
#include <torch/nn/init.h>

#include <initializer_list>

#include "mixed_attention/op.h"
#include "nn/attention_weights.h"
#include "nn/masks.h"

namespace mixhead::nn {
namespace {

constexpr const char* layer = "MixedMultiheadAttention: ";

void check_positive(const char* name, int64_t number) {
  TORCH_CHECK(number > 0, layer, name, " must be positive, got ", number);
}

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

}  // namespace

MixedMultiheadAttentionOptions::MixedMultiheadAttentionOptions(int64_t embed_dim, int64_t num_heads)
    : embed_dim_(embed_dim),
      num_heads_(num_heads),
      kdim_(embed_dim),
      vdim_(embed_dim),
      num_kv_heads_(num_heads) {}

MixedMultiheadAttentionImpl::MixedMultiheadAttentionImpl(MixedMultiheadAttentionOptions options)
    : options(std::move(options)) {
  reset();
}

void MixedMultiheadAttentionImpl::check_options() const {
  check_positive("embed_dim", options.embed_dim());
  check_positive("num_heads", options.num_heads());
  check_positive("num_kv_heads", options.num_kv_heads());
  check_positive("kdim", options.kdim());
  check_positive("vdim", options.vdim());
  TORCH_CHECK(
      options.embed_dim() % options.num_heads() == 0, layer,
      "embed_dim must be a multiple of num_heads, got ", options.embed_dim(), " and ",
      options.num_heads());
  TORCH_CHECK(
      options.num_heads() % options.num_kv_heads() == 0, layer,
      "num_heads must be a multiple of num_kv_heads, got ", options.num_heads(), " and ",
      options.num_kv_heads());
  TORCH_CHECK(
      options.dropout() >= 0 && options.dropout() <= 1, layer, "dropout must be in [0, 1], got ",
      options.dropout());
  check_choice("rule", options.rule(), {"gate", "joint"});
  check_choice("gate", options.gate(), {"head", "token", "channel"});
  check_choice("memory_projection", options.memory_projection(), {"shared", "own"});
  TORCH_CHECK(
      options.rule() != "joint" || options.gate() != "channel", layer,
      "gate='channel' needs rule='gate', got rule='joint', whose softmax has one weight for all "
      "channels");
}

void MixedMultiheadAttentionImpl::reset() {
  check_options();
  const int64_t embed_dim = options.embed_dim();
  const bool packed = options.kdim() == embed_dim && options.vdim() == embed_dim;
  // Parameters that are not there are registered as undefined, as torch::nn::MultiheadAttention
  // does.
  const auto parameter = [this](const char* name, bool wanted, torch::IntArrayRef shape) {
    return register_parameter(name, wanted ? torch::empty(shape) : torch::Tensor(), wanted);
  };
  in_proj_weight = parameter("in_proj_weight", packed, {embed_dim + 2 * kv_dim(), embed_dim});
  q_proj_weight = parameter("q_proj_weight", !packed, {embed_dim, embed_dim});
  k_proj_weight = parameter("k_proj_weight", !packed, {kv_dim(), options.kdim()});
  v_proj_weight = parameter("v_proj_weight", !packed, {kv_dim(), options.vdim()});
  in_proj_bias = parameter("in_proj_bias", options.bias(), {embed_dim + 2 * kv_dim()});
  const int64_t mix_width = options.gate() == "channel" ? head_dim() : 1;
  mix = parameter("mix", true, {options.num_heads(), 1, mix_width});
  mix_weight = parameter("mix_weight", options.gate() == "token", {options.num_heads(), embed_dim});
  using torch::nn::Linear;
  using torch::nn::LinearOptions;
  out_proj =
      register_module("out_proj", Linear(LinearOptions(embed_dim, embed_dim).bias(options.bias())));
  if (options.memory_projection() == "own") {
    const auto projection = LinearOptions(embed_dim, kv_dim()).bias(options.bias());
    memory_k_proj = register_module("memory_k_proj", Linear(projection));
    memory_v_proj = register_module("memory_v_proj", Linear(projection));
  }
  reset_parameters();
}

void MixedMultiheadAttentionImpl::reset_parameters() {
  for (const auto& weight : {in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight}) {
    if (weight.defined()) {
      torch::nn::init::xavier_uniform_(weight);
    }
  }
  if (in_proj_bias.defined()) {
    torch::nn::init::zeros_(in_proj_bias);
    torch::nn::init::zeros_(out_proj->bias);
  }
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
  stream << std::boolalpha
         << "mixhead::nn::MixedMultiheadAttention(embed_dim=" << options.embed_dim()
         << ", num_heads=" << options.num_heads() << ", num_kv_heads=" << options.num_kv_heads()
         << ", dropout=" << options.dropout() << ", kdim=" << options.kdim()
         << ", vdim=" << options.vdim() << ", batch_first=" << options.batch_first() << ", rule='"
         << options.rule() << "', gate='" << options.gate() << "', memory_projection='"
         << options.memory_projection() << "')";
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
    const torch::Tensor& memory_value, torch::Tensor key_padding_mask, bool need_weights,
    const torch::Tensor& attn_mask, bool average_attn_weights, bool is_causal,
    const torch::Tensor& memory_mask) {
  check_input(query, key, value);
  const bool batched = query.dim() == 3;
  if (!batched) {
    query = query.unsqueeze(0);
    key = key.unsqueeze(0);
    value = value.unsqueeze(0);
    if (key_padding_mask.defined()) {
      key_padding_mask = key_padding_mask.unsqueeze(0);
    }
  } else if (!options.batch_first()) {
    query = query.transpose(0, 1);
    key = key.transpose(0, 1);
    value = value.transpose(0, 1);
  }
  MixedAttentionOptions attention{
      .rule = options.rule(),
      .attn_mask = sequence_mask(
          key_padding_mask, attn_mask, query.size(0), options.num_heads(), query.size(1),
          key.size(1)),
      .dropout_p = is_training() ? options.dropout() : 0.0,
      .is_causal = is_causal && !attn_mask.defined(),
      .enable_gqa = options.num_kv_heads() != options.num_heads()};
  if (memory_mask.defined()) {
    attention.memory_mask = memory_mask;
  }
  const torch::Tensor logit = mix_logit(query);
  query = project_query(query);
  key = key_heads(project_key(key));
  value = key_heads(project_value(value));
  auto [heads, self_lse, memory_lse] =
      mixed_attention(query, key, value, memory_key, memory_value, logit, attention);
  torch::Tensor output = out_proj(heads.transpose(1, 2).flatten(2));
  torch::Tensor weights;
  if (need_weights) {
    weights =
        mixed_attention_weights(query, key, memory_key, logit, self_lse, memory_lse, attention);
    weights = average_attn_weights ? weights.mean(1) : weights;
    weights = batched ? weights : weights.squeeze(0);
  }
  if (!batched) {
    output = output.squeeze(0);
  } else if (!options.batch_first()) {
    output = output.transpose(0, 1);
  }
  return {output, weights};
}

std::tuple<torch::Tensor, torch::Tensor> MixedMultiheadAttentionImpl::project_memory(
    const torch::Tensor& memory) {
  TORCH_CHECK(
      memory.dim() == 2 || memory.dim() == 3, layer, "memory must have 2 or 3 dimensions, got ",
      memory.sizes());
  if (!memory_k_proj.is_empty()) {
    check_memory_width(memory, options.embed_dim());
    return {key_heads(memory_k_proj(memory)), key_heads(memory_v_proj(memory))};
  }
  TORCH_CHECK(
      options.kdim() == options.vdim(), layer,
      "memory_projection='shared' needs one width for keys and values, got kdim=", options.kdim(),
      " and vdim=", options.vdim());
  check_memory_width(memory, options.kdim());
  return {key_heads(project_key(memory)), key_heads(project_value(memory))};
}

torch::Tensor MixedMultiheadAttentionImpl::project_query(const torch::Tensor& query) const {
  return project_rows(query, q_proj_weight, 0, options.embed_dim())
      .unflatten(-1, {options.num_heads(), head_dim()})
      .transpose(-3, -2);
}

torch::Tensor MixedMultiheadAttentionImpl::project_key(const torch::Tensor& key) const {
  return project_rows(key, k_proj_weight, options.embed_dim(), kv_dim());
}

torch::Tensor MixedMultiheadAttentionImpl::project_value(const torch::Tensor& value) const {
  return project_rows(value, v_proj_weight, options.embed_dim() + kv_dim(), kv_dim());
}

torch::Tensor MixedMultiheadAttentionImpl::project_rows(
    const torch::Tensor& tokens, const torch::Tensor& weight, int64_t start, int64_t length) const {
  return torch::nn::functional::linear(
      tokens, in_proj_weight.defined() ? in_proj_weight.narrow(0, start, length) : weight,
      in_proj_bias.defined() ? in_proj_bias.narrow(0, start, length) : torch::Tensor());
}

torch::Tensor MixedMultiheadAttentionImpl::key_heads(const torch::Tensor& projected) const {
  return projected.unflatten(-1, {options.num_kv_heads(), head_dim()}).transpose(-3, -2);
}

torch::Tensor MixedMultiheadAttentionImpl::mix_logit(const torch::Tensor& query) const {
  if (!mix_weight.defined()) {
    return mix;
  }
  return mix + torch::nn::functional::linear(query, mix_weight).transpose(1, 2).unsqueeze(-1);
}

void MixedMultiheadAttentionImpl::check_input(
    const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value) const {
  TORCH_CHECK(
      query.dim() == 2 || query.dim() == 3, layer, "query must have 2 or 3 dimensions, got ",
      query.sizes());
  const auto check = [&](const char* name, const torch::Tensor& tensor, int64_t width) {
    TORCH_CHECK(
        tensor.dim() == query.dim() && tensor.size(-1) == width, layer, name, " must have ",
        query.dim(), " dimensions, the last of ", width, ", got ", tensor.sizes());
  };
  check("query", query, options.embed_dim());
  check("key", key, options.kdim());
  check("value", value, options.vdim());
}

}  // namespace mixhead::nn
