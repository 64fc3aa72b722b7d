#pragma once

#include <ATen/core/Tensor.h>

namespace mixhead {

/// The dtype of what is summed over keys, log-sum-exps among it: float64 for float64, else float32.
inline at::ScalarType wide_dtype(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace mixhead
