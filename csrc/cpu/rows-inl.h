#pragma once
// Few query rows, or rows that each name their own keys: channels along the lanes, one to four rows
// sharing each key that is read.
#include "cpu/forward-inl.h"

namespace mixhead::cpu {
namespace {

constexpr int64_t kFewRows = 4;
constexpr int64_t kRowKeys = 256;  // keys in a block: their weights stay in the first cache

template <class Acc>
inline __attribute__((always_inline)) Acc total(Vector<Acc> v) {
  Acc sum = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == 4) return _mm512_reduce_add_ps((__m512)v);
#endif
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<Acc>; ++i) sum += v[i];
  return sum;
}

inline __attribute__((always_inline)) Vector<float> widen(const float* from) {
  return load<float>(from);
}
inline __attribute__((always_inline)) Vector<double> widen(const double* from) {
  return load<double>(from);
}
inline __attribute__((always_inline)) Vector<float> widen(const BFloat16* from) {
#if defined(__AVX512F__)
  const auto bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif defined(__AVX2__)
  const auto bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Vector<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
  return Vector<float>{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
#endif
}
inline __attribute__((always_inline)) Vector<float> widen(const Float16* from) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  return Vector<float>{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
#endif
}

/// The keys that rows read, in order: keys first, first + 1, ... or those that an index names.
struct KeyList {
  const int64_t* index;
  int64_t stride;
  int64_t operator[](int64_t k) const { return index ? index[k * stride] : k; }
};

/// products[r * kRowKeys + k] = rows[r] . key(first + k).
template <class Io, class Acc, int count>
void row_products(
    const Acc* rows, int64_t row_stride, const KeyRows<Io>& keys, const KeyList& list,
    int64_t first, int64_t number, int64_t channels, Acc* products) {
  constexpr int lanes = kLanes<Acc>;
  const int64_t whole = keys.column == 1 ? channels / lanes * lanes : 0;
  for (int64_t k = 0; k < number; ++k) {
    const int64_t slot = list[first + k];
    const Io* key = keys[slot < 0 ? 0 : slot];
    Vector<Acc> sum[count];
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) sum[r] = Vector<Acc>{};
    for (int64_t c = 0; c < whole; c += lanes) {
      const auto part = widen(key + c);
#pragma GCC unroll 4
      for (int r = 0; r < count; ++r) sum[r] += part * load<Acc>(rows + r * row_stride + c);
    }
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) {
      Acc product = total<Acc>(sum[r]);
      for (int64_t c = whole; c < channels; ++c) {
        product += to_float(key[c * keys.column]) * rows[r * row_stride + c];
      }
      products[r * kRowKeys + k] = product;
    }
  }
}

/// outputs[r] = outputs[r] * alpha[r] + sum_k weights[r * kRowKeys + k] value(first + k).
template <class Io, class Acc, int count>
void row_values(
    const Acc* weights, const Acc* alpha, const KeyRows<Io>& values, const KeyList& list,
    int64_t first, int64_t number, int64_t channels, Acc* outputs, int64_t output_stride) {
  constexpr int lanes = kLanes<Acc>;
  int64_t c = 0;
  const auto part = [&]<int vectors>() {
    Vector<Acc> sum[count][vectors];
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        sum[r][j] = load<Acc>(outputs + r * output_stride + c + j * lanes) * alpha[r];
      }
    }
    for (int64_t k = 0; k < number; ++k) {
      const int64_t slot = list[first + k];
      const Io* value = values[slot < 0 ? 0 : slot] + c;
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        const auto each = widen(value + j * lanes);
#pragma GCC unroll 4
        for (int r = 0; r < count; ++r) sum[r][j] += weights[r * kRowKeys + k] * each;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        store(outputs + r * output_stride + c + j * lanes, sum[r][j]);
      }
    }
    c += vectors * lanes;
  };
  if (values.column == 1) {
    while (channels - c >= 4 * lanes) part.template operator()<4>();
    while (channels - c >= lanes) part.template operator()<1>();
  }
  for (; c < channels; ++c) {
    for (int r = 0; r < count; ++r) {
      Acc sum = outputs[r * output_stride + c] * alpha[r];
      for (int64_t k = 0; k < number; ++k) {
        const int64_t slot = list[first + k];
        const Io* value = values[slot < 0 ? 0 : slot];
        sum += weights[r * kRowKeys + k] * to_float(value[c * values.column]);
      }
      outputs[r * output_stride + c] = sum;
    }
  }
}

/// One row's place in the masks and in dropout's numbers.
struct RowRules {
  int64_t readable, mask_row;
  dropout::RowKey key;
};

