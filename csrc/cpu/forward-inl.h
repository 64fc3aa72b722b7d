#pragma once
// The forward: each item streams its keys past its panels of rows; combine merges splits and
// sources.
#include "cpu/decode-inl.h"

namespace mixhead::cpu {
namespace {

struct ForwardItem {
  int64_t unit, first_row, rows, first_key, keys, split;
};

inline ForwardItem forward_item_of(const Source& source, const SourceWork& work, int64_t item) {
  const int64_t split = item % work.key_splits, rest = item / work.key_splits;
  const int64_t row = rest % work.row_blocks * work.row_block, key = split * work.key_split;
  return {
      rest / work.row_blocks,
      row,
      smaller(work.row_block, work.unit_rows - row),
      key,
      larger(0, smaller(work.key_split, source.keys - key)),
      split};
}

/// Scores become weights relative to the running maximum, in the layout of the second product.
template <class M, int vectors>
void weigh(
    const Problem& problem, ForwardPanel<M>& panel, int64_t first, int64_t keys,
    typename M::Acc* scores, typename M::Acc* alpha) {
  using Acc = typename M::Acc;
  using V = Vector<Acc>;
  constexpr int lanes = kLanes<Acc>, width = vectors * lanes;
  V highest[vectors], sum[vectors];
#pragma GCC unroll 4
  for (int j = 0; j < vectors; ++j) {
    const V top = load<Acc>(panel.highest + j * lanes);
    highest[j] = top == -kInfinity<Acc> ? V{} : top;
    sum[j] = V{};
  }
  // The sum is over unscaled weights, four at a time: a shorter chain rounds less.
  const auto weight = [&](int64_t k, int j, V& total) __attribute__((always_inline)) {
    V w = exp<Acc>(load<Acc>(scores + k * width + j * lanes) - highest[j]);
    total += w;
    if (problem.dropout.on) {
      w *= dropout_factor(problem.dropout, panel.rows, first + k, j * lanes);
    }
    return w;
  };
  if constexpr (M::steps == 1) {
    const auto group = [&]<int size>(int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        V total{};
#pragma GCC unroll 4
        for (int i = 0; i < size; ++i) {
          store(scores + (k + i) * width + j * lanes, weight(k + i, j, total));
        }
        sum[j] += total;
      }
    };
    int64_t k = 0;
    for (; k + 4 <= keys; k += 4) group.template operator()<4>(k);
    for (; k < keys; ++k) group.template operator()<1>(k);
  }
#if defined(__AVX512BF16__)
  if constexpr (M::steps == 2) {
    // Row k/2 of pairs overwrites scores already read.
    for (int64_t k = 0; k < keys; k += 2) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        V total{};
        const V even = weight(k, j, total), odd = k + 1 < keys ? weight(k + 1, j, total) : V{};
        sum[j] += total;
        store(scores + k / 2 * width + j * lanes, pair_rows(even, odd));
      }
    }
  }
#endif
#pragma GCC unroll 4
  for (int j = 0; j < vectors; ++j) {
    Acc* at = panel.sum + j * lanes;
    store(at, load<Acc>(at) * load<Acc>(alpha + j * lanes) + sum[j]);
  }
}

/// Few rows, whose outputs lie by row: the values' channels along the lanes.
template <class M>
void add_values_by_row(
    const Problem& problem, ForwardPanel<M>& panel, int64_t keys, const Broadcast& value,
    const typename M::Acc* weights, const typename M::Acc* alpha) {
  using Operand = typename M::Operand;
  constexpr int64_t size = sizeof(Operand);
  const int64_t channels = problem.value_channels, lanes = panel.rows.lanes;
  for (int64_t row = 0; row < panel.rows.count; ++row) {
    auto* out = panel.output + row * channels;
    for (int64_t c = 0; c < channels; ++c) out[c] *= alpha[row];
  }
  gemm_wide<M>(
      panel.rows.count, channels, divide_up(keys, M::steps), weights, {size, lanes * size},
      static_cast<const Operand*>(value.data), value.strides.step / size, panel.output, channels,
      Update::add);
}

