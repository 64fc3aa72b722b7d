#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "differentiate.h"
#include "kernel_attention/arguments.h"
#include "transforms.h"

namespace mixhead::kernels {
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
  ctx->saved_data["kernel"] = args.kernel;
  ctx->saved_data["is_causal"] = args.is_causal;
  ctx->saved_data["exclude_self"] = args.exclude_self;
  ctx->saved_data["normalize"] = args.normalize;
  ctx->saved_data["empty"] = std::string(args.empty);
  ctx->saved_data["dropout_p"] = args.dropout_p;
  ctx->saved_data["enable_gqa"] = args.enable_gqa;
  const auto tensors = differentiable(args);
  variable_list saved(tensors.begin(), tensors.end());
  saved.push_back(args.seed.value_or(Tensor()));
  return saved;
}
constexpr size_t kSavedArguments = kDifferentiable + 1;

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
      .normalize = data["normalize"].toBool(),
      .empty = data["empty"].toStringRef(),
      .dropout_p = data["dropout_p"].toDouble(),
      .seed = optional(saved[5]),
      .enable_gqa = data["enable_gqa"].toBool(),
  };
}

/// The gradients of kernel_attention as a function that can be differentiated once more.
class Backward : public torch::autograd::Function<Backward> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& grad_output, const Tensor& grad_log_mass,
      const Tensor& /*query*/, const Tensor& /*key*/, const Tensor& /*value*/,
      const OptionalTensor& /*bandwidth*/, const OptionalTensor& /*attn_mask*/,
      const Arguments& args, const Forward& saved_forward, OutputMask output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto saved = save_arguments(ctx, args);
    saved.insert(saved.end(), {grad_output, grad_log_mass});
    ctx->save_for_backward(std::move(saved));
    const auto gradients =
        call_backward({grad_output, grad_log_mass}, args, saved_forward, output_mask);
    return list_of(gradients);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& second_order) {
    const auto saved = ctx->get_saved_variables();
    const auto args = restore_arguments(ctx, saved);
    const auto partners = first<kDifferentiable>(second_order);
    const auto needed = needed_second_gradients<2>(ctx, differentiable(args));
    auto gradients = double_backward(
        args, {saved[kSavedArguments], saved[kSavedArguments + 1]}, partners, needed);
    gradients.resize(2 + kDifferentiable + 3);  // args, saved_forward, output_mask have none
    return differentiate::refuse_third_derivative("kernel_attention", std::move(gradients), saved);
  }
};

/// output, log_mass. Saves the arguments and both outputs.
class Attention : public torch::autograd::Function<Attention> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& /*query*/, const Tensor& /*key*/, const Tensor& /*value*/,
      const OptionalTensor& /*bandwidth*/, const OptionalTensor& /*attn_mask*/,
      const Arguments& args) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [output, log_mass] = call_forward(args);
    auto saved = save_arguments(ctx, args);
    saved.insert(saved.end(), {output, log_mass});
    ctx->save_for_backward(std::move(saved));
    return {output, log_mass};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto args = restore_arguments(ctx, saved);
    const auto needed = needed_gradients(ctx, differentiable(args));
    const auto gradients = call_backward(
        {grads[0], grads[1]}, args, {saved[kSavedArguments], saved[kSavedArguments + 1]}, needed);
    return list_of(gradients, needed);
  }
};

Forward kernel_attention_below_autograd(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& attn_mask, bool is_causal, bool exclude_self,
    bool normalize, std::string_view empty, double dropout_p, bool enable_gqa) {
  return call_forward(
      {query, key, value, bandwidth, kernel, attn_mask, is_causal, exclude_self, normalize, empty,
       dropout_p, draw_seed(dropout_p), enable_gqa});
}

Forward kernel_attention_autograd(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& attn_mask, bool is_causal, bool exclude_self,
    bool normalize, std::string_view empty, double dropout_p, bool enable_gqa) {
  Arguments args{query,        key,       value, bandwidth, kernel,       attn_mask, is_causal,
                 exclude_self, normalize, empty, dropout_p, std::nullopt, enable_gqa};
  if (transforms::wanted(differentiable(args))) return composite(args);
  if (!c10::GradMode::is_enabled() || !any_requires_grad(differentiable(args))) {
    at::AutoDispatchBelowADInplaceOrView guard;
    args.seed = draw_seed(dropout_p);
    return call_forward(args);
  }
  args.seed = draw_seed(dropout_p);
  const auto outputs = Attention::apply(query, key, value, bandwidth, attn_mask, args);
  return {outputs[0], outputs[1]};
}

/// Inside of vmap the vmapped dimension is one more of each operation.
Forward kernel_attention_batched(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& attn_mask, bool is_causal, bool exclude_self,
    bool normalize, std::string_view empty, double dropout_p, bool enable_gqa) {
  return composite(
      {query, key, value, bandwidth, kernel, attn_mask, is_causal, exclude_self, normalize, empty,
       dropout_p, std::nullopt, enable_gqa});
}

Gradients backward_autograd(
    const Tensor& grad_output, const Tensor& grad_log_mass, const Tensor& query, const Tensor& key,
    const Tensor& value, const OptionalTensor& bandwidth, const Names& kernel,
    const OptionalTensor& attn_mask, bool is_causal, bool exclude_self, bool normalize,
    std::string_view empty, double dropout_p, const OptionalTensor& seed, bool enable_gqa,
    const Tensor& output, const Tensor& log_mass, std::array<bool, 5> output_mask) {
  const Arguments args{query,        key,       value, bandwidth, kernel, attn_mask, is_causal,
                       exclude_self, normalize, empty, dropout_p, seed,   enable_gqa};
  const bool differentiate = c10::GradMode::is_enabled() &&
                             (grad_output.requires_grad() || grad_log_mass.requires_grad() ||
                              any_requires_grad(differentiable(args)));
  if (!differentiate) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_backward({grad_output, grad_log_mass}, args, {output, log_mass}, output_mask);
  }
  const auto g = Backward::apply(
      grad_output, grad_log_mass, query, key, value, bandwidth, attn_mask, args,
      Forward{output, log_mass}, output_mask);
  return {g[0], g[1], g[2], g[3], g[4]};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, Autograd, m) {
  m.impl("kernel_attention", kernel_attention_autograd);
  m.impl("_kernel_attention_backward", backward_autograd);
}

TORCH_LIBRARY_IMPL(mixhead, FuncTorchBatched, m) {
  m.impl("kernel_attention", kernel_attention_batched);
}

// Reached where autograd is out of play (inference mode, a trace below autograd).
TORCH_LIBRARY_IMPL(mixhead, CompositeExplicitAutograd, m) {
  m.impl("kernel_attention", kernel_attention_below_autograd);
}
TORCH_LIBRARY_IMPL(mixhead, CPU, m) { m.impl("kernel_attention", kernel_attention_below_autograd); }
TORCH_LIBRARY_IMPL(mixhead, Meta, m) {
  m.impl("kernel_attention", kernel_attention_below_autograd);
}

}  // namespace mixhead::kernels
