#pragma once

#include "kernel_attention/arguments.h"

namespace mixhead::kernels {

/// The weights (B..., Hq, L, S) that kernel_attention gave to the keys, dense: K / sum K, from its
/// inputs and the log_mass it returned; 0 in a row of no mass. query and key have B.
Tensor weights(
    const Tensor& query, const Tensor& key, const Tensor& log_mass, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& attn_mask, bool is_causal, bool enable_gqa);

}  // namespace mixhead::kernels
