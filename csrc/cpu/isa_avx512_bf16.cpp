#include "cpu/smoother-inl.h"

// Only bfloat16 gains from the instructions that multiply its pairs.
const mixhead::cpu::Kernels& mixhead::cpu::detail::kernels_avx512_bf16(Type type) {
  if (type != Type::bfloat16) return kernels_avx512(type);
  static const Kernels kernels = table<BFloat16>("avx512_bf16");
  return kernels;
}
