#pragma once

#include <cstdint>

namespace mixhead {

/// The kernel functions K(query, key), described once; see kernel_attention for their formulas.
/// KERNEL(name, engine's struct, distance, compact, plain, bounded):
///   distance  K is a function of u = norm((q - k) / h), with K = 1 at u = 0
///   compact   K is 0 where u > 1
///   plain     K has no exponential, so that its sums need no running maximum
///   bounded   no exponent is above 0
#define MIXHEAD_KERNELS(KERNEL)                              \
  KERNEL(dot, Product, false, false, false, false)           \
  KERNEL(cosine, Product, false, false, false, false)        \
  KERNEL(gaussian, Gaussian, true, false, false, true)       \
  KERNEL(laplacian, Laplacian, true, false, false, true)     \
  KERNEL(matern32, Matern32, true, false, false, true)       \
  KERNEL(matern52, Matern52, true, false, false, true)       \
  KERNEL(cauchy, Cauchy, true, false, true, true)            \
  KERNEL(epanechnikov, Epanechnikov, true, true, true, true) \
  KERNEL(tricube, Tricube, true, true, true, true)           \
  KERNEL(boxcar, Boxcar, true, true, true, true)

enum class Kernel : uint8_t {
#define MIXHEAD_KERNEL(name, function, distance, compact, plain, bounded) name,
  MIXHEAD_KERNELS(MIXHEAD_KERNEL)
#undef MIXHEAD_KERNEL
};

struct KernelTraits {
  const char* name;
  bool distance, compact, plain, bounded;
};

constexpr KernelTraits kKernels[] = {
#define MIXHEAD_KERNEL(name, function, distance, compact, plain, bounded) \
  {#name, distance, compact, plain, bounded},
    MIXHEAD_KERNELS(MIXHEAD_KERNEL)
#undef MIXHEAD_KERNEL
};

constexpr const KernelTraits& traits(Kernel kernel) {
  return kKernels[static_cast<uint8_t>(kernel)];
}

}  // namespace mixhead
