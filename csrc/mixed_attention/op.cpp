#include "mixed_attention/op.h"

#include <ATen/ops/aminmax.h>
#include <torch/library.h>

#include <cmath>

#include "checks.h"
#include "find_operator.h"
#include "mixed_attention/arguments.h"

namespace mixhead {
namespace mixed {
namespace {

constexpr const char* kOp = "mixed_attention";
using checks::equal;
using checks::like_query;
using checks::shape;

void check_options(const Arguments& args) {
  MIXHEAD_CHECK(
      args.rule == "gate" || args.rule == "joint", kOp,
      "rule must be \"gate\" or \"joint\", got \"", args.rule, "\"");
  checks::dropout(kOp, args.dropout_p);
  MIXHEAD_CHECK(
      !args.scale || std::isfinite(*args.scale), kOp, "scale must be finite, got ",
      args.scale.value_or(0.0));
}

void check_sequence(const Arguments& args) {
  const auto& [query, key, value] = std::tie(args.query, args.key, args.value);
  checks::companion(kOp, "key", key, query, "query");
  checks::companion(kOp, "value", value, query, "query");
  checks::batch(kOp, "key", key, query);
  checks::batch(kOp, "value", value, query);
  MIXHEAD_CHECK(
      equal(key.sym_size(-1), query.sym_size(-1)), kOp, "key must have ", query.sym_size(-1),
      " channels like query, got ", shape(key));
  checks::key_heads(kOp, "key", key, query, args.enable_gqa);
  const auto& heads = key.sym_size(-3);
  MIXHEAD_CHECK(
      equal(value.sym_size(-3), heads), kOp, "value must have ", heads, " heads like key, got ",
      shape(value));
  MIXHEAD_CHECK(
      equal(value.sym_size(-2), key.sym_size(-2)), kOp, "value must have ", key.sym_size(-2),
      " rows like key, got ", shape(value));
}

void check_memory(const Arguments& args) {
  const auto& [query, key, value] = std::tie(args.query, args.key, args.value);
  const auto& [memory_key, memory_value] = std::tie(args.memory_key, args.memory_value);
  const auto check_one = [&](const char* name, const Tensor& memory) {
    checks::points(kOp, name, memory, query);
    MIXHEAD_CHECK(
        equal(memory.sym_size(-3), key.sym_size(-3)), kOp, name, " must have ", key.sym_size(-3),
        " heads like key, got ", shape(memory));
  };
  check_one("memory_key", memory_key);
  check_one("memory_value", memory_value);
  MIXHEAD_CHECK(
      equal(memory_key.sym_size(-1), query.sym_size(-1)), kOp, "memory_key must have ",
      query.sym_size(-1), " channels like query, got ", shape(memory_key));
  MIXHEAD_CHECK(
      equal(memory_value.sym_size(-1), value.sym_size(-1)), kOp, "memory_value must have ",
      value.sym_size(-1), " channels like value, got ", shape(memory_value));
  MIXHEAD_CHECK(
      memory_value.dim() == memory_key.dim() &&
          equal(memory_value.sym_size(-2), memory_key.sym_size(-2)),
      kOp, "memory_value must have ", memory_key.sym_size(-2), " slots and ", memory_key.dim(),
      " dimensions like memory_key, got ", shape(memory_value));
}

void check_mix(const Arguments& args) {
  const auto& [query, mix] = std::tie(args.query, args.mix);
  checks::companion(kOp, "mix", mix, query, "query", /*float32_too=*/true);
  const auto target = like_query(query, {query.sym_size(-3), query.sym_size(-2), 1});
  if (checks::broadcasts_to(mix, target)) return;
  MIXHEAD_CHECK(
      !args.joint(), kOp, "mix must broadcast to ", shape(target), " with rule \"joint\", got ",
      shape(mix));
  auto per_channel = target;
  per_channel.back() = args.value.sym_size(-1);
  MIXHEAD_CHECK(
      checks::broadcasts_to(mix, per_channel), kOp, "mix must broadcast to ", shape(target), " or ",
      shape(per_channel), ", got ", shape(mix));
}

void check_index(const Arguments& args) {
  if (!args.memory_index) return;
  const auto& [query, index] = std::tie(args.query, *args.memory_index);
  MIXHEAD_CHECK(
      index.scalar_type() == at::kLong, kOp, "memory_index must be int64, got ",
      index.scalar_type());
  checks::beside(kOp, "memory_index", index, query, "query");
  MIXHEAD_CHECK(
      index.dim() == query.dim(), kOp, "memory_index must have ", query.dim(),
      " dimensions like query, got ", shape(index));
  checks::batch(kOp, "memory_index", index, query);
  MIXHEAD_CHECK(
      equal(index.sym_size(-3), query.sym_size(-3)) &&
          equal(index.sym_size(-2), query.sym_size(-2)),
      kOp, "memory_index must have ", query.sym_size(-3), " heads and ", query.sym_size(-2),
      " rows like query, got ", shape(index));
  if (!checks::has_values(index)) return;
  const auto [lowest, highest] = at::aminmax(index);
  const auto low = lowest.item<int64_t>(), high = highest.item<int64_t>();
  const auto slots = args.memory_key.sym_size(-2);
  MIXHEAD_CHECK(
      low >= -1 && high < slots, kOp, "memory_index must name slots in [-1, ", slots,
      "), got values from ", low, " to ", high);
}

}  // namespace

void check(const Arguments& args) {
  check_options(args);
  checks::query(kOp, args.query);
  check_sequence(args);
  check_memory(args);
  check_mix(args);
  const auto heads = args.query.sym_size(-3), rows = args.query.sym_size(-2);
  if (args.attn_mask) {
    checks::mask(
        kOp, "attn_mask", *args.attn_mask, args.query,
        like_query(args.query, {heads, rows, args.key.sym_size(-2)}));
  }
  if (args.memory_mask) {
    checks::mask(
        kOp, "memory_mask", *args.memory_mask, args.query,
        like_query(args.query, {heads, rows, args.memory_key.sym_size(-2)}));
  }
  check_index(args);
}

double Arguments::scale_or_default() const {
  return scale.value_or(1.0 / std::sqrt(static_cast<double>(query.size(-1))));
}

bool excludes(const Arguments& args) {
  return args.is_causal || args.attn_mask || args.memory_mask || args.memory_index;
}

std::array<Tensor, 5> operands(const Arguments& args) {
  return {args.query, args.key, args.value, args.memory_key, args.memory_value};
}

std::array<Tensor, kDifferentiable> differentiable(const Arguments& args) {
  return {
      args.query,
      args.key,
      args.value,
      args.memory_key,
      args.memory_value,
      args.mix,
      args.attn_mask.value_or(Tensor()),
      args.memory_mask.value_or(Tensor())};
}

Arguments with_differentiable(Arguments args, const std::array<Tensor, kDifferentiable>& tensors) {
  args.query = tensors[0];
  args.key = tensors[1];
  args.value = tensors[2];
  args.memory_key = tensors[3];
  args.memory_value = tensors[4];
  args.mix = tensors[5];
  if (args.attn_mask) args.attn_mask = tensors[6];
  if (args.memory_mask) args.memory_mask = tensors[7];
  return args;
}

std::array<bool, 2> kept_outputs(const Arguments& args, bool for_backward) {
  const auto dtype = args.query.scalar_type();
  const bool rounds = dtype != at::kFloat && dtype != at::kDouble;
  return {for_backward && (!args.joint() || rounds), for_backward && !args.joint()};
}

Forward call_forward(const Arguments& args, bool for_backward) {
  static const auto op = find_operator<ForwardSignature>("mixhead::_mixed_attention_forward");
  return op.call(
      args.query, args.key, args.value, args.memory_key, args.memory_value, args.mix, args.rule,
      args.attn_mask, args.memory_mask, args.memory_index, args.dropout_p, args.seed,
      args.is_causal, args.scale, args.enable_gqa, for_backward);
}

Gradients call_backward(
    const std::array<Tensor, 3>& grads, const Arguments& args, const Forward& forward,
    OutputMask output_mask) {
  static const auto op = find_operator<BackwardSignature>("mixhead::_mixed_attention_backward");
  const auto& [output, self_lse, memory_lse, self_output, memory_output] = forward;
  return op.call(
      grads[0], grads[1], grads[2], args.query, args.key, args.value, args.memory_key,
      args.memory_value, args.mix, args.rule, args.attn_mask, args.memory_mask, args.memory_index,
      args.dropout_p, args.seed, args.is_causal, args.scale, args.enable_gqa, output, self_lse,
      memory_lse, self_output, memory_output, output_mask);
}

}  // namespace mixed

std::tuple<at::Tensor, at::Tensor, at::Tensor> mixed_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& memory_key, const at::Tensor& memory_value, const at::Tensor& mix,
    const MixedAttentionOptions& options) {
  static const auto op = find_operator<mixed::PublicSignature>("mixhead::mixed_attention");
  return op.call(
      query, key, value, memory_key, memory_value, mix, options.rule, options.attn_mask,
      options.memory_mask, options.memory_index, options.dropout_p, options.is_causal,
      options.scale, options.enable_gqa);
}

}  // namespace mixhead
