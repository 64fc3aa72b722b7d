#include "cuda/fused.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_efficient_attention_backward.h>
#include <ATen/ops/_efficient_attention_forward.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "wide_dtype.h"

namespace mixhead::fused {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// aten/src/ATen/native/transformers/sdp_utils_cpp.h, enum SDPBackend.
constexpr int64_t kFlash = 1, kEfficient = 2, kCudnn = 3;
// aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernel_forward.h, enum CustomMaskType.
constexpr int64_t kNoMask = 0, kCausalFromBottomRight = 2;
// The same file, kAlignLSE: rows of the log-sum-exp that the backward reads on CUDA.
constexpr int64_t kAlignRows = 32;

/// Head sizes that every back end takes: equal for keys and values, a multiple of 8.
int64_t padded_channels(const Call& call) {
  return (std::max(call.query.size(-1), call.value.size(-1)) + 7) / 8 * 8;
}

Tensor padded(const Tensor& tensor, int64_t channels) {
  const auto missing = channels - tensor.size(-1);
  if (missing > 0) return at::constant_pad_nd(tensor, {0, missing});
  return tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

/// Keys and values of every query head. flash reads a group's keys in place.
Tensor for_each_query_head(const Tensor& tensor, int64_t query_heads) {
  const auto heads = tensor.size(1);
  if (heads == query_heads) return tensor;
  return tensor.unsqueeze(2)
      .expand({-1, -1, query_heads / heads, -1, -1})
      .reshape({tensor.size(0), query_heads, tensor.size(2), tensor.size(3)});
}

/// The sum over a group of what for_each_query_head repeated.
Tensor for_each_key_head(const Tensor& gradient, int64_t heads) {
  if (gradient.size(1) == heads) return gradient;
  return gradient.unflatten(1, {heads, gradient.size(1) / heads}).sum(2);
}

/// The call as `back_end` takes it, channels padded.
Call prepared(BackEnd back_end, const Call& call, int64_t channels) {
  const auto fit = [&](const Tensor& tensor) {
    const auto ready = padded(tensor, channels);
    return back_end == BackEnd::flash ? ready : for_each_query_head(ready, call.query.size(1));
  };
  return {padded(call.query, channels), fit(call.key), fit(call.value), call.causal, call.scale};
}

/// The stand-in aligns its causal mask top-left: a mask where that makes a difference.
std::optional<Tensor> standin_mask(const Call& call) {
  const auto rows = call.query.size(2), keys = call.key.size(2);
  if (!call.causal || rows == keys) return std::nullopt;
  const auto options = call.query.options().dtype(at::kLong);
  const auto last = at::arange(keys - rows, keys, options).unsqueeze(-1);
  return at::zeros({rows, keys}, call.query.options())
      .masked_fill(at::arange(keys, options) > last, -kInfinity);
}

/// The memory-efficient operators want (b, rows, heads, channels).
Tensor swapped(const Tensor& tensor) { return tensor.transpose(1, 2); }
int64_t efficient_mask(const Call& call) { return call.causal ? kCausalFromBottomRight : kNoMask; }

Attended attend_prepared(BackEnd back_end, const Call& call) {
  const auto& [query, key, value, causal, scale] = call;
  switch (back_end) {
    case BackEnd::flash: {
      const auto all =
          at::_scaled_dot_product_flash_attention(query, key, value, 0.0, causal, false, scale);
      return {std::get<0>(all), std::get<1>(all)};
    }
    case BackEnd::efficient: {
      const auto all = at::_efficient_attention_forward(
          swapped(query), swapped(key), swapped(value), {}, {}, {}, std::nullopt, std::nullopt, 0.0,
          efficient_mask(call), /*compute_log_sumexp=*/true, scale);
      return {swapped(std::get<0>(all)), std::get<1>(all)};
    }
    case BackEnd::cudnn: {
      const auto all = at::_scaled_dot_product_cudnn_attention(
          query, key, value, {}, /*compute_log_sumexp=*/true, 0.0, causal, false, scale);
      return {std::get<0>(all), std::get<1>(all)};
    }
    default: {
      const auto mask = standin_mask(call);
      const auto [output, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
          query, key, value, 0.0, causal && !mask, mask, scale);
      return {output, lse};
    }
  }
}

std::array<Tensor, 3> backward_prepared(
    BackEnd back_end, const Call& call, const Tensor& grad_output, const Tensor& output,
    const Tensor& lse) {
  const auto& [query, key, value, causal, scale] = call;
  const auto rows = query.size(2), keys = key.size(2);
  const auto none = at::zeros({}, query.options().dtype(at::kLong));  // dropout's random state
  switch (back_end) {
    case BackEnd::flash: {
      const auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_backward(
          grad_output, query, key, value, output, lse, Tensor(), Tensor(), rows, keys, 0.0, causal,
          none, none, scale);
      return {dq, dk, dv};
    }
    case BackEnd::efficient: {
      const auto missing = (rows + kAlignRows - 1) / kAlignRows * kAlignRows - rows;
      const auto aligned = at::constant_pad_nd(lse, {0, missing}, kInfinity);
      const auto [dq, dk, dv, dbias] = at::_efficient_attention_backward(
          swapped(grad_output), swapped(query), swapped(key), swapped(value), {}, swapped(output),
          {}, {}, rows, keys, aligned, 0.0, none, none, efficient_mask(call), false, scale);
      return {swapped(dq), swapped(dk), swapped(dv)};
    }
    case BackEnd::cudnn: {
      const auto [dq, dk, dv] = at::_scaled_dot_product_cudnn_attention_backward(
          grad_output, query, key, value, output, lse.unsqueeze(-1), none, none, Tensor(), Tensor(),
          Tensor(), rows, keys, 0.0, causal, scale);
      return {dq, dk, dv};
    }
    default: {
      const auto mask = standin_mask(call);
      const auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          grad_output, query, key, value, output, lse, 0.0, causal && !mask, mask, scale);
      return {dq, dk, dv};
    }
  }
}

/// `tensor` with two more channels.
Tensor extended(const Tensor& tensor, const Tensor& first, const Tensor& second) {
  const auto column = [&](const Tensor& x) { return x.to(tensor.scalar_type()).unsqueeze(-1); };
  return at::cat({tensor, column(first), column(second)}, -1);
}

}  // namespace

