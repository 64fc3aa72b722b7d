#pragma once
// Queries and keys of kernel regression as the loops read them, and the similarities of a block.
//
// Few channels are subtracted; many go through a product, u^2 = |q|^2 + |k|^2 - 2 q.k, of points
// centred on the keys' mean, and pairs whose u^2 is small against |q|^2 + |k|^2 are subtracted too.
#include "cpu/backward-panel-inl.h"
#include "cpu/kernel-loops-inl.h"
#include "cpu/regression.h"
#include "cpu/rows-inl.h"
#include "cpu/transpose-inl.h"

namespace mixhead::cpu {
namespace {

enum class Form : uint8_t { product, unit_product, difference, expansion };

constexpr int64_t kFewChannels = 8;

template <class T>
constexpr T kNan = static_cast<T>(__builtin_nan(""));
inline float exp_of(float x) { return __builtin_expf(x); }
inline double exp_of(double x) { return __builtin_exp(x); }

/// u^2 below this part of |q|^2 + |k|^2 has lost too many digits to their rounding.
template <class Acc>
constexpr Acc kCancelled = Acc{1} / 64;

/// How the points of one query head are written, and its constants.
template <class Acc>
struct Points {
  Form form;
  bool uniform;  // one bandwidth for all channels
  int64_t channels;
  const Acc* inverse;             // 1 / h
  Acc precision, precision_tail;  // of the first channel, as a sum
  const Acc* centre;
};

template <class Acc>
Points<Acc> points_of(const Regression& r, int64_t head, int64_t key_unit) {
  const int64_t channels = r.problem.channels;
  Points<Acc> points{};
  points.channels = channels;
  points.inverse = static_cast<const Acc*>(r.inverse_bandwidth) + head * channels;
  points.precision = static_cast<Acc>(r.precision[head]);
  points.precision_tail = static_cast<Acc>(r.precision[head] - points.precision);
  points.centre = static_cast<const Acc*>(r.centre) + key_unit * channels;
  points.uniform = true;
  for (int64_t c = 1; c < channels; ++c) {
    points.uniform &= points.inverse[c] == points.inverse[0];
  }
  const Kernel kernel = r.kernel[head];
  points.form = kernel == Kernel::dot      ? Form::product
                : kernel == Kernel::cosine ? Form::unit_product
                : channels <= kFewChannels ? Form::difference
                                           : Form::expansion;
  return points;
}

template <class T, class Acc>
void widen_row(const View& view, int64_t element, int64_t count, Acc* to) {
  const T* from = static_cast<const T*>(view.data) + element;
  if (view.column != 1) return convert_row(from, view.column, count, to);
  for (int64_t c = 0; c < count; ++c) to[c] = to_float(from[c]);
}

/// A row of any type, widened.
template <class Acc>
void read_row(Type type, const View& view, int64_t element, int64_t count, Acc* to) {
  if constexpr (sizeof(Acc) == 8) {
    widen_row<double>(view, element, count, to);
  } else if (type == Type::float32) {
    widen_row<float>(view, element, count, to);
  } else if (type == Type::bfloat16) {
    widen_row<BFloat16>(view, element, count, to);
  } else {
    convert_row(static_cast<const Float16*>(view.data) + element, view.column, count, to);
  }
}

template <class Acc>
void write_row(Type type, const Acc* from, int64_t count, void* data, int64_t element) {
  if (sizeof(Acc) == 8 || type == Type::float32) {
    __builtin_memcpy(static_cast<Acc*>(data) + element, from, count * sizeof(Acc));
    return;
  }
  for (int64_t c = 0; c < count; ++c) store_as(type, data, element + c, from[c]);
}

/// The inner product of two rows.
template <class Acc>
Acc inner_product(const Acc* a, const Acc* b, int64_t channels) {
  const int64_t whole = channels / kLanes<Acc> * kLanes<Acc>;
  Vector<Acc> products{};
  for (int64_t c = 0; c < whole; c += kLanes<Acc>) {
    products += load<Acc>(a + c) * load<Acc>(b + c);
  }
  Acc sum = whole > 0 ? total<Acc>(products) : Acc{0};
  for (int64_t c = whole; c < channels; ++c) sum += a[c] * b[c];
  return sum;
}

template <class Acc>
Acc squared_length(const Acc* row, int64_t channels) {
  return inner_product(row, row, channels);
}

/// The length that a row is divided by; 1 for a zero row, which stays zero.
template <class Acc>
Acc length_of(const Acc* row, int64_t channels) {
  const Acc square = squared_length(row, channels);
  return square == 0 ? Acc{1} : __builtin_sqrt(square);
}

/// A row in its form's coordinates, in place; returns what the form needs of its length: the square
/// where u^2 is expanded, what a unit row was divided by.
template <class Acc>
Acc place_point(const Points<Acc>& points, Acc* row) {
  const int64_t channels = points.channels;
  if (points.form == Form::unit_product) {
    const Acc length = length_of(row, channels);
    for (int64_t c = 0; c < channels; ++c) row[c] /= length;
    return length;
  }
  if (points.form != Form::expansion) return 0;
  for (int64_t c = 0; c < channels; ++c) row[c] = (row[c] - points.centre[c]) * points.inverse[c];
  return squared_length(row, channels);
}

/// What a query's coordinate is multiplied by, so that a product with a key's is what is wanted.
template <class Acc>
Acc query_factor(const Points<Acc>& points, int64_t c) {
  if (points.form == Form::expansion) return Acc{-2};
  if (points.form == Form::difference) return Acc{1};
  return points.inverse[c] * points.inverse[c];
}

/// Keys in their form's coordinates, one row after the other.
template <class Acc>
struct PlacedKeys {
  Acc* rows;
  Acc* lengths;  // what place_point returns

