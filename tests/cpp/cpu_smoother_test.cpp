// The CPU engine on plain pointers, for every instruction set that this processor has, against
// loops in double written apart from it.
#include <cpu/schedule.h>
#include <cpu/smoother.h>
#include <dropout.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

using namespace mixhead::cpu;
using Doubles = std::vector<double>;

constexpr double kInf = std::numeric_limits<double>::infinity();

struct Case {
  const char* name;
  int64_t batch, key_heads, groups, rows, channels, value_channels, keys, slots;
  bool shared = true, causal = false, joint = false;
  enum { no_mask, padding, full_float } mask = no_mask;
  int64_t named = 0;  // slots that each query names; 0: it reads all
  double dropout = 0.0;
  int64_t heads() const { return key_heads * groups; }
};

const Case kCases[] = {
    {.name = "plain",
     .batch = 2,
     .key_heads = 2,
     .groups = 1,
     .rows = 9,
     .channels = 8,
     .value_channels = 8,
     .keys = 11,
     .slots = 13},
    {.name = "several blocks",
     .batch = 2,
     .key_heads = 1,
     .groups = 1,
     .rows = 150,
     .channels = 16,
     .value_channels = 32,
     .keys = 260,
     .slots = 700,
     .causal = true},
    {.name = "odd sizes, joint",
     .batch = 3,
     .key_heads = 1,
     .groups = 1,
     .rows = 37,
     .channels = 33,
     .value_channels = 17,
     .keys = 101,
     .slots = 97,
     .shared = false,
     .causal = true,
     .joint = true},
    {.name = "groups",
     .batch = 2,
     .key_heads = 2,
     .groups = 3,
     .rows = 21,
     .channels = 20,
     .value_channels = 12,
     .keys = 40,
     .slots = 50,
     .causal = true},
    {.name = "few rows",
     .batch = 1,
     .key_heads = 2,
     .groups = 1,
     .rows = 3,
     .channels = 37,
     .value_channels = 21,
     .keys = 300,
     .slots = 900,
     .joint = true},
    {.name = "half a vector of rows",
     .batch = 7,
     .key_heads = 2,
     .groups = 1,
     .rows = 1,
     .channels = 64,
     .value_channels = 48,
     .keys = 30,
     .slots = 1000},
    {.name = "no memory",
     .batch = 2,
     .key_heads = 1,
     .groups = 1,
     .rows = 8,
     .channels = 8,
     .value_channels = 8,
     .keys = 8,
     .slots = 0,
     .joint = true},
    {.name = "padding masks",
     .batch = 2,
     .key_heads = 2,
     .groups = 1,
     .rows = 70,
     .channels = 8,
     .value_channels = 8,
     .keys = 50,
     .slots = 220,
     .mask = Case::padding},
    {.name = "float masks",
     .batch = 2,
     .key_heads = 2,
     .groups = 1,
     .rows = 70,
     .channels = 8,
     .value_channels = 8,
     .keys = 50,
     .slots = 130,
     .joint = true,
     .mask = Case::full_float},
    {.name = "named slots",
     .batch = 2,
     .key_heads = 2,
     .groups = 2,
     .rows = 15,
     .channels = 24,
     .value_channels = 20,
     .keys = 20,
     .slots = 60,
     .mask = Case::full_float,
     .named = 9},
    {.name = "dropout",
     .batch = 2,
     .key_heads = 1,
     .groups = 2,
     .rows = 33,
     .channels = 16,
     .value_channels = 16,
     .keys = 33,
     .slots = 90,
     .causal = true,
     .joint = true,
     .dropout = 0.3},
};

/// Numbers of one type in memory, and the same, rounded, as doubles.
struct Array {
  Doubles values;
  std::vector<unsigned char> bytes;

