#pragma once
// Query rows and key blocks as the micro-kernels read them.
//
// A panel is up to kPanelVectors vectors of query rows: one row a lane, so that the softmax's
// reductions over keys are plain vector operations and no head size leaves lanes idle.
#include "cpu/gemm-inl.h"
#include "cpu/kernels-inl.h"
#include "cpu/smoother.h"
#include "dropout.h"

namespace mixhead::cpu {
namespace {

template <class Io>
struct MultiplyFor {
  using type = Plain<float>;
};
template <>
struct MultiplyFor<double> {
  using type = Plain<double>;
};
#if defined(__AVX512BF16__)
template <>
struct MultiplyFor<BFloat16> {
  using type = BFloat16Pairs;
};
#endif
template <class Io>
using Multiply = typename MultiplyFor<Io>::type;

template <class Acc>
constexpr int kPanelLanes = kPanelVectors * kLanes<Acc>;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Hands out pieces of one allocation; started at null it measures how much a layout takes.
struct Arena {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next);
    next += divide_up(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
    return piece;
  }
};

inline int64_t offset(const View& view, int64_t batch, int64_t head, int64_t row) {
  return view.batch[batch] + head * view.head + row * view.row;
}
template <class T>
const T* at(const View& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const T*>(view.data) + offset(view, batch, head, row);
}

struct Position {
  int64_t batch, head, query;  // head counts query heads
};

/// Where row `row` of a source's unit stands; see SourceWork.
inline Position position(
    const Problem& problem, const Source& source, const Chunk& chunk, int64_t unit, int64_t row) {
  const int64_t group = row % problem.groups, rest = row / problem.groups;
  const int64_t query = chunk.first_row + rest % chunk.rows;
  if (source.shared) return {rest / chunk.rows, unit * problem.groups + group, query};
  return {unit / problem.key_heads, unit % problem.key_heads * problem.groups + group, query};
}

struct KeyHead {
  int64_t batch, head;
};
inline KeyHead key_head(const Problem& problem, const Source& source, int64_t unit) {
  if (source.shared) return {0, unit};
  return {unit / problem.key_heads, unit % problem.key_heads};
}

/// A row's number among the chunk's rows of all heads and batch entries.
inline int64_t chunk_row(const Problem& problem, const Chunk& chunk, const Position& at) {
  return (at.batch * problem.key_heads * problem.groups + at.head) * chunk.rows + at.query -
         chunk.first_row;
}
inline int64_t global_row(const Problem& problem, const Position& at) {
  return (at.batch * problem.key_heads * problem.groups + at.head) * problem.rows + at.query;
}

/// What each lane needs to know of its row.
template <class Acc>
struct Rows {
  static constexpr int capacity = kPanelLanes<Acc>;
  int count, lanes;
  Position position[capacity];
  // Keys up to this number (not included) may be read. Lanes beyond the last row have query 0 and
  // harmless results, which nobody reads.
  alignas(64) typename Bits<Acc>::Signed readable[capacity];
  int64_t fewest, most;
  int64_t mask_row[capacity];
  bool one_mask_row;
  alignas(64) typename Bits<Acc>::Unsigned dropout_first[capacity], dropout_second[capacity];

