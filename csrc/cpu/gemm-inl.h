#pragma once
// The matrix micro-kernels: C[row][lane] (+)= sum_step A[row][step] * B[step][lane].
//
// A is read by broadcasts, so it may have any strides and needs no packing; the lanes of B and C
// are contiguous. Whatever is blocked in registers is blocked by the compiler from these loops.
#include "cpu/vector-inl.h"

namespace mixhead::cpu {
namespace {

/// What a micro-kernel multiplies: one float or double at a time.
template <class T>
struct Plain {
  using Acc = T;
  using Operand = T;
  static constexpr int steps = 1;  // products in one step of the sum
  static inline __attribute__((always_inline)) Vector<T> multiply_add(
      Vector<T> sum, const char* a, Vector<T> b) {
    T scalar;
    __builtin_memcpy(&scalar, a, sizeof(T));
    return sum + scalar * b;
  }
};

#if defined(__AVX512BF16__)
/// Pairs of bfloat16, summed in float32.
struct BFloat16Pairs {
  using Acc = float;
  using Operand = uint32_t;
  static constexpr int steps = 2;
  static inline __attribute__((always_inline)) Vector<float> multiply_add(
      Vector<float> sum, const char* a, Vector<uint32_t> b) {
    int pair;
    __builtin_memcpy(&pair, a, sizeof(pair));
    return (Vector<float>)_mm512_dpbf16_ps(
        (__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
  }
};

/// The same where B is a matrix of bfloat16, two of whose rows are paired when they are loaded: for
/// so few rows of A that it would cost more to write the pairs first.
struct BFloat16Rows : BFloat16Pairs {};

/// Sixteen channels of two rows as (even[c], odd[c]) each.
inline __attribute__((always_inline)) Vector<uint32_t> pair_channels(
    const BFloat16* even, const BFloat16* odd) {
  const auto low =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
  const auto high =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
  return (Vector<uint32_t>)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#endif

/// Whether B is BFloat16Rows.
template <class M>
constexpr bool kPairsRows = false;
#if defined(__AVX512BF16__)
template <>
constexpr bool kPairsRows<BFloat16Rows> = true;
#endif

/// Two neighbouring steps at once, in the even and the odd lanes: for so few rows that they fill
/// half a vector. A's steps must be next to each other; the sums of a lane pair belong together.
template <class M>
struct Paired {
  using Acc = typename M::Acc;
  using Operand = typename M::Operand;
  static constexpr int steps = 2 * M::steps;
  static inline __attribute__((always_inline)) Vector<Acc> multiply_add(
      Vector<Acc> sum, const char* a, Vector<Operand> b) {
    uint64_t pair;
    __builtin_memcpy(&pair, a, sizeof(pair));
    const auto both = broadcast(pair);
#if defined(__AVX512BF16__)
    if constexpr (M::steps == 2) {
      return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)b);
    } else
#endif
    {
      return sum + (Vector<Acc>)both * (Vector<Acc>)b;
    }
  }
};

/// Bytes from one element of A to the next.
struct Strides {
  int64_t row, step;
};

enum class Update : uint8_t {
  store,
  add,
  rescale  // C = C * alpha[lane] + product
};

constexpr int kAccumulators = kRegisters == 32 ? 24 : 12;
constexpr int kPanelVectors = kRegisters == 32 ? 4 : 2;  // widest B: leaves most rows of A

/// Memory that a later product reads, fetched a few lines a step, so that it is read while this one
/// multiplies: in bursts the fetches would stall what they are to overlap with.
struct Fetch {
  const char* data;  // null for none
  int64_t bytes;
};

/// One step of B in `vectors` vectors.
template <class M, int vectors>
inline __attribute__((always_inline)) void load_step(
    const typename M::Operand* b, [[maybe_unused]] int64_t b_step,
    Vector<typename M::Operand>* operand) {
  using Operand = typename M::Operand;
#if defined(__AVX512BF16__)
  if constexpr (kPairsRows<M>) {
    // A step is two rows of half an operand each channel, so that b_step is one row's.
    const auto* even = reinterpret_cast<const BFloat16*>(b);
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j, even += 16) operand[j] = pair_channels(even, even + b_step);
    return;
  }
#endif
#pragma GCC unroll 8
  for (int j = 0; j < vectors; ++j) operand[j] = load<Operand>(b + j * kLanes<Operand>);
}

template <class M, int rows, int vectors, int fetch_lines>
inline void gemm_block(
    int64_t steps, const char* a, Strides strides, const typename M::Operand* b, int64_t b_step,
    typename M::Acc* c, int64_t c_row, Update update, const typename M::Acc* alpha,
    const char* fetch) {
  using Acc = typename M::Acc;
  constexpr int lanes = kLanes<Acc>;
  Vector<Acc> sum[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) sum[i][j] = Vector<Acc>{};
  }
  // Four rows to an address: one for each row would not fit the general registers.
  constexpr int groups = (rows + 3) / 4;
  const char* group[groups];
#pragma GCC unroll 4
  for (int i = 0; i < groups; ++i) group[i] = a + 4 * i * strides.row;
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 4
    for (int i = 0; i < fetch_lines; ++i) {
      __builtin_prefetch(fetch + (step * fetch_lines + i) * 64, 0, 2);
    }
    Vector<typename M::Operand> operand[vectors];
    load_step<M, vectors>(b + step * b_step, b_step, operand);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) {
        sum[i][j] = M::multiply_add(sum[i][j], group[i / 4] + i % 4 * strides.row, operand[j]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < groups; ++i) group[i] += strides.step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) {
      Acc* at = c + i * c_row + j * lanes;
      if (update == Update::add) sum[i][j] += load<Acc>(at);
      if (update == Update::rescale) sum[i][j] += load<Acc>(at) * load<Acc>(alpha + j * lanes);
      store(at, sum[i][j]);
    }
  }
}

