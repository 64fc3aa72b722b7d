#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "topk_keys/arguments.h"

namespace mixhead::topk {
namespace {

/// Queries and keys in autocast's dtype; the mask as it is.
template <at::DeviceType device>
Forward topk_keys_autocast(
    const Tensor& query, const Tensor& key, int64_t k, const OptionalTensor& mask,
    std::string_view metric) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mixhead::topk_keys", "")
                             .typed<ForwardSignature>();
  return op.call(
      at::autocast::cached_cast(dtype, query, device),
      at::autocast::cached_cast(dtype, key, device), k, mask, metric);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, AutocastCPU, m) { m.impl("topk_keys", topk_keys_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(mixhead, AutocastCUDA, m) { m.impl("topk_keys", topk_keys_autocast<at::kCUDA>); }

}  // namespace mixhead::topk
