#pragma once
// The backward of kernel regression: weights are recomputed from the log mass; each item owns the
// gradients of a range of keys and adds to its own copy of the queries' gradients.
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

template <class Acc>
Acc* query_part(const RegressionBackward& work, int64_t query, int64_t split, int64_t panel) {
  const int64_t panels = panels_for<Acc>(work.unit_rows);
  return static_cast<Acc*>(work.part) + ((query * work.key_splits + split) * panels + panel) *
                                            (work.regression.problem.channels + 1) *
                                            kPanelLanes<Acc>;
}

/// All rows of one query head past a group of keys.
template <class Acc>
void regress_group(
    const RegressionBackward& work, int64_t unit, int64_t group, int64_t split, int64_t first,
    int64_t keys, double* squares, GradientScratch<Acc>& scratch) {
  const auto& r = work.regression;
  const auto& p = r.problem;
  const int64_t key_unit = work.first_unit + unit, query_unit = key_unit * p.groups + group;
  const int64_t query_head = query_unit % (p.key_heads * p.groups);
  const auto points = points_of<Acc>(r, query_head, key_unit);
  const auto loops =
      loops_of<Acc>(r.kernel[query_head], p.source[0].mask.kind == MaskKind::additive);
  place_keys(points, r, key_head(p, p.source[0], key_unit), first, keys, scratch.keys);
  scratch.products.clear(keys);
  for (int64_t i = 0; i < keys * kLanes<Acc>; ++i) scratch.column_sums[i] = 0;
  for (int64_t c = 0; c < p.channels; ++c) squares[c] = 0;
  const int64_t panels = panels_for<Acc>(work.unit_rows);
  for (int64_t i = 0; i < panels; ++i) {
    const auto range = panel_rows<Acc>(work.unit_rows, panels, i);
    const auto position_of = [&](int64_t lane) {
      return query_position(p, work.chunk, query_unit, range.first + lane);
    };
    start_gradients(work, points, range.count, position_of, scratch);
    Acc* part = work.part ? query_part<Acc>(work, unit * p.groups + group, split, i) : nullptr;
    for (int64_t done = 0; done < keys; done += work.block_keys) {
      const int64_t block = smaller(work.block_keys, keys - done);
      if (loops.compact &&
          apart(points, scratch.queries.box, key_box<Acc>(r, key_unit, first + done))) {
        continue;
      }
      const auto bias = pair_bias(r, scratch.queries, first + done, block, scratch.bias);
      if (bias.nothing_readable) continue;
      with_vectors(scratch.queries.rows.vectors(), [&]<int vectors>() {
        regress_gradients<Acc, vectors>(
            work, points, loops, bias.values, first, done, block, scratch, part, squares);
      });
    }
    finish_panel_gradients(points, scratch, part, work.grad_bandwidth, squares);
  }
  finish_keys(points, keys, scratch, squares);
  if (!work.grad_bandwidth) return;
  add_bandwidth(
      points, squares,
      work.grad_bandwidth + ((unit * work.key_splits + split) * p.groups + group) * p.channels);
}

/// dO of the empty rows goes to the value that they took.
template <class Acc>
void add_nearest(
    const RegressionBackward& work, int64_t unit, int64_t first, int64_t keys,
    GradientScratch<Acc>& scratch) {
  const auto& p = work.regression.problem;
  const int64_t key_unit = work.first_unit + unit;
  for (int64_t group = 0; group < p.groups; ++group) {
    for (int64_t row = 0; row < work.unit_rows; ++row) {
      const auto at_row = query_position(p, work.chunk, key_unit * p.groups + group, row);
      const int64_t key = work.nearest[global_row(p, at_row)] - first;
      if (key < 0 || key >= keys) continue;
      const View& view = work.grad_output;
      read_row(
          p.type, view, offset(view, at_row.batch, at_row.head, at_row.query), p.value_channels,
          scratch.row);
      for (int64_t c = 0; c < p.value_channels; ++c) {
        scratch.value_gradient.add(key, c, scratch.row[c]);
      }
    }
  }
}

/// Where the accumulators of a unit's keys live between chunks.
template <class Acc>
Acc* key_store(
    const RegressionBackward& work, void* store, int64_t unit, int64_t first, int64_t channels) {
  const int64_t number = work.store_is_output ? work.first_unit + unit : unit;
  return static_cast<Acc*>(store) +
         (number * work.regression.problem.source[0].keys + first) * channels;
}

/// One row of the keys' gradients: to the result after the last chunk, else to the store.
template <class Acc>
void save_key_row(
    const RegressionBackward& work, const Acc* row, int64_t unit, int64_t key, int64_t channels,
    void* store, void* result) {
  if (!work.last_chunk) {
    Acc* to = key_store<Acc>(work, store, unit, key, channels);
    for (int64_t c = 0; c < channels; ++c) to[c] = row[c];
    return;
  }
  const int64_t number = (work.first_unit + unit) * work.regression.problem.source[0].keys + key;
  write_row(work.regression.problem.type, row, channels, result, number * channels);
}

