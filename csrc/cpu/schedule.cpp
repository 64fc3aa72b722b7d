#include "cpu/schedule.h"

#include <unistd.h>

#include <algorithm>

namespace mixhead::cpu {
namespace {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Items for each thread: enough that the last to finish is not far behind.
constexpr int64_t kItemsPerThread = 4;
/// Multiply-adds below which a second thread costs more than it brings.
constexpr int64_t kSerialWork = int64_t{1} << 20;
/// Rows that a chunk keeps when it is cut for the cache: keys are read once for each chunk.
constexpr int64_t kChunkRows = 4096;
/// Keys of a row above which its arithmetic hides what its partial gradients cost to move. Chunks
/// of a causal sequence leave the items of later keys idle, which is worth it below only.
constexpr int64_t kFewKeys = 1024;

int64_t heads(const Problem& p) { return p.key_heads * p.groups; }

int64_t multiply_adds(const Problem& p) {
  const int64_t each = p.batch * heads(p) * p.rows * (p.channels + p.value_channels);
  return each * (p.source[0].keys + p.source[1].keys);
}

int64_t cache_bytes(int name, int64_t otherwise) {
  const auto bytes = sysconf(name);
  return bytes > 0 ? bytes : otherwise;
}

int64_t units(const Problem& p, const Source& source) {
  if (source.indexed) return p.batch * heads(p);
  return source.shared ? p.key_heads : p.key_heads * p.batch;
}

int64_t unit_rows(const Problem& p, const Source& source, int64_t chunk_rows) {
  if (source.indexed) return chunk_rows;
  return chunk_rows * p.groups * (source.shared ? p.batch : 1);
}

/// Row blocks of whole panels, then key splits until there are items for every thread.
SourceWork split_source(
    const Problem& p, const Source& source, const Tiles& tiles, const Kernels& kernels,
    int64_t chunk_rows, int64_t threads) {
  SourceWork work{};
  work.units = units(p, source);
  work.unit_rows = unit_rows(p, source, chunk_rows);
  work.few_rows = !source.indexed && work.unit_rows <= kernels.few_rows;
  const int64_t wanted = threads > 1 ? threads * kItemsPerThread : 1;
  const int64_t rows = std::max<int64_t>(work.unit_rows, 1);
  const int64_t panels = divide_up(rows, kernels.panel_lanes);
  const int64_t block_panels = std::clamp<int64_t>(work.units * panels / wanted, 1, tiles.panels);
  work.row_block = std::min(rows, block_panels * kernels.panel_lanes);
  if (source.indexed) {
    work.row_block = std::clamp<int64_t>(divide_up(work.units * rows, wanted * 4), 1, rows);
  }
  work.row_blocks = divide_up(rows, work.row_block);
  work.key_splits = 1;
  const int64_t items = work.units * work.row_blocks;
  if (items < wanted && !source.indexed && threads > 1) {
    const int64_t least = std::max<int64_t>(4 * tiles.keys, 512);
    work.key_splits = std::clamp<int64_t>(
        divide_up(wanted, std::max<int64_t>(items, 1)), 1,
        std::max<int64_t>(source.keys / least, 1));
  }
  work.key_split = divide_up(std::max<int64_t>(source.keys, 1), work.key_splits);
  work.key_split = divide_up(work.key_split, tiles.keys) * tiles.keys;
  work.key_splits = std::max<int64_t>(divide_up(source.keys, work.key_split), 1);
  return work;
}

}  // namespace

const Caches& caches() {
  static const Caches found{
      cache_bytes(_SC_LEVEL1_DCACHE_SIZE, 32 << 10), cache_bytes(_SC_LEVEL2_CACHE_SIZE, 512 << 10)};
  return found;
}

/// A block's weights take `weight_bytes`, about what the first cache holds; the block and the next
/// one a quarter of the second, the panels of queries and outputs that meet it another.
static Tiles choose_tiles(
    const Problem& p, const Kernels& kernels, int64_t most_rows, int64_t weight_bytes) {
  const int64_t lanes = std::min(
      kernels.panel_lanes,
      divide_up(std::max<int64_t>(most_rows, 1), kernels.lanes) * kernels.lanes);
  const int64_t lane_bytes = lanes * kernels.accumulator_bytes;
  const int64_t key_bytes = (p.channels + p.value_channels) * kernels.accumulator_bytes;
  const int64_t most = std::min(weight_bytes / lane_bytes, caches().second / 8 / key_bytes);
  Tiles tiles{};
  tiles.keys = std::clamp<int64_t>(most / 24 * 24, 24, 384);
  const int64_t most_keys = std::max(p.source[0].keys, p.source[1].keys);
  tiles.keys = std::min(tiles.keys, std::max<int64_t>(divide_up(most_keys, 2) * 2, 2));
  const int64_t panel_bytes = (p.channels + p.value_channels) * lane_bytes;
  tiles.panels = std::clamp<int64_t>(caches().second / 4 / panel_bytes, 1, 8);
  return tiles;
}

/// Bytes of partial results that stay in a third cache until they are merged, beside the rows that
/// are read and written. Its size is not asked for: virtual machines name that of many cores.
static int64_t cached_parts() { return 4 * caches().second; }

ForwardSchedule schedule_forward(const Problem& p, const Kernels& kernels, int64_t threads) {
  ForwardSchedule schedule{};
  const auto rows_of = [&](int s) { return unit_rows(p, p.source[s], p.rows); };
  schedule.tiles =
      choose_tiles(p, kernels, std::max(rows_of(0), rows_of(1)), caches().first * 3 / 4);
  schedule.parallel = threads > 1 && multiply_adds(p) > kSerialWork;
  // A row's partial results, with as many splits as one row could get.
  const int64_t row_bytes =
      p.batch * heads(p) * (p.value_channels + 1) * kernels.accumulator_bytes * 2;
  const int64_t cached = std::max(cached_parts() / row_bytes, kChunkRows);
  schedule.chunk_rows = std::clamp<int64_t>(
      std::min(kScratchBudget / 2 / row_bytes, cached), 1, std::max<int64_t>(p.rows, 1));
  return schedule;
}

int64_t split_forward(
    const ForwardSchedule& schedule, const Kernels& kernels, int64_t threads, ForwardWork& work) {
  work.tiles = schedule.tiles;
  int64_t items = 0;
  for (int s = 0; s < 2; ++s) {
    const auto& source = work.problem.source[s];
    work.source[s] = split_source(
        work.problem, source, work.tiles, kernels, work.chunk.rows,
        schedule.parallel ? threads : 1);
    work.source[s].first_item = items;
    items += work.source[s].units * work.source[s].row_blocks * work.source[s].key_splits;
  }
  return items;
}

namespace {

int64_t wave_units(const Problem& p, const Source& source, int64_t wave_heads) {
  return wave_heads * (source.shared ? 1 : p.batch);
}

/// Pairs of query and key that a source has, halved where causal.
double pairs(const Problem& p, const Source& source) {
  const double all =
      static_cast<double>(p.batch * heads(p) * p.rows) * static_cast<double>(source.keys);
  return source.causal ? all / 2 : all;
}

/// Key splits of a source that reads `keys` keys, in proportion to its share of the work.
SourceWork split_backward_source(
    const Problem& p, int side, const Tiles& tiles, const Kernels& kernels, int64_t wave_heads,
    int64_t chunk_rows, int64_t threads) {
  const auto& source = p.source[side];
  SourceWork work{};
  work.units = wave_units(p, source, wave_heads);
  work.unit_rows = unit_rows(p, source, chunk_rows);
  if (source.indexed) {
    work.row_block = std::clamp<int64_t>(chunk_rows / 8, 1, 64);
    work.row_blocks = divide_up(chunk_rows, work.row_block);
    const int64_t slot_bytes = (p.channels + p.value_channels) * kernels.accumulator_bytes;
    work.key_split = std::clamp<int64_t>((int64_t{4} << 20) / slot_bytes, 1, source.slots);
    work.key_splits = divide_up(source.slots, work.key_split);
    return work;
  }
  const double share =
      pairs(p, source) / std::max(pairs(p, p.source[0]) + pairs(p, p.source[1]), 1.0);
  const double wanted = threads > 1 ? static_cast<double>(threads * kItemsPerThread) * share : 1.0;
  const int64_t splits =
      static_cast<int64_t>(wanted / static_cast<double>(std::max<int64_t>(work.units, 1)) + 0.999);
  work.key_splits =
      std::clamp<int64_t>(splits, 1, std::max<int64_t>(source.keys / (2 * tiles.keys), 1));
  work.key_split = divide_up(std::max<int64_t>(source.keys, 1), work.key_splits);
  work.key_split = divide_up(work.key_split, tiles.keys) * tiles.keys;
  work.key_splits = std::max<int64_t>(divide_up(source.keys, work.key_split), 1);
  return work;
}

int64_t part_bytes_of(
    const Problem& p, const Source& source, const SourceWork& work, const Kernels& kernels,
    int64_t chunk_rows) {
  const int64_t row_bytes = (p.channels + 1) * kernels.accumulator_bytes;
  if (source.indexed) return p.batch * heads(p) * chunk_rows * row_bytes;
  if (source.keys == 0) return 0;
  const int64_t panels = divide_up(work.unit_rows, kernels.panel_lanes);
  return work.units * work.key_splits * panels * kernels.panel_lanes * row_bytes;
}

int64_t parts(
    const Problem& p, const Tiles& tiles, const Kernels& kernels, int64_t wave_heads,
    int64_t chunk_rows, int64_t threads) {
  int64_t bytes = 0;
  for (int s = 0; s < 2; ++s) {
    const auto work = split_backward_source(p, s, tiles, kernels, wave_heads, chunk_rows, threads);
    bytes += part_bytes_of(p, p.source[s], work, kernels, chunk_rows);
  }
  return bytes;
}

}  // namespace

BackwardSchedule schedule_backward(const Problem& p, const Kernels& kernels, int64_t threads) {
  BackwardSchedule schedule{};
  auto& tiles = schedule.tiles;
  tiles = choose_tiles(p, kernels, kernels.panel_lanes, caches().first / 2);
  const int64_t key_bytes = (p.channels + p.value_channels) * kernels.accumulator_bytes;
  tiles.group =
      std::clamp<int64_t>(caches().second * 3 / 8 / key_bytes / tiles.keys, 1, 16) * tiles.keys;
  schedule.parallel = threads > 1 && 3 * multiply_adds(p) > kSerialWork;
  if (!schedule.parallel) threads = 1;

  const int64_t budget = kScratchBudget * 2 / 3;
  int64_t &wave = schedule.wave_heads, &chunk = schedule.chunk_rows;
  wave = p.key_heads;
  chunk = std::max<int64_t>(p.rows, 1);
  const auto fit = [&](int64_t bytes) {
    return parts(p, tiles, kernels, wave, chunk, threads) <= bytes;
  };
  const auto halve_chunk = [&] {
    chunk = divide_up(divide_up(chunk, 2), kernels.panel_lanes) * kernels.panel_lanes;
  };
  while (!fit(budget) && wave > 1) wave = divide_up(wave, 2);
  while (!fit(budget) && chunk > kernels.panel_lanes) halve_chunk();
  const bool few_keys = p.source[0].keys + p.source[1].keys <= kFewKeys;
  while (few_keys && !fit(cached_parts()) && chunk >= 2 * kChunkRows) halve_chunk();
  int64_t stores = 0;
  for (const auto& source : p.source) {
    stores += wave_units(p, source, wave) * source.slots * key_bytes;
  }
  const bool results_store = p.type == Type::float32 || p.type == Type::float64;
  schedule.together = chunk >= p.rows || results_store || stores <= kScratchBudget - budget;
  return schedule;
}

int64_t split_backward(
    const BackwardSchedule& schedule, const Kernels& kernels, int64_t threads, BackwardWork& work) {
  const auto& p = work.problem;
  work.tiles = schedule.tiles;
  int64_t items = 0;
  for (int s = 0; s < 2; ++s) {
    auto& split = work.source[s];
    split = split_backward_source(
        p, s, work.tiles, kernels, work.heads, work.chunk.rows, schedule.parallel ? threads : 1);
    split.first_item = items;
    const bool keys_wanted = work.key_gradients && (work.grad_key[s] || work.grad_value[s]);
    if (p.source[s].slots == 0 || !(keys_wanted || work.query_gradients)) continue;
    if (p.source[s].indexed) {
      if (work.query_gradients) items += p.batch * work.heads * p.groups * split.row_blocks;
      if (keys_wanted) items += split.units * split.key_splits;
    } else {
      items += split.units * split.key_splits;
    }
  }
  return items;
}

int64_t part_bytes(const Kernels& kernels, const BackwardWork& work, int side) {
  return part_bytes_of(
      work.problem, work.problem.source[side], work.source[side], kernels, work.chunk.rows);
}

}  // namespace mixhead::cpu
