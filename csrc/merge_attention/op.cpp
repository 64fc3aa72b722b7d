#include "merge_attention/op.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <limits>

#include "checks.h"
#include "find_operator.h"
#include "wide_dtype.h"

namespace mixhead {
namespace {

using at::Tensor;
constexpr const char* kOp = "merge_attention";
constexpr double kInfinity = std::numeric_limits<double>::infinity();

void check(at::TensorList outputs, at::TensorList lses) {
  MIXHEAD_CHECK(!outputs.empty(), kOp, "outputs must hold at least one tensor, got none");
  MIXHEAD_CHECK(
      lses.size() == outputs.size(), kOp, "lses must hold ", outputs.size(),
      " tensors like outputs, got ", lses.size());
  const auto& first = outputs[0];
  checks::floating(kOp, "outputs[0]", first, 1);
  const auto rows = first.sym_sizes().slice(0, first.dim() - 1);
  for (size_t i = 0; i < outputs.size(); ++i) {
    const auto output_name = "outputs[" + std::to_string(i) + "]";
    const auto lse_name = "lses[" + std::to_string(i) + "]";
    checks::companion(kOp, output_name.c_str(), outputs[i], first, "outputs[0]");
    checks::companion(kOp, lse_name.c_str(), lses[i], first, "outputs[0]", /*float32_too=*/true);
    MIXHEAD_CHECK(
        checks::same_shape(outputs[i], first.sym_sizes()), kOp, output_name, " must have shape ",
        checks::shape(first), " like outputs[0], got ", checks::shape(outputs[i]));
    MIXHEAD_CHECK(
        checks::same_shape(lses[i], rows), kOp, lse_name, " must have shape ", checks::shape(rows),
        " like the rows of outputs[0], got ", checks::shape(lses[i]));
  }
}

/// In differentiable ATen calls, so that every device, both derivatives and the compiler's fusion
/// come from one formula.
std::tuple<Tensor, Tensor> merge(at::TensorList outputs, at::TensorList lses) {
  check(outputs, lses);
  const auto dtype = wide_dtype(outputs[0]);
  std::vector<Tensor> wide;
  for (const auto& lse : lses) wide.push_back(lse.to(dtype));
  const auto stacked = at::stack(wide);
  auto maximum = stacked.detach().amax(0);
  maximum = maximum.masked_fill(maximum == -kInfinity, 0.0);
  const auto weights = (stacked - maximum).exp();
  const auto sum = weights.sum(0);
  const auto reads_nothing = sum == 0;
  const auto divisor = sum.masked_fill(reads_nothing, 1.0);
  Tensor output;
  for (size_t i = 0; i < outputs.size(); ++i) {
    const auto part = outputs[i].to(dtype) * (weights[i] / divisor).unsqueeze(-1);
    output = i == 0 ? part : output + part;
  }
  const auto lse = (maximum + divisor.log()).masked_fill(reads_nothing, -kInfinity);
  return {output.to(outputs[0].scalar_type()), lse};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, CompositeImplicitAutograd, m) { m.impl("merge_attention", merge); }
TORCH_LIBRARY_IMPL(mixhead, FuncTorchBatched, m) { m.impl("merge_attention", merge); }

std::tuple<at::Tensor, at::Tensor> merge_attention(at::TensorList outputs, at::TensorList lses) {
  using Signature = std::tuple<at::Tensor, at::Tensor>(at::TensorList, at::TensorList);
  static const auto op = find_operator<Signature>("mixhead::merge_attention");
  return op.call(outputs, lses);
}

}  // namespace mixhead
