#pragma once
// The moments of local-linear regression: of data x = (key, value) around each query under the
// weights A = K / mass,
//
//   m = sum_j A_j x_j,   C = sum_j A_j (k_j - m) (x_j - m)'
//
// in two passes over the keys. The first finds the mass and a pivot p, the mean but for rounding;
// the second sums about it, so that nothing is lost where a window is small against its distance
// from the origin or from the query:
//
//   w = sum A,  s = sum A (x - p),  S = sum A (k - p) (x - p)',  m = p + s / w,  C = S / w - s s' /
//   w^2
#include "cpu/local_moments.h"
#include "cpu/regression-forward-inl.h"

namespace mixhead::cpu {
namespace {

/// Points are subtracted however many channels they have: u^2 is little beside D^2 moments.
template <class Acc>
Points<Acc> local_points(const Regression& r, int64_t head, int64_t key_unit) {
  auto points = points_of<Acc>(r, head, key_unit);
  points.form = Form::difference;
  return points;
}

/// Calls f.operator()<n>(first) for the channels [begin, end) in tiles of at most four.
template <class F>
void for_tiles(int64_t begin, int64_t end, const F& f) {
  for (; begin < end; begin += 4) {
    switch (end - begin) {
      case 1:
        f.template operator()<1>(begin);
        break;
      case 2:
        f.template operator()<2>(begin);
        break;
      case 3:
        f.template operator()<3>(begin);
        break;
      default:
        f.template operator()<4>(begin);
    }
  }
}

/// A block of data past one panel of pivots, and the block's weights; [key][wide], [wide][lanes],
/// [key][lane].
template <class Acc>
struct CentredBlock {
  const Acc *rows, *pivot, *weights;
  int64_t keys, wide, width;

  Vector<Acc> centred(int64_t key, int64_t channel, Vector<Acc> own) const {
    return broadcast(rows[key * wide + channel]) - own;
  }
  Vector<Acc> own(int64_t channel, int64_t j) const {
    return load<Acc>(pivot + channel * width + j);
  }
};

/// sums[i][lane] += sum_k A (x - p)_(first + i); times (x - p)_factor where that is not negative.
template <class Acc, int count>
void add_moments(const CentredBlock<Acc>& block, int64_t factor, int64_t first, Acc* sums) {
  using V = Vector<Acc>;
  const int64_t width = block.width;
  for (int64_t j = 0; j < width; j += kLanes<Acc>) {
    V own[count], sum[count];
    const V of_factor = factor < 0 ? V{} : block.own(factor, j);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      own[i] = block.own(first + i, j);
      sum[i] = load<Acc>(sums + i * width + j);
    }
    for (int64_t k = 0; k < block.keys; ++k) {
      V weight = load<Acc>(block.weights + k * width + j);
      if (factor >= 0) weight *= block.centred(k, factor, of_factor);
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) sum[i] += weight * block.centred(k, first + i, own[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) store(sums + i * width + j, sum[i]);
  }
}

template <class Acc>
struct MomentPanel {
  Acc *pivot, *first, *second;  // [wide][lanes] twice, [channels][wide][lanes]: its upper triangle
  Acc *lse, *mass;              // mass: the weights' sum in the second pass
  Acc* relative;                // what the exponents of the second pass are relative to

  void take(const Problem& p, Arena& arena) {
    constexpr int64_t lanes = kPanelLanes<Acc>;
    pivot = arena.take<Acc>(p.value_channels * lanes);
    lse = arena.take<Acc>(lanes);
    mass = arena.take<Acc>(lanes);
    relative = arena.take<Acc>(lanes);
    first = arena.take<Acc>(p.value_channels * lanes);
    second = arena.take<Acc>(p.channels * p.value_channels * lanes);
  }

