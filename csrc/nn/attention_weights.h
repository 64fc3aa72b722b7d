#pragma once

#include <ATen/core/Tensor.h>

#include "mixed_attention/op.h"

namespace mixhead::nn {

/// The weights (B, Hq, L, S + M) that mixed_attention gave to [sequence, memory], dense:
/// [(1 - w) P_s, w P_m] with P = exp(score - lse), from its inputs and the log-sum-exps it
/// returned; a gate per channel is averaged over the channels.
at::Tensor mixed_attention_weights(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& memory_key,
    const at::Tensor& mix, const at::Tensor& self_lse, const at::Tensor& memory_lse,
    const MixedAttentionOptions& options);

}  // namespace mixhead::nn
