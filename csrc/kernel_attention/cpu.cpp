#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <tuple>
#include <vector>

#include "cpu/regression.h"
#include "cpu/regression_schedule.h"
#include "engine_call.h"
#include "exact_rows.h"
#include "kernel_attention/arguments.h"
#include "kernel_attention/plain.h"

/// kernel_attention on the CPU engine: tensors to plain pointers, then the engine's items over
/// threads.
namespace mixhead::kernels {
namespace {

using engine::allocate;
using engine::Places;
using engine::run_items;

/// What the last forward did with its blocks of keys; for the benchmark to read.
struct {
  std::atomic<int64_t> read, skipped;
} last_blocks;

/// The key that each empty row takes, and its value where `output` is given.
std::vector<int64_t> find_nearest(
    const Plain& plain, const Tensor& log_mass, void* output, bool parallel) {
  const auto& p = plain.problem();
  std::vector<int64_t> nearest(plain.rows());
  const cpu::NearestWork work{
      plain.regression(), log_mass.const_data_ptr(), nearest.data(), output};
  const int64_t units = cpu::key_units(p), lanes = plain.functions().panel_lanes;
  const int64_t unit_rows = p.rows * (p.source[0].shared ? p.batch : 1);
  run_items(
      units * p.groups * ((unit_rows + lanes - 1) / lanes), parallel,
      plain.functions().nearest_scratch(work),
      [&](int64_t i, void* scratch) { plain.functions().nearest_item(work, i, scratch); });
  return nearest;
}

Forward forward_cpu(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& attn_mask, bool is_causal, bool exclude_self,
    bool normalize, std::string_view empty, double dropout_p, const OptionalTensor& seed,
    bool enable_gqa) {
  const Arguments args{query,        key,       value, bandwidth, kernel, attn_mask, is_causal,
                       exclude_self, normalize, empty, dropout_p, seed,   enable_gqa};
  check(args);
  Plain plain(args);
  const auto& p = plain.problem();
  const auto& functions = plain.functions();
  at::DimVector rows(query.sizes().begin(), query.sizes().end() - 1), wide = rows;
  wide.push_back(p.value_channels);
  const auto output = at::empty(wide, query.options());
  const auto log_mass = at::empty(rows, query.options().dtype(plain.accumulator()));
  if (plain.rows() == 0) return {output, log_mass};

  cpu::RegressionForward work{};
  work.regression = plain.regression();
  work.output = output.data_ptr();
  work.log_mass = log_mass.data_ptr();
  const auto items = cpu::split_regression(functions, at::get_num_threads(), work);
  plain.summarise(items.parallel);
  at::DataPtr parts;
  if (work.key_splits > 1) {
    const int64_t numbers = work.key_splits * plain.rows();
    parts = allocate(numbers * (p.value_channels + 1) * functions.accumulator_bytes);
    work.part = parts.get();
    work.part_mass =
        static_cast<char*>(work.part) + numbers * p.value_channels * functions.accumulator_bytes;
  }
  int64_t read = 0, skipped = 0;
  work.blocks_read = &read;
  work.blocks_skipped = &skipped;
  // Later queries of a causal call read more keys: they go first.
  run_items(
      items.count, items.parallel, functions.forward_scratch(work), [&](int64_t i, void* scratch) {
        functions.forward_item(work, items.count - 1 - i, scratch);
      });
  last_blocks.read = read;
  last_blocks.skipped = skipped;
  if (work.key_splits > 1) {
    constexpr int64_t kRows = 256;
    run_items((plain.rows() + kRows - 1) / kRows, items.parallel, 0, [&](int64_t i, void*) {
      functions.merge(work, i * kRows, std::min(plain.rows(), (i + 1) * kRows));
    });
  }
  if (normalize && empty == "nearest" && p.source[0].keys > 0) {
    find_nearest(plain, log_mass, output.data_ptr(), items.parallel);
  }
  // An excluded NaN has reached the output: the exact way, which is slow.
  if (excludes(args) && !exact_rows::seems_finite(output) &&
      !exact_rows::all_finite({query, key, value})) {
    return forward_portable(args);
  }
  return {output, log_mass};
}

/// One backward call: the engine's passes over waves of key units and chunks of rows.
class BackwardPass {
 public:
  BackwardPass(
      const Arguments& args, const std::array<Tensor, 2>& grads, const Forward& forward,
      const OutputMask& wanted)
      : args_(args), plain_(args), functions_(plain_.functions()), wanted_(wanted) {
    const auto& p = plain_.problem();
    const auto& [output, log_mass] = forward;
    read_.regression = plain_.regression();
    read_.grad_output = plain_.view(grads[0], p.value_channels);
    read_.output = plain_.view(output, p.value_channels);
    // A batch of one may have been expanded; the engine reads rows of numbers.
    read_.grad_log_mass = plain_.view(grads[1].unsqueeze(-1), 1);
    read_.log_mass = plain_.view(log_mass.unsqueeze(-1), 1);
    const bool nothing = plain_.rows() == 0;
    const auto tensors = differentiable(args);
    for (size_t i = 0; i < kDifferentiable; ++i) {
      if (!wanted[i]) {
        gradients_[i] = at::empty({0}, args.query.options());
      } else if (nothing) {
        gradients_[i] = at::zeros(tensors[i].sizes(), tensors[i].options());
      } else {
        gradients_[i] = at::empty(tensors[i].sizes(), tensors[i].options());
      }
    }
    if (!nothing) run(log_mass);
  }

