#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/ir/ir.h>
#include <torch/library.h>

/// torch.jit.trace of the operators that take a list of names. PyTorch's own tracing of operators
/// without a Tracer kernel knows no list of strings; this one records whatever is no tensor as a
/// constant, as a trace does.
namespace mixhead {
namespace {

namespace tracer = torch::jit::tracer;

/// The graph's value of one argument.
torch::jit::Value* traced(torch::jit::Graph& graph, const c10::IValue& argument) {
  if (argument.isTensor() || argument.isNone()) return tracer::getValueTrace(argument);
  return torch::jit::insertConstant(graph, argument);
}

void trace(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto state = tracer::getTracingState();
  const auto& schema = op.schema();
  torch::jit::Node* node = nullptr;
  if (state) {
    auto& graph = *state->graph;
    node = graph.create(
        c10::Symbol::fromQualString(schema.name()), static_cast<size_t>(schema.returns().size()));
    tracer::recordSourceLocation(node);
    for (const auto& argument : torch::jit::last(*stack, schema.arguments().size())) {
      node->addInput(traced(graph, argument));
    }
    graph.insertNode(node);
    tracer::setTracingState(nullptr);
  }
  {
    at::tracer::impl::NoTracerDispatchMode below;
    op.callBoxed(stack);
  }
  if (!state) return;
  tracer::setTracingState(state);
  const auto results = torch::jit::last(*stack, schema.returns().size());
  for (size_t i = 0; i < results.size(); ++i) {
    auto* output = node->output(i);
    output->inferTypeFrom(results[i].toTensor());
    tracer::setValueTrace(results[i], output);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, Tracer, m) {
  for (const auto* name : {"kernel_attention", "local_linear_attention", "matching_attention"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&trace>());
  }
}

}  // namespace mixhead
