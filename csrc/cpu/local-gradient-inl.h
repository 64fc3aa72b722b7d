#pragma once
// The gradients of the moments of local-linear regression: weights are recomputed from the log
// mass; each item owns rows and adds to its own copy of the data's gradients.
//
// With g and G the gradients by m and C (its keys' part symmetrised, H), d = x - m, and M that by
// the log mass, the loss depends on a pair through
//   P   = g.d + 1/2 d_k' H d_k + d_k' G_v d_v,     d loss / d log K = A (P - <C, G> + M)
//   dx += A dP/dd = A (g + H d_k + G_v d_v | g + G_v' d_k),     dq -= g
// since sum A d = 0. P is a polynomial; it is written about a pivot that the dtype holds, p = m -
// r.
#include "cpu/local-moments-inl.h"
#include "cpu/regression-backward-inl.h"

namespace mixhead::cpu {
namespace {

template <class Acc>
struct LocalPanel {
  QueryPanel<Acc> queries;
  Acc *pivot, *linear;  // [wide][lanes]: p and the polynomial's coefficients about it
  Acc* quadratic;       // [channels][wide][lanes]
  Acc *lse, *inverse_mass, *delta, *share, *row_sums;
  Acc* grad_query;  // [channels][lanes]

  void take(const Problem& p, Arena& arena) {
    constexpr int64_t lanes = kPanelLanes<Acc>;
    queries.take(p, arena);
    pivot = arena.take<Acc>(p.value_channels * lanes);
    linear = arena.take<Acc>(p.value_channels * lanes);
    quadratic = arena.take<Acc>(p.channels * p.value_channels * lanes);
    lse = arena.take<Acc>(lanes);
    inverse_mass = arena.take<Acc>(lanes);
    delta = arena.take<Acc>(lanes);
    share = arena.take<Acc>(lanes);
    row_sums = arena.take<Acc>(lanes);
    grad_query = arena.take<Acc>(p.channels * lanes);
  }
};

template <class Acc>
struct LocalScratch {
  LocalPanel<Acc> panels[kRegressionPanels];
  PlacedKeys<Acc> keys;
  Acc *rows, *scores, *gradients, *bias, *remainder;
  KeySums<Acc> differences;  // sum_i c (q - k)
  KeySums<Acc> data;         // sum_i A dP/dd

  LocalScratch(const LocalGradient& work, Arena& arena) {
    constexpr int64_t lanes = kPanelLanes<Acc>;
    const auto& p = work.forward.regression.problem;
    const int64_t block = work.forward.block_keys;
    for (int64_t i = 0; i < panels_for<Acc>(work.forward.row_block); ++i) {
      panels[i].take(p, arena);
    }
    keys.take(p, block, arena);
    rows = arena.take<Acc>(block * p.value_channels);
    scores = arena.take<Acc>(block * lanes);
    gradients = arena.take<Acc>(block * lanes);
    bias = arena.take<Acc>(block * lanes);
    remainder = arena.take<Acc>(p.channels);
    differences = key_sums<Acc>(p.channels, true);
    differences.take(block, arena);
    data = key_sums<Acc>(p.value_channels, true);
    data.take(block, arena);
  }
};

/// The polynomial of the row in `lane`. An empty row has none: nothing arrives, be it NaN.
template <class Acc>
void place_polynomial(const LocalGradient& work, int lane, LocalPanel<Acc>& panel, Acc* remainder) {
  const auto& p = work.forward.regression.problem;
  const auto& rows = panel.queries.rows;
  const int64_t width = rows.lanes, channels = p.channels, wide = p.value_channels;
  const auto clear = [&](Acc* to, int64_t count) {
    for (int64_t c = 0; c < count; ++c) to[c * width + lane] = 0;
  };
  clear(panel.pivot, wide);
  clear(panel.linear, wide);
  clear(panel.quadratic, channels * wide);
  clear(panel.grad_query, channels);
  panel.lse[lane] = kInfinity<Acc>;
  panel.inverse_mass[lane] = panel.delta[lane] = panel.share[lane] = panel.row_sums[lane] = 0;
  if (lane >= rows.count) return;
  const int64_t row = chunk_row(p, work.chunk, rows.position[lane]);
  const Acc mass = static_cast<const Acc*>(work.log_mass)[row];
  if (mass == -kInfinity<Acc>) return;
  panel.lse[lane] = mass;
  panel.inverse_mass[lane] = exp_of(-mass);
  panel.share[lane] = 1;
  const auto* mean = static_cast<const Acc*>(work.mean) + row * wide;
  const auto* linear = static_cast<const Acc*>(work.linear) + row * wide;
  const auto* quadratic = static_cast<const Acc*>(work.quadratic) + row * channels * wide;
  for (int64_t c = 0; c < wide; ++c) {
    Acc& pivot = panel.pivot[c * width + lane];
    pivot = mean[c];
    panel.linear[c * width + lane] = linear[c];
    if (c >= channels) continue;
    const Acc query = panel.queries.query[c * width + lane];
    pivot += query;
    remainder[c] = mean[c] - (pivot - query);
  }
  Acc constant = 0;  // of the polynomial about the pivot
  for (int64_t c = 0; c < channels; ++c) {
    Acc turned = 0;
    for (int64_t e = 0; e < wide; ++e) {
      const Acc each = quadratic[c * wide + e];
      panel.quadratic[(c * wide + e) * width + lane] = each;
      panel.linear[e * width + lane] -= each * remainder[c];
      if (e < channels) turned += each * remainder[e];
    }
    constant += remainder[c] * (Acc{0.5} * turned - linear[c]);
  }
  panel.delta[lane] = static_cast<const Acc*>(work.delta)[row] - constant;
}

/// use(key, first lane of the vector, constant + sum_i h_i (x - p)_(first + i)) for each pair,
/// where h_i is at h + i * step; the first of them halved where `halved`.
template <class Acc, int count, class Use>
void for_linear_forms(
    const CentredBlock<Acc>& block, int64_t first, const Acc* h, int64_t step, bool halved,
    const Acc* constant, const Use& use) {
  using V = Vector<Acc>;
  for (int64_t j = 0; j < block.width; j += kLanes<Acc>) {
    V own[count], factor[count];
    const V start = constant ? load<Acc>(constant + j) : V{};
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      own[i] = block.own(first + i, j);
      factor[i] = load<Acc>(h + i * step + j);
    }
    if (halved) factor[0] *= Acc{0.5};
    for (int64_t k = 0; k < block.keys; ++k) {
      V form = start;
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) form += factor[i] * block.centred(k, first + i, own[i]);
      use(k, j, form);
    }
  }
}

