#pragma once

#include <vector>

#include "cpu/regression.h"
#include "cpu/regression_schedule.h"
#include "engine_call.h"
#include "kernel_attention/arguments.h"

namespace mixhead::kernels {

/// The engine's form of one call's arguments; owns what it points to.
class Plain {
 public:
  explicit Plain(const Arguments& args);
  const cpu::Regression& regression() const { return regression_; }
  const cpu::Problem& problem() const { return regression_.problem; }
  const cpu::RegressionKernels& functions() const { return functions_; }
  at::ScalarType accumulator() const { return accumulator_; }
  int64_t rows() const {
    const auto& p = problem();
    return p.batch * p.key_heads * p.groups * p.rows;
  }

  cpu::View view(const Tensor& tensor, int64_t columns) {
    const auto& p = problem();
    return views_.view(tensor, p.key_heads * p.groups, p.rows, columns);
  }
  /// Centres and boxes of the keys, which the items read.
  void summarise(bool parallel) {
    engine::run_items(
        cpu::key_units(problem()), parallel, functions_.summarise_scratch(regression_),
        [&](int64_t unit, void* scratch) { functions_.summarise(regression_, unit, scratch); });
  }

 private:
  engine::Views views_;
  cpu::Regression regression_{};
  at::ScalarType accumulator_;
  const cpu::RegressionKernels& functions_;
  std::vector<Kernel> kernels_;
  Tensor inverse_;
  std::vector<double> precision_;
  at::DataPtr centre_, boxes_;
};

/// The gradient by each head's and channel's bandwidth, (query heads, channels), to the bandwidth's
/// own shape.
void write_bandwidth(std::vector<double>& all, int64_t heads, const Tensor& gradient);

}  // namespace mixhead::kernels
