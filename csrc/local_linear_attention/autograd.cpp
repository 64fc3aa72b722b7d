#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "differentiate.h"
#include "local_linear_attention/arguments.h"
#include "transforms.h"

namespace mixhead::local_linear {
namespace {

using differentiate::any_requires_grad;
using differentiate::first;
using differentiate::list_of;
using differentiate::needed_gradients;
using differentiate::needed_second_gradients;
using differentiate::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Saves everything in args; what restore_arguments reads back from the saved variables.
variable_list save_arguments(AutogradContext* ctx, const Arguments& args) {
  ctx->saved_data["kernel"] = args.kernel;
  ctx->saved_data["is_causal"] = args.is_causal;
  ctx->saved_data["exclude_self"] = args.exclude_self;
  ctx->saved_data["ridge"] = args.ridge;
  const auto tensors = differentiable(args);
  return {tensors.begin(), tensors.end()};
}

Arguments restore_arguments(AutogradContext* ctx, const variable_list& saved) {
  auto& data = ctx->saved_data;
  return {
      .query = saved[0],
      .key = saved[1],
      .value = saved[2],
      .bandwidth = optional(saved[3]),
      .kernel = data["kernel"].to<Names>(),
      .attn_mask = optional(saved[4]),
      .is_causal = data["is_causal"].toBool(),
      .exclude_self = data["exclude_self"].toBool(),
      .ridge = data["ridge"].toDouble(),
  };
}

/// The gradients of local_linear_attention as a function that can be differentiated once more.
class Backward : public torch::autograd::Function<Backward> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& grad_output, const Tensor& grad_slope,
      const Tensor& grad_leverage, const Tensor& grad_log_mass, const Tensor& /*query*/,
      const Tensor& /*key*/, const Tensor& /*value*/, const OptionalTensor& /*bandwidth*/,
      const OptionalTensor& /*attn_mask*/, const Arguments& args, OutputMask output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Grads grads{grad_output, grad_slope, grad_leverage, grad_log_mass};
    auto saved = save_arguments(ctx, args);
    saved.insert(saved.end(), grads.begin(), grads.end());
    ctx->save_for_backward(std::move(saved));
    return list_of(call_backward(grads, args, output_mask));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& second_order) {
    const auto saved = ctx->get_saved_variables();
    const auto args = restore_arguments(ctx, saved);
    const auto partners = first<kDifferentiable>(second_order);
    Grads grads;
    std::copy(saved.begin() + kDifferentiable, saved.end(), grads.begin());
    const auto needed = needed_second_gradients<kOutputs>(ctx, differentiable(args));
    auto gradients = double_backward(args, grads, partners, needed);
    gradients.resize(kOutputs + kDifferentiable + 2);  // args and output_mask have none
    return differentiate::refuse_third_derivative(
        "local_linear_attention", std::move(gradients), saved);
  }
};

class Attention : public torch::autograd::Function<Attention> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& /*query*/, const Tensor& /*key*/, const Tensor& /*value*/,
      const OptionalTensor& /*bandwidth*/, const OptionalTensor& /*attn_mask*/,
      const Arguments& args) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward(save_arguments(ctx, args));
    const auto [output, slope, leverage, log_mass] = call_forward(args);
    return {output, slope, leverage, log_mass};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto args = restore_arguments(ctx, ctx->get_saved_variables());
    const auto needed = needed_gradients(ctx, differentiable(args));
    return list_of(call_backward({grads[0], grads[1], grads[2], grads[3]}, args, needed), needed);
  }
};

Forward below_autograd(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& attn_mask, bool is_causal, bool exclude_self,
    double ridge) {
  return call_forward(
      {query, key, value, bandwidth, kernel, attn_mask, is_causal, exclude_self, ridge});
}

Forward local_linear_attention_autograd(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& attn_mask, bool is_causal, bool exclude_self,
    double ridge) {
  const Arguments args{query,     key,       value,        bandwidth, kernel,
                       attn_mask, is_causal, exclude_self, ridge};
  if (transforms::wanted(differentiable(args))) return composite(args);
  if (!c10::GradMode::is_enabled() || !any_requires_grad(differentiable(args))) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_forward(args);
  }
  const auto outputs = Attention::apply(query, key, value, bandwidth, attn_mask, args);
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

/// Inside of vmap the vmapped dimension is one more of each operation.
Forward batched(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& attn_mask, bool is_causal, bool exclude_self,
    double ridge) {
  return composite(
      {query, key, value, bandwidth, kernel, attn_mask, is_causal, exclude_self, ridge});
}

Gradients backward_autograd(
    const Tensor& grad_output, const Tensor& grad_slope, const Tensor& grad_leverage,
    const Tensor& grad_log_mass, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& bandwidth, const Names& kernel, const OptionalTensor& attn_mask,
    bool is_causal, bool exclude_self, double ridge, OutputMask output_mask) {
  const Arguments args{query,     key,       value,        bandwidth, kernel,
                       attn_mask, is_causal, exclude_self, ridge};
  const Grads grads{grad_output, grad_slope, grad_leverage, grad_log_mass};
  const bool differentiate = c10::GradMode::is_enabled() &&
                             (any_requires_grad(grads) || any_requires_grad(differentiable(args)));
  if (!differentiate) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_backward(grads, args, output_mask);
  }
  const auto g = Backward::apply(
      grad_output, grad_slope, grad_leverage, grad_log_mass, query, key, value, bandwidth,
      attn_mask, args, output_mask);
  return {g[0], g[1], g[2], g[3], g[4]};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, Autograd, m) {
  m.impl("local_linear_attention", local_linear_attention_autograd);
  m.impl("_local_linear_attention_backward", backward_autograd);
}

TORCH_LIBRARY_IMPL(mixhead, FuncTorchBatched, m) { m.impl("local_linear_attention", batched); }

// Reached where autograd is out of play (inference mode, a trace below autograd).
TORCH_LIBRARY_IMPL(mixhead, CompositeExplicitAutograd, m) {
  m.impl("local_linear_attention", below_autograd);
}
TORCH_LIBRARY_IMPL(mixhead, CPU, m) { m.impl("local_linear_attention", below_autograd); }
TORCH_LIBRARY_IMPL(mixhead, Meta, m) { m.impl("local_linear_attention", below_autograd); }

}  // namespace mixhead::local_linear
