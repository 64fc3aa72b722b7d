#pragma once
// The gradients of kernel regression, one panel of query rows past a group of keys: weights are
// recomputed from the log mass.
//
// With A = K / mass, s the share of a row (1, or its mass where sums are not normalised), x the
// similarity and c = (dK/dx / mass) (s dO.v - delta), delta = dO.O - dM (-dM where not normalised):
//   dv = sum_i s A dO
//   u^2 = sum_c d^2 / h^2, d = q - k:  dq = 2/h^2 sum_j c d,  dk = -2/h^2 sum_i c d,
//                                      dh = -2/h^3 sum_ij c d^2
//   x = sum_c q k / h^2:  dq = 1/h^2 sum_j c k,  dk = 1/h^2 sum_i c q,  dh = -2/h^3 sum_ij c q k
#include "cpu/points-inl.h"

namespace mixhead::cpu {
namespace {

/// Sums over rows for each key of a group. Few channels: one vector of partial sums each, so that
/// no vector is mostly padding; else rows of padded channels.
template <class Acc>
struct KeySums {
  Acc* data;
  int64_t channels;
  bool few;

  int64_t stride() const { return few ? channels * kLanes<Acc> : padded<Acc>(channels); }
  void take(int64_t keys, Arena& arena) { data = arena.take<Acc>(keys * stride()); }
  Acc* of(int64_t key) const { return data + key * stride(); }
  void clear(int64_t keys) const {
    for (int64_t i = 0; i < keys * stride(); ++i) data[i] = 0;
  }
  Acc at(int64_t key, int64_t channel) const {
    return few ? total<Acc>(load<Acc>(of(key) + channel * kLanes<Acc>)) : of(key)[channel];
  }
  void add(int64_t key, int64_t channel, Acc value) const {
    of(key)[few ? channel * kLanes<Acc> : channel] += value;
  }
};

template <class Acc>
KeySums<Acc> key_sums(int64_t channels, bool few) {
  return {nullptr, channels, few};
}

template <class Acc>
struct GradientScratch {
  QueryPanel<Acc> queries;
  Acc* points;            // [lane][padded channels], the form's coordinates where u^2 is expanded
  const Acc* query_rows;  // these, or the panel's rows: what the keys' gradients are made of
  Acc *grad, *grad_rows;  // [value channels][lanes], [lane][padded value channels]
  Acc *lse, *inverse_mass, *delta, *share, *row_sums;
  PlacedKeys<Acc> keys;
  Acc *values, *scores, *gradients, *bias, *row;
  KeySums<Acc> products;  // of one query head: sum_i c q, or sum_i c d by subtraction
  Acc* column_sums;       // [key][one vector]
  Acc* key_gradient;      // [key][channels], of all query heads
  KeySums<Acc> value_gradient;

