#pragma once
// The backward of rows that each name their keys. Keys' gradients are scattered without races: an
// item owns a range of slots, walks every row in order, and does what falls into its range.
#include "cpu/broadcast-gradients-inl.h"
#include "cpu/rows-inl.h"

namespace mixhead::cpu {
namespace {

/// A row as the backward reads it, channels in a line.
template <class Acc>
struct NamedRow {
  RowRules rules;
  Acc* query;
  Acc* grad;  // w dO
  Acc lse;    // inf where nothing is read
  Acc delta;
};

template <class Io>
NamedRow<typename Multiply<Io>::Acc> named_row(
    const Problem& p, const BackwardInputs& in, int side, const Chunk& chunk, const void* delta,
    const Position& at_row, typename Multiply<Io>::Acc* query, typename Multiply<Io>::Acc* grad) {
  using Acc = typename Multiply<Io>::Acc;
  const auto row = row_mix<Io>(p, in, at_row);
  load_row<Io>(p.query, at_row, p.channels, query);
  load_row<Io>(in.grad_output, at_row, p.value_channels, grad);
  const int64_t mix_row = offset(p.mix, at_row.batch, at_row.head, at_row.query);
  for (int64_t c = 0; c < p.value_channels; ++c) {
    grad[c] *= channel_weight(p, row, mix_row, side, c);
  }
  return {
      row_rules(p, p.source[side], at_row), query, grad,
      row.lse[side] == -kInfinity<Acc> ? kInfinity<Acc> : row.lse[side],
      static_cast<const Acc*>(delta)[chunk_row(p, chunk, at_row)]};
}

/// Up to kRowKeys named keys: P in `weights`, dS in `gradients`. `columns` gives each key's place
/// in the row's list where that is not first, first + 1, ...
template <class Io>
void named_gradients(
    const Problem& p, const Source& source, const KeyHead& head,
    const NamedRow<typename Multiply<Io>::Acc>& row, const KeyList& list, int64_t first,
    int64_t number, const int64_t* columns, typename Multiply<Io>::Acc* weights,
    typename Multiply<Io>::Acc* gradients) {
  using Acc = typename Multiply<Io>::Acc;
  constexpr int lanes = kLanes<Acc>;
  const auto keys = key_rows<Io>(source.key, head);
  const auto values = key_rows<Io>(source.value, head);
  row_products<Io, Acc, 1>(row.query, 0, keys, list, first, number, p.channels, weights);
  row_products<Io, Acc, 1>(row.grad, 0, values, list, first, number, p.value_channels, gradients);
  row_scores(
      source, row.rules, list, first, number, static_cast<Acc>(DotKernel{p.scale}.factor()),
      weights);
  for (int64_t k = 0; k < divide_up(number, lanes) * lanes; k += lanes) {
    store(weights + k, exp<Acc>(load<Acc>(weights + k) - row.lse));
  }
  for (int64_t k = 0; k < number; ++k) {
    const Acc share =
        p.dropout.on ? kept<Acc>(p, row.rules, columns ? columns[k] : first + k) : Acc{1};
    gradients[k] = weights[k] * (share * gradients[k] - row.delta);
    weights[k] *= share;
  }
}

template <class Acc>
struct NamedScratch {
  Acc *query, *grad, *weights, *gradients;
  int64_t *slots, *columns;
  NamedScratch(const Problem& p, Arena& arena) {
    query = arena.take<Acc>(p.channels);
    grad = arena.take<Acc>(p.value_channels);
    weights = arena.take<Acc>(kRowKeys);
    gradients = arena.take<Acc>(kRowKeys);
    slots = arena.take<int64_t>(kRowKeys);
    columns = arena.take<int64_t>(kRowKeys);
  }
};

inline KeyList named_keys(const Source& source, const Position& at_row) {
  return {at<int64_t>(source.index, at_row.batch, at_row.head, at_row.query), source.index.column};
}

/// dQ of one row of the chunk.
template <class Io>
void named_query_gradient(
    const BackwardWork& work, int side, const Position& at_row, void* memory) {
  using Acc = typename Multiply<Io>::Acc;
  const auto& p = work.problem;
  const auto& source = p.source[side];
  Arena arena{static_cast<char*>(memory)};
  NamedScratch<Acc> scratch(p, arena);
  const auto row = named_row<Io>(
      p, work.inputs, side, work.chunk, work.delta[side], at_row, scratch.query, scratch.grad);
  const KeyHead head{source.shared ? 0 : at_row.batch, at_row.head / p.groups};
  const auto list = named_keys(source, at_row);
  Acc* out =
      static_cast<Acc*>(work.part[side]) + chunk_row(p, work.chunk, at_row) * (p.channels + 1);
  for (int64_t c = 0; c <= p.channels; ++c) out[c] = 0;
  const Acc one = 1;
  for (int64_t first = 0; first < source.keys; first += kRowKeys) {
    const int64_t number = smaller(kRowKeys, source.keys - first);
    named_gradients<Io>(
        p, source, head, row, list, first, number, nullptr, scratch.weights, scratch.gradients);
    row_values<Io, Acc, 1>(
        scratch.gradients, &one, key_rows<Io>(source.key, head), list, first, number, p.channels,
        out, 0);
    for (int64_t k = 0; k < number; ++k) out[p.channels] += scratch.gradients[k];
  }
}

/// Slots [begin, end) of one key head: every row that names them, in order.
template <class Io>
void named_key_gradient(
    const BackwardWork& work, int side, const KeyHead& head, int64_t begin, int64_t end,
    void* memory) {
  using Acc = typename Multiply<Io>::Acc;
  const auto& p = work.problem;
  const auto& source = p.source[side];
  Arena arena{static_cast<char*>(memory)};
  NamedScratch<Acc> scratch(p, arena);
  auto* key_sum = arena.take<Acc>((end - begin) * p.channels);
  auto* value_sum = arena.take<Acc>((end - begin) * p.value_channels);
  auto* key_store = stored<Acc>(work, source, work.key_store[side], head, 0, p.channels);
  auto* value_store = stored<Acc>(work, source, work.value_store[side], head, 0, p.value_channels);
  const auto start = [&](Acc* sum, const Acc* store, int64_t channels) {
    for (int64_t i = 0; i < (end - begin) * channels; ++i) {
      sum[i] = work.first_chunk ? Acc{0} : store[begin * channels + i];
    }
  };
  start(key_sum, key_store, p.channels);
  start(value_sum, value_store, p.value_channels);
  const auto flush = [&](const NamedRow<Acc>& row, int64_t number) {
    named_gradients<Io>(
        p, source, head, row, {scratch.slots, 1}, 0, number, scratch.columns, scratch.weights,
        scratch.gradients);
    for (int64_t k = 0; k < number; ++k) {
      Acc* key = key_sum + (scratch.slots[k] - begin) * p.channels;
      Acc* value = value_sum + (scratch.slots[k] - begin) * p.value_channels;
      for (int64_t c = 0; c < p.channels; ++c) key[c] += scratch.gradients[k] * row.query[c];
      for (int64_t c = 0; c < p.value_channels; ++c) value[c] += scratch.weights[k] * row.grad[c];
    }
  };
  const auto visit = [&](const Position& at_row) {
    const auto list = named_keys(source, at_row);
    NamedRow<Acc> row{};
    int64_t number = 0;
    bool started = false;
    for (int64_t k = 0; k < source.keys; ++k) {
      const int64_t slot = list[k];
      if (slot < begin || slot >= end) continue;
      if (!started) {
        row = named_row<Io>(
            p, work.inputs, side, work.chunk, work.delta[side], at_row, scratch.query,
            scratch.grad);
        started = true;
      }
      scratch.slots[number] = slot;
      scratch.columns[number] = k;
      if (++number == kRowKeys) {
        flush(row, number);
        number = 0;
      }
    }
    if (number > 0) flush(row, number);
  };
  for (int64_t batch = source.shared ? 0 : head.batch;
       batch < (source.shared ? p.batch : head.batch + 1); ++batch) {
    for (int64_t group = 0; group < p.groups; ++group) {
      for (int64_t i = 0; i < work.chunk.rows; ++i) {
        visit({batch, head.head * p.groups + group, work.chunk.first_row + i});
      }
    }
  }
  const auto finish = [&](const Acc* sum, Acc* store, void* result, int64_t channels, Acc factor) {
    if (!result) return;
    const int64_t first = (unit_of(p, source, head) * source.slots + begin) * channels;
    for (int64_t i = 0; i < (end - begin) * channels; ++i) {
      if (work.last_chunk) {
        static_cast<Io*>(result)[first + i] = Round<Io>::from(sum[i] * factor);
      } else {
        store[begin * channels + i] = sum[i];
      }
    }
  };
  finish(
      key_sum, key_store, work.grad_key[side], p.channels,
      static_cast<Acc>(DotKernel{p.scale}.slope()));
  finish(value_sum, value_store, work.grad_value[side], p.value_channels, Acc{1});
}

/// Items of an indexed source: row blocks of every (batch, head) first, then slot ranges of every
/// unit; SourceWork's row_block and key_split give their sizes.
template <class Io>
void backward_named(const BackwardWork& work, int side, int64_t number, void* memory) {
  const auto& p = work.problem;
  const auto& source = p.source[side];
  const auto& split = work.source[side];
  const int64_t wave_heads = work.heads * p.groups;
  const int64_t query_items = work.query_gradients ? p.batch * wave_heads * split.row_blocks : 0;
  if (number < query_items) {
    const int64_t outer = number / split.row_blocks;
    const int64_t first = number % split.row_blocks * split.row_block;
    for (int64_t i = first; i < smaller(work.chunk.rows, first + split.row_block); ++i) {
      named_query_gradient<Io>(
          work, side,
          {outer / wave_heads, work.first_head * p.groups + outer % wave_heads,
           work.chunk.first_row + i},
          memory);
    }
    return;
  }
  number -= query_items;
  const int64_t begin = number % split.key_splits * split.key_split;
  named_key_gradient<Io>(
      work, side, wave_key_head(work, source, number / split.key_splits), begin,
      smaller(source.slots, begin + split.key_split), memory);
}

/// One place (batch, head, row) of the gradient of a mask over slots that rows name.
template <class Io>
void named_mask_gradient(const MaskGradientWork& work, int64_t number, void* memory) {
  using Acc = typename Multiply<Io>::Acc;
  const auto& p = work.problem;
  const int side = static_cast<int>(work.source);
  const auto& source = p.source[side];
  Arena arena{static_cast<char*>(memory)};
  NamedScratch<Acc> scratch(p, arena);
  const int64_t width = work.key_groups > 1 ? source.slots : 1;
  auto* sum = arena.take<Acc>(width);
  for (int64_t i = 0; i < width; ++i) sum[i] = 0;
  const int64_t row_group = number % work.row_groups, rest = number / work.row_groups;
  const auto all = reach(
      work.first_batch, rest / work.head_groups, work.head_groups, rest % work.head_groups,
      p.key_heads * p.groups, work.row_groups, row_group, p.rows);
  for (int64_t b = all.batch_begin; b < all.batch_end; ++b) {
    for (int64_t head = all.head_begin; head < all.head_end; ++head) {
      for (int64_t query = all.row_begin; query < all.row_end; ++query) {
        const Position at_row{work.batches[b], head, query};
        const auto row = named_row<Io>(
            p, work.inputs, side, {0, p.rows}, work.delta, at_row, scratch.query, scratch.grad);
        const KeyHead key_of{source.shared ? 0 : at_row.batch, head / p.groups};
        const auto list = named_keys(source, at_row);
        for (int64_t first = 0; first < source.keys; first += kRowKeys) {
          const int64_t keys = smaller(kRowKeys, source.keys - first);
          named_gradients<Io>(
              p, source, key_of, row, list, first, keys, nullptr, scratch.weights,
              scratch.gradients);
          for (int64_t k = 0; k < keys; ++k) {
            const int64_t slot = list[first + k];
            if (slot >= 0) sum[width > 1 ? slot : 0] += scratch.gradients[k];
          }
        }
      }
    }
  }
  const int64_t to =
      offset(work.gradient, work.batches[all.batch_begin], all.head_begin, all.row_begin);
  for (int64_t i = 0; i < width; ++i) {
    store_as(source.mask.type, work.gradient.data, to + i * work.gradient.column, sum[i]);
  }
}

}  // namespace
}  // namespace mixhead::cpu
