// The CPU engine on plain pointers, for every instruction set that this processor has, against
// loops in double written apart from it.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <tuple>

#include "smoother_testing.h"

namespace {

using namespace smoother_testing;
using cpu_testing::expect_near;
using mixhead::cpu::kernels_of;

double tolerance(Type type) {
  switch (type) {
    case Type::float64:
      return 1e-11;
    case Type::float32:
      return 1e-5;
    case Type::bfloat16:
      return 1.6e-2;
    default:
      return 2e-3;
  }
}

template <class Visit>
void for_each_result(const Results& a, const Results& b, const Visit& visit) {
  visit(a.output, b.output, "output");
  visit(a.grad_query, b.grad_query, "gradient of query");
  visit(a.grad_mix, b.grad_mix, "gradient of mix");
  for (int s = 0; s < 2; ++s) {
    visit(a.lse[s], b.lse[s], s ? "memory lse" : "self lse");
    visit(a.grad_key[s], b.grad_key[s], s ? "gradient of memory_key" : "gradient of key");
    visit(a.grad_value[s], b.grad_value[s], s ? "gradient of memory_value" : "gradient of value");
    visit(a.grad_mask[s], b.grad_mask[s], s ? "gradient of memory_mask" : "gradient of attn_mask");
  }
}

using Set = std::tuple<const char*, Type>;
class Smoother : public testing::TestWithParam<Set> {
 protected:
  void SetUp() override {
    const auto& [isa, type] = GetParam();
    kernels_ = kernels_of(isa, type);
    if (!kernels_) GTEST_SKIP() << "this processor has no " << isa;
  }
  const Kernels* kernels_ = nullptr;
};

TEST_P(Smoother, EqualsLoopsInDouble) {
  const auto type = std::get<1>(GetParam());
  for (const auto& c : kCases) {
    SCOPED_TRACE(c.name);
    Inputs in(c, type);
    const Results wanted = reference(in);
    for (const bool in_parts : {false, true}) {
      for (const int64_t threads : {1, 3}) {
        SCOPED_TRACE(testing::Message() << threads << " threads" << (in_parts ? ", in parts" : ""));
        for_each_result(
            run_engine(in, *kernels_, threads, in_parts), wanted,
            [&](const Doubles& got, const Doubles& want, const char* what) {
              const bool is_lse = std::strstr(what, "lse");
              expect_near(
                  got, want, tolerance(is_lse && type == Type::float16 ? Type::float32 : type),
                  what);
            });
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(Smoother, SameBitsAgain) {
  for (const auto& c : kCases) {
    SCOPED_TRACE(c.name);
    Inputs in(c, std::get<1>(GetParam()));
    for_each_result(
        run_engine(in, *kernels_, 3, false), run_engine(in, *kernels_, 3, false),
        [&](const Doubles& a, const Doubles& b, const char* what) { EXPECT_EQ(a, b) << what; });
  }
}

std::string set_name(const testing::TestParamInfo<Set>& info) {
  constexpr const char* kTypes[] = {"float32", "float64", "bfloat16", "float16"};
  const auto& [isa, type] = info.param;
  return std::string(isa) + "_" + kTypes[static_cast<int>(type)];
}

INSTANTIATE_TEST_SUITE_P(
    EachSet, Smoother,
    testing::Combine(
        testing::Values("default", "avx2", "avx512", "avx512_bf16"),
        testing::Values(Type::float32, Type::float64, Type::bfloat16, Type::float16)),
    set_name);

}  // namespace
