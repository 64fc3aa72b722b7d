#include "nn/masks.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/logical_not.h>

#include <limits>

namespace mixhead::nn {
namespace {

at::Tensor may_read(const at::Tensor& mask) {
  return mask.scalar_type() == at::kBool ? mask.logical_not() : mask;
}

void check_mask(
    const char* layer, const char* name, const at::Tensor& mask, at::IntArrayRef shape) {
  TORCH_CHECK(
      mask.sizes() == shape, layer, ": ", name, " must have shape ", shape, ", got ", mask.sizes());
  TORCH_CHECK(
      mask.scalar_type() == at::kBool || mask.is_floating_point(), layer, ": ", name,
      " must be bool or floating point, got ", mask.scalar_type());
}

}  // namespace

at::Tensor both(const at::Tensor& first, const at::Tensor& second) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const bool first_is_bool = first.scalar_type() == at::kBool;
  const bool second_is_bool = second.scalar_type() == at::kBool;
  if (first_is_bool && second_is_bool) {
    return first.logical_and(second);
  }
  if (first_is_bool) {
    return second.masked_fill(first.logical_not(), -infinity);
  }
  if (second_is_bool) {
    return first.masked_fill(second.logical_not(), -infinity);
  }
  return first + second;
}

std::optional<at::Tensor> sequence_mask(
    const char* layer, const at::Tensor& key_padding_mask, const at::Tensor& attn_mask,
    int64_t batch, int64_t num_heads, int64_t length, int64_t keys) {
  std::optional<at::Tensor> padding;
  if (key_padding_mask.defined()) {
    check_mask(layer, "key_padding_mask", key_padding_mask, {batch, keys});
    padding = may_read(key_padding_mask).view({batch, 1, 1, keys});
  }
  std::optional<at::Tensor> pairs;
  if (attn_mask.defined()) {
    if (attn_mask.dim() == 3) {
      check_mask(layer, "attn_mask", attn_mask, {batch * num_heads, length, keys});
      pairs = may_read(attn_mask.unflatten(0, {batch, num_heads}));
    } else {
      check_mask(layer, "attn_mask", attn_mask, {length, keys});
      pairs = may_read(attn_mask);
    }
  }
  if (padding && pairs) {
    return both(*padding, *pairs);
  }
  return padding ? padding : pairs;
}

}  // namespace mixhead::nn
