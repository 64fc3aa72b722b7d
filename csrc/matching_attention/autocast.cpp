#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "matching_attention/arguments.h"

namespace mixhead::matching {
namespace {

/// Queries, keys and values in autocast's dtype; bandwidth, masses, dustbin and the potentials as
/// they are.
template <at::DeviceType device>
Matching matching_attention_autocast(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    Names kernel, const OptionalTensor& row_mass, const OptionalTensor& column_mass,
    const OptionalTensor& dustbin, int64_t iterations, double tolerance) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& tensor) {
    return at::autocast::cached_cast(dtype, tensor, device);
  };
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mixhead::matching_attention", "")
                             .typed<PublicSignature>();
  return op.call(
      cast(query), cast(key), cast(value), bandwidth, std::move(kernel), row_mass, column_mass,
      dustbin, iterations, tolerance);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, AutocastCPU, m) {
  m.impl("matching_attention", matching_attention_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(mixhead, AutocastCUDA, m) {
  m.impl("matching_attention", matching_attention_autocast<at::kCUDA>);
}

}  // namespace mixhead::matching
