#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "cpu/schedule.h"
#include "cpu/smoother.h"
#include "empty.h"
#include "engine_call.h"
#include "exact_rows.h"
#include "mixed_attention/arguments.h"

/// mixed_attention on the CPU engine: tensors to plain pointers, then the engine's items over
/// threads.
namespace mixhead::mixed {
namespace {

using cpu::View;
using engine::allocate;
using engine::Places;
using engine::run_items;
using engine::Scratch;
using engine::type_of;
using engine::Views;

/// The plain form of one call's arguments; owns the batch tables that its views point to.
class Plain {
 public:
  explicit Plain(const Arguments& args);
  const cpu::Problem& problem() const { return problem_; }

  View view(const Tensor& tensor, int64_t heads, int64_t rows, int64_t columns) {
    return views_.view(tensor, heads, rows, columns);
  }
  View output_view(const Tensor& tensor) {
    return view(
        tensor, problem_.key_heads * problem_.groups, problem_.rows, problem_.value_channels);
  }
  /// A (batch..., heads, rows) tensor.
  View row_view(const Tensor& tensor) { return output_view(tensor.unsqueeze(-1)); }

 private:
  Views views_;
  cpu::Problem problem_{};
};

Plain::Plain(const Arguments& args) : views_(args.query.sizes().slice(0, args.query.dim() - 3)) {
  auto& p = problem_;
  const int64_t heads = args.query.size(-3), key_heads = args.key.size(-3);
  p.type = type_of(args.query.scalar_type());
  p.batch = views_.batch();
  p.key_heads = key_heads;
  p.groups = heads / key_heads;
  p.rows = args.query.size(-2);
  p.channels = args.query.size(-1);
  p.value_channels = args.value.size(-1);
  p.scale = args.scale_or_default();
  p.query = view(args.query, heads, p.rows, p.channels);
  p.joint = args.joint();

  const int64_t keys = args.key.size(-2), slots = args.memory_key.size(-2);
  auto& sequence = p.source[0];
  sequence.key = view(args.key, key_heads, keys, p.channels);
  sequence.value = view(args.value, key_heads, keys, p.value_channels);
  sequence.keys = sequence.slots = keys;
  sequence.causal = args.is_causal;
  sequence.mask = views_.mask(args.attn_mask, heads, p.rows, keys);

  auto& memory = p.source[1];
  memory.key = view(args.memory_key, key_heads, slots, p.channels);
  memory.value = view(args.memory_value, key_heads, slots, p.value_channels);
  memory.keys = memory.slots = slots;
  memory.shared = args.memory_key.dim() == 3;
  memory.side = 1;
  memory.mask = views_.mask(args.memory_mask, heads, p.rows, slots);
  if (args.memory_index && slots > 0) {
    memory.indexed = true;
    memory.keys = args.memory_index->size(-1);
    memory.index = view(*args.memory_index, heads, p.rows, memory.keys);
  }

  p.mix_type = type_of(args.mix.scalar_type());
  p.mix_per_channel = args.mix.dim() > 0 && args.mix.size(-1) != 1;
  p.mix = view(args.mix, heads, p.rows, p.mix_per_channel ? p.value_channels : 1);
  if (args.dropout_p > 0.0) {
    p.dropout.on = true;
    p.dropout.seed = args.seed->item<int64_t>();
    p.dropout.threshold = static_cast<uint64_t>(args.dropout_p * 4294967296.0);
    p.dropout.keep_scale = args.dropout_p < 1.0 ? 1.0 / (1.0 - args.dropout_p) : 0.0;
  }
}

Forward forward_cpu(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& memory_key,
    const Tensor& memory_value, const Tensor& mix, std::string_view rule,
    const OptionalTensor& attn_mask, const OptionalTensor& memory_mask,
    const OptionalTensor& memory_index, double dropout_p, const OptionalTensor& seed,
    bool is_causal, std::optional<double> scale, bool enable_gqa, bool for_backward) {
  const Arguments args{query,     key,  value,     memory_key,  memory_value,
                       mix,       rule, attn_mask, memory_mask, memory_index,
                       dropout_p, seed, is_causal, scale,       enable_gqa};
  check(args);
  const Plain plain(args);
  const auto& p = plain.problem();
  const auto& kernels = cpu::kernels(p.type);

  at::DimVector rows(query.sizes().begin(), query.sizes().end() - 1), wide = rows;
  wide.push_back(p.value_channels);
  const auto acc = query.options().dtype(p.type == cpu::Type::float64 ? at::kDouble : at::kFloat);
  const Tensor output = empty(wide, query.options());
  const Tensor lse[2] = {at::empty(rows, acc), at::empty(rows, acc)};
  const auto keep = kept_outputs(args, for_backward);
  const at::DimVector none{0};
  const Tensor kept[2] = {empty(keep[0] ? wide : none, acc), empty(keep[1] ? wide : none, acc)};
  const Forward result{output, lse[0], lse[1], kept[0], kept[1]};
  if (p.batch == 0 || p.rows == 0) return result;

  const int64_t threads = at::get_num_threads(), heads = p.key_heads * p.groups;
  const auto schedule = cpu::schedule_forward(p, kernels, threads);
  cpu::ForwardWork work{};
  work.problem = p;
  work.output = output.data_ptr();
  for (int s = 0; s < 2; ++s) {
    work.lse[s] = lse[s].data_ptr();
    work.kept_output[s] = kept[s].numel() > 0 ? kept[s].data_ptr() : nullptr;
  }
  Scratch parts[2];
  for (int64_t first = 0; first < p.rows; first += schedule.chunk_rows) {
    work.chunk = {first, std::min(schedule.chunk_rows, p.rows - first)};
    const auto items = cpu::split_forward(schedule, kernels, threads, work);
    const int64_t all = p.batch * heads * work.chunk.rows;
    for (int s = 0; s < 2; ++s) {
      const int64_t numbers = work.source[s].key_splits * all;
      work.part[s] =
          parts[s].at_least(numbers * (p.value_channels + 1) * kernels.accumulator_bytes);
      work.part_lse[s] =
          static_cast<char*>(work.part[s]) + numbers * p.value_channels * kernels.accumulator_bytes;
    }
    // Later queries of a causal sequence read more keys: they go first.
    run_items(
        items, schedule.parallel, kernels.forward_scratch(work),
        [&](int64_t i, void* scratch) { kernels.forward_item(work, items - 1 - i, scratch); });
    constexpr int64_t kRows = 256;
    const bool parallel = schedule.parallel && all * p.value_channels > (1 << 16);
    run_items((all + kRows - 1) / kRows, parallel, 0, [&](int64_t i, void*) {
      kernels.combine(work, i * kRows, std::min(all, (i + 1) * kRows));
    });
  }
  // An excluded NaN has reached the output: the exact way, which is slow.
  if (excludes(args) && !exact_rows::seems_finite(output) &&
      !exact_rows::all_finite(operands(args))) {
    return forward_portable(args, for_backward);
  }
  return result;
}

/// One backward call: the engine's passes over waves of heads and chunks of rows.
class BackwardPass {
 public:
  BackwardPass(
      const Arguments& args, const std::array<Tensor, 3>& grads, const Forward& forward,
      const OutputMask& wanted)
      : args_(args), plain_(args), kernels_(cpu::kernels(plain_.problem().type)), wanted_(wanted) {
    const auto& p = plain_.problem();
    inputs_.grad_output = plain_.output_view(grads[0]);
    const Tensor lse[2] = {std::get<1>(forward), std::get<2>(forward)};
    const Tensor kept[2] = {std::get<3>(forward), std::get<4>(forward)};
    const bool rounds = kept[0].scalar_type() != args.query.scalar_type();
    if (p.joint) {
      inputs_.kept_output[0] = plain_.output_view(rounds ? kept[0] : std::get<0>(forward));
    }
    for (int s = 0; s < 2; ++s) {
      inputs_.grad_lse[s] = plain_.row_view(grads[s + 1]);
      inputs_.lse[s] = plain_.row_view(lse[s]);
      if (!p.joint) inputs_.kept_output[s] = plain_.output_view(kept[s]);
    }
    const auto tensors = differentiable(args);
    const bool nothing = p.batch == 0 || p.rows == 0;
    for (size_t i = 0; i < kDifferentiable; ++i) {
      if (!wanted[i]) {
        gradients_[i] = at::empty({0}, args.query.options());
      } else {
        gradients_[i] = nothing ? at::zeros(tensors[i].sizes(), tensors[i].options())
                                : empty(tensors[i].sizes(), tensors[i].options());
      }
    }
    if (!nothing) run();
  }

