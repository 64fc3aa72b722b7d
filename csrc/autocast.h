#pragma once

#include <ATen/autocast_mode.h>

/// What the autocast rooms of all ops share.
namespace mixhead::autocast {

/// `tensor` in autocast's dtype for the device.
template <at::DeviceType device>
at::Tensor cast(const at::Tensor& tensor) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

}  // namespace mixhead::autocast
