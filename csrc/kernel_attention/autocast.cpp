#include <torch/library.h>

#include "autocast.h"
#include "find_operator.h"
#include "kernel_attention/arguments.h"

namespace mixhead::kernels {
namespace {

using autocast::cast;

/// Queries, keys and values in autocast's dtype; bandwidth, mask and log_mass as they are.
template <at::DeviceType device>
Forward kernel_attention_autocast(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& attn_mask, bool is_causal, bool exclude_self,
    bool normalize, std::string_view empty, double dropout_p, bool enable_gqa) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  static const auto op = find_operator<PublicSignature>("mixhead::kernel_attention");
  return op.call(
      cast<device>(query), cast<device>(key), cast<device>(value), bandwidth, kernel, attn_mask,
      is_causal, exclude_self, normalize, empty, dropout_p, enable_gqa);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, AutocastCPU, m) {
  m.impl("kernel_attention", kernel_attention_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(mixhead, AutocastCUDA, m) {
  m.impl("kernel_attention", kernel_attention_autocast<at::kCUDA>);
}

}  // namespace mixhead::kernels
