#include "chunked.h"

#include <ATen/TensorUtils.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <functional>
#include <numeric>

#include "wide_dtype.h"

namespace mixhead::chunked {
namespace {

using torch::autograd::variable_list;

/// Elements that one call of the formula may hold at a time, operands' slices included: on a CPU
/// what its caches hold, elsewhere enough to fill a device with each call.
int64_t budget(const Problem& problem) {
  const bool on_cpu = problem.operands.front().tensor.is_cpu();
  return int64_t{1} << (on_cpu ? 21 : 25);
}

int64_t product(at::IntArrayRef sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
}

/// Whether the leading dimensions can be flattened to one by a view, or are all 1.
bool has_flat_batch(const Tensor& tensor, at::IntArrayRef batch_shape) {
  const auto leading = tensor.sizes().slice(0, batch_shape.size());
  if (product(leading) == 1) return true;
  if (leading != batch_shape) return false;
  at::DimVector flat{product(leading)};
  const auto rest = tensor.sizes().slice(batch_shape.size());
  flat.append(rest.begin(), rest.end());
  return at::detail::computeStride(tensor.sizes(), tensor.strides(), flat).has_value();
}

/// `tensor` with leading dimensions of size 1 added until it has those of the query.
Tensor aligned(Tensor tensor, const Problem& problem) {
  const auto dims = static_cast<int64_t>(problem.batch_shape.size()) + 3;
  while (tensor.dim() < dims) tensor = tensor.unsqueeze(0);
  return tensor;
}

/// Entry `batch` of the flattened leading dimensions of a tensor that broadcasts along some.
Tensor select_batch(Tensor tensor, int64_t batch, at::IntArrayRef batch_shape) {
  for (auto i = static_cast<int64_t>(batch_shape.size()) - 1; i >= 0; --i) {
    const auto coordinate = batch % batch_shape[i];
    batch /= batch_shape[i];
    tensor = tensor.select(i, tensor.size(i) == 1 ? 0 : coordinate);
  }
  return tensor.unsqueeze(0);
}

/// A view of the part of `operand` that `chunk` covers, 4-dimensional.
Tensor slice(const Operand& operand, const Problem& problem, const Chunk& chunk) {
  auto tensor = aligned(operand.tensor, problem);
  const auto batch_dims = static_cast<int64_t>(problem.batch_shape.size());
  if (has_flat_batch(tensor, problem.batch_shape)) {
    tensor = tensor.flatten(0, batch_dims - 1);
    if (tensor.size(0) != 1) tensor = tensor.narrow(0, chunk.batch, chunk.batches);
  } else {
    tensor = select_batch(std::move(tensor), chunk.batch, problem.batch_shape);
  }
  const auto per_head = operand.axes == Axes::query ? problem.groups : 1;
  if (tensor.size(1) != 1) {
    tensor = tensor.narrow(1, chunk.head * per_head, chunk.heads * per_head);
  }
  if (operand.axes == Axes::query && tensor.size(2) != 1) {
    tensor = tensor.narrow(2, chunk.row, chunk.rows);
  }
  return tensor;
}

Tensor output_slice(const Tensor& output, const Problem& problem, const Chunk& chunk) {
  return slice({output, Axes::query}, problem, chunk);
}

/// As many rows as the budget allows, then batches, then heads: the keys are read least often.
Chunk chunk_size(const Problem& problem) {
  const auto fitting = [](int64_t budget, int64_t each, int64_t all) {
    return std::clamp<int64_t>(budget / std::max<int64_t>(each, 1), 1, std::max<int64_t>(all, 1));
  };
  const auto batches = product(problem.batch_shape), all = budget(problem);
  Chunk size{0, 1, 0, 1, 0, 0};
  const auto row = problem.groups * problem.row_elements;
  size.rows = fitting(all, row, problem.rows);
  if (size.rows < problem.rows) return size;
  const auto head = row * problem.rows + problem.head_elements;
  const bool flat =
      std::all_of(problem.operands.begin(), problem.operands.end(), [&](const Operand& operand) {
        return !operand.tensor.defined() ||
               has_flat_batch(aligned(operand.tensor, problem), problem.batch_shape);
      });
  if (flat) size.batches = fitting(all, head, batches);
  if (size.batches < batches) return size;
  size.heads = fitting(all, head * batches, problem.heads);
  return size;
}

template <class Visit>
void for_each_chunk(const Problem& problem, const Visit& visit) {
  const auto size = chunk_size(problem);
  const auto batches = product(problem.batch_shape);
  for (int64_t head = 0; head < problem.heads; head += size.heads) {
    for (int64_t batch = 0; batch < batches; batch += size.batches) {
      for (int64_t row = 0; row < problem.rows; row += size.rows) {
        visit(Chunk{
            batch, std::min(size.batches, batches - batch), head,
            std::min(size.heads, problem.heads - head), row,
            std::min(size.rows, problem.rows - row)});
      }
    }
  }
}

/// Kernels run below autograd and may be called under autocast; the formula's own derivative needs
/// the first back and the second away.
class EnableAutograd {
 public:
  EnableAutograd() : guard_(keys()), grad_mode_(true) {}

