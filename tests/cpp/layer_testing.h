// What the tests of the LibTorch layers share.
#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace layer_testing {

using torch::Tensor;

inline Tensor random(torch::IntArrayRef shape) { return torch::randn(shape, torch::kFloat64); }

inline void expect_close(const Tensor& actual, const Tensor& expected, double tolerance = 1e-10) {
  ASSERT_EQ(actual.sizes(), expected.sizes());
  EXPECT_LT((actual - expected).abs().max().item<double>(), tolerance);
}

/// Runs `call`, which must throw c10::Error whose message has `text` in it.
template <typename Call>
void expect_error(Call call, const std::string& text) {
  try {
    call();
    FAIL() << "no error; expected: " << text;
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what_without_backtrace()).find(text), std::string::npos)
        << error.what_without_backtrace();
  }
}

/// Files that Python wrote: the ones kept with the tests, or fresh ones that a Python test names.
/// What C++ writes for Python goes beside the fresh ones.
inline std::filesystem::path checkpoints() {
  const char* fresh = std::getenv("MIXHEAD_CHECKPOINTS");
  return fresh ? std::filesystem::path(fresh)
               : std::filesystem::path(__FILE__).parent_path().parent_path() / "data";
}

inline std::filesystem::path written() {
  return std::getenv("MIXHEAD_CHECKPOINTS") ? checkpoints()
                                            : std::filesystem::path(testing::TempDir());
}

/// A file that Python wrote with torch.save of a dict.
inline c10::Dict<c10::IValue, c10::IValue> read_dict(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  return torch::pickle_load(bytes).toGenericDict();
}

}  // namespace layer_testing
