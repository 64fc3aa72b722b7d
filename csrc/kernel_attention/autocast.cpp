#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "kernel_attention/arguments.h"

namespace mixhead::kernels {
namespace {

/// Queries, keys and values in autocast's dtype; bandwidth, mask and log_mass as they are.
template <at::DeviceType device>
Forward kernel_attention_autocast(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    Names kernel, const OptionalTensor& attn_mask, bool is_causal, bool exclude_self,
    bool normalize, std::string_view empty, double dropout_p, bool enable_gqa) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& tensor) {
    return at::autocast::cached_cast(dtype, tensor, device);
  };
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mixhead::kernel_attention", "")
                             .typed<PublicSignature>();
  return op.call(
      cast(query), cast(key), cast(value), bandwidth, std::move(kernel), attn_mask, is_causal,
      exclude_self, normalize, empty, dropout_p, enable_gqa);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, AutocastCPU, m) {
  m.impl("kernel_attention", kernel_attention_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(mixhead, AutocastCUDA, m) {
  m.impl("kernel_attention", kernel_attention_autocast<at::kCUDA>);
}

}  // namespace mixhead::kernels
