#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "differentiate.h"
#include "mixed_attention/arguments.h"
#include "transforms.h"

namespace mixhead::mixed {
namespace {

using differentiate::any_requires_grad;
using differentiate::draw_seed;
using differentiate::first;
using differentiate::list_of;
using differentiate::needed_gradients;
using differentiate::needed_second_gradients;
using differentiate::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Saves everything in args; what restore_arguments reads back from the saved variables.
variable_list save_arguments(AutogradContext* ctx, const Arguments& args) {
  ctx->saved_data["joint"] = args.joint();
  ctx->saved_data["dropout_p"] = args.dropout_p;
  ctx->saved_data["is_causal"] = args.is_causal;
  ctx->saved_data["scale"] = args.scale;
  ctx->saved_data["enable_gqa"] = args.enable_gqa;
  const auto tensors = differentiable(args);
  variable_list saved(tensors.begin(), tensors.end());
  saved.push_back(args.memory_index.value_or(Tensor()));
  saved.push_back(args.seed.value_or(Tensor()));
  return saved;
}
constexpr size_t kSavedArguments = kDifferentiable + 2;

Arguments restore_arguments(AutogradContext* ctx, const variable_list& saved) {
  auto& data = ctx->saved_data;
  return {
      .query = saved[0],
      .key = saved[1],
      .value = saved[2],
      .memory_key = saved[3],
      .memory_value = saved[4],
      .mix = saved[5],
      .rule = data["joint"].toBool() ? "joint" : "gate",
      .attn_mask = optional(saved[6]),
      .memory_mask = optional(saved[7]),
      .memory_index = optional(saved[8]),
      .dropout_p = data["dropout_p"].toDouble(),
      .seed = optional(saved[9]),
      .is_causal = data["is_causal"].toBool(),
      .scale = data["scale"].toOptional<double>(),
      .enable_gqa = data["enable_gqa"].toBool(),
  };
}

/// The gradients of mixed_attention as a function that can be differentiated once more.
class Backward : public torch::autograd::Function<Backward> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& grad_output, const Tensor& grad_self_lse,
      const Tensor& grad_memory_lse, const Tensor& /*query*/, const Tensor& /*key*/,
      const Tensor& /*value*/, const Tensor& /*memory_key*/, const Tensor& /*memory_value*/,
      const Tensor& /*mix*/, const OptionalTensor& /*attn_mask*/,
      const OptionalTensor& /*memory_mask*/, const Arguments& args, const Forward& saved_forward,
      OutputMask output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto saved = save_arguments(ctx, args);
    saved.insert(saved.end(), {grad_output, grad_self_lse, grad_memory_lse});
    ctx->save_for_backward(std::move(saved));
    const auto gradients = call_backward(
        {grad_output, grad_self_lse, grad_memory_lse}, args, saved_forward, output_mask);
    return list_of(gradients);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& second_order) {
    const auto saved = ctx->get_saved_variables();
    const auto args = restore_arguments(ctx, saved);
    const auto partners = first<kDifferentiable>(second_order);
    const auto needed = needed_second_gradients<3>(ctx, differentiable(args));
    auto gradients = double_backward(
        args, {saved[kSavedArguments], saved[kSavedArguments + 1], saved[kSavedArguments + 2]},
        partners, needed);
    gradients.resize(3 + kDifferentiable + 3);  // args, saved_forward, output_mask have none
    return differentiate::refuse_third_derivative("mixed_attention", std::move(gradients), saved);
  }
};

/// The gradients of output, self_lse and memory_lse, with zeros for what nothing depends on. On
/// CUDA an empty tensor says that a log-sum-exp's gradient is 0, which saves its share of the work
/// there.
std::array<Tensor, 3> incoming(
    const variable_list& grads, const Arguments& args, const std::array<Tensor, 3>& outputs) {
  std::array<Tensor, 3> filled;
  for (size_t i = 0; i < 3; ++i) {
    const auto options = i == 0 ? args.query.options() : outputs[i].options();
    const bool brief = i > 0 && args.query.is_cuda() && !c10::GradMode::is_enabled();
    filled[i] = grads[i].defined() ? grads[i]
                : brief            ? at::empty({0}, options)
                                   : at::zeros_symint(outputs[i].sym_sizes(), options);
  }
  return filled;
}

/// output, self_lse, memory_lse. Saves the arguments, the log-sum-exps and what the rule's backward
/// reads: the joint output, or for the gate the outputs over each side.
class Attention : public torch::autograd::Function<Attention> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& /*query*/, const Tensor& /*key*/, const Tensor& /*value*/,
      const Tensor& /*memory_key*/, const Tensor& /*memory_value*/, const Tensor& /*mix*/,
      const OptionalTensor& /*attn_mask*/, const OptionalTensor& /*memory_mask*/,
      const Arguments& args) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [output, self_lse, memory_lse, self_output, memory_output] =
        call_forward(args, /*for_backward=*/true);
    auto saved = save_arguments(ctx, args);
    const auto kept_output = args.joint() ? output : Tensor();
    saved.insert(saved.end(), {kept_output, self_lse, memory_lse, self_output, memory_output});
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    return {output, self_lse, memory_lse};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto args = restore_arguments(ctx, saved);
    const auto* kept = saved.data() + kSavedArguments;
    // The gate's backward does not read the output; the schema wants a tensor.
    const auto& output = kept[0].defined() ? kept[0] : kept[3];
    const auto needed = needed_gradients(ctx, differentiable(args));
    const auto gradients = call_backward(
        incoming(grads, args, {output, kept[1], kept[2]}), args,
        {output, kept[1], kept[2], kept[3], kept[4]}, needed);
    return list_of(gradients, needed);
  }
};

