#include "cpu/topk-inl.h"

const mixhead::cpu::TopkKernels& mixhead::cpu::detail::topk_avx2(Type type) {
  return topk_table(type);
}
