#pragma once
// What the forward keeps of each panel of rows.
#include "cpu/panel-inl.h"

namespace mixhead::cpu {
namespace {

template <class M>
struct ForwardPanel {
  using Acc = typename M::Acc;
  Rows<Acc> rows;
  typename M::Operand* query;  // [steps][lanes], or [steps / 2][2 lanes of each row] where paired
  Acc* output;  // [value_channels][lanes], or [rows][value_channels], relative to the maximum
  bool paired, by_row;
  Acc* highest;  // running maximum of the scores
  Acc* sum;
};

template <class Io>
struct ForwardScratch {
  using M = Multiply<Io>;
  using Acc = typename M::Acc;
  ForwardPanel<M>* panels;
  Acc* scores;
  Acc* bias;
  void* key;
  void* value;

  ForwardScratch(const ForwardWork& work, const SourceWork& split, Arena& arena) {
    const auto& p = work.problem;
    const int64_t lanes =
        smaller(kPanelLanes<Acc>, divide_up(split.row_block, kLanes<Acc>) * kLanes<Acc>);
    const int64_t count = panels_for<Acc>(split.row_block), keys = work.tiles.keys;
    panels = arena.take<ForwardPanel<M>>(count);
    scores = arena.take<Acc>(keys * lanes);
    bias = arena.take<Acc>(keys * lanes);
    key = arena.take<Acc>(packed_elements(keys, p.channels));
    value = arena.take<Acc>(packed_elements(keys, p.value_channels));
    operands_ = arena.take<typename M::Operand>(count * divide_up(p.channels, M::steps) * lanes);
    results_ = arena.take<Acc>(count * (p.value_channels + 2) * lanes);
  }

  void place(const Problem& p, int64_t panel, int64_t lanes) {
    auto& at = panels[panel];
    at.query = operands_ + panel * divide_up(p.channels, M::steps) * lanes;
    at.output = results_ + panel * (p.value_channels + 2) * lanes;
    at.highest = at.output + p.value_channels * lanes;
    at.sum = at.highest + lanes;
  }

 private:
  typename M::Operand* operands_;
  Acc* results_;
};

}  // namespace
}  // namespace mixhead::cpu