  int vectors() const { return lanes / kLanes<Acc>; }
};

/// Fills `rows` with `count` rows whose positions position_of(lane) gives.
template <class Acc, class PositionOf>
void place_rows(
    const Problem& problem, const Source& source, int64_t count, const PositionOf& position_of,
    Rows<Acc>& rows) {
  rows.count = static_cast<int>(count);
  rows.lanes = static_cast<int>(divide_up(count, kLanes<Acc>) * kLanes<Acc>);
  rows.fewest = source.keys;
  rows.most = 0;
  rows.one_mask_row = true;
  const int64_t heads = problem.key_heads * problem.groups;
  for (int lane = 0; lane < rows.lanes; ++lane) {
    rows.readable[lane] = static_cast<typename Bits<Acc>::Signed>(source.keys);
    rows.dropout_first[lane] = rows.dropout_second[lane] = 0;
    if (lane >= count) continue;
    const auto at = rows.position[lane] = position_of(lane);
    int64_t readable = source.keys;
    if (source.causal) {
      readable = larger(0, smaller(readable, source.keys - problem.rows + at.query + 1));
    }
    rows.readable[lane] = static_cast<typename Bits<Acc>::Signed>(readable);
    rows.fewest = smaller(rows.fewest, readable);
    rows.most = larger(rows.most, readable);
    if (source.mask.kind != MaskKind::none) {
      rows.mask_row[lane] = offset(source.mask.view, at.batch, at.head, at.query);
      rows.one_mask_row &= rows.mask_row[lane] == rows.mask_row[0];
    }
    if (problem.dropout.on) {
      const auto key = dropout::row_key(
          problem.dropout.seed, source.side,
          (at.batch * heads + at.head) * problem.rows + at.query);
      rows.dropout_first[lane] = key.first;
      rows.dropout_second[lane] = key.second;
    }
  }
}

/// Rows of a float type as the B operand, [step][lane].
template <class M, class Io>
void pack_lanes(
    const View& view, const Rows<typename M::Acc>& rows, int64_t channels,
    typename M::Operand* to) {
  const int64_t steps = divide_up(channels, M::steps), lanes = rows.lanes;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    auto* out = to + lane;
    if (lane >= rows.count) {
      for (int64_t step = 0; step < steps; ++step) out[step * lanes] = 0;
      continue;
    }
    const auto& p = rows.position[lane];
    const Io* row = at<Io>(view, p.batch, p.head, p.query);
    if constexpr (M::steps == 1) {
      for (int64_t c = 0; c < channels; ++c) out[c * lanes] = to_float(row[c * view.column]);
    } else {
      for (int64_t c = 0; c + 1 < channels; c += 2) {
        out[c / 2 * lanes] = row[c * view.column].bits |
                             static_cast<uint32_t>(row[(c + 1) * view.column].bits) << 16;
      }
      if (channels % 2) out[channels / 2 * lanes] = row[(channels - 1) * view.column].bits;
    }
  }
}

/// A matrix that the micro-kernels broadcast from.
struct Broadcast {
  const void* data;
  Strides strides;
};

/// Keys or values of one key head; strides in elements.
template <class Io>
struct KeyRows {
  const Io* data;
  int64_t row, column;

  const Io* operator[](int64_t k) const { return data + k * row; }
  KeyRows from(int64_t k) const { return {data + k * row, row, column}; }
};
template <class Io>
KeyRows<Io> key_rows(const View& view, const KeyHead& head) {
  return {at<Io>(view, head.batch, head.head, 0), view.row, view.column};
}

inline void convert_row(const BFloat16* from, int64_t stride, int64_t count, float* to) {
  if (stride == 1) {
    for (int64_t c = 0; c < count; ++c) to[c] = to_float(from[c]);
  } else {
    for (int64_t c = 0; c < count; ++c) to[c] = to_float(from[c * stride]);
  }
}
inline void convert_row(const Float16* from, int64_t stride, int64_t count, float* to) {
  int64_t c = 0;
#if defined(__AVX512F__)
  for (; stride == 1 && c + 16 <= count; c += 16) {
    const auto half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + c));
    _mm512_storeu_ps(to + c, _mm512_cvtph_ps(half));
  }
#elif defined(__F16C__)
  for (; stride == 1 && c + 8 <= count; c += 8) {
    const auto half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + c));
    _mm256_storeu_ps(to + c, _mm256_cvtph_ps(half));
  }
#endif
  for (; c < count; ++c) to[c] = to_float(from[c * stride]);
}
template <class T>
void convert_row(const T* from, int64_t stride, int64_t count, T* to) {
  for (int64_t c = 0; c < count; ++c) to[c] = from[c * stride];
}

/// Elements that either layout below may take.
inline int64_t packed_elements(int64_t keys, int64_t channels) {
  return (keys + 1) * (channels + 1);
}

/// One row of A for each key, channels along the sum. `scratch` is written only where the keys
/// can't be read as they are.
template <class M, class Io>
Broadcast by_channel(const KeyRows<Io>& keys, int64_t count, int64_t channels, void* scratch) {
  constexpr int64_t size = sizeof(Io);
  if constexpr (M::steps == 2) {
    if (keys.column == 1 && channels % 2 == 0) {
      return {keys.data, {keys.row * size, 4}};
    }
    const int64_t padded = divide_up(channels, 2) * 2;
    auto* to = static_cast<Io*>(scratch);
    for (int64_t k = 0; k < count; ++k, to += padded) {
      const Io* row = keys[k];
      for (int64_t c = 0; c < channels; ++c) to[c] = row[c * keys.column];
      if (padded > channels) to[channels].bits = 0;
    }
    return {scratch, {padded * size, 4}};
  } else {
    using Acc = typename M::Acc;
    if constexpr (sizeof(Io) == sizeof(Acc)) {
      return {keys.data, {keys.row * size, keys.column * size}};
    } else {
      auto* to = static_cast<Acc*>(scratch);
      for (int64_t k = 0; k < count; ++k) {
        convert_row(keys[k], keys.column, channels, to + k * channels);
      }
      return {scratch, {channels * static_cast<int64_t>(sizeof(Acc)), sizeof(Acc)}};
    }
  }
}

