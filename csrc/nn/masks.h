#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace mixhead::nn {

/// Both masks of torch::nn::MultiheadAttention (bool true: blocked; undefined: none) as the one of
/// mixhead's operators (bool true: may read), not expanded: it broadcasts to (B, Hq, L, S). Errors
/// name `layer`.
std::optional<at::Tensor> sequence_mask(
    const char* layer, const at::Tensor& key_padding_mask, const at::Tensor& attn_mask,
    int64_t batch, int64_t num_heads, int64_t length, int64_t keys);

/// The operator's mask that blocks what either of two blocks.
at::Tensor both(const at::Tensor& first, const at::Tensor& second);

}  // namespace mixhead::nn
