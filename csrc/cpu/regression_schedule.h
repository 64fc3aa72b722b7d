#pragma once

#include "cpu/regression.h"

/// How kernel regression is cut into items. Everything depends on sizes and the number of threads
/// alone, so that results do.
namespace mixhead::cpu {

/// Keys of a block.
int64_t regression_block(const RegressionKernels& kernels);

int64_t key_units(const Problem& problem);

struct RegressionItems {
  int64_t count;
  bool parallel;  // worth more than one thread
};

/// Cuts the forward: fills units, rows, splits and tiles.
RegressionItems split_regression(
    const RegressionKernels& kernels, int64_t threads, RegressionForward& work);

/// Cuts `rows` rows into blocks whose moments and their gradients (local_moments.h) stay in the
/// second cache; the keys are not split.
void split_local(
    const RegressionKernels& kernels, int64_t threads, int64_t rows, RegressionForward& work);

/// How the backward is cut: waves of key units and chunks of rows whose partial query gradients fit
/// the budget. Weights are recomputed once for all gradients, unless the keys' accumulators of a
/// wave would not fit between chunks: then once for the keys' and once for the queries'.
struct RegressionSchedule {
  int64_t block_keys, group_keys, wave_units, chunk_rows;
  bool parallel, together;
};
RegressionSchedule schedule_regression(
    const Problem& problem, const RegressionKernels& kernels, int64_t threads);

/// Cuts one wave's chunk: fills rows, splits and tiles. Returns the number of items.
int64_t split_regression_backward(
    const RegressionSchedule& schedule, int64_t threads, RegressionBackward& work);

/// Bytes of work.part.
int64_t regression_part_bytes(const RegressionKernels& kernels, const RegressionBackward& work);

}  // namespace mixhead::cpu