/// The products of a block's keys with a panel's queries.
template <class M, int vectors>
void multiply_queries(
    const Problem& problem, const ForwardPanel<M>& panel, int64_t keys, const Broadcast& key,
    typename M::Acc* products) {
  constexpr int64_t width = vectors * kLanes<typename M::Acc>;
#if defined(__AVX512F__)
  if constexpr (kCanPair<M> && vectors == 1) {
    if (panel.paired) {
      multiply_paired(problem, panel, keys, key, products, {});
      for (int64_t k = 0; k < keys; ++k) {
        const auto pairs = load<float>(products + k * width);
        store(products + k * width, fold_pairs(pairs, pairs));
      }
      return;
    }
  }
#endif
  gemm<M, vectors>(
      keys, divide_up(problem.channels, M::steps), key.data, key.strides, panel.query, width,
      products, width);
}

/// One key block past one panel.
template <class M, int vectors>
void forward_block(
    const Problem& problem, ForwardPanel<M>& panel, const Bias<typename M::Acc>& bias,
    int64_t first, int64_t keys, const Broadcast& key, const Broadcast& value,
    typename M::Acc* scores) {
  using Acc = typename M::Acc;
  using V = Vector<Acc>;
  constexpr int lanes = kLanes<Acc>, width = vectors * lanes;
  multiply_queries<M, vectors>(problem, panel, keys, key, scores);

  V highest[vectors];
#pragma GCC unroll 4
  for (int j = 0; j < vectors; ++j) highest[j] = load<Acc>(panel.highest + j * lanes);
  const auto factor = static_cast<Acc>(DotKernel{problem.scale}.factor());
  for_each_score<Acc, vectors>(
      panel.rows, bias, first, keys, factor, scores,
      [&](int64_t k, int j, V score) __attribute__((always_inline)) {
        highest[j] = max(highest[j], score);
        store(scores + k * width + j * lanes, score);
      });
  alignas(64) Acc alpha[width];
#pragma GCC unroll 4
  for (int j = 0; j < vectors; ++j) {
    const V before = load<Acc>(panel.highest + j * lanes);
    const V now = highest[j] == -kInfinity<Acc> ? V{} : highest[j];
    store(alpha + j * lanes, exp<Acc>(before - now));
    store(panel.highest + j * lanes, highest[j]);
  }

  weigh<M, vectors>(problem, panel, first, keys, scores, alpha);
  if (panel.by_row) {
    add_values_by_row(problem, panel, keys, value, scores, alpha);
    return;
  }
  gemm<M, vectors>(
      problem.value_channels, divide_up(keys, M::steps), value.data, value.strides,
      reinterpret_cast<const typename M::Operand*>(scores), width, panel.output, width,
      Update::rescale, alpha);
}

/// Normalises a panel and writes its rows to the split's results.
template <class M>
void finish_panel(const ForwardWork& work, int side, int64_t split, const ForwardPanel<M>& panel) {
  using Acc = typename M::Acc;
  const auto& p = work.problem;
  const auto& rows = panel.rows;
  const int64_t all = p.batch * p.key_heads * p.groups * work.chunk.rows;
  for (int lane = 0; lane < rows.count; ++lane) {
    const int64_t row = split * all + chunk_row(p, work.chunk, rows.position[lane]);
    const Acc sum = panel.sum[lane];
    const Acc inverse = sum == 0 ? Acc{0} : 1 / sum;
    auto* out = static_cast<Acc*>(work.part[side]) + row * p.value_channels;
    for (int64_t c = 0; c < p.value_channels; ++c) {
      const int64_t from = panel.by_row ? lane * p.value_channels + c : c * rows.lanes + lane;
      out[c] = panel.output[from] * inverse;
    }
    static_cast<Acc*>(work.part_lse[side])[row] =
        sum == 0 ? -kInfinity<Acc> : panel.highest[lane] + log(sum);
  }
}

/// The next block, where its rows lie one after the other.
template <class Io>
Fetch fetch_of(const KeyRows<Io>& rows, int64_t count, int64_t channels) {
  if (count <= 0 || rows.column != 1 || rows.row != channels) return {};
  return {
      reinterpret_cast<const char*>(rows.data),
      count * channels * static_cast<int64_t>(sizeof(Io))};
}

