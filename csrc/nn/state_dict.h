#pragma once

#include <torch/nn/module.h>

#include <string>

namespace mixhead::nn {

/// Writes the module's parameters and buffers as a dict of name to tensor that Python reads with
/// `torch.load(path, weights_only=True)` and `load_state_dict`. The file appears whole or not at
/// all. Throws c10::Error where it can't be written.
void save_state_dict(const torch::nn::Module& module, const std::string& path);

/// Reads such a file, or one of Python's `torch.save(dict(module.state_dict()), path)`, into the
/// module: every name must be there with the same shape, and no other. (The OrderedDict that
/// state_dict() returns is more than LibTorch reads, hence the dict(...).) As in Python, a
/// checkpoint of torch.nn.MultiheadAttention loads into the layers of mixhead; what it lacks keeps
/// its value. Throws c10::Error naming the file and what is wrong; the module is then as it
/// was.
void load_state_dict(torch::nn::Module& module, const std::string& path);

}  // namespace mixhead::nn