  GradientScratch(const RegressionBackward& work, Arena& arena) {
    constexpr int64_t lanes = kPanelLanes<Acc>;
    const auto& p = work.regression.problem;
    const int64_t keys_of_group = work.group_keys, block = work.block_keys;
    queries.take(p, arena);
    points = arena.take<Acc>(lanes * padded<Acc>(p.channels));
    query_rows = points;
    grad = arena.take<Acc>(lanes * p.value_channels);
    grad_rows = arena.take<Acc>(lanes * padded<Acc>(p.value_channels));
    lse = arena.take<Acc>(lanes);
    inverse_mass = arena.take<Acc>(lanes);
    delta = arena.take<Acc>(lanes);
    share = arena.take<Acc>(lanes);
    row_sums = arena.take<Acc>(lanes);
    keys.take(p, keys_of_group, arena);
    values = arena.take<Acc>(keys_of_group * p.value_channels);
    scores = arena.take<Acc>(block * lanes);
    gradients = arena.take<Acc>(block * lanes);
    bias = arena.take<Acc>(block * lanes);
    row = arena.take<Acc>(larger(p.channels, p.value_channels));
    products = key_sums<Acc>(p.channels, p.channels <= kFewChannels);
    products.take(keys_of_group, arena);
    column_sums = arena.take<Acc>(keys_of_group * kLanes<Acc>);
    key_gradient = arena.take<Acc>(keys_of_group * p.channels);
    value_gradient = key_sums<Acc>(p.value_channels, p.value_channels <= kFewChannels);
    value_gradient.take(keys_of_group, arena);
  }
};

/// What a row of the panel gets from the forward and the incoming gradients.
template <class Acc>
void place_gradient(const RegressionBackward& work, int lane, GradientScratch<Acc>& scratch) {
  const auto& r = work.regression;
  const auto& p = r.problem;
  const auto& rows = scratch.queries.rows;
  const int64_t channels = p.value_channels, wide = padded<Acc>(channels);
  Acc *grad = scratch.grad_rows + lane * wide, *output = scratch.row;
  for (int64_t c = 0; c < wide; ++c) grad[c] = 0;
  scratch.lse[lane] = kInfinity<Acc>;
  scratch.inverse_mass[lane] = scratch.delta[lane] = scratch.share[lane] = 0;
  if (lane < rows.count) {
    const auto& at_row = rows.position[lane];
    const auto read = [&](const View& view) {
      return *at<Acc>(view, at_row.batch, at_row.head, at_row.query);
    };
    const Acc mass = read(work.log_mass), grad_mass = read(work.grad_log_mass);
    if (mass != -kInfinity<Acc>) {  // of an empty row nothing arrives, be it NaN
      const auto place = [&](const View& view) {
        return offset(view, at_row.batch, at_row.head, at_row.query);
      };
      read_row(p.type, work.grad_output, place(work.grad_output), channels, grad);
      scratch.lse[lane] = mass;
      scratch.inverse_mass[lane] = exp_of(-mass);
      scratch.share[lane] = r.normalize ? Acc{1} : exp_of(mass);
      Acc product = 0;
      if (r.normalize) {
        read_row(p.type, work.output, place(work.output), channels, output);
        product = inner_product(grad, output, channels);
      }
      scratch.delta[lane] = product - grad_mass;
    }
  }
}

template <class Acc, class PositionOf>
void start_gradients(
    const RegressionBackward& work, const Points<Acc>& points, int64_t count,
    const PositionOf& position_of, GradientScratch<Acc>& scratch) {
  const int64_t wide = padded<Acc>(points.channels),
                channels = work.regression.problem.value_channels;
  place_queries(
      points, work.regression, count, position_of, scratch.queries, [&](int lane, const Acc* row) {
        if (points.form != Form::expansion) return;
        for (int64_t c = 0; c < wide; ++c) scratch.points[lane * wide + c] = row[c];
      });
  scratch.query_rows = points.form == Form::expansion ? scratch.points : scratch.queries.by_row;
  const int64_t lanes = scratch.queries.rows.lanes;
  for (int lane = 0; lane < lanes; ++lane) {
    place_gradient(work, lane, scratch);
    scratch.row_sums[lane] = 0;
  }
  transpose(scratch.grad_rows, lanes, padded<Acc>(channels), channels, scratch.grad);
}

/// sums(key) += sum over lanes of weights[key][lane] rows(lane).
template <class Acc, int vectors>
void add_rows(
    const Acc* weights, int64_t keys, int64_t count, const Acc* by_lane, const Acc* by_row,
    const KeySums<Acc>& sums, int64_t first) {
  constexpr int64_t lanes = kLanes<Acc>, width = vectors * lanes, size = sizeof(Acc);
  if (!sums.few) {
    gemm_wide<Plain<Acc>>(
        keys, sums.stride(), count, weights, {width * size, size}, by_row, sums.stride(),
        sums.of(first), sums.stride(), Update::add);
    return;
  }
  for (int64_t k = 0; k < keys; ++k) {
    for (int64_t c = 0; c < sums.channels; ++c) {
      Acc* to = sums.of(first + k) + c * lanes;
      auto sum = load<Acc>(to);
#pragma GCC unroll 4
      for (int64_t j = 0; j < width; j += lanes) {
        sum += load<Acc>(weights + k * width + j) * load<Acc>(by_lane + c * width + j);
      }
      store(to, sum);
    }
  }
}

/// By subtraction: queries += sum_k c d, sums(key) += sum over lanes of c d, and where `squared`
/// squares[channel] += sum of c d^2. `queries` is [channels][lanes] or null.
template <class Acc, int vectors, bool squared>
void add_differences(
    const Points<Acc>& points, const Acc* query, const PlacedKeys<Acc>& keys, const Acc* slopes,
    int64_t count, Acc* queries, const KeySums<Acc>& sums, int64_t first, double* squares) {
  using V = Vector<Acc>;
  constexpr int64_t lanes = kLanes<Acc>, width = vectors * lanes;
  for (int64_t c = 0; c < points.channels; ++c) {
    V own[vectors], sum[vectors], square[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      own[j] = load<Acc>(query + c * width + j * lanes);
      sum[j] = square[j] = V{};
    }
    for (int64_t k = 0; k < count; ++k) {
      const V key = broadcast(keys.rows[k * points.channels + c]);
      V of_key{};
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        const V difference = own[j] - key;
        const V each = load<Acc>(slopes + k * width + j * lanes) * difference;
        sum[j] += each;
        if constexpr (squared) square[j] += each * difference;
        of_key += each;
      }
      Acc* to = sums.of(first + k) + c * lanes;
      store(to, load<Acc>(to) + of_key);
    }
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      if constexpr (squared) squares[c] += total<Acc>(square[j]);
      if (queries) {
        Acc* to = queries + c * width + j * lanes;
        store(to, load<Acc>(to) + sum[j]);
      }
    }
  }
}