/// Streams keys [item.first_key, + item.keys) past the panels in `scratch`.
template <class Io>
void stream(
    const ForwardWork& work, const Source& source, const ForwardItem& item, int64_t panels,
    ForwardScratch<Io>& scratch) {
  using M = Multiply<Io>;
  const auto& p = work.problem;
  const auto head = key_head(p, source, item.unit);
  const auto key_data = key_rows<Io>(source.key, head);
  const auto value_data = key_rows<Io>(source.value, head);
  const int64_t last = item.first_key + item.keys;
  for (int64_t first = item.first_key; first < last; first += work.tiles.keys) {
    const int64_t keys = smaller(work.tiles.keys, last - first);
    Broadcast key{}, value{};
    for (int64_t i = 0; i < panels; ++i) {
      auto& panel = scratch.panels[i];
      if (panel.rows.most <= first) continue;
      const int64_t read = smaller(keys, panel.rows.most - first);
      const auto bias = bias_of(source, panel.rows, first, read, scratch.bias);
      if (bias.nothing_readable) continue;
#if defined(__AVX512F__)
      if constexpr (kCanPair<M>) {
        if (decodes<M>(p, panel, bias, first + read)) {
          const int64_t after = first + keys, next = smaller(work.tiles.keys, last - after);
          decode_block<M>(
              p, panel, read, key_data.from(first), value_data.from(first), scratch,
              fetch_of(key_data.from(after), next, p.channels),
              fetch_of(value_data.from(after), next, p.value_channels));
          continue;
        }
      }
#endif
      if (!key.data) {
        key = by_channel<M>(key_data.from(first), keys, p.channels, scratch.key);
        value = by_key<M>(value_data.from(first), keys, p.value_channels, scratch.value);
      }
      with_vectors(panel.rows.vectors(), [&]<int vectors>() {
        forward_block<M, vectors>(p, panel, bias, first, read, key, value, scratch.scores);
      });
    }
  }
}

template <class Io>
void start_panel(
    const ForwardWork& work, const Source& source, const ForwardItem& item, const Range& rows,
    int64_t slot, int64_t lanes, ForwardScratch<Io>& scratch) {
  using M = Multiply<Io>;
  using Acc = typename M::Acc;
  const auto& p = work.problem;
  scratch.place(p, slot, lanes);
  auto& panel = scratch.panels[slot];
  const auto position_of = [&](int64_t lane) {
    return position(p, source, work.chunk, item.unit, item.first_row + rows.first + lane);
  };
  place_rows(p, source, rows.count, position_of, panel.rows);
  const bool half = panel.rows.count <= kLanes<Acc> / 2;
  panel.paired = kCanPair<M> && half && source.key.column == 1 && p.channels % (2 * M::steps) == 0;
  panel.by_row = half && source.value.column == 1 && p.value_channels % kLanes<Acc> == 0;
  pack_lanes<M, Io>(p.query, panel.rows, p.channels, panel.query);
  if (panel.paired) {  // [step][row] becomes [step / 2][row][step % 2]
    pair_steps(panel.query, p.channels / M::steps, panel.rows.count);
  }
  for (int64_t i = 0; i < p.value_channels * panel.rows.lanes; ++i) panel.output[i] = 0;
  for (int64_t i = 0; i < panel.rows.lanes; ++i) {
    panel.highest[i] = -kInfinity<Acc>;
    panel.sum[i] = 0;
  }
}

template <class Io>
void forward_panels(const ForwardWork& work, int side, const ForwardItem& item, void* memory) {
  using Acc = typename Multiply<Io>::Acc;
  const auto& source = work.problem.source[side];
  const auto& split = work.source[side];
  Arena arena{static_cast<char*>(memory)};
  ForwardScratch<Io> scratch(work, split, arena);
  const int64_t lanes =
      smaller(kPanelLanes<Acc>, divide_up(split.row_block, kLanes<Acc>) * kLanes<Acc>);
  const int64_t panels = panels_for<Acc>(item.rows);
  for (int64_t i = 0; i < panels; ++i) {
    start_panel<Io>(work, source, item, panel_rows<Acc>(item.rows, panels, i), i, lanes, scratch);
  }
  stream<Io>(work, source, item, panels, scratch);
  for (int64_t i = 0; i < panels; ++i) {
    finish_panel(work, side, item.split, scratch.panels[i]);
  }
}

