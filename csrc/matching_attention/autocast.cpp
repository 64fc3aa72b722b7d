#include <torch/library.h>

#include "autocast.h"
#include "find_operator.h"
#include "matching_attention/arguments.h"

namespace mixhead::matching {
namespace {

using autocast::cast;

/// Queries, keys and values in autocast's dtype; bandwidth, masses, dustbin and the potentials as
/// they are.
template <at::DeviceType device>
Matching matching_attention_autocast(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& row_mass, const OptionalTensor& column_mass,
    const OptionalTensor& dustbin, int64_t iterations, double tolerance) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  static const auto op = find_operator<PublicSignature>("mixhead::matching_attention");
  return op.call(
      cast<device>(query), cast<device>(key), cast<device>(value), bandwidth, kernel, row_mass,
      column_mass, dustbin, iterations, tolerance);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, AutocastCPU, m) {
  m.impl("matching_attention", matching_attention_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(mixhead, AutocastCUDA, m) {
  m.impl("matching_attention", matching_attention_autocast<at::kCUDA>);
}

}  // namespace mixhead::matching
