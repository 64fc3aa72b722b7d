#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernel_attention/arguments.h"
#include "meta.h"
#include "wide_dtype.h"

namespace mixhead::kernels {
namespace {

Forward forward_meta(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& attn_mask, bool is_causal, bool exclude_self,
    bool normalize, std::string_view empty, double dropout_p, const OptionalTensor& seed,
    bool enable_gqa) {
  check(
      {query, key, value, bandwidth, kernel, attn_mask, is_causal, exclude_self, normalize, empty,
       dropout_p, seed, enable_gqa});
  const auto rows = query.sym_sizes().slice(0, query.dim() - 1);
  c10::SymDimVector output_sizes(rows.begin(), rows.end());
  output_sizes.push_back(value.sym_size(-1));
  const auto mass_dtype = wide_dtype(query);
  return {
      at::empty_symint(output_sizes, query.options()),
      at::empty_symint(rows, query.options().dtype(mass_dtype))};
}

Gradients backward_meta(
    const Tensor& /*grad_output*/, const Tensor& /*grad_log_mass*/, const Tensor& query,
    const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    const Names& /*kernel*/, const OptionalTensor& attn_mask, bool /*is_causal*/,
    bool /*exclude_self*/, bool /*normalize*/, std::string_view /*empty*/, double /*dropout_p*/,
    const OptionalTensor& /*seed*/, bool /*enable_gqa*/, const Tensor& /*output*/,
    const Tensor& /*log_mass*/, std::array<bool, 5> output_mask) {
  const auto gradient = [&](size_t i, const OptionalTensor& of) {
    return meta::gradient(output_mask[i], of, query);
  };
  return {
      gradient(0, query), gradient(1, key), gradient(2, value), gradient(3, bandwidth),
      gradient(4, attn_mask)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, Meta, m) {
  m.impl("_kernel_attention_forward", forward_meta);
  m.impl("_kernel_attention_backward", backward_meta);
}

}  // namespace mixhead::kernels
