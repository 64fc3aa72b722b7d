#pragma once

#include <ATen/core/Tensor.h>

#include <array>

/// PyTorch's own fused attention operators behind one interface: attention over one set of keys
/// with its log-sum-exp, and its gradients from a given output and log-sum-exp. All calls go
/// through the dispatcher, so nothing here needs CUDA's headers or libraries.
namespace mixhead::fused {

using at::Tensor;

/// `standin` is PyTorch's flash kernel for the CPU, which keeps the same contract: with it tests
/// without a GPU reach everything above this interface.
enum class BackEnd { none, flash, efficient, cudnn, standin };

/// query (b, Hq, L, D), key (b, H, S, D), value (b, H, S, Dv), none of them empty; H divides Hq.
struct Call {
  Tensor query, key, value;
  bool causal;  // query i reads keys up to S - L + i; L <= S
  double scale;
};

/// output (b, Hq, L, Dv) in the query's dtype; lse (b, Hq, L) in float32 (float64 for float64).
struct Attended {
  Tensor output, lse;
};

/// The back end that PyTorch's scaled_dot_product_attention would take for this call on its device,
/// with the user's torch.nn.attention.sdpa_kernel obeyed; `none` where it would take none.
BackEnd choose(const Call& call);

Attended attend(BackEnd back_end, const Call& call);

/// Gradients of query, key and value. `attended` need not be what attend returned: with P the
/// softmax by `attended.lse`, dV = P^T dO and dS = P * (dO V^T - rowsum(dO * output) + grad_lse).
/// grad_lse (b, Hq, L) may be undefined, which is a gradient of 0.
std::array<Tensor, 3> attend_backward(
    BackEnd back_end, const Call& call, const Attended& attended, const Tensor& grad_output,
    const Tensor& grad_lse);

}  // namespace mixhead::fused