 private:
  static c10::impl::LocalDispatchKeySet keys() {
    auto keys = c10::impl::tls_local_dispatch_key_set();
    keys.excluded_ = (keys.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView) |
                     c10::autocast_dispatch_keyset;
    return keys;
  }
  c10::impl::ForceDispatchKeyGuard guard_;
  c10::AutoGradMode grad_mode_;
};

Tensor accumulable(const Tensor& tensor, at::ScalarType dtype) {
  return tensor.is_floating_point() ? tensor.to(dtype) : tensor;
}

variable_list leaves(const Problem& problem, const Chunk& chunk, const std::vector<bool>& needed) {
  variable_list result;
  for (size_t i = 0; i < problem.operands.size(); ++i) {
    const auto& operand = problem.operands[i];
    if (!operand.tensor.defined()) {
      result.emplace_back();
      continue;
    }
    auto leaf = accumulable(slice(operand, problem, chunk).detach(), problem.accumulate);
    result.push_back(needed[i] ? leaf.requires_grad_() : leaf);
  }
  return result;
}

/// Accumulators in the shape of `of`, undefined where not needed.
std::vector<Tensor> accumulators(
    const std::vector<Tensor>& of, const std::vector<bool>& needed, at::ScalarType dtype) {
  std::vector<Tensor> result(of.size());
  for (size_t i = 0; i < of.size(); ++i) {
    if (needed[i] && of[i].defined())
      result[i] = at::zeros(of[i].sizes(), of[i].options().dtype(dtype));
  }
  return result;
}

std::vector<Tensor> in_own_dtype(std::vector<Tensor> tensors, const std::vector<Tensor>& of) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].defined()) tensors[i] = tensors[i].to(of[i].scalar_type());
  }
  return tensors;
}

/// Detached, and copied where its leading dimensions could not be sliced together.
std::vector<Tensor> sliceable(const std::vector<Tensor>& tensors, const Problem& problem) {
  std::vector<Tensor> result;
  for (const auto& tensor : tensors) {
    const bool flat =
        !tensor.defined() || has_flat_batch(aligned(tensor, problem), problem.batch_shape);
    result.push_back(flat ? tensor : tensor.contiguous());
    if (tensor.defined()) result.back() = result.back().detach();
  }
  return result;
}

std::vector<Tensor> operand_tensors(const Problem& problem) {
  std::vector<Tensor> tensors;
  tensors.reserve(problem.operands.size());
  for (const auto& operand : problem.operands) tensors.push_back(operand.tensor);
  return tensors;
}

/// torch::autograd::grad that takes only what takes part: outputs that depend on something, inputs
/// that require a gradient. Undefined for the rest.
variable_list gradients(
    const variable_list& outputs, const variable_list& inputs, const variable_list& grads,
    bool create_graph) {
  variable_list live_outputs, live_grads, live_inputs;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i].defined() || !outputs[i].defined() || !outputs[i].requires_grad()) continue;
    live_outputs.push_back(outputs[i]);
    live_grads.push_back(grads[i].expand_as(outputs[i]));
  }
  for (const auto& input : inputs) {
    if (input.defined() && input.requires_grad()) live_inputs.push_back(input);
  }
  variable_list result(inputs.size());
  if (live_outputs.empty() || live_inputs.empty()) return result;
  const auto found = torch::autograd::grad(
      live_outputs, live_inputs, live_grads, /*retain_graph=*/create_graph, create_graph,
      /*allow_unused=*/true);
  for (size_t i = 0, next = 0; i < inputs.size(); ++i) {
    if (inputs[i].defined() && inputs[i].requires_grad()) result[i] = found[next++];
  }
  return result;
}

}  // namespace

Problem::Problem(
    const Tensor& query, int64_t key_heads, int64_t row_elements, int64_t head_elements)
    : batch_shape(query.sizes().begin(), query.sizes().end() - 3),
      heads(key_heads),
      groups(query.size(-3) / key_heads),
      rows(query.size(-2)),
      row_elements(row_elements),
      head_elements(head_elements),
      accumulate(wide_dtype(query)) {
  if (batch_shape.empty()) batch_shape.push_back(1);
}

