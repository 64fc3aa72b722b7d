#pragma once

#include <cstdint>

/// Counter-based dropout: whether a weight is kept is a function of (seed, side, row, column)
/// alone, so forward, backward and every split over threads see the same numbers and none is
/// stored. The integer mixing steps are those of splitmix64 (Steele, Lea & Flood 2014) for the row
/// and of a 32-bit multiply-xorshift hash (Wellons, "Prospecting for hash functions", 2018) for the
/// column.
namespace mixhead::dropout {

struct RowKey {
  uint32_t first;
  uint32_t second;
};

static inline uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

/// `side` is 0 for the sequence, 1 for the memory. The seed is mixed first: seed + side alone would
/// give a seed's memory the numbers of the next seed's sequence.
static inline uint64_t stream(int64_t seed, int64_t side) {
  return splitmix64(splitmix64(static_cast<uint64_t>(seed)) + static_cast<uint64_t>(side));
}

/// `row` counts (batch * Hq + head) * L + query.
static inline RowKey row_key(int64_t seed, int64_t side, int64_t row) {
  const uint64_t mixed = splitmix64(stream(seed, side) ^ static_cast<uint64_t>(row));
  return {static_cast<uint32_t>(mixed), static_cast<uint32_t>(mixed >> 32)};
}

static inline uint32_t uniform_bits(RowKey key, uint32_t column) {
  uint32_t x = column * 0x9E3779B1u + key.first;
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= key.second;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  x ^= x >> 16;
  return x;
}

/// A weight is dropped where uniform_bits(...) < threshold(p); p = 1 drops every weight.
static inline uint64_t threshold(double p) { return static_cast<uint64_t>(p * 4294967296.0); }

}  // namespace mixhead::dropout
