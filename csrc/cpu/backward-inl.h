#pragma once
// The backward: weights are recomputed from the log-sum-exp; each item owns the gradients of a
// range of keys and adds to its own copy of the queries' gradients, which reduce sums in a fixed
// order.
//
// With w the source's weight in a row's output and P = exp(S - lse) its attention:
//   delta = w <dO, A> - dlse          (the joint rule: A is the mixed output)
//   dS = P * (w dO V^T - delta),  dV = (w P)^T dO,  dK = dS^T Q,  dQ = dS K
#include "cpu/forward-inl.h"

namespace mixhead::cpu {
namespace {

/// What the row's part of the backward reads.
template <class Acc>
struct RowMix {
  Acc lse[2];
  bool per_channel;
  Acc weight[2];  // of each side, where one for all channels
};

template <class Io>
auto row_mix(const Problem& p, const BackwardInputs& in, const Position& at_row) {
  using Acc = typename Multiply<Io>::Acc;
  RowMix<Acc> row{};
  for (int s = 0; s < 2; ++s) {
    row.lse[s] = *at<Acc>(in.lse[s], at_row.batch, at_row.head, at_row.query);
  }
  row.per_channel = p.mix_per_channel;
  if (!row.per_channel) {
    const double mix =
        load_as(p.mix_type, p.mix.data, offset(p.mix, at_row.batch, at_row.head, at_row.query));
    row.weight[1] = memory_weight<Acc>(p, mix, row.lse[0], row.lse[1]);
    row.weight[0] = 1 - row.weight[1];
  }
  return row;
}

/// The weight of `side` in channel c.
template <class Acc>
Acc channel_weight(const Problem& p, const RowMix<Acc>& row, int64_t mix_row, int side, int64_t c) {
  if (!row.per_channel) return row.weight[side];
  const double mix = load_as(p.mix_type, p.mix.data, mix_row + c * p.mix.column);
  const Acc memory = memory_weight<Acc>(p, mix, row.lse[0], row.lse[1]);
  return side ? memory : 1 - memory;
}

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

template <class M>
struct BackwardPanel {
  using Acc = typename M::Acc;
  using Operand = typename M::Operand;
  Rows<Acc> rows;
  Operand* query;       // [channel steps][lanes]
  Operand* grad;        // [value channel steps][lanes]
  Operand* query_rows;  // [row steps][padded channels]
  Operand* grad_rows;   // [row steps][padded value channels]
  Acc* lse;             // inf where nothing is read
  Acc* delta;
  Acc* weight;  // the source's weight in the row, 1 where grad holds it
};

template <class Acc>
int64_t padded(int64_t channels) {
  return divide_up(channels, kLanes<Acc>) * kLanes<Acc>;
}

template <class Io>
struct BackwardScratch {
  using M = Multiply<Io>;
  using Acc = typename M::Acc;
  using Operand = typename M::Operand;
  BackwardPanel<M>* panel;
  Acc *scores, *gradients, *bias;
  uint16_t *weight_rows, *gradient_rows;  // bfloat16, as the micro-kernels broadcast them
  Operand* gradient_pairs;
  void *key, *key_columns, *value;
  Acc *key_gradient, *value_gradient;
  Acc* row_gradient;  // dO of one row, weighted

