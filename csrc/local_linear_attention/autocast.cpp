#include <torch/library.h>

#include "autocast.h"
#include "find_operator.h"
#include "local_linear_attention/arguments.h"

namespace mixhead::local_linear {
namespace {

using autocast::cast;

/// Queries, keys and values in autocast's dtype; bandwidth, mask, leverage and log_mass as they
/// are.
template <at::DeviceType device>
Forward local_linear_attention_autocast(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& attn_mask, bool is_causal, bool exclude_self,
    double ridge) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  static const auto op = find_operator<ForwardSignature>("mixhead::local_linear_attention");
  return op.call(
      cast<device>(query), cast<device>(key), cast<device>(value), bandwidth, kernel, attn_mask,
      is_causal, exclude_self, ridge);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, AutocastCPU, m) {
  m.impl("local_linear_attention", local_linear_attention_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(mixhead, AutocastCUDA, m) {
  m.impl("local_linear_attention", local_linear_attention_autocast<at::kCUDA>);
}

}  // namespace mixhead::local_linear
