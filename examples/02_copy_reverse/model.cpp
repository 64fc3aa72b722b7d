#include "model.h"

#include <mixhead/mixed_attention/op.h>
#include <torch/torch.h>

#include <cmath>
#include <numbers>
#include <tuple>

namespace {

constexpr double kLongest = 1 << 15;  // codes of places are unique up to here
constexpr double kFastest = 2.0;      // radians a place

/// Causal attention without a memory; the last query reads all the keys.
std::tuple<torch::Tensor, torch::Tensor> attend(
    const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value) {
  const int64_t heads = key.size(1);
  const auto [output, self_lse, memory_lse] = mixhead::mixed_attention(
      query, key, value, query.new_zeros({heads, 0, key.size(3)}),
      query.new_zeros({heads, 0, value.size(3)}), query.new_zeros({heads, 1, 1}),
      {.is_causal = true, .scale = 1.0});
  return {output, self_lse};
}

/// The product of complex numbers (..., 2): codes of places whose places add up.
torch::Tensor times(const torch::Tensor& a, const torch::Tensor& b) {
  const auto a_real = a.select(-1, 0), a_imaginary = a.select(-1, 1);
  const auto b_real = b.select(-1, 0), b_imaginary = b.select(-1, 1);
  return torch::stack(
      {a_real * b_real - a_imaginary * b_imaginary, a_real * b_imaginary + a_imaginary * b_real},
      -1);
}

/// The code of the negative place.
torch::Tensor conjugate(const torch::Tensor& a) {
  return torch::stack({a.select(-1, 0), -a.select(-1, 1)}, -1);
}

/// What is new (B, H, n, D) from place `start` on, after all that came before it.
torch::Tensor remembered(Cache* cache, size_t slot, const torch::Tensor& now, int64_t start) {
  if (cache == nullptr) {
    return now;
  }
  auto& room = cache->slots[slot];
  room.slice(2, start, start + now.size(2)).copy_(now);
  return room.slice(2, 0, start + now.size(2));
}

}  // namespace

CopyReverseImpl::CopyReverseImpl(Alphabet alphabet, int64_t width, int64_t frequencies)
    : width_(width),
      frequencies_(frequencies),
      embedding_(alphabet.tokens(), width),
      query_(width, 2 * width),
      key_(torch::nn::LinearOptions(width, 2 * width).bias(false)),
      gate_(width, 1),
      output_(width, alphabet.tokens()) {
  const auto ladder = torch::linspace(0, 1, frequencies, torch::kFloat64);
  const double slowest = 2 * std::numbers::pi / kLongest;
  frequency_ = register_buffer("frequency", kFastest * torch::pow(slowest / kFastest, ladder));
  displacement = register_parameter("displacement", torch::zeros({2}));
  log_sharpness_ = register_parameter("log_sharpness", torch::full({2}, std::log(2.0)));
  register_module("embedding", embedding_);
  register_module("query", query_);
  register_module("key", key_);
  register_module("gate", gate_);
  register_module("output", output_);
}

torch::Tensor CopyReverseImpl::code(const torch::Tensor& place) const {
  const auto angle = place.to(torch::kFloat64).unsqueeze(-1) * frequency_;
  return torch::stack({angle.cos(), angle.sin()}, -1).to(torch::kFloat32);
}

CopyReverseImpl::Output CopyReverseImpl::forward(
    const torch::Tensor& tokens, Cache* cache, int64_t start) {
  const int64_t batch = tokens.size(0), length = tokens.size(1);
  const auto embedded = embedding_(tokens);
  const auto place = torch::arange(start, start + length);
  const auto codes = code(place).expand({batch, -1, -1, -1});

  // Layer 1. Scores that grow with the logarithm of the keys' number keep attention as sharp among
  // many as it is among few (Chiang and Cholak, 2022).
  auto query = query_(embedded).unflatten(-1, {2, width_}).transpose(1, 2);
  query = query * (place + 2).to(torch::kFloat32).log().unsqueeze(-1) / std::sqrt(width_);
  auto key = key_(embedded).unflatten(-1, {2, width_}).transpose(1, 2);
  key = remembered(cache, 0, key, start);
  auto value = torch::cat({codes.flatten(2), embedded}, -1).unsqueeze(1);
  value = remembered(cache, 1, value, start).expand({-1, 2, -1, -1});
  const auto [boundary, boundary_lse] = attend(query, key, value);
  const Reads first{query, key, boundary_lse};
  const auto read_codes = boundary.slice(-1, 0, 2 * frequencies_).unflatten(-1, {frequencies_, 2});

  // Layer 2.
  const auto offset = times(codes, conjugate(read_codes.select(1, 0)));
  const auto mirror = times(read_codes.select(1, 1), conjugate(offset));
  const auto angle = displacement.unsqueeze(-1) * frequency_.to(torch::kFloat32);
  const auto turn =
      torch::stack({angle.cos(), angle.sin()}, -1) * log_sharpness_.exp().view({2, 1, 1});
  query = torch::stack({times(offset, turn[0]), times(mirror, turn[1])}, 1).flatten(3);
  key = remembered(cache, 2, codes.unsqueeze(1).flatten(3), start).expand({-1, 2, -1, -1});
  value = remembered(cache, 3, embedded.unsqueeze(1), start).expand({-1, 2, -1, -1});
  const auto [element, element_lse] = attend(query, key, value);

  const auto gate = torch::sigmoid(gate_(boundary.select(1, 0).slice(-1, 2 * frequencies_)));
  const auto read = gate * element.select(1, 0) + (1 - gate) * element.select(1, 1);
  return {output_(read), {first, Reads{query, key, element_lse}}};
}

Cache CopyReverseImpl::new_cache(int64_t batch, int64_t length) const {
  const int64_t code = 2 * frequencies_;
  return {
      {torch::zeros({batch, 2, length, width_}), torch::zeros({batch, 1, length, code + width_}),
       torch::zeros({batch, 1, length, code}), torch::zeros({batch, 1, length, width_})}};
}

torch::Tensor CopyReverseImpl::generate(const torch::Tensor& prompt, int64_t steps) {
  const torch::NoGradGuard no_grad;
  const int64_t start = prompt.size(1);
  auto cache = new_cache(prompt.size(0), start + steps);
  std::vector<torch::Tensor> said;
  auto logits = forward(prompt, &cache).logits;
  for (int64_t step = 0; step < steps; ++step) {
    said.push_back(logits.select(1, -1).argmax(-1));
    if (step + 1 < steps) {
      logits = forward(said.back().unsqueeze(1), &cache, start + step).logits;
    }
  }
  return torch::stack(said, 1);
}