  Gradients gradients() const {
    const auto& g = gradients_;
    return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]};
  }

 private:
  void* gradient(size_t i) { return wanted_[i] ? gradients_[i].data_ptr() : nullptr; }

  void run() {
    const auto& p = plain_.problem();
    schedule_ = cpu::schedule_backward(p, kernels_, threads_);
    const bool keys = wanted_[1] || wanted_[2] || wanted_[3] || wanted_[4];
    const bool mix_of_rows = wanted_[5] && p.joint;
    const bool queries = wanted_[0] || mix_of_rows;
    if (mix_of_rows) {
      row_mix_ = allocate(p.batch * p.key_heads * p.groups * p.rows * kernels_.accumulator_bytes);
    }
    if (schedule_.together) {
      if (keys || queries) pass(keys, queries, schedule_.wave_heads, schedule_.chunk_rows);
    } else {
      if (keys) pass(true, false, p.key_heads, p.rows);
      if (queries) pass(false, true, schedule_.wave_heads, schedule_.chunk_rows);
    }
    if (wanted_[5]) mix_gradient();
    for (int s = 0; s < 2; ++s) {
      if (wanted_[6 + s] && gradients_[6 + s].numel() > 0) mask_gradient(s);
    }
  }

  cpu::BackwardWork new_work(bool keys, bool queries) {
    cpu::BackwardWork work{};
    work.problem = plain_.problem();
    work.inputs = inputs_;
    work.key_gradients = keys;
    work.query_gradients = queries;
    work.grad_query = queries ? gradient(0) : nullptr;
    for (size_t s = 0; s < 2; ++s) {
      work.grad_key[s] = gradient(1 + 2 * s);
      work.grad_value[s] = gradient(2 + 2 * s);
    }
    work.row_mix = queries ? row_mix_.get() : nullptr;
    return work;
  }

