// The LibTorch layer against torch::nn::MultiheadAttention, against its formulas written densely,
// and its checkpoints against Python's.
#include <gtest/gtest.h>
#include <torch/script.h>
#include <torch/torch.h>

#include <filesystem>
#include <fstream>
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
using mixhead::nn::MixedMultiheadAttention;
using mixhead::nn::MixedMultiheadAttentionOptions;
using torch::Tensor;

constexpr int64_t kEmbed = 12, kHeads = 4, kLength = 5, kKeys = 6, kBatch = 3, kSlots = 7;

MixedMultiheadAttention randomized(const MixedMultiheadAttentionOptions& options) {
  MixedMultiheadAttention layer(options);
  layer->to(torch::kFloat64);
  torch::NoGradGuard no_grad;
  for (Tensor& parameter : layer->parameters()) {
    parameter.normal_(0, 0.5);
  }
  return layer;
}

// ---- against torch::nn::MultiheadAttention
// -------------------------------------------------------

struct TorchCase {
  const char* name;
  bool bias = true;
  int64_t kdim = kEmbed;
  int64_t vdim = kEmbed;
  bool padding = false;
  bool mask = false;
  bool float_mask = false;
  bool need_weights = true;
  bool average = true;
  bool add_bias_kv = false;
  bool add_zero_attn = false;
};

class EqualsTorch : public testing::TestWithParam<TorchCase> {};

