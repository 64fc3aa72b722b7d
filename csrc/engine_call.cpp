#include "engine_call.h"

namespace mixhead::engine {

using cpu::View;

cpu::Type type_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return cpu::Type::float32;
    case at::kDouble:
      return cpu::Type::float64;
    case at::kBFloat16:
      return cpu::Type::bfloat16;
    default:
      return cpu::Type::float16;
  }
}

Views::Views(at::IntArrayRef batch_shape) : batch_shape_(batch_shape), batch_(1) {
  for (const auto size : batch_shape) batch_ *= size;
}

View Views::view(const at::Tensor& tensor, int64_t heads, int64_t rows, int64_t columns) {
  const auto leading = static_cast<int64_t>(batch_shape_.size());
  const int64_t missing = leading + 3 - tensor.dim();
  const auto stride = [&](int64_t dimension, int64_t size) -> int64_t {
    const auto at = dimension - missing;
    return at < 0 || (tensor.size(at) == 1 && size != 1) ? 0 : tensor.stride(at);
  };
  TORCH_INTERNAL_ASSERT(tables_.size() < kViews);
  auto& table = tables_.emplace_back();
  table.resize(batch_);
  for (int64_t batch = 0; batch < batch_; ++batch) {
    int64_t rest = batch, offset = 0;
    for (auto i = leading - 1; i >= 0; --i) {
      offset += rest % batch_shape_[i] * stride(i, batch_shape_[i]);
      rest /= batch_shape_[i];
    }
    table[batch] = offset;
  }
  return {
      const_cast<void*>(tensor.const_data_ptr()), table.data(), stride(leading, heads),
      stride(leading + 1, rows), stride(leading + 2, columns)};
}

cpu::Mask Views::mask(
    const std::optional<at::Tensor>& tensor, int64_t heads, int64_t rows, int64_t keys) {
  if (!tensor) return {};
  const bool boolean = tensor->scalar_type() == at::kBool;
  return {
      boolean ? cpu::MaskKind::boolean : cpu::MaskKind::additive,
      boolean ? cpu::Type::float32 : type_of(tensor->scalar_type()),
      view(*tensor, heads, rows, keys)};
}

Places::Places(const View& gradient, int64_t batch) {
  for (int64_t b = 0; b < batch; ++b) batches.push_back(b);
  const auto* table = gradient.batch;
  std::stable_sort(
      batches.begin(), batches.end(), [&](int64_t a, int64_t b) { return table[a] < table[b]; });
  for (int64_t i = 0; i < batch; ++i) {
    if (i == 0 || table[batches[i]] != table[batches[i - 1]]) first.push_back(i);
  }
  first.push_back(batch);
}

}  // namespace mixhead::engine
