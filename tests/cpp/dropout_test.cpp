// Dropout's counter-based numbers: known answers, and that they look uniform and independent.
#include <gtest/gtest.h>
#include <mixhead/dropout.h>

#include <bit>
#include <cmath>
#include <vector>

namespace {

using namespace mixhead::dropout;

double kept_rate(int64_t seed, int64_t side, int64_t row, uint32_t columns, double p) {
  const auto key = row_key(seed, side, row);
  int64_t kept = 0;
  for (uint32_t column = 0; column < columns; ++column) {
    kept += uniform_bits(key, column) >= threshold(p);
  }
  return static_cast<double>(kept) / columns;
}

/// Pearson's statistic of `bits` in 256 bins of their highest (or lowest) byte: 255 on average,
/// with standard deviation 22.6.
double chi_square(const std::vector<uint32_t>& bits, int shift) {
  std::vector<double> counts(256, 0.0);
  for (const auto x : bits) counts[(x >> shift) & 255] += 1.0;
  const double expected = static_cast<double>(bits.size()) / 256.0;
  double statistic = 0.0;
  for (const double count : counts) statistic += (count - expected) * (count - expected) / expected;
  return statistic;
}

// The published generator of state 1234567: its outputs are the mixed successive states.
TEST(Dropout, Splitmix64KnownAnswers) {
  constexpr uint64_t kGamma = 0x9E3779B97F4A7C15ull;
  const uint64_t expected[] = {
      6457827717110365317ull, 3203168211198807973ull, 9817491932198370423ull,
      4593380528125082431ull, 16408922859458223821ull};
  uint64_t state = 1234567;
  for (const auto answer : expected) {
    EXPECT_EQ(splitmix64(state), answer);
    state += kGamma;
  }
}

// Written down once: a change of these numbers changes what a seed means in every saved experiment.
TEST(Dropout, KnownAnswers) {
  EXPECT_EQ(uniform_bits(row_key(0, 0, 0), 0u), 4284213134u);
  EXPECT_EQ(uniform_bits(row_key(0, 1, 0), 0u), 763101673u);
  EXPECT_EQ(uniform_bits(row_key(1, 0, 0), 0u), 766570955u);
  EXPECT_EQ(uniform_bits(row_key(0, 0, 1), 0u), 2302214885u);
  EXPECT_EQ(uniform_bits(row_key(0, 0, 0), 1u), 4124937334u);
  EXPECT_EQ(uniform_bits(row_key(4611686018427400249, 1, 1000000000), 2147483655u), 2979130907u);
  EXPECT_EQ(uniform_bits(row_key(-1, 0, 3), 9u), 3483279013u);
}

TEST(Dropout, MemoryOfOneSeedIsNotTheSequenceOfTheNext) { EXPECT_NE(stream(0, 1), stream(1, 0)); }

TEST(Dropout, Threshold) {
  EXPECT_EQ(threshold(0.0), 0u);
  EXPECT_EQ(threshold(0.5), uint64_t{1} << 31);
  EXPECT_EQ(threshold(1.0), uint64_t{1} << 32);
  EXPECT_EQ(kept_rate(1, 0, 2, 4096, 0.0), 1.0);
  EXPECT_EQ(kept_rate(1, 0, 2, 4096, 1.0), 0.0);
}

TEST(Dropout, RateOfKept) {
  constexpr uint32_t kColumns = 1 << 16;
  for (const double p : {0.01, 0.1, 0.5, 0.9}) {
    const double deviation = std::sqrt(p * (1 - p) / kColumns);
    for (int64_t row : {0, 1, 2, 1000000}) {
      for (int64_t side : {0, 1}) {
        EXPECT_NEAR(kept_rate(7, side, row, kColumns, p), 1 - p, 5 * deviation);
      }
    }
  }
}

TEST(Dropout, UniformAlongColumnsRowsAndSeeds) {
  constexpr int kCount = 1 << 16;
  std::vector<uint32_t> columns, rows, seeds;
  for (int i = 0; i < kCount; ++i) {
    columns.push_back(uniform_bits(row_key(0, 0, 0), static_cast<uint32_t>(i)));
    rows.push_back(uniform_bits(row_key(0, 1, i), 5));
    seeds.push_back(uniform_bits(row_key(i, 0, 3), 5));
  }
  for (const auto& bits : {columns, rows, seeds}) {
    for (const int shift : {24, 12, 0}) {
      EXPECT_LT(std::abs(chi_square(bits, shift) - 255.0), 6 * 22.6) << "shift " << shift;
    }
  }
}

// Neighbours in column, row, side and seed differ in half of their bits.
TEST(Dropout, NeighboursAreIndependent) {
  constexpr int kCount = 1 << 14;
  double column = 0, row = 0, side = 0, seed = 0;
  for (int i = 0; i < kCount; ++i) {
    const auto c = static_cast<uint32_t>(i);
    const auto x = uniform_bits(row_key(9, 0, i), c);
    column += std::popcount(x ^ uniform_bits(row_key(9, 0, i), c + 1));
    row += std::popcount(x ^ uniform_bits(row_key(9, 0, i + 1), c));
    side += std::popcount(x ^ uniform_bits(row_key(9, 1, i), c));
    seed += std::popcount(x ^ uniform_bits(row_key(10, 0, i), c));
  }
  // 32 fair bits: mean 16, standard deviation sqrt(8) a pair.
  const double tolerance = 6 * std::sqrt(8.0 / kCount);
  for (const double bits : {column, row, side, seed}) EXPECT_NEAR(bits / kCount, 16, tolerance);
}

}  // namespace
