#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "matching_attention/arguments.h"

namespace mixhead::matching {
namespace {

Tensor sinkhorn_meta(
    const Tensor& /*query*/, const Tensor& /*key*/, const OptionalTensor& /*bandwidth*/,
    const Names& /*kernel*/, const OptionalTensor& /*dustbin*/, const Tensor& /*log_row_mass*/,
    const Tensor& log_column_mass, int64_t /*iterations*/, double /*tolerance*/) {
  return at::empty_like(log_column_mass);
}

Tensor solve_meta(
    const Tensor& /*query*/, const Tensor& /*key*/, const OptionalTensor& /*bandwidth*/,
    const Names& /*kernel*/, const OptionalTensor& /*dustbin*/, const Tensor& /*row_potential*/,
    const Tensor& /*column_potential*/, const Tensor& right_side) {
  return at::empty_like(right_side);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, Meta, m) {
  m.impl("_matching_attention_sinkhorn", sinkhorn_meta);
  m.impl("_matching_attention_solve", solve_meta);
}

}  // namespace mixhead::matching
