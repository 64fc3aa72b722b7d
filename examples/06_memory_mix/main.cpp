// Asks the model that run.py trained and saved, and adds entries to its memory. No Python here: the
// model is TorchScript, its operators come from libmixhead.so.

#include <ATen/ATen.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr const char* kFormat = "mixhead example 06_memory_mix, version 1";
constexpr const char* kUsage =
    "usage: memory_mix MODEL.pt [--vectors] [CITATION | --add ABBREVIATION NAME]...\n"
    "\n"
    "Answers each citation (\"410 U.S. 113\", alone or in a sentence) and adds each entry to the\n"
    "memory, in the order given. With neither, reads lines: a citation, or\n"
    "\"add ABBREVIATION = NAME\". --vectors also prints the model's output vectors.\n";

/// What the user gave is not usable: one line, exit code 2.
struct BadInput : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// What went wrong, without the advice and the stack trace that torch adds.
std::string first_sentence(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  const std::string text = torch_error ? torch_error->what_without_backtrace() : error.what();
  return text.substr(0, std::min(text.find('\n'), text.find(". ")));
}

/// uint8 (text.size()).
at::Tensor to_bytes(const std::string& text) {
  const at::Tensor bytes = at::empty({static_cast<int64_t>(text.size())}, at::kByte);
  std::memcpy(bytes.mutable_data_ptr(), text.data(), text.size());
  return bytes;
}

/// The text of uint8 (n), up to its padding.
std::string to_text(const at::Tensor& bytes) {
  const at::Tensor row = bytes.contiguous();
  const auto* data = static_cast<const char*>(row.const_data_ptr());
  return {data, strnlen(data, row.numel())};
}

