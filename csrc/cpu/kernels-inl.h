#pragma once
// The kernel functions K(query, key) as base-2 logarithms of what one product of query and key
// gives.
#include "cpu/vector-inl.h"

namespace mixhead::cpu {
namespace {

/// K = exp(scale q.k): log2 K = factor * product.
struct DotKernel {
  double scale;
  double factor() const { return scale * kLog2E; }
  /// d log K / d product, what turns dS into the gradients of query and key.
  double slope() const { return scale; }
};

}  // namespace
}  // namespace mixhead::cpu
