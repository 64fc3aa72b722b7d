#pragma once
// Gradients of what may be broadcast: each item owns some places of mix or of a mask and sums all
// that reaches them.
#include "cpu/backward-inl.h"

namespace mixhead::cpu {
namespace {

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
