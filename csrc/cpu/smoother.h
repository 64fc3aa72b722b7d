#pragma once

#include <cstdint>

/// The CPU engine's interface: plain arguments and the table of kernels for each instruction set.
///
/// A smoother streams blocks of keys past a block of query rows and keeps three running values a
/// row: maximum score, sum of weights, weighted sum of values (Milakov & Gimelshein, "Online
/// normalizer calculation for softmax", 2018; Rabe & Staats, "Self-attention does not need O(n^2)
/// memory", 2021). The backward recomputes the weights from the saved log-sum-exp (Dao et al.,
/// "FlashAttention", 2022).
///
/// The structs hold no functions: they are read by files compiled for different instruction sets.
namespace mixhead::cpu {

enum class Type : uint8_t { float32, float64, bfloat16, float16 };

/// A tensor (batch, head, row, column): strides in elements, 0 where it is broadcast. The flattened
/// batch may have any strides, so each entry's offset is listed.
struct View {
  void* data;
  const int64_t* batch;
  int64_t head, row, column;
};

enum class MaskKind : uint8_t { none, boolean, additive };

struct Mask {
  MaskKind kind;
  Type type;  // of an additive mask
  View view;  // (batch, query head, query, key)
};

/// One set of keys that the queries read.
struct Source {
  View key, value;  // (batch, key head, key, channel)
  int64_t keys;     // S, M, or with an index the number of slots that a query names
  bool shared;   // every batch entry reads the same keys, whose rows therefore fold into one unit
  bool causal;   // query i reads keys up to keys - rows + i
  int64_t side;  // dropout's stream: 0 sequence, 1 memory
  Mask mask;
  bool
      indexed;  // query (batch, head, i) reads only the slots index[batch, head, i, :], -1 for none
  View index;   // int64
  int64_t slots;  // M
};

struct Dropout {
  bool on;
  int64_t seed;
  uint64_t threshold;  // a weight is dropped where its 32 random bits are below
  double keep_scale;   // 1 / (1 - p), 0 for p = 1
};

struct Problem {
  Type type;
  int64_t batch, key_heads, groups, rows, channels, value_channels;
  double scale;
  View query;
  Source source[2];  // sequence, memory
  bool joint;
  Type mix_type;
  View mix;
  bool mix_per_channel;
  Dropout dropout;
};

/// Key blocks and row panels that fit the caches.
struct Tiles {
  int64_t panels;  // panels of rows that share a key block in the forward
  int64_t keys;    // keys in a block, for the widest panel
  int64_t group;   // keys whose gradients one pass over the rows accumulates, in the backward
};

/// How one source's work is cut into items: unit (a key head, of one batch entry unless shared;
/// where rows name their keys, a query head of one batch entry), then row blocks, then key splits.
/// Items of both sources are numbered through.
struct SourceWork {
  int64_t units, unit_rows;
  int64_t row_block, row_blocks;
  int64_t key_split, key_splits;
  int64_t first_item;
  bool few_rows;  // channels, not rows, along the lanes
};

/// Query rows [first_row, first_row + rows) of every head and batch entry: what one round does.
struct Chunk {
  int64_t first_row, rows;
};

/// float32 (float64 for float64) results of each split, merged by combine. Rows are numbered
/// (batch * heads + head) * chunk.rows + row.
struct ForwardWork {
  Problem problem;
  Tiles tiles;
  Chunk chunk;
  SourceWork source[2];
  void* part[2];      // (splits, chunk rows, value_channels), normalised
  void* part_lse[2];  // (splits, chunk rows)
  // Contiguous (batch, heads, rows, value_channels) and (batch, heads, rows).
  void* output;
  // In the accumulation dtype, for the backward: the gate's outputs over each side; for the joint
  // rule the output before rounding first. Null where not wanted.
  void* kept_output[2];
  void* lse[2];
};

/// What the backward reads besides the problem, and where its results go.
struct BackwardInputs {
  View grad_output;     // (batch, head, row, channel)
  View grad_lse[2];     // (batch, head, row)
  View kept_output[2];  // as ForwardWork's; where that is null, the joint output
  View lse[2];
};

/// A key head's query rows fold: unit row r of the sequence is (query, group), of a shared memory
/// (batch, query, group), the last fastest. dQ and the row sums of dS stay in the panels' layout
/// [channels + 1][lanes] until they are reduced over splits and sources.
struct BackwardWork {
  Problem problem;
  BackwardInputs inputs;
  Tiles tiles;
  Chunk chunk;
  int64_t first_head, heads;  // key heads of this wave
  bool key_gradients, query_gradients;
  bool first_chunk, last_chunk;
  bool store_is_output;  // the stores are the results, whole; else they hold the wave's heads
  SourceWork source[2];
  void* delta[2];  // (chunk rows)
  void* part[2];   // (units, splits, panels, channels + 1, lanes)
  // Accumulators of the keys' gradients between chunks, null where one chunk covers all rows.
  void* key_store[2];
  void* value_store[2];
  void* grad_query;   // contiguous (batch, heads, rows, channels)
  void* grad_key[2];  // contiguous, null where not wanted
  void* grad_value[2];
  void* row_mix;  // (batch, heads, rows): joint, the gradient of each row's mix, or null
};

/// The gradient of a broadcast float mask: each item owns a part of it and visits all that it
/// reaches.
struct MaskGradientWork {
  Problem problem;
  BackwardInputs inputs;
  Tiles tiles;
  int64_t source;
  View gradient;               // strides 0 where broadcast; the batch table likewise
  const int64_t* batches;      // batch entries ordered by their place in the gradient
  const int64_t* first_batch;  // (groups + 1): where each place's entries begin
  // 1 where the gradient is broadcast along it, else its size.
  int64_t batch_groups, head_groups, row_groups, key_groups;
  void* delta;  // (batch, heads, rows)
};

struct MixGradientWork {
  Problem problem;
  BackwardInputs inputs;
  View gradient;
  const int64_t* batches;
  const int64_t* first_batch;
  int64_t batch_groups, head_groups, row_groups;
  const void* row_mix;
};

/// The kernels of one instruction set for one element type. The work is cut into numbered items,
/// each of which any thread may do; scratch is what one thread needs.
struct Kernels {
  const char* isa;
  int64_t accumulator_bytes, lanes, panel_lanes, few_rows;
  int64_t (*forward_scratch)(const ForwardWork&);
  void (*forward_item)(const ForwardWork&, int64_t item, void* scratch);
  void (*combine)(const ForwardWork&, int64_t first_row, int64_t last_row);

