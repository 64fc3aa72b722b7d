#pragma once
// The search for the keys of highest score; see topk.h.
#include "cpu/forward-inl.h"
#include "cpu/topk.h"

namespace mixhead::cpu {
namespace {

/// Sums -(a - b)^2 where Plain sums a b: distances by subtraction, so nothing cancels.
template <class T>
struct MinusSquare {
  using Acc = T;
  using Operand = T;
  static constexpr int steps = 1;
  static inline __attribute__((always_inline)) Vector<T> multiply_add(
      Vector<T> sum, const char* a, Vector<T> b) {
    T scalar;
    __builtin_memcpy(&scalar, a, sizeof(T));
    const auto difference = scalar - b;
    return sum - difference * difference;
  }
};

/// The k best of one row: a heap whose top is the worst. Places not yet filled are score -inf,
/// index -1.
template <class Acc>
struct Best {
  Acc* score;
  int64_t* index;
  int64_t k;

  /// The order of the result: high scores, then low indices; NaN above all.
  static bool before(Acc a, int64_t a_index, Acc b, int64_t b_index) {
    if (a > b) return true;
    if (a < b) return false;
    const bool a_nan = a != a, b_nan = b != b;
    return a_nan == b_nan ? a_index < b_index : a_nan;
  }
  bool before(int64_t i, int64_t j) const { return before(score[i], index[i], score[j], index[j]); }
  void clear() {
    for (int64_t i = 0; i < k; ++i) {
      score[i] = -kInfinity<Acc>;
      index[i] = -1;
    }
  }
  /// What a score has to beat; where it is NaN only another NaN is worth asking.
  Acc worst() const { return score[0] == score[0] ? score[0] : kInfinity<Acc>; }
  void swap(int64_t i, int64_t j) {
    const Acc s = score[i];
    score[i] = score[j];
    score[j] = s;
    const int64_t n = index[i];
    index[i] = index[j];
    index[j] = n;
  }
  void sink(int64_t size) {
    for (int64_t at = 0;;) {
      int64_t child = 2 * at + 1;
      if (child >= size) return;
      if (child + 1 < size && before(child, child + 1)) ++child;
      if (before(child, at)) return;
      swap(at, child);
      at = child;
    }
  }
  void offer(Acc new_score, int64_t new_index) {
    if (!before(new_score, new_index, score[0], index[0])) return;
    score[0] = new_score;
    index[0] = new_index;
    sink(k);
  }
  void sort() {
    for (int64_t size = k - 1; size > 0; --size) {
      swap(0, size);
      sink(size);
    }
  }
};

template <class Acc>
Best<Acc> best_of(const TopkWork& work, int64_t row) {
  return {static_cast<Acc*>(work.scores) + row * work.k, work.indices + row * work.k, work.k};
}

/// A bit for each lane where not score <= bound.
inline __attribute__((always_inline)) uint64_t beats(Vector<float> score, Vector<float> bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)score, (__m512)bound, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)score, (__m256)bound, _CMP_NLE_UQ));
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpnle_ps((__m128)score, (__m128)bound));
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes<float>; ++i) bits |= uint64_t{!(score[i] <= bound[i])} << i;
  return bits;
#endif
}
inline __attribute__((always_inline)) uint64_t beats(Vector<double> score, Vector<double> bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)score, (__m512d)bound, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)score, (__m256d)bound, _CMP_NLE_UQ));
#elif defined(__SSE2__)
  return _mm_movemask_pd(_mm_cmpnle_pd((__m128d)score, (__m128d)bound));
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes<double>; ++i) bits |= uint64_t{!(score[i] <= bound[i])} << i;
  return bits;
#endif
}

template <class M>
struct TopkPanel {
  using Acc = typename M::Acc;
  Rows<Acc> rows;
  typename M::Operand* query;                     // [steps][lanes]
  alignas(64) Acc worst[kPanelLanes<Acc>];        // of each row's best; +inf in unused lanes
  alignas(64) Acc query_scale[kPanelLanes<Acc>];  // cosine
};

