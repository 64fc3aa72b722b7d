#pragma once

#include <array>
#include <optional>
#include <string_view>

#include "cpu/kernel.h"

/// The names of the kernel functions, in one place for all ops that take one.
namespace mixhead {

constexpr std::array<std::string_view, 10> kKernelNames{
    "dot",      "cosine", "gaussian",     "laplacian", "matern32",
    "matern52", "cauchy", "epanechnikov", "tricube",   "boxcar"};

inline std::optional<Kernel> kernel_named(std::string_view name) {
  for (size_t i = 0; i < kKernelNames.size(); ++i) {
    if (kKernelNames[i] == name) return static_cast<Kernel>(i);
  }
  return std::nullopt;
}

}  // namespace mixhead