  Array() = default;
  Array(Doubles wanted, Type type) : bytes(wanted.size() * size_of(type)) {
    for (size_t i = 0; i < wanted.size(); ++i) store(type, i, wanted[i]);
    values = read(type);
  }
  static size_t size_of(Type type) {
    return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2;
  }
  template <class T>
  T& at(size_t i) {
    return reinterpret_cast<T*>(bytes.data())[i];
  }
  void store(Type type, size_t i, double value) {
    const auto narrow = static_cast<float>(value);
    if (type == Type::float64) at<double>(i) = value;
    if (type == Type::float32) at<float>(i) = narrow;
    if (type == Type::bfloat16) at<uint16_t>(i) = std::bit_cast<uint32_t>(narrow) >> 16;
    if (type == Type::float16) at<_Float16>(i) = static_cast<_Float16>(narrow);
  }
  Doubles read(Type type) {
    Doubles result(bytes.size() / size_of(type));
    for (size_t i = 0; i < result.size(); ++i) {
      if (type == Type::float64) result[i] = at<double>(i);
      if (type == Type::float32) result[i] = at<float>(i);
      if (type == Type::bfloat16) {
        result[i] = std::bit_cast<float>(static_cast<uint32_t>(at<uint16_t>(i)) << 16);
      }
      if (type == Type::float16) result[i] = static_cast<float>(at<_Float16>(i));
    }
    return result;
  }
};

Type accumulator(Type type) { return type == Type::float64 ? Type::float64 : Type::float32; }

struct Inputs {
  Case c;
  Type type;
  Array query, key[2], value[2], mix, mask[2], grad, grad_lse[2];
  std::vector<uint8_t> readable[2];
  std::vector<int64_t> index;
  int64_t seed = 42;

  Inputs(const Case& of, Type type) : c(of), type(type) {
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    const auto draw = [&](int64_t count, Type as) {
      Doubles numbers(count);
      for (auto& x : numbers) x = normal(random);
      return Array(numbers, as);
    };
    const int64_t all = c.batch * c.heads() * c.rows;
    query = draw(all * c.channels, type);
    grad = draw(all * c.value_channels, type);
    mix = draw(c.heads(), accumulator(type));
    for (int s = 0; s < 2; ++s) {
      const int64_t units = c.key_heads * (s == 1 && c.shared ? 1 : c.batch);
      key[s] = draw(units * width(s) * c.channels, type);
      value[s] = draw(units * width(s) * c.value_channels, type);
      grad_lse[s] = draw(all, accumulator(type));
      if (c.mask == Case::full_float) mask[s] = draw(c.rows * width(s), accumulator(type));
      if (c.mask == Case::padding) {
        // Batch entry 1 may read nothing of the memory.
        for (int64_t i = 0; i < c.batch * width(s); ++i) {
          readable[s].push_back(random() % 3 > 0 && !(s == 1 && i >= width(s)));
        }
      }
    }
    for (int64_t i = 0; i < all * c.named; ++i) {
      index.push_back(static_cast<int64_t>(random() % (c.slots + 1)) - 1);
    }
  }
  int64_t width(int s) const { return s ? c.slots : c.keys; }
  int64_t unit(int s, int64_t batch, int64_t head) const {
    return s == 1 && c.shared ? head / c.groups : batch * c.key_heads + head / c.groups;
  }
};

struct Results {
  Doubles output, lse[2], grad_query, grad_key[2], grad_value[2], grad_mix, grad_mask[2];
};

/// The contract's formulas, one query after the other.
class Reference {
 public:
  explicit Reference(const Inputs& in) : in_(in), c_(in.c) {
    const int64_t all = c_.batch * c_.heads() * c_.rows;
    r_.output.assign(all * c_.value_channels, 0.0);
    r_.grad_query.assign(all * c_.channels, 0.0);
    r_.grad_mix.assign(c_.heads(), 0.0);
    for (int s = 0; s < 2; ++s) {
      r_.lse[s].assign(all, -kInf);
      r_.grad_key[s].assign(in.key[s].values.size(), 0.0);
      r_.grad_value[s].assign(in.value[s].values.size(), 0.0);
      r_.grad_mask[s].assign(in.mask[s].values.size(), 0.0);
    }
    for (int64_t b = 0; b < c_.batch; ++b) {
      for (int64_t h = 0; h < c_.heads(); ++h) {
        for (int64_t i = 0; i < c_.rows; ++i) row(b, h, i);
      }
    }
  }
  const Results& results() const { return r_; }