BackEnd choose(const Call& call) {
  if (call.query.is_cpu()) return BackEnd::standin;
  const auto channels = padded_channels(call);
  const auto query = padded(call.query, channels);
  const auto key = padded(for_each_query_head(call.key, call.query.size(1)), channels);
  const auto value = padded(for_each_query_head(call.value, call.query.size(1)), channels);
  // All of these operators align alike where L equals S; asked with a square causal call, PyTorch
  // does not refuse what we call with its bottom-right forms.
  const auto choice =
      at::_fused_sdp_choice(query, key, value, {}, 0.0, /*is_causal=*/false, call.scale);
  const bool square = !call.causal || call.query.size(2) == call.key.size(2);
  switch (choice) {
    case kFlash:
      return BackEnd::flash;
    case kEfficient:
      return BackEnd::efficient;
    case kCudnn:
      return square ? BackEnd::cudnn : BackEnd::flash;
    default:
      return BackEnd::none;
  }
}

Attended attend(BackEnd back_end, const Call& call) {
  auto [output, lse] = attend_prepared(back_end, prepared(back_end, call, padded_channels(call)));
  const auto &query = call.query, &value = call.value;
  lse = lse.reshape({query.size(0), query.size(1), -1}).narrow(-1, 0, query.size(2));
  return {output.narrow(-1, 0, value.size(-1)), lse.to(wide_dtype(query))};
}

// The fused backward computes rowsum(dO * output) from what it is handed as the output. A gradient
// g that arrives at the log-sum-exp changes this number alone, by -g. Two more channels bring it in
// exactly, whatever dO is: there V = 0, dO = 1 and the output is -g, rounded, and the rest of -g.
// Then dO V^T keeps its value and the row sum becomes rowsum(dO * output) - g.
std::array<Tensor, 3> attend_backward(
    BackEnd back_end, const Call& call, const Attended& attended, const Tensor& grad_output,
    const Tensor& grad_lse) {
  auto output = attended.output.to(call.query.scalar_type());
  auto grad = grad_output;
  auto wide = call;
  if (grad_lse.defined()) {
    const auto coarse = (-grad_lse).to(output.scalar_type());
    const auto rest = -grad_lse - coarse.to(grad_lse.scalar_type());
    const auto one = at::ones({}, output.options()).expand(grad_lse.sizes());
    output = extended(output, coarse, rest);
    grad = extended(grad, one, one);
    wide.value = at::constant_pad_nd(call.value, {0, 2});
  }
  const auto channels = padded_channels(wide);
  const auto [dq, dk, dv] = backward_prepared(
      back_end, prepared(back_end, wide, channels), padded(grad, channels),
      padded(output, channels), attended.lse.to(wide_dtype(call.query)).contiguous());
  const auto heads = call.key.size(1);
  return {
      dq.narrow(-1, 0, call.query.size(-1)),
      for_each_key_head(dk, heads).narrow(-1, 0, call.key.size(-1)),
      for_each_key_head(dv, heads).narrow(-1, 0, call.value.size(-1))};
}

}  // namespace mixhead::fused
