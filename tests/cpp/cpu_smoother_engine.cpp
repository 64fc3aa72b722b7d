#include <cpu/schedule.h>
#include <dropout.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <thread>

#include "smoother_testing.h"

namespace smoother_testing {
namespace {

using namespace mixhead::cpu;

class Engine {
 public:
  Engine(Inputs& in, const Kernels& kernels, int64_t threads, bool in_parts)
      : in_(in), c_(in.c), kernels_(kernels), threads_(threads), in_parts_(in_parts) {
    for (int64_t b = 0; b < c_.batch; ++b) {
      batches_.push_back(b);
      query_batch_.push_back(b * c_.heads() * c_.rows * c_.channels);
      value_batch_.push_back(b * c_.heads() * c_.rows * c_.value_channels);
      row_batch_.push_back(b * c_.heads() * c_.rows);
      index_batch_.push_back(b * c_.heads() * c_.rows * c_.named);
      none_.push_back(0);
      for (int s = 0; s < 2; ++s) {
        const int64_t units = s == 1 && c_.shared ? 0 : b * c_.key_heads;
        key_batch_[s].push_back(units * in.width(s) * c_.channels);
        key_value_batch_[s].push_back(units * in.width(s) * c_.value_channels);
        mask_batch_[s].push_back(c_.mask == Case::padding ? b * in.width(s) : 0);
      }
    }
    build();
    forward();
    backward();
  }

  Results results() {
    Results r;
    const Type acc = accumulator(in_.type);
    r.output = output_.read(in_.type);
    r.grad_query = grad_query_.read(in_.type);
    r.grad_mix = grad_mix_.read(acc);
    for (int s = 0; s < 2; ++s) {
      r.lse[s] = lse_[s].read(acc);
      r.grad_key[s] = grad_key_[s].read(in_.type);
      r.grad_value[s] = grad_value_[s].read(in_.type);
      r.grad_mask[s] = grad_mask_[s].read(acc);
    }
    return r;
  }

 private:
  using Memory = std::vector<std::max_align_t>;
  static Memory allocate(int64_t bytes) { return Memory(bytes / sizeof(std::max_align_t) + 8); }
  static void* aligned(Memory& memory) {
    const auto at = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<void*>((at + 63) / 64 * 64);
  }
  static Array zeros(size_t count, Type type) { return Array(Doubles(count, 0.0), type); }

  /// item(number, scratch) for 0 .. count - 1, each on the thread that is free first.
  template <class Item>
  void run(int64_t count, int64_t scratch_bytes, const Item& item) const {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      auto scratch = allocate(scratch_bytes);
      for (int64_t i; (i = next++) < count;) item(i, aligned(scratch));
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads_; ++i) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
  }

  /// rows(first, last, scratch) for blocks of the rows 0 .. count - 1.
  template <class Rows>
  void run_rows(int64_t count, int64_t scratch_bytes, const Rows& rows) const {
    constexpr int64_t kBlock = 16;
    run((count + kBlock - 1) / kBlock, scratch_bytes, [&](int64_t i, void* scratch) {
      rows(i * kBlock, std::min(count, (i + 1) * kBlock), scratch);
    });
  }

  View row_view(Array& array) { return {array.bytes.data(), row_batch_.data(), c_.rows, 1, 0}; }
  View output_view(Array& array) {
    return {
        array.bytes.data(), value_batch_.data(), c_.rows * c_.value_channels, c_.value_channels, 1};
  }

  void build() {
    p_.type = in_.type;
    p_.batch = c_.batch;
    p_.key_heads = c_.key_heads;
    p_.groups = c_.groups;
    p_.rows = c_.rows;
    p_.channels = c_.channels;
    p_.value_channels = c_.value_channels;
    p_.scale = 1.0 / std::sqrt(static_cast<double>(c_.channels));
    p_.query = {in_.query.bytes.data(), query_batch_.data(), c_.rows * c_.channels, c_.channels, 1};
    p_.joint = c_.joint;
    p_.mix_type = accumulator(in_.type);
    p_.mix = {in_.mix.bytes.data(), none_.data(), 1, 0, 0};
    if (c_.dropout > 0.0) {
      p_.dropout = {
          true, in_.seed, mixhead::dropout::threshold(c_.dropout), 1.0 / (1.0 - c_.dropout)};
    }
    build_source(0);
    build_source(1);
  }

