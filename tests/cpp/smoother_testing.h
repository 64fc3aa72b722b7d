// The smoother of the CPU engine on plain pointers: its inputs, what it computes, and two ways to
// compute it, the engine and loops in double.
#pragma once

#include <cpu/smoother.h>

#include <cstdint>
#include <vector>

#include "cpu_testing.h"

namespace smoother_testing {

using cpu_testing::Doubles;
using cpu_testing::kInf;
using mixhead::cpu::Kernels;
using mixhead::cpu::Type;

struct Sizes {
  int64_t batch, key_heads, groups, rows, channels, value_channels, keys, slots;
  int64_t heads() const { return key_heads * groups; }
};

struct Options {
  bool shared = true, causal = false, joint = false;
  enum { no_mask, padding, full_float } mask = no_mask;
  int64_t named = 0;  // slots that each query names; 0: it reads all
  double dropout = 0.0;
};

struct Case : Sizes, Options {
  const char* name;
};

constexpr Case kCases[] = {
    {{2, 2, 1, 9, 8, 8, 11, 13}, {}, "plain"},
    {{2, 1, 1, 150, 16, 32, 260, 700}, {.causal = true}, "several blocks"},
    {{3, 1, 1, 37, 33, 17, 101, 97},
     {.shared = false, .causal = true, .joint = true},
     "odd sizes, joint"},
    {{2, 2, 3, 21, 20, 12, 40, 50}, {.causal = true}, "groups"},
    {{1, 2, 1, 3, 37, 21, 300, 900}, {.joint = true}, "few rows"},
    {{7, 2, 1, 1, 64, 48, 30, 1000}, {}, "half a vector of rows"},
    {{5, 2, 1, 1, 64, 64, 31, 1000}, {}, "half a vector of rows, whole vectors of pairs"},
    {{2, 1, 1, 8, 8, 8, 8, 0}, {.joint = true}, "no memory"},
    {{2, 2, 1, 70, 8, 8, 50, 220}, {.mask = Case::padding}, "padding masks"},
    {{2, 2, 1, 70, 8, 8, 50, 130}, {.joint = true, .mask = Case::full_float}, "float masks"},
    {{2, 2, 2, 15, 24, 20, 20, 60}, {.mask = Case::full_float, .named = 9}, "named slots"},
    {{2, 1, 2, 33, 16, 16, 33, 90}, {.causal = true, .joint = true, .dropout = 0.3}, "dropout"},
};

/// Numbers of one type in memory, and the same, rounded, as doubles.
struct Array {
  Doubles values;
  std::vector<unsigned char> bytes;

  Array() = default;
  Array(const Doubles& wanted, Type type);
  Doubles read(Type type) const;

 private:
  void store(Type type, size_t i, double value);
  template <class T>
  T& at(size_t i) {
    return reinterpret_cast<T*>(bytes.data())[i];
  }
  template <class T>
  T at(size_t i) const {
    return reinterpret_cast<const T*>(bytes.data())[i];
  }
};

inline Type accumulator(Type type) { return type == Type::float64 ? Type::float64 : Type::float32; }

/// Drawn at random; of each pair the sequence's comes first, then the memory's.
struct Inputs {
  Case c;
  Type type;
  Array query, key[2], value[2], mix, mask[2], grad, grad_lse[2];
  std::vector<uint8_t> readable[2];
  std::vector<int64_t> index;
  int64_t seed = 42;

  Inputs(const Case& of, Type type);
  int64_t width(int s) const { return s ? c.slots : c.keys; }
  int64_t unit(int s, int64_t batch, int64_t head) const {
    return s == 1 && c.shared ? head / c.groups : batch * c.key_heads + head / c.groups;
  }
};

struct Results {
  Doubles output, lse[2], grad_query, grad_key[2], grad_value[2], grad_mix, grad_mask[2];
};

/// The contract's formulas in double, one query after the other.
Results reference(const Inputs& in);

/// The engine's items on `threads` threads. `in_parts` limits heads and rows, which makes several
/// waves and chunks of what would be one.
Results run_engine(Inputs& in, const Kernels& kernels, int64_t threads, bool in_parts);

}  // namespace smoother_testing
