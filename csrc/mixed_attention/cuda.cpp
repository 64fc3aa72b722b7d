#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "cuda/fused.h"
#include "mixed_attention/arguments.h"
#include "wide_dtype.h"

/// mixed_attention composed of PyTorch's fused attention: each side in one call, then one merge by
/// the log-sum-exps; the backward is each side's own fused backward. What the fused operators do
/// not take goes to the portable path.
namespace mixhead::mixed {
namespace {

using fused::Attended;
using fused::BackEnd;
using fused::Call;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Keys that one call of a back end without a split over keys should read where rows are few.
constexpr int64_t kSplitKeys = 4096, kFewRows = 64, kUnits = 256;

/// One side of the op as a fused call: `rows` of each head, of which only the last ones may read.
struct Side {
  Call call;
  BackEnd back_end = BackEnd::none;
  bool empty = false;        // no row reads anything
  bool shared = false;       // the batch is folded into the rows
  int64_t skipped_rows = 0;  // rows in front that read nothing: causal, L > S
};

Tensor four_dimensional(const Tensor& tensor) {
  if (tensor.dim() == 4) return tensor;
  return tensor.dim() == 3 ? tensor.unsqueeze(0) : tensor.flatten(0, tensor.dim() - 4);
}

/// (b, Hq, L, X) with the batch and a group's heads among the rows of a key head:
/// (1, H, b * G * L, X).
Tensor folded(const Tensor& tensor, int64_t heads) {
  const auto b = tensor.size(0), groups = tensor.size(1) / heads;
  return tensor.unflatten(1, {heads, groups})
      .transpose(0, 1)
      .reshape({1, heads, b * groups * tensor.size(2), tensor.size(3)});
}

Tensor unfolded(const Tensor& tensor, int64_t batch, int64_t query_heads, int64_t rows) {
  const auto heads = tensor.size(1);
  return tensor.view({heads, batch, query_heads / heads, rows, tensor.size(3)})
      .transpose(0, 1)
      .reshape({batch, query_heads, rows, tensor.size(3)});
}

/// A (b, Hq, L, X) tensor as the rows of the side's call, and back.
Tensor to_rows(const Side& side, const Tensor& tensor) {
  if (side.shared) return folded(tensor, side.call.key.size(1));
  return tensor.narrow(2, side.skipped_rows, tensor.size(2) - side.skipped_rows);
}
Tensor from_rows(const Side& side, const Tensor& rows, const Tensor& query, double elsewhere) {
  const auto b = query.size(0), heads = query.size(1), all = query.size(2);
  if (side.shared) return unfolded(rows.contiguous(), b, heads, all);
  if (side.skipped_rows == 0) return rows;
  const auto front =
      at::full({b, heads, side.skipped_rows, rows.size(3)}, elsewhere, rows.options());
  return at::cat({front, rows}, 2);
}

Side sequence_side(const Arguments& args, const Tensor& query) {
  Side side;
  const auto rows = query.size(2), keys = args.key.size(-2);
  side.empty = keys == 0;
  if (args.is_causal) side.skipped_rows = std::max<int64_t>(rows - keys, 0);
  if (side.empty) return side;
  side.call = {
      query.narrow(2, side.skipped_rows, rows - side.skipped_rows), four_dimensional(args.key),
      four_dimensional(args.value), args.is_causal, args.scale_or_default()};
  side.back_end = fused::choose(side.call);
  return side;
}

Side memory_side(const Arguments& args, const Tensor& query) {
  Side side;
  side.empty = args.memory_key.size(-2) == 0;
  if (side.empty) return side;
  side.shared = args.memory_key.dim() == 3;
  side.call = {
      side.shared ? folded(query, args.key.size(-3)) : query, four_dimensional(args.memory_key),
      four_dimensional(args.memory_value), false, args.scale_or_default()};
  side.back_end = fused::choose(side.call);
  return side;
}

/// What the composition covers; the portable path takes the rest.
bool composable(const Arguments& args) {
  return !args.attn_mask && !args.memory_mask && !args.memory_index && args.dropout_p == 0.0 &&
         args.scale_or_default() > 0.0 && args.query.numel() > 0 && args.value.size(-1) > 0;
}
bool available(const Side& side) { return side.empty || side.back_end != BackEnd::none; }

/// Few rows of a large memory in a back end that does not split over keys itself: parts of the keys
/// as a batch, merged by their log-sum-exps.
Attended attend_in_parts(const Side& side) {
  const auto& call = side.call;
  const auto rows = call.query.size(2), heads = call.query.size(1), keys = call.key.size(2);
  const auto units = heads * ((rows + kFewRows - 1) / kFewRows);
  const auto parts = std::min(keys / kSplitKeys, kUnits / units);
  const bool splits_itself = side.back_end == BackEnd::flash;
  if (splits_itself || call.query.size(0) != 1 || call.causal || parts < 2) {
    return fused::attend(side.back_end, call);
  }
  const auto each = keys / parts;
  const auto part_of = [&](const Tensor& tensor) {
    return tensor.squeeze(0).narrow(1, 0, parts * each).unflatten(1, {parts, each}).transpose(0, 1);
  };
  const auto split = fused::attend(
      side.back_end, {call.query.expand({parts, -1, -1, -1}), part_of(call.key),
                      part_of(call.value), false, call.scale});
  auto output = split.output.to(split.lse.scalar_type()), lse = split.lse;
  if (parts * each < keys) {
    const auto rest = keys - parts * each;
    const auto last = fused::attend(
        side.back_end, {call.query, call.key.narrow(2, keys - rest, rest),
                        call.value.narrow(2, keys - rest, rest), false, call.scale});
    output = at::cat({output, last.output.to(output.scalar_type())});
    lse = at::cat({lse, last.lse});
  }
  const auto total = at::logsumexp(lse, {0}, /*keepdim=*/true);
  output = (output * (lse - total).exp().unsqueeze(-1)).sum(0, /*keepdim=*/true);
  return {output.to(call.query.scalar_type()), total};
}

/// Output (b, Hq, L, Dv) and log-sum-exp (b, Hq, L, 1) of one side for every row.
Attended attend(const Side& side, const Tensor& query, int64_t value_channels) {
  const auto wide = query.options().dtype(wide_dtype(query));
  if (side.empty) {
    const auto b = query.size(0), heads = query.size(1), rows = query.size(2);
    return {
        at::zeros({b, heads, rows, value_channels}, query.options()),
        at::full({b, heads, rows, 1}, -kInfinity, wide)};
  }
  const auto found = attend_in_parts(side);
  return {
      from_rows(side, found.output, query, 0.0),
      from_rows(side, found.lse.unsqueeze(-1), query, -kInfinity)};
}

/// w (B..., Hq, L, 1 or Dv): sigmoid(mix), or with rule "joint" sigmoid(mix + l_m - l_s); 0 or 1
/// where one side is empty.
Tensor memory_weight(const Arguments& args, const Tensor& self_lse, const Tensor& memory_lse) {
  const auto mix = args.mix.to(self_lse.scalar_type());
  const auto self_empty = self_lse == -kInfinity, memory_empty = memory_lse == -kInfinity;
  const auto logit = args.joint()
                         ? mix + (memory_lse - self_lse).masked_fill(self_empty | memory_empty, 0.0)
                         : mix;
  return at::where(memory_empty, 0.0, at::where(self_empty, 1.0, at::sigmoid(logit)));
}

Forward forward_cuda(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& memory_key,
    const Tensor& memory_value, const Tensor& mix, std::string_view rule,
    const OptionalTensor& attn_mask, const OptionalTensor& memory_mask,
    const OptionalTensor& memory_index, double dropout_p, const OptionalTensor& seed,
    bool is_causal, std::optional<double> scale, bool enable_gqa, bool for_backward) {
  const c10::DeviceGuard device(query.device());
  const Arguments args{query,     key,  value,     memory_key,  memory_value,
                       mix,       rule, attn_mask, memory_mask, memory_index,
                       dropout_p, seed, is_causal, scale,       enable_gqa};
  check(args);
  if (!composable(args)) return forward_portable(args, for_backward);
  const auto rows = four_dimensional(query);
  const auto sequence = sequence_side(args, rows), memory = memory_side(args, rows);
  if (!available(sequence) || !available(memory)) return forward_portable(args, for_backward);

  const auto channels = value.size(-1);
  const auto per_row = query.sizes().slice(0, query.dim() - 1);
  at::DimVector wide(per_row.begin(), per_row.end()), narrow = wide;
  wide.push_back(channels);
  narrow.push_back(1);
  auto [self_output, self_lse] = attend(sequence, rows, channels);
  auto [memory_output, memory_lse] = attend(memory, rows, channels);
  self_output = self_output.reshape(wide), memory_output = memory_output.reshape(wide);
  self_lse = self_lse.reshape(narrow), memory_lse = memory_lse.reshape(narrow);
  const auto w = memory_weight(args, self_lse, memory_lse);
  const auto sum = at::addcmul(self_output * (1.0 - w), memory_output.to(w.scalar_type()), w);

  const auto keep = kept_outputs(args, for_backward);
  const auto none = at::empty({0}, w.options());
  const auto kept = [&](bool wanted, const Tensor& tensor) {
    return wanted ? tensor.to(w.scalar_type()).contiguous() : none;
  };
  // In half precision "joint" keeps the memory's output in the place of the unrounded one: the
  // fused backward rounds what it reads, and the gradient of mix needs the former.
  return {
      sum.to(query.scalar_type()).contiguous(), self_lse.squeeze(-1).contiguous(),
      memory_lse.squeeze(-1).contiguous(),
      kept(keep[0], args.joint() ? memory_output : self_output), kept(keep[1], memory_output)};
}

/// An incoming gradient of a log-sum-exp as (b, Hq, L, 1); undefined where it is known to be 0,
/// which an empty tensor says.
Tensor row_gradient(const Tensor& grad, const Tensor& lse) {
  if (grad.numel() < lse.numel()) return {};
  return four_dimensional(grad.reshape(lse.sizes()).unsqueeze(-1));
}

/// Gradients of the side's query rows (b, Hq, L, D), keys and values in the arguments' own shapes.
/// `output` is what rowsum(dO * output) is taken with; see fused::attend_backward.
std::array<Tensor, 3> side_backward(
    const Side& side, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& output, const Tensor& lse, const Tensor& grad, const Tensor& grad_lse) {
  if (side.empty) {
    return {at::zeros_like(query), at::zeros_like(key), at::zeros_like(value)};
  }
  const auto rows = [&](const Tensor& tensor) {
    return tensor.defined() ? to_rows(side, four_dimensional(tensor)) : tensor;
  };
  const auto g = rows(grad_lse);
  const auto [dq, dk, dv] = fused::attend_backward(
      side.back_end, side.call, {rows(output), rows(lse.unsqueeze(-1)).squeeze(-1)}, rows(grad),
      g.defined() ? g.squeeze(-1) : g);
  return {
      from_rows(side, dq, four_dimensional(query), 0.0).reshape(query.sizes()),
      dk.reshape(key.sizes()), dv.reshape(value.sizes())};
}

Gradients backward_composed(
    const std::array<Tensor, 3>& grads, const Arguments& args, const Forward& forward,
    const Side& sequence, const Side& memory, const OutputMask& wanted) {
  const auto& [output, self_lse, memory_lse, kept_self, kept_memory] = forward;
  const auto dtype = args.query.scalar_type();
  const bool joint = args.joint();
  const auto w = memory_weight(args, self_lse.unsqueeze(-1), memory_lse.unsqueeze(-1));
  // dS of a side is P (w_side dO V^T - rowsum(w_side dO * A) + g), where A is this side's output
  // for the gate and the joint output for "joint", which is one softmax.
  const auto& self_output = joint ? output : kept_self;
  const auto& memory_output = joint ? output : kept_memory;
  const auto of_sequence = side_backward(
      sequence, args.query, args.key, args.value, self_output, self_lse,
      (grads[0] * (1.0 - w)).to(dtype), row_gradient(grads[1], self_lse));
  const auto of_memory = side_backward(
      memory, args.query, args.memory_key, args.memory_value, memory_output, memory_lse,
      (grads[0] * w).to(dtype), row_gradient(grads[2], memory_lse));

  const auto none = at::empty({0}, args.query.options());
  Tensor grad_mix = none;
  if (wanted[5]) {
    // dO * w (1-w) (A_m - A_s), which for "joint" is dO * w (A_m - output).
    Tensor difference;
    if (!joint) {
      difference = (kept_memory - kept_self) * (1.0 - w);
    } else {
      const auto rows = four_dimensional(args.query);
      const auto alone =
          kept_self.numel() > 0
              ? kept_self
              : attend(memory, rows, args.value.size(-1)).output.reshape(output.sizes());
      difference = alone - output;
    }
    auto found = difference * grads[0] * w;
    if (args.mix.dim() == 0 || args.mix.size(-1) == 1) found = found.sum(-1, /*keepdim=*/true);
    // Where one side is empty the weight does not depend on mix.
    found = found.masked_fill((w == 0.0) | (w == 1.0), 0.0);
    grad_mix = at::sum_to(found, args.mix.sizes()).to(args.mix.scalar_type());
  }
  const auto give = [&](size_t i, const Tensor& gradient) { return wanted[i] ? gradient : none; };
  return {
      wanted[0] ? of_sequence[0] + of_memory[0] : none,
      give(1, of_sequence[1]),
      give(2, of_sequence[2]),
      give(3, of_memory[1]),
      give(4, of_memory[2]),
      grad_mix,
      none,
      none};
}

Gradients backward_cuda(
    const Tensor& grad_output, const Tensor& grad_self_lse, const Tensor& grad_memory_lse,
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& memory_key,
    const Tensor& memory_value, const Tensor& mix, std::string_view rule,
    const OptionalTensor& attn_mask, const OptionalTensor& memory_mask,
    const OptionalTensor& memory_index, double dropout_p, const OptionalTensor& seed,
    bool is_causal, std::optional<double> scale, bool enable_gqa, const Tensor& output,
    const Tensor& self_lse, const Tensor& memory_lse, const Tensor& self_output,
    const Tensor& memory_output, std::array<bool, 8> output_mask) {
  const c10::DeviceGuard device(query.device());
  const Arguments args{query,     key,  value,     memory_key,  memory_value,
                       mix,       rule, attn_mask, memory_mask, memory_index,
                       dropout_p, seed, is_causal, scale,       enable_gqa};
  const std::array<Tensor, 3> grads{grad_output, grad_self_lse, grad_memory_lse};
  if (composable(args)) {
    const auto rows = four_dimensional(query);
    const auto sequence = sequence_side(args, rows), memory = memory_side(args, rows);
    if (available(sequence) && available(memory)) {
      return backward_composed(
          grads, args, {output, self_lse, memory_lse, self_output, memory_output}, sequence, memory,
          output_mask);
    }
  }
  const auto filled = [](const Tensor& grad, const Tensor& lse) {
    return grad.numel() < lse.numel() ? at::zeros_like(lse) : grad;
  };
  return backward_portable(
      {grad_output, filled(grad_self_lse, self_lse), filled(grad_memory_lse, memory_lse)}, args,
      output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, CUDA, m) {
  m.impl("_mixed_attention_forward", forward_cuda);
  m.impl("_mixed_attention_backward", backward_cuda);
}

}  // namespace mixhead::mixed