  /// From the first pass. Weights at most 1 do not overflow in squares; those of a kernel without
  /// an exponential are so relative to the first pass's maximum, and may not be above it.
  void start(const Problem& p, bool plain, const RegressionPanel<Acc>& found) {
    const int64_t width = found.queries.rows.lanes, wide = p.value_channels;
    for (int64_t lane = 0; lane < width; ++lane) {
      const Acc sum = found.sum[lane], inverse = sum == 0 ? Acc{0} : 1 / sum;
      lse[lane] = sum == 0 ? -kInfinity<Acc> : found.highest[lane] + log(sum);
      relative[lane] = plain ? found.highest[lane] : lse[lane];
      mass[lane] = 0;
      for (int64_t c = 0; c < wide; ++c) {
        pivot[c * width + lane] = found.output[c * width + lane] * inverse;
      }
    }
    for (int64_t i = 0; i < wide * width; ++i) first[i] = 0;
    for (int64_t i = 0; i < p.channels * wide * width; ++i) second[i] = 0;
  }
};

template <class Acc>
void write_moments(
    const LocalMoments& work, const RegressionPanel<Acc>& found, const MomentPanel<Acc>& panel) {
  const auto& p = work.forward.regression.problem;
  const auto& rows = found.queries.rows;
  const int64_t width = rows.lanes, channels = p.channels, wide = p.value_channels;
  for (int lane = 0; lane < rows.count; ++lane) {
    const int64_t row = chunk_row(p, work.chunk, rows.position[lane]);
    static_cast<Acc*>(work.log_mass)[row] = panel.lse[lane];
    const bool is_empty = panel.lse[lane] == -kInfinity<Acc>;
    // The weights add up to 1 but for the rounding of the mass's logarithm.
    const Acc inverse = is_empty ? Acc{0} : 1 / panel.mass[lane];
    const auto shift = [&](int64_t c) { return panel.first[c * width + lane] * inverse; };
    auto* mean = static_cast<Acc*>(work.mean) + row * wide;
    auto* second = static_cast<Acc*>(work.second) + row * channels * wide;
    for (int64_t c = 0; c < wide; ++c) {
      const Acc query = c < channels ? found.queries.query[c * width + lane] : Acc{0};
      mean[c] = is_empty ? Acc{0} : panel.pivot[c * width + lane] - query + shift(c);
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t e = c; e < wide; ++e) {
        const Acc product = panel.second[(c * wide + e) * width + lane] * inverse;
        second[c * wide + e] = is_empty ? Acc{0} : product - shift(c) * shift(e);
        if (e < channels) second[e * wide + c] = second[c * wide + e];
      }
    }
  }
}

template <class Acc>
struct MomentScratch {
  RegressionScratch<Acc> first_pass;
  MomentPanel<Acc> panels[kRegressionPanels];