  Gradients gradients() const {
    const auto& g = gradients_;
    return {g[0], g[1], g[2], g[3], g[4]};
  }

 private:
  void* gradient(size_t i) { return wanted_[i] ? gradients_[i].data_ptr() : nullptr; }

  void run(const Tensor& log_mass) {
    const auto& p = plain_.problem();
    schedule_ = cpu::schedule_regression(p, functions_, threads_);
    plain_.summarise(schedule_.parallel);
    if (args_.normalize && args_.empty == "nearest" && wanted_[2] && p.source[0].keys > 0) {
      nearest_ = find_nearest(plain_, log_mass.contiguous(), nullptr, schedule_.parallel);
      read_.nearest = nearest_.data();
    }
    bandwidth_.assign(p.key_heads * p.groups * p.channels, 0.0);
    const bool keys = wanted_[1] || wanted_[2] || wanted_[3], queries = wanted_[0];
    if (schedule_.together) {
      if (keys || queries) pass(keys, queries, schedule_.wave_units, schedule_.chunk_rows);
    } else {
      if (keys) pass(true, false, schedule_.wave_units, p.rows);
      if (queries) pass(false, true, schedule_.wave_units, schedule_.chunk_rows);
    }
    if (wanted_[3]) write_bandwidth(bandwidth_, p.key_heads * p.groups, gradients_[3]);
    if (wanted_[4] && gradients_[4].numel() > 0) mask_gradient();
  }

  void pass(bool keys, bool queries, int64_t wave_units, int64_t chunk_rows) {
    const auto& p = plain_.problem();
    auto work = read_;
    work.grad_query = queries ? gradient(0) : nullptr;
    work.grad_key = keys ? gradient(1) : nullptr;
    work.grad_value = keys ? gradient(2) : nullptr;
    const int64_t units = cpu::key_units(p);
    for (int64_t first = 0; first < units; first += wave_units) {
      work.first_unit = first;
      work.units = std::min(wave_units, units - first);
      const auto stores = chunk_rows < p.rows ? make_stores(work) : Stores{};
      for (int64_t row = 0; row < p.rows; row += chunk_rows) {
        work.chunk = {row, std::min(chunk_rows, p.rows - row)};
        work.first_chunk = row == 0;
        work.last_chunk = row + chunk_rows >= p.rows;
        chunk(work, keys && wanted_[3]);
      }
    }
  }

  using Stores = std::array<at::DataPtr, 2>;
  Stores make_stores(cpu::RegressionBackward& work) {
    const auto& p = plain_.problem();
    work.store_is_output = p.type == cpu::Type::float32 || p.type == cpu::Type::float64;
    work.key_store = work.grad_key;
    work.value_store = work.grad_value;
    Stores stores;
    if (work.store_is_output) return stores;
    const int64_t keys = work.units * p.source[0].keys * functions_.accumulator_bytes;
    if (work.grad_key) stores[0] = allocate(keys * p.channels);
    if (work.grad_value) stores[1] = allocate(keys * p.value_channels);
    work.key_store = stores[0].get();
    work.value_store = stores[1].get();
    return stores;
  }