#if defined(__AVX512BF16__)
/// to[c] = (even[c], odd[c]) as one pair.
inline void interleave(
    const BFloat16* even, const BFloat16* odd, int64_t stride, int64_t count, uint32_t* to) {
  int64_t c = 0;
  for (; stride == 1 && c + 16 <= count; c += 16) store(to + c, pair_channels(even + c, odd + c));
  for (; c < count; ++c) {
    to[c] = even[c * stride].bits | static_cast<uint32_t>(odd[c * stride].bits) << 16;
  }
}
#endif

/// One row of A for each channel, keys along the sum.
template <class M, class Io>
Broadcast by_key(const KeyRows<Io>& keys, int64_t count, int64_t channels, void* scratch) {
#if defined(__AVX512BF16__)
  if constexpr (M::steps == 2) {
    auto* to = static_cast<uint32_t*>(scratch);
    for (int64_t k = 0; k + 1 < count; k += 2, to += channels) {
      interleave(keys[k], keys[k + 1], keys.column, channels, to);
    }
    if (count % 2) {
      const Io* last = keys[count - 1];
      for (int64_t c = 0; c < channels; ++c) to[c] = last[c * keys.column].bits;
    }
    return {scratch, {4, 4 * channels}};
  }
#endif
  if constexpr (M::steps == 1) {
    const auto rows = by_channel<M, Io>(keys, count, channels, scratch);
    return {rows.data, {rows.strides.step, rows.strides.row}};
  }
}

/// What is added to the scores of a key block; -inf where a key may not be read.
template <class Acc>
struct Bias {
  enum Kind : uint8_t { none, per_key, per_lane } kind;
  const Acc* values;  // (keys) or (keys, lanes)
  bool nothing_readable;
};

template <class Acc>
Acc mask_value(const Mask& mask, int64_t element) {
  if (mask.kind == MaskKind::boolean) {
    return static_cast<const bool*>(mask.view.data)[element] ? Acc{0} : -kInfinity<Acc>;
  }
  return static_cast<Acc>(load_as(mask.type, mask.view.data, element));
}

template <class Acc, class Read>
bool read_mask(const Rows<Acc>& rows, int64_t keys, const Read& read, Acc* to) {
  bool any = false;
  for (int lane = 0; lane < rows.lanes; ++lane) {
    for (int64_t k = 0; k < keys; ++k) {
      const Acc value = lane < rows.count ? read(rows.mask_row[lane], k) : -kInfinity<Acc>;
      to[k * rows.lanes + lane] = value;
      any |= value != -kInfinity<Acc>;
    }
  }
  return any;
}

/// The mask's part for keys [first, first + keys).
template <class Acc>
Bias<Acc> bias_of(
    const Source& source, const Rows<Acc>& rows, int64_t first, int64_t keys, Acc* to) {
  const auto& mask = source.mask;
  if (mask.kind == MaskKind::none) return {Bias<Acc>::none, nullptr, false};
  const int64_t column = mask.view.column;
  if (rows.one_mask_row) {
    bool any = false;
    for (int64_t k = 0; k < keys; ++k) {
      to[k] = mask_value<Acc>(mask, rows.mask_row[0] + (first + k) * column);
      any |= to[k] != -kInfinity<Acc>;
    }
    return {Bias<Acc>::per_key, to, !any};
  }
  bool any;
  if (mask.kind == MaskKind::boolean) {
    const bool* data = static_cast<const bool*>(mask.view.data) + first * column;
    any = read_mask(
        rows, keys,
        [&](int64_t row, int64_t k) { return data[row + k * column] ? Acc{0} : -kInfinity<Acc>; },
        to);
  } else if (mask.type == Type::float32) {
    const float* data = static_cast<const float*>(mask.view.data) + first * column;
    any = read_mask(
        rows, keys,
        [&](int64_t row, int64_t k) { return static_cast<Acc>(data[row + k * column]); }, to);
  } else {
    any = read_mask(
        rows, keys,
        [&](int64_t row, int64_t k) { return mask_value<Acc>(mask, row + (first + k) * column); },
        to);
  }
  return {Bias<Acc>::per_lane, to, !any};
}