  void pass(bool keys, bool queries, int64_t wave_heads, int64_t chunk_rows) {
    const auto& p = plain_.problem();
    auto work = new_work(keys, queries);
    for (int64_t head = 0; head < p.key_heads; head += wave_heads) {
      work.first_head = head;
      work.heads = std::min(wave_heads, p.key_heads - head);
      const auto stores = keys && chunk_rows < p.rows ? make_stores(work) : Stores{};
      for (int64_t first = 0; first < p.rows; first += chunk_rows) {
        work.chunk = {first, std::min(chunk_rows, p.rows - first)};
        work.first_chunk = first == 0;
        work.last_chunk = first + chunk_rows >= p.rows;
        chunk(work);
      }
    }
  }

  using Stores = std::array<at::DataPtr, 4>;
  Stores make_stores(cpu::BackwardWork& work) {
    const auto& p = work.problem;
    Stores stores;
    work.store_is_output = p.type == cpu::Type::float32 || p.type == cpu::Type::float64;
    for (size_t s = 0; s < 2; ++s) {
      work.key_store[s] = work.grad_key[s];
      work.value_store[s] = work.grad_value[s];
      if (work.store_is_output) continue;
      const int64_t keys = work.heads * (p.source[s].shared ? 1 : p.batch) * p.source[s].slots;
      if (work.grad_key[s]) {
        stores[2 * s] = allocate(keys * p.channels * kernels_.accumulator_bytes);
        work.key_store[s] = stores[2 * s].get();
      }
      if (work.grad_value[s]) {
        stores[2 * s + 1] = allocate(keys * p.value_channels * kernels_.accumulator_bytes);
        work.value_store[s] = stores[2 * s + 1].get();
      }
    }
    return stores;
  }

  void chunk(cpu::BackwardWork& work) {
    const auto& p = work.problem;
    const auto items = cpu::split_backward(schedule_, kernels_, threads_, work);
    find_delta(work);
    for (int s = 0; s < 2 && work.query_gradients; ++s) {
      work.part[s] = parts_[s].at_least(cpu::part_bytes(kernels_, work, s));
    }
    // The memory's items are the larger ones: they go first.
    run_items(
        items, schedule_.parallel, kernels_.backward_scratch(work),
        [&](int64_t i, void* scratch) { kernels_.backward_item(work, items - 1 - i, scratch); });
    if (!work.query_gradients) return;
    run_rows(
        p.batch * work.heads * p.groups * work.chunk.rows, p.channels * kernels_.accumulator_bytes,
        [&](int64_t first, int64_t last, void* scratch) {
          kernels_.backward_reduce(work, first, last, scratch);
        });
  }

  /// delta of the wave's chunk, both sides; work.delta points to it until the next call.
  void find_delta(cpu::BackwardWork& work) {
    const auto& p = work.problem;
    const int64_t all = p.batch * p.key_heads * p.groups * work.chunk.rows;
    auto* delta = static_cast<char*>(delta_.at_least(2 * all * kernels_.accumulator_bytes));
    work.delta[0] = delta;
    work.delta[1] = delta + all * kernels_.accumulator_bytes;
    run_rows(
        p.batch * work.heads * p.groups * work.chunk.rows, 0,
        [&](int64_t first, int64_t last, void*) { kernels_.backward_prepare(work, first, last); });
  }