  void build_source(int s) {
    auto& source = p_.source[s];
    const int64_t width = in_.width(s);
    source.key = {
        in_.key[s].bytes.data(), key_batch_[s].data(), width * c_.channels, c_.channels, 1};
    source.value = {
        in_.value[s].bytes.data(), key_value_batch_[s].data(), width * c_.value_channels,
        c_.value_channels, 1};
    source.keys = source.slots = width;
    source.shared = s == 1 && c_.shared;
    source.causal = s == 0 && c_.causal;
    source.side = s;
    if (c_.mask == Case::padding) {
      source.mask = {
          MaskKind::boolean,
          Type::float32,
          {in_.readable[s].data(), mask_batch_[s].data(), 0, 0, 1}};
    }
    if (c_.mask == Case::full_float) {
      source.mask = {
          MaskKind::additive,
          accumulator(in_.type),
          {in_.mask[s].bytes.data(), none_.data(), 0, width, 1}};
    }
    if (s == 1 && c_.named) {
      source.indexed = true;
      source.keys = c_.named;
      source.index = {in_.index.data(), index_batch_.data(), c_.rows * c_.named, c_.named, 1};
    }
  }

  void forward() {
    const Type acc = accumulator(in_.type);
    const int64_t all = c_.batch * c_.heads() * c_.rows;
    output_ = zeros(all * c_.value_channels, in_.type);
    ForwardWork work{};
    work.problem = p_;
    work.output = output_.bytes.data();
    for (int s = 0; s < 2; ++s) {
      lse_[s] = zeros(all, acc);
      kept_[s] = zeros(all * c_.value_channels, acc);
      work.lse[s] = lse_[s].bytes.data();
      work.kept_output[s] = c_.joint && s == 1 ? nullptr : kept_[s].bytes.data();
    }
    auto schedule = schedule_forward(p_, kernels_, threads_);
    schedule.parallel = threads_ > 1;
    if (in_parts_) schedule.chunk_rows = c_.rows / 2 + 1;
    for (int64_t first = 0; first < c_.rows; first += schedule.chunk_rows) {
      work.chunk = {first, std::min(schedule.chunk_rows, c_.rows - first)};
      forward_chunk(schedule, work);
    }
  }

  void forward_chunk(const ForwardSchedule& schedule, ForwardWork& work) {
    const int64_t items = split_forward(schedule, kernels_, threads_, work);
    const int64_t rows = c_.batch * c_.heads() * work.chunk.rows;
    Memory parts[2];
    for (int s = 0; s < 2; ++s) {
      const int64_t numbers = work.source[s].key_splits * rows;
      parts[s] = allocate(numbers * (c_.value_channels + 1) * kernels_.accumulator_bytes);
      work.part[s] = aligned(parts[s]);
      work.part_lse[s] = static_cast<char*>(work.part[s]) +
                         numbers * c_.value_channels * kernels_.accumulator_bytes;
    }
    run(items, kernels_.forward_scratch(work),
        [&](int64_t i, void* scratch) { kernels_.forward_item(work, i, scratch); });
    run_rows(
        rows, 0, [&](int64_t begin, int64_t end, void*) { kernels_.combine(work, begin, end); });
  }

  void backward() {
    BackwardWork work = backward_work();
    const int64_t acc = kernels_.accumulator_bytes, all = c_.batch * c_.heads() * c_.rows;
    auto row_mix = allocate(all * acc);
    work.row_mix = c_.joint ? aligned(row_mix) : nullptr;
    auto schedule = schedule_backward(p_, kernels_, threads_);
    schedule.parallel = threads_ > 1;
    if (in_parts_) {
      schedule.wave_heads = 1;
      schedule.chunk_rows = c_.rows / 2 + 1;
    }
    for (int64_t head = 0; head < c_.key_heads; head += schedule.wave_heads) {
      work.first_head = head;
      work.heads = std::min(schedule.wave_heads, c_.key_heads - head);
      backward_wave(schedule, work);
    }
    mix_gradient(work);
    for (int s = 0; s < 2; ++s) {
      if (c_.mask == Case::full_float) mask_gradient(schedule, work, s);
    }
  }

  /// What the forward kept and came in, and where the gradients go.
  BackwardWork backward_work() {
    BackwardWork work{};
    work.problem = p_;
    auto& inputs = work.inputs;
    inputs.grad_output = output_view(in_.grad);
    for (int s = 0; s < 2; ++s) {
      inputs.grad_lse[s] = row_view(in_.grad_lse[s]);
      inputs.lse[s] = row_view(lse_[s]);
      inputs.kept_output[s] = output_view(kept_[s]);
      grad_key_[s] = zeros(in_.key[s].values.size(), in_.type);
      grad_value_[s] = zeros(in_.value[s].values.size(), in_.type);
      work.grad_key[s] = grad_key_[s].bytes.data();
      work.grad_value[s] = grad_value_[s].bytes.data();
    }
    grad_query_ = zeros(in_.query.values.size(), in_.type);
    work.grad_query = grad_query_.bytes.data();
    work.key_gradients = work.query_gradients = true;
    return work;
  }

