#pragma once
// Vectors of the instruction set at hand, conversions between the element types, and e^x.
// Included by the isa_*.cpp files alone. Everything sits in an unnamed namespace: a function
// compiled for AVX must not be the one that the linker keeps for every processor.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "cpu/smoother.h"

namespace mixhead::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
inline __attribute__((always_inline)) Vector<T> load(const void* from) {
  Vector<T> result;
  __builtin_memcpy(&result, from, kVectorBytes);
  return result;
}

template <class V>
inline __attribute__((always_inline)) void store(void* to, V value) {
  __builtin_memcpy(to, &value, kVectorBytes);
}

template <class T>
inline __attribute__((always_inline)) Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

/// The larger; NaN where b is.
template <class V>
inline __attribute__((always_inline)) V max(V a, V b) {
  return a > b ? a : b;
}

// Integers as wide as the float beside them.
template <class T>
struct Bits;
template <>
struct Bits<float> {
  using Signed = int32_t;
  using Unsigned = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer part
  static constexpr float lowest = -87.0f;      // of exp's argument
};
template <>
struct Bits<double> {
  using Signed = int64_t;
  using Unsigned = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr double round = 6755399441055744.0;
  static constexpr double lowest = -708.0;
};

/// e^r on [-ln 2 / 2, ln 2 / 2]: minimax in relative error (Remez), 1.9e-9 for float, 3e-18 for
/// double.
inline __attribute__((always_inline)) Vector<float> exp_reduced(Vector<float> r) {
  auto p = r * 1.3836816930351e-3f + 8.3748149290385e-3f;
  p = p * r + 4.1668226019374e-2f;
  p = p * r + 1.6666420183954e-1f;
  p = p * r + 4.9999992078737e-1f;
  p = p * r + 1.0000000363198f;
  return p * r + 1.0f;
}
inline __attribute__((always_inline)) Vector<double> exp_reduced(Vector<double> r) {
  auto p = r * 2.49947072887941897e-8 + 2.76322882623706915e-7;
  p = p * r + 2.75576212462049162e-6;
  p = p * r + 2.48014865359023963e-5;
  p = p * r + 1.98412694341560545e-4;
  p = p * r + 1.38888889512091955e-3;
  p = p * r + 8.33333333355853586e-3;
  p = p * r + 4.16666666664928212e-2;
  p = p * r + 1.66666666666661696e-1;
  p = p * r + 5.00000000000001753e-1;
  p = p * r + 9.99999999999999967e-1;
  return p * r + 1.0;
}

// ln 2 as a sum whose first part has so few bits that its product with a whole exponent is exact
// (Cody & Waite, "Software Manual for the Elementary Functions", 1980).
template <class T>
constexpr T kLn2Head = 6.93147180369123816490e-1;
template <class T>
constexpr T kLn2Tail = 1.90821492927058770002e-10;
template <>
constexpr float kLn2Head<float> = 0.693359375f;
template <>
constexpr float kLn2Tail<float> = -2.12194440e-4f;

/// x less a whole number of ln 2.
template <class T>
inline __attribute__((always_inline)) Vector<T> reduce(Vector<T> x, Vector<T> whole) {
  return x - whole * kLn2Head<T> - whole * kLn2Tail<T>;
}

/// e^x for x up to 88 (709): 0 below the normal numbers, NaN for NaN. As exact for large |x| as for
/// small.
template <class T>
inline __attribute__((always_inline)) Vector<T> exp(Vector<T> x) {
  constexpr T log2_e = static_cast<T>(1.4426950408889634);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    // max returns its second operand where either is NaN.
    const auto bounded = (Vector<T>)_mm512_max_ps(_mm512_set1_ps(-140.0f), (__m512)x);
    const auto whole = (Vector<T>)_mm512_roundscale_ps((__m512)(bounded * log2_e), 8);
    return (Vector<T>)_mm512_scalef_ps(
        (__m512)exp_reduced(reduce<T>(bounded, whole)), (__m512)whole);
  }
#endif
  using U = typename Bits<T>::Unsigned;
  const auto low = broadcast<T>(Bits<T>::lowest);
  const auto bounded = x < low ? low : x;
  const auto shifted = bounded * log2_e + Bits<T>::round;
  const auto reduced = exp_reduced(reduce<T>(bounded, shifted - Bits<T>::round));
  const auto scaled = (Vector<U>)reduced + ((Vector<U>)shifted << Bits<T>::mantissa);
  const auto result = x < low ? Vector<T>{} : (Vector<T>)scaled;
  return x == x ? result : x;
}

inline float log(float x) { return __builtin_logf(x); }
inline double log(double x) { return __builtin_log(x); }

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

/// 1 / (1 + e^-x).
inline float sigmoid(float x) { return 1.0f / (1.0f + __builtin_expf(-x)); }
inline double sigmoid(double x) { return 1.0 / (1.0 + __builtin_exp(-x)); }

template <class T>
inline T bits_as(uint32_t bits) {
  T result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(BFloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // A half's bits under a float's exponent, times 2^112: right for subnormals too.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  if (magnitude >= 0x0f800000u) return bits_as<float>(sign | 0x70000000u | magnitude);
  return bits_as<float>(sign | bits_of(bits_as<float>(magnitude) * 5.192296858534828e33f));
#endif
}

/// To the nearest, ties to even; NaN stays one.
template <class To>
struct Round;
template <>
struct Round<float> {
  static float from(float x) { return x; }
};
template <>
struct Round<double> {
  static double from(double x) { return x; }
};
template <>
struct Round<BFloat16> {
  static BFloat16 from(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
  }
};
template <>
struct Round<Float16> {
  static Float16 from(float x) {
#if defined(__F16C__)
    return {static_cast<uint16_t>(_cvtss_sh(x, 0))};
#else
    const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
    const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
    if (magnitude < 0x38800000u) {  // subnormal: the sum's last place is 2^-24, it rounds
      const uint32_t sum = bits_of(bits_as<float>(magnitude) + 0.5f);
      return {static_cast<uint16_t>(sign | (sum - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | (rounded >> 13))};
#endif
  }
};

inline double load_as(Type type, const void* data, int64_t index) {
  switch (type) {
    case Type::float32:
      return static_cast<const float*>(data)[index];
    case Type::float64:
      return static_cast<const double*>(data)[index];
    case Type::bfloat16:
      return to_float(static_cast<const BFloat16*>(data)[index]);
    default:
      return to_float(static_cast<const Float16*>(data)[index]);
  }
}

inline void store_as(Type type, void* data, int64_t index, double value) {
  switch (type) {
    case Type::float32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      return;
    case Type::float64:
      static_cast<double*>(data)[index] = value;
      return;
    case Type::bfloat16:
      static_cast<BFloat16*>(data)[index] = Round<BFloat16>::from(static_cast<float>(value));
      return;
    default:
      static_cast<Float16*>(data)[index] = Round<Float16>::from(static_cast<float>(value));
  }
}

}  // namespace
}  // namespace mixhead::cpu
