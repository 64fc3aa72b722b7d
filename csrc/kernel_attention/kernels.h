#pragma once

#include <iterator>
#include <optional>
#include <string>
#include <string_view>

#include "cpu/kernel.h"

/// The kernel functions by their names, for all ops that take one.
namespace mixhead {

inline std::optional<Kernel> kernel_named(std::string_view name) {
  for (size_t i = 0; i < std::size(kKernels); ++i) {
    if (kKernels[i].name == name) return static_cast<Kernel>(i);
  }
  return std::nullopt;
}

/// "dot, cosine, ...", for errors.
inline std::string kernel_names() {
  std::string names;
  for (const auto& kernel : kKernels)
    names += (names.empty() ? "" : ", ") + std::string(kernel.name);
  return names;
}

}  // namespace mixhead