 private:
  struct Side {
    std::vector<int64_t> slots;
    Doubles attention, keep, output;
    double lse = -kInf;
  };

  Side attend(int s, int64_t b, int64_t h, int64_t i) {
    Side side;
    const int64_t row = (b * c_.heads() + h) * c_.rows + i, width = in_.width(s);
    const int64_t count = s == 1 && c_.named ? c_.named : width;
    const auto key = mixhead::dropout::row_key(in_.seed, s, row);
    Doubles scores;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t slot = s == 1 && c_.named ? in_.index[row * c_.named + k] : k;
      if (slot < 0) continue;
      if (s == 0 && c_.causal && k > c_.keys - c_.rows + i) continue;
      if (c_.mask == Case::padding && !in_.readable[s][b * width + slot]) continue;
      double score = 0.0;
      for (int64_t d = 0; d < c_.channels; ++d) {
        score += in_.query.values[row * c_.channels + d] *
                 in_.key[s].values[(in_.unit(s, b, h) * width + slot) * c_.channels + d];
      }
      score /= std::sqrt(static_cast<double>(c_.channels));
      if (c_.mask == Case::full_float) score += in_.mask[s].values[i * width + slot];
      scores.push_back(score);
      side.slots.push_back(slot);
      const bool dropped = mixhead::dropout::uniform_bits(key, static_cast<uint32_t>(k)) <
                           mixhead::dropout::threshold(c_.dropout);
      side.keep.push_back(dropped ? 0.0 : 1.0 / (1.0 - c_.dropout));
    }
    side.output.assign(c_.value_channels, 0.0);
    if (scores.empty()) return side;
    const double highest = *std::max_element(scores.begin(), scores.end());
    double sum = 0.0;
    for (const double score : scores) sum += std::exp(score - highest);
    side.lse = highest + std::log(sum);
    for (size_t k = 0; k < scores.size(); ++k) {
      side.attention.push_back(std::exp(scores[k] - side.lse));
      for (int64_t d = 0; d < c_.value_channels; ++d) {
        side.output[d] += side.attention[k] * side.keep[k] * value(s, b, h, side.slots[k], d);
      }
    }
    return side;
  }

  double value(int s, int64_t b, int64_t h, int64_t slot, int64_t d) const {
    return in_.value[s].values[(in_.unit(s, b, h) * in_.width(s) + slot) * c_.value_channels + d];
  }

  void row(int64_t b, int64_t h, int64_t i) {
    const int64_t row = (b * c_.heads() + h) * c_.rows + i;
    const std::array<Side, 2> sides{attend(0, b, h, i), attend(1, b, h, i)};
    const bool both = sides[0].lse != -kInf && sides[1].lse != -kInf;
    const double logit = in_.mix.values[h] + (c_.joint && both ? sides[1].lse - sides[0].lse : 0.0);
    const double memory = both ? 1.0 / (1.0 + std::exp(-logit)) : sides[0].lse == -kInf;
    const double weight[2] = {1.0 - memory, sides[1].lse == -kInf ? 0.0 : memory};
    double difference = 0.0;  // <dO, A_m - A_s>
    for (int64_t d = 0; d < c_.value_channels; ++d) {
      const double grad = in_.grad.values[row * c_.value_channels + d];
      difference += grad * (sides[1].output[d] - sides[0].output[d]);
      r_.output[row * c_.value_channels + d] =
          weight[0] * sides[0].output[d] + weight[1] * sides[1].output[d];
    }
    const double grad_logit = both ? memory * (1.0 - memory) * difference : 0.0;
    r_.grad_mix[h] += grad_logit;
    for (int s = 0; s < 2; ++s) {
      const auto& side = sides[s];
      r_.lse[s][row] = side.lse;
      double grad_lse = in_.grad_lse[s].values[row];
      if (c_.joint) grad_lse += s == 1 ? grad_logit : -grad_logit;
      differentiate(s, b, h, i, side, weight[s], grad_lse);
    }
  }

  void differentiate(
      int s, int64_t b, int64_t h, int64_t i, const Side& side, double weight, double grad_lse) {
    const int64_t row = (b * c_.heads() + h) * c_.rows + i, width = in_.width(s);
    const double scale = 1.0 / std::sqrt(static_cast<double>(c_.channels));
    double mean = 0.0;
    Doubles grad_attention(side.slots.size(), 0.0);
    for (size_t k = 0; k < side.slots.size(); ++k) {
      const int64_t at = (in_.unit(s, b, h) * width + side.slots[k]) * c_.value_channels;
      for (int64_t d = 0; d < c_.value_channels; ++d) {
        const double grad = weight * in_.grad.values[row * c_.value_channels + d];
        grad_attention[k] += side.keep[k] * grad * in_.value[s].values[at + d];
        r_.grad_value[s][at + d] += side.attention[k] * side.keep[k] * grad;
      }
      mean += side.attention[k] * grad_attention[k];
    }
    for (size_t k = 0; k < side.slots.size(); ++k) {
      const double grad = side.attention[k] * (grad_attention[k] - mean + grad_lse);
      const int64_t at = (in_.unit(s, b, h) * width + side.slots[k]) * c_.channels;
      for (int64_t d = 0; d < c_.channels; ++d) {
        r_.grad_query[row * c_.channels + d] += scale * grad * in_.key[s].values[at + d];
        r_.grad_key[s][at + d] += scale * grad * in_.query.values[row * c_.channels + d];
      }
      if (c_.mask == Case::full_float) r_.grad_mask[s][i * width + side.slots[k]] += grad;
    }
  }

  const Inputs& in_;
  const Case& c_;
  Results r_;
};