std::vector<Tensor> composite(const Problem& problem, const Tensor& query) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto batches = product(problem.batch_shape);
  const auto batch_dims = static_cast<int64_t>(problem.batch_shape.size());
  std::vector<Tensor> operands;
  for (const auto& operand : problem.operands) {
    operands.emplace_back();
    if (!operand.tensor.defined()) continue;
    auto tensor = aligned(operand.tensor, problem);
    const auto rest = tensor.sizes().slice(batch_dims);
    const bool shared = product(tensor.sizes().slice(0, batch_dims)) == 1;
    at::DimVector all(problem.batch_shape), flat{shared ? 1 : batches};
    all.append(rest.begin(), rest.end());
    flat.append(rest.begin(), rest.end());
    if (!shared) tensor = tensor.expand(all);
    operands.back() = accumulable(tensor.reshape(flat), problem.accumulate);
  }
  auto results = problem.formula(operands, {0, batches, 0, problem.heads, 0, problem.rows});
  for (auto& result : results) {
    at::DimVector sizes(query.sizes().begin(), query.sizes().end() - 1);
    sizes.push_back(result.size(-1));
    result = result.reshape(sizes);
  }
  return results;
}

void forward(const Problem& problem, const std::vector<Tensor>& outputs) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const std::vector<bool> none(problem.operands.size(), false);
  for_each_chunk(problem, [&](const Chunk& chunk) {
    const auto results = problem.formula(leaves(problem, chunk, none), chunk);
    for (size_t i = 0; i < outputs.size(); ++i) {
      output_slice(outputs[i], problem, chunk).copy_(results[i]);
    }
  });
}

std::vector<Tensor> backward(
    const Problem& problem, const std::vector<Tensor>& grads, const std::vector<bool>& needed) {
  EnableAutograd autograd;
  const auto tensors = operand_tensors(problem);
  const auto output_grads = sliceable(grads, problem);
  auto result = accumulators(tensors, needed, problem.accumulate);
  for_each_chunk(problem, [&](const Chunk& chunk) {
    const auto inputs = leaves(problem, chunk, needed);
    variable_list incoming;
    for (const auto& grad : output_grads) {
      incoming.push_back(accumulable(output_slice(grad, problem, chunk), problem.accumulate));
    }
    const auto found = gradients(problem.formula(inputs, chunk), inputs, incoming, false);
    c10::AutoGradMode no_grad(false);
    for (size_t i = 0; i < found.size(); ++i) {
      if (!found[i].defined()) continue;
      slice({result[i], problem.operands[i].axes}, problem, chunk).add_(found[i]);
    }
  });
  return in_own_dtype(std::move(result), tensors);
}

std::vector<Tensor> double_backward(
    const Problem& problem, const std::vector<Tensor>& grads,
    const std::vector<Tensor>& second_order, const std::vector<bool>& needed) {
  EnableAutograd autograd;
  auto tensors = grads;
  const auto output_grads = sliceable(grads, problem);
  auto partners = sliceable(second_order, problem);
  const auto operands = operand_tensors(problem);
  for (size_t i = 0; i < partners.size(); ++i) {
    // A first derivative that nobody asked for is an empty tensor, and so is its partner.
    if (partners[i].defined() && partners[i].numel() < operands[i].numel()) partners[i] = Tensor();
  }
  tensors.insert(tensors.end(), operands.begin(), operands.end());
  auto result = accumulators(tensors, needed, problem.accumulate);
  // The first derivative must exist for every operand it is paired with.
  std::vector<bool> all(operands.size());
  for (size_t i = 0; i < operands.size(); ++i) {
    all[i] = operands[i].defined() && operands[i].is_floating_point();
  }
  for_each_chunk(problem, [&](const Chunk& chunk) {
    const auto inputs = leaves(problem, chunk, all);
    variable_list incoming, paired(inputs.size());
    for (const auto& grad : output_grads) {
      const auto part = output_slice(grad, problem, chunk).to(problem.accumulate);
      incoming.push_back(part.detach().requires_grad_());
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!all[i] || !partners[i].defined()) continue;
      paired[i] =
          slice({partners[i], problem.operands[i].axes}, problem, chunk).to(problem.accumulate);
    }
    const auto first = gradients(problem.formula(inputs, chunk), inputs, incoming, true);
    auto variables = incoming;
    variables.insert(variables.end(), inputs.begin(), inputs.end());
    const auto found = gradients(first, variables, paired, false);
    c10::AutoGradMode no_grad(false);
    for (size_t i = 0; i < found.size(); ++i) {
      if (!found[i].defined() || !needed[i]) continue;
      const auto axes = i < grads.size() ? Axes::query : problem.operands[i - grads.size()].axes;
      slice({result[i], axes}, problem, chunk).add_(found[i]);
    }
  });
  return in_own_dtype(std::move(result), tensors);
}

}  // namespace mixhead::chunked
