// Trains the model on short strings and lets it copy and reverse long ones. No Python here:
// LibTorch and libmixhead.so alone.

#include <torch/torch.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.h"

namespace {

constexpr const char* kUsage =
    "usage: copy_reverse [--seed N] [--alphabet N] [--train-length N] [--steps N] [--batch N]\n"
    "                    [--strings N] [--test-batch N] [--width N] [--frequencies N]\n"
    "                    [--lengths N,N,...] [--quick]\n";

struct Arguments {
  std::map<std::string, int64_t> sizes{
      {"--seed", 0},    {"--alphabet", 8},     {"--train-length", 20},
      {"--steps", 400}, {"--batch", 32},       {"--strings", 1000},
      {"--width", 16},  {"--frequencies", 16}, {"--test-batch", 250},
  };
  std::vector<int64_t> lengths{50, 100, 200};

  int64_t operator[](const std::string& name) const { return sizes.at(name); }
};

int64_t number(const std::string& name, const std::string& text, int64_t least) {
  char* end = nullptr;
  const int64_t value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < least) {
    throw std::invalid_argument(
        name + " takes numbers of at least " + std::to_string(least) + ", got '" + text + "'");
  }
  return value;
}

Arguments parse(int count, char** values) {
  Arguments arguments;
  const std::vector<std::string> words(values + 1, values + count);
  if (std::find(words.begin(), words.end(), "--quick") != words.end()) {
    arguments.sizes["--steps"] = 200;
    arguments.sizes["--batch"] = 16;
    arguments.sizes["--strings"] = 20;
  }
  for (size_t i = 0; i < words.size(); ++i) {
    if (words[i] == "--quick") {
      continue;
    }
    const bool known = arguments.sizes.count(words[i]) > 0 || words[i] == "--lengths";
    if (!known || i + 1 == words.size()) {
      throw std::invalid_argument("unknown or incomplete argument " + words[i]);
    }
    const std::string& name = words[i++];
    if (name == "--lengths") {
      arguments.lengths.clear();
      for (size_t from = 0; from <= words[i].size();) {
        const size_t to = std::min(words[i].find(',', from), words[i].size());
        arguments.lengths.push_back(number(name, words[i].substr(from, to - from), 1));
        from = to + 1;
      }
    } else {
      arguments.sizes[name] = number(name, words[i], name == "--seed" ? 0 : 1);
    }
  }
  return arguments;
}

/// int64 (count, 3n + 4): `start x1 ... xn copy x1 ... xn reverse xn ... x1 end`.
torch::Tensor draw(const Alphabet& alphabet, int64_t length, int64_t count) {
  const auto payload = torch::randint(alphabet.size, {count, length}, torch::kInt64);
  const auto mark = [&](int64_t token) { return torch::full({count, 1}, token, torch::kInt64); };
  return torch::cat(
      {mark(alphabet.start()), payload, mark(alphabet.copy()), payload, mark(alphabet.reverse()),
       payload.flip(1), mark(alphabet.end())},
      1);
}

/// The mean of -log of the weight that one head gives, at `places` (n), to the places `target` (n).
torch::Tensor surprise(
    const Reads& reads, int64_t head, const torch::Tensor& places, const torch::Tensor& target) {
  const auto query = reads.query.select(1, head).index_select(1, places);
  const auto key = reads.key.select(1, head).index_select(1, target);
  return (reads.lse.select(1, head).index_select(1, places) - (query * key).sum(-1)).mean();
}

/// How far the heads are from pointing at the last boundary, at the payload's end, at the element
/// to say next forwards, and backwards, in strings of length n.
torch::Tensor pointing_loss(const std::array<Reads, 2>& reads, int64_t n) {
  const auto places = torch::arange(3 * n + 4);
  const auto copying = torch::arange(n + 1, 2 * n + 2);
  const auto reversing = copying + n + 1;
  const auto last_boundary =
      (places.gt(n).to(torch::kInt64) + places.gt(2 * n + 1).to(torch::kInt64)) * (n + 1);
  return surprise(reads[0], 0, places, last_boundary) +
         surprise(reads[0], 1, reversing, torch::full_like(reversing, n + 1)) +
         surprise(reads[1], 0, copying, copying - n) +
         surprise(reads[1], 1, reversing, 3 * n + 2 - reversing);
}

void train(CopyReverse& model, const Alphabet& alphabet, const Arguments& arguments) {
  torch::optim::Adam optimizer(model->parameters(), torch::optim::AdamOptions(1e-2));
  auto& options = static_cast<torch::optim::AdamOptions&>(optimizer.param_groups()[0].options());
  const int64_t steps = arguments["--steps"];
  for (int64_t step = 0; step < steps; ++step) {
    // Up in the first tenth, then down to nothing.
    const double done = static_cast<double>(step) / static_cast<double>(steps);
    options.lr(1e-2 * std::min(10 * done + 0.04, (1 - done) / 0.9));
    const int64_t n = torch::randint(1, arguments["--train-length"] + 1, {1}).item<int64_t>();
    const auto tokens = draw(alphabet, n, arguments["--batch"]);
    const auto output = model->forward(tokens);
    const auto said = output.logits.slice(1, n + 1, 3 * n + 3).flatten(0, 1);
    const auto answer = tokens.slice(1, n + 2).flatten();
    const auto loss =
        torch::nn::functional::cross_entropy(said, answer) + pointing_loss(output.reads, n);
    optimizer.zero_grad();
    loss.backward();
    torch::nn::utils::clip_grad_norm_(model->parameters(), 1.0);
    optimizer.step();
    if (step % 20 == 0 || step + 1 == steps) {
      std::fprintf(stderr, "\rtrain %ld/%ld  loss %.4f", step + 1, steps, loss.item<double>());
    }
  }
  std::fprintf(stderr, "\n");
}

/// The share of strings that it says right from beginning to end, on its own.
double exact(
    CopyReverse& model, const Alphabet& alphabet, int64_t length, const Arguments& arguments) {
  int64_t right = 0;
  const int64_t strings = arguments["--strings"];
  for (int64_t first = 0; first < strings; first += arguments["--test-batch"]) {
    const int64_t count = std::min(arguments["--test-batch"], strings - first);
    const auto tokens = draw(alphabet, length, count);
    const auto answer = tokens.slice(1, length + 2);
    const auto said = model->generate(tokens.slice(1, 0, length + 2), answer.size(1));
    right += said.eq(answer).all(1).sum().item<int64_t>();
  }
  return static_cast<double>(right) / static_cast<double>(strings);
}

}  // namespace

int main(int count, char** values) {
  Arguments arguments;
  try {
    arguments = parse(count, values);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "copy_reverse: %s\n%s", error.what(), kUsage);
    return 2;
  }
  torch::manual_seed(arguments["--seed"]);
  const Alphabet alphabet{arguments["--alphabet"]};
  CopyReverse model(alphabet, arguments["--width"], arguments["--frequencies"]);
  train(model, alphabet, arguments);
  std::string figures;
  for (const int64_t length : arguments.lengths) {
    const double share = exact(model, alphabet, length, arguments);
    figures += (figures.empty() ? "" : ", ") + ("\"exact_" + std::to_string(length) + "\": ") +
               std::to_string(share);
  }
  std::printf("RESULT {%s}\n", figures.c_str());
}