/// Runs the engine's items on `threads` threads. `in_parts` limits heads and rows, which makes
/// several waves and chunks of what would be one.
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
    for (int s = 0; s < 2; ++s) {
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
  }

  void backward() {
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
    const int64_t acc = kernels_.accumulator_bytes, all = c_.batch * c_.heads() * c_.rows;
    auto row_mix = allocate(all * acc);
    work.row_mix = c_.joint ? aligned(row_mix) : nullptr;
    auto schedule = schedule_backward(p_, kernels_, threads_);
    schedule.parallel = threads_ > 1;
    if (in_parts_) {
      schedule.wave_heads = 1;
      schedule.chunk_rows = c_.rows / 2 + 1;
    }
    work.key_gradients = work.query_gradients = true;
    for (int64_t head = 0; head < c_.key_heads; head += schedule.wave_heads) {
      work.first_head = head;
      work.heads = std::min(schedule.wave_heads, c_.key_heads - head);
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
    mix_gradient(work);
    for (int s = 0; s < 2; ++s) {
      if (c_.mask == Case::full_float) mask_gradient(schedule, work, s);
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

double tolerance(Type type) {
  switch (type) {
    case Type::float64:
      return 1e-11;
    case Type::float32:
      return 1e-5;
    case Type::bfloat16:
      return 1.6e-2;
    default:
      return 2e-3;
  }
}

void expect_near(const Doubles& got, const Doubles& want, double tolerance, const char* what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  double magnitude = 1.0;
  for (const double x : want) {
    if (std::isfinite(x)) magnitude = std::max(magnitude, std::abs(x));
  }
  for (size_t i = 0; i < want.size(); ++i) {
    if (got[i] == want[i]) continue;  // -inf among them
    ASSERT_LE(std::abs(got[i] - want[i]), tolerance * magnitude)
        << what << "[" << i << "]: got " << got[i] << ", expected " << want[i];
  }
}

template <class Visit>
void for_each_result(const Results& a, const Results& b, const Visit& visit) {
  visit(a.output, b.output, "output");
  visit(a.grad_query, b.grad_query, "gradient of query");
  visit(a.grad_mix, b.grad_mix, "gradient of mix");
  for (int s = 0; s < 2; ++s) {
    visit(a.lse[s], b.lse[s], s ? "memory lse" : "self lse");
    visit(a.grad_key[s], b.grad_key[s], s ? "gradient of memory_key" : "gradient of key");
    visit(a.grad_value[s], b.grad_value[s], s ? "gradient of memory_value" : "gradient of value");
    visit(a.grad_mask[s], b.grad_mask[s], s ? "gradient of memory_mask" : "gradient of attn_mask");
  }
}

using Set = std::tuple<const char*, Type>;
class Smoother : public testing::TestWithParam<Set> {
 protected:
  void SetUp() override {
    const auto& [isa, type] = GetParam();
    kernels_ = kernels_of(isa, type);
    if (!kernels_) GTEST_SKIP() << "this processor has no " << isa;
  }
  const Kernels* kernels_ = nullptr;
};

TEST_P(Smoother, EqualsLoopsInDouble) {
  const auto type = std::get<1>(GetParam());
  for (const auto& c : kCases) {
    SCOPED_TRACE(c.name);
    Inputs in(c, type);
    const Reference reference(in);
    for (const bool in_parts : {false, true}) {
      for (const int64_t threads : {1, 3}) {
        SCOPED_TRACE(testing::Message() << threads << " threads" << (in_parts ? ", in parts" : ""));
        Engine engine(in, *kernels_, threads, in_parts);
        for_each_result(
            engine.results(), reference.results(),
            [&](const Doubles& got, const Doubles& want, const char* what) {
              const bool is_lse = std::strstr(what, "lse");
              expect_near(
                  got, want, tolerance(is_lse && type == Type::float16 ? Type::float32 : type),
                  what);
            });
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(Smoother, SameBitsAgain) {
  for (const auto& c : kCases) {
    SCOPED_TRACE(c.name);
    Inputs in(c, std::get<1>(GetParam()));
    Engine once(in, *kernels_, 3, false), again(in, *kernels_, 3, false);
    for_each_result(
        once.results(), again.results(),
        [&](const Doubles& a, const Doubles& b, const char* what) { EXPECT_EQ(a, b) << what; });
  }
}

std::string set_name(const testing::TestParamInfo<Set>& info) {
  constexpr const char* kTypes[] = {"float32", "float64", "bfloat16", "float16"};
  const auto& [isa, type] = info.param;
  return std::string(isa) + "_" + kTypes[static_cast<int>(type)];
}

INSTANTIATE_TEST_SUITE_P(
    EachSet, Smoother,
    testing::Combine(
        testing::Values("default", "avx2", "avx512", "avx512_bf16"),
        testing::Values(Type::float32, Type::float64, Type::bfloat16, Type::float16)),
    set_name);

TEST(Dispatch, NamesWhatItChose) {
  EXPECT_STREQ(kernels_of("default", Type::float32)->isa, "default");
  EXPECT_EQ(kernels_of("sse9", Type::float32), nullptr);
  EXPECT_NE(kernels(Type::float32).isa, nullptr);
}

TEST(Schedule, KeepsEveryThreadBusyWhateverTheShape) {
  const auto* kernels = kernels_of("default", Type::float32);
  for (const auto& [rows, heads, slots] :
       {std::array<int64_t, 3>{1, 1, 65536}, {1024, 1, 16384}, {1, 8, 65536}}) {
    Problem p{};
    p.batch = 1;
    p.key_heads = heads;
    p.groups = 1;
    p.rows = rows;
    p.channels = p.value_channels = 64;
    p.source[1].keys = p.source[1].slots = slots;
    p.source[1].shared = true;
    for (const int64_t threads : {2, 16}) {
      ForwardWork work{};
      work.problem = p;
      const auto schedule = schedule_forward(p, *kernels, threads);
      work.chunk = {0, rows};
      EXPECT_TRUE(schedule.parallel);
      EXPECT_GE(split_forward(schedule, *kernels, threads, work), 2 * threads);
    }
  }
}

}  // namespace