/// Merges the splits of one row into the first split's place; returns the log-sum-exp.
template <class Acc>
Acc merge_splits(Acc* output, Acc* lse, int64_t splits, int64_t all, int64_t channels) {
  if (splits == 1) return *lse;
  Acc highest = -kInfinity<Acc>, sum = 0;
  for (int64_t s = 0; s < splits; ++s) {
    const Acc each = lse[s * all];
    highest = each > highest || each != each ? each : highest;
  }
  if (highest == -kInfinity<Acc>) return highest;
  const auto weight = [&](int64_t s) { return exp<Acc>(broadcast(lse[s * all] - highest))[0]; };
  for (int64_t s = 0; s < splits; ++s) sum += weight(s);
  for (int64_t s = 0; s < splits; ++s) {
    const Acc share = weight(s) / sum;
    const Acc* each = output + s * all * channels;
    if (s == 0) {
      for (int64_t c = 0; c < channels; ++c) output[c] *= share;
    } else {
      for (int64_t c = 0; c < channels; ++c) output[c] += share * each[c];
    }
  }
  return highest + log(sum);
}

/// The memory's weight in a row with these log-sum-exps.
template <class Acc>
Acc memory_weight(const Problem& problem, double mix, Acc self_lse, Acc memory_lse) {
  if (memory_lse == -kInfinity<Acc>) return 0;
  if (self_lse == -kInfinity<Acc>) return 1;
  const Acc logit = static_cast<Acc>(mix) + (problem.joint ? memory_lse - self_lse : Acc{0});
  return sigmoid(logit);
}

template <class Io, class Acc>
void round_row(const Acc* from, int64_t count, Io* to) {
  for (int64_t c = 0; c < count; ++c) to[c] = Round<Io>::from(from[c]);
}

/// Rows [first, last) of the chunk: splits merged, sources mixed, results rounded.
template <class Io>
void combine(const ForwardWork& work, int64_t first, int64_t last) {
  using Acc = typename Multiply<Io>::Acc;
  const auto& p = work.problem;
  const int64_t heads = p.key_heads * p.groups, channels = p.value_channels;
  const int64_t all = p.batch * heads * work.chunk.rows;
  for (int64_t row = first; row < last; ++row) {
    const int64_t outer = row / work.chunk.rows;
    const Position at{outer / heads, outer % heads, work.chunk.first_row + row % work.chunk.rows};
    const int64_t global = global_row(p, at);
    Acc* side[2];
    Acc lse[2];
    for (int s = 0; s < 2; ++s) {
      side[s] = static_cast<Acc*>(work.part[s]) + row * channels;
      lse[s] = merge_splits(
          side[s], static_cast<Acc*>(work.part_lse[s]) + row, work.source[s].key_splits, all,
          channels);
      static_cast<Acc*>(work.lse[s])[global] = lse[s];
      if (!p.joint && work.kept_output[s]) {
        round_row(side[s], channels, static_cast<Acc*>(work.kept_output[s]) + global * channels);
      }
    }
    const int64_t mix = offset(p.mix, at.batch, at.head, at.query);
    Io* out = static_cast<Io*>(work.output) + global * channels;
    if (p.mix_per_channel) {
      for (int64_t c = 0; c < channels; ++c) {
        const double logit = load_as(p.mix_type, p.mix.data, mix + c * p.mix.column);
        const Acc w = memory_weight<Acc>(p, logit, lse[0], lse[1]);
        side[0][c] = (1 - w) * side[0][c] + w * side[1][c];
      }
    } else {
      const double logit = load_as(p.mix_type, p.mix.data, mix);
      const Acc w = memory_weight<Acc>(p, logit, lse[0], lse[1]), rest = 1 - w;
      for (int64_t c = 0; c < channels; ++c) side[0][c] = rest * side[0][c] + w * side[1][c];
    }
    if (p.joint && work.kept_output[0]) {
      round_row(side[0], channels, static_cast<Acc*>(work.kept_output[0]) + global * channels);
    }
    round_row(side[0], channels, out);
  }
}

}  // namespace
}  // namespace mixhead::cpu
