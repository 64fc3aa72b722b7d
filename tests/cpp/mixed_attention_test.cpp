// mixed_attention from C++ against dense ATen calls in float64.
#include <gtest/gtest.h>
#include <mixhead/mixhead.h>
#include <torch/script.h>
#include <torch/torch.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <thread>

namespace {

using mixhead::MixedAttentionOptions;
using torch::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
const auto kDouble = torch::TensorOptions().dtype(torch::kDouble);

struct Inputs {
  Tensor query = torch::randn({2, 4, 5, 8}, kDouble);
  Tensor key = torch::randn({2, 4, 7, 8}, kDouble);
  Tensor value = torch::randn({2, 4, 7, 6}, kDouble);
  Tensor memory_key = torch::randn({4, 9, 8}, kDouble);
  Tensor memory_value = torch::randn({4, 9, 6}, kDouble);
  Tensor mix = torch::randn({4, 1, 1}, kDouble);

  std::vector<Tensor> all() const { return {query, key, value, memory_key, memory_value, mix}; }
  Inputs require_grad() {
    for (auto tensor : all()) tensor.requires_grad_();
    return *this;
  }
  Inputs to(torch::ScalarType dtype) const {
    return {query.to(dtype),      key.to(dtype),          value.to(dtype),
            memory_key.to(dtype), memory_value.to(dtype), mix.to(dtype)};
  }
};

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

Outputs run(const Inputs& in, const MixedAttentionOptions& options = {}) {
  return mixhead::mixed_attention(
      in.query, in.key, in.value, in.memory_key, in.memory_value, in.mix, options);
}

/// Softmax attention and its log-sum-exp for scores that already hold every mask.
std::pair<Tensor, Tensor> attend(const Tensor& scores, const Tensor& value) {
  return {torch::matmul(scores.softmax(-1), value), scores.logsumexp(-1, /*keepdim=*/true)};
}

/// The definition, dense; `self_bias` and `memory_bias` add to the scores (-inf: may not read).
Outputs dense(
    const Inputs& in, bool joint, const Tensor& self_bias, const Tensor& memory_bias,
    double scale = 1.0 / std::sqrt(8.0)) {
  const auto self_scores = torch::matmul(in.query, in.key.transpose(-1, -2)) * scale + self_bias;
  const auto memory_scores =
      torch::matmul(in.query, in.memory_key.transpose(-1, -2)) * scale + memory_bias;
  const auto [self, self_lse] = attend(self_scores, in.value);
  const auto [memory, memory_lse] = attend(memory_scores, in.memory_value);
  const auto w = torch::sigmoid(joint ? in.mix + memory_lse - self_lse : in.mix);
  return {(1 - w) * self + w * memory, self_lse.squeeze(-1), memory_lse.squeeze(-1)};
}

const Tensor kNone = torch::zeros({}, kDouble);

void expect_near(const Outputs& got, const Outputs& expected, double tolerance = 1e-10) {
  const auto near = [&](const Tensor& a, const Tensor& b) {
    return torch::allclose(a.to(torch::kDouble), b, tolerance, tolerance);
  };
  EXPECT_TRUE(near(std::get<0>(got), std::get<0>(expected))) << "output";
  EXPECT_TRUE(near(std::get<1>(got), std::get<1>(expected))) << "self_lse";
  EXPECT_TRUE(near(std::get<2>(got), std::get<2>(expected))) << "memory_lse";
}

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

class MixedAttention : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(0);
    in = Inputs();
  }
  Inputs in;
};

TEST_F(MixedAttention, DefaultOptionsAreAGateWithoutMasks) {
  expect_near(run(in), dense(in, false, kNone, kNone));
}

TEST_F(MixedAttention, Joint) {
  expect_near(run(in, {.rule = "joint"}), dense(in, true, kNone, kNone));
}

TEST_F(MixedAttention, JointIsScaledDotProductAttentionOverBothKeySets) {
  const auto memory_key = in.memory_key.expand({2, 4, 9, 8});
  const auto memory_value = in.memory_value.expand({2, 4, 9, 6});
  const auto bias = torch::cat({torch::zeros({4, 1, 7}, kDouble), in.mix.expand({4, 1, 9})}, -1);
  const auto expected = at::scaled_dot_product_attention(
      in.query, torch::cat({in.key, memory_key}, -2), torch::cat({in.value, memory_value}, -2),
      bias.expand({2, 4, 5, 16}));
  EXPECT_TRUE(torch::allclose(std::get<0>(run(in, {.rule = "joint"})), expected, 1e-10, 1e-10));
}

