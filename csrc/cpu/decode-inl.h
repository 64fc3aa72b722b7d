#pragma once
// Up to half a vector of query rows, as a batch of single queries on a shared memory has: the lanes
// are (step of a pair, row) in the first product, (key of a pair, row) in the softmax and the
// values' channels in the second product.
//
// Such a block does 2 * rows operations for each number it reads, so that it runs at the speed of
// the memory: while one block is multiplied the next is fetched.
#include "cpu/forward-panel-inl.h"

namespace mixhead::cpu {
namespace {

/// Whether two steps' operands fit beside each other into the lanes of half as many rows.
template <class M>
constexpr bool kCanPair = kVectorBytes == 64 && sizeof(typename M::Operand) == 4;

/// [step][lanes] to [step / 2][lanes], the steps of a pair in neighbouring lanes.
template <class Operand>
void pair_steps(Operand* query, int64_t steps, int64_t rows) {
  constexpr int64_t lanes = kVectorBytes / sizeof(Operand);
  for (int64_t step = 0; step < steps; step += 2) {
    Operand paired[lanes] = {};
    for (int64_t row = 0; row < rows; ++row) {
      paired[2 * row] = query[step * lanes + row];
      paired[2 * row + 1] = query[(step + 1) * lanes + row];
    }
    for (int64_t lane = 0; lane < lanes; ++lane) query[step / 2 * lanes + lane] = paired[lane];
  }
}

/// Products of paired steps, [key][lanes]: the sums of a lane pair belong together.
template <class M>
void multiply_paired(
    const Problem& problem, const ForwardPanel<M>& panel, int64_t keys, const Broadcast& key,
    float* products, const Fetch& next_key) {
  constexpr int64_t block = 16, lanes = kLanes<float>;
  const int64_t steps = problem.channels / Paired<M>::steps, whole = keys / block * block;
  const Strides strides{key.strides.row, 2 * key.strides.step};
  const char* at = static_cast<const char*>(key.data);
  if (next_key.data) {
    gemm_rows<Paired<M>, block, 1, 2>(
        whole, steps, at, strides, panel.query, lanes, products, lanes, Update::store, products,
        next_key);
  } else {
    gemm_rows<Paired<M>, block, 1>(
        whole, steps, at, strides, panel.query, lanes, products, lanes, Update::store, products);
  }
  gemm<Paired<M>, 1>(
      keys - whole, steps, at + whole * strides.row, strides, panel.query, lanes,
      products + whole * lanes, lanes);
}

#if defined(__AVX512F__)

/// The sums of two keys' lane pairs, [key][row].
inline __attribute__((always_inline)) Vector<float> fold_pairs(
    Vector<float> first, Vector<float> second) {
  const auto even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const auto odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return (Vector<float>)_mm512_add_ps(
      _mm512_permutex2var_ps((__m512)first, even, (__m512)second),
      _mm512_permutex2var_ps((__m512)first, odd, (__m512)second));
}

/// Half `first` (0 or 1) of a beside half `second` of b.
template <int first, int second>
inline __attribute__((always_inline)) Vector<float> halves(Vector<float> a, Vector<float> b) {
  constexpr int order = first * 0xE + (1 - first) * 0x4 + (second * 0xE + (1 - second) * 0x4) * 16;
  return (Vector<float>)_mm512_shuffle_f32x4((__m512)a, (__m512)b, order);
}

/// Products [key][lanes] to scores [key][half], -inf where the last vector has no key; returns the
/// running maximum in both halves.
inline Vector<float> decode_scores(
    float* scores, int64_t keys, int64_t vectors, float factor, Vector<float> highest) {
  constexpr int64_t lanes = kLanes<float>;
  const auto nothing = broadcast(-kInfinity<float>);
  for (int64_t v = 0; v < vectors; ++v) {
    Vector<float> score = nothing;
    if (2 * v + 1 < keys) {
      score = fold_pairs(
                  load<float>(scores + 2 * v * lanes), load<float>(scores + (2 * v + 1) * lanes)) *
              factor;
    } else if (2 * v < keys) {
      const auto last = load<float>(scores + 2 * v * lanes);
      score = halves<0, 0>(fold_pairs(last, last) * factor, nothing);
    }
    highest = max(highest, score);
    store(scores + v * lanes, score);
  }
  return max(highest, halves<1, 0>(highest, highest));
}

/// Scores to weights of the second product, [step][half]; returns their sums in both halves.
template <class M>
Vector<float> decode_weights(float* scores, int64_t vectors, Vector<float> highest) {
  constexpr int64_t lanes = kLanes<float>;
  Vector<float> sum{};
  for (int64_t v = 0; v < vectors; v += 2) {
    const auto first = exp<float>(load<float>(scores + v * lanes) - highest);
    const auto second = exp<float>(load<float>(scores + (v + 1) * lanes) - highest);
    sum += first + second;
    if constexpr (M::steps == 1) {
      store(scores + v * lanes, first);
      store(scores + (v + 1) * lanes, second);
    }
#if defined(__AVX512BF16__)
    if constexpr (M::steps == 2) {
      store(
          scores + v / 2 * lanes,
          pair_rows(halves<0, 0>(first, second), halves<1, 1>(first, second)));
    }
#endif
  }
  return sum + halves<1, 0>(sum, sum);
}

/// Outputs += weights * values; B is M, or BFloat16Rows for values as they are given.
template <class M, class B>
void decode_values(
    const Problem& problem, ForwardPanel<M>& panel, int64_t steps, const Broadcast& value,
    const float* weights, const Fetch& next_value) {
  using Operand = typename M::Operand;
  constexpr int64_t lanes = kLanes<float>, half = lanes / 2, size = sizeof(Operand);
  const int64_t channels = problem.value_channels;
  for (int64_t c = 0; c < channels; c += 2 * lanes) {
    const auto* values = static_cast<const char*>(value.data) + c * value.strides.row;
    const auto add = [&]<int count, int fetch_lines>() {
      const Fetch part{next_value.data + c * steps * size, 0};
      gemm_rows<B, half, count, fetch_lines>(
          half, steps, reinterpret_cast<const char*>(weights), {size, half * size},
          reinterpret_cast<const Operand*>(values), value.strides.step / size, panel.output + c,
          channels, Update::add, weights, part);
    };
    if (channels - c < 2 * lanes) {
      add.template operator()<1, 0>();
    } else if (next_value.data) {
      add.template operator()<2, 2>();
    } else {
      add.template operator()<2, 0>();
    }
  }
}

/// Whether decode_block can do a block of keys that ends before `last`.
template <class M>
bool decodes(
    const Problem& problem, const ForwardPanel<M>& panel, const Bias<float>& bias, int64_t last) {
  const bool all = bias.kind == Bias<float>::none && panel.rows.fewest >= last;
  return panel.paired && panel.by_row && all && !problem.dropout.on;
}

/// One key block, all of which every row may read, past a paired panel with outputs by row.
template <class M, class Io>
void decode_block(
    const Problem& problem, ForwardPanel<M>& panel, int64_t keys, const KeyRows<Io>& key_rows,
    const KeyRows<Io>& value_rows, ForwardScratch<Io>& scratch, const Fetch& next_key,
    const Fetch& next_value) {
  constexpr int64_t lanes = kLanes<float>, half = lanes / 2;
  float* scores = scratch.scores;
  const auto key = by_channel<M>(key_rows, keys, problem.channels, scratch.key);
  multiply_paired(problem, panel, keys, key, scores, next_key);

  const int64_t vectors = divide_up(keys, 4) * 2;
  const auto factor = static_cast<float>(DotKernel{problem.scale}.factor());
  const auto held = load<float>(panel.highest), before = halves<0, 0>(held, held);
  const auto highest = decode_scores(scores, keys, vectors, factor, before);
  const auto base = highest == -kInfinity<float> ? Vector<float>{} : highest;
  const auto sum = decode_weights<M>(scores, vectors, base);
  const auto alpha = exp<float>(before - base);
  store(panel.highest, highest);
  store(panel.sum, load<float>(panel.sum) * alpha + sum);

  const int64_t channels = problem.value_channels, steps = divide_up(keys, M::steps);
  for (int64_t row = 0; row < half; ++row) {
    for (int64_t c = 0; c < channels; ++c) panel.output[row * channels + c] *= alpha[row];
  }
#if defined(__AVX512BF16__)
  if constexpr (M::steps == 2) {
    if (keys % 2 == 0) {
      const Broadcast as_given{value_rows.data, {2, 4 * value_rows.row}};
      decode_values<M, BFloat16Rows>(problem, panel, steps, as_given, scores, next_value);
      return;
    }
  }
#endif
  const auto value = by_key<M>(value_rows, keys, channels, scratch.value);
  decode_values<M, M>(problem, panel, steps, value, scores, next_value);
}

#endif

}  // namespace
}  // namespace mixhead::cpu