  MomentScratch(const LocalMoments& work, Arena& arena) : first_pass(work.forward, arena) {
    for (int64_t i = 0; i < panels_for<Acc>(work.forward.row_block); ++i) {
      panels[i].take(work.forward.regression.problem, arena);
    }
  }
};

/// Places the rows of a block of a query unit; start(panel number) follows each. Returns the number
/// of panels.
template <class Acc, class PanelOf, class Start>
int64_t place_row_block(
    const RegressionForward& work, const Chunk& chunk, const Points<Acc>& points,
    int64_t query_unit, int64_t row_block, const PanelOf& panel_of, const Start& start) {
  const int64_t first_row = row_block * work.row_block;
  const int64_t count = smaller(work.row_block, work.unit_rows - first_row);
  const int64_t panels = panels_for<Acc>(count);
  for (int64_t i = 0; i < panels; ++i) {
    const auto range = panel_rows<Acc>(count, panels, i);
    const auto position_of = [&](int64_t lane) {
      return query_position(
          work.regression.problem, chunk, query_unit, first_row + range.first + lane);
    };
    place_queries(
        points, work.regression, range.count, position_of, panel_of(i), [](int, const Acc*) {});
    start(i);
  }
  return panels;
}

/// Calls visit(panel number, first key, keys, bias) for the blocks of keys that a panel may read;
/// they are placed in `keys`, their rows x in `rows`. finish(first key, keys) follows each that
/// was.
template <class Acc, class PanelOf, class Visit, class Finish>
void for_key_blocks(
    const RegressionForward& work, const Points<Acc>& points, bool compact, int64_t query_unit,
    int64_t panels, const PanelOf& panel_of, const PlacedKeys<Acc>& placed, Acc* rows, Acc* bias,
    const Visit& visit, const Finish& finish) {
  const auto& r = work.regression;
  const auto& source = r.problem.source[0];
  const int64_t key_unit = key_unit_of(r.problem, query_unit);
  const auto head = key_head(r.problem, source, key_unit);
  for (int64_t first = 0; first < source.keys; first += work.block_keys) {
    const int64_t keys = smaller(work.block_keys, source.keys - first);
    bool any = false;
    for (int64_t i = 0; i < panels; ++i) {
      const auto& panel = panel_of(i);
      if (compact && apart(points, panel.box, key_box<Acc>(r, key_unit, first))) continue;
      const auto allowed = pair_bias(r, panel, first, keys, bias);
      if (allowed.nothing_readable) continue;
      if (!any) {
        place_keys(points, r, head, first, keys, placed);
        read_values(r, head, first, keys, rows);
        any = true;
      }
      visit(i, first, keys, allowed.values);
    }
    if (any) finish(first, keys);
  }
}

template <class Acc>
void similarities_of(
    const Points<Acc>& points, const QueryPanel<Acc>& panel, const PlacedKeys<Acc>& keys,
    int64_t count, Acc* to) {
  with_vectors(panel.rows.vectors(), [&]<int vectors>() {
    similarities<Acc, vectors>(points, panel, keys, count, to);
  });
}

template <class Acc>
void local_moments(const LocalMoments& work, int64_t number, void* memory) {
  const auto& f = work.forward;
  const auto& r = f.regression;
  const auto& p = r.problem;
  Arena arena{static_cast<char*>(memory)};
  MomentScratch<Acc> scratch(work, arena);
  auto& pass = scratch.first_pass;
  const int64_t unit = number / f.row_blocks, head = unit % (p.key_heads * p.groups);
  const auto points = local_points<Acc>(r, head, key_unit_of(p, unit));
  const auto loops = loops_of<Acc>(r.kernel[head], p.source[0].mask.kind == MaskKind::additive);
  const auto panel_of = [&](int64_t i) -> QueryPanel<Acc>& { return pass.panels[i].queries; };
  const int64_t panels = place_row_block(
      f, work.chunk, points, unit, number % f.row_blocks, panel_of,
      [&](int64_t i) { start_sums(p, loops, pass.panels[i]); });
  regress(f, points, loops, unit, 0, p.source[0].keys, panels, pass);
  const auto weigh = loops.weigh_settled ? loops.weigh_settled : loops.weigh;
  for (int64_t i = 0; i < panels; ++i) {
    scratch.panels[i].start(p, weigh == loops.weigh, pass.panels[i]);
  }

  const int64_t channels = p.channels, wide = p.value_channels;
  const auto visit = [&](int64_t i, int64_t first, int64_t keys, const Acc* bias) {
    const auto& queries = pass.panels[i].queries;
    auto& panel = scratch.panels[i];
    const int64_t width = queries.rows.lanes;
    similarities_of(points, queries, pass.keys, keys, pass.scores);
    const PairBlock<Acc> pairs{&queries.rows, &p.dropout, first, keys, width, bias, pass.scores};
    weigh(pairs, panel.relative, panel.mass);
    const CentredBlock<Acc> block{pass.values, panel.pivot, pass.scores, keys, wide, width};
    for_tiles(0, wide, [&]<int count>(int64_t e) {
      add_moments<Acc, count>(block, -1, e, panel.first + e * width);
    });
    for (int64_t c = 0; c < channels; ++c) {
      for_tiles(c, wide, [&]<int count>(int64_t e) {
        add_moments<Acc, count>(block, c, e, panel.second + (c * wide + e) * width);
      });
    }
  };
  for_key_blocks(
      f, points, loops.compact, unit, panels, panel_of, pass.keys, pass.values, pass.bias, visit,
      [](int64_t, int64_t) {});
  for (int64_t i = 0; i < panels; ++i) write_moments(work, pass.panels[i], scratch.panels[i]);
}

template <class Acc>
int64_t local_moments_scratch(const LocalMoments& work) {
  Arena arena{nullptr};
  MomentScratch<Acc> measure(work, arena);
  return reinterpret_cast<intptr_t>(arena.next);
}

}  // namespace
}  // namespace mixhead::cpu
