// KernelMultiheadAttention of LibTorch against torch::nn::MultiheadAttention, against its formula
// written densely, and its checkpoints against Python's.
#include <gtest/gtest.h>
#include <torch/script.h>
#include <torch/torch.h>

#include <cmath>
#include <sstream>

#include "layer_testing.h"
#include "mixhead/mixhead.h"

namespace {

using layer_testing::checkpoints;
using layer_testing::expect_close;
using layer_testing::expect_error;
using layer_testing::random;
using layer_testing::read_dict;
using layer_testing::written;
using mixhead::nn::KernelMultiheadAttention;
using mixhead::nn::KernelMultiheadAttentionImpl;
using torch::Tensor;
using Options = mixhead::nn::KernelMultiheadAttentionOptions;

constexpr int64_t kEmbed = 12, kHeads = 4, kLength = 5, kKeys = 70, kBatch = 3;

KernelMultiheadAttention randomized(const Options& options) {
  KernelMultiheadAttention layer(options);
  layer->to(torch::kFloat64);
  torch::NoGradGuard no_grad;
  for (auto& parameter : layer->named_parameters()) {
    if (parameter.key() != "log_bandwidth") {
      parameter.value().normal_(0, 0.5);
    }
  }
  return layer;
}

TEST(KernelLayer, DotEqualsTorch) {
  torch::manual_seed(1);
  for (const int64_t width : {kEmbed, int64_t{8}}) {
    torch::nn::MultiheadAttention peer(
        torch::nn::MultiheadAttentionOptions(kEmbed, kHeads).kdim(width).vdim(width));
    peer->to(torch::kFloat64);
    auto ours = randomized(Options(kEmbed, kHeads).kdim(width).vdim(width).kernel({"dot"}));
    {
      torch::NoGradGuard no_grad;
      const auto parameters = ours->named_parameters();
      for (auto& parameter : peer->named_parameters()) {
        parameter.value().copy_(parameters[parameter.key()]);
      }
    }
    const Tensor query = random({kLength, kBatch, kEmbed});
    const Tensor key = random({kKeys, kBatch, width}), value = random({kKeys, kBatch, width});
    Tensor padding = torch::zeros({kBatch, kKeys}, torch::kBool);
    padding.index_put_({1, torch::indexing::Slice(-2)}, true);
    const Tensor mask = random({kLength, kKeys});
    auto [expected, expected_weights] = peer(query, key, value, padding, true, mask, false);
    auto [output, weights] = ours(query, key, value, padding, true, mask, false);
    expect_close(output, expected);
    expect_close(weights, expected_weights);
    EXPECT_FALSE(std::get<1>(ours(query, key, value, padding, false)).defined());
  }
}

TEST(KernelLayer, GaussianAndLaplacianHeadsOfTheirOwnBandwidths) {
  torch::manual_seed(2);
  const Tensor bandwidth = torch::rand({2, 6}, torch::kFloat64) + 0.5;
  auto layer = randomized(
      Options(kEmbed, 2).batch_first(true).kernel({"gaussian", "laplacian"}).bandwidth(bandwidth));
  expect_close(layer->bandwidth(), bandwidth, 1e-6);  // log_bandwidth began in float32
  const Tensor query = random({kBatch, kLength, kEmbed}), key = random({kBatch, kKeys, kEmbed});
  auto [output, weights] = layer->forward(query, key, key, {}, true, {}, false);

  const auto rows = layer->in_proj_weight.chunk(3), biases = layer->in_proj_bias.chunk(3);
  const auto project = [&](const Tensor& tokens, int64_t part, int64_t head) {
    const auto linear = torch::nn::functional::linear(tokens, rows[part], biases[part]);
    return linear.narrow(-1, 6 * head, 6);
  };
  std::vector<Tensor> heads, all_weights;
  for (int64_t head = 0; head < 2; ++head) {
    const Tensor h = std::pow(6.0, 0.25) * layer->log_bandwidth[head].exp();
    const Tensor difference =
        (project(query, 0, head).unsqueeze(2) - project(key, 1, head).unsqueeze(1)) / h;
    const Tensor square = difference.square().sum(-1);
    const Tensor log_kernel = head == 0 ? -square / 2 : -square.sqrt();
    all_weights.push_back(torch::softmax(log_kernel, -1));
    heads.push_back(all_weights.back().matmul(project(key, 2, head)));
  }
  expect_close(output, layer->out_proj(torch::cat(heads, -1)));
  expect_close(weights, torch::stack(all_weights, 1));
}

TEST(KernelLayer, BatchFirstUnbatchedGroupedAndCausal) {
  torch::manual_seed(3);
  auto layer = randomized(Options(kEmbed, kHeads).batch_first(true).num_kv_heads(2));
  const Tensor query = random({kBatch, kLength, kEmbed}), key = random({kBatch, kKeys, kEmbed});
  auto [output, weights] = layer(query, key, key);
  auto [single, single_weights] = layer(query[1], key[1], key[1]);
  expect_close(single, output[1]);
  expect_close(single_weights, weights[1]);
  layer->options.batch_first(false);
  auto [transposed, same] = layer(query.transpose(0, 1), key.transpose(0, 1), key.transpose(0, 1));
  expect_close(transposed.transpose(0, 1), output);
  const Tensor future = torch::ones({kLength, kKeys}, torch::kBool).triu(kKeys - kLength + 1);
  auto [causal, causal_weights] =
      layer->forward(query[0], key[0], key[0], {}, true, {}, true, true);
  auto [masked, masked_weights] = layer->forward(query[0], key[0], key[0], {}, true, future);
  expect_close(causal, masked);
  expect_close(causal_weights, masked_weights);
}

TEST(KernelLayer, GradientsReachEveryParameter) {
  torch::manual_seed(4);
  auto layer = randomized(Options(kEmbed, kHeads));
  auto [output, weights] = layer(
      random({kLength, kBatch, kEmbed}), random({kKeys, kBatch, kEmbed}),
      random({kKeys, kBatch, kEmbed}));
  (output.square().sum() + weights.square().sum()).backward();
  for (const auto& parameter : layer->named_parameters()) {
    EXPECT_GT(parameter.value().grad().abs().max().item<double>(), 1e-6) << parameter.key();
  }
}

TEST(KernelLayer, ClonesPrintsAndRunsInSequential) {
  for (const bool learn : {true, false}) {
    auto layer =
        randomized(Options(kEmbed, kHeads).bandwidth(torch::tensor(2.0)).learn_bandwidth(learn));
    EXPECT_EQ(layer->named_parameters().contains("log_bandwidth"), learn);
    EXPECT_EQ(layer->named_buffers().contains("log_bandwidth"), !learn);
    const auto copy = std::dynamic_pointer_cast<KernelMultiheadAttentionImpl>(layer->clone());
    const Tensor tokens = random({kLength, kBatch, kEmbed});
    const auto expected = std::get<0>(layer(tokens, tokens, tokens));
    expect_close(std::get<0>(copy->forward(tokens, tokens, tokens)), expected);
    torch::nn::AnyModule any(layer);
    using Result = std::tuple<Tensor, Tensor>;
    expect_close(std::get<0>(any.forward<Result>(tokens, tokens, tokens)), expected);
    std::ostringstream text;
    text << layer;
    EXPECT_NE(text.str().find("num_heads=4"), std::string::npos) << text.str();
    EXPECT_NE(text.str().find("gaussian"), std::string::npos) << text.str();
  }
}

TEST(KernelLayer, RefusesBadArguments) {
  const auto with = [&](auto change) {
    Options options(kEmbed, kHeads);
    change(options);
    return [options] { KernelMultiheadAttention layer(options); };
  };
  const std::string name = "KernelMultiheadAttention: ";
  expect_error(with([](Options& o) { o.num_heads(5); }), name + "embed_dim must be a multiple");
  expect_error(
      with([](Options& o) { o.kernel({"dot", "dot"}); }),
      name + "kernel must be one name or one for each of 4 heads, got 2");
  expect_error(with([](Options& o) { o.kernel({"box"}); }), "'boxcar', got 'box'");
  expect_error(
      with([](Options& o) { o.bandwidth(torch::tensor(-1.0)); }),
      name + "bandwidth must be positive and finite, got -1");
  expect_error(
      with([](Options& o) { o.bandwidth(torch::ones(3)); }),
      name + "bandwidth must be a number, (4,) or (4, 3), got [3]");
  expect_error(
      with([](Options& o) { o.kernel({"cosine"}).bandwidth(torch::ones({4, 3})); }),
      "with kernel 'cosine', got one per channel [4, 3]");
  KernelMultiheadAttention layer(kEmbed, kHeads);
  const Tensor query = torch::randn({kLength, kBatch, kEmbed});
  expect_error(
      [&] { layer(query, query, query, torch::zeros({kBatch, 2})); },
      name + "key_padding_mask must have shape [3, 5], got [3, 2]");
}

KernelMultiheadAttention checkpoint_layer() {
  KernelMultiheadAttention layer(Options(8, 2)
                                     .batch_first(true)
                                     .kernel({"gaussian", "laplacian"})
                                     .bandwidth(torch::ones({2, 4})));
  layer->eval();
  return layer;
}

TEST(Checkpoint, KernelLayerOfPythonLoadsAndGoesBack) {
  auto layer = checkpoint_layer();
  mixhead::nn::load_state_dict(*layer, checkpoints() / "kernel_layer_state.pt");
  const auto example = read_dict(checkpoints() / "kernel_layer_example.pt");
  const Tensor tokens = example.at("tokens").toTensor();
  auto [output, weights] = layer(tokens, tokens, tokens);
  expect_close(output, example.at("output").toTensor(), 1e-5);
  expect_close(weights, example.at("weights").toTensor(), 1e-5);
  {
    torch::NoGradGuard no_grad;
    for (Tensor& parameter : layer->parameters()) {
      parameter.mul_(-2);
    }
  }
  mixhead::nn::save_state_dict(*layer, written() / "kernel_layer_from_cpp.pt");
}

TEST(Checkpoint, StateDictOfTorchLoadsAndKeepsTheBandwidth) {
  torch::nn::MultiheadAttention peer(8, 2);
  const std::string path = written() / "torch_state_for_kernels.pt";
  mixhead::nn::save_state_dict(*peer, path);
  for (const bool learn : {true, false}) {
    KernelMultiheadAttention layer(
        Options(8, 2).bandwidth(torch::tensor({0.5, 2.0})).learn_bandwidth(learn));
    mixhead::nn::load_state_dict(*layer, path);
    EXPECT_TRUE(torch::equal(layer->in_proj_weight, peer->in_proj_weight));
    expect_close(layer->bandwidth(), torch::tensor({0.5f, 2.0f}), 1e-6);
  }
}

}  // namespace
