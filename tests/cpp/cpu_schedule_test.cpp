// Which instruction set is chosen, and how the work is cut into items.
#include <cpu/schedule.h>
#include <cpu/smoother.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>

namespace {

using namespace mixhead::cpu;

TEST(Dispatch, NamesWhatItChose) {
  EXPECT_STREQ(kernels_of("default", Type::float32)->isa, "default");
  EXPECT_EQ(kernels_of("sse9", Type::float32), nullptr);
  EXPECT_NE(kernels(Type::float32).isa, nullptr);
}

Problem memory_of(int64_t rows, int64_t heads, int64_t slots) {
  Problem p{};
  p.batch = 1;
  p.key_heads = heads;
  p.groups = 1;
  p.rows = rows;
  p.channels = p.value_channels = 64;
  p.source[1].keys = p.source[1].slots = slots;
  p.source[1].shared = true;
  return p;
}

TEST(Schedule, KeepsEveryThreadBusyWhateverTheShape) {
  const auto* kernels = kernels_of("default", Type::float32);
  for (const auto& [rows, heads, slots] :
       {std::array<int64_t, 3>{1, 1, 65536}, {1024, 1, 16384}, {1, 8, 65536}}) {
    const auto p = memory_of(rows, heads, slots);
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

TEST(Schedule, CutsManyRowsForTheCacheAndFewNever) {
  const auto* kernels = kernels_of("default", Type::float32);
  const auto many = memory_of(1 << 20, 1, 64), few = memory_of(4096, 1, 65536);
  const int64_t row_bytes = 65 * sizeof(float), cached = 4 * caches().second / row_bytes;
  const auto forward = schedule_forward(many, *kernels, 2).chunk_rows;
  EXPECT_GE(forward, 4096);
  EXPECT_LE(2 * forward, std::max<int64_t>(2 * 4096, cached));  // both sides have parts
  const auto backward = schedule_backward(many, *kernels, 1);
  EXPECT_TRUE(backward.together);
  EXPECT_GE(backward.chunk_rows, 4096);
  EXPECT_LE(backward.chunk_rows, std::max<int64_t>(2 * 4096, cached));
  EXPECT_EQ(schedule_forward(few, *kernels, 2).chunk_rows, 4096);
  EXPECT_EQ(schedule_backward(few, *kernels, 2).chunk_rows, 4096);
  const auto many_keys = memory_of(32768, 1, 65536);
  EXPECT_EQ(schedule_backward(many_keys, *kernels, 1).chunk_rows, 32768);
}

}  // namespace
