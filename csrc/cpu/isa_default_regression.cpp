#include "cpu/regression-inl.h"

const mixhead::cpu::RegressionKernels& mixhead::cpu::detail::regression_default(Type type) {
  return regression_table(type);
}
