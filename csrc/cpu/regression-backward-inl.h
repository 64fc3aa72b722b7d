#pragma once
// The items of kernel regression's backward: each owns the gradients of a range of keys and adds to
// its own copy of the queries' gradients.
#include "cpu/regression-gradients-inl.h"

namespace mixhead::cpu {
namespace {

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

/// The accumulators of a group of keys: what the chunk before left, else 0.
template <class Acc>
void start_keys(
    const RegressionBackward& work, int64_t unit, int64_t first, int64_t keys,
    GradientScratch<Acc>& scratch) {
  const auto& p = work.regression.problem;
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
}

template <class Acc>
void save_keys(
    const RegressionBackward& work, int64_t unit, int64_t first, int64_t keys,
    GradientScratch<Acc>& scratch) {
  const auto& p = work.regression.problem;
  for (int64_t k = 0; k < keys; ++k) {
    if (work.grad_key) {
      save_key_row(
          work, scratch.key_gradient + k * p.channels, unit, first + k, p.channels, work.key_store,
          work.grad_key);
    }
    if (work.grad_value) {
      for (int64_t c = 0; c < p.value_channels; ++c) {
        scratch.row[c] = scratch.value_gradient.at(k, c);
      }
      save_key_row(
          work, scratch.row, unit, first + k, p.value_channels, work.value_store, work.grad_value);
    }
  }
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
    start_keys(work, unit, first, keys, scratch);
    for (int64_t group = 0; group < p.groups; ++group) {
      regress_group(work, unit, group, split, first, keys, squares, scratch);
    }
    if (work.nearest && work.grad_value) add_nearest(work, unit, first, keys, scratch);
    save_keys(work, unit, first, keys, scratch);
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