  BackwardScratch(const Problem& p, const Tiles& tiles, Arena& arena) {
    constexpr int64_t lanes = kPanelLanes<Acc>;
    const int64_t keys = tiles.keys, wide = padded<Acc>(p.channels),
                  value_wide = padded<Acc>(p.value_channels);
    panel = arena.take<BackwardPanel<M>>(1);
    scores = arena.take<Acc>(keys * lanes);
    gradients = arena.take<Acc>(keys * lanes);
    bias = arena.take<Acc>(keys * lanes);
    key = arena.take<Acc>(packed_elements(keys, p.channels));
    key_columns = arena.take<Acc>(packed_elements(keys, p.channels));
    value = arena.take<Acc>(packed_elements(keys, p.value_channels));
    key_gradient = arena.take<Acc>(tiles.group * wide);
    value_gradient = arena.take<Acc>(tiles.group * value_wide);
    row_gradient = arena.take<Acc>(p.value_channels);
    weight_rows = gradient_rows = nullptr;
    gradient_pairs = nullptr;
    if constexpr (M::steps == 2) {
      weight_rows = arena.take<uint16_t>(keys * lanes);
      gradient_rows = arena.take<uint16_t>(keys * lanes);
      gradient_pairs = arena.take<Operand>((keys + 1) / 2 * lanes);
    }
    queries_ = arena.take<Operand>(divide_up(p.channels, M::steps) * lanes);
    grads_ = arena.take<Operand>(divide_up(p.value_channels, M::steps) * lanes);
    query_rows_ = arena.take<Operand>(lanes / M::steps * wide);
    grad_rows_ = arena.take<Operand>(lanes / M::steps * value_wide);
    per_lane_ = arena.take<Acc>(3 * lanes);
  }

  void place() {
    constexpr int64_t lanes = kPanelLanes<Acc>;
    panel->query = queries_;
    panel->grad = grads_;
    panel->query_rows = query_rows_;
    panel->grad_rows = grad_rows_;
    panel->lse = per_lane_;
    panel->delta = per_lane_ + lanes;
    panel->weight = per_lane_ + 2 * lanes;
  }

