#pragma once
// The kernel functions K(query, key) as logarithms of what one product of query and key gives.
#include "cpu/vector-inl.h"

namespace mixhead::cpu {
namespace {

/// K = exp(scale q.k): log K = factor * product.
struct DotKernel {
  double scale;
  double factor() const { return scale; }
  /// d log K / d product, what turns dS into the gradients of query and key.
  double slope() const { return scale; }
};

}  // namespace
}  // namespace mixhead::cpu
