#pragma once
// The nearest readable key of each query whose kernel is 0 at every key.
#include "cpu/points-inl.h"

namespace mixhead::cpu {
namespace {

template <class Acc>
struct NearestScratch {
  static constexpr int64_t kKeys = 64;
  QueryPanel<Acc> queries;
  PlacedKeys<Acc> keys;
  Acc *squares, *bias, *row;

  NearestScratch(const Problem& p, Arena& arena) {
    queries.take(p, arena);
    keys.take(p, kKeys, arena);
    squares = arena.take<Acc>(kKeys * kPanelLanes<Acc>);
    bias = arena.take<Acc>(kKeys * kPanelLanes<Acc>);
    row = arena.take<Acc>(larger(p.channels, p.value_channels));
  }
};

template <class Acc>
int64_t nearest_scratch(const NearestWork& work) {
  Arena arena{nullptr};
  NearestScratch<Acc> measure(work.regression.problem, arena);
  return reinterpret_cast<intptr_t>(arena.next);
}

/// Takes over what is nearer than `best`, of keys first, first + 1, ...
template <class Acc>
void keep_nearest(
    const Acc* squares, const Acc* bias, int64_t first, int64_t keys, int64_t width, Acc* best,
    typename Bits<Acc>::Signed* nearest) {
  using Signed = typename Bits<Acc>::Signed;
  using V = Vector<Acc>;
  for (int64_t j = 0; j < width; j += kLanes<Acc>) {
    V smallest = load<Acc>(best + j);
    auto index = load<Signed>(nearest + j);
    for (int64_t k = 0; k < keys; ++k) {
      V square = load<Acc>(squares + k * width + j);
      if (bias) {
        const V add = load<Acc>(bias + k * width + j);
        square = add == -kInfinity<Acc> ? V{} + kInfinity<Acc> : square;
      }
      const auto nearer = square < smallest;
      smallest = nearer ? square : smallest;
      index = nearer ? broadcast<Signed>(static_cast<Signed>(first + k)) : index;
    }
    store(best + j, smallest);
    store(nearest + j, index);
  }
}

template <class Acc>
void take_value(
    const NearestWork& work, const KeyHead& head, int64_t key, int64_t row, Acc* value) {
  const auto& p = work.regression.problem;
  read_values(work.regression, head, key, 1, value);
  write_row(p.type, value, p.value_channels, work.output, row * p.value_channels);
}

template <class Acc>
void find_nearest(const NearestWork& work, int64_t item, void* memory) {
  const auto& r = work.regression;
  const auto& p = r.problem;
  const auto& source = p.source[0];
  const int64_t unit_rows = (source.shared ? p.batch : 1) * p.rows;
  const int64_t panels = panels_for<Acc>(unit_rows), query_unit = item / panels;
  const auto range = panel_rows<Acc>(unit_rows, panels, item % panels);
  const auto position_of = [&](int64_t lane) {
    return query_position(p, {0, p.rows}, query_unit, range.first + lane);
  };
  bool any_empty = false;
  for (int64_t lane = 0; lane < range.count; ++lane) {
    const int64_t row = global_row(p, position_of(lane));
    work.nearest[row] = -1;
    any_empty |= static_cast<const Acc*>(work.log_mass)[row] == -kInfinity<Acc>;
  }
  if (!any_empty) return;

  Arena arena{static_cast<char*>(memory)};
  NearestScratch<Acc> scratch(p, arena);
  const int64_t key_unit = key_unit_of(p, query_unit);
  const auto head = key_head(p, source, key_unit);
  auto points = points_of<Acc>(r, query_unit % (p.key_heads * p.groups), key_unit);
  points.form = Form::difference;
  auto& panel = scratch.queries;
  place_queries(points, r, range.count, position_of, panel, [](int, const Acc*) {});
  alignas(64) Acc best[kPanelLanes<Acc>];
  alignas(64) typename Bits<Acc>::Signed nearest[kPanelLanes<Acc>];
  for (int64_t lane = 0; lane < kPanelLanes<Acc>; ++lane) {
    best[lane] = kInfinity<Acc>;
    nearest[lane] = -1;
  }
  constexpr int64_t block = NearestScratch<Acc>::kKeys;
  for (int64_t first = 0; first < source.keys; first += block) {
    const int64_t keys = smaller(block, source.keys - first);
    const auto bias = pair_bias(r, panel, first, keys, scratch.bias);
    if (bias.nothing_readable) continue;
    place_keys(points, r, head, first, keys, scratch.keys);
    with_vectors(panel.rows.vectors(), [&]<int vectors>() {
      similarities<Acc, vectors>(points, panel, scratch.keys, keys, scratch.squares);
    });
    keep_nearest(scratch.squares, bias.values, first, keys, panel.rows.lanes, best, nearest);
  }
  for (int lane = 0; lane < panel.rows.count; ++lane) {
    const int64_t row = global_row(p, panel.rows.position[lane]);
    const bool is_empty = static_cast<const Acc*>(work.log_mass)[row] == -kInfinity<Acc>;
    if (!is_empty || nearest[lane] < 0) continue;
    work.nearest[row] = nearest[lane];
    if (work.output) take_value(work, head, nearest[lane], row, scratch.row);
  }
}

}  // namespace
}  // namespace mixhead::cpu
