#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/regression.h"
#include "cpu/smoother.h"
#include "cpu/topk.h"

namespace mixhead::cpu {
namespace {

struct Set {
  const char* name;
  bool (*runs_here)();
  const Kernels& (*kernels)(Type);
  const RegressionKernels& (*regression)(Type);
  const TopkKernels& (*topk)(Type);
};

// From the least to the best.
constexpr Set kSets[] = {
    {"default", [] { return true; }, detail::kernels_default, detail::regression_default,
     detail::topk_default},
#if defined(__x86_64__)
    {"avx2",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     },
     detail::kernels_avx2, detail::regression_avx2, detail::topk_avx2},
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     detail::kernels_avx512, detail::regression_avx512, detail::topk_avx512},
    {"avx512_bf16",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bf16");
     },
     detail::kernels_avx512_bf16, detail::regression_avx512, detail::topk_avx512_bf16},
#endif
};

const Set* find(const char* isa) {
  for (const auto& set : kSets) {
    if (std::strcmp(set.name, isa) == 0) return set.runs_here() ? &set : nullptr;
  }
  return nullptr;
}

std::string available() {
  std::string names;
  for (const auto& set : kSets) {
    if (set.runs_here()) names += (names.empty() ? "" : ", ") + std::string(set.name);
  }
  return names;
}

const Set& choose() {
  const char* forced = std::getenv("MIXHEAD_ISA");
  if (forced && *forced) {
    if (const auto* set = find(forced)) return *set;
    throw std::runtime_error(
        "mixhead: MIXHEAD_ISA must be one of " + available() + " on this processor, got " + forced);
  }
  const Set* best = kSets;
  for (const auto& set : kSets) {
    if (set.runs_here()) best = &set;
  }
  return *best;
}

}  // namespace

const Kernels* kernels_of(const char* isa, Type type) {
  const auto* set = find(isa);
  return set ? &set->kernels(type) : nullptr;
}

static const Set& chosen() {
  static const Set& set = choose();
  return set;
}

const Kernels& kernels(Type type) { return chosen().kernels(type); }

const RegressionKernels* regression_kernels_of(const char* isa, Type type) {
  const auto* set = find(isa);
  return set ? &set->regression(type) : nullptr;
}

const RegressionKernels& regression_kernels(Type type) { return chosen().regression(type); }

const TopkKernels* topk_kernels_of(const char* isa, Type type) {
  const auto* set = find(isa);
  return set ? &set->topk(type) : nullptr;
}

const TopkKernels& topk_kernels(Type type) { return chosen().topk(type); }

}  // namespace mixhead::cpu
