// Calls mixed_attention from C++ and compares it with two dense softmaxes.
#include <ATen/ATen.h>
#include <mixhead/mixhead.h>
#include <mixhead/version.h>

#include <cmath>
#include <cstdio>

namespace {

at::Tensor dense_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  const double scale = 1 / std::sqrt(static_cast<double>(query.size(-1)));
  return at::softmax(at::matmul(query, key.transpose(-2, -1)) * scale, -1).matmul(value);
}

}  // namespace

int main() {
  at::manual_seed(0);
  const auto query = at::randn({2, 3, 5, 8}, at::kDouble);
  const auto key = at::randn({2, 3, 7, 8}, at::kDouble);
  const auto value = at::randn({2, 3, 7, 4}, at::kDouble);
  const auto memory_key = at::randn({3, 11, 8}, at::kDouble);
  const auto memory_value = at::randn({3, 11, 4}, at::kDouble);
  const auto mix = at::randn({3, 1, 1}, at::kDouble);

  const auto output =
      std::get<0>(mixhead::mixed_attention(query, key, value, memory_key, memory_value, mix));

  const auto w = at::sigmoid(mix);
  const auto expected = (1 - w) * dense_attention(query, key, value) +
                        w * dense_attention(query, memory_key, memory_value);
  const double error = (output - expected).abs().max().item<double>();
  std::printf(
      "mixhead %s, LibTorch %s, error %.1e\n", mixhead::version(), mixhead::torch_version(), error);
  return error <= 1e-12 ? 0 : 1;
}
