#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "cpu/smoother.h"

/// What the operators' cpu.cpp share: tensors as the engine's views, and its items over threads.
namespace mixhead::engine {

cpu::Type type_of(at::ScalarType dtype);

/// Tensors read as (batch, head, row, column); owns the batch tables that the views point to.
class Views {
 public:
  explicit Views(at::IntArrayRef batch_shape);
  Views(const Views&) = delete;
  Views& operator=(const Views&) = delete;

  int64_t batch() const { return batch_; }
  /// `tensor` broadcast where its sizes are 1 or missing.
  cpu::View view(const at::Tensor& tensor, int64_t heads, int64_t rows, int64_t columns);
  cpu::Mask mask(
      const std::optional<at::Tensor>& tensor, int64_t heads, int64_t rows, int64_t keys);

 private:
  static constexpr size_t kViews = 24;
  at::IntArrayRef batch_shape_;
  int64_t batch_;
  c10::SmallVector<c10::SmallVector<int64_t, 4>, kViews> tables_;
};

inline at::DataPtr allocate(int64_t bytes) { return c10::GetCPUAllocator()->allocate(bytes); }

/// Memory that the chunks of a call use one after the other: got anew for each, it might be new to
/// the process each time.
class Scratch {
 public:
  void* at_least(int64_t bytes) {
    if (bytes > bytes_) {
      data_.clear();
      data_ = allocate(bytes);
      bytes_ = bytes;
    }
    return data_.get();
  }

 private:
  at::DataPtr data_;
  int64_t bytes_ = 0;
};

/// Does items 0 .. count - 1 on the threads there are; item(number, scratch). Whichever thread is
/// free takes the next: results do not depend on who did what.
template <class Item>
void run_items(int64_t count, bool parallel, int64_t scratch_bytes, const Item& item) {
  if (count == 0) return;
  if (!parallel) {
    const auto scratch = allocate(scratch_bytes);
    for (int64_t i = 0; i < count; ++i) item(i, scratch.get());
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), count), 1, [&](int64_t, int64_t) {
    const auto scratch = allocate(scratch_bytes);
    for (int64_t i; (i = next.fetch_add(1)) < count;) item(i, scratch.get());
  });
}

/// The batch entries ordered by their place in a gradient that may broadcast over the batch.
struct Places {
  Places(const cpu::View& gradient, int64_t batch);
  int64_t count() const { return static_cast<int64_t>(first.size()) - 1; }
  std::vector<int64_t> batches, first;
};

}  // namespace mixhead::engine