/// Calls visit(key, vector, score) with products become scores; -inf where nothing may be read.
template <class Acc, int vectors, class Visit>
inline __attribute__((always_inline)) void for_each_score(
    const Rows<Acc>& rows, const Bias<Acc>& bias, int64_t first, int64_t keys, Acc factor,
    const Acc* products, const Visit& visit) {
  using V = Vector<Acc>;
  using Signed = typename Bits<Acc>::Signed;
  constexpr int lanes = kLanes<Acc>, width = vectors * lanes;
  const V nothing = broadcast(-kInfinity<Acc>);
  if (bias.kind == Bias<Acc>::none && rows.fewest >= first + keys) {
    for (int64_t k = 0; k < keys; ++k) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        visit(k, j, load<Acc>(products + k * width + j * lanes) * factor);
      }
    }
    return;
  }
  for (int64_t k = 0; k < keys; ++k) {
    const auto key = broadcast<Signed>(static_cast<Signed>(first + k));
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      V score = load<Acc>(products + k * width + j * lanes) * factor;
      if (bias.kind != Bias<Acc>::none) {
        const V add = bias.kind == Bias<Acc>::per_key
                          ? broadcast(bias.values[k])
                          : load<Acc>(bias.values + k * width + j * lanes);
        // A key that may not be read is not read: its NaN stays where it is.
        score = add == nothing ? nothing : score + add;
      }
      score = key < load<Signed>(rows.readable + j * lanes) ? score : nothing;
      visit(k, j, score);
    }
  }
}

/// 1 where the weight is kept, scaled; 0 where it is dropped. The numbers are dropout.h's.
template <class Acc>
inline __attribute__((always_inline)) Vector<Acc> dropout_factor(
    const Dropout& dropout, const Rows<Acc>& rows, int64_t column, int lane) {
  using U = typename Bits<Acc>::Unsigned;
  using VU = Vector<U>;
  constexpr U low = 0xffffffffu;  // 32-bit arithmetic in lanes that may be wider
  const U scaled = static_cast<uint32_t>(column) * 0x9E3779B1u;
  VU x = (load<U>(rows.dropout_first + lane) + scaled) & low;
  x ^= x >> 16;
  x = (x * 0x7FEB352Du) & low;
  x ^= load<U>(rows.dropout_second + lane);
  x ^= x >> 15;
  x = (x * 0x846CA68Bu) & low;
  x ^= x >> 16;
  const bool all = dropout.threshold > low;
  const VU threshold = broadcast<U>(all ? low : static_cast<U>(dropout.threshold));
  const auto keep = broadcast(static_cast<Acc>(dropout.keep_scale));
  return x < threshold ? Vector<Acc>{} : keep;
}

#if defined(__AVX512BF16__)
/// Two rows of float lanes as one row of bfloat16 pairs.
inline __attribute__((always_inline)) Vector<uint32_t> pair_rows(
    Vector<float> even, Vector<float> odd) {
  alignas(64) static constexpr uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                     21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (Vector<uint32_t>)_mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}
#endif

/// Calls f.operator()<vectors>() with the number of vectors as a constant.
template <class F>
void with_vectors(int vectors, const F& f) {
  if constexpr (kPanelVectors == 4) {
    if (vectors == 4) return f.template operator()<4>();
    if (vectors == 3) return f.template operator()<3>();
  }
  if (vectors == 2) return f.template operator()<2>();
  f.template operator()<1>();
}

/// Rows of panel `panel` where `rows` rows are dealt to `panels` panels evenly, in whole vectors.
struct Range {
  int64_t first, count;
};
template <class Acc>
Range panel_rows(int64_t rows, int64_t panels, int64_t panel) {
  constexpr int64_t lanes = kLanes<Acc>;
  const int64_t vectors = divide_up(rows, lanes);
  const int64_t first = panel * vectors / panels * lanes;
  const int64_t last = smaller(rows, (panel + 1) * vectors / panels * lanes);
  return {first, last - first};
}
template <class Acc>
int64_t panels_for(int64_t rows) {
  return divide_up(rows, kPanelLanes<Acc>);
}

}  // namespace
}  // namespace mixhead::cpu
