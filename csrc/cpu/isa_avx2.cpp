#include "cpu/smoother-inl.h"

const mixhead::cpu::Kernels& mixhead::cpu::detail::kernels_avx2(Type type) {
  return kernels_named("avx2", type);
}
