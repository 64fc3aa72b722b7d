#include "nn/kernel_multihead_attention.h"

#include <cmath>

#include "kernel_attention/kernels.h"
#include "kernel_attention/op.h"
#include "kernel_attention/weights.h"

namespace mixhead::nn {
namespace {

constexpr const char* layer = "KernelMultiheadAttention: ";

double default_bandwidth(int64_t channels) { return std::pow(static_cast<double>(channels), 0.25); }

}  // namespace

KernelMultiheadAttentionImpl::KernelMultiheadAttentionImpl(KernelMultiheadAttentionOptions options)
    : MultiheadFrame(std::move(options)) {
  reset();
}

void KernelMultiheadAttentionImpl::check_kernel() const {
  const auto count = static_cast<int64_t>(options.kernel().size());
  TORCH_CHECK(
      count == 1 || count == options.num_heads(), layer,
      "kernel must be one name or one for each of ", options.num_heads(), " heads, got ", count);
  for (const std::string& kernel : options.kernel()) {
    std::string known;
    for (const auto& each : kKernels) {
      known += (known.empty() ? "'" : ", '") + std::string(each.name) + "'";
    }
    TORCH_CHECK(
        kernel_named(kernel), layer, "kernel must be one of ", known, ", got '", kernel, "'");
  }
}

/// (Hq,) or (Hq, D) in float64.
torch::Tensor KernelMultiheadAttentionImpl::initial_bandwidth() const {
  const int64_t heads = options.num_heads(), channels = head_dim();
  if (!options.bandwidth().defined()) {
    return torch::full({heads}, default_bandwidth(channels), torch::kFloat64);
  }
  const torch::Tensor initial = options.bandwidth().detach().to(torch::kCPU, torch::kFloat64);
  const auto shape = initial.sizes();
  const bool per_channel = shape == torch::IntArrayRef{heads, channels};
  TORCH_CHECK(
      initial.dim() == 0 || shape == torch::IntArrayRef{heads} || per_channel, layer,
      "bandwidth must be a number, (", heads, ",) or (", heads, ", ", channels, "), got ", shape);
  for (const std::string& kernel : options.kernel()) {
    TORCH_CHECK(
        !per_channel || kernel != "cosine", layer, "bandwidth must be a number or (", heads,
        ",) with kernel 'cosine', got one per channel ", shape);
  }
  const torch::Tensor wrong =
      initial.masked_select(((initial > 0) & initial.isfinite()).logical_not());
  TORCH_CHECK(
      wrong.numel() == 0, layer, "bandwidth must be positive and finite, got ",
      wrong[0].item<double>());
  return initial.dim() == 0 ? initial.expand({heads}) : initial;
}

void KernelMultiheadAttentionImpl::reset() {
  check_frame();
  check_kernel();
  register_projections();
  const torch::Tensor empty = torch::empty(initial_bandwidth().sizes());
  log_bandwidth = options.learn_bandwidth() ? register_parameter("log_bandwidth", empty)
                                            : register_buffer("log_bandwidth", empty);
  reset_parameters();
}

void KernelMultiheadAttentionImpl::reset_parameters() {
  reset_projections();
  torch::NoGradGuard no_grad;
  log_bandwidth.copy_((initial_bandwidth() / default_bandwidth(head_dim())).log());
}

torch::Tensor KernelMultiheadAttentionImpl::bandwidth() const {
  return default_bandwidth(head_dim()) * log_bandwidth.exp();
}

void KernelMultiheadAttentionImpl::pretty_print(std::ostream& stream) const {
  print_frame(stream);
  stream << ", kernel=" << options.kernel() << ", learn_bandwidth=" << options.learn_bandwidth()
         << ")";
}

std::tuple<torch::Tensor, torch::Tensor> KernelMultiheadAttentionImpl::forward(
    torch::Tensor query, torch::Tensor key, torch::Tensor value,
    const torch::Tensor& key_padding_mask, bool need_weights, const torch::Tensor& attn_mask,
    bool average_attn_weights, bool is_causal) {
  check_input(query, key, value);
  const bool batched = query.dim() == 3;
  query = batch_first(query);
  key = batch_first(key);
  value = batch_first(value);
  KernelAttentionOptions attention{
      .attn_mask = mask(query, key, key_padding_mask, attn_mask, batched),
      .is_causal = is_causal && !attn_mask.defined(),
      .dropout_p = is_training() ? options.dropout() : 0.0,
      .enable_gqa = grouped()};
  query = query_heads(query);
  key = key_heads(key);
  value = value_heads(value);
  extend(key, value, attention.attn_mask, attention.is_causal, query.size(-2));
  const auto [heads, log_mass] =
      kernel_attention(query, key, value, bandwidth(), options.kernel(), attention);
  torch::Tensor weights;
  if (need_weights) {
    weights = kernels::weights(
        query, key, log_mass, bandwidth(), kernels::Names(options.kernel()), attention.attn_mask,
        attention.is_causal, attention.enable_gqa);
    weights = returned_weights(weights, batched, average_attn_weights);
  }
  return {output(heads, batched), weights};
}

}  // namespace mixhead::nn
