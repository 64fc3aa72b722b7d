#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <array>
#include <cstdint>
#include <vector>

/// Payload symbols 0 ... size - 1, then four marks.
struct Alphabet {
  int64_t size;
  int64_t start() const { return size; }
  int64_t copy() const { return size + 1; }
  int64_t reverse() const { return size + 2; }
  int64_t end() const { return size + 3; }
  int64_t tokens() const { return size + 4; }
};

/// Attention as it was read: queries (B, 2, n, D), keys (B, 2, S, D), log-sum-exps (B, 2, n).
struct Reads {
  torch::Tensor query;
  torch::Tensor key;
  torch::Tensor lse;
};

/// What the places so far are remembered by: room for `length` of them.
struct Cache {
  std::array<torch::Tensor, 4> slots;
};

/// The twin of model.py's CopyReverse: says the next token of
/// `start x1 ... xn copy x1 ... xn reverse xn ... x1 end`. Layer 1 reads the codes exp(i w p) of
/// the last boundary and of the payload's end; layer 2 points, with the codes of the places since
/// that boundary and of as many places before that end, at the element to say forwards and
/// backwards.
class CopyReverseImpl : public torch::nn::Module {
 public:
  CopyReverseImpl(Alphabet alphabet, int64_t width, int64_t frequencies);

  struct Output {
    torch::Tensor logits;        // (B, n, tokens)
    std::array<Reads, 2> reads;  // of layer 1 and of layer 2
  };
  /// tokens int64 (B, n) from place `start` on; `cache`, if any, holds the places before.
  Output forward(const torch::Tensor& tokens, Cache* cache = nullptr, int64_t start = 0);

  Cache new_cache(int64_t batch, int64_t length) const;

  /// What it says on its own after the prompt (B, n): int64 (B, steps).
  torch::Tensor generate(const torch::Tensor& prompt, int64_t steps);

  torch::Tensor displacement;

 private:
  torch::Tensor code(const torch::Tensor& place) const;

  int64_t width_;
  int64_t frequencies_;
  torch::Tensor frequency_;
  torch::Tensor log_sharpness_;
  torch::nn::Embedding embedding_;
  torch::nn::Linear query_;
  torch::nn::Linear key_;
  torch::nn::Linear gate_;
  torch::nn::Linear output_;
};
TORCH_MODULE(CopyReverse);