  void take(const Problem& p, int64_t keys, Arena& arena) {
    rows = arena.take<Acc>(keys * p.channels);
    lengths = arena.take<Acc>(keys);
  }
  PlacedKeys from(int64_t k, int64_t channels) const { return {rows + k * channels, lengths + k}; }
};

template <class Acc>
void place_keys(
    const Points<Acc>& points, const Regression& r, const KeyHead& head, int64_t first,
    int64_t keys, const PlacedKeys<Acc>& to) {
  const View& view = r.problem.source[0].key;
  for (int64_t k = 0; k < keys; ++k) {
    Acc* row = to.rows + k * points.channels;
    const int64_t element = offset(view, head.batch, head.head, first + k);
    read_row(r.problem.type, view, element, points.channels, row);
    to.lengths[k] = place_point(points, row);
  }
}

template <class Acc>
void read_values(const Regression& r, const KeyHead& head, int64_t first, int64_t keys, Acc* to) {
  const View& view = r.problem.source[0].value;
  const int64_t channels = r.problem.value_channels;
  for (int64_t k = 0; k < keys; ++k) {
    const int64_t element = offset(view, head.batch, head.head, first + k);
    read_row(r.problem.type, view, element, channels, to + k * channels);
  }
}

inline int64_t query_units(const Problem& p) {
  return (p.source[0].shared ? 1 : p.batch) * p.key_heads * p.groups;
}

/// Row `row` of a query unit, of those in the chunk.
inline Position query_position(
    const Problem& p, const Chunk& chunk, int64_t query_unit, int64_t row) {
  const int64_t heads = p.key_heads * p.groups;
  const int64_t batch = p.source[0].shared ? row / chunk.rows : query_unit / heads;
  return {batch, query_unit % heads, chunk.first_row + row % chunk.rows};
}
inline int64_t key_unit_of(const Problem& p, int64_t query_unit) { return query_unit / p.groups; }

/// A panel of queries: operand [channels][lanes] and the same by row, what place_point returns, the
/// bounding box.
template <class Acc>
struct QueryPanel {
  Rows<Acc> rows;
  int64_t lowest_query, highest_query;
  Acc *query, *by_row, *lengths, *box;

  void take(const Problem& p, Arena& arena) {
    query = arena.take<Acc>(p.channels * kPanelLanes<Acc>);
    by_row = arena.take<Acc>(kPanelLanes<Acc> * padded<Acc>(p.channels));
    lengths = arena.take<Acc>(kPanelLanes<Acc>);
    box = arena.take<Acc>(2 * p.channels);
  }
};

/// Widens [low, high] to a number; to everything where that is NaN.
template <class Acc>
void widen(Acc& low, Acc& high, Acc x) {
  const bool is_nan = x != x;
  if (is_nan || x < low) low = is_nan ? -kInfinity<Acc> : x;
  if (is_nan || x > high) high = is_nan ? kInfinity<Acc> : x;
}
template <class Acc>
void empty_box(Acc* box, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    box[c] = kInfinity<Acc>;
    box[channels + c] = -kInfinity<Acc>;
  }
}

/// Whether every pair of two boxes is further apart than the support of a compact kernel.
template <class Acc>
bool apart(const Points<Acc>& points, const Acc* a, const Acc* b) {
  const int64_t channels = points.channels;
  Acc square = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const Acc left = b[c] - a[channels + c], right = a[c] - b[channels + c];
    const Acc gap = (left > right ? left : right) * points.inverse[c];
    if (gap > 0) square += gap * gap;
  }
  return square > Acc{1.001};  // above what rounding may do to a pair's u^2
}

