#include <torch/library.h>

#include "autocast.h"
#include "find_operator.h"
#include "mixed_attention/arguments.h"

namespace mixhead::mixed {
namespace {

using autocast::cast;

/// Queries, keys and values in autocast's dtype; mix, masks and the log-sum-exps as they are.
template <at::DeviceType device>
std::tuple<Tensor, Tensor, Tensor> mixed_attention_autocast(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& memory_key,
    const Tensor& memory_value, const Tensor& mix, std::string_view rule,
    const OptionalTensor& attn_mask, const OptionalTensor& memory_mask,
    const OptionalTensor& memory_index, double dropout_p, bool is_causal,
    std::optional<double> scale, bool enable_gqa) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  static const auto op = find_operator<PublicSignature>("mixhead::mixed_attention");
  return op.call(
      cast<device>(query), cast<device>(key), cast<device>(value), cast<device>(memory_key),
      cast<device>(memory_value), mix, rule, attn_mask, memory_mask, memory_index, dropout_p,
      is_causal, scale, enable_gqa);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, AutocastCPU, m) {
  m.impl("mixed_attention", mixed_attention_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(mixhead, AutocastCUDA, m) {
  m.impl("mixed_attention", mixed_attention_autocast<at::kCUDA>);
}

}  // namespace mixhead::mixed
