#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "mixed_attention/arguments.h"

namespace mixhead::mixed {
namespace {

/// Queries, keys and values in autocast's dtype; mix, masks and the log-sum-exps as they are.
template <at::DeviceType device>
std::tuple<Tensor, Tensor, Tensor> mixed_attention_autocast(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& memory_key,
    const Tensor& memory_value, const Tensor& mix, std::string_view rule,
    const OptionalTensor& attn_mask, const OptionalTensor& memory_mask,
    const OptionalTensor& memory_index, double dropout_p, bool is_causal,
    std::optional<double> scale, bool enable_gqa) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& tensor) {
    return at::autocast::cached_cast(dtype, tensor, device);
  };
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mixhead::mixed_attention", "")
                             .typed<PublicSignature>();
  return op.call(
      cast(query), cast(key), cast(value), cast(memory_key), cast(memory_value), mix, rule,
      attn_mask, memory_mask, memory_index, dropout_p, is_causal, scale, enable_gqa);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, AutocastCPU, m) {
  m.impl("mixed_attention", mixed_attention_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(mixhead, AutocastCUDA, m) {
  m.impl("mixed_attention", mixed_attention_autocast<at::kCUDA>);
}

}  // namespace mixhead::mixed
