#pragma once
// The streaming algorithm, written once: the table of kernels for the instruction set at hand.
#include "cpu/broadcast-gradients-inl.h"
#include "cpu/rows-backward-inl.h"

namespace mixhead::cpu {
namespace {

template <class Io>
void forward_item(const ForwardWork& work, int64_t number, void* scratch) {
  const int side = number >= work.source[1].first_item;
  const auto& source = work.problem.source[side];
  const auto& split = work.source[side];
  const auto item = forward_item_of(source, split, number - split.first_item);
  if (source.indexed) {
    forward_indexed<Io>(work, side, item, scratch);
  } else if (split.few_rows) {
    forward_few<Io>(work, side, item, scratch);
  } else {
    forward_panels<Io>(work, side, item, scratch);
  }
}

template <class Io>
int64_t forward_scratch(const ForwardWork& work) {
  int64_t most = row_scratch(work.problem);
  for (int side = 0; side < 2; ++side) {
    const auto& split = work.source[side];
    if (work.problem.source[side].indexed || split.few_rows) continue;
    Arena arena{nullptr};
    ForwardScratch<Io> measure(work, split, arena);
    most = larger(most, reinterpret_cast<intptr_t>(arena.next));
  }
  return most;
}

template <class Io>
void backward_item(const BackwardWork& work, int64_t number, void* scratch) {
  const int side = number >= work.source[1].first_item;
  number -= work.source[side].first_item;
  if (work.problem.source[side].indexed) {
    backward_named<Io>(work, side, number, scratch);
  } else {
    backward_panels<Io>(work, side, number, scratch);
  }
}

template <class Io>
int64_t backward_scratch(const BackwardWork& work) {
  using Acc = typename Multiply<Io>::Acc;
  const auto& p = work.problem;
  Arena arena{nullptr};
  BackwardScratch<Io> measure(p, work.tiles, arena);
  int64_t most = reinterpret_cast<intptr_t>(arena.next);
  if (p.source[1].indexed) {
    Arena named{nullptr};
    NamedScratch<Acc> measure_named(p, named);
    const int64_t slots = work.source[1].key_split;
    named.take<Acc>(slots * p.channels);
    named.take<Acc>(slots * p.value_channels);
    most = larger(most, reinterpret_cast<intptr_t>(named.next));
  }
  return most;
}

template <class Io>
int64_t mask_gradient_items(const MaskGradientWork& work) {
  const auto& p = work.problem;
  const auto& source = p.source[work.source];
  const int64_t places = work.batch_groups * work.head_groups;
  if (source.indexed) return places * work.row_groups;
  const int64_t row_panels = divide_up(p.rows, kPanelLanes<typename Multiply<Io>::Acc>);
  return places * (work.row_groups > 1 ? row_panels : 1) *
         (work.key_groups > 1 ? divide_up(source.keys, work.tiles.keys) : 1);
}

template <class Io>
int64_t mask_gradient_scratch(const MaskGradientWork& work) {
  using Acc = typename Multiply<Io>::Acc;
  const auto& p = work.problem;
  Arena arena{nullptr};
  if (p.source[work.source].indexed) {
    NamedScratch<Acc> measure(p, arena);
    arena.take<Acc>(p.source[work.source].slots);
  } else {
    BackwardScratch<Io> measure(p, work.tiles, arena);
    arena.take<Acc>(work.tiles.keys * kPanelLanes<Acc>);
  }
  return reinterpret_cast<intptr_t>(arena.next);
}

template <class Io>
void mask_gradient_item(const MaskGradientWork& work, int64_t number, void* scratch) {
  if (work.problem.source[work.source].indexed) {
    named_mask_gradient<Io>(work, number, scratch);
  } else {
    panel_mask_gradient<Io>(work, number, scratch);
  }
}

template <class Io>
Kernels table(const char* isa) {
  using Acc = typename Multiply<Io>::Acc;
  return {
      .isa = isa,
      .accumulator_bytes = sizeof(Acc),
      .lanes = kLanes<Acc>,
      .panel_lanes = kPanelLanes<Acc>,
      .few_rows = kFewRows,
      .forward_scratch = forward_scratch<Io>,
      .forward_item = forward_item<Io>,
      .combine = combine<Io>,
      .backward_scratch = backward_scratch<Io>,
      .backward_prepare = backward_prepare<Io>,
      .backward_item = backward_item<Io>,
      .backward_reduce = backward_reduce<Io>,
      .mask_gradient_items = mask_gradient_items<Io>,
      .mask_gradient_scratch = mask_gradient_scratch<Io>,
      .mask_gradient_item = mask_gradient_item<Io>,
      .mix_gradient_item = mix_gradient_item<Io>,
  };
}

inline const Kernels& kernels_named(const char* isa, Type type) {
  static const Kernels tables[] = {
      table<float>(isa), table<double>(isa), table<BFloat16>(isa), table<Float16>(isa)};
  return tables[static_cast<int>(type)];
}

}  // namespace
}  // namespace mixhead::cpu
