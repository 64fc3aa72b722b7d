#include "cpu/smoother-inl.h"

const mixhead::cpu::Kernels& mixhead::cpu::detail::kernels_default(Type type) {
  return kernels_named("default", type);
}