TEST_F(MixedAttention, EveryOptionReachesTheOp) {
  const auto attn_mask = torch::randn({5, 7}, kDouble);
  auto memory_mask = torch::rand({2, 1, 1, 9}, kDouble) > 0.4;
  memory_mask.select(-1, 0).fill_(true);
  const auto closed = torch::where(memory_mask, 0.0, -kInfinity);
  const auto later = torch::arange(7) > torch::arange(5).unsqueeze(-1) + 2;
  const auto causal = torch::where(later, -kInfinity, 0.0);
  expect_near(
      run(in, {.rule = "joint",
               .attn_mask = attn_mask,
               .memory_mask = memory_mask,
               .is_causal = true,
               .scale = 0.3}),
      dense(in, true, attn_mask + causal, closed, 0.3));
}

TEST_F(MixedAttention, NamedSlots) {
  const auto index = torch::randint(-1, 9, {2, 4, 5, 3}, torch::kLong);
  index.select(-1, 0).clamp_(0);
  // A slot named n times counts n times: log n in the scores.
  const auto named = torch::one_hot(index.clamp_min(0), 9) * (index >= 0).unsqueeze(-1);
  const auto counted = named.sum(-2).to(torch::kDouble).log();
  expect_near(run(in, {.memory_index = index}), dense(in, false, kNone, counted));
}

TEST_F(MixedAttention, GroupedHeads) {
  auto grouped = in;
  grouped.key = in.key.narrow(1, 0, 2).contiguous();
  grouped.value = in.value.narrow(1, 0, 2).contiguous();
  grouped.memory_key = in.memory_key.narrow(0, 0, 2).contiguous();
  grouped.memory_value = in.memory_value.narrow(0, 0, 2).contiguous();
  auto repeated = grouped;
  repeated.key = grouped.key.repeat_interleave(2, 1);
  repeated.value = grouped.value.repeat_interleave(2, 1);
  repeated.memory_key = grouped.memory_key.repeat_interleave(2, 0);
  repeated.memory_value = grouped.memory_value.repeat_interleave(2, 0);
  expect_near(run(grouped, {.enable_gqa = true}), dense(repeated, false, kNone, kNone));
}

TEST_F(MixedAttention, GradientsOfBothRules) {
  in.require_grad();
  auto bias = torch::randn({5, 7}, kDouble).requires_grad_();
  auto memory_bias = torch::randn({4, 1, 9}, kDouble).requires_grad_();
  auto wanted = in.all();
  wanted.insert(wanted.end(), {bias, memory_bias});
  const auto gradients = [&](const Outputs& outputs) {
    const auto& [output, self_lse, memory_lse] = outputs;
    const auto loss = output.square().sum() + self_lse.sin().sum() + memory_lse.cos().sum();
    return torch::autograd::grad({loss}, wanted);
  };
  for (const bool joint : {false, true}) {
    const auto got = gradients(
        run(in, {.rule = joint ? "joint" : "gate", .attn_mask = bias, .memory_mask = memory_bias}));
    const auto expected = gradients(dense(in, joint, bias, memory_bias));
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_TRUE(torch::allclose(got[i], expected[i], 1e-10, 1e-10)) << i << " joint " << joint;
    }
  }
}

TEST_F(MixedAttention, SecondDerivative) {
  in.require_grad();
  const auto second = [&](const Outputs& outputs) {
    const auto loss = std::get<0>(outputs).pow(3).sum();
    auto sum = torch::zeros({}, kDouble);
    for (const auto& grad : torch::autograd::grad({loss}, in.all(), {}, true, true)) {
      sum = sum + grad.square().sum();
    }
    return torch::autograd::grad({sum}, in.all());
  };
  const auto got = second(run(in, {.rule = "joint"}));
  const auto expected = second(dense(in, true, kNone, kNone));
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_TRUE(torch::allclose(got[i], expected[i], 1e-8, 1e-8)) << i;
  }
}

TEST_F(MixedAttention, Precisions) {
  const std::pair<torch::ScalarType, double> precisions[] = {
      {torch::kFloat, 1e-5}, {torch::kBFloat16, 1.6e-2}, {torch::kHalf, 2e-3}};
  for (const auto& [dtype, tolerance] : precisions) {
    const auto rounded = in.to(dtype);
    const auto outputs = run(rounded);
    EXPECT_EQ(std::get<0>(outputs).scalar_type(), dtype);
    EXPECT_EQ(std::get<1>(outputs).scalar_type(), torch::kFloat);
    EXPECT_EQ(std::get<2>(outputs).scalar_type(), torch::kFloat);
    expect_near(outputs, dense(rounded.to(torch::kDouble), false, kNone, kNone), tolerance);
  }
}