/// P of each pair.
template <class Acc>
void polynomials(
    const CentredBlock<Acc>& block, const LocalPanel<Acc>& panel, int64_t channels, Acc* to) {
  const int64_t width = block.width, wide = block.wide;
  for (int64_t i = 0; i < block.keys * width; ++i) to[i] = 0;
  for_tiles(channels, wide, [&]<int count>(int64_t e) {
    for_linear_forms<Acc, count>(
        block, e, panel.linear + e * width, width, false, nullptr,
        [&](int64_t k, int64_t j, Vector<Acc> form) __attribute__((always_inline)) {
          Acc* at = to + k * width + j;
          store(at, load<Acc>(at) + form);
        });
  });
  for (int64_t c = 0; c < channels; ++c) {
    for_tiles(c, wide, [&]<int count>(int64_t e) {
      for_linear_forms<Acc, count>(
          block, e, panel.quadratic + (c * wide + e) * width, width, e == c,
          e == c ? panel.linear + c * width : nullptr,
          [&](int64_t k, int64_t j, Vector<Acc> form) __attribute__((always_inline)) {
            Acc* at = to + k * width + j;
            store(at, load<Acc>(at) + block.centred(k, c, block.own(c, j)) * form);
          });
    });
  }
}

/// sums(key) += sum over lanes of A dP/dd.
template <class Acc>
void add_data_gradients(
    const CentredBlock<Acc>& block, const LocalPanel<Acc>& panel, int64_t channels,
    const KeySums<Acc>& sums) {
  const int64_t width = block.width, wide = block.wide;
  for (int64_t c = 0; c < wide; ++c) {
    // By a key's channel all channels matter; by a value's those of the keys.
    const bool of_key = c < channels;
    const int64_t step = (of_key ? 1 : wide) * width;
    for_tiles(0, of_key ? wide : channels, [&]<int count>(int64_t e) {
      const Acc* h = panel.quadratic + (of_key ? c * wide * width : c * width) + e * step;
      for_linear_forms<Acc, count>(
          block, e, h, step, false, e == 0 ? panel.linear + c * width : nullptr,
          [&](int64_t k, int64_t j, Vector<Acc> form) __attribute__((always_inline)) {
            Acc* at = sums.of(k) + c * kLanes<Acc>;
            store(at, load<Acc>(at) + load<Acc>(block.weights + k * width + j) * form);
          });
    });
  }
}

template <class Acc>
void write_query_gradients(
    const LocalGradient& work, const Points<Acc>& points, const LocalPanel<Acc>& panel) {
  const auto& p = work.forward.regression.problem;
  const auto& rows = panel.queries.rows;
  for (int lane = 0; lane < rows.count; ++lane) {
    const int64_t row = chunk_row(p, work.chunk, rows.position[lane]);
    const auto* linear = static_cast<const Acc*>(work.linear) + row * p.value_channels;
    auto* to = static_cast<Acc*>(work.grad_query) + row * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) {
      const Acc sum = panel.grad_query[c * rows.lanes + lane];
      const Acc direct = panel.share[lane] == 0 ? Acc{0} : linear[c];
      to[c] = 2 * points.inverse[c] * points.inverse[c] * sum - direct;
    }
  }
}

