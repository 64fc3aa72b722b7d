#include <dropout.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "smoother_testing.h"

namespace smoother_testing {
namespace {

class Reference {
 public:
  explicit Reference(const Inputs& in) : in_(in), c_(in.c) {
    const int64_t all = c_.batch * c_.heads() * c_.rows;
    r_.output.assign(all * c_.value_channels, 0.0);
    r_.grad_query.assign(all * c_.channels, 0.0);
    r_.grad_mix.assign(c_.heads(), 0.0);
    for (int s = 0; s < 2; ++s) {
      r_.lse[s].assign(all, -kInf);
      r_.grad_key[s].assign(in.key[s].values.size(), 0.0);
      r_.grad_value[s].assign(in.value[s].values.size(), 0.0);
      r_.grad_mask[s].assign(in.mask[s].values.size(), 0.0);
    }
    for (int64_t b = 0; b < c_.batch; ++b) {
      for (int64_t h = 0; h < c_.heads(); ++h) {
        for (int64_t i = 0; i < c_.rows; ++i) row(b, h, i);
      }
    }
  }
  const Results& results() const { return r_; }

 private:
  struct Side {
    std::vector<int64_t> slots;
    Doubles attention, keep, output;
    double lse = -kInf;
  };

  Side attend(int s, int64_t b, int64_t h, int64_t i) {
    Side side;
    const int64_t row = (b * c_.heads() + h) * c_.rows + i, width = in_.width(s);
    const int64_t count = s == 1 && c_.named ? c_.named : width;
    const auto key = mixhead::dropout::row_key(in_.seed, s, row);
    Doubles scores;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t slot = s == 1 && c_.named ? in_.index[row * c_.named + k] : k;
      if (slot < 0) continue;
      if (s == 0 && c_.causal && k > c_.keys - c_.rows + i) continue;
      if (c_.mask == Case::padding && !in_.readable[s][b * width + slot]) continue;
      double score = 0.0;
      for (int64_t d = 0; d < c_.channels; ++d) {
        score += in_.query.values[row * c_.channels + d] *
                 in_.key[s].values[(in_.unit(s, b, h) * width + slot) * c_.channels + d];
      }
      score /= std::sqrt(static_cast<double>(c_.channels));
      if (c_.mask == Case::full_float) score += in_.mask[s].values[i * width + slot];
      scores.push_back(score);
      side.slots.push_back(slot);
      const bool dropped = mixhead::dropout::uniform_bits(key, static_cast<uint32_t>(k)) <
                           mixhead::dropout::threshold(c_.dropout);
      side.keep.push_back(dropped ? 0.0 : 1.0 / (1.0 - c_.dropout));
    }
    side.output.assign(c_.value_channels, 0.0);
    if (scores.empty()) return side;
    const double highest = *std::max_element(scores.begin(), scores.end());
    double sum = 0.0;
    for (const double score : scores) sum += std::exp(score - highest);
    side.lse = highest + std::log(sum);
    for (size_t k = 0; k < scores.size(); ++k) {
      side.attention.push_back(std::exp(scores[k] - side.lse));
      for (int64_t d = 0; d < c_.value_channels; ++d) {
        side.output[d] += side.attention[k] * side.keep[k] * value(s, b, h, side.slots[k], d);
      }
    }
    return side;
  }

  double value(int s, int64_t b, int64_t h, int64_t slot, int64_t d) const {
    return in_.value[s].values[(in_.unit(s, b, h) * in_.width(s) + slot) * c_.value_channels + d];
  }

  void row(int64_t b, int64_t h, int64_t i) {
    const int64_t row = (b * c_.heads() + h) * c_.rows + i;
    const std::array<Side, 2> sides{attend(0, b, h, i), attend(1, b, h, i)};
    const bool both = sides[0].lse != -kInf && sides[1].lse != -kInf;
    const double logit = in_.mix.values[h] + (c_.joint && both ? sides[1].lse - sides[0].lse : 0.0);
    const double memory = both ? 1.0 / (1.0 + std::exp(-logit)) : sides[0].lse == -kInf;
    const double weight[2] = {1.0 - memory, sides[1].lse == -kInf ? 0.0 : memory};
    double difference = 0.0;  // <dO, A_m - A_s>
    for (int64_t d = 0; d < c_.value_channels; ++d) {
      const double grad = in_.grad.values[row * c_.value_channels + d];
      difference += grad * (sides[1].output[d] - sides[0].output[d]);
      r_.output[row * c_.value_channels + d] =
          weight[0] * sides[0].output[d] + weight[1] * sides[1].output[d];
    }
    const double grad_logit = both ? memory * (1.0 - memory) * difference : 0.0;
    r_.grad_mix[h] += grad_logit;
    for (int s = 0; s < 2; ++s) {
      const auto& side = sides[s];
      r_.lse[s][row] = side.lse;
      double grad_lse = in_.grad_lse[s].values[row];
      if (c_.joint) grad_lse += s == 1 ? grad_logit : -grad_logit;
      differentiate(s, b, h, i, side, weight[s], grad_lse);
    }
  }

  void differentiate(
      int s, int64_t b, int64_t h, int64_t i, const Side& side, double weight, double grad_lse) {
    const int64_t row = (b * c_.heads() + h) * c_.rows + i, width = in_.width(s);
    const double scale = 1.0 / std::sqrt(static_cast<double>(c_.channels));
    double mean = 0.0;
    Doubles grad_attention(side.slots.size(), 0.0);
    for (size_t k = 0; k < side.slots.size(); ++k) {
      const int64_t at = (in_.unit(s, b, h) * width + side.slots[k]) * c_.value_channels;
      for (int64_t d = 0; d < c_.value_channels; ++d) {
        const double grad = weight * in_.grad.values[row * c_.value_channels + d];
        grad_attention[k] += side.keep[k] * grad * in_.value[s].values[at + d];
        r_.grad_value[s][at + d] += side.attention[k] * side.keep[k] * grad;
      }
      mean += side.attention[k] * grad_attention[k];
    }
    for (size_t k = 0; k < side.slots.size(); ++k) {
      const double grad = side.attention[k] * (grad_attention[k] - mean + grad_lse);
      const int64_t at = (in_.unit(s, b, h) * width + side.slots[k]) * c_.channels;
      for (int64_t d = 0; d < c_.channels; ++d) {
        r_.grad_query[row * c_.channels + d] += scale * grad * in_.key[s].values[at + d];
        r_.grad_key[s][at + d] += scale * grad * in_.query.values[row * c_.channels + d];
      }
      if (c_.mask == Case::full_float) r_.grad_mask[s][i * width + side.slots[k]] += grad;
    }
  }

  const Inputs& in_;
  const Case& c_;
  Results r_;
};

}  // namespace

Results reference(const Inputs& in) { return Reference(in).results(); }

}  // namespace smoother_testing