/// Keys [first, first + keys) of the group past the panel. `part` is the panel's query gradients,
/// or null.
template <class Acc, int vectors>
void regress_gradients(
    const RegressionBackward& work, const Points<Acc>& points, const KernelLoops<Acc>& loops,
    const Acc* bias, int64_t group_first, int64_t first, int64_t keys,
    GradientScratch<Acc>& scratch, Acc* part, double* bandwidth) {
  constexpr int64_t width = vectors * kLanes<Acc>, size = sizeof(Acc);
  const auto& p = work.regression.problem;
  const int64_t channels = p.value_channels;
  const int64_t count = scratch.queries.rows.count;
  const auto placed = scratch.keys.from(first, points.channels);
  similarities<Acc, vectors>(points, scratch.queries, placed, keys, scratch.scores);
  gemm<Plain<Acc>, vectors>(
      keys, channels, scratch.values + first * channels, {channels * size, size}, scratch.grad,
      width, scratch.gradients, width);
  const PairBlock<Acc> block{
      &scratch.queries.rows, &p.dropout, group_first + first, keys, width, bias, scratch.scores};
  const bool sum_columns = points.form == Form::expansion;
  loops.differentiate(
      block, {scratch.lse, scratch.inverse_mass, scratch.delta, scratch.share, scratch.gradients,
              scratch.row_sums, sum_columns ? scratch.column_sums + first * kLanes<Acc> : nullptr});
  if (work.grad_value) {
    add_rows<Acc, vectors>(
        scratch.scores, keys, count, scratch.grad, scratch.grad_rows, scratch.value_gradient,
        first);
  }
  if (points.form == Form::difference) {
    const auto add = work.grad_bandwidth ? add_differences<Acc, vectors, true>
                                         : add_differences<Acc, vectors, false>;
    add(points, scratch.queries.query, placed, scratch.gradients, keys, part, scratch.products,
        first, bandwidth);
    return;
  }
  if (work.grad_key || work.grad_bandwidth) {
    add_rows<Acc, vectors>(
        scratch.gradients, keys, count, scratch.queries.query, scratch.query_rows, scratch.products,
        first);
  }
  if (part) {
    gemm<Plain<Acc>, vectors>(
        points.channels, keys, placed.rows, {size, points.channels * size}, scratch.gradients,
        width, part, width, Update::add);
  }
}

/// The panel's row sums of c, where u^2 is expanded: to the query gradients' last row, and their
/// part of sum_ij c d^2.
template <class Acc>
void finish_panel_gradients(
    const Points<Acc>& points, const GradientScratch<Acc>& scratch, Acc* part, bool wanted,
    double* squares) {
  if (points.form != Form::expansion) return;
  const auto& rows = scratch.queries.rows;
  const int64_t wide = padded<Acc>(points.channels);
  for (int lane = 0; lane < rows.count; ++lane) {
    const Acc sum = scratch.row_sums[lane];
    const Acc* row = scratch.query_rows + lane * wide;
    if (part) part[points.channels * rows.lanes + lane] += sum;
    for (int64_t c = 0; wanted && c < points.channels; ++c) squares[c] += row[c] * row[c] * sum;
  }
}

/// From one query head's sums: the keys' gradients, added up, and the rest of sum_ij c d^2 (of
/// sum_ij c q k), in the form's coordinates.
template <class Acc>
void finish_keys(
    const Points<Acc>& points, int64_t keys, GradientScratch<Acc>& scratch, double* squares) {
  const int64_t channels = points.channels;
  for (int64_t k = 0; k < keys; ++k) {
    const Acc* key = scratch.keys.rows + k * channels;
    Acc* to = scratch.key_gradient + k * channels;
    if (points.form == Form::unit_product) {
      Acc along = 0;
      for (int64_t c = 0; c < channels; ++c) along += key[c] * scratch.products.at(k, c);
      for (int64_t c = 0; c < channels; ++c) {
        to[c] += (scratch.products.at(k, c) - key[c] * along) / scratch.keys.lengths[k];
        squares[c] += key[c] * scratch.products.at(k, c);
      }
      continue;
    }
    const Acc sum = points.form == Form::expansion
                        ? total<Acc>(load<Acc>(scratch.column_sums + k * kLanes<Acc>))
                        : Acc{0};
    for (int64_t c = 0; c < channels; ++c) {
      const Acc inverse = points.inverse[c], product = scratch.products.at(k, c);
      if (points.form == Form::product) {
        to[c] += product;
        squares[c] += key[c] * product;
      } else if (points.form == Form::difference) {
        to[c] -= 2 * inverse * inverse * product;
      } else {
        to[c] += 2 * inverse * (key[c] * sum - product);
        squares[c] += key[c] * (key[c] * sum - 2 * product);
      }
    }
  }
}

/// dh of each channel from the sums in the form's coordinates, of which only a difference is not
/// yet divided by h.
template <class Acc>
void add_bandwidth(const Points<Acc>& points, const double* squares, double* gradient) {
  for (int64_t c = 0; c < points.channels; ++c) {
    const double inverse = points.inverse[c];
    const double scale = points.form == Form::difference ? inverse * inverse * inverse : inverse;
    gradient[c] -= 2 * scale * squares[c];
  }
}

}  // namespace
}  // namespace mixhead::cpu