  int64_t (*backward_scratch)(const BackwardWork&);
  void (*backward_prepare)(const BackwardWork&, int64_t first_row, int64_t last_row);
  void (*backward_item)(const BackwardWork&, int64_t item, void* scratch);
  void (*backward_reduce)(const BackwardWork&, int64_t first_row, int64_t last_row, void* scratch);
  int64_t (*mask_gradient_items)(const MaskGradientWork&);
  int64_t (*mask_gradient_scratch)(const MaskGradientWork&);
  void (*mask_gradient_item)(const MaskGradientWork&, int64_t item, void* scratch);
  void (*mix_gradient_item)(const MixGradientWork&, int64_t item, void* scratch);
};

/// The best set that this processor has, or the one that the environment variable MIXHEAD_ISA
/// names: default, avx2, avx512, avx512_bf16. Throws std::runtime_error where it names none that
/// runs here.
const Kernels& kernels(Type type);
/// The named set, or null where the processor or the build lacks it.
const Kernels* kernels_of(const char* isa, Type type);

namespace detail {
const Kernels& kernels_default(Type type);
const Kernels& kernels_avx2(Type type);
const Kernels& kernels_avx512(Type type);
const Kernels& kernels_avx512_bf16(Type type);
}  // namespace detail

}  // namespace mixhead::cpu