/// Items are (key unit of the wave, split of its keys), the last fastest.
template <class Acc>
void regression_backward(const RegressionBackward& work, int64_t number, void* memory) {
  const auto& p = work.regression.problem;
  Arena arena{static_cast<char*>(memory)};
  GradientScratch<Acc> scratch(work, arena);
  auto* squares = arena.take<double>(p.channels);
  const int64_t unit = number / work.key_splits, split = number % work.key_splits;
  if (work.part) {
    const int64_t size = panels_for<Acc>(work.unit_rows) * (p.channels + 1) * kPanelLanes<Acc>;
    for (int64_t group = 0; group < p.groups; ++group) {
      Acc* part = query_part<Acc>(work, unit * p.groups + group, split, 0);
      for (int64_t i = 0; i < size; ++i) part[i] = 0;
    }
  }
  const auto head = key_head(p, p.source[0], work.first_unit + unit);
  const int64_t begin = split * work.key_split;
  const int64_t end = smaller(p.source[0].keys, begin + work.key_split);
  for (int64_t first = begin; first < end; first += work.group_keys) {
    const int64_t keys = smaller(work.group_keys, end - first);
    read_values(work.regression, head, first, keys, scratch.values);
    const bool resume = !work.first_chunk;
    const Acc* stored = resume && work.grad_key
                            ? key_store<Acc>(work, work.key_store, unit, first, p.channels)
                            : nullptr;
    for (int64_t i = 0; i < keys * p.channels; ++i) {
      scratch.key_gradient[i] = stored ? stored[i] : Acc{0};
    }
    scratch.value_gradient.clear(keys);
    if (resume && work.grad_value) {
      const Acc* values = key_store<Acc>(work, work.value_store, unit, first, p.value_channels);
      for (int64_t i = 0; i < keys * p.value_channels; ++i) {
        scratch.value_gradient.add(i / p.value_channels, i % p.value_channels, values[i]);
      }
    }
    for (int64_t group = 0; group < p.groups; ++group) {
      regress_group(work, unit, group, split, first, keys, squares, scratch);
    }
    if (work.nearest && work.grad_value) add_nearest(work, unit, first, keys, scratch);
    for (int64_t k = 0; k < keys; ++k) {
      if (work.grad_key) {
        save_key_row(
            work, scratch.key_gradient + k * p.channels, unit, first + k, p.channels,
            work.key_store, work.grad_key);
      }
      if (work.grad_value) {
        for (int64_t c = 0; c < p.value_channels; ++c) {
          scratch.row[c] = scratch.value_gradient.at(k, c);
        }
        save_key_row(
            work, scratch.row, unit, first + k, p.value_channels, work.value_store,
            work.grad_value);
      }
    }
  }
}

template <class Acc>
int64_t regression_backward_scratch(const RegressionBackward& work) {
  Arena arena{nullptr};
  GradientScratch<Acc> measure(work, arena);
  arena.take<double>(work.regression.problem.channels);
  arena.take<Acc>(work.block_keys * kPanelLanes<Acc>);  // regression_mask's sums
  return reinterpret_cast<intptr_t>(arena.next);
}

/// Sums the splits into the query gradients of rows [first, last) of the wave.
template <class Acc>
void regression_reduce(const RegressionBackward& work, int64_t first, int64_t last, void* memory) {
  const auto& r = work.regression;
  const auto& p = r.problem;
  const int64_t channels = p.channels, panels = panels_for<Acc>(work.unit_rows);
  const int64_t vectors = divide_up(work.unit_rows, kLanes<Acc>);
  auto* sum = static_cast<Acc*>(memory);
  auto* row = sum + channels + 1;
  for (int64_t number = first; number < last; ++number) {
    const int64_t query = number / work.unit_rows, unit_row = number % work.unit_rows;
    const int64_t query_unit = work.first_unit * p.groups + query;
    const auto at_row = query_position(p, work.chunk, query_unit, unit_row);
    const auto points = points_of<Acc>(r, at_row.head, key_unit_of(p, query_unit));
    const int64_t panel = ((unit_row / kLanes<Acc> + 1) * panels - 1) / vectors;
    const auto range = panel_rows<Acc>(work.unit_rows, panels, panel);
    const int64_t lanes = divide_up(range.count, kLanes<Acc>) * kLanes<Acc>;
    for (int64_t c = 0; c <= channels; ++c) {
      sum[c] = 0;
      for (int64_t split = 0; split < work.key_splits; ++split) {
        sum[c] += query_part<Acc>(work, query, split, panel)[c * lanes + unit_row - range.first];
      }
    }
    read_row(
        p.type, p.query, offset(p.query, at_row.batch, at_row.head, at_row.query), channels, row);
    const Acc length = place_point(points, row);
    Acc along = 0;
    for (int64_t c = 0; points.form == Form::unit_product && c < channels; ++c) {
      along += row[c] * sum[c];
    }
    for (int64_t c = 0; c < channels; ++c) {
      const Acc inverse = points.inverse[c], precision = inverse * inverse;
      switch (points.form) {
        case Form::product:
          sum[c] *= precision;
          break;
        case Form::unit_product:
          sum[c] = (sum[c] - row[c] * along) * precision / length;
          break;
        case Form::difference:
          sum[c] *= 2 * precision;
          break;
        case Form::expansion:
          sum[c] = 2 * inverse * (row[c] * sum[channels] - sum[c]);
      }
    }
    write_row(p.type, sum, channels, work.grad_query, global_row(p, at_row) * channels);
  }
}

}  // namespace
}  // namespace mixhead::cpu