  template <class F>
  void run_rows(int64_t rows, int64_t scratch_bytes, const F& f) {
    constexpr int64_t kRows = 128;
    run_items(
        (rows + kRows - 1) / kRows, schedule_.parallel && rows > 4 * kRows, scratch_bytes,
        [&](int64_t i, void* scratch) { f(i * kRows, std::min(rows, (i + 1) * kRows), scratch); });
  }

  void mix_gradient() {
    const auto& p = plain_.problem();
    const int64_t width = p.mix_per_channel ? p.value_channels : 1;
    const int64_t heads = p.key_heads * p.groups;
    cpu::MixGradientWork work{};
    work.problem = p;
    work.inputs = inputs_;
    work.gradient = plain_.view(gradients_[5], heads, p.rows, width);
    const Places places(work.gradient, p.batch);
    work.batches = places.batches.data();
    work.first_batch = places.first.data();
    work.batch_groups = places.count();
    work.head_groups = work.gradient.head ? heads : 1;
    work.row_groups = work.gradient.row ? p.rows : 1;
    work.row_mix = row_mix_.get();
    const int64_t items = work.batch_groups * work.head_groups * work.row_groups;
    run_rows(
        items, width * static_cast<int64_t>(sizeof(double)),
        [&](int64_t first, int64_t last, void* scratch) {
          for (int64_t i = first; i < last; ++i) kernels_.mix_gradient_item(work, i, scratch);
        });
  }

  void mask_gradient(int side) {
    const auto& p = plain_.problem();
    const auto& source = p.source[side];
    const int64_t heads = p.key_heads * p.groups;
    auto all_rows = new_work(false, false);
    all_rows.heads = p.key_heads;
    all_rows.chunk = {0, p.rows};
    find_delta(all_rows);
    cpu::MaskGradientWork work{};
    work.problem = p;
    work.inputs = inputs_;
    work.tiles = schedule_.tiles;
    work.source = side;
    work.delta = all_rows.delta[side];
    work.gradient = plain_.view(gradients_[6 + side], heads, p.rows, source.slots);
    const Places places(work.gradient, p.batch);
    work.batches = places.batches.data();
    work.first_batch = places.first.data();
    work.batch_groups = places.count();
    work.head_groups = work.gradient.head ? heads : 1;
    work.row_groups = work.gradient.row ? p.rows : 1;
    work.key_groups = work.gradient.column ? source.slots : 1;
    run_items(
        kernels_.mask_gradient_items(work), schedule_.parallel,
        kernels_.mask_gradient_scratch(work),
        [&](int64_t i, void* scratch) { kernels_.mask_gradient_item(work, i, scratch); });
  }

  const Arguments& args_;
  Plain plain_;
  const cpu::Kernels& kernels_;
  OutputMask wanted_;
  int64_t threads_ = at::get_num_threads();
  cpu::BackwardInputs inputs_{};
  cpu::BackwardSchedule schedule_{};
  std::array<Tensor, kDifferentiable> gradients_;
  at::DataPtr row_mix_;
  Scratch parts_[2], delta_;
};

Gradients backward_cpu(
    const Tensor& grad_output, const Tensor& grad_self_lse, const Tensor& grad_memory_lse,
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& memory_key,
    const Tensor& memory_value, const Tensor& mix, std::string_view rule,
    const OptionalTensor& attn_mask, const OptionalTensor& memory_mask,
    const OptionalTensor& memory_index, double dropout_p, const OptionalTensor& seed,
    bool is_causal, std::optional<double> scale, bool enable_gqa, const Tensor& output,
    const Tensor& self_lse, const Tensor& memory_lse, const Tensor& self_output,
    const Tensor& memory_output, std::array<bool, 8> output_mask) {
  const Arguments args{query,     key,  value,     memory_key,  memory_value,
                       mix,       rule, attn_mask, memory_mask, memory_index,
                       dropout_p, seed, is_causal, scale,       enable_gqa};
  const std::array<Tensor, 3> grads{grad_output, grad_self_lse, grad_memory_lse};
  const auto found =
      BackwardPass(
          args, grads, {output, self_lse, memory_lse, self_output, memory_output}, output_mask)
          .gradients();
  const bool finite = std::apply(
      [](const auto&... each) { return (exact_rows::seems_finite(each) && ...); }, found);
  if (excludes(args) && !finite &&
      !(exact_rows::all_finite(operands(args)) && exact_rows::all_finite(grads))) {
    return backward_portable(grads, args, output_mask);
  }
  return found;
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, CPU, m) {
  m.impl("_mixed_attention_forward", forward_cpu);
  m.impl("_mixed_attention_backward", backward_cpu);
}

}  // namespace mixhead::mixed
