// Which instruction set is chosen, and how the work is cut into items.
#include <cpu/schedule.h>
#include <cpu/smoother.h>
#include <gtest/gtest.h>

#include <array>

namespace {

using namespace mixhead::cpu;

TEST(Dispatch, NamesWhatItChose) {
  EXPECT_STREQ(kernels_of("default", Type::float32)->isa, "default");
  EXPECT_EQ(kernels_of("sse9", Type::float32), nullptr);
  EXPECT_NE(kernels(Type::float32).isa, nullptr);
}

TEST(Schedule, KeepsEveryThreadBusyWhateverTheShape) {
  const auto* kernels = kernels_of("default", Type::float32);
  for (const auto& [rows, heads, slots] :
       {std::array<int64_t, 3>{1, 1, 65536}, {1024, 1, 16384}, {1, 8, 65536}}) {
    Problem p{};
    p.batch = 1;
    p.key_heads = heads;
    p.groups = 1;
    p.rows = rows;
    p.channels = p.value_channels = 64;
    p.source[1].keys = p.source[1].slots = slots;
    p.source[1].shared = true;
    for (const int64_t threads : {2, 16}) {
      ForwardWork work{};
      work.problem = p;
      const auto schedule = schedule_forward(p, *kernels, threads);
      work.chunk = {0, rows};
      EXPECT_TRUE(schedule.parallel);
      EXPECT_GE(split_forward(schedule, *kernels, threads, work), 2 * threads);
    }
  }
}

}  // namespace