  void backward_wave(const BackwardSchedule& schedule, BackwardWork& work) {
    const int64_t acc = kernels_.accumulator_bytes;
    Memory stores[4];
    for (int s = 0; s < 2 && schedule.chunk_rows < c_.rows; ++s) {
      const int64_t keys = work.heads * c_.batch * in_.width(s);
      stores[2 * s] = allocate(keys * c_.channels * acc);
      stores[2 * s + 1] = allocate(keys * c_.value_channels * acc);
      work.key_store[s] = aligned(stores[2 * s]);
      work.value_store[s] = aligned(stores[2 * s + 1]);
    }
    for (int64_t first = 0; first < c_.rows; first += schedule.chunk_rows) {
      work.chunk = {first, std::min(schedule.chunk_rows, c_.rows - first)};
      work.first_chunk = first == 0;
      work.last_chunk = first + work.chunk.rows == c_.rows;
      backward_chunk(schedule, work);
    }
  }

  void backward_chunk(const BackwardSchedule& schedule, BackwardWork& work) {
    const int64_t items = split_backward(schedule, kernels_, threads_, work);
    const int64_t acc = kernels_.accumulator_bytes;
    const int64_t rows = c_.batch * work.heads * c_.groups * work.chunk.rows;
    Memory deltas[2], parts[2];
    for (int s = 0; s < 2; ++s) {
      deltas[s] = allocate(c_.batch * c_.heads() * work.chunk.rows * acc);
      parts[s] = allocate(part_bytes(kernels_, work, s));
      work.delta[s] = aligned(deltas[s]);
      work.part[s] = aligned(parts[s]);
    }
    run_rows(rows, 0, [&](int64_t begin, int64_t end, void*) {
      kernels_.backward_prepare(work, begin, end);
    });
    run(items, kernels_.backward_scratch(work),
        [&](int64_t i, void* scratch) { kernels_.backward_item(work, i, scratch); });
    run_rows(rows, c_.channels * acc, [&](int64_t begin, int64_t end, void* scratch) {
      kernels_.backward_reduce(work, begin, end, scratch);
    });
  }

  void mix_gradient(const BackwardWork& done) {
    grad_mix_ = zeros(c_.heads(), accumulator(in_.type));
    MixGradientWork work{};
    work.problem = p_;
    work.inputs = done.inputs;
    work.gradient = {grad_mix_.bytes.data(), none_.data(), 1, 0, 0};
    const int64_t ends[2] = {0, c_.batch};
    work.batches = batches_.data();
    work.first_batch = ends;
    work.batch_groups = work.row_groups = 1;
    work.head_groups = c_.heads();
    work.row_mix = done.row_mix;
    run(c_.heads(), sizeof(double),
        [&](int64_t i, void* sum) { kernels_.mix_gradient_item(work, i, sum); });
  }

  void mask_gradient(const BackwardSchedule& schedule, BackwardWork all, int s) {
    const int64_t acc = kernels_.accumulator_bytes;
    all.first_head = 0;
    all.heads = c_.key_heads;
    all.chunk = {0, c_.rows};
    Memory deltas[2];
    for (int side = 0; side < 2; ++side) {
      deltas[side] = allocate(c_.batch * c_.heads() * c_.rows * acc);
      all.delta[side] = aligned(deltas[side]);
    }
    kernels_.backward_prepare(all, 0, c_.batch * c_.heads() * c_.rows);
    grad_mask_[s] = zeros(c_.rows * in_.width(s), accumulator(in_.type));
    MaskGradientWork work{};
    work.problem = p_;
    work.inputs = all.inputs;
    work.tiles = schedule.tiles;
    work.source = s;
    work.gradient = {grad_mask_[s].bytes.data(), none_.data(), 0, in_.width(s), 1};
    const int64_t ends[2] = {0, c_.batch};
    work.batches = batches_.data();
    work.first_batch = ends;
    work.batch_groups = work.head_groups = 1;
    work.row_groups = c_.rows;
    work.key_groups = in_.width(s);
    work.delta = all.delta[s];
    run(kernels_.mask_gradient_items(work), kernels_.mask_gradient_scratch(work),
        [&](int64_t i, void* scratch) { kernels_.mask_gradient_item(work, i, scratch); });
  }

  Inputs& in_;
  const Case& c_;
  const Kernels& kernels_;
  int64_t threads_;
  bool in_parts_;
  Problem p_{};
  std::vector<int64_t> batches_, query_batch_, value_batch_, row_batch_, index_batch_, none_;
  std::vector<int64_t> key_batch_[2], key_value_batch_[2], mask_batch_[2];
  Array output_, lse_[2], kept_[2], grad_query_, grad_key_[2], grad_value_[2], grad_mix_,
      grad_mask_[2];
};

}  // namespace

Results run_engine(Inputs& in, const Kernels& kernels, int64_t threads, bool in_parts) {
  return Engine(in, kernels, threads, in_parts).results();
}

}  // namespace smoother_testing