/// Fills the panel with `count` rows whose positions position_of(lane) gives. visit(lane, row) sees
/// each row in its form's coordinates, padded with zeros.
template <class Acc, class PositionOf, class Visit>
void place_queries(
    const Points<Acc>& points, const Regression& r, int64_t count, const PositionOf& position_of,
    QueryPanel<Acc>& panel, const Visit& visit) {
  const auto& p = r.problem;
  auto& rows = panel.rows;
  place_rows(p, p.source[0], count, position_of, rows);
  panel.lowest_query = p.rows;
  panel.highest_query = -1;
  empty_box(panel.box, points.channels);
  const int64_t wide = padded<Acc>(points.channels);
  for (int64_t i = 0; i < rows.lanes * wide; ++i) panel.by_row[i] = 0;
  for (int lane = 0; lane < count; ++lane) {
    Acc* row = panel.by_row + lane * wide;
    const auto& at_row = rows.position[lane];
    panel.lowest_query = smaller(panel.lowest_query, at_row.query);
    panel.highest_query = larger(panel.highest_query, at_row.query);
    read_row(
        p.type, p.query, offset(p.query, at_row.batch, at_row.head, at_row.query), points.channels,
        row);
    for (int64_t c = 0; r.boxes && c < points.channels; ++c) {
      widen(panel.box[c], panel.box[points.channels + c], row[c]);
    }
    panel.lengths[lane] = place_point(points, row);
    visit(lane, row);
    for (int64_t c = 0; c < points.channels; ++c) row[c] *= query_factor(points, c);
  }
  for (int64_t lane = count; lane < rows.lanes; ++lane) panel.lengths[lane] = 0;
  transpose(panel.by_row, rows.lanes, wide, points.channels, panel.query);
}

/// -inf where a row may not read a key, else what its mask adds: null where there is nothing to
/// add. `nothing_readable` where no row reads any of the keys.
template <class Acc>
struct PairBias {
  const Acc* values;
  bool nothing_readable;
};

template <class Acc>
PairBias<Acc> pair_bias(
    const Regression& r, const QueryPanel<Acc>& panel, int64_t first, int64_t keys, Acc* to) {
  const auto& rows = panel.rows;
  const auto mask = bias_of(r.problem.source[0], rows, first, keys, to);
  const bool all_causal = rows.fewest >= first + keys;
  const bool self =
      r.exclude_self && panel.lowest_query < first + keys && panel.highest_query >= first;
  if (mask.nothing_readable || rows.most <= first) return {nullptr, true};
  if (mask.kind == Bias<Acc>::none && all_causal && !self) return {nullptr, false};
  const int64_t lanes = rows.lanes;
  for (int64_t k = keys - 1; k >= 0; --k) {  // from the last: `to` may hold a value for each key
    const Acc of_key = mask.kind == Bias<Acc>::per_key ? to[k] : Acc{0};
    for (int64_t lane = 0; lane < lanes; ++lane) {
      Acc& value = to[k * lanes + lane];
      if (mask.kind != Bias<Acc>::per_lane) value = of_key;
      const bool left_out = self && lane < rows.count && rows.position[lane].query == first + k;
      if (first + k >= rows.readable[lane] || left_out) value = -kInfinity<Acc>;
    }
  }
  return {to, false};
}

/// u^2 by subtraction, [key][lane].
template <class Acc, int vectors, bool uniform>
void squared_differences(
    const Points<Acc>& points, const Acc* query, const Acc* key_rows, int64_t keys, Acc* to) {
  using V = Vector<Acc>;
  constexpr int lanes = kLanes<Acc>, width = vectors * lanes;
  for (int64_t k = 0; k < keys; ++k) {
    V sum[vectors] = {};
    for (int64_t c = 0; c < points.channels; ++c) {
      const V key = broadcast(key_rows[k * points.channels + c]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        V difference = load<Acc>(query + c * width + j * lanes) - key;
        if constexpr (!uniform) difference *= points.inverse[c];
        sum[j] += difference * difference;
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      // Rounded once: where u is near 1, a compact kernel is only what is left of 1.
      if constexpr (uniform) {
        sum[j] = sum[j] * points.precision + sum[j] * points.precision_tail;
      }
      store(to + k * width + j * lanes, sum[j]);
    }
  }
}

template <class Acc>
inline __attribute__((always_inline)) bool any_below(Vector<Acc> a, Vector<Acc> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == 4) {
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ) != 0;
  } else {
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LT_OQ) != 0;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Acc) == 4) {
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ)) != 0;
  } else {
    return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_LT_OQ)) != 0;
  }
#else
  const auto below = a < b;
  typename Bits<Acc>::Signed any = 0;
  for (int i = 0; i < kLanes<Acc>; ++i) any |= below[i];
  return any != 0;
#endif
}

