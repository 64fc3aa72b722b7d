#pragma once
// A panel of rows as the backward reads it, and the weights and dS of a key block past it.
#include "cpu/forward-inl.h"
#include "cpu/transpose-inl.h"

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
  Operand *query_pairs, *grad_pairs;  // bfloat16, [lane][pairs of channels]
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
    gradient_pairs = query_pairs = grad_pairs = nullptr;
    if constexpr (M::steps == 2) {
      weight_rows = arena.take<uint16_t>(keys * lanes);
      gradient_rows = arena.take<uint16_t>(keys * lanes);
      gradient_pairs = arena.take<Operand>((keys + 1) / 2 * lanes);
      query_pairs = arena.take<Operand>(lanes * padded<Acc>(divide_up(p.channels, 2)));
      grad_pairs = arena.take<Operand>(lanes * padded<Acc>(divide_up(p.value_channels, 2)));
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

/// Row `lane` of a B operand that has the channels along the lanes; for pairs instead of `pairs`,
/// [lane][pairs of channels], from which both operands are made.
template <class M, bool contiguous, class T>
void pack_row(
    const T* from, int64_t stride, int64_t channels, int64_t lane, typename M::Operand* by_row,
    typename M::Operand* pairs) {
  using Acc = typename M::Acc;
  const auto element = [&](int64_t c) { return from[contiguous ? c : c * stride]; };
  if constexpr (M::steps == 1) {
    const int64_t wide = padded<Acc>(channels);
    auto* row = by_row + lane * wide;
    for (int64_t c = 0; c < channels; ++c) row[c] = to_float(element(c));
    for (int64_t c = channels; c < wide; ++c) row[c] = 0;
  } else {
    const int64_t wide = 2 * padded<Acc>(divide_up(channels, 2));
    auto* row = reinterpret_cast<BFloat16*>(pairs) + lane * wide;
    for (int64_t c = 0; c < channels; ++c) {
      if constexpr (sizeof(T) == 2) {
        row[c] = element(c);
      } else {
        row[c] = Round<BFloat16>::from(element(c));
      }
    }
    for (int64_t c = channels; c < wide; ++c) row[c].bits = 0;
  }
}

/// The B operands of packed rows: [row steps][padded channels] and [channel steps][lanes].
template <class M>
void pack_operands(
    int64_t lanes, int64_t channels, typename M::Operand* by_row, const typename M::Operand* pairs,
    typename M::Operand* by_lane) {
  using Acc = typename M::Acc;
  const int64_t steps = divide_up(channels, M::steps), wide = padded<Acc>(steps);
#if defined(__AVX512BF16__)
  if constexpr (M::steps == 2) {
    const auto* rows = reinterpret_cast<const BFloat16*>(pairs);
    const int64_t row_wide = padded<Acc>(channels);
    for (int64_t lane = 0; lane < lanes; lane += 2) {
      const auto* even = rows + lane * 2 * wide;
      interleave(even, even + 2 * wide, 1, row_wide, by_row + lane / 2 * row_wide);
    }
  }
#endif
  const auto* from = reinterpret_cast<const Acc*>(M::steps == 1 ? by_row : pairs);
  transpose(from, lanes, wide, steps, reinterpret_cast<Acc*>(by_lane));
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
  const auto pack = [](const auto* from, int64_t stride, int64_t channels, int64_t lane,
                       auto* by_row, auto* pairs) {
    if (stride == 1) {
      pack_row<M, true>(from, stride, channels, lane, by_row, pairs);
    } else {
      pack_row<M, false>(from, stride, channels, lane, by_row, pairs);
    }
  };
  for (int lane = 0; lane < rows.lanes; ++lane) {
    if (lane >= count) {
      panel.lse[lane] = kInfinity<Acc>;
      panel.delta[lane] = panel.weight[lane] = 0;
      // Rounding the steps up may read one row more than there are.
      const Acc zero = 0;
      pack(&zero, 0, p.channels, lane, panel.query_rows, scratch.query_pairs);
      pack(&zero, 0, p.value_channels, lane, panel.grad_rows, scratch.grad_pairs);
      continue;
    }
    const auto& at_row = rows.position[lane];
    const auto row = row_mix<Io>(p, in, at_row);
    panel.lse[lane] = row.lse[side] == -kInfinity<Acc> ? kInfinity<Acc> : row.lse[side];
    panel.delta[lane] = static_cast<const Acc*>(delta)[chunk_row(p, chunk, at_row)];
    const Io* query = at<Io>(p.query, at_row.batch, at_row.head, at_row.query);
    pack(query, p.query.column, p.channels, lane, panel.query_rows, scratch.query_pairs);
    const Io* grad = at<Io>(in.grad_output, at_row.batch, at_row.head, at_row.query);
    if (!row.per_channel) {
      panel.weight[lane] = row.weight[side];
      pack(
          grad, in.grad_output.column, p.value_channels, lane, panel.grad_rows, scratch.grad_pairs);
      continue;
    }
    panel.weight[lane] = 1;
    const int64_t mix_row = offset(p.mix, at_row.batch, at_row.head, at_row.query);
    for (int64_t c = 0; c < p.value_channels; ++c) {
      scratch.row_gradient[c] =
          channel_weight(p, row, mix_row, side, c) * to_float(grad[c * in.grad_output.column]);
    }
    pack(scratch.row_gradient, 1, p.value_channels, lane, panel.grad_rows, scratch.grad_pairs);
  }
  pack_operands<M>(rows.lanes, p.channels, panel.query_rows, scratch.query_pairs, panel.query);
  pack_operands<M>(rows.lanes, p.value_channels, panel.grad_rows, scratch.grad_pairs, panel.grad);
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

}  // namespace
}  // namespace mixhead::cpu
