#include <bit>
#include <random>

#include "smoother_testing.h"

namespace smoother_testing {
namespace {

size_t size_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

}  // namespace

Array::Array(const Doubles& wanted, Type type) : bytes(wanted.size() * size_of(type)) {
  for (size_t i = 0; i < wanted.size(); ++i) store(type, i, wanted[i]);
  values = read(type);
}

void Array::store(Type type, size_t i, double value) {
  const auto narrow = static_cast<float>(value);
  if (type == Type::float64) at<double>(i) = value;
  if (type == Type::float32) at<float>(i) = narrow;
  if (type == Type::bfloat16) at<uint16_t>(i) = std::bit_cast<uint32_t>(narrow) >> 16;
  if (type == Type::float16) at<_Float16>(i) = static_cast<_Float16>(narrow);
}

Doubles Array::read(Type type) const {
  Doubles result(bytes.size() / size_of(type));
  for (size_t i = 0; i < result.size(); ++i) {
    if (type == Type::float64) result[i] = at<double>(i);
    if (type == Type::float32) result[i] = at<float>(i);
    if (type == Type::bfloat16) {
      result[i] = std::bit_cast<float>(static_cast<uint32_t>(at<uint16_t>(i)) << 16);
    }
    if (type == Type::float16) result[i] = static_cast<float>(at<_Float16>(i));
  }
  return result;
}

Inputs::Inputs(const Case& of, Type type) : c(of), type(type) {
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  const auto draw = [&](int64_t count, Type as) {
    Doubles numbers(count);
    for (auto& x : numbers) x = normal(random);
    return Array(numbers, as);
  };
  const int64_t all = c.batch * c.heads() * c.rows;
  query = draw(all * c.channels, type);
  grad = draw(all * c.value_channels, type);
  mix = draw(c.heads(), accumulator(type));
  for (int s = 0; s < 2; ++s) {
    const int64_t units = c.key_heads * (s == 1 && c.shared ? 1 : c.batch);
    key[s] = draw(units * width(s) * c.channels, type);
    value[s] = draw(units * width(s) * c.value_channels, type);
    grad_lse[s] = draw(all, accumulator(type));
    if (c.mask == Case::full_float) mask[s] = draw(c.rows * width(s), accumulator(type));
    if (c.mask == Case::padding) {
      // Batch entry 1 may read nothing of the memory.
      for (int64_t i = 0; i < c.batch * width(s); ++i) {
        readable[s].push_back(random() % 3 > 0 && !(s == 1 && i >= width(s)));
      }
    }
  }
  for (int64_t i = 0; i < all * c.named; ++i) {
    index.push_back(static_cast<int64_t>(random() % (c.slots + 1)) - 1);
  }
}

}  // namespace smoother_testing
