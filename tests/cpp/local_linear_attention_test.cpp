// local_linear_attention from C++ against torch::linalg least squares, query by query.
#include <gtest/gtest.h>
#include <mixhead/mixhead.h>
#include <torch/torch.h>

namespace {

using torch::Tensor;

const auto kDouble = torch::TensorOptions().dtype(torch::kDouble);

struct Points {
  Tensor query = torch::randn({2, 5, 3}, kDouble);
  Tensor key = torch::randn({2, 40, 3}, kDouble);
  Tensor value = torch::randn({2, 40, 4}, kDouble);
  Tensor bandwidth = torch::tensor({1.5, 2.0}, kDouble);
};

TEST(LocalLinearAttention, IsWeightedLeastSquares) {
  torch::manual_seed(0);
  const Points p;
  const auto [output, slope, leverage, log_mass] =
      mixhead::local_linear_attention(p.query, p.key, p.value, p.bandwidth, {"gaussian"});
  for (int64_t head = 0; head < 2; ++head) {
    for (int64_t row = 0; row < 5; ++row) {
      const auto offset = p.key[head] - p.query[head][row];
      const auto kernel = (offset / p.bandwidth[head]).square().sum(-1, true).mul(-0.5).exp();
      const auto root = kernel.sqrt();
      const auto design = torch::cat({torch::ones_like(root), offset}, -1) * root;
      const auto solution = std::get<0>(torch::linalg_lstsq(design, p.value[head] * root));
      EXPECT_TRUE(torch::allclose(output[head][row], solution[0], 1e-10, 1e-10));
      EXPECT_TRUE(torch::allclose(slope[head][row], solution.narrow(0, 1, 3), 1e-10, 1e-10));
      EXPECT_TRUE(torch::allclose(log_mass[head][row], kernel.sum().log(), 1e-10, 1e-10));
      const auto corner = design.t().mm(design).inverse()[0][0];
      EXPECT_TRUE(torch::allclose(leverage[head][row], corner, 1e-10, 1e-10));
    }
  }
}

TEST(LocalLinearAttention, OptionsArrive) {
  torch::manual_seed(0);
  const Points p;
  const auto kernels = std::vector<std::string>{"cauchy", "tricube"};
  const auto fit = [&](const mixhead::LocalLinearAttentionOptions& options) {
    return std::get<0>(
        mixhead::local_linear_attention(p.key, p.key, p.value, p.bandwidth, kernels, options));
  };
  const auto diagonal = torch::eye(40).to(torch::kBool);
  EXPECT_TRUE(
      torch::equal(fit({.exclude_self = true}), fit({.attn_mask = torch::logical_not(diagonal)})));
  EXPECT_TRUE(
      torch::equal(
          fit({.is_causal = true}),
          fit({.attn_mask = torch::ones({40, 40}).tril().to(torch::kBool)})));
  EXPECT_FALSE(torch::allclose(fit({.ridge = 1.0}), fit({})));
}

TEST(LocalLinearAttention, ErrorsNameTheArgument) {
  const Points p;
  try {
    mixhead::local_linear_attention(
        p.query, p.key, p.value, p.bandwidth, {"gaussian"}, {.ridge = -1.0});
    FAIL() << "no error";
  } catch (const c10::Error& error) {
    EXPECT_STREQ(
        error.what_without_backtrace(),
        "local_linear_attention: ridge must be finite and at least 0, got -1");
  }
}

}  // namespace
