#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

/// Function transforms (torch.func) and forward mode. A C++ autograd function knows neither, so
/// under them an op is its portable formula in differentiable ATen calls, which PyTorch transforms
/// itself: right to every order and in every composition, at the price of a graph that is dense in
/// the keys.
namespace mixhead::transforms {

/// Whether a call runs inside of a transform of torch.func: its layers stand in the dispatch keys,
/// the front one where they take the next call, the back one while they are at work.
inline bool active() {
  return c10::impl::tls_is_dispatch_key_included(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

/// Whether no value may be read: inside of a transform, or where a dispatch mode traces.
inline bool values_unknown() {
  return active() || c10::impl::TorchDispatchModeTLS::stack_len() > 0;
}

/// Whether a call must be made of operations that PyTorch can transform: inside of a transform, or
/// with a forward-mode tangent at one of the tensors.
template <class Tensors>
bool wanted(const Tensors& tensors) {
  if (active()) return true;
  for (const auto& tensor : tensors) {
    if (tensor.defined() && tensor._fw_grad(/*level=*/0).defined()) return true;
  }
  return false;
}

}  // namespace mixhead::transforms
