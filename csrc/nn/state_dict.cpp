#include "nn/state_dict.h"

#include <ATen/core/Dict.h>
#include <c10/util/Exception.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/csrc/jit/serialization/pickler.h>
#include <torch/serialize.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <string_view>
#include <vector>

#include "nn/kernel_multihead_attention.h"
#include "nn/mixed_multihead_attention.h"

namespace mixhead::nn {
namespace {

using StateDict = std::map<std::string, at::Tensor>;

StateDict state_dict(const torch::nn::Module& module) {
  StateDict state;
  for (const auto& parameter : module.named_parameters()) {
    state.emplace(parameter.key(), parameter.value());
  }
  for (const auto& buffer : module.named_buffers()) {
    state.emplace(buffer.key(), buffer.value());
  }
  return state;
}

void write(const c10::Dict<std::string, at::Tensor>& state, const std::string& path) {
  caffe2::serialize::PyTorchStreamWriter writer(path);
  std::string pickle;
  // Without type tags, which Python's weights_only does not read.
  torch::jit::Pickler pickler(
      [&pickle](const char* bytes, size_t count) { pickle.append(bytes, count); }, nullptr, nullptr,
      nullptr, {}, /*tag_aggregates=*/false);
  pickler.protocol();
  pickler.pushIValue(state);
  pickler.stop();
  writer.writeRecord("data.pkl", pickle.data(), pickle.size());
  size_t index = 0;
  for (const at::Tensor& tensor : pickler.tensorData()) {
    writer.writeRecord(
        "data/" + std::to_string(index++), tensor.storage().data(), tensor.storage().nbytes());
  }
  writer.writeEndOfFile();
}

/// What went wrong in a line; LibTorch's own errors carry a backtrace.
std::string reason(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  return torch_error ? torch_error->what_without_backtrace() : error.what();
}

StateDict read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "load_state_dict: can't read '", path, "'");
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  StateDict state;
  try {
    for (const auto& entry : torch::pickle_load(bytes).toGenericDict()) {
      state.emplace(entry.key().toStringRef(), entry.value().toTensor());
    }
  } catch (const std::exception&) {
    TORCH_CHECK(
        false, "load_state_dict: '", path,
        "' is no dict of tensors; save one in C++ with "
        "save_state_dict(module, path), in Python with torch.save(dict(module.state_dict()), "
        "path)");
  }
  return state;
}

/// The names in a state dict of torch.nn.MultiheadAttention; what else a layer has it adds.
constexpr std::array<std::string_view, 7> torch_names{
    "in_proj_weight", "in_proj_bias",    "q_proj_weight", "k_proj_weight",
    "v_proj_weight",  "out_proj.weight", "out_proj.bias"};

/// The names of our attention layers that torch.nn.MultiheadAttention lacks, wherever `state` has
/// none of them.
std::set<std::string> additions_absent(const torch::nn::Module& module, const StateDict& state) {
  std::set<std::string> absent;
  for (const auto& child : module.named_modules("", /*include_self=*/true)) {
    const torch::nn::Module& layer = *child.value();
    if (!layer.as<MixedMultiheadAttentionImpl>() && !layer.as<KernelMultiheadAttentionImpl>()) {
      continue;
    }
    const std::string prefix = child.key().empty() ? "" : child.key() + ".";
    std::set<std::string> additions;
    bool any_present = false;
    for (const auto& [name, tensor] : state_dict(layer)) {
      if (std::ranges::find(torch_names, name) == torch_names.end()) {
        additions.insert(prefix + name);
        any_present = any_present || state.count(prefix + name);
      }
    }
    if (!any_present) {
      absent.merge(additions);
    }
  }
  return absent;
}

void check(const torch::nn::Module& module, const StateDict& saved, const std::string& path) {
  const StateDict own = state_dict(module);
  const std::set<std::string> optional = additions_absent(module, saved);
  for (const auto& [name, tensor] : own) {
    const auto found = saved.find(name);
    TORCH_CHECK(
        found != saved.end() || optional.count(name), "load_state_dict: '", path, "' has no ",
        name);
    TORCH_CHECK(
        found == saved.end() || found->second.sizes() == tensor.sizes(), "load_state_dict: ", name,
        " must have shape ", tensor.sizes(), ", got ", found->second.sizes(), " in '", path, "'");
  }
  for (const auto& [name, tensor] : saved) {
    TORCH_CHECK(
        own.count(name), "load_state_dict: '", path, "' has ", name, ", which the module has not");
  }
}

}  // namespace

void save_state_dict(const torch::nn::Module& module, const std::string& path) {
  c10::Dict<std::string, at::Tensor> state;
  for (const auto& [name, tensor] : state_dict(module)) {
    state.insert(name, tensor.detach().cpu().contiguous().clone());
  }
  const std::string unfinished = path + ".unfinished";
  try {
    write(state, unfinished);
    std::filesystem::rename(unfinished, path);
  } catch (const std::exception& error) {
    std::error_code ignored;
    std::filesystem::remove(unfinished, ignored);
    TORCH_CHECK(false, "save_state_dict: can't write '", path, "': ", reason(error));
  }
}

void load_state_dict(torch::nn::Module& module, const std::string& path) {
  const StateDict saved = read(path);
  check(module, saved, path);
  torch::NoGradGuard no_grad;
  for (auto& [name, tensor] : state_dict(module)) {
    const auto found = saved.find(name);
    if (found != saved.end()) {
      tensor.copy_(found->second);
    }
  }
}

}  // namespace mixhead::nn
