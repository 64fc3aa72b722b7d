#pragma once

#include "cpu/kernel.h"
#include "cpu/smoother.h"

/// Kernel regression on the engine: the smoother of smoother.h over one source of keys with any
/// kernel function. Halves are widened to float32 as they are read, so there is one set of
/// functions for float32 and one for float64.
///
/// A query unit is a query head of one batch entry, or of all of them where the keys are shared; a
/// key unit the same of a key head.
namespace mixhead::cpu {

constexpr int64_t kRegressionPanels = 8;  // of rows, at most, that share a block of keys

struct Regression {
  Problem problem;                // source[0] the keys; source[1], mix and scale unused
  const Kernel* kernel;           // of each query head
  const void* inverse_bandwidth;  // (query heads, channels)
  const double* precision;        // (query heads), 1 / h^2 of the first channel
  void* centre;                   // (key units, channels): what summarise finds
  void* boxes;  // (key units, blocks of keys, 2, channels) where a kernel is compact, else null
  int64_t box_keys;
  bool normalize, exclude_self, nan_where_empty;
};

struct RegressionForward {
  Regression regression;
  int64_t units, unit_rows;  // of queries
  int64_t row_block, row_blocks, key_split, key_splits;
  int64_t block_keys, panels;  // keys of a block; panels of rows that share it
  void* part;                  // (splits, all rows, value channels), normalised; null for one split
  void* part_mass;             // (splits, all rows), logarithms
  void* output;                // contiguous (batch, heads, rows, value channels)
  void* log_mass;              // contiguous (batch, heads, rows)
  // Blocks of keys past panels of rows that were read, and that lay outside the support; or null.
  int64_t *blocks_read, *blocks_skipped;
};

struct RegressionBackward {
  Regression regression;
  View grad_output;              // (batch, head, row, channel)
  View grad_log_mass, log_mass;  // (batch, head, row), accumulation dtype
  View output;                   // as grad_output
  const int64_t* nearest;  // (batch, heads, rows) the key that an empty row takes, -1 for none
  Chunk chunk;
  int64_t first_unit, units;  // key units of this wave
  int64_t unit_rows;          // of a query unit, within the chunk
  int64_t key_split, key_splits, block_keys, group_keys;
  bool first_chunk, last_chunk;
  /// Of each of the wave's query units (key unit, group): (units * groups, splits, panels,
  /// channels + 1, panel lanes); null where no query gradient is wanted.
  void* part;
  /// Accumulators between chunks, (key units of the wave, keys, channels); null for one chunk.
  void *key_store, *value_store;
  bool store_is_output;  // the stores are the results, of all key units
  // Contiguous results, null where not wanted.
  void *grad_query, *grad_key, *grad_value;
  double* grad_bandwidth;  // (units * splits, groups, channels), added to
};

/// The gradient of an additive mask that may broadcast: each item owns a part of it and visits all
/// that it reaches. Fields as in MaskGradientWork.
struct RegressionMask {
  RegressionBackward backward;  // what is read
  View gradient;
  const int64_t* batches;
  const int64_t* first_batch;
  int64_t batch_groups, head_groups, row_groups, key_groups;
};

struct NearestWork {
  Regression regression;
  const void* log_mass;  // contiguous (batch, heads, rows)
  int64_t* nearest;      // where the mass is 0, the nearest readable key, -1 for none; else -1
  void* output;          // takes that key's value; contiguous (batch, heads, rows, value channels)
};

struct LocalMoments;
struct LocalGradient;

/// The functions of one instruction set for one accumulation dtype. Items are numbered; any thread
/// may do any of them.
struct RegressionKernels {
  int64_t accumulator_bytes, lanes, panel_lanes;
  int64_t (*summarise_scratch)(const Regression&);
  /// The centre and the boxes of a key unit.
  void (*summarise)(const Regression&, int64_t key_unit, void* scratch);
  int64_t (*forward_scratch)(const RegressionForward&);
  void (*forward_item)(const RegressionForward&, int64_t item, void* scratch);
  /// Merges the splits of rows [first, last), numbered over all rows.
  void (*merge)(const RegressionForward&, int64_t first, int64_t last);
  int64_t (*nearest_scratch)(const NearestWork&);
  /// Panel `item` of the query units' panels.
  void (*nearest_item)(const NearestWork&, int64_t item, void* scratch);
  int64_t (*backward_scratch)(const RegressionBackward&);
  void (*backward_item)(const RegressionBackward&, int64_t item, void* scratch);
  /// Query gradients of rows [first, last) of the wave, numbered (query unit, row).
  void (*reduce)(const RegressionBackward&, int64_t first, int64_t last, void* scratch);
  int64_t (*mask_items)(const RegressionMask&);
  void (*mask_item)(const RegressionMask&, int64_t item, void* scratch);
  int64_t (*local_moments_scratch)(const LocalMoments&);
  void (*local_moments_item)(const LocalMoments&, int64_t item, void* scratch);
  int64_t (*local_gradient_scratch)(const LocalGradient&);
  void (*local_gradient_item)(const LocalGradient&, int64_t item, void* scratch);
};

/// Of the instruction set that kernels() chooses; `type` is float32 or float64.
const RegressionKernels& regression_kernels(Type type);
/// Null where the processor or the build lacks the set.
const RegressionKernels* regression_kernels_of(const char* isa, Type type);

namespace detail {
const RegressionKernels& regression_default(Type type);
const RegressionKernels& regression_avx2(Type type);
const RegressionKernels& regression_avx512(Type type);
}  // namespace detail

}  // namespace mixhead::cpu