 private:
  Operand *queries_, *grads_, *query_rows_, *grad_rows_;
  Acc* per_lane_;
};

/// Row `lane` of B operands both ways: lanes along the rows, and along the channels.
template <class M, class T>
void pack_row(
    const T* from, int64_t stride, int64_t channels, int64_t lane, int64_t lanes,
    typename M::Operand* by_lane, typename M::Operand* by_row) {
  using Acc = typename M::Acc;
  const int64_t wide = padded<Acc>(channels);
  if constexpr (M::steps == 1) {
    auto* row = by_row + lane * wide;
    for (int64_t c = 0; c < channels; ++c) {
      const Acc value = to_float(from[c * stride]);
      by_lane[c * lanes + lane] = value;
      row[c] = value;
    }
    for (int64_t c = channels; c < wide; ++c) row[c] = 0;
  } else {
    const auto bits = [&](int64_t c) -> uint32_t {
      if (c >= channels) return 0;
      if constexpr (sizeof(T) == 2) {
        return from[c * stride].bits;
      } else {
        return Round<BFloat16>::from(from[c * stride]).bits;
      }
    };
    for (int64_t c = 0; c < channels; c += 2) {
      by_lane[c / 2 * lanes + lane] = bits(c) | bits(c + 1) << 16;
    }
    auto* row = by_row + lane / 2 * wide;
    if (lane % 2 == 0) {
      for (int64_t c = 0; c < wide; ++c) row[c] = bits(c);
    } else {
      for (int64_t c = 0; c < channels; ++c) row[c] |= bits(c) << 16;
    }
  }
}

/// Fills the scratch's panel with rows whose positions position_of(lane) gives.
template <class Io, class PositionOf>
void start_backward_panel(
    const Problem& p, const BackwardInputs& in, int side, const Chunk& chunk, const void* delta,
    int64_t count, const PositionOf& position_of, BackwardScratch<Io>& scratch) {
  using M = Multiply<Io>;
  using Acc = typename M::Acc;
  scratch.place();
  auto& panel = *scratch.panel;
  auto& rows = panel.rows;
  place_rows(p, p.source[side], count, position_of, rows);
  for (int lane = 0; lane < rows.lanes; ++lane) {
    if (lane >= count) {
      panel.lse[lane] = kInfinity<Acc>;
      panel.delta[lane] = panel.weight[lane] = 0;
      // Rounding the steps up may read one row more than there are.
      const Acc zero = 0;
      pack_row<M, Acc>(&zero, 0, p.channels, lane, rows.lanes, panel.query, panel.query_rows);
      pack_row<M, Acc>(&zero, 0, p.value_channels, lane, rows.lanes, panel.grad, panel.grad_rows);
      continue;
    }
    const auto& at_row = rows.position[lane];
    const auto row = row_mix<Io>(p, in, at_row);
    panel.lse[lane] = row.lse[side] == -kInfinity<Acc> ? kInfinity<Acc> : row.lse[side];
    panel.delta[lane] = static_cast<const Acc*>(delta)[chunk_row(p, chunk, at_row)];
    const Io* query = at<Io>(p.query, at_row.batch, at_row.head, at_row.query);
    pack_row<M>(query, p.query.column, p.channels, lane, rows.lanes, panel.query, panel.query_rows);
    const Io* grad = at<Io>(in.grad_output, at_row.batch, at_row.head, at_row.query);
    if (!row.per_channel) {
      panel.weight[lane] = row.weight[side];
      pack_row<M>(
          grad, in.grad_output.column, p.value_channels, lane, rows.lanes, panel.grad,
          panel.grad_rows);
      continue;
    }
    panel.weight[lane] = 1;
    const int64_t mix_row = offset(p.mix, at_row.batch, at_row.head, at_row.query);
    for (int64_t c = 0; c < p.value_channels; ++c) {
      scratch.row_gradient[c] =
          channel_weight(p, row, mix_row, side, c) * to_float(grad[c * in.grad_output.column]);
    }
    pack_row<M, Acc>(
        scratch.row_gradient, 1, p.value_channels, lane, rows.lanes, panel.grad, panel.grad_rows);
  }
}

struct KeyBlock {
  int64_t first, keys;
  Broadcast key, key_columns, value;
};

/// Recomputes a block's weights and dS. Leaves w P in scratch.scores and dS in scratch.gradients,
/// [key][lane], and adds dS to row_sums.
template <class Io, int vectors>
void recompute(
    const Problem& p, const Bias<typename Multiply<Io>::Acc>& bias, const KeyBlock& block,
    BackwardScratch<Io>& scratch, typename Multiply<Io>::Acc* row_sums) {
  using M = Multiply<Io>;
  using Acc = typename M::Acc;
  using V = Vector<Acc>;
  constexpr int lanes = kLanes<Acc>, width = vectors * lanes;
  auto& panel = *scratch.panel;
  gemm<M, vectors>(
      block.keys, divide_up(p.channels, M::steps), block.key.data, block.key.strides, panel.query,
      width, scratch.scores, width);
  gemm<M, vectors>(
      block.keys, divide_up(p.value_channels, M::steps), block.value.data, block.value.strides,
      panel.grad, width, scratch.gradients, width);
  V lse[vectors], delta[vectors], weight[vectors], sum[vectors];
#pragma GCC unroll 4
  for (int j = 0; j < vectors; ++j) {
    lse[j] = load<Acc>(panel.lse + j * lanes);
    delta[j] = load<Acc>(panel.delta + j * lanes);
    weight[j] = load<Acc>(panel.weight + j * lanes);
    sum[j] = load<Acc>(row_sums + j * lanes);
  }
  const auto factor = static_cast<Acc>(DotKernel{p.scale}.factor());
  for_each_score<Acc, vectors>(
      panel.rows, bias, block.first, block.keys, factor, scratch.scores,
      [&](int64_t k, int j, V score) __attribute__((always_inline)) {
        const int64_t place = k * width + j * lanes;
        const V attention = exp<Acc>(score - lse[j]);
        V share = weight[j];
        if (p.dropout.on) {
          share *= dropout_factor(p.dropout, panel.rows, block.first + k, j * lanes);
        }
        const V gradient = attention * (share * load<Acc>(scratch.gradients + place) - delta[j]);
        sum[j] += gradient;
        store(scratch.scores + place, attention * share);
        store(scratch.gradients + place, gradient);
#if defined(__AVX512BF16__)
        if constexpr (M::steps == 2) {
          _mm256_storeu_si256(
              reinterpret_cast<__m256i*>(scratch.weight_rows + place),
              (__m256i)_mm512_cvtneps_pbh((__m512)(attention * share)));
          _mm256_storeu_si256(
              reinterpret_cast<__m256i*>(scratch.gradient_rows + place),
              (__m256i)_mm512_cvtneps_pbh((__m512)gradient));
        }
#endif
      });
#pragma GCC unroll 4
  for (int j = 0; j < vectors; ++j) store(row_sums + j * lanes, sum[j]);
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

/// The places of a gradient that broadcasts: which batch entries, heads and rows reach each.
struct Reach {
  int64_t batch_begin, batch_end, head_begin, head_end, row_begin, row_end;
};
inline Reach reach(
    const int64_t* first_batch, int64_t batch_group, int64_t head_groups, int64_t head_group,
    int64_t heads, int64_t row_groups, int64_t row_group, int64_t rows) {
  const bool all_heads = head_groups == 1, all_rows = row_groups == 1;
  return {first_batch[batch_group],   first_batch[batch_group + 1],
          all_heads ? 0 : head_group, all_heads ? heads : head_group + 1,
          all_rows ? 0 : row_group,   all_rows ? rows : row_group + 1};
}

/// One place (batch, head, row) of the mix: the sum over every row that it reaches.
///   gate: d mix = w (1 - w) <dO, A_m - A_s>;  joint: the sum of the memory's dS
template <class Io>
void mix_gradient_item(const MixGradientWork& work, int64_t number, void* memory) {
  using Acc = typename Multiply<Io>::Acc;
  const auto& p = work.problem;
  const auto& in = work.inputs;
  const int64_t row_group = number % work.row_groups, rest = number / work.row_groups;
  const int64_t head_group = rest % work.head_groups, batch_group = rest / work.head_groups;
  const int64_t heads = p.key_heads * p.groups;
  const auto all = reach(
      work.first_batch, batch_group, work.head_groups, head_group, heads, work.row_groups,
      row_group, p.rows);
  const int64_t width = p.mix_per_channel ? p.value_channels : 1;
  auto* sum = static_cast<double*>(memory);
  for (int64_t c = 0; c < width; ++c) sum[c] = 0;
  for (int64_t b = all.batch_begin; b < all.batch_end; ++b) {
    const int64_t batch = work.batches[b];
    for (int64_t head = all.head_begin; head < all.head_end; ++head) {
      for (int64_t query = all.row_begin; query < all.row_end; ++query) {
        const Position at_row{batch, head, query};
        if (p.joint) {
          sum[0] += static_cast<const Acc*>(work.row_mix)[global_row(p, at_row)];
          continue;
        }
        const auto row = row_mix<Io>(p, in, at_row);
        if (row.lse[0] == -kInfinity<Acc> || row.lse[1] == -kInfinity<Acc>) continue;
        const int64_t mix_row = offset(p.mix, batch, head, query);
        const Io* grad = at<Io>(in.grad_output, batch, head, query);
        const Acc* self = at<Acc>(in.kept_output[0], batch, head, query);
        const Acc* other = at<Acc>(in.kept_output[1], batch, head, query);
        Acc products = 0;
        for (int64_t c = 0; c < p.value_channels; ++c) {
          const Acc difference =
              other[c * in.kept_output[1].column] - self[c * in.kept_output[0].column];
          const Acc product = difference * to_float(grad[c * in.grad_output.column]);
          if (row.per_channel) {
            const Acc w = channel_weight(p, row, mix_row, 1, c);
            sum[c] += w * (1 - w) * product;
          } else {
            products += product;
          }
        }
        if (!row.per_channel) sum[0] += row.weight[1] * row.weight[0] * products;
      }
    }
  }
  const int64_t first_batch = work.batches[all.batch_begin];
  const int64_t to = offset(work.gradient, first_batch, all.head_begin, all.row_begin);
  for (int64_t c = 0; c < width; ++c) {
    store_as(p.mix_type, work.gradient.data, to + c * work.gradient.column, sum[c]);
  }
}

/// One place of a mask's gradient: (batch, head), a panel of rows or all, a key block or all.
template <class Io>
void panel_mask_gradient(const MaskGradientWork& work, int64_t number, void* memory) {
  using M = Multiply<Io>;
  using Acc = typename M::Acc;
  constexpr int64_t lanes = kPanelLanes<Acc>;
  const auto& p = work.problem;
  const auto& source = p.source[work.source];
  Arena arena{static_cast<char*>(memory)};
  BackwardScratch<Io> scratch(p, work.tiles, arena);
  auto* sum = arena.take<Acc>(work.tiles.keys * lanes);
  const bool each_row = work.row_groups > 1, each_key = work.key_groups > 1;
  const int64_t row_panels = divide_up(p.rows, lanes);
  const int64_t key_blocks = divide_up(source.keys, work.tiles.keys);
  const int64_t key_items = each_key ? key_blocks : 1, row_items = each_row ? row_panels : 1;
  const int64_t key_item = number % key_items, row_item = number / key_items % row_items;
  const int64_t rest = number / key_items / row_items;
  const int64_t head_group = rest % work.head_groups, batch_group = rest / work.head_groups;
  const int64_t heads = p.key_heads * p.groups;
  const auto all =
      reach(work.first_batch, batch_group, work.head_groups, head_group, heads, 1, 0, p.rows);
  for (int64_t i = 0; i < work.tiles.keys * lanes; ++i) sum[i] = 0;
  for (int64_t b = all.batch_begin; b < all.batch_end; ++b) {
    const int64_t batch = work.batches[b];
    for (int64_t head = all.head_begin; head < all.head_end; ++head) {
      const KeyHead key_of{source.shared ? 0 : batch, head / p.groups};
      const auto key_data = key_rows<Io>(source.key, key_of);
      const auto value_data = key_rows<Io>(source.value, key_of);
      for (int64_t panel = each_row ? row_item : 0; panel < (each_row ? row_item + 1 : row_panels);
           ++panel) {
        const int64_t count = smaller(lanes, p.rows - panel * lanes);
        const auto position_of = [&](int64_t lane) {
          return Position{batch, head, panel * lanes + lane};
        };
        start_backward_panel<Io>(
            p, work.inputs, static_cast<int>(work.source), {0, p.rows}, work.delta, count,
            position_of, scratch);
        const auto& rows = scratch.panel->rows;
        for (int64_t k = each_key ? key_item : 0; k < (each_key ? key_item + 1 : key_blocks); ++k) {
          KeyBlock block{
              k * work.tiles.keys,
              smaller(work.tiles.keys, source.keys - k * work.tiles.keys),
              {},
              {},
              {}};
          if (rows.most <= block.first) break;
          const auto bias = bias_of(source, rows, block.first, block.keys, scratch.bias);
          if (bias.nothing_readable) continue;
          block.key =
              by_channel<M>(key_data.from(block.first), block.keys, p.channels, scratch.key);
          block.value = by_channel<M>(
              value_data.from(block.first), block.keys, p.value_channels, scratch.value);
          alignas(64) Acc unused[lanes] = {};
          with_vectors(rows.vectors(), [&]<int vectors>() {
            recompute<Io, vectors>(p, bias, block, scratch, unused);
          });
          for (int64_t key = 0; key < block.keys; ++key) {
            for (int64_t lane = 0; lane < rows.count; ++lane) {
              sum[(each_key ? key * lanes : 0) + (each_row ? lane : 0)] +=
                  scratch.gradients[key * rows.lanes + lane];
            }
          }
        }
      }
    }
  }
  const int64_t first_row = each_row ? row_item * lanes : 0;
  const int64_t rows = each_row ? smaller(lanes, p.rows - first_row) : 1;
  const int64_t first_key = each_key ? key_item * work.tiles.keys : 0;
  const int64_t keys = each_key ? smaller(work.tiles.keys, source.keys - first_key) : 1;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t to =
        offset(work.gradient, work.batches[all.batch_begin], all.head_begin, first_row + row) +
        first_key * work.gradient.column;
    for (int64_t key = 0; key < keys; ++key) {
      store_as(
          source.mask.type, work.gradient.data, to + key * work.gradient.column,
          sum[key * lanes + row]);
    }
  }
}

}  // namespace
}  // namespace mixhead::cpu
