// The engine's micro-kernels, each at every instruction set that runs here:
//   build/bench/benchmarks/mixhead_micro_benchmarks --benchmark_filter=avx512
#include <benchmark/benchmark.h>

#include "cpu/smoother.h"

void register_default();
void register_avx2();
void register_avx512();
void register_avx512_bf16();

int main(int argc, char** argv) {
  using namespace mixhead::cpu;
  register_default();
  if (kernels_of("avx2", Type::float32)) register_avx2();
  if (kernels_of("avx512", Type::float32)) register_avx512();
  if (kernels_of("avx512_bf16", Type::bfloat16)) register_avx512_bf16();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
