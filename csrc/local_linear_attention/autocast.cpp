#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "local_linear_attention/arguments.h"

namespace mixhead::local_linear {
namespace {

/// Queries, keys and values in autocast's dtype; bandwidth, mask, leverage and log_mass as they
/// are.
template <at::DeviceType device>
Forward local_linear_attention_autocast(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    Names kernel, const OptionalTensor& attn_mask, bool is_causal, bool exclude_self,
    double ridge) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& tensor) {
    return at::autocast::cached_cast(dtype, tensor, device);
  };
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mixhead::local_linear_attention", "")
                             .typed<ForwardSignature>();
  return op.call(
      cast(query), cast(key), cast(value), bandwidth, std::move(kernel), attn_mask, is_causal,
      exclude_self, ridge);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, AutocastCPU, m) {
  m.impl("local_linear_attention", local_linear_attention_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(mixhead, AutocastCUDA, m) {
  m.impl("local_linear_attention", local_linear_attention_autocast<at::kCUDA>);
}

}  // namespace mixhead::local_linear
