#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <mixhead/mixhead.h>

namespace {

using at::Tensor;

const auto kDouble = at::TensorOptions().dtype(at::kDouble);

/// exp(f_i + log K_ij + g_j) of the gaussian kernel, every pair stored.
Tensor plan_of(
    const Tensor& query, const Tensor& key, double h, const Tensor& row, const Tensor& column) {
  const auto scores = at::cdist(query, key).square() / (-2 * h * h);
  return (row.unsqueeze(-1) + scores + column.unsqueeze(-2)).exp();
}

TEST(MatchingAttention, PlanHasItsMassesAndGivesTheOutput) {
  at::manual_seed(0);
  const auto query = at::randn({2, 3, 6, 4}, kDouble), key = at::randn({2, 3, 5, 4}, kDouble);
  const auto value = at::randn({2, 3, 5, 7}, kDouble);
  const auto row_mass = at::rand({6}, kDouble) + 0.5, column_mass = at::rand({5}, kDouble) + 0.5;
  const auto [output, row, column] = mixhead::matching_attention(
      query, key, value, at::scalar_tensor(1.5, kDouble), {"gaussian"},
      {.row_mass = row_mass, .column_mass = column_mass, .iterations = 2000, .tolerance = 1e-13});
  const auto plan = plan_of(query, key, 1.5, row, column);
  const auto scaled = column_mass * (row_mass.sum() / column_mass.sum());
  EXPECT_TRUE(at::allclose(plan.sum(-1), row_mass.expand({2, 3, 6}), 1e-10, 1e-10));
  EXPECT_TRUE(at::allclose(plan.sum(-2), scaled.expand({2, 3, 5}), 1e-10, 1e-10));
  const auto mean = at::matmul(plan, value) / row_mass.unsqueeze(-1);
  EXPECT_TRUE(at::allclose(output, mean, 1e-10, 1e-10));
}

TEST(MatchingAttention, SmallBandwidthConvergesByNewton) {
  at::manual_seed(1);
  const auto query = at::randn({1, 64, 2}, kDouble), key = at::randn({1, 64, 2}, kDouble);
  const double h = 0.12;
  const auto [output, row, column] = mixhead::matching_attention(
      query, key, key, at::scalar_tensor(h, kDouble), {"gaussian"},
      {.iterations = 500, .tolerance = 1e-7});
  const auto missed = (plan_of(query, key, h, row, column).sum(-2) - 1).abs().max();
  EXPECT_LE(missed.item<double>(), 1e-6);
}

TEST(MatchingAttention, DustbinTakesWhatHasNoPartner) {
  const auto near = at::zeros({1, 1, 2}), far = at::full({1, 1, 2}, 50.0);
  const auto query = at::cat({near, far}, 1), key = near;
  const auto [output, row, column] = mixhead::matching_attention(
      query, key, at::ones({1, 1, 1}), at::scalar_tensor(0.1), {"gaussian"},
      {.dustbin = at::scalar_tensor(-4.0), .iterations = 200});
  EXPECT_GT((output[0][0].item<float>()), 0.8F);
  EXPECT_LT((output[0][1].item<float>()), 1e-6F);
}

TEST(MatchingAttention, NamesTheWrongArgument) {
  const auto x = at::randn({2, 4, 3});
  try {
    mixhead::matching_attention(x, x, x, std::nullopt, {"gaussian"}, {.row_mass = at::ones({5})});
    FAIL();
  } catch (const c10::Error& error) {
    EXPECT_STREQ(
        error.what_without_backtrace(),
        "matching_attention: row_mass must broadcast to (2, 4), got (5,)");
  }
}

}  // namespace