/// A block's sums into the copy of the data's gradients.
template <class Acc>
void write_data_gradients(
    const Points<Acc>& points, int64_t keys, int64_t channels, int64_t wide,
    const LocalScratch<Acc>& scratch, Acc* to) {
  for (int64_t k = 0; k < keys; ++k) {
    for (int64_t c = 0; c < wide; ++c) to[k * wide + c] += scratch.data.at(k, c);
    for (int64_t c = 0; c < channels; ++c) {
      const Acc precision = points.inverse[c] * points.inverse[c];
      to[k * wide + c] -= 2 * precision * scratch.differences.at(k, c);
    }
  }
}

/// Items are (query unit, split of its row blocks), the last fastest.
template <class Acc>
void local_gradient(const LocalGradient& work, int64_t number, void* memory) {
  const auto& f = work.forward;
  const auto& r = f.regression;
  const auto& p = r.problem;
  Arena arena{static_cast<char*>(memory)};
  LocalScratch<Acc> scratch(work, arena);
  auto* squares = arena.take<double>(p.channels);
  for (int64_t c = 0; c < p.channels; ++c) squares[c] = 0;
  const int64_t unit = number / work.row_splits, split = number % work.row_splits;
  const int64_t head = unit % (p.key_heads * p.groups), key_unit = key_unit_of(p, unit);
  const auto points = local_points<Acc>(r, head, key_unit);
  const auto loops = loops_of<Acc>(r.kernel[head], p.source[0].mask.kind == MaskKind::additive);
  const int64_t channels = p.channels, wide = p.value_channels, keys = p.source[0].keys;
  const int64_t key_units = f.units / p.groups;
  Acc* data = work.grad_data
                  ? static_cast<Acc*>(work.grad_data) + (split * key_units + key_unit) * keys * wide
                  : nullptr;
  const auto clear = [&] {
    scratch.differences.clear(f.block_keys);
    scratch.data.clear(f.block_keys);
  };
  const auto panel_of = [&](int64_t i) -> QueryPanel<Acc>& { return scratch.panels[i].queries; };
  const auto visit = [&](int64_t i, int64_t first, int64_t count, const Acc* bias) {
    auto& panel = scratch.panels[i];
    const auto& rows = panel.queries.rows;
    const int64_t width = rows.lanes;
    similarities_of(points, panel.queries, scratch.keys, count, scratch.scores);
    const CentredBlock<Acc> block{scratch.rows, panel.pivot, scratch.scores, count, wide, width};
    polynomials(block, panel, channels, scratch.gradients);
    loops.differentiate(
        {&rows, &p.dropout, first, count, width, bias, scratch.scores},
        {panel.lse, panel.inverse_mass, panel.delta, panel.share, scratch.gradients, panel.row_sums,
         nullptr});
    if (data) add_data_gradients(block, panel, channels, scratch.data);
    with_vectors(rows.vectors(), [&]<int vectors>() {
      const auto add = work.grad_bandwidth ? add_differences<Acc, vectors, true>
                                           : add_differences<Acc, vectors, false>;
      add(points, panel.queries.query, scratch.keys, scratch.gradients, count, panel.grad_query,
          scratch.differences, 0, squares);
    });
  };
  const auto finish = [&](int64_t first, int64_t count) {
    if (!data) return;
    write_data_gradients(points, count, channels, wide, scratch, data + first * wide);
    clear();
  };
  clear();
  const int64_t begin = split * f.row_blocks / work.row_splits;
  const int64_t end = (split + 1) * f.row_blocks / work.row_splits;
  for (int64_t row_block = begin; row_block < end; ++row_block) {
    const int64_t panels =
        place_row_block(f, work.chunk, points, unit, row_block, panel_of, [&](int64_t i) {
          auto& panel = scratch.panels[i];
          for (int lane = 0; lane < panel.queries.rows.lanes; ++lane) {
            place_polynomial(work, lane, panel, scratch.remainder);
          }
        });
    for_key_blocks(
        f, points, loops.compact, unit, panels, panel_of, scratch.keys, scratch.rows, scratch.bias,
        visit, finish);
    for (int64_t i = 0; work.grad_query && i < panels; ++i) {
      write_query_gradients(work, points, scratch.panels[i]);
    }
  }
  if (work.grad_bandwidth) {
    add_bandwidth(points, squares, work.grad_bandwidth + number * channels);
  }
}

template <class Acc>
int64_t local_gradient_scratch(const LocalGradient& work) {
  Arena arena{nullptr};
  LocalScratch<Acc> measure(work, arena);
  arena.take<double>(work.forward.regression.problem.channels);
  return reinterpret_cast<intptr_t>(arena.next);
}

}  // namespace
}  // namespace mixhead::cpu
