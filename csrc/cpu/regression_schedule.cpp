#include "cpu/regression_schedule.h"

#include <algorithm>

#include "cpu/schedule.h"

namespace mixhead::cpu {
namespace {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kItemsPerThread = 4;
/// Multiply-adds below which a second thread costs more than it brings.
constexpr int64_t kSerialWork = int64_t{1} << 19;

/// Multiply-adds, the kernel function counted as 16.
int64_t work_of(const Problem& p) {
  const int64_t pairs = p.batch * p.key_heads * p.groups * p.rows * p.source[0].keys;
  return pairs * (p.channels + p.value_channels + 16);
}

int64_t part_bytes(
    const Problem& p, const RegressionKernels& kernels, int64_t units, int64_t unit_rows,
    int64_t splits) {
  const int64_t panels = divide_up(unit_rows, kernels.panel_lanes);
  return units * p.groups * splits * panels * kernels.panel_lanes * (p.channels + 1) *
         kernels.accumulator_bytes;
}

int64_t rows_of_unit(const Problem& p, int64_t chunk_rows) {
  return chunk_rows * (p.source[0].shared ? p.batch : 1);
}

int64_t backward_splits(const Problem& p, int64_t units, int64_t block_keys, int64_t threads) {
  const int64_t wanted = threads > 1 ? divide_up(threads * kItemsPerThread, units) : 1;
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(p.source[0].keys / (2 * block_keys), 1));
}

}  // namespace

int64_t regression_block(const RegressionKernels& kernels) {
  const int64_t key_bytes = kernels.panel_lanes * kernels.accumulator_bytes;
  return std::clamp<int64_t>(caches().first / 2 / key_bytes / 24 * 24, 24, 384);
}

int64_t key_units(const Problem& p) { return p.key_heads * (p.source[0].shared ? 1 : p.batch); }

RegressionItems split_regression(
    const RegressionKernels& kernels, int64_t threads, RegressionForward& work) {
  const auto& p = work.regression.problem;
  const int64_t keys = p.source[0].keys, lanes = kernels.panel_lanes;
  const bool parallel = threads > 1 && work_of(p) > kSerialWork;
  const int64_t wanted = parallel ? threads * kItemsPerThread : 1;
  work.block_keys = regression_block(kernels);
  work.units = key_units(p) * p.groups;
  work.unit_rows = rows_of_unit(p, p.rows);
  const int64_t panels = divide_up(work.unit_rows, lanes);
  // Panels that share a block of keys: their queries and outputs stay in the second cache.
  const int64_t panel_bytes = lanes * (p.channels + p.value_channels) * kernels.accumulator_bytes;
  const int64_t fitting =
      std::clamp<int64_t>(caches().second / 4 / panel_bytes, 1, kRegressionPanels);
  work.panels = std::clamp<int64_t>(work.units * panels / wanted, 1, fitting);
  work.row_block = std::min(work.unit_rows, work.panels * lanes);
  work.row_blocks = divide_up(work.unit_rows, work.row_block);
  const int64_t items = work.units * work.row_blocks;
  const int64_t split_bytes =
      work.units * work.unit_rows * (p.value_channels + 1) * kernels.accumulator_bytes;
  const int64_t most =
      std::max<int64_t>(std::min(keys / (4 * work.block_keys), kScratchBudget / split_bytes), 1);
  work.key_splits = items < wanted ? std::clamp<int64_t>(divide_up(wanted, items), 1, most) : 1;
  work.key_split = divide_up(std::max<int64_t>(keys, 1), work.key_splits);
  work.key_split = divide_up(work.key_split, work.block_keys) * work.block_keys;
  work.key_splits = std::max<int64_t>(divide_up(keys, work.key_split), 1);
  return {items * work.key_splits, parallel};
}

void split_local(
    const RegressionKernels& kernels, int64_t threads, int64_t rows, RegressionForward& work) {
  const auto& p = work.regression.problem;
  const int64_t lanes = kernels.panel_lanes;
  work.block_keys = regression_block(kernels);
  work.units = key_units(p) * p.groups;
  work.unit_rows = rows_of_unit(p, rows);
  work.key_split = p.source[0].keys;
  work.key_splits = 1;
  const int64_t panel_bytes =
      lanes * p.value_channels * (p.channels + 4) * kernels.accumulator_bytes;
  const int64_t fitting =
      std::clamp<int64_t>(caches().second / 4 / panel_bytes, 1, kRegressionPanels);
  const int64_t wanted = threads > 1 ? threads * kItemsPerThread : 1;
  work.panels =
      std::clamp<int64_t>(work.units * divide_up(work.unit_rows, lanes) / wanted, 1, fitting);
  work.row_block = std::min(work.unit_rows, work.panels * lanes);
  work.row_blocks = divide_up(work.unit_rows, work.row_block);
}

RegressionSchedule schedule_regression(
    const Problem& p, const RegressionKernels& kernels, int64_t threads) {
  RegressionSchedule schedule{};
  schedule.block_keys = regression_block(kernels);
  // A group's keys, values and both their gradients stay in the second cache.
  const int64_t key_bytes =
      (2 * (p.channels + p.value_channels) + 4 * kernels.lanes) * kernels.accumulator_bytes;
  schedule.group_keys =
      std::clamp<int64_t>(caches().second / 2 / key_bytes / schedule.block_keys, 1, 32) *
      schedule.block_keys;
  schedule.parallel = threads > 1 && 3 * work_of(p) > kSerialWork;
  if (!schedule.parallel) threads = 1;

  const int64_t budget = kScratchBudget * 2 / 3;
  int64_t &wave = schedule.wave_units, &chunk = schedule.chunk_rows;
  wave = key_units(p);
  chunk = p.rows;
  const auto fits = [&] {
    const int64_t splits = backward_splits(p, wave, schedule.block_keys, threads);
    return part_bytes(p, kernels, wave, rows_of_unit(p, chunk), splits) <= budget;
  };
  while (!fits() && wave > 1) wave = divide_up(wave, 2);
  const int64_t least = std::max<int64_t>(kernels.panel_lanes / rows_of_unit(p, 1), 1);
  while (!fits() && chunk > least) chunk = std::max(divide_up(chunk, 2), least);
  const bool results_store = p.type == Type::float32 || p.type == Type::float64;
  const int64_t stores =
      wave * p.source[0].keys * (p.channels + p.value_channels) * kernels.accumulator_bytes;
  schedule.together = chunk >= p.rows || results_store || stores <= kScratchBudget - budget;
  return schedule;
}

int64_t split_regression_backward(
    const RegressionSchedule& schedule, int64_t threads, RegressionBackward& work) {
  const auto& p = work.regression.problem;
  const int64_t keys = p.source[0].keys, block = schedule.block_keys;
  work.block_keys = block;
  work.group_keys = schedule.group_keys;
  work.unit_rows = rows_of_unit(p, work.chunk.rows);
  work.key_splits = backward_splits(p, work.units, block, schedule.parallel ? threads : 1);
  work.key_split = divide_up(std::max<int64_t>(keys, 1), work.key_splits);
  work.key_split = divide_up(work.key_split, block) * block;
  work.key_splits = std::max<int64_t>(divide_up(keys, work.key_split), 1);
  return work.units * work.key_splits;
}

int64_t regression_part_bytes(const RegressionKernels& kernels, const RegressionBackward& work) {
  return part_bytes(work.regression.problem, kernels, work.units, work.unit_rows, work.key_splits);
}

}  // namespace mixhead::cpu