template <class M>
struct TopkScratch {
  using Acc = typename M::Acc;
  TopkPanel<M>* panels;
  typename M::Operand* queries;
  Acc* scores;
  Acc* bias;
  void* key;

  TopkScratch(const TopkWork& work, Arena& arena) {
    const int64_t count = panels_for<Acc>(work.split.row_block);
    panels = arena.take<TopkPanel<M>>(count);
    queries = arena.take<typename M::Operand>(
        count * divide_up(work.problem.channels, M::steps) * kPanelLanes<Acc>);
    scores = arena.take<Acc>(work.block * kPanelLanes<Acc>);
    bias = arena.take<Acc>(work.block * kPanelLanes<Acc>);
    key = arena.take<Acc>(packed_elements(work.block, work.problem.channels));
  }
};

/// One block of keys past one panel.
template <class M, int vectors>
void search_block(
    const TopkWork& work, int64_t first_row, TopkPanel<M>& panel, const Bias<typename M::Acc>& bias,
    const typename M::Acc* key_scale, int64_t key_scale_stride, int64_t first, int64_t keys,
    const Broadcast& key, typename M::Acc* scores) {
  using Acc = typename M::Acc;
  using V = Vector<Acc>;
  constexpr int lanes = kLanes<Acc>, width = vectors * lanes;
  gemm<M, vectors>(
      keys, divide_up(work.problem.channels, M::steps), key.data, key.strides, panel.query, width,
      scores, width);
  const V nothing = broadcast(-kInfinity<Acc>);
  for (int64_t k = 0; k < keys; ++k) {
    Acc* row = scores + k * width;
    uint64_t found = 0;
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      V score = load<Acc>(row + j * lanes);
      if (key_scale) {
        score *= load<Acc>(panel.query_scale + j * lanes) * key_scale[k * key_scale_stride];
      }
      if (bias.kind != Bias<Acc>::none) {
        const V add = bias.kind == Bias<Acc>::per_key
                          ? broadcast(bias.values[k])
                          : load<Acc>(bias.values + k * width + j * lanes);
        score = add == nothing ? nothing : score + add;
      }
      if (key_scale || bias.kind != Bias<Acc>::none) store(row + j * lanes, score);
      found |= beats(score, load<Acc>(panel.worst + j * lanes)) << (j * lanes);
    }
    for (; found; found &= found - 1) {
      const int lane = __builtin_ctzll(found);
      if (lane >= panel.rows.count) break;
      const Position& at = panel.rows.position[lane];
      auto best = best_of<Acc>(work, first_row + global_row(work.problem, at));
      best.offer(row[lane], first + k);
      panel.worst[lane] = best.worst();
    }
  }
}

template <class M, class Io>
void start_search(
    const TopkWork& work, const ForwardItem& item, const Range& rows, int64_t first_row,
    TopkPanel<M>& panel) {
  using Acc = typename M::Acc;
  const auto& p = work.problem;
  const auto position_of = [&](int64_t lane) {
    return position(p, p.source[0], {0, p.rows}, item.unit, item.first_row + rows.first + lane);
  };
  place_rows(p, p.source[0], rows.count, position_of, panel.rows);
  pack_lanes<M, Io>(p.query, panel.rows, p.channels, panel.query);
  for (int lane = 0; lane < panel.rows.lanes; ++lane) {
    const bool used = lane < panel.rows.count;
    panel.worst[lane] = used ? -kInfinity<Acc> : kInfinity<Acc>;
    panel.query_scale[lane] = 0;
    if (!used) continue;
    const auto& at = panel.rows.position[lane];
    best_of<Acc>(work, first_row + global_row(p, at)).clear();
    if (work.metric == Metric::cosine) {
      const auto& norm = work.inverse_query_norm;
      panel.query_scale[lane] =
          static_cast<const Acc*>(norm.data)[offset(norm, at.batch, at.head, at.query)];
    }
  }
}

