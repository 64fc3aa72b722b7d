#pragma once
// What a kernel function does to a block of similarities: one set of loops for each kernel, so that
// the streaming around them is compiled once.
#include "cpu/panel-inl.h"

namespace mixhead::cpu {
namespace {

/// A block of keys past a panel of rows; matrices are [key][lane].
template <class Acc>
struct PairBlock {
  const Rows<Acc>* rows;
  const Dropout* dropout;
  int64_t first, keys, width;
  const Acc* bias;  // null where every row may read every key; -inf where it may not
  Acc* scores;      // similarities; then weights
};

/// What the backward reads and writes besides.
template <class Acc>
struct PairGradients {
  const Acc* lse;           // of each lane; inf where nothing is read
  const Acc* inverse_mass;  // exp(-lse)
  const Acc* delta;
  const Acc* share;
  Acc* gradients;    // dO . value; then the derivative by the similarity
  Acc* row_sums;     // (lanes), added to
  Acc* column_sums;  // [key][one vector of lanes], added to, or null
};

/// What the exponentials of a block are relative to: nothing, where there are none; the running
/// maximum just raised; or a maximum that stays, because exponents are at most 0 and it is so close
/// to 0 that nothing overflows.
enum class Relative : uint8_t { nothing, running, settled };
template <class Acc>
constexpr Acc kSettled = Acc{-60};

template <class Acc>
struct KernelLoops {
  bool running;  // exponentials relative to a running maximum; else plain sums
  bool settles;  // no exponent is above 0
  bool compact;
  /// Similarities become coordinates; `highest` is raised to the largest exponent. Null where the
  /// sums are plain.
  void (*find_highest)(const PairBlock<Acc>&, Acc* highest);
  /// Coordinates (similarities where the sums are plain) become weights, which are added to `sum`
  /// before dropout.
  void (*weigh)(const PairBlock<Acc>&, const Acc* highest, Acc* sum);
  /// The same of similarities, where the maximum has settled.
  void (*weigh_settled)(const PairBlock<Acc>&, const Acc* highest, Acc* sum);
  /// Similarities become weights, and dO . value the derivative by the similarity:
  ///   A = K / mass,  g = share keep (dO . value) - delta,  scores = share keep A,
  ///   gradients = (dK/dx / mass) g
  void (*differentiate)(const PairBlock<Acc>&, const PairGradients<Acc>&);
  /// The same with A g, the derivative by an additive mask, in `gradients`.
  void (*differentiate_mask)(const PairBlock<Acc>&, const PairGradients<Acc>&);
};

/// Calls f.operator()<biased, dropped>() with what the block needs as constants.
template <class Acc, class F>
void with_options(const PairBlock<Acc>& block, const F& f) {
  if (block.bias) {
    block.dropout->on ? f.template operator()<true, true>() : f.template operator()<true, false>();
  } else {
    block.dropout->on ? f.template operator()<false, true>()
                      : f.template operator()<false, false>();
  }
}

template <class Acc, class K>
void find_highest(const PairBlock<Acc>& block, Acc* highest) {
  using V = Vector<Acc>;
  const V nothing = broadcast(-kInfinity<Acc>);
  for (int64_t j = 0; j < block.width; j += kLanes<Acc>) {
    V top = load<Acc>(highest + j);
    for (int64_t k = 0; k < block.keys; ++k) {
      Acc* at = block.scores + k * block.width + j;
      const V t = K::coordinate(load<Acc>(at));
      store(at, t);
      V exponent = K::exponent(t);
      if (block.bias) {
        const V bias = load<Acc>(block.bias + k * block.width + j);
        exponent = bias == nothing ? nothing : exponent + bias;
      }
      // A key outside the support has no say, whatever its prior weight.
      if constexpr (K::plain) exponent = K::factor(t) > Acc{0} ? exponent : nothing;
      top = max(top, exponent);
    }
    store(highest + j, top);
  }
}

template <class Acc, class K, Relative relative>
void weigh_pairs(const PairBlock<Acc>& block, const Acc* highest, Acc* sums) {
  using V = Vector<Acc>;
  with_options(block, [&]<bool biased, bool dropped>() {
    for (int64_t j = 0; j < block.width; j += kLanes<Acc>) {
      V top = load<Acc>(highest + j), sum{};
      top = top == -kInfinity<Acc> ? V{} : top;
      for (int64_t k = 0; k < block.keys; ++k) {
        Acc* at = block.scores + k * block.width + j;
        V t = load<Acc>(at), bias{};
        if constexpr (relative != Relative::running) t = K::coordinate(t);
        if constexpr (biased) bias = load<Acc>(block.bias + k * block.width + j);
        V weight = K::factor(t);
        if constexpr (relative != Relative::nothing) {
          V exponent = K::exponent(t) + bias - top;
          if constexpr (K::plain) exponent = exponent > Acc{0} ? V{} : exponent;
          weight *= exp<Acc>(exponent);
        }
        // A key that may not be read is not read: its NaN stays where it is.
        if constexpr (biased) weight = bias == -kInfinity<Acc> ? V{} : weight;
        sum += weight;
        if constexpr (dropped) {
          weight *=
              dropout_factor(*block.dropout, *block.rows, block.first + k, static_cast<int>(j));
        }
        store(at, weight);
      }
      store(sums + j, load<Acc>(sums + j) + sum);
    }
  });
}

template <class Acc, class K, bool running, bool of_mask>
void differentiate_pairs(const PairBlock<Acc>& block, const PairGradients<Acc>& out) {
  using V = Vector<Acc>;
  with_options(block, [&]<bool biased, bool dropped>() {
    for (int64_t j = 0; j < block.width; j += kLanes<Acc>) {
      const V lse = load<Acc>(out.lse + j), inverse = load<Acc>(out.inverse_mass + j);
      const V delta = load<Acc>(out.delta + j), share = load<Acc>(out.share + j);
      V row_sum{};
      for (int64_t k = 0; k < block.keys; ++k) {
        const int64_t place = k * block.width + j;
        const V t = K::coordinate(load<Acc>(block.scores + place));
        V bias{}, scale = inverse, kept = share;
        if constexpr (biased) bias = load<Acc>(block.bias + place);
        if constexpr (running) {
          V exponent = K::exponent(t) + bias - lse;
          // Outside the support, where K is 0, this must not overflow.
          if constexpr (K::plain) exponent = exponent > Acc{80} ? V{} : exponent;
          scale = exp<Acc>(exponent);
        }
        if constexpr (dropped) {
          kept *= dropout_factor(*block.dropout, *block.rows, block.first + k, static_cast<int>(j));
        }
        const V gradient = kept * load<Acc>(out.gradients + place) - delta;
        V weight = K::factor(t) * scale;
        V slope = (of_mask ? weight : K::slope(t) * scale) * gradient;
        if constexpr (biased) {
          weight = bias == -kInfinity<Acc> ? V{} : weight;
          slope = bias == -kInfinity<Acc> ? V{} : slope;
        }
        store(block.scores + place, weight * kept);
        store(out.gradients + place, slope);
        row_sum += slope;
        if (out.column_sums) {
          Acc* column = out.column_sums + k * kLanes<Acc>;
          store(column, load<Acc>(column) + slope);
        }
      }
      store(out.row_sums + j, load<Acc>(out.row_sums + j) + row_sum);
    }
  });
}

/// The loops of a kernel; an additive mask makes exponentials of plain sums.
template <class Acc>
KernelLoops<Acc> loops_of(Kernel kernel, bool additive_mask) {
  return with_kernel<Acc>(kernel, [&]<class K>() -> KernelLoops<Acc> {
    KernelLoops<Acc> loops{};
    loops.compact = K::compact;
    if constexpr (K::plain) {
      if (!additive_mask) {
        loops.weigh = weigh_pairs<Acc, K, Relative::nothing>;
        loops.differentiate = differentiate_pairs<Acc, K, false, false>;
        return loops;
      }
    } else {
      loops.settles = K::bounded && !additive_mask;
      loops.weigh_settled = weigh_pairs<Acc, K, Relative::settled>;
    }
    loops.running = true;
    loops.find_highest = find_highest<Acc, K>;
    loops.weigh = weigh_pairs<Acc, K, Relative::running>;
    loops.differentiate = differentiate_pairs<Acc, K, true, false>;
    loops.differentiate_mask = differentiate_pairs<Acc, K, true, true>;
    return loops;
  });
}

}  // namespace
}  // namespace mixhead::cpu