std::tuple<Tensor, Tensor, Tensor> mixed_attention_below_autograd(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& memory_key,
    const Tensor& memory_value, const Tensor& mix, std::string_view rule,
    const OptionalTensor& attn_mask, const OptionalTensor& memory_mask,
    const OptionalTensor& memory_index, double dropout_p, bool is_causal,
    std::optional<double> scale, bool enable_gqa) {
  const Arguments args{query,        key,          value,     memory_key,
                       memory_value, mix,          rule,      attn_mask,
                       memory_mask,  memory_index, dropout_p, draw_seed(dropout_p),
                       is_causal,    scale,        enable_gqa};
  const auto [output, self_lse, memory_lse, self_output, memory_output] =
      call_forward(args, /*for_backward=*/false);
  return {output, self_lse, memory_lse};
}

std::tuple<Tensor, Tensor, Tensor> mixed_attention_autograd(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& memory_key,
    const Tensor& memory_value, const Tensor& mix, std::string_view rule,
    const OptionalTensor& attn_mask, const OptionalTensor& memory_mask,
    const OptionalTensor& memory_index, double dropout_p, bool is_causal,
    std::optional<double> scale, bool enable_gqa) {
  Arguments args{query,     key,          value,     memory_key,  memory_value,
                 mix,       rule,         attn_mask, memory_mask, memory_index,
                 dropout_p, std::nullopt, is_causal, scale,       enable_gqa};
  if (transforms::wanted(differentiable(args))) return composite(args);
  if (!c10::GradMode::is_enabled() || !any_requires_grad(differentiable(args))) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return mixed_attention_below_autograd(
        query, key, value, memory_key, memory_value, mix, rule, attn_mask, memory_mask,
        memory_index, dropout_p, is_causal, scale, enable_gqa);
  }
  args.seed = draw_seed(dropout_p);
  const auto outputs = Attention::apply(
      query, key, value, memory_key, memory_value, mix, attn_mask, memory_mask, args);
  return {outputs[0], outputs[1], outputs[2]};
}

/// Inside of vmap the vmapped dimension is one more of each operation.
std::tuple<Tensor, Tensor, Tensor> mixed_attention_batched(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& memory_key,
    const Tensor& memory_value, const Tensor& mix, std::string_view rule,
    const OptionalTensor& attn_mask, const OptionalTensor& memory_mask,
    const OptionalTensor& memory_index, double dropout_p, bool is_causal,
    std::optional<double> scale, bool enable_gqa) {
  return composite(
      {query, key, value, memory_key, memory_value, mix, rule, attn_mask, memory_mask, memory_index,
       dropout_p, std::nullopt, is_causal, scale, enable_gqa});
}

Gradients backward_autograd(
    const Tensor& grad_output, const Tensor& grad_self_lse, const Tensor& grad_memory_lse,
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& memory_key,
    const Tensor& memory_value, const Tensor& mix, std::string_view rule,
    const OptionalTensor& attn_mask, const OptionalTensor& memory_mask,
    const OptionalTensor& memory_index, double dropout_p, const OptionalTensor& seed,
    bool is_causal, std::optional<double> scale, bool enable_gqa, const Tensor& output,
    const Tensor& self_lse, const Tensor& memory_lse, const Tensor& self_output,
    const Tensor& memory_output, std::array<bool, 8> output_mask) {
  const Arguments args{query,     key,  value,     memory_key,  memory_value,
                       mix,       rule, attn_mask, memory_mask, memory_index,
                       dropout_p, seed, is_causal, scale,       enable_gqa};
  const Forward forward{output, self_lse, memory_lse, self_output, memory_output};
  const bool differentiate =
      c10::GradMode::is_enabled() &&
      (grad_output.requires_grad() || grad_self_lse.requires_grad() ||
       grad_memory_lse.requires_grad() || any_requires_grad(differentiable(args)));
  if (!differentiate) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_backward({grad_output, grad_self_lse, grad_memory_lse}, args, forward, output_mask);
  }
  const auto g = Backward::apply(
      grad_output, grad_self_lse, grad_memory_lse, query, key, value, memory_key, memory_value, mix,
      attn_mask, memory_mask, args, forward, output_mask);
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, Autograd, m) {
  m.impl("mixed_attention", mixed_attention_autograd);
  m.impl("_mixed_attention_backward", backward_autograd);
}

TORCH_LIBRARY_IMPL(mixhead, FuncTorchBatched, m) {
  m.impl("mixed_attention", mixed_attention_batched);
}

// Reached where autograd is out of play (inference mode, a trace below autograd).
TORCH_LIBRARY_IMPL(mixhead, CompositeExplicitAutograd, m) {
  m.impl("mixed_attention", mixed_attention_below_autograd);
}
TORCH_LIBRARY_IMPL(mixhead, CPU, m) { m.impl("mixed_attention", mixed_attention_below_autograd); }
TORCH_LIBRARY_IMPL(mixhead, Meta, m) { m.impl("mixed_attention", mixed_attention_below_autograd); }

}  // namespace mixhead::mixed
