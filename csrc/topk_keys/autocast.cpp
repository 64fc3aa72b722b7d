#include <torch/library.h>

#include "autocast.h"
#include "find_operator.h"
#include "topk_keys/arguments.h"

namespace mixhead::topk {
namespace {

using autocast::cast;

/// Queries and keys in autocast's dtype; the mask as it is.
template <at::DeviceType device>
Forward topk_keys_autocast(
    const Tensor& query, const Tensor& key, int64_t k, const OptionalTensor& mask,
    std::string_view metric) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  static const auto op = find_operator<ForwardSignature>("mixhead::topk_keys");
  return op.call(cast<device>(query), cast<device>(key), k, mask, metric);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, AutocastCPU, m) { m.impl("topk_keys", topk_keys_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(mixhead, AutocastCUDA, m) { m.impl("topk_keys", topk_keys_autocast<at::kCUDA>); }

}  // namespace mixhead::topk
