// topk_keys from C++ against all scores sorted.
#include <gtest/gtest.h>
#include <mixhead/mixhead.h>
#include <torch/torch.h>

#include <limits>

namespace {

TEST(TopkKeys, AreTheHighestScores) {
  torch::manual_seed(0);
  const auto query = torch::randn({2, 4, 70, 24}), key = torch::randn({4, 3000, 24});
  const auto [scores, indices] = mixhead::topk_keys(query, key, 9);
  const auto all = torch::matmul(query, key.transpose(-2, -1));
  const auto [expected, places] = all.topk(9);
  EXPECT_TRUE(torch::allclose(scores, expected, 1e-5, 1e-5));
  EXPECT_TRUE(torch::allclose(all.gather(-1, indices), expected, 1e-5, 1e-5));
}

TEST(TopkKeys, OptionsArrive) {
  torch::manual_seed(0);
  const auto query = torch::randint(-3, 4, {1, 5, 6}).to(torch::kFloat);
  const auto key = torch::randint(-3, 4, {1, 30, 6}).to(torch::kFloat);
  const auto mask = torch::arange(30) < 4;
  const auto [scores, indices] = mixhead::topk_keys(query, key, 6, {.mask = mask, .metric = "l2"});
  const auto distance = torch::cdist(query, key.narrow(-2, 0, 4)).square().round();
  const auto [nearest, order] = distance.sort(/*stable=*/true, -1, /*descending=*/false);
  EXPECT_TRUE(torch::equal(scores.narrow(-1, 0, 4), -nearest));
  EXPECT_TRUE(torch::equal(indices.narrow(-1, 0, 4), order));
  EXPECT_TRUE(indices.narrow(-1, 4, 2).eq(-1).all().item<bool>());
  EXPECT_TRUE(
      scores.narrow(-1, 4, 2).eq(-std::numeric_limits<float>::infinity()).all().item<bool>());
}

TEST(TopkKeys, ErrorsNameTheArgument) {
  try {
    mixhead::topk_keys(torch::zeros({1, 5, 6}), torch::zeros({1, 30, 6}), 3, {.metric = "l1"});
    FAIL() << "no error";
  } catch (const c10::Error& error) {
    EXPECT_STREQ(
        error.what_without_backtrace(),
        "topk_keys: metric must be \"dot\", \"cosine\" or \"l2\", got \"l1\"");
  }
}

}  // namespace
