#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "meta.h"
#include "mixed_attention/arguments.h"
#include "wide_dtype.h"

namespace mixhead::mixed {
namespace {

Forward forward_meta(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& memory_key,
    const Tensor& memory_value, const Tensor& mix, std::string_view rule,
    const OptionalTensor& attn_mask, const OptionalTensor& memory_mask,
    const OptionalTensor& memory_index, double dropout_p, const OptionalTensor& seed,
    bool is_causal, std::optional<double> scale, bool enable_gqa, bool for_backward) {
  const Arguments args{query,     key,  value,     memory_key,  memory_value,
                       mix,       rule, attn_mask, memory_mask, memory_index,
                       dropout_p, seed, is_causal, scale,       enable_gqa};
  check(args);
  const auto rows = query.sym_sizes().slice(0, query.dim() - 1);
  c10::SymDimVector output_sizes(rows.begin(), rows.end());
  output_sizes.push_back(value.sym_size(-1));
  const auto lse_options = query.options().dtype(wide_dtype(query));
  const auto like_output = [&] { return at::empty_symint(output_sizes, query.options()); };
  const auto kept = [&](bool needed) {
    return needed ? at::empty_symint(output_sizes, lse_options) : at::empty({0}, lse_options);
  };
  const auto keep = kept_outputs(args, for_backward);
  return {
      like_output(), at::empty_symint(rows, lse_options), at::empty_symint(rows, lse_options),
      kept(keep[0]), kept(keep[1])};
}

Gradients backward_meta(
    const Tensor& /*grad_output*/, const Tensor& /*grad_self_lse*/,
    const Tensor& /*grad_memory_lse*/, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& memory_key, const Tensor& memory_value, const Tensor& mix,
    std::string_view /*rule*/, const OptionalTensor& attn_mask, const OptionalTensor& memory_mask,
    const OptionalTensor& /*memory_index*/, double /*dropout_p*/, const OptionalTensor& /*seed*/,
    bool /*is_causal*/, std::optional<double> /*scale*/, bool /*enable_gqa*/,
    const Tensor& /*output*/, const Tensor& /*self_lse*/, const Tensor& /*memory_lse*/,
    const Tensor& /*self_output*/, const Tensor& /*memory_output*/,
    std::array<bool, 8> output_mask) {
  const auto gradient = [&](size_t i, const OptionalTensor& of) {
    return meta::gradient(output_mask[i], of, query);
  };
  return {gradient(0, query),      gradient(1, key),          gradient(2, value),
          gradient(3, memory_key), gradient(4, memory_value), gradient(5, mix),
          gradient(6, attn_mask),  gradient(7, memory_mask)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, Meta, m) {
  m.impl("_mixed_attention_forward", forward_meta);
  m.impl("_mixed_attention_backward", backward_meta);
}

}  // namespace mixhead::mixed
