#pragma once
// The forward of kernel regression: each item streams its keys past its panels of queries.
#include "cpu/forward-inl.h"
#include "cpu/points-inl.h"

namespace mixhead::cpu {
namespace {

template <class Acc>
struct RegressionPanel {
  QueryPanel<Acc> queries;
  Acc* output;   // [value channels][lanes], relative to exp(highest)
  Acc* highest;  // running maximum of the exponents; 0 where the sums are plain
  Acc* sum;
  bool settled;  // every row's maximum is so high that it need not rise any more
};

template <class Acc>
struct RegressionScratch {
  RegressionPanel<Acc> panels[kRegressionPanels];
  PlacedKeys<Acc> keys;
  Acc *values, *scores, *bias, *row;

  RegressionScratch(const RegressionForward& work, Arena& arena) {
    constexpr int64_t lanes = kPanelLanes<Acc>;
    const auto& p = work.regression.problem;
    for (int64_t i = 0; i < panels_for<Acc>(work.row_block); ++i) {
      panels[i].queries.take(p, arena);
      panels[i].output = arena.take<Acc>(p.value_channels * lanes);
      panels[i].highest = arena.take<Acc>(lanes);
      panels[i].sum = arena.take<Acc>(lanes);
    }
    keys.take(p, work.block_keys, arena);
    values = arena.take<Acc>(work.block_keys * p.value_channels);
    scores = arena.take<Acc>(work.block_keys * lanes);
    bias = arena.take<Acc>(work.block_keys * lanes);
    row = arena.take<Acc>(larger(p.channels, p.value_channels));
  }
};

template <class Acc>
void start_sums(const Problem& p, const KernelLoops<Acc>& loops, RegressionPanel<Acc>& panel) {
  for (int64_t j = 0; j < p.value_channels * kPanelLanes<Acc>; ++j) panel.output[j] = 0;
  for (int64_t j = 0; j < kPanelLanes<Acc>; ++j) {
    panel.highest[j] = loops.running ? -kInfinity<Acc> : Acc{0};
    panel.sum[j] = 0;
  }
  panel.settled = false;
}

/// A block of keys past one panel.
template <class Acc, int vectors>
void regress_block(
    const RegressionForward& work, const Points<Acc>& points, const KernelLoops<Acc>& loops,
    RegressionPanel<Acc>& panel, const Acc* bias, int64_t first, int64_t keys,
    RegressionScratch<Acc>& scratch) {
  using V = Vector<Acc>;
  constexpr int lanes = kLanes<Acc>;
  constexpr int64_t width = vectors * lanes, size = sizeof(Acc);
  const auto& p = work.regression.problem;
  similarities<Acc, vectors>(points, panel.queries, scratch.keys, keys, scratch.scores);
  const PairBlock<Acc> block{&panel.queries.rows, &p.dropout, first, keys, width, bias,
                             scratch.scores};
  alignas(64) Acc alpha[width];
  const bool raise = loops.running && !panel.settled;
  if (raise) {
    for (int j = 0; j < width; j += lanes) store(alpha + j, load<Acc>(panel.highest + j));
    loops.find_highest(block, panel.highest);
    for (int j = 0; j < width; j += lanes) {
      const V top = load<Acc>(panel.highest + j);
      const V rescale = exp<Acc>(load<Acc>(alpha + j) - (top == -kInfinity<Acc> ? V{} : top));
      store(alpha + j, rescale);
      store(panel.sum + j, load<Acc>(panel.sum + j) * rescale);
    }
  }
  (panel.settled ? loops.weigh_settled : loops.weigh)(block, panel.highest, panel.sum);
  gemm<Plain<Acc>, vectors>(
      p.value_channels, keys, scratch.values, {size, p.value_channels * size}, scratch.scores,
      width, panel.output, width, raise ? Update::rescale : Update::add, alpha);
  if (!raise || !loops.settles) return;
  panel.settled = true;
  for (int lane = 0; lane < panel.queries.rows.count; ++lane) {
    panel.settled &= panel.highest[lane] > kSettled<Acc>;
  }
}

/// Streams keys [begin, end) past the scratch's panels, all of one query unit.
template <class Acc>
void regress(
    const RegressionForward& work, const Points<Acc>& points, const KernelLoops<Acc>& loops,
    int64_t query_unit, int64_t begin, int64_t end, int64_t panels,
    RegressionScratch<Acc>& scratch) {
  const auto& r = work.regression;
  const int64_t key_unit = key_unit_of(r.problem, query_unit);
  const auto head = key_head(r.problem, r.problem.source[0], key_unit);
  int64_t read = 0, skipped = 0;  // blocks past panels
  for (int64_t first = begin; first < end; first += work.block_keys) {
    const int64_t keys = smaller(work.block_keys, end - first);
    bool placed = false;
    for (int64_t i = 0; i < panels; ++i) {
      auto& panel = scratch.panels[i];
      if (loops.compact && apart(points, panel.queries.box, key_box<Acc>(r, key_unit, first))) {
        ++skipped;
        continue;
      }
      const auto bias = pair_bias(r, panel.queries, first, keys, scratch.bias);
      if (bias.nothing_readable) continue;
      ++read;
      if (!placed) {
        place_keys(points, r, head, first, keys, scratch.keys);
        read_values(r, head, first, keys, scratch.values);
        placed = true;
      }
      with_vectors(panel.queries.rows.vectors(), [&]<int vectors>() {
        regress_block<Acc, vectors>(work, points, loops, panel, bias.values, first, keys, scratch);
      });
    }
  }
  if (!work.blocks_read) return;
  __atomic_fetch_add(work.blocks_read, read, __ATOMIC_RELAXED);
  __atomic_fetch_add(work.blocks_skipped, skipped, __ATOMIC_RELAXED);
}

/// A finished row's weighted mean as the operator returns it.
template <class Acc>
void write_result(const RegressionForward& work, const Position& at_row, Acc* row, Acc mass) {
  const auto& r = work.regression;
  const auto& p = r.problem;
  const int64_t place = global_row(p, at_row);
  static_cast<Acc*>(work.log_mass)[place] = mass;
  const bool is_empty = mass == -kInfinity<Acc>;
  const Acc factor = r.normalize ? Acc{1} : exp_of(mass);
  for (int64_t c = 0; c < p.value_channels; ++c) {
    row[c] = is_empty ? Acc{0} : row[c] * factor;
    if (is_empty && r.normalize && r.nan_where_empty) row[c] = kNan<Acc>;
  }
  write_row(p.type, row, p.value_channels, work.output, place * p.value_channels);
}

template <class Acc>
void finish_regression(
    const RegressionForward& work, int64_t split, const RegressionPanel<Acc>& panel, Acc* row) {
  const auto& p = work.regression.problem;
  const auto& rows = panel.queries.rows;
  const int64_t all = p.batch * p.key_heads * p.groups * p.rows;
  for (int lane = 0; lane < rows.count; ++lane) {
    const Acc sum = panel.sum[lane];
    const Acc inverse = sum == 0 ? Acc{0} : 1 / sum;
    const Acc mass = sum == 0 ? -kInfinity<Acc> : panel.highest[lane] + log(sum);
    for (int64_t c = 0; c < p.value_channels; ++c) {
      row[c] = panel.output[c * rows.lanes + lane] * inverse;
    }
    if (work.key_splits == 1) {
      write_result(work, rows.position[lane], row, mass);
      continue;
    }
    const int64_t place = split * all + global_row(p, rows.position[lane]);
    auto* part = static_cast<Acc*>(work.part) + place * p.value_channels;
    for (int64_t c = 0; c < p.value_channels; ++c) part[c] = row[c];
    static_cast<Acc*>(work.part_mass)[place] = mass;
  }
}

/// Items are (query unit, block of rows, split of the keys), the last fastest.
template <class Acc>
void regression_forward(const RegressionForward& work, int64_t number, void* memory) {
  const auto& r = work.regression;
  const auto& p = r.problem;
  Arena arena{static_cast<char*>(memory)};
  RegressionScratch<Acc> scratch(work, arena);
  const int64_t split = number % work.key_splits, rest = number / work.key_splits;
  const int64_t query_unit = rest / work.row_blocks;
  const int64_t first_row = rest % work.row_blocks * work.row_block;
  const int64_t count = smaller(work.row_block, work.unit_rows - first_row);
  const int64_t head = query_unit % (p.key_heads * p.groups);
  const auto points = points_of<Acc>(r, head, key_unit_of(p, query_unit));
  const auto loops = loops_of<Acc>(r.kernel[head], p.source[0].mask.kind == MaskKind::additive);
  const int64_t panels = panels_for<Acc>(count);
  for (int64_t i = 0; i < panels; ++i) {
    const auto range = panel_rows<Acc>(count, panels, i);
    auto& panel = scratch.panels[i];
    const auto position_of = [&](int64_t lane) {
      return query_position(p, {0, p.rows}, query_unit, first_row + range.first + lane);
    };
    place_queries(points, r, range.count, position_of, panel.queries, [](int, const Acc*) {});
    start_sums(p, loops, panel);
  }
  const int64_t begin = split * work.key_split;
  const int64_t end = smaller(p.source[0].keys, begin + work.key_split);
  regress(work, points, loops, query_unit, begin, end, panels, scratch);
  for (int64_t i = 0; i < panels; ++i) {
    finish_regression(work, split, scratch.panels[i], scratch.row);
  }
}

template <class Acc>
int64_t regression_forward_scratch(const RegressionForward& work) {
  Arena arena{nullptr};
  RegressionScratch<Acc> measure(work, arena);
  return reinterpret_cast<intptr_t>(arena.next);
}

template <class Acc>
void regression_merge(const RegressionForward& work, int64_t first, int64_t last) {
  const auto& p = work.regression.problem;
  const int64_t heads = p.key_heads * p.groups, all = p.batch * heads * p.rows;
  for (int64_t row = first; row < last; ++row) {
    auto* output = static_cast<Acc*>(work.part) + row * p.value_channels;
    const Acc mass = merge_splits(
        output, static_cast<Acc*>(work.part_mass) + row, work.key_splits, all, p.value_channels);
    const int64_t outer = row / p.rows;
    write_result(work, {outer / heads, outer % heads, row % p.rows}, output, mass);
  }
}

}  // namespace
}  // namespace mixhead::cpu