std::string trimmed(const std::string& text) {
  const auto first = text.find_first_not_of(" \t\r\n");
  return first == std::string::npos
             ? ""
             : text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

class Model {
 public:
  explicit Model(const std::string& path) : module_(load(path)) {
    module_.eval();
    name_width_ = module_.attr("names").toTensor().size(1);
    abbreviation_width_ = module_.attr("abbreviations").toTensor().size(1);
  }

  void add(const std::string& abbreviation, const std::string& name) {
    check("an abbreviation", abbreviation, abbreviation_width_);
    check("a name", name, name_width_);
    const at::Tensor names = module_.attr("names").toTensor();
    if (names.select(1, 0).count_nonzero().item<int64_t>() == names.size(0)) {
      throw BadInput("the memory is full: " + std::to_string(names.size(0)) + " entries");
    }
    module_.get_method("add")({to_bytes(abbreviation).unsqueeze(0), to_bytes(name).unsqueeze(0)});
    std::printf("added    %s = %s\n\n", abbreviation.c_str(), name.c_str());
  }

  void ask(const std::string& text, bool vectors) {
    if (text.empty()) {
      throw BadInput("a citation must not be empty");
    }
    const auto result = module_.get_method("ask")({to_bytes(text)}).toTuple();
    const auto answers = result->elements()[0].toTensorVector();
    const at::Tensor gates = result->elements()[1].toTensor();
    const at::Tensor entries = result->elements()[2].toTensor();
    const at::Tensor outputs = result->elements()[3].toTensor().contiguous();

    std::printf("%s\n", text.c_str());
    const char* questions[] = {"reporter", "volume", "page"};
    for (int64_t i = 0; i < 3; ++i) {
      const auto gate = gates[i].item<float>();
      std::printf("  %-8s  %-40s  ", questions[i], to_text(answers[i]).c_str());
      if (gate > 0.5) {
        std::printf("looked up: gate %.3f, entry \"%s\"\n", gate, to_text(entries[i]).c_str());
      } else {
        std::printf("read in the text: gate %.3f\n", gate);
      }
    }
    for (int64_t i = 0; vectors && i < 3; ++i) {
      std::printf("vector %.9g", gates[i].item<float>());
      for (int64_t channel = 0; channel < outputs.size(1); ++channel) {
        std::printf(" %.9g", outputs[i][channel].item<float>());
      }
      std::printf("\n");
    }
    std::printf("\n");
  }

 private:
  static torch::jit::Module load(const std::string& path) {
    if (!std::ifstream(path)) {
      throw BadInput("cannot read " + path);
    }
    torch::jit::Module module;
    try {
      module = torch::jit::load(path);
    } catch (const std::exception& error) {
      throw BadInput(path + " is not a TorchScript model, or is damaged: " + first_sentence(error));
    }
    if (!module.hasattr("format") || !module.attr("format").isString() ||
        module.attr("format").toStringRef() != kFormat) {
      throw BadInput(
          path + " is a TorchScript model, but not of this example: no \"" + kFormat + "\" in it");
    }
    if (module.attr("digest").toInt() != digest(module)) {
      throw BadInput(path + " is damaged: its numbers are not those that were saved");
    }
    return module;
  }

  /// Of every parameter and buffer, as current_digest() in model.py. PyTorch reads a file without
  /// looking at its checksums.
  static int64_t digest(const torch::jit::Module& module) {
    int64_t result = 0;
    for (const at::Tensor& tensor : module.parameters()) {
      result ^= at::hash_tensor(tensor).view(at::kLong).item<int64_t>();
    }
    for (const at::Tensor& tensor : module.buffers()) {
      result ^= at::hash_tensor(tensor).view(at::kLong).item<int64_t>();
    }
    return result;
  }

  static void check(const char* what, const std::string& text, int64_t width) {
    if (text.empty() || static_cast<int64_t>(text.size()) > width) {
      throw BadInput(
          std::string(what) + " must have 1 to " + std::to_string(width) + " characters, got " +
          std::to_string(text.size()));
    }
  }

  torch::jit::Module module_;
  int64_t name_width_ = 0;
  int64_t abbreviation_width_ = 0;
};

/// "add ABBREVIATION = NAME" adds, anything else asks. A line that can't be used is reported, and
/// the next one read.
void read_lines(Model& model, bool vectors) {
  if (isatty(STDIN_FILENO)) {
    std::printf("A citation, or: add ABBREVIATION = NAME. Ctrl-D ends.\n");
  }
  for (std::string line; std::getline(std::cin, line);) {
    line = trimmed(line);
    const auto equals = line.find('=');
    try {
      if (line.rfind("add ", 0) == 0 && equals != std::string::npos) {
        model.add(trimmed(line.substr(4, equals - 4)), trimmed(line.substr(equals + 1)));
      } else if (!line.empty()) {
        model.ask(line, vectors);
      }
    } catch (const BadInput& error) {
      std::fprintf(stderr, "memory_mix: %s\n", error.what());
    }
    std::fflush(stdout);
  }
}

int run(const std::vector<std::string>& arguments) {
  Model model(arguments[0]);
  bool vectors = false;
  bool worked = false;
  for (size_t i = 1; i < arguments.size(); ++i) {
    if (arguments[i] == "--vectors") {
      vectors = true;
      continue;
    }
    if (arguments[i] == "--add") {
      model.add(trimmed(arguments[i + 1]), trimmed(arguments[i + 2]));
      i += 2;
    } else {
      model.ask(trimmed(arguments[i]), vectors);
    }
    worked = true;
  }
  if (!worked) {
    read_lines(model, vectors);
  }
  return 0;
}

/// A model comes first; --add has two words after it; there is no other flag.
bool well_formed(const std::vector<std::string>& arguments) {
  if (arguments.empty() || arguments[0].rfind("--", 0) == 0) {
    return false;
  }
  for (size_t i = 1; i < arguments.size(); ++i) {
    if (arguments[i] == "--add") {
      i += 2;
      if (i >= arguments.size()) {
        return false;
      }
    } else if (arguments[i].rfind("--", 0) == 0 && arguments[i] != "--vectors") {
      return false;
    }
  }
  return true;
}

}  // namespace

int main(int count, char** values) {
  const std::vector<std::string> arguments(values + 1, values + count);
  if (!well_formed(arguments)) {
    std::fputs(kUsage, stderr);
    return 2;
  }
  try {
    const at::NoGradGuard no_grad;
    return run(arguments);
  } catch (const BadInput& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "memory_mix: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "memory_mix: %s\n", first_sentence(error).c_str());
    return 1;
  }
}
