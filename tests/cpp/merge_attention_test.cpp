// merge_attention from C++ against softmax attention over the union of the keys.
#include <gtest/gtest.h>
#include <mixhead/mixhead.h>
#include <torch/torch.h>

#include <limits>

namespace {

using torch::Tensor;

const auto kDouble = torch::TensorOptions().dtype(torch::kDouble);

std::pair<Tensor, Tensor> dense(const Tensor& query, const Tensor& key, const Tensor& value) {
  const auto scores = torch::matmul(query, key.transpose(-1, -2));
  return {torch::matmul(scores.softmax(-1), value), scores.logsumexp(-1)};
}

struct Union {
  Tensor query = torch::randn({2, 3, 5, 8}, kDouble).requires_grad_();
  Tensor key = torch::randn({2, 3, 12, 8}, kDouble).requires_grad_();
  Tensor value = torch::randn({2, 3, 12, 4}, kDouble).requires_grad_();

  std::tuple<Tensor, Tensor> merged(const std::vector<int64_t>& sizes) const {
    std::vector<Tensor> outputs, lses;
    const auto keys = key.split_with_sizes(sizes, -2), values = value.split_with_sizes(sizes, -2);
    for (size_t i = 0; i < sizes.size(); ++i) {
      const auto [output, lse] = dense(query, keys[i], values[i]);
      outputs.push_back(output);
      lses.push_back(lse);
    }
    return mixhead::merge_attention(outputs, lses);
  }
};

TEST(MergeAttention, IsAttentionOverTheUnion) {
  torch::manual_seed(0);
  const Union all;
  const auto [expected, expected_lse] = dense(all.query, all.key, all.value);
  for (const auto& sizes : std::vector<std::vector<int64_t>>{{12}, {1, 11}, {3, 4, 5}}) {
    const auto [output, lse] = all.merged(sizes);
    EXPECT_TRUE(torch::allclose(output, expected, 1e-10, 1e-10));
    EXPECT_TRUE(torch::allclose(lse, expected_lse, 1e-10, 1e-10));
  }
}

TEST(MergeAttention, GradientsAreThoseOfTheUnion) {
  torch::manual_seed(0);
  const Union all;
  const auto gradients = [&](const Tensor& output, const Tensor& lse) {
    return torch::autograd::grad(
        {output.square().sum() + lse.sin().sum()}, {all.query, all.key, all.value});
  };
  const auto [output, lse] = all.merged({5, 7});
  const auto [expected_output, expected_lse] = dense(all.query, all.key, all.value);
  const auto got = gradients(output, lse), expected = gradients(expected_output, expected_lse);
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_TRUE(torch::allclose(got[i], expected[i], 1e-10, 1e-10)) << i;
  }
}

TEST(MergeAttention, RowsThatReadNothing) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto output = torch::tensor({{3.0}, {0.0}}), nothing = torch::zeros({2, 1});
  const auto lse = torch::tensor({2.0, -kInfinity}), none = torch::full({2}, -kInfinity);
  const auto [merged, merged_lse] = mixhead::merge_attention({output, nothing}, {lse, none});
  EXPECT_TRUE(torch::equal(merged, output));
  EXPECT_TRUE(torch::equal(merged_lse, lse));
}

TEST(MergeAttention, ErrorsNameTheArgument) {
  const auto output = torch::zeros({2, 5, 4}), lse = torch::zeros({2, 5});
  const auto message = [](auto&&... arguments) -> std::string {
    try {
      mixhead::merge_attention(arguments...);
    } catch (const c10::Error& error) {
      return error.what_without_backtrace();
    }
    return "no error";
  };
  using List = std::vector<Tensor>;
  EXPECT_EQ(
      message(List{output, output.narrow(-1, 0, 3)}, List{lse, lse}),
      "merge_attention: outputs[1] must have shape (2, 5, 4) like outputs[0], got (2, 5, 3)");
  EXPECT_EQ(
      message(List{output, output}, List{lse}),
      "merge_attention: lses must hold 2 tensors like outputs, got 1");
}

}  // namespace
