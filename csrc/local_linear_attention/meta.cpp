#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "local_linear_attention/arguments.h"
#include "meta.h"
#include "wide_dtype.h"

namespace mixhead::local_linear {
namespace {

Forward forward_meta(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& attn_mask, bool is_causal, bool exclude_self,
    double ridge) {
  check({query, key, value, bandwidth, kernel, attn_mask, is_causal, exclude_self, ridge});
  const auto rows = query.sym_sizes().slice(0, query.dim() - 1);
  c10::SymDimVector output_sizes(rows.begin(), rows.end()), slope_sizes = output_sizes;
  output_sizes.push_back(value.sym_size(-1));
  slope_sizes.push_back(query.sym_size(-1));
  slope_sizes.push_back(value.sym_size(-1));
  const auto wide = query.options().dtype(wide_dtype(query));
  return {
      at::empty_symint(output_sizes, query.options()),
      at::empty_symint(slope_sizes, query.options()), at::empty_symint(rows, wide),
      at::empty_symint(rows, wide)};
}

Gradients backward_meta(
    const Tensor& /*grad_output*/, const Tensor& /*grad_slope*/, const Tensor& /*grad_leverage*/,
    const Tensor& /*grad_log_mass*/, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& bandwidth, const Names& /*kernel*/, const OptionalTensor& attn_mask,
    bool /*is_causal*/, bool /*exclude_self*/, double /*ridge*/, OutputMask output_mask) {
  const auto gradient = [&](size_t i, const OptionalTensor& of) {
    return meta::gradient(output_mask[i], of, query);
  };
  return {
      gradient(0, query), gradient(1, key), gradient(2, value), gradient(3, bandwidth),
      gradient(4, attn_mask)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, Meta, m) {
  m.impl("_local_linear_attention_forward", forward_meta);
  m.impl("_local_linear_attention_backward", backward_meta);
}

}  // namespace mixhead::local_linear
