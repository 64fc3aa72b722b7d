#pragma once
// The kernel functions K(query, key) as logarithms of what one product of query and key gives.
#include "cpu/kernel.h"
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

/// The square root of each lane.
template <class T>
inline __attribute__((always_inline)) Vector<T> sqrt(Vector<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_sqrt_ps((__m512)x);
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm256_sqrt_ps((__m256)x);
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm_sqrt_ps((__m128)x);
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm_sqrt_pd((__m128d)x);
#endif
  for (int i = 0; i < kLanes<T>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

// A kernel is K = factor(t) exp(exponent(t)) of a coordinate t of the similarity x: the scaled
// product of query and key for dot and cosine, u^2 for the others. dK/dx = slope(t)
// exp(exponent(t)), which is 0 at a cusp. Its traits are those of kernel.h. NaN stays NaN.
template <class T, Kernel kernel>
struct KernelOf {
  using V = Vector<T>;
  static constexpr bool plain = traits(kernel).plain, compact = traits(kernel).compact;
  static constexpr bool bounded = traits(kernel).bounded;
  static V coordinate(V x) { return x; }
  static V exponent(V) { return V{}; }
};

/// exp(x): dot and cosine.
template <class T>
struct ProductKernel : KernelOf<T, Kernel::dot> {
  using V = Vector<T>;
  static V exponent(V t) { return t; }
  static V factor(V) { return V{} + T(1); }
  static V slope(V) { return V{} + T(1); }
};

/// exp(-u^2 / 2)
template <class T>
struct GaussianKernel : KernelOf<T, Kernel::gaussian> {
  using V = Vector<T>;
  static V exponent(V t) { return t * T(-0.5); }
  static V factor(V) { return V{} + T(1); }
  static V slope(V) { return V{} + T(-0.5); }
};

/// exp(-u); d/du^2 = -exp(-u) / 2u
template <class T>
struct LaplacianKernel : KernelOf<T, Kernel::laplacian> {
  using V = Vector<T>;
  static V coordinate(V x) { return sqrt<T>(x); }
  static V exponent(V t) { return -t; }
  static V factor(V) { return V{} + T(1); }
  static V slope(V t) { return t == T(0) ? V{} : T(-0.5) / t; }
};

/// (1 + t) exp(-t), t = sqrt(3) u; d/du^2 = -3/2 exp(-t)
template <class T>
struct Matern32Kernel : KernelOf<T, Kernel::matern32> {
  using V = Vector<T>;
  static V coordinate(V x) { return sqrt<T>(x * T(3)); }
  static V exponent(V t) { return -t; }
  static V factor(V t) { return t + T(1); }
  static V slope(V) { return V{} + T(-1.5); }
};

/// (1 + t + t^2 / 3) exp(-t), t = sqrt(5) u; d/du^2 = -5/6 (1 + t) exp(-t)
template <class T>
struct Matern52Kernel : KernelOf<T, Kernel::matern52> {
  using V = Vector<T>;
  static V coordinate(V x) { return sqrt<T>(x * T(5)); }
  static V exponent(V t) { return -t; }
  static V factor(V t) { return t * (t * T(1.0 / 3) + T(1)) + T(1); }
  static V slope(V t) { return (t + T(1)) * T(-5.0 / 6); }
};

/// 1 / (1 + u^2)
template <class T>
struct CauchyKernel : KernelOf<T, Kernel::cauchy> {
  using V = Vector<T>;
  static V factor(V t) { return T(1) / (t + T(1)); }
  static V slope(V t) { return -factor(t) * factor(t); }
};

/// max(0, 1 - u^2)
template <class T>
struct EpanechnikovKernel : KernelOf<T, Kernel::epanechnikov> {
  using V = Vector<T>;
  static V factor(V t) { return t >= T(1) ? V{} : T(1) - t; }
  static V slope(V t) { return t >= T(1) ? V{} : V{} + T(-1); }
};

/// max(0, 1 - u^3)^3; d/du^2 = -9/2 u (1 - u^3)^2. 1 - u^3 = (1 - u^2) (1 + u^2 / (1 + u)), which
/// loses nothing near u = 1.
template <class T>
struct TricubeKernel : KernelOf<T, Kernel::tricube> {
  using V = Vector<T>;
  static V rest(V t) { return t >= T(1) ? V{} : (T(1) - t) * (t / (sqrt<T>(t) + T(1)) + T(1)); }
  static V factor(V t) { return rest(t) * rest(t) * rest(t); }
  static V slope(V t) { return T(-4.5) * sqrt<T>(t) * rest(t) * rest(t); }
};

/// 1 where u <= 1
template <class T>
struct BoxcarKernel : KernelOf<T, Kernel::boxcar> {
  using V = Vector<T>;
  static V factor(V t) { return t > T(1) ? V{} : t * T(0) + T(1); }
  static V slope(V) { return V{}; }
};

/// Calls f.operator()<K>() with the kernel's struct.
template <class T, class F>
auto with_kernel(Kernel kernel, const F& f) {
  switch (kernel) {
#define MIXHEAD_KERNEL(name, function, distance, compact, plain, bounded) \
  case Kernel::name:                                                      \
    return f.template operator()<function##Kernel<T>>();
    MIXHEAD_KERNELS(MIXHEAD_KERNEL)
#undef MIXHEAD_KERNEL
  }
  __builtin_unreachable();
}

}  // namespace
}  // namespace mixhead::cpu