TEST_F(MixedAttention, SidesThatReadNothing) {
  auto empty = in;
  empty.memory_key = in.memory_key.narrow(-2, 0, 0);
  empty.memory_value = in.memory_value.narrow(-2, 0, 0);
  for (const char* rule : {"gate", "joint"}) {
    const auto [output, self_lse, memory_lse] = run(empty, {.rule = rule});
    const auto expected = at::scaled_dot_product_attention(in.query, in.key, in.value);
    EXPECT_TRUE(torch::allclose(output, expected, 1e-10, 1e-10)) << rule;
    EXPECT_TRUE((memory_lse == -kInfinity).all().item<bool>()) << rule;
    const auto nothing = torch::zeros({7}, torch::kBool);
    const auto [zero, lse, other] = run(empty, {.rule = rule, .attn_mask = nothing});
    EXPECT_TRUE((zero == 0).all().item<bool>()) << rule;
    EXPECT_TRUE((lse == -kInfinity).all().item<bool>()) << rule;
  }
}

TEST_F(MixedAttention, DropoutFollowsTheManualSeed) {
  const auto with_seed = [&](uint64_t seed) {
    torch::manual_seed(seed);
    return std::get<0>(run(in, {.dropout_p = 0.5}));
  };
  EXPECT_TRUE(torch::equal(with_seed(1), with_seed(1)));
  EXPECT_FALSE(torch::equal(with_seed(1), with_seed(2)));
  EXPECT_FALSE(torch::equal(with_seed(1), std::get<0>(run(in))));
}

TEST_F(MixedAttention, InferenceModeGivesTheSameBits) {
  const auto expected = run(in.require_grad());
  const c10::InferenceMode guard;
  const auto outputs = run(in);
  EXPECT_FALSE(std::get<0>(outputs).requires_grad());
  EXPECT_TRUE(torch::equal(std::get<0>(outputs), std::get<0>(expected).detach()));
}

TEST_F(MixedAttention, CallsFromSeveralThreads) {
  const auto expected = std::get<0>(run(in));
  std::vector<char> equal(4, 0);
  std::vector<std::thread> threads;
  for (char& each : equal) {
    threads.emplace_back([&] {
      each = 1;
      for (int i = 0; i < 20; ++i) {
        each = each && torch::allclose(std::get<0>(run(in)), expected, 1e-12, 1e-12);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (const char each : equal) EXPECT_TRUE(each);
}

TEST_F(MixedAttention, ErrorsNameWhatCame) {
  auto bad = in;
  bad.memory_key = torch::zeros({4, 9, 3}, kDouble);
  EXPECT_EQ(
      error_of([&] { run(bad); }),
      "mixed_attention: memory_key must have 8 channels like query, got (4, 9, 3)");
  EXPECT_EQ(
      error_of([&] { run(in, {.rule = "sum"}); }),
      "mixed_attention: rule must be \"gate\" or \"joint\", got \"sum\"");
  EXPECT_EQ(
      error_of([&] { run(in, {.dropout_p = 1.5}); }),
      "mixed_attention: dropout_p must be in [0, 1], got 1.5");
  const auto index = torch::full({2, 4, 5, 1}, 9, torch::kLong);
  EXPECT_EQ(
      error_of([&] { run(in, {.memory_index = index}); }),
      "mixed_attention: memory_index must name slots in [-1, 9), got values from 9 to 9");
}

// A model scripted in Python (tests/data/make_head.py) carries its inputs and what Python answered.
TEST(SavedModel, AnswersAsInPython) {
  const auto folder = std::filesystem::path(__FILE__).parent_path().parent_path() / "data";
  auto model = torch::jit::load((folder / "head.pt").string());
  for (const char* rule : {"gate", "joint"}) {
    const auto output = model.run_method("forward_with_rule", std::string(rule)).toTensor();
    const auto expected = model.attr(std::string("expected_") + rule).toTensor();
    EXPECT_TRUE(torch::allclose(output, expected, 1e-5, 1e-6)) << rule;
    EXPECT_GT(expected.abs().max().item<float>(), 0.1f);
  }
}

}  // namespace
