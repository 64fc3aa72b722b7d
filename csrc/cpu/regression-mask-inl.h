#pragma once
// The gradient of kernel regression's additive mask, which may broadcast over anything.
#include "cpu/broadcast-gradients-inl.h"
#include "cpu/regression-backward-inl.h"

namespace mixhead::cpu {
namespace {

template <class Acc>
int64_t regression_mask_items(const RegressionMask& work) {
  const auto& p = work.backward.regression.problem;
  return work.batch_groups * work.head_groups *
         (work.row_groups > 1 ? divide_up(p.rows, kPanelLanes<Acc>) : 1) *
         (work.key_groups > 1 ? divide_up(p.source[0].keys, work.backward.block_keys) : 1);
}

/// sum[key][lane] += A g of one panel and one block.
template <class Acc>
void add_mask_gradient(
    const RegressionBackward& work, const Points<Acc>& points, const KernelLoops<Acc>& loops,
    const KeyHead& head, int64_t first, bool each_key, bool each_row, GradientScratch<Acc>& scratch,
    Acc* sum) {
  const auto& r = work.regression;
  const auto& p = r.problem;
  const int64_t keys = smaller(work.block_keys, p.source[0].keys - first);
  const auto& rows = scratch.queries.rows;
  const auto bias = pair_bias(r, scratch.queries, first, keys, scratch.bias);
  if (bias.nothing_readable) return;
  place_keys(points, r, head, first, keys, scratch.keys);
  read_values(r, head, first, keys, scratch.values);
  with_vectors(rows.vectors(), [&]<int vectors>() {
    constexpr int64_t width = vectors * kLanes<Acc>, size = sizeof(Acc);
    similarities<Acc, vectors>(points, scratch.queries, scratch.keys, keys, scratch.scores);
    gemm<Plain<Acc>, vectors>(
        keys, p.value_channels, scratch.values, {p.value_channels * size, size}, scratch.grad,
        width, scratch.gradients, width);
  });
  const PairBlock<Acc> block{&rows,      &p.dropout,  first,         keys,
                             rows.lanes, bias.values, scratch.scores};
  loops.differentiate_mask(
      block, {scratch.lse, scratch.inverse_mass, scratch.delta, scratch.share, scratch.gradients,
              scratch.row_sums, nullptr});
  for (int64_t key = 0; key < keys; ++key) {
    for (int64_t lane = 0; lane < rows.count; ++lane) {
      sum[(each_key ? key * kPanelLanes<Acc> : 0) + (each_row ? lane : 0)] +=
          scratch.gradients[key * rows.lanes + lane];
    }
  }
}

/// One place of the gradient: (batch, head), a panel of rows or all, a block of keys or all.
template <class Acc>
void regression_mask(const RegressionMask& work, int64_t number, void* memory) {
  constexpr int64_t lanes = kPanelLanes<Acc>;
  const auto& back = work.backward;
  const auto& r = back.regression;
  const auto& p = r.problem;
  const auto& source = p.source[0];
  Arena arena{static_cast<char*>(memory)};
  GradientScratch<Acc> scratch(back, arena);
  auto* sum = arena.take<Acc>(back.block_keys * lanes);
  for (int64_t i = 0; i < back.block_keys * lanes; ++i) sum[i] = 0;
  const bool each_row = work.row_groups > 1, each_key = work.key_groups > 1;
  const int64_t row_panels = divide_up(p.rows, lanes);
  const int64_t key_blocks = divide_up(source.keys, back.block_keys);
  const int64_t key_items = each_key ? key_blocks : 1, row_items = each_row ? row_panels : 1;
  const int64_t key_item = number % key_items, row_item = number / key_items % row_items;
  const int64_t rest = number / key_items / row_items, heads = p.key_heads * p.groups;
  const auto all = reach(
      work.first_batch, rest / work.head_groups, work.head_groups, rest % work.head_groups, heads,
      work.row_groups, row_item, row_panels);
  for (int64_t b = all.batch_begin; b < all.batch_end; ++b) {
    const int64_t batch = work.batches[b];
    for (int64_t head = all.head_begin; head < all.head_end; ++head) {
      const KeyHead key_of{source.shared ? 0 : batch, head / p.groups};
      const int64_t key_unit = key_of.batch * p.key_heads + key_of.head;
      const auto points = points_of<Acc>(r, head, key_unit);
      const auto loops = loops_of<Acc>(r.kernel[head], true);
      for (int64_t panel = all.row_begin; panel < all.row_end; ++panel) {
        const auto position_of = [&](int64_t lane) {
          return Position{batch, head, panel * lanes + lane};
        };
        start_gradients(back, points, smaller(lanes, p.rows - panel * lanes), position_of, scratch);
        for (int64_t k = each_key ? key_item : 0; k < (each_key ? key_item + 1 : key_blocks); ++k) {
          add_mask_gradient(
              back, points, loops, key_of, k * back.block_keys, each_key, each_row, scratch, sum);
        }
      }
    }
  }
  const int64_t first_row = each_row ? row_item * lanes : 0;
  const int64_t rows = each_row ? smaller(lanes, p.rows - first_row) : 1;
  const int64_t first_key = each_key ? key_item * back.block_keys : 0;
  const int64_t keys = each_key ? smaller(back.block_keys, source.keys - first_key) : 1;
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
