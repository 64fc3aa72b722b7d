// The engine's search on plain pointers, for every instruction set that this processor has, against
// all scores sorted.
#include <cpu/topk.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

namespace {

using namespace mixhead::cpu;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr int64_t kBatch = 2, kGroups = 2, kRows = 37, kChannels = 13, kKeys = 700, kBest = 11;
constexpr int64_t kAllRows = kBatch * kGroups * kRows;

/// Small integers, so that scores are exact and many are equal; one NaN key, the last third of the
/// keys closed to every second query.
template <class T>
struct Search {
  std::vector<T> query, key;
  std::vector<char> mask;
  Metric metric;

  explicit Search(Metric metric) : metric(metric) {
    std::mt19937 random(7);
    std::uniform_int_distribution<int> integer(-2, 2);
    query.resize(kAllRows * kChannels);
    key.resize(kKeys * kChannels);
    for (auto& x : query) x = static_cast<T>(integer(random));
    for (auto& x : key) x = static_cast<T>(integer(random));
    key[123 * kChannels] = std::numeric_limits<T>::quiet_NaN();
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t k = 0; k < kKeys; ++k) mask.push_back(row % 2 == 0 || k < kKeys * 2 / 3);
    }
  }

  double score(int64_t row, int64_t k) const {
    if (!mask[row % kRows * kKeys + k]) return -kInf;
    double sum = 0.0;
    for (int64_t c = 0; c < kChannels; ++c) {
      const double q = query[row * kChannels + c], x = key[k * kChannels + c];
      sum += metric == Metric::l2 ? -(q - x) * (q - x) : q * x;
    }
    return sum;
  }

  /// Indices and scores of (rows, best), all scores sorted.
  std::vector<int64_t> expected() const {
    std::vector<int64_t> result;
    for (int64_t row = 0; row < kAllRows; ++row) {
      std::vector<double> scores;
      for (int64_t k = 0; k < kKeys; ++k) {
        const double s = score(row, k);
        scores.push_back(std::isnan(s) ? kInf : s);
      }
      std::vector<int64_t> order(kKeys);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(
          order.begin(), order.end(), [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
      result.insert(result.end(), order.begin(), order.begin() + kBest);
    }
    return result;
  }

  std::vector<int64_t> found(const TopkKernels& functions, Type type, int64_t splits) {
    const std::vector<int64_t> query_batch{0, kGroups * kRows * kChannels}, shared{0, 0};
    std::vector<T> scores(splits * kAllRows * kBest);
    std::vector<int64_t> indices(splits * kAllRows * kBest);
    TopkWork work{};
    auto& p = work.problem;
    p.type = type;
    p.batch = kBatch;
    p.key_heads = 1;
    p.groups = kGroups;
    p.rows = kRows;
    p.channels = kChannels;
    p.query = {query.data(), query_batch.data(), kRows * kChannels, kChannels, 1};
    auto& source = p.source[0];
    source.key = {key.data(), shared.data(), 0, kChannels, 1};
    source.keys = source.slots = kKeys;
    source.shared = true;
    source.mask = {MaskKind::boolean, Type::float32, {mask.data(), shared.data(), 0, kKeys, 1}};
    work.metric = metric;
    work.k = kBest;
    work.block = 64;
    work.split = {
        .units = 1,
        .unit_rows = kAllRows,
        .row_block = 100,
        .row_blocks = 2,
        .key_split = (kKeys + splits - 1) / splits,
        .key_splits = splits,
        .first_item = 0,
        .few_rows = false};
    work.scores = scores.data();
    work.indices = indices.data();
    std::vector<char> scratch(functions.scratch(work) + 64);
    auto* aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64);
    for (int64_t item = 0; item < 2 * splits; ++item) functions.item(work, item, aligned);
    if (splits > 1) functions.merge(work, 0, kAllRows);
    indices.resize(kAllRows * kBest);
    return indices;
  }
};

template <class T>
void compare(const char* isa, Type type) {
  const auto* functions = topk_kernels_of(isa, type);
  if (!functions) GTEST_SKIP() << "this processor lacks " << isa;
  for (const auto metric : {Metric::dot, Metric::l2}) {
    Search<T> search(metric);
    for (const int64_t splits : {1, 3}) {
      EXPECT_EQ(search.found(*functions, type, splits), search.expected())
          << isa << ", metric " << static_cast<int>(metric) << ", splits " << splits;
    }
  }
}

class TopkEngine : public testing::TestWithParam<const char*> {};
TEST_P(TopkEngine, FindsTheHighestInFloat32) { compare<float>(GetParam(), Type::float32); }
TEST_P(TopkEngine, FindsTheHighestInFloat64) { compare<double>(GetParam(), Type::float64); }
INSTANTIATE_TEST_SUITE_P(
    EveryInstructionSet, TopkEngine, testing::Values("default", "avx2", "avx512", "avx512_bf16"),
    [](const auto& info) { return std::string(info.param); });

}  // namespace