  void chunk(cpu::RegressionBackward& work, bool bandwidth) {
    const auto& p = plain_.problem();
    const auto items = cpu::split_regression_backward(schedule_, threads_, work);
    at::DataPtr part;
    if (work.grad_query) {
      part = allocate(cpu::regression_part_bytes(functions_, work));
      work.part = part.get();
    }
    std::vector<double> squares;
    if (bandwidth) {
      squares.assign(items * p.groups * p.channels, 0.0);
      work.grad_bandwidth = squares.data();
    }
    // Earlier keys of a causal call are read by more queries: they go first.
    run_items(
        items, schedule_.parallel, functions_.backward_scratch(work),
        [&](int64_t i, void* scratch) { functions_.backward_item(work, i, scratch); });
    if (bandwidth) add_bandwidth(work, squares);
    if (!work.grad_query) return;
    constexpr int64_t kRows = 128;
    const int64_t rows = work.units * p.groups * work.unit_rows;
    run_items(
        (rows + kRows - 1) / kRows, schedule_.parallel && rows > 4 * kRows,
        2 * (p.channels + 1) * functions_.accumulator_bytes, [&](int64_t i, void* scratch) {
          functions_.reduce(work, i * kRows, std::min(rows, (i + 1) * kRows), scratch);
        });
  }

  void add_bandwidth(const cpu::RegressionBackward& work, const std::vector<double>& squares) {
    const auto& p = plain_.problem();
    const int64_t width = p.groups * p.channels;
    for (int64_t item = 0; item < work.units * work.key_splits; ++item) {
      const int64_t head = (work.first_unit + item / work.key_splits) % p.key_heads;
      for (int64_t i = 0; i < width; ++i) {
        bandwidth_[head * width + i] += squares[item * width + i];
      }
    }
  }

  void mask_gradient() {
    const auto& p = plain_.problem();
    const int64_t heads = p.key_heads * p.groups;
    cpu::RegressionMask work{};
    work.backward = read_;
    work.backward.block_keys = work.backward.group_keys = schedule_.block_keys;
    work.backward.chunk = {0, p.rows};
    work.gradient = plain_.view(gradients_[4], p.source[0].keys);
    const Places places(work.gradient, p.batch);
    work.batches = places.batches.data();
    work.first_batch = places.first.data();
    work.batch_groups = places.count();
    work.head_groups = work.gradient.head ? heads : 1;
    work.row_groups = work.gradient.row ? p.rows : 1;
    work.key_groups = work.gradient.column ? p.source[0].keys : 1;
    run_items(
        functions_.mask_items(work), schedule_.parallel, functions_.backward_scratch(work.backward),
        [&](int64_t i, void* scratch) { functions_.mask_item(work, i, scratch); });
  }

  const Arguments& args_;
  Plain plain_;
  const cpu::RegressionKernels& functions_;
  OutputMask wanted_;
  int64_t threads_ = at::get_num_threads();
  cpu::RegressionBackward read_{};
  cpu::RegressionSchedule schedule_{};
  std::vector<int64_t> nearest_;
  std::vector<double> bandwidth_;
  std::array<Tensor, kDifferentiable> gradients_;
};

Gradients backward_cpu(
    const Tensor& grad_output, const Tensor& grad_log_mass, const Tensor& query, const Tensor& key,
    const Tensor& value, const OptionalTensor& bandwidth, const Names& kernel,
    const OptionalTensor& attn_mask, bool is_causal, bool exclude_self, bool normalize,
    std::string_view empty, double dropout_p, const OptionalTensor& seed, bool enable_gqa,
    const Tensor& output, const Tensor& log_mass, std::array<bool, 5> output_mask) {
  const Arguments args{query,        key,       value, bandwidth, kernel, attn_mask, is_causal,
                       exclude_self, normalize, empty, dropout_p, seed,   enable_gqa};
  const std::array<Tensor, 2> grads{grad_output, grad_log_mass};
  const auto found = BackwardPass(args, grads, {output, log_mass}, output_mask).gradients();
  const bool finite = std::apply(
      [](const auto&... each) { return (exact_rows::seems_finite(each) && ...); }, found);
  if (excludes(args) && !finite &&
      !(exact_rows::all_finite({query, key, value}) && exact_rows::all_finite(grads))) {
    return backward_portable(grads, args, output_mask);
  }
  return found;
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, CPU, m) {
  m.impl("_kernel_attention_forward", forward_cpu);
  m.impl("_kernel_attention_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(mixhead, CompositeExplicitAutograd, m) {
  m.impl("_kernel_attention_blocks", [] {
    return std::tuple<int64_t, int64_t>(last_blocks.read, last_blocks.skipped);
  });
}

}  // namespace mixhead::kernels
