#pragma once

#include <cstdint>

#include "cpu/smoother.h"

/// The CPU engine's search for the keys of highest score: plain arguments and the table of
/// functions for each instruction set.
///
/// Blocks of keys stream past panels of query rows. Each row keeps the best k so far in a heap with
/// the worst on top; a score is compared with the worst of its row, a vector of rows at a time, and
/// only one that beats it reaches the heap.
namespace mixhead::cpu {

enum class Metric : uint8_t { dot, cosine, l2 };

/// The result's rows are numbered (batch * heads + head) * rows + row. With several splits
/// `scores` and `indices` hold each split's rows, the first split's being the result after merging.
struct TopkWork {
  Problem problem;  // query, and the keys as source 0; scale and values are not used
  Metric metric;
  View inverse_query_norm, inverse_key_norm;  // cosine; in the accumulation dtype, one column
  int64_t k;                                  // at least 1
  int64_t block;                              // keys at a time
  SourceWork split;
  void* scores;      // (splits, rows of all heads and batch entries, k)
  int64_t* indices;  // the same
};

/// The functions of one instruction set for one element type. Items are numbered; any thread may do
/// any of them.
struct TopkKernels {
  int64_t panel_lanes;
  int64_t (*scratch)(const TopkWork&);
  void (*item)(const TopkWork&, int64_t item, void* scratch);
  /// Merges the splits of rows [first, last).
  void (*merge)(const TopkWork&, int64_t first, int64_t last);
};

/// Of the instruction set that kernels() chooses.
const TopkKernels& topk_kernels(Type type);
/// Null where the processor or the build lacks the set.
const TopkKernels* topk_kernels_of(const char* isa, Type type);

namespace detail {
const TopkKernels& topk_default(Type type);
const TopkKernels& topk_avx2(Type type);
const TopkKernels& topk_avx512(Type type);
const TopkKernels& topk_avx512_bf16(Type type);
}  // namespace detail

}  // namespace mixhead::cpu
