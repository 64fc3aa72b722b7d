#pragma once

#include <ATen/core/Tensor.h>

namespace mixhead {

/// at::empty for a CPU result. What is too large for the allocator to hand out again is new to the
/// process at every call: in pages of 2 MiB, where the system allows them, its page faults cost a
/// few percent of the call instead of half.
at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace mixhead
