#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "meta.h"
#include "topk_keys/arguments.h"
#include "wide_dtype.h"

namespace mixhead::topk {
namespace {

Forward forward_meta(
    const Tensor& query, const Tensor& key, int64_t k, const OptionalTensor& mask,
    std::string_view metric) {
  check({query, key, k, mask, metric});
  const auto rows = query.sym_sizes().slice(0, query.dim() - 1);
  c10::SymDimVector sizes(rows.begin(), rows.end());
  sizes.emplace_back(k);
  return {
      at::empty_symint(sizes, query.options().dtype(wide_dtype(query))),
      at::empty_symint(sizes, query.options().dtype(at::kLong))};
}

Gradients backward_meta(
    const Tensor& /*grad_scores*/, const Tensor& query, const Tensor& key,
    const OptionalTensor& mask, std::string_view /*metric*/, const Tensor& /*indices*/,
    OutputMask output_mask) {
  const auto gradient = [&](size_t i, const OptionalTensor& of) {
    return meta::gradient(output_mask[i], of, query);
  };
  return {gradient(0, query), gradient(1, key), gradient(2, mask)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, Meta, m) {
  m.impl("_topk_keys_forward", forward_meta);
  m.impl("_topk_keys_backward", backward_meta);
}

}  // namespace mixhead::topk