template <class M, int rows, int vectors, int fetch_lines = 0>
__attribute__((noinline)) void gemm_rows(
    int64_t count, int64_t steps, const char* a, Strides strides, const typename M::Operand* b,
    int64_t b_step, typename M::Acc* c, int64_t c_row, Update update, const typename M::Acc* alpha,
    const Fetch& fetch = {}) {
  for (int64_t i = 0; i + rows <= count; i += rows) {
    gemm_block<M, rows, vectors, fetch_lines>(
        steps, a + i * strides.row, strides, b, b_step, c + i * c_row, c_row, update, alpha,
        fetch.data + i * fetch.bytes / count);
  }
}

/// gemm for one chain of products a sum.
template <class M, int vectors>
void gemm_chain(
    int64_t rows, int64_t steps, const char* a, Strides strides, const typename M::Operand* b,
    int64_t b_step, typename M::Acc* c, int64_t c_row, Update update,
    const typename M::Acc* alpha) {
  constexpr int block = kAccumulators / vectors > 12 ? 12 : kAccumulators / vectors;
  const int64_t whole = rows / block * block;
  gemm_rows<M, block, vectors>(whole, steps, a, strides, b, b_step, c, c_row, update, alpha);
  a += whole * strides.row;
  c += whole * c_row;
  int64_t rest = rows - whole;
  const auto finish = [&]<int size>() {
    gemm_rows<M, size, vectors>(size, steps, a, strides, b, b_step, c, c_row, update, alpha);
    a += size * strides.row;
    c += size * c_row;
    rest -= size;
  };
  if (rest >= 8) finish.template operator()<8>();
  if (rest >= 4) finish.template operator()<4>();
  if (rest >= 2) finish.template operator()<2>();
  if (rest >= 1) finish.template operator()<1>();
}

/// `rows` of A against `vectors` vectors of lanes; `steps` counts operands (pairs for bfloat16).
/// Double, which one chooses for its precision, sums short chains: they round less. So do the sets
/// below AVX-512, whose narrower panels leave room for longer blocks of keys, the plain one more so
/// as it rounds each product too.
template <class M, int vectors>
void gemm(
    int64_t rows, int64_t steps, const void* a_data, Strides strides, const typename M::Operand* b,
    int64_t b_step, typename M::Acc* c, int64_t c_row, Update update = Update::store,
    const typename M::Acc* alpha = nullptr) {
  constexpr bool is_double = sizeof(typename M::Acc) == 8, cut = is_double || kVectorBytes < 64;
  constexpr int64_t short_chain = is_double || kVectorBytes < 32 ? 32 : 64;
  const char* a = static_cast<const char*>(a_data);
  if (!alpha) alpha = c;  // not read then
  const int64_t chain = cut && steps > short_chain ? short_chain : steps;
  gemm_chain<M, vectors>(rows, chain, a, strides, b, b_step, c, c_row, update, alpha);
  if constexpr (cut) {
    for (int64_t first = chain; first < steps; first += short_chain) {
      const int64_t length = steps - first < short_chain ? steps - first : short_chain;
      gemm_chain<M, vectors>(
          rows, length, a + first * strides.step, strides, b + first * b_step, b_step, c, c_row,
          Update::add, alpha);
    }
  }
}

/// The same for any number of lanes, a multiple of the vector's.
template <class M>
void gemm_wide(
    int64_t rows, int64_t lanes, int64_t steps, const void* a, Strides strides,
    const typename M::Operand* b, int64_t b_step, typename M::Acc* c, int64_t c_row,
    Update update) {
  constexpr int vector = kLanes<typename M::Acc>;
  int64_t lane = 0;
  const auto part = [&]<int vectors>() {
    gemm<M, vectors>(rows, steps, a, strides, b + lane, b_step, c + lane, c_row, update);
    lane += vectors * vector;
  };
  while (lanes - lane >= kPanelVectors * vector) part.template operator()<kPanelVectors>();
  if constexpr (kPanelVectors == 4) {
    if (lanes - lane >= 3 * vector) part.template operator()<3>();
    if (lanes - lane >= 2 * vector) part.template operator()<2>();
  }
  if (lanes - lane >= vector) part.template operator()<1>();
}

}  // namespace
}  // namespace mixhead::cpu
