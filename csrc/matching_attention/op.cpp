#include "matching_attention/op.h"

#include <ATen/ops/min.h>
#include <torch/library.h>

#include "checks.h"
#include "find_operator.h"
#include "kernel_attention/kernel_checks.h"
#include "matching_attention/arguments.h"

namespace mixhead {
namespace matching {
namespace {

constexpr const char* kOp = "matching_attention";

void check_mass(
    const char* name, const OptionalTensor& mass, const Tensor& query, const c10::SymInt& count) {
  if (!mass) return;
  checks::companion(kOp, name, *mass, query, "query", /*float32_too=*/true);
  const auto target = checks::like_query(query, {query.sym_size(-3), count});
  MIXHEAD_CHECK(
      checks::broadcasts_to(*mass, target), kOp, name, " must broadcast to ", checks::shape(target),
      ", got ", checks::shape(*mass));
  if (!checks::has_values(*mass)) return;
  const auto smallest = at::min(mass->detach()).item<double>();
  MIXHEAD_CHECK(smallest >= 0.0, kOp, name, " must not be negative, got ", smallest);
}

void check_dustbin(const OptionalTensor& dustbin, const Tensor& query) {
  if (!dustbin) return;
  checks::companion(kOp, "dustbin", *dustbin, query, "query", /*float32_too=*/true);
  const auto& heads = query.sym_size(-3);
  MIXHEAD_CHECK(
      dustbin->dim() == 0 || (dustbin->dim() == 1 && checks::equal(dustbin->sym_size(0), heads)),
      kOp, "dustbin must be a scalar or (", heads, ",), got ", checks::shape(*dustbin));
}

}  // namespace

void check(const Arguments& args) {
  const auto& [query, key] = std::tie(args.query, args.key);
  MIXHEAD_CHECK(
      args.iterations >= 0, kOp, "iterations must not be negative, got ", args.iterations);
  MIXHEAD_CHECK(args.tolerance >= 0.0, kOp, "tolerance must not be negative, got ", args.tolerance);
  checks::query(kOp, query);
  kernel_checks::points(kOp, query, key, args.value, /*enable_gqa=*/false);
  kernel_checks::names(kOp, query, args.kernel);
  kernel_checks::bandwidth(kOp, query, args.kernel, args.bandwidth);
  check_mass("row_mass", args.row_mass, query, query.sym_size(-2));
  check_mass("column_mass", args.column_mass, query, key.sym_size(-2));
  check_dustbin(args.dustbin, query);
}

Tensor call_sinkhorn(
    const Points& points, const Sides& log_mass, int64_t iterations, double tolerance) {
  static const auto op = find_operator<SinkhornSignature>("mixhead::_matching_attention_sinkhorn");
  return op.call(
      points.query, points.key, points.bandwidth, points.kernel, points.dustbin, log_mass.row,
      log_mass.column, iterations, tolerance);
}

Tensor call_solve(const Points& points, const Sides& potential, const Tensor& right_side) {
  static const auto op = find_operator<SolveSignature>("mixhead::_matching_attention_solve");
  return op.call(
      points.query, points.key, points.bandwidth, points.kernel, points.dustbin, potential.row,
      potential.column, right_side);
}

}  // namespace matching

std::tuple<at::Tensor, at::Tensor, at::Tensor> matching_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& bandwidth, const std::vector<std::string>& kernel,
    const MatchingAttentionOptions& options) {
  static const auto op = find_operator<matching::PublicSignature>("mixhead::matching_attention");
  return op.call(
      query, key, value, bandwidth, c10::List<std::string>(kernel), options.row_mass,
      options.column_mass, options.dustbin, options.iterations, options.tolerance);
}

}  // namespace mixhead