/// The keys of one split past the rows of one block.
template <class M, class Io>
void search(const TopkWork& work, int64_t number, void* memory) {
  using Acc = typename M::Acc;
  const auto& p = work.problem;
  const auto& source = p.source[0];
  Arena arena{static_cast<char*>(memory)};
  TopkScratch<M> scratch(work, arena);
  const auto item = forward_item_of(source, work.split, number);
  const int64_t panels = panels_for<Acc>(item.rows);
  const int64_t first_row = item.split * p.batch * p.key_heads * p.groups * p.rows;
  const int64_t panel_size = divide_up(p.channels, M::steps) * kPanelLanes<Acc>;
  for (int64_t i = 0; i < panels; ++i) {
    scratch.panels[i].query = scratch.queries + i * panel_size;
    start_search<M, Io>(
        work, item, panel_rows<Acc>(item.rows, panels, i), first_row, scratch.panels[i]);
  }
  const auto head = key_head(p, source, item.unit);
  const auto key_data = key_rows<Io>(source.key, head);
  const auto& norm = work.inverse_key_norm;
  const int64_t last = item.first_key + item.keys;
  for (int64_t first = item.first_key; first < last; first += work.block) {
    const int64_t keys = smaller(work.block, last - first);
    const auto key = by_channel<M>(key_data.from(first), keys, p.channels, scratch.key);
    const Acc* key_scale =
        work.metric == Metric::cosine ? at<Acc>(norm, head.batch, head.head, first) : nullptr;
    for (int64_t i = 0; i < panels; ++i) {
      auto& panel = scratch.panels[i];
      const auto bias = bias_of(source, panel.rows, first, keys, scratch.bias);
      if (bias.nothing_readable) continue;
      with_vectors(panel.rows.vectors(), [&]<int vectors>() {
        search_block<M, vectors>(
            work, first_row, panel, bias, key_scale, norm.row, first, keys, key, scratch.scores);
      });
    }
  }
  if (work.split.key_splits > 1) return;
  for (int64_t i = 0; i < panels; ++i) {
    const auto& rows = scratch.panels[i].rows;
    for (int lane = 0; lane < rows.count; ++lane) {
      best_of<Acc>(work, global_row(p, rows.position[lane])).sort();
    }
  }
}

template <class Io>
void search_item(const TopkWork& work, int64_t item, void* scratch) {
  if (work.metric == Metric::l2) {
    search<MinusSquare<typename Multiply<Io>::Acc>, Io>(work, item, scratch);
  } else {
    search<Multiply<Io>, Io>(work, item, scratch);
  }
}

template <class Io>
int64_t search_scratch(const TopkWork& work) {
  Arena dot{nullptr}, l2{nullptr};
  TopkScratch<Multiply<Io>> measure_dot(work, dot);
  TopkScratch<MinusSquare<typename Multiply<Io>::Acc>> measure_l2(work, l2);
  return larger(reinterpret_cast<intptr_t>(dot.next), reinterpret_cast<intptr_t>(l2.next));
}

template <class Acc>
void merge_splits(const TopkWork& work, int64_t first, int64_t last) {
  const auto& p = work.problem;
  const int64_t all = p.batch * p.key_heads * p.groups * p.rows;
  for (int64_t row = first; row < last; ++row) {
    auto best = best_of<Acc>(work, row);
    for (int64_t split = 1; split < work.split.key_splits; ++split) {
      const auto other = best_of<Acc>(work, split * all + row);
      for (int64_t i = 0; i < work.k; ++i) {
        if (other.index[i] >= 0) best.offer(other.score[i], other.index[i]);
      }
    }
    best.sort();
  }
}

template <class Io>
constexpr TopkKernels kTopk{
    .panel_lanes = kPanelLanes<typename Multiply<Io>::Acc>,
    .scratch = search_scratch<Io>,
    .item = search_item<Io>,
    .merge = merge_splits<typename Multiply<Io>::Acc>,
};

inline const TopkKernels& topk_table(Type type) {
  switch (type) {
    case Type::float32:
      return kTopk<float>;
    case Type::float64:
      return kTopk<double>;
    case Type::bfloat16:
      return kTopk<BFloat16>;
    default:
      return kTopk<Float16>;
  }
}

}  // namespace
}  // namespace mixhead::cpu
