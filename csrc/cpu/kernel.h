#pragma once

#include <cstdint>

namespace mixhead {

/// The kernel functions K(query, key); see kernel_attention for their formulas.
enum class Kernel : uint8_t {
  dot,
  cosine,
  gaussian,
  laplacian,
  matern32,
  matern52,
  cauchy,
  epanechnikov,
  tricube,
  boxcar
};

}  // namespace mixhead
