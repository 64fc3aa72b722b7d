// What the engine's inner loops do a second on one core. Compiled once for each instruction set,
// see CMakeLists.txt. Library templates compiled here for AVX may be the ones that the linker keeps
// for every processor: fit for a benchmark, not for the library.
#include <benchmark/benchmark.h>

#include <new>
#include <string>

#include "cpu/forward-inl.h"

using namespace mixhead::cpu;

namespace {

/// Numbers in [-1, 1), aligned.
template <class T>
struct Numbers {
  explicit Numbers(int64_t count) : data(new (std::align_val_t{64}) T[count]) {
    for (int64_t i = 0; i < count; ++i) {
      data[i] = static_cast<T>(static_cast<double>(i * 2654435761u % 2000) / 1000.0 - 1.0);
    }
  }
  ~Numbers() { operator delete[](data, std::align_val_t{64}); }
  T* data;
};

void count_flops(benchmark::State& state, double each) {
  state.counters["flop/s"] = benchmark::Counter(
      each * static_cast<double>(state.iterations()), benchmark::Counter::kIsRate);
}

/// The first product of a block: keys against a panel of queries, whose scores it stores.
template <class M, int vectors>
void products(benchmark::State& state) {
  using Acc = typename M::Acc;
  using Operand = typename M::Operand;
  constexpr int64_t lanes = vectors * kLanes<Acc>, size = sizeof(Operand);
  const int64_t keys = state.range(0), steps = state.range(1) / M::steps;
  Numbers<Operand> key(keys * steps), query(steps * lanes);
  Numbers<Acc> scores(keys * lanes);
  for (auto _ : state) {
    gemm<M, vectors>(
        keys, steps, key.data, {steps * size, size}, query.data, lanes, scores.data, lanes);
    benchmark::ClobberMemory();
  }
  count_flops(state, 2.0 * static_cast<double>(keys * steps * M::steps * lanes));
}

/// The second: values against the weights of a block, added to the panel's output.
template <class M, int vectors>
void weighted_sums(benchmark::State& state) {
  using Acc = typename M::Acc;
  using Operand = typename M::Operand;
  constexpr int64_t lanes = vectors * kLanes<Acc>, size = sizeof(Operand);
  const int64_t steps = state.range(0) / M::steps, channels = state.range(1);
  Numbers<Operand> value(steps * channels), weights(steps * lanes);
  Numbers<Acc> output(channels * lanes), alpha(lanes);
  for (auto _ : state) {
    gemm<M, vectors>(
        channels, steps, value.data, {size, channels * size}, weights.data, lanes, output.data,
        lanes, Update::rescale, alpha.data);
    benchmark::ClobberMemory();
  }
  count_flops(state, 2.0 * static_cast<double>(channels * steps * M::steps * lanes));
}

template <class T>
void exponentials(benchmark::State& state) {
  const int64_t count = state.range(0);
  Numbers<T> from(count), to(count);
  for (auto _ : state) {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      store(to.data + i, mixhead::cpu::exp<T>(load<T>(from.data + i) - 1));
    }
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(count * state.iterations());
}

void add(const char* name, void (*function)(benchmark::State&), std::initializer_list<int64_t> at) {
  benchmark::RegisterBenchmark((std::string(ISA_NAME "/") + name).c_str(), function)->Args(at);
}

template <class M>
void add_products(const char* type) {
  constexpr int wide = kPanelVectors;
  for (const int64_t channels : {32, 64, 80, 128}) {
    add((std::string("products/") + type).c_str(), products<M, wide>, {120, channels});
    add((std::string("weighted sums/") + type).c_str(), weighted_sums<M, wide>, {120, channels});
  }
}

}  // namespace

void REGISTER() {
#if defined(__AVX512BF16__)
  add_products<BFloat16Pairs>("bfloat16");
#else
  add_products<Plain<float> >("float32");
  add_products<Plain<double> >("float64");
  add("exp/float32", exponentials<float>, {4096});
  add("exp/float64", exponentials<double>, {4096});
#endif
}
