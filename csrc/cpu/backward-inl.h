#pragma once
// The backward: weights are recomputed from the log-sum-exp; each item owns the gradients of a
// range of keys and adds to its own copy of the queries' gradients, which reduce sums in a fixed
// order.
//
// With w the source's weight in a row's output and P = exp(S - lse) its attention:
//   delta = w <dO, A> - dlse          (the joint rule: A is the mixed output)
//   dS = P * (w dO V^T - delta),  dV = (w P)^T dO,  dK = dS^T Q,  dQ = dS K
#include "cpu/backward-panel-inl.h"

namespace mixhead::cpu {
namespace {

/// Row `number` of a wave, counted (batch, head of the wave, group, row of the chunk).
inline Position wave_position(const BackwardWork& work, int64_t number) {
  const int64_t outer = number / work.chunk.rows, heads = work.heads * work.problem.groups;
  return {
      outer / heads, work.first_head * work.problem.groups + outer % heads,
      work.chunk.first_row + number % work.chunk.rows};
}

/// delta of rows [first, last) of the wave, both sides.
template <class Io>
void backward_prepare(const BackwardWork& work, int64_t first, int64_t last) {
  using Acc = typename Multiply<Io>::Acc;
  const auto& p = work.problem;
  const auto& in = work.inputs;
  for (int64_t number = first; number < last; ++number) {
    const auto at_row = wave_position(work, number);
    const auto row = row_mix<Io>(p, in, at_row);
    const int64_t mix_row = offset(p.mix, at_row.batch, at_row.head, at_row.query);
    const Io* grad = at<Io>(in.grad_output, at_row.batch, at_row.head, at_row.query);
    for (int s = 0; s < 2; ++s) {
      const View& view = in.kept_output[p.joint ? 0 : s];
      const Acc* out = at<Acc>(view, at_row.batch, at_row.head, at_row.query);
      Acc sum = 0;
      for (int64_t c = 0; c < p.value_channels; ++c) {
        const Acc each = to_float(grad[c * in.grad_output.column]) * out[c * view.column];
        sum += row.per_channel ? channel_weight(p, row, mix_row, s, c) * each : each;
      }
      if (!row.per_channel) sum *= row.weight[s];
      const Acc grad_lse = *at<Acc>(in.grad_lse[s], at_row.batch, at_row.head, at_row.query);
      static_cast<Acc*>(work.delta[s])[chunk_row(p, work.chunk, at_row)] = sum - grad_lse;
    }
  }
}

/// One key block past the panel: adds to the gradients of keys, values and queries.
template <class Io, int vectors>
void backward_block(
    const Problem& p, const Bias<typename Multiply<Io>::Acc>& bias, const KeyBlock& block,
    BackwardScratch<Io>& scratch, typename Multiply<Io>::Acc* key_gradient,
    typename Multiply<Io>::Acc* value_gradient, typename Multiply<Io>::Acc* query_gradient) {
  using M = Multiply<Io>;
  using Acc = typename M::Acc;
  using Operand = typename M::Operand;
  constexpr int64_t lanes = kLanes<Acc>, width = vectors * lanes;
  auto& panel = *scratch.panel;
  alignas(64) Acc unused[width] = {};
  recompute<Io, vectors>(
      p, bias, block, scratch, query_gradient ? query_gradient + p.channels * width : unused);
  const int64_t wide = padded<Acc>(p.channels), value_wide = padded<Acc>(p.value_channels);
  const int64_t row_steps = divide_up(panel.rows.count, M::steps);
  const void *weights = scratch.scores, *gradients = scratch.gradients;
  Strides by_row{width * static_cast<int64_t>(sizeof(Acc)), sizeof(Acc)};
  if constexpr (M::steps == 2) {
    weights = scratch.weight_rows;
    gradients = scratch.gradient_rows;
    by_row = {width * 2, 4};
  }
  if (value_gradient) {
    gemm_wide<M>(
        block.keys, value_wide, row_steps, weights, by_row, panel.grad_rows, value_wide,
        value_gradient, value_wide, Update::add);
  }
  if (key_gradient) {
    gemm_wide<M>(
        block.keys, wide, row_steps, gradients, by_row, panel.query_rows, wide, key_gradient, wide,
        Update::add);
  }
  if (query_gradient) {
    const Operand* operand;
    if constexpr (M::steps == 1) {
      operand = scratch.gradients;
    } else {
#if defined(__AVX512BF16__)
      for (int64_t k = 0; k < block.keys; k += 2) {
        for (int64_t j = 0; j < width; j += lanes) {
          const auto even = load<float>(scratch.gradients + k * width + j);
          const auto odd = k + 1 < block.keys ? load<float>(scratch.gradients + (k + 1) * width + j)
                                              : Vector<float>{};
          store(scratch.gradient_pairs + k / 2 * width + j, pair_rows(even, odd));
        }
      }
#endif
      operand = scratch.gradient_pairs;
    }
    gemm<M, vectors>(
        p.channels, divide_up(block.keys, M::steps), block.key_columns.data,
        block.key_columns.strides, operand, width, query_gradient, width, Update::add);
  }
}

/// The unit's number within the wave: (batch, head) or head.
inline int64_t wave_unit(const BackwardWork& work, const Source& source, const KeyHead& head) {
  const int64_t first = head.head - work.first_head;
  return source.shared ? first : head.batch * work.heads + first;
}
inline KeyHead wave_key_head(const BackwardWork& work, const Source& source, int64_t unit) {
  if (source.shared) return {0, work.first_head + unit};
  return {unit / work.heads, work.first_head + unit % work.heads};
}
inline int64_t unit_of(const Problem& p, const Source& source, const KeyHead& head) {
  return source.shared ? head.head : head.batch * p.key_heads + head.head;
}

/// Where the accumulators of a unit's keys live between chunks.
template <class Acc>
Acc* stored(
    const BackwardWork& work, const Source& source, void* store, const KeyHead& head,
    int64_t first_key, int64_t channels) {
  if (!store) return nullptr;
  const int64_t unit =
      work.store_is_output ? unit_of(work.problem, source, head) : wave_unit(work, source, head);
  return static_cast<Acc*>(store) + (unit * source.keys + first_key) * channels;
}

template <class Acc>
void load_gradient(const Acc* from, int64_t keys, int64_t channels, Acc* to) {
  const int64_t wide = padded<Acc>(channels);
  if (!from) {
    for (int64_t i = 0; i < keys * wide; ++i) to[i] = 0;
    return;
  }
  for (int64_t k = 0; k < keys; ++k) {
    for (int64_t c = 0; c < wide; ++c) to[k * wide + c] = c < channels ? from[k * channels + c] : 0;
  }
}

/// Rounds accumulated gradients into the result, or back to the store until the last chunk.
template <class Io, class Acc>
void save_gradient(
    const Acc* from, int64_t keys, int64_t channels, Acc factor, Acc* store, Io* result) {
  const int64_t wide = padded<Acc>(channels);
  for (int64_t k = 0; k < keys; ++k) {
    for (int64_t c = 0; c < channels; ++c) {
      if (store) {
        store[k * channels + c] = from[k * wide + c];
      } else {
        result[k * channels + c] = Round<Io>::from(from[k * wide + c] * factor);
      }
    }
  }
}

/// The item's copy of a panel's [channels + 1][lanes] query gradients.
template <class Acc>
Acc* panel_part(const BackwardWork& work, int side, int64_t unit, int64_t split, int64_t panel) {
  const auto& split_work = work.source[side];
  const int64_t panels = panels_for<Acc>(split_work.unit_rows);
  const int64_t number = (unit * split_work.key_splits + split) * panels + panel;
  return static_cast<Acc*>(work.part[side]) +
         number * (work.problem.channels + 1) * kPanelLanes<Acc>;
}

/// Keys [first, first + keys) of an item, at most tiles.group, past all rows of the unit.
template <class Io>
void backward_group(
    const BackwardWork& work, int side, int64_t unit, int64_t split, int64_t first, int64_t keys,
    BackwardScratch<Io>& scratch) {
  using M = Multiply<Io>;
  using Acc = typename M::Acc;
  const auto& p = work.problem;
  const auto& source = p.source[side];
  const auto head = wave_key_head(work, source, unit);
  const int64_t wide = padded<Acc>(p.channels), value_wide = padded<Acc>(p.value_channels);
  const bool want_key = work.key_gradients && work.grad_key[side];
  const bool want_value = work.key_gradients && work.grad_value[side];
  auto* key_store = stored<Acc>(work, source, work.key_store[side], head, first, p.channels);
  auto* value_store =
      stored<Acc>(work, source, work.value_store[side], head, first, p.value_channels);
  if (want_key) {
    load_gradient(work.first_chunk ? nullptr : key_store, keys, p.channels, scratch.key_gradient);
  }
  if (want_value) {
    load_gradient(
        work.first_chunk ? nullptr : value_store, keys, p.value_channels, scratch.value_gradient);
  }
  const auto key_data = key_rows<Io>(source.key, head);
  const auto value_data = key_rows<Io>(source.value, head);
  const int64_t unit_rows = work.source[side].unit_rows, panels = panels_for<Acc>(unit_rows);
  for (int64_t i = 0; i < panels; ++i) {
    const auto range = panel_rows<Acc>(unit_rows, panels, i);
    const auto position_of = [&](int64_t lane) {
      return position(p, source, work.chunk, unit_of(p, source, head), range.first + lane);
    };
    if (source.causal) {  // the last row of the panel reads furthest
      const auto last = position_of(range.count - 1);
      if (source.keys - p.rows + last.query + 1 <= first) continue;
    }
    auto& panel = *scratch.panel;
    start_backward_panel<Io>(
        p, work.inputs, side, work.chunk, work.delta[side], range.count, position_of, scratch);
    Acc* part = work.query_gradients ? panel_part<Acc>(work, side, unit, split, i) : nullptr;
    for (int64_t done = 0; done < keys; done += work.tiles.keys) {
      KeyBlock block{first + done, smaller(work.tiles.keys, keys - done), {}, {}, {}};
      if (panel.rows.most <= block.first) break;
      block.keys = smaller(block.keys, panel.rows.most - block.first);
      const auto bias = bias_of(source, panel.rows, block.first, block.keys, scratch.bias);
      if (bias.nothing_readable) continue;
      block.key = by_channel<M>(key_data.from(block.first), block.keys, p.channels, scratch.key);
      block.value =
          by_channel<M>(value_data.from(block.first), block.keys, p.value_channels, scratch.value);
      if (part) {
        if constexpr (M::steps == 1) {
          block.key_columns = {block.key.data, {block.key.strides.step, block.key.strides.row}};
        } else {
          block.key_columns =
              by_key<M>(key_data.from(block.first), block.keys, p.channels, scratch.key_columns);
        }
      }
      with_vectors(panel.rows.vectors(), [&]<int vectors>() {
        backward_block<Io, vectors>(
            p, bias, block, scratch, want_key ? scratch.key_gradient + done * wide : nullptr,
            want_value ? scratch.value_gradient + done * value_wide : nullptr, part);
      });
    }
  }
  const auto result = [&](void* gradient, int64_t channels) {
    return static_cast<Io*>(gradient) + (unit_of(p, source, head) * source.keys + first) * channels;
  };
  const auto slope = static_cast<Acc>(DotKernel{p.scale}.slope());
  if (want_key) {
    save_gradient<Io, Acc>(
        scratch.key_gradient, keys, p.channels, slope, work.last_chunk ? nullptr : key_store,
        result(work.grad_key[side], p.channels));
  }
  if (want_value) {
    save_gradient<Io, Acc>(
        scratch.value_gradient, keys, p.value_channels, Acc{1},
        work.last_chunk ? nullptr : value_store, result(work.grad_value[side], p.value_channels));
  }
}

/// All of one split of a unit's keys.
template <class Io>
void backward_panels(const BackwardWork& work, int side, int64_t number, void* memory) {
  using Acc = typename Multiply<Io>::Acc;
  const auto& split_work = work.source[side];
  const auto& source = work.problem.source[side];
  Arena arena{static_cast<char*>(memory)};
  BackwardScratch<Io> scratch(work.problem, work.tiles, arena);
  const int64_t unit = number / split_work.key_splits, split = number % split_work.key_splits;
  if (work.query_gradients) {
    const int64_t panels = panels_for<Acc>(split_work.unit_rows);
    const int64_t size = panels * (work.problem.channels + 1) * kPanelLanes<Acc>;
    auto* part = panel_part<Acc>(work, side, unit, split, 0);
    for (int64_t i = 0; i < size; ++i) part[i] = 0;
  }
  const int64_t begin = split * split_work.key_split;
  const int64_t end = smaller(source.keys, begin + split_work.key_split);
  for (int64_t first = begin; first < end; first += work.tiles.group) {
    backward_group<Io>(
        work, side, unit, split, first, smaller(work.tiles.group, end - first), scratch);
  }
}

/// Adds what one source gives to a row's query gradient; returns its row sum of dS.
template <class Acc>
Acc gather_part(const BackwardWork& work, int side, const Position& at_row, Acc* sum) {
  const auto& p = work.problem;
  const auto& source = p.source[side];
  if (source.keys == 0) return 0;
  if (source.indexed) {
    const Acc* part = static_cast<const Acc*>(work.part[side]) +
                      chunk_row(p, work.chunk, at_row) * (p.channels + 1);
    for (int64_t c = 0; c < p.channels; ++c) sum[c] += part[c];
    return part[p.channels];
  }
  const int64_t query = at_row.query - work.chunk.first_row, group = at_row.head % p.groups;
  const int64_t row =
      ((source.shared ? at_row.batch * work.chunk.rows : 0) + query) * p.groups + group;
  const int64_t unit = wave_unit(work, source, {at_row.batch, at_row.head / p.groups});
  const int64_t unit_rows = work.source[side].unit_rows, panels = panels_for<Acc>(unit_rows);
  const int64_t vectors = divide_up(unit_rows, kLanes<Acc>), vector = row / kLanes<Acc>;
  const int64_t panel = ((vector + 1) * panels - 1) / vectors;
  const auto range = panel_rows<Acc>(unit_rows, panels, panel);
  const int64_t lanes = divide_up(range.count, kLanes<Acc>) * kLanes<Acc>;
  Acc row_sum = 0;
  for (int64_t split = 0; split < work.source[side].key_splits; ++split) {
    const Acc* part = panel_part<Acc>(work, side, unit, split, panel) + row - range.first;
    for (int64_t c = 0; c < p.channels; ++c) sum[c] += part[c * lanes];
    row_sum += part[p.channels * lanes];
  }
  return row_sum;
}

/// Sums splits and sources into the query gradients of rows [first, last) of the wave.
template <class Io>
void backward_reduce(const BackwardWork& work, int64_t first, int64_t last, void* memory) {
  using Acc = typename Multiply<Io>::Acc;
  const auto& p = work.problem;
  auto* sum = static_cast<Acc*>(memory);
  const auto slope = static_cast<Acc>(DotKernel{p.scale}.slope());
  for (int64_t number = first; number < last; ++number) {
    const auto at_row = wave_position(work, number);
    for (int64_t c = 0; c < p.channels; ++c) sum[c] = 0;
    const Acc self_sum = gather_part(work, 0, at_row, sum);
    const Acc memory_sum = gather_part(work, 1, at_row, sum);
    const int64_t global = global_row(p, at_row);
    if (work.grad_query) {
      auto* to = static_cast<Io*>(work.grad_query) + global * p.channels;
      for (int64_t c = 0; c < p.channels; ++c) to[c] = Round<Io>::from(sum[c] * slope);
    }
    if (work.row_mix) {
      // Each side's sum of dS without what arrived at its log-sum-exp is w <dO, A - O>; taken
      // together so that a rounding of delta cancels. A weight of 0 or 1 gives exactly 0.
      const auto row = row_mix<Io>(p, work.inputs, at_row);
      const auto arrived = [&](int s) {
        return *at<Acc>(work.inputs.grad_lse[s], at_row.batch, at_row.head, at_row.query);
      };
      const Acc self = row.weight[1] * (self_sum - arrived(0));
      const Acc memory = row.weight[0] * (memory_sum - arrived(1));
      const bool moves = row.weight[0] != 0 && row.weight[1] != 0;
      static_cast<Acc*>(work.row_mix)[global] = moves ? memory - self : Acc{0};
    }
  }
}

}  // namespace
}  // namespace mixhead::cpu
