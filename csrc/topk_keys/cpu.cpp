#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <torch/library.h>

#include <algorithm>

#include "engine_call.h"
#include "topk_keys/arguments.h"
#include "wide_dtype.h"

/// topk_keys on the CPU engine: tensors to plain pointers, then the engine's items over threads.
namespace mixhead::topk {
namespace {

constexpr int64_t kBlock = 128;                          // keys at a time
constexpr int64_t kPanels = 8;                           // of rows that share a block of keys
constexpr int64_t kHeapEntries = int64_t{1} << 19;       // of the rows of one item
constexpr int64_t kSplitEntries = int64_t{1} << 21;      // of all splits, 12 bytes each
constexpr int64_t kParallelProducts = int64_t{1} << 18;  // fewer are not worth a second thread

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// 1 / |x| of each row, 0 for a zero row.
Tensor inverse_norm(const Tensor& x, at::ScalarType dtype) {
  const auto norm = at::linalg_vector_norm(x.detach(), 2, {-1}, /*keepdim=*/true, dtype);
  return norm.reciprocal().masked_fill(norm == 0, 0.0);
}

/// Items are a key head's rows in blocks, and where these are too few for the threads its keys in
/// splits. Sizes alone decide, and the number of threads.
void split_work(cpu::TopkWork& work, const cpu::TopkKernels& functions) {
  const auto& p = work.problem;
  const auto& source = p.source[0];
  auto& split = work.split;
  split.units = p.key_heads * (source.shared ? 1 : p.batch);
  split.unit_rows = p.rows * p.groups * (source.shared ? p.batch : 1);
  split.row_block = std::clamp<int64_t>(
      kHeapEntries / work.k, 1, std::min(kPanels * functions.panel_lanes, split.unit_rows));
  split.row_blocks = divide_up(split.unit_rows, split.row_block);
  const int64_t items = split.units * split.row_blocks;
  const int64_t rows = p.batch * p.key_heads * p.groups * p.rows;
  const int64_t wanted = divide_up(int64_t{2} * at::get_num_threads(), items);
  const int64_t splits = std::clamp<int64_t>(
      std::min(kSplitEntries / (rows * work.k), source.keys / (8 * kBlock)), 1, wanted);
  split.key_split = std::max<int64_t>(divide_up(source.keys, splits * kBlock) * kBlock, 1);
  split.key_splits = std::max<int64_t>(divide_up(source.keys, split.key_split), 1);
}

Forward forward_cpu(
    const Tensor& query, const Tensor& key, int64_t k, const OptionalTensor& mask,
    std::string_view metric) {
  check({query, key, k, mask, metric});
  at::DimVector sizes(query.sizes().begin(), query.sizes().end() - 1);
  sizes.push_back(k);
  const auto dtype = wide_dtype(query);
  const auto scores = at::empty(sizes, query.options().dtype(dtype));
  const auto indices = at::empty(sizes, query.options().dtype(at::kLong));
  if (scores.numel() == 0) return {scores, indices};

  engine::Views views(query.sizes().slice(0, query.dim() - 3));
  const int64_t heads = query.size(-3), key_heads = key.size(-3), keys = key.size(-2);
  cpu::TopkWork work{};
  auto& p = work.problem;
  p.type = engine::type_of(query.scalar_type());
  p.batch = views.batch();
  p.key_heads = key_heads;
  p.groups = heads / key_heads;
  p.rows = query.size(-2);
  p.channels = query.size(-1);
  p.query = views.view(query, heads, p.rows, p.channels);
  auto& source = p.source[0];
  source.key = views.view(key, key_heads, keys, p.channels);
  source.keys = source.slots = keys;
  source.shared = key.dim() == 3;
  source.mask = views.mask(mask, heads, p.rows, keys);
  work.metric = *metric_named(metric);
  work.k = k;
  work.block = kBlock;
  Tensor query_norm, key_norm;
  if (work.metric == Metric::cosine) {
    query_norm = inverse_norm(query, dtype);
    key_norm = inverse_norm(key, dtype);
    work.inverse_query_norm = views.view(query_norm, heads, p.rows, 1);
    work.inverse_key_norm = views.view(key_norm, key_heads, keys, 1);
  }

  const auto& functions = cpu::topk_kernels(p.type);
  split_work(work, functions);
  const int64_t splits = work.split.key_splits, rows = scores.numel() / k;
  const auto split_scores = splits == 1 ? scores : at::empty({splits, rows, k}, scores.options());
  const auto split_indices =
      splits == 1 ? indices : at::empty({splits, rows, k}, indices.options());
  work.scores = split_scores.mutable_data_ptr();
  work.indices = split_indices.mutable_data_ptr<int64_t>();
  const bool parallel = rows * keys >= kParallelProducts / p.channels;
  engine::run_items(
      work.split.units * work.split.row_blocks * splits, parallel, functions.scratch(work),
      [&](int64_t item, void* scratch) { functions.item(work, item, scratch); });
  if (splits > 1) {
    at::parallel_for(
        0, rows, 16, [&](int64_t first, int64_t last) { functions.merge(work, first, last); });
    scores.view({rows, k}).copy_(split_scores[0]);
    indices.view({rows, k}).copy_(split_indices[0]);
  }
  return {scores, indices};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, CPU, m) { m.impl("_topk_keys_forward", forward_cpu); }

}  // namespace mixhead::topk
