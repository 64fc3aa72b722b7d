#include "cpu/smoother-inl.h"

const mixhead::cpu::Kernels& mixhead::cpu::detail::kernels_avx512(Type type) {
  return kernels_named("avx512", type);
}
