#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "differentiate.h"
#include "topk_keys/arguments.h"
#include "transforms.h"

namespace mixhead::topk {
namespace {

using differentiate::any_requires_grad;
using differentiate::first;
using differentiate::list_of;
using differentiate::needed_gradients;
using differentiate::needed_second_gradients;
using differentiate::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// What both functions save: the differentiable arguments, the indices, and the metric beside.
variable_list save(AutogradContext* ctx, const Arguments& args, const Tensor& indices) {
  ctx->saved_data["metric"] = std::string(args.metric);
  const auto tensors = differentiable(args);
  variable_list saved(tensors.begin(), tensors.end());
  saved.push_back(indices);
  return saved;
}

Arguments restore_arguments(AutogradContext* ctx, const variable_list& saved) {
  return {
      .query = saved[0],
      .key = saved[1],
      .k = saved[3].size(-1),
      .mask = optional(saved[2]),
      .metric = ctx->saved_data["metric"].toStringRef()};
}

/// The gradients of topk_keys as a function that can be differentiated once more.
class Backward : public torch::autograd::Function<Backward> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& grad_scores, const Tensor& /*query*/,
      const Tensor& /*key*/, const OptionalTensor& /*mask*/, const Arguments& args,
      const Tensor& indices, OutputMask output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto saved = save(ctx, args, indices);
    saved.push_back(grad_scores);
    ctx->save_for_backward(std::move(saved));
    return list_of(call_backward(grad_scores, args, indices, output_mask));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& second_order) {
    const auto saved = ctx->get_saved_variables();
    const auto args = restore_arguments(ctx, saved);
    const auto partners = first<kDifferentiable>(second_order);
    const auto needed = needed_second_gradients<1>(ctx, differentiable(args));
    auto gradients = double_backward(args, saved[3], saved[4], partners, needed);
    gradients.resize(1 + kDifferentiable + 3);  // args, indices, output_mask have none
    return differentiate::refuse_third_derivative("topk_keys", std::move(gradients), saved);
  }
};

class Search : public torch::autograd::Function<Search> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& /*query*/, const Tensor& /*key*/,
      const OptionalTensor& /*mask*/, const Arguments& args) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [scores, indices] = call_forward(args);
    ctx->mark_non_differentiable({indices});
    ctx->save_for_backward(save(ctx, args, indices));
    return {scores, indices};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto args = restore_arguments(ctx, saved);
    const auto needed = needed_gradients(ctx, differentiable(args));
    return list_of(call_backward(grads[0], args, saved[3], needed), needed);
  }
};

Forward below_autograd(
    const Tensor& query, const Tensor& key, int64_t k, const OptionalTensor& mask,
    std::string_view metric) {
  return call_forward({query, key, k, mask, metric});
}

Forward topk_keys_autograd(
    const Tensor& query, const Tensor& key, int64_t k, const OptionalTensor& mask,
    std::string_view metric) {
  const Arguments args{query, key, k, mask, metric};
  if (transforms::wanted(differentiable(args))) return composite(args);
  if (!c10::GradMode::is_enabled() || !any_requires_grad(differentiable(args))) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_forward(args);
  }
  const auto outputs = Search::apply(query, key, mask, args);
  return {outputs[0], outputs[1]};
}

/// Inside of vmap the vmapped dimension is one more of each operation.
Forward batched(
    const Tensor& query, const Tensor& key, int64_t k, const OptionalTensor& mask,
    std::string_view metric) {
  return composite({query, key, k, mask, metric});
}

Gradients backward_autograd(
    const Tensor& grad_scores, const Tensor& query, const Tensor& key, const OptionalTensor& mask,
    std::string_view metric, const Tensor& indices, OutputMask output_mask) {
  const Arguments args{query, key, indices.size(-1), mask, metric};
  if (!c10::GradMode::is_enabled() ||
      !(grad_scores.requires_grad() || any_requires_grad(differentiable(args)))) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_backward(grad_scores, args, indices, output_mask);
  }
  const auto g = Backward::apply(grad_scores, query, key, mask, args, indices, output_mask);
  return {g[0], g[1], g[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, Autograd, m) {
  m.impl("topk_keys", topk_keys_autograd);
  m.impl("_topk_keys_backward", backward_autograd);
}

TORCH_LIBRARY_IMPL(mixhead, FuncTorchBatched, m) { m.impl("topk_keys", batched); }

// Reached where autograd is out of play (inference mode, a trace below autograd).
TORCH_LIBRARY_IMPL(mixhead, CompositeExplicitAutograd, m) { m.impl("topk_keys", below_autograd); }
TORCH_LIBRARY_IMPL(mixhead, CPU, m) { m.impl("topk_keys", below_autograd); }
TORCH_LIBRARY_IMPL(mixhead, Meta, m) { m.impl("topk_keys", below_autograd); }

}  // namespace mixhead::topk
