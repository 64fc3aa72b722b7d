#include "empty.h"

#include <ATen/ops/empty.h>
#include <sys/mman.h>

namespace mixhead {

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  constexpr uintptr_t kPage = 2 << 20, kLarge = 16 << 20;
  auto result = at::empty(sizes, options);
#ifdef MADV_HUGEPAGE
  if (result.nbytes() >= kLarge) {
    auto* data = static_cast<char*>(result.data_ptr());
    const auto begin = reinterpret_cast<uintptr_t>(data);
    const auto first = (begin + kPage - 1) / kPage * kPage;
    const auto last = (begin + result.nbytes()) / kPage * kPage;
    madvise(data + (first - begin), last - first, MADV_HUGEPAGE);  // may be refused
  }
#endif
  return result;
}

}  // namespace mixhead