inline RowRules row_rules(const Problem& p, const Source& source, const Position& at) {
  RowRules rules{source.keys, 0, {0, 0}};
  if (source.causal) {
    rules.readable = larger(0, smaller(source.keys, source.keys - p.rows + at.query + 1));
  }
  if (source.mask.kind != MaskKind::none) {
    rules.mask_row = offset(source.mask.view, at.batch, at.head, at.query);
  }
  if (p.dropout.on) {
    const int64_t row = (at.batch * p.key_heads * p.groups + at.head) * p.rows + at.query;
    rules.key = dropout::row_key(p.dropout.seed, source.side, row);
  }
  return rules;
}

/// Products become scores, -inf where the key may not be read.
template <class Acc>
void row_scores(
    const Source& source, const RowRules& rules, const KeyList& list, int64_t first, int64_t number,
    Acc factor, Acc* products) {
  for (int64_t k = 0; k < number; ++k) products[k] *= factor;
  for (int64_t k = larger(0, rules.readable - first); k < number; ++k) {
    products[k] = -kInfinity<Acc>;
  }
  const bool masked = source.mask.kind != MaskKind::none;
  if (!masked && !list.index) return;
  for (int64_t k = 0; k < number; ++k) {
    const int64_t slot = list[first + k];
    Acc add = slot < 0 ? -kInfinity<Acc> : Acc{0};
    if (masked && slot >= 0) {
      add = mask_value<Acc>(source.mask, rules.mask_row + slot * source.mask.view.column);
    }
    products[k] = add == -kInfinity<Acc> ? add : products[k] + add;
  }
}

template <class Acc>
Acc kept(const Problem& p, const RowRules& rules, int64_t column) {
  const uint32_t bits = dropout::uniform_bits(rules.key, static_cast<uint32_t>(column));
  return bits < p.dropout.threshold ? Acc{0} : static_cast<Acc>(p.dropout.keep_scale);
}

template <class Acc>
struct RowState {
  Position position;
  RowRules rules;
  Acc highest, sum;
};

/// Scores become weights relative to the running maximum; returns what rescales the earlier ones.
template <class Acc>
Acc weigh_row(const Problem& p, RowState<Acc>& row, int64_t first, int64_t number, Acc* scores) {
  constexpr int lanes = kLanes<Acc>;
  Acc highest = row.highest;
  bool is_nan = false;
  for (int64_t k = 0; k < number; ++k) {
    highest = scores[k] > highest ? scores[k] : highest;
    is_nan |= scores[k] != scores[k];
  }
  if (is_nan) highest = scores[0] - scores[0] + bits_as<float>(0x7fc00000u);
  const Acc base = highest == -kInfinity<Acc> ? 0 : highest;
  const Acc alpha = exp<Acc>(broadcast(row.highest - base))[0];
  const int64_t padded = divide_up(number, lanes) * lanes;
  for (int64_t k = number; k < padded; ++k) scores[k] = -kInfinity<Acc>;
  Vector<Acc> sum{};
  for (int64_t k = 0; k < padded; k += lanes) {
    const auto weight = exp<Acc>(load<Acc>(scores + k) - base);
    sum += weight;
    store(scores + k, weight);
  }
  row.highest = highest;
  row.sum = row.sum * alpha + total<Acc>(sum);
  if (p.dropout.on) {
    for (int64_t k = 0; k < number; ++k) scores[k] *= kept<Acc>(p, row.rules, first + k);
  }
  return alpha;
}

template <class Io>
void load_row(
    const View& view, const Position& at_row, int64_t channels, typename Multiply<Io>::Acc* to) {
  const Io* from = at<Io>(view, at_row.batch, at_row.head, at_row.query);
  for (int64_t c = 0; c < channels; ++c) to[c] = to_float(from[c * view.column]);
}

/// `count` rows past keys [first, last) of a list.
template <class Io, int count>
void stream_rows(
    const Problem& p, const Source& source, RowState<typename Multiply<Io>::Acc>* rows,
    const KeyHead& head, const KeyList& list, int64_t begin, int64_t end,
    const typename Multiply<Io>::Acc* queries, typename Multiply<Io>::Acc* outputs) {
  using Acc = typename Multiply<Io>::Acc;
  const auto keys = key_rows<Io>(source.key, head);
  const auto values = key_rows<Io>(source.value, head);
  const auto factor = static_cast<Acc>(DotKernel{p.scale}.factor());
  alignas(64) Acc scores[count * kRowKeys];
  for (int64_t first = begin; first < end; first += kRowKeys) {
    const int64_t number = smaller(kRowKeys, end - first);
    row_products<Io, Acc, count>(
        queries, p.channels, keys, list, first, number, p.channels, scores);
    Acc alpha[count];
    for (int r = 0; r < count; ++r) {
      row_scores(source, rows[r].rules, list, first, number, factor, scores + r * kRowKeys);
      alpha[r] = weigh_row(p, rows[r], first, number, scores + r * kRowKeys);
    }
    row_values<Io, Acc, count>(
        scores, alpha, values, list, first, number, p.value_channels, outputs, p.value_channels);
  }
}

