#pragma once
// Kernel regression: the table of functions for the instruction set at hand.
#include "cpu/local-gradient-inl.h"
#include "cpu/nearest-inl.h"
#include "cpu/regression-forward-inl.h"
#include "cpu/regression-mask-inl.h"

namespace mixhead::cpu {
namespace {

template <class Acc>
constexpr RegressionKernels kRegression{
    .accumulator_bytes = sizeof(Acc),
    .lanes = kLanes<Acc>,
    .panel_lanes = kPanelLanes<Acc>,
    .summarise_scratch = summarise_scratch,
    .summarise = summarise<Acc>,
    .forward_scratch = regression_forward_scratch<Acc>,
    .forward_item = regression_forward<Acc>,
    .merge = regression_merge<Acc>,
    .nearest_scratch = nearest_scratch<Acc>,
    .nearest_item = find_nearest<Acc>,
    .backward_scratch = regression_backward_scratch<Acc>,
    .backward_item = regression_backward<Acc>,
    .reduce = regression_reduce<Acc>,
    .mask_items = regression_mask_items<Acc>,
    .mask_item = regression_mask<Acc>,
    .local_moments_scratch = local_moments_scratch<Acc>,
    .local_moments_item = local_moments<Acc>,
    .local_gradient_scratch = local_gradient_scratch<Acc>,
    .local_gradient_item = local_gradient<Acc>,
};

inline const RegressionKernels& regression_table(Type type) {
  return type == Type::float64 ? kRegression<double> : kRegression<float>;
}

}  // namespace
}  // namespace mixhead::cpu
