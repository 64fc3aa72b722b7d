#include "cpu/regression-inl.h"

const mixhead::cpu::RegressionKernels& mixhead::cpu::detail::regression_avx2(Type type) {
  return regression_table(type);
}