template <class Acc>
void finish_row(
    const ForwardWork& work, int side, int64_t split, const RowState<Acc>& row, const Acc* output) {
  const auto& p = work.problem;
  const int64_t all = p.batch * p.key_heads * p.groups * work.chunk.rows;
  const int64_t at_row = split * all + chunk_row(p, work.chunk, row.position);
  const Acc inverse = row.sum == 0 ? Acc{0} : 1 / row.sum;
  auto* out = static_cast<Acc*>(work.part[side]) + at_row * p.value_channels;
  for (int64_t c = 0; c < p.value_channels; ++c) out[c] = output[c] * inverse;
  static_cast<Acc*>(work.part_lse[side])[at_row] =
      row.sum == 0 ? -kInfinity<Acc> : row.highest + log(row.sum);
}

inline int64_t row_scratch(const Problem& p) {
  return 2 * kFewRows * (p.channels + p.value_channels) * 8 + 256;
}

/// Rows of one unit, up to four, that read the same keys.
template <class Io, int count>
void forward_rows(
    const ForwardWork& work, int side, const Position* positions, const KeyHead& head,
    const KeyList& list, int64_t begin, int64_t end, int64_t split, void* memory) {
  using Acc = typename Multiply<Io>::Acc;
  const auto& p = work.problem;
  const auto& source = p.source[side];
  Arena arena{static_cast<char*>(memory)};
  auto* queries = arena.take<Acc>(count * p.channels);
  auto* outputs = arena.take<Acc>(count * p.value_channels);
  RowState<Acc> rows[count];
  for (int r = 0; r < count; ++r) {
    rows[r] = {positions[r], row_rules(p, source, positions[r]), -kInfinity<Acc>, 0};
    load_row<Io>(p.query, positions[r], p.channels, queries + r * p.channels);
    for (int64_t c = 0; c < p.value_channels; ++c) outputs[r * p.value_channels + c] = 0;
  }
  stream_rows<Io, count>(p, source, rows, head, list, begin, end, queries, outputs);
  for (int r = 0; r < count; ++r) {
    finish_row(work, side, split, rows[r], outputs + r * p.value_channels);
  }
}

/// An item of a source whose rows each name their keys; its units are (batch, query head).
template <class Io>
void forward_indexed(const ForwardWork& work, int side, const ForwardItem& item, void* memory) {
  const auto& p = work.problem;
  const auto& source = p.source[side];
  const int64_t heads = p.key_heads * p.groups;
  for (int64_t i = 0; i < item.rows; ++i) {
    const Position at_row{
        item.unit / heads, item.unit % heads, work.chunk.first_row + item.first_row + i};
    const KeyList list{
        at<int64_t>(source.index, at_row.batch, at_row.head, at_row.query), source.index.column};
    forward_rows<Io, 1>(
        work, side, &at_row, {at_row.batch, at_row.head / p.groups}, list, 0, source.keys,
        item.split, memory);
  }
}

/// An item of a source whose units have few rows.
template <class Io>
void forward_few(const ForwardWork& work, int side, const ForwardItem& item, void* memory) {
  const auto& p = work.problem;
  const auto& source = p.source[side];
  Position positions[kFewRows];
  int64_t end = 0;
  for (int64_t i = 0; i < item.rows; ++i) {
    positions[i] = position(p, source, work.chunk, item.unit, i);
    end = larger(end, row_rules(p, source, positions[i]).readable);
  }
  end = smaller(end, item.first_key + item.keys);
  const auto head = key_head(p, source, item.unit);
  const auto run = [&]<int count>() {
    forward_rows<Io, count>(
        work, side, positions, head, {nullptr, 0}, item.first_key, end, item.split, memory);
  };
  if (item.rows == 1) run.template operator()<1>();
  if (item.rows == 2) run.template operator()<2>();
  if (item.rows == 3) run.template operator()<3>();
  if (item.rows == 4) run.template operator()<4>();
}

}  // namespace
}  // namespace mixhead::cpu
