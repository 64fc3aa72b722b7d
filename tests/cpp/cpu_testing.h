// What the tests of the CPU engine share.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace cpu_testing {

using Doubles = std::vector<double>;

constexpr double kInf = std::numeric_limits<double>::infinity();

/// The tolerance is relative to the largest finite number wanted, or to 1 where that is larger.
inline void expect_near(
    const Doubles& found, const Doubles& wanted, double tolerance, const std::string& what) {
  ASSERT_EQ(found.size(), wanted.size()) << what;
  double magnitude = 1.0;
  for (const double x : wanted) {
    if (std::isfinite(x)) magnitude = std::max(magnitude, std::abs(x));
  }
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (found[i] == wanted[i]) continue;  // -inf among them
    ASSERT_LE(std::abs(found[i] - wanted[i]), tolerance * magnitude)
        << what << "[" << i << "]: got " << found[i] << ", expected " << wanted[i];
  }
}

}  // namespace cpu_testing
