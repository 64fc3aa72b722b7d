#include "cpu/topk-inl.h"

// Only bfloat16 gains from the instructions that multiply its pairs.
const mixhead::cpu::TopkKernels& mixhead::cpu::detail::topk_avx512_bf16(Type type) {
  return type == Type::bfloat16 ? kTopk<BFloat16> : topk_avx512(type);
}