/// Products -2 q.k become u^2, in place.
template <class Acc>
void expand_squares(
    const Points<Acc>& points, const QueryPanel<Acc>& panel, const PlacedKeys<Acc>& keys,
    int64_t count, Acc* to) {
  using V = Vector<Acc>;
  const int64_t width = panel.rows.lanes;
  for (int64_t j = 0; j < width; j += kLanes<Acc>) {
    const V own = load<Acc>(panel.lengths + j);
    for (int64_t k = 0; k < count; ++k) {
      const V sum = own + keys.lengths[k];
      V square = load<Acc>(to + k * width + j) + sum;
      if (any_below<Acc>(square, sum * kCancelled<Acc>)) {
        const Acc* key = keys.rows + k * points.channels;
        square = V{};
        for (int64_t c = 0; c < points.channels; ++c) {
          const V difference = load<Acc>(panel.query + c * width + j) * Acc{-0.5} - key[c];
          square += difference * difference;
        }
      }
      store(to + k * width + j, square);
    }
  }
}

/// The similarities of a block: products, or u^2.
template <class Acc, int vectors>
void similarities(
    const Points<Acc>& points, const QueryPanel<Acc>& panel, const PlacedKeys<Acc>& keys,
    int64_t count, Acc* to) {
  constexpr int64_t width = vectors * kLanes<Acc>, size = sizeof(Acc);
  if (points.form == Form::difference) {
    points.uniform
        ? squared_differences<Acc, vectors, true>(points, panel.query, keys.rows, count, to)
        : squared_differences<Acc, vectors, false>(points, panel.query, keys.rows, count, to);
    return;
  }
  gemm<Plain<Acc>, vectors>(
      count, points.channels, keys.rows, {points.channels * size, size}, panel.query, width, to,
      width);
  if (points.form == Form::expansion) expand_squares(points, panel, keys, count, to);
}

/// The mean of at most 4096 of a key unit's keys, finite numbers only.
template <class Acc>
void find_centre(const Regression& r, int64_t key_unit, Acc* row, double* sums) {
  const auto& p = r.problem;
  const auto& source = p.source[0];
  const auto head = key_head(p, source, key_unit);
  double* counts = sums + p.channels;
  for (int64_t c = 0; c < 2 * p.channels; ++c) sums[c] = 0;
  for (int64_t k = 0; k < source.keys; k += divide_up(source.keys, 4096)) {
    read_row(p.type, source.key, offset(source.key, head.batch, head.head, k), p.channels, row);
    for (int64_t c = 0; c < p.channels; ++c) {
      const bool finite = row[c] - row[c] == 0;
      sums[c] += finite ? row[c] : 0;
      counts[c] += finite;
    }
  }
  auto* centre = static_cast<Acc*>(r.centre) + key_unit * p.channels;
  for (int64_t c = 0; c < p.channels; ++c) {
    centre[c] = static_cast<Acc>(counts[c] > 0 ? sums[c] / counts[c] : 0.0);
  }
}

template <class Acc>
void find_boxes(const Regression& r, int64_t key_unit, Acc* row) {
  const auto& p = r.problem;
  const auto& source = p.source[0];
  const auto head = key_head(p, source, key_unit);
  const int64_t blocks = divide_up(source.keys, r.box_keys);
  auto* box = static_cast<Acc*>(r.boxes) + key_unit * blocks * 2 * p.channels;
  for (int64_t k = 0; k < source.keys; ++k) {
    if (k > 0 && k % r.box_keys == 0) box += 2 * p.channels;
    if (k % r.box_keys == 0) empty_box(box, p.channels);
    read_row(p.type, source.key, offset(source.key, head.batch, head.head, k), p.channels, row);
    for (int64_t c = 0; c < p.channels; ++c) widen(box[c], box[p.channels + c], row[c]);
  }
}

/// What the items read of a key unit: the centre where u^2 is expanded, and the blocks' boxes.
template <class Acc>
void summarise(const Regression& r, int64_t key_unit, void* memory) {
  const auto& p = r.problem;
  Arena arena{static_cast<char*>(memory)};
  auto* row = arena.take<Acc>(p.channels);
  auto* sums = arena.take<double>(2 * p.channels);
  if (p.channels > kFewChannels) find_centre(r, key_unit, row, sums);
  if (r.boxes) find_boxes(r, key_unit, row);
}

inline int64_t summarise_scratch(const Regression& r) { return (3 * r.problem.channels + 16) * 8; }

/// The box of the block that begins at key `first`.
template <class Acc>
const Acc* key_box(const Regression& r, int64_t key_unit, int64_t first) {
  const int64_t blocks = divide_up(r.problem.source[0].keys, r.box_keys);
  return static_cast<const Acc*>(r.boxes) +
         (key_unit * blocks + first / r.box_keys) * 2 * r.problem.channels;
}

}  // namespace
}  // namespace mixhead::cpu
