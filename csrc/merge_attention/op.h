#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace mixhead {

/// The exact attention over the union of disjoint key sets, from each set's output and log-sum-exp:
///
///   lse = log sum_i exp(lses[i]),  output = sum_i exp(lses[i] - lse) outputs[i]
///
/// (the merge of Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018).
/// outputs[i] (..., L, Dv), lses[i] (..., L); all of one shape. Returns output (..., L, Dv) and lse
/// (..., L), the latter in float32 (float64 for float64), differentiable in all inputs, twice. A
/// row whose every log-sum-exp is -inf gives output 0 and lse -inf. Throws c10::Error where the
/// lists are empty or of different lengths, or a shape, dtype or device differs.
std::tuple<at::Tensor, at::Tensor> merge_attention(at::TensorList outputs, at::TensorList lses);

}  // namespace mixhead