TEST_P(EqualsTorch, WithoutMemory) {
  const TorchCase& c = GetParam();
  torch::manual_seed(1);
  torch::nn::MultiheadAttention peer(torch::nn::MultiheadAttentionOptions(kEmbed, kHeads)
                                         .bias(c.bias)
                                         .kdim(c.kdim)
                                         .vdim(c.vdim)
                                         .add_bias_kv(c.add_bias_kv)
                                         .add_zero_attn(c.add_zero_attn));
  peer->to(torch::kFloat64);
  auto ours = randomized(MixedMultiheadAttentionOptions(kEmbed, kHeads)
                             .bias(c.bias)
                             .kdim(c.kdim)
                             .vdim(c.vdim)
                             .add_bias_kv(c.add_bias_kv)
                             .add_zero_attn(c.add_zero_attn));
  {
    torch::NoGradGuard no_grad;
    auto parameters = ours->named_parameters();
    for (auto& parameter : peer->named_parameters()) {
      parameter.value().copy_(parameters[parameter.key()]);
    }
  }
  const Tensor query = random({kLength, kBatch, kEmbed});
  const Tensor key = random({kKeys, kBatch, c.kdim}), value = random({kKeys, kBatch, c.vdim});
  Tensor padding, mask, peer_mask;
  if (c.padding) {
    padding = torch::zeros({kBatch, kKeys}, torch::kBool);
    padding.index_put_({1, torch::indexing::Slice(-2)}, true);
  }
  if (c.mask) {
    mask = random({kLength, kKeys});
    peer_mask = mask;
    if (!c.float_mask) {
      mask = mask > 0.5;
      mask.select(-1, 0).fill_(false);
      // torch::nn::MultiheadAttention adds every mask, also a bool one.
      peer_mask = torch::zeros(mask.sizes(), torch::kFloat64).masked_fill(mask, -INFINITY);
    }
  }
  auto [expected, expected_weights] =
      peer(query, key, value, padding, c.need_weights, peer_mask, c.average);
  auto [output, weights] = ours(query, key, value, padding, c.need_weights, mask, c.average);
  expect_close(output, expected);
  ASSERT_EQ(weights.defined(), c.need_weights);
  if (c.need_weights) {
    expect_close(weights, expected_weights);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Nn, EqualsTorch,
    testing::Values(
        TorchCase{.name = "plain"}, TorchCase{.name = "no_bias", .bias = false},
        TorchCase{.name = "widths", .kdim = 8, .vdim = 8},
        TorchCase{.name = "padding", .padding = true}, TorchCase{.name = "mask", .mask = true},
        TorchCase{.name = "float_mask", .mask = true, .float_mask = true},
        TorchCase{.name = "padding_and_mask", .padding = true, .mask = true},
        TorchCase{.name = "no_weights", .need_weights = false},
        TorchCase{.name = "weights_of_heads", .average = false},
        TorchCase{.name = "bias_kv", .padding = true, .add_bias_kv = true},
        TorchCase{.name = "zero_attn", .mask = true, .add_zero_attn = true},
        TorchCase{.name = "bias_kv_and_zero_attn", .add_bias_kv = true, .add_zero_attn = true}),
    [](const auto& test) { return test.param.name; });

// torch::nn::MultiheadAttention takes no mask per head, unlike Python's.
TEST(Nn, MaskPerHeadBlocksItsPairs) {
  torch::manual_seed(6);
  auto layer = randomized(MixedMultiheadAttentionOptions(kEmbed, kHeads));
  const Tensor query = random({kLength, kBatch, kEmbed}), key = random({kKeys, kBatch, kEmbed});
  Tensor mask = random({kBatch * kHeads, kLength, kKeys}) > 0.3;
  mask.select(-1, 0).fill_(false);
  Tensor padding = torch::zeros({kBatch, kKeys}, torch::kBool);
  padding.index_put_({1, 5}, true);
  auto [output, weights] = layer->forward(query, key, key, padding, true, mask, false);
  const Tensor blocked =
      mask.view({kBatch, kHeads, kLength, kKeys}) | padding.view({kBatch, 1, 1, kKeys});
  EXPECT_TRUE(torch::equal(weights == 0, blocked));
  expect_close(weights.sum(-1), torch::ones_like(weights.sum(-1)));
}

TEST(Nn, BatchFirstUnbatchedAndCausal) {
  torch::manual_seed(2);
  auto layer = randomized(MixedMultiheadAttentionOptions(kEmbed, kHeads).batch_first(true));
  const Tensor query = random({kBatch, kLength, kEmbed}), key = random({kBatch, kKeys, kEmbed});
  auto [output, weights] = layer(query, key, key);
  auto [single, single_weights] = layer(query[1], key[1], key[1]);
  expect_close(single, output[1]);
  expect_close(single_weights, weights[1]);
  layer->options.batch_first(false);
  auto [transposed, same] = layer(query.transpose(0, 1), key.transpose(0, 1), key.transpose(0, 1));
  expect_close(transposed.transpose(0, 1), output);
  expect_close(same, weights);
  // Bottom-right: the last query reads every key.
  const Tensor future = torch::ones({kLength, kKeys}, torch::kBool).triu(kKeys - kLength + 1);
  auto [causal, causal_weights] =
      layer->forward(query[0], key[0], key[0], {}, true, {}, true, true);
  auto [masked, masked_weights] = layer->forward(query[0], key[0], key[0], {}, true, future);
  expect_close(causal, masked);
  expect_close(causal_weights, masked_weights);
}

// ---- against the formulas
// ------------------------------------------------------------------------

void PrintTo(const TorchCase& c, std::ostream* stream) { *stream << c.name; }

struct MemoryCase {
  const char* name;
  const char* rule;
  const char* gate;
  const char* projection = "shared";
  int64_t kv_heads = kHeads;
  bool per_batch = false;
};

void PrintTo(const MemoryCase& c, std::ostream* stream) { *stream << c.name; }

class MemoryOf : public testing::TestWithParam<MemoryCase> {};

/// Scores (B, Hq, L, N) of query tokens and key tokens; key/value heads repeated for their group.
Tensor to_heads(const Tensor& tokens, const Tensor& weight, const Tensor& bias, int64_t heads) {
  Tensor projected = tokens.matmul(weight.t()) + bias;
  projected = torch::stack(projected.chunk(heads, -1), -3);
  return projected.repeat_interleave(kHeads / heads, -3);
}

TEST_P(MemoryOf, FollowsItsFormula) {
  const MemoryCase& c = GetParam();
  torch::manual_seed(3);
  auto layer = randomized(MixedMultiheadAttentionOptions(kEmbed, kHeads)
                              .batch_first(true)
                              .rule(c.rule)
                              .gate(c.gate)
                              .memory_projection(c.projection)
                              .num_kv_heads(c.kv_heads));
  const Tensor query = random({kBatch, kLength, kEmbed}), key = random({kBatch, kKeys, kEmbed});
  const Tensor memory = c.per_batch ? random({kBatch, kSlots, kEmbed}) : random({kSlots, kEmbed});
  const Tensor readable = torch::rand({kBatch, 1, kLength, kSlots}) < 0.7;
  auto [output, weights] =
      layer->forward(query, key, key, {}, true, {}, false, false, memory, readable);

  const int64_t kv = c.kv_heads * kEmbed / kHeads;
  const auto weight = layer->in_proj_weight.split_with_sizes({kEmbed, kv, kv});
  const auto bias = layer->in_proj_bias.split_with_sizes({kEmbed, kv, kv});
  const bool own = std::string(c.projection) == "own";
  const Tensor q = to_heads(query, weight[0], bias[0], kHeads) / std::sqrt(kEmbed / kHeads);
  const Tensor k = to_heads(key, weight[1], bias[1], c.kv_heads);
  const Tensor v = to_heads(key, weight[2], bias[2], c.kv_heads);
  const Tensor mk =
      own ? to_heads(memory, layer->memory_k_proj->weight, layer->memory_k_proj->bias, c.kv_heads)
          : to_heads(memory, weight[1], bias[1], c.kv_heads);
  const Tensor mv =
      own ? to_heads(memory, layer->memory_v_proj->weight, layer->memory_v_proj->bias, c.kv_heads)
          : to_heads(memory, weight[2], bias[2], c.kv_heads);
  Tensor mix = layer->mix;
  if (std::string(c.gate) == "token") {
    mix = mix + torch::einsum("blc,hc->bhl", {query, layer->mix_weight}).unsqueeze(-1);
  }
  const Tensor scores = q.matmul(k.transpose(-2, -1));
  const Tensor memory_scores =
      q.matmul(mk.transpose(-2, -1)).masked_fill(readable.logical_not(), -INFINITY);
  Tensor heads, expected_weights;
  if (std::string(c.rule) == "joint") {
    expected_weights = torch::cat({scores, memory_scores + mix}, -1).softmax(-1);
    heads = expected_weights.narrow(-1, 0, kKeys).matmul(v) +
            expected_weights.narrow(-1, kKeys, kSlots).matmul(mv);
  } else {
    const Tensor w = mix.sigmoid(), share = w.mean(-1, true);
    const Tensor self = scores.softmax(-1), memory_weights = memory_scores.softmax(-1);
    heads = (1 - w) * self.matmul(v) + w * memory_weights.matmul(mv);
    expected_weights = torch::cat({(1 - share) * self, share * memory_weights}, -1);
  }
  const Tensor concatenated = torch::cat(heads.unbind(1), -1);
  expect_close(output, concatenated.matmul(layer->out_proj->weight.t()) + layer->out_proj->bias);
  expect_close(weights, expected_weights);
  expect_close(weights.sum(-1), torch::ones_like(weights.sum(-1)));
}

INSTANTIATE_TEST_SUITE_P(
    Nn, MemoryOf,
    testing::Values(
        MemoryCase{"head", "gate", "head"}, MemoryCase{"token", "gate", "token"},
        MemoryCase{"channel", "gate", "channel"}, MemoryCase{"joint", "joint", "head"},
        MemoryCase{"joint_token", "joint", "token"}, MemoryCase{"own", "gate", "head", "own"},
        MemoryCase{"grouped", "joint", "head", "own", 2},
        MemoryCase{"per_batch", "gate", "token", "shared", 2, true}),
    [](const auto& test) { return test.param.name; });

TEST(Nn, GradientsReachEveryParameter) {
  torch::manual_seed(4);
  auto layer = randomized(
      MixedMultiheadAttentionOptions(kEmbed, kHeads).gate("token").memory_projection("own"));
  const Tensor tokens = random({kLength, kBatch, kEmbed});
  auto [output, weights] =
      layer->forward(tokens, tokens, tokens, {}, false, {}, true, false, random({kSlots, kEmbed}));
  EXPECT_FALSE(weights.defined());
  output.sin().sum().backward();
  for (const auto& parameter : layer->named_parameters()) {
    ASSERT_TRUE(parameter.value().grad().defined()) << parameter.key();
    // A softmax does not see what it adds to every key: there the gradient of the bias is 0.
    if (parameter.key() != "memory_k_proj.bias") {
      EXPECT_GT(parameter.value().grad().abs().max().item<double>(), 1e-6) << parameter.key();
    }
  }
}

TEST(Nn, DropoutOnlyInTraining) {
  torch::manual_seed(5);
  auto layer = randomized(MixedMultiheadAttentionOptions(kEmbed, kHeads).dropout(0.5));
  const Tensor tokens = random({kLength, kBatch, kEmbed});
  const auto run = [&] { return std::get<0>(layer(tokens, tokens, tokens)); };
  EXPECT_FALSE(torch::equal(run(), run()));
  layer->eval();
  EXPECT_TRUE(torch::equal(run(), run()));
}

TEST(Nn, ClonesPrintsAndRunsInSequential) {
  auto layer = randomized(MixedMultiheadAttentionOptions(kEmbed, kHeads).gate("channel"));
  const auto copy =
      std::dynamic_pointer_cast<mixhead::nn::MixedMultiheadAttentionImpl>(layer->clone());
  const Tensor tokens = random({kLength, kBatch, kEmbed});
  expect_close(
      std::get<0>(copy->forward(tokens, tokens, tokens)),
      std::get<0>(layer(tokens, tokens, tokens)));
  torch::nn::AnyModule any(layer);
  const auto outputs = any.forward<std::tuple<Tensor, Tensor>>(tokens, tokens, tokens);
  expect_close(std::get<0>(outputs), std::get<0>(layer(tokens, tokens, tokens)));
  std::ostringstream text;
  text << layer;
  EXPECT_NE(text.str().find("embed_dim=12, num_heads=4"), std::string::npos) << text.str();
  EXPECT_NE(text.str().find("gate='channel'"), std::string::npos) << text.str();
}

TEST(Nn, RefusesBadArguments) {
  const MixedMultiheadAttentionOptions good(kEmbed, kHeads);
  const auto with = [&](auto change) {
    MixedMultiheadAttentionOptions options = good;
    change(options);
    return [options] { MixedMultiheadAttention layer(options); };
  };
  using Options = MixedMultiheadAttentionOptions;
  expect_error(
      with([](Options& o) { o.num_heads(5); }), "embed_dim must be a multiple of num_heads");
  expect_error(with([](Options& o) { o.num_kv_heads(3); }), "got 4 and 3");
  expect_error(with([](Options& o) { o.kdim(0); }), "kdim must be positive, got 0");
  expect_error(with([](Options& o) { o.dropout(1.5); }), "dropout must be in [0, 1], got 1.5");
  expect_error(
      with([](Options& o) { o.rule("sum"); }), "rule must be one of 'gate', 'joint', got 'sum'");
  expect_error(with([](Options& o) { o.gate("layer"); }), "got 'layer'");
  expect_error(with([](Options& o) { o.memory_projection("no"); }), "got 'no'");
  expect_error(
      with([](Options& o) { o.rule("joint").gate("channel"); }),
      "gate='channel' needs rule='gate'");

  MixedMultiheadAttention layer(good);
  const Tensor query = torch::randn({kLength, kBatch, kEmbed});
  expect_error(
      [&] { layer(query[0][0], query, query); }, "query must have 2 or 3 dimensions, got [12]");
  expect_error(
      [&] { layer(query, query.narrow(2, 0, 4), query); },
      "key must have 3 dimensions, the last of 12, got [5, 3, 4]");
  expect_error(
      [&] {
        layer(query, query, query, torch::zeros({kBatch, 2}));
      },
      "key_padding_mask must have shape [3, 5], got [3, 2]");
  expect_error(
      [&] {
        layer->forward(query, query, query, {}, true, torch::zeros({2, 5}, torch::kBool));
      },
      "attn_mask must have shape [5, 5], got [2, 5]");
  expect_error(
      [&] {
        layer->forward(query, query, query, {}, true, {}, true, false, torch::zeros({kSlots, 5}));
      },
      "memory must be (M, 12) or (B, M, 12), got [7, 5]");
}

// ---- checkpoints
// ---------------------------------------------------------------------------------

MixedMultiheadAttention checkpoint_layer() {
  MixedMultiheadAttention layer(
      MixedMultiheadAttentionOptions(8, 2).batch_first(true).gate("token").memory_projection(
          "own"));
  layer->eval();
  return layer;
}

/// What Python computed with the layer it saved.
struct Example {
  Example() {
    const auto dict = read_dict(checkpoints() / "attention_example.pt");
    tokens = dict.at("tokens").toTensor();
    memory = dict.at("memory").toTensor();
    output = dict.at("output").toTensor();
    weights = dict.at("weights").toTensor();
  }
  Tensor tokens, memory, output, weights;
};

void expect_computes_the_example(MixedMultiheadAttention& layer) {
  const Example example;
  auto [output, weights] = layer->forward(
      example.tokens, example.tokens, example.tokens, {}, true, {}, true, false, example.memory);
  expect_close(output, example.output, 1e-5);
  expect_close(weights, example.weights, 1e-5);
}

TEST(Checkpoint, StateDictOfPythonLoads) {
  auto layer = checkpoint_layer();
  mixhead::nn::load_state_dict(*layer, checkpoints() / "attention_state.pt");
  expect_computes_the_example(layer);
}

TEST(Checkpoint, ScriptedLayerOfPythonLoadsAsLayerAndRuns) {
  const std::string path = checkpoints() / "attention_scripted.pt";
  auto layer = checkpoint_layer();
  torch::load(layer, path);
  expect_computes_the_example(layer);

  const Example example;
  auto scripted = torch::jit::load(path);
  const std::vector<c10::IValue> sequence(3, example.tokens);
  const auto outputs = scripted.forward(sequence, {{"memory", example.memory}});
  expect_close(outputs.toTuple()->elements()[0].toTensor(), example.output, 1e-5);
}

TEST(Checkpoint, StateDictGoesToPythonAndBack) {
  auto layer = checkpoint_layer();
  mixhead::nn::load_state_dict(*layer, checkpoints() / "attention_state.pt");
  {
    torch::NoGradGuard no_grad;
    for (Tensor& parameter : layer->parameters()) {
      parameter.mul_(-2);
    }
  }
  const std::string path = written() / "attention_from_cpp.pt";
  mixhead::nn::save_state_dict(*layer, path);
  torch::save(layer, written() / "attention_archive_from_cpp.pt");
  auto other = checkpoint_layer();
  mixhead::nn::load_state_dict(*other, path);
  const auto expected = layer->named_parameters();
  for (const auto& parameter : other->named_parameters()) {
    EXPECT_TRUE(torch::equal(parameter.value(), expected[parameter.key()])) << parameter.key();
  }
}

TEST(Checkpoint, StateDictOfTorchLoadsAndKeepsTheGate) {
  torch::nn::MultiheadAttention peer(8, 2);
  const std::string path = written() / "torch_state.pt";
  mixhead::nn::save_state_dict(*peer, path);
  MixedMultiheadAttention layer(MixedMultiheadAttentionOptions(8, 2).initial_mix(1.5));
  mixhead::nn::load_state_dict(*layer, path);
  EXPECT_TRUE(torch::equal(layer->in_proj_weight, peer->in_proj_weight));
  EXPECT_TRUE(torch::equal(layer->mix, torch::full({2, 1, 1}, 1.5)));
}

TEST(Checkpoint, RefusesWhatDoesNotFit) {
  const std::filesystem::path folder = testing::TempDir();
  const auto load = [](MixedMultiheadAttention layer, const std::string& path) {
    return [layer, path]() mutable { mixhead::nn::load_state_dict(*layer, path); };
  };
  const std::string saved = checkpoints() / "attention_state.pt";
  expect_error(load(checkpoint_layer(), folder / "absent.pt"), "can't read");
  const std::string garbage = folder / "garbage.pt";
  std::ofstream(garbage) << "not a checkpoint";
  expect_error(load(checkpoint_layer(), garbage), "is no dict of tensors");
  expect_error(load(MixedMultiheadAttention(8, 2), saved), "which the module has not");
  MixedMultiheadAttention wide(
      MixedMultiheadAttentionOptions(16, 2).gate("token").memory_projection("own"));
  const Tensor before = wide->in_proj_weight.clone();
  expect_error(load(wide, saved), "must have shape");
  EXPECT_TRUE(torch::equal(wide->in_proj_weight, before));
  MixedMultiheadAttention bare(MixedMultiheadAttentionOptions(8, 2).bias(false));
  const std::string without_bias = folder / "without_bias.pt";
  mixhead::nn::save_state_dict(*bare, without_bias);
  expect_error(load(MixedMultiheadAttention(8, 2), without_bias), "has no in_proj_bias");
  expect_error(
      [&] { mixhead::nn::save_state_dict(*bare, "/nowhere/at/all.pt"); },
      "save_state_dict: can't write '/nowhere/at/all.pt'");
}

}  // namespace
