#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "chunked.h"
#include "cpu/local_moments.h"
#include "cpu/regression_schedule.h"
#include "engine_call.h"
#include "kernel_attention/log_kernel.h"
#include "kernel_attention/plain.h"
#include "local_linear_attention/fit.h"
#include "wide_dtype.h"

/// local_linear_attention on the CPU: the engine finds the moments and their gradients, ATen solves
/// each row's least squares from them.
namespace mixhead::local_linear {
namespace {

using engine::run_items;

/// Channels up to which a panel's moments, D (D + Dv) a row, are worth the engine.
constexpr int64_t kMostChannels = 32;
/// Numbers that the moments of one chunk of rows and what is derived from them may take.
constexpr int64_t kBudget = int64_t{1} << 21;
/// Multiply-adds below which a second thread costs more than it brings.
constexpr int64_t kSerialWork = int64_t{1} << 19;

/// Whether the engine can: kernels of a distance, not too many channels, anything to do at all.
bool suits_engine(const Arguments& args) {
  const auto kernels = kernels::kernels_named(args.kernel);
  return args.query.size(-1) <= kMostChannels && args.query.numel() > 0 && args.key.numel() > 0 &&
         args.value.numel() > 0 &&
         std::all_of(kernels.begin(), kernels.end(), kernels::is_distance);
}

/// The engine's arguments: data (key, value) as the values of a kernel regression.
kernels::Arguments regression_of(const Arguments& args) {
  const auto wide = wide_dtype(args.query);
  const auto key = args.key.detach().to(wide);
  return {
      .query = args.query.detach().to(wide),
      .key = key,
      .value = at::cat({key, args.value.detach().to(wide)}, -1),
      .bandwidth = args.bandwidth,
      .kernel = args.kernel,
      .attn_mask = args.attn_mask,
      .is_causal = args.is_causal,
      .exclude_self = args.exclude_self,
      .normalize = true,
      .empty = "zero",
      .dropout_p = 0.0,
      .seed = std::nullopt,
      .enable_gqa = false};
}

/// Of a chunk of rows, (B..., H, rows, X) each; `second` as one dimension.
struct ChunkMoments {
  Tensor mean, second, log_mass;
};

/// Where wanted: by the query, by the data (splits, key units, keys, wide), by the bandwidth
/// (heads, channels).
struct DataGradients {
  Tensor query, data;
  std::vector<double> bandwidth;
};

/// One call on the engine, chunk of rows by chunk, so that memory does not grow with the rows.
class Engine {
 public:
  explicit Engine(const Arguments& args)
      : regression_(regression_of(args)), plain_(regression_), ridge_(args.ridge) {
    const auto& p = plain_.problem();
    channels_ = p.channels;
    wide_ = p.value_channels;
    const int64_t pairs = plain_.rows() * p.source[0].keys;
    parallel_ = threads_ > 1 && pairs * (channels_ * wide_ + 32) > kSerialWork;
    const int64_t each = p.batch * p.key_heads * 12 * (channels_ + 1) * wide_;
    chunk_rows_ = std::clamp<int64_t>(kBudget / each, 1, p.rows);
    plain_.summarise(parallel_);
  }

  template <class Visit>
  void for_each_chunk(const Visit& visit) {
    const int64_t rows = plain_.problem().rows;
    for (int64_t row = 0; row < rows; row += chunk_rows_) {
      visit(cpu::Chunk{row, std::min(chunk_rows_, rows - row)});
    }
  }

  ChunkMoments moments(const cpu::Chunk& chunk) const {
    const ChunkMoments found{empty(chunk, wide_), empty(chunk, channels_ * wide_), empty(chunk, 1)};
    const cpu::LocalMoments work{
        cut(chunk), chunk, found.mean.data_ptr(), found.second.data_ptr(),
        found.log_mass.data_ptr()};
    const auto& functions = plain_.functions();
    run_items(
        work.forward.units * work.forward.row_blocks, parallel_,
        functions.local_moments_scratch(work),
        [&](int64_t i, void* scratch) { functions.local_moments_item(work, i, scratch); });
    return found;
  }

  /// The least squares of the rows as a function of their moments.
  chunked::Problem least_squares(const cpu::Chunk& chunk, const ChunkMoments& moments) const {
    chunked::Problem problem(
        moments.mean, moments.mean.size(-3), channels_ * (4 * channels_ + 2 * wide_), 0);
    const auto query = regression_.query.narrow(-2, chunk.first_row, chunk.rows);
    for (const auto& each : {moments.mean, moments.second, moments.log_mass, query}) {
      problem.operands.push_back({each, chunked::Axes::query});
    }
    problem.formula = [d = channels_, wide = wide_, ridge = ridge_](
                          const std::vector<Tensor>& in, const chunked::Chunk& /*chunk*/) {
      const auto& mean = in[0];
      const auto second = in[1].unflatten(-1, {d, wide});
      return fit(
          {.mean = mean.narrow(-1, 0, d).unsqueeze(-1),
           .covariance = second.narrow(-1, 0, d),
           .value = mean.narrow(-1, d, wide - d).unsqueeze(-2),
           .cross = second.narrow(-1, d, wide - d),
           .query = in[3].unsqueeze(-1)},
          in[2], at::zeros_like(in[2]), ridge);
    };
    return problem;
  }

  /// Adds a chunk's part, from the gradients by its moments.
  void add_gradients(
      const cpu::Chunk& chunk, const ChunkMoments& moments, const std::vector<Tensor>& by_moments,
      DataGradients& sums) const {
    const auto &by_mean = by_moments[0], &by_log_mass = by_moments[2];
    const auto by_second = by_moments[1].unflatten(-1, {channels_, wide_});
    const auto by_covariance = by_second.narrow(-1, 0, channels_);
    const auto quadratic = at::cat(
        {by_covariance + by_covariance.transpose(-2, -1),
         by_second.narrow(-1, channels_, wide_ - channels_)},
        -1);
    const auto delta = (by_moments[1] * moments.second).sum(-1, /*keepdim=*/true) - by_log_mass;
    cpu::LocalGradient work{};
    work.forward = cut(chunk);
    work.chunk = chunk;
    work.row_splits = work.forward.row_blocks;
    work.mean = moments.mean.const_data_ptr();
    work.log_mass = moments.log_mass.const_data_ptr();
    work.linear = by_mean.const_data_ptr();
    work.quadratic = quadratic.const_data_ptr();
    work.delta = delta.const_data_ptr();
    Tensor by_query;
    if (sums.query.defined()) {
      by_query = empty(chunk, channels_);
      work.grad_query = by_query.data_ptr();
    }
    if (sums.data.defined()) {
      work.grad_data = sums.data.data_ptr();
      work.row_splits = std::min(sums.data.size(0), work.forward.row_blocks);
    }
    const int64_t items = work.forward.units * work.row_splits;
    std::vector<double> by_bandwidth(sums.bandwidth.empty() ? 0 : items * channels_, 0.0);
    if (!by_bandwidth.empty()) work.grad_bandwidth = by_bandwidth.data();
    const auto& functions = plain_.functions();
    run_items(
        items, parallel_, functions.local_gradient_scratch(work),
        [&](int64_t i, void* scratch) { functions.local_gradient_item(work, i, scratch); });
    if (by_query.defined()) sums.query.narrow(-2, chunk.first_row, chunk.rows).copy_(by_query);
    for (size_t i = 0; i < by_bandwidth.size(); ++i) {
      const int64_t item = static_cast<int64_t>(i) / channels_;
      const int64_t head = item / work.row_splits % plain_.problem().key_heads;
      sums.bandwidth[head * channels_ + i % channels_] += by_bandwidth[i];
    }
  }

  DataGradients zero_gradients(const OutputMask& wanted) const {
    const auto& p = plain_.problem();
    const int64_t units = cpu::key_units(p);
    DataGradients sums;
    if (wanted[0]) sums.query = at::empty_like(regression_.query);
    if (wanted[1] || wanted[2]) {
      const int64_t splits = parallel_ ? at::divup(2 * threads_, units) : 1;
      sums.data = at::zeros({splits, units, p.source[0].keys, wide_}, regression_.query.options());
    }
    if (wanted[3]) sums.bandwidth.assign(p.key_heads * channels_, 0.0);
    return sums;
  }

 private:
  Tensor empty(const cpu::Chunk& chunk, int64_t columns) const {
    const auto& query = regression_.query;
    at::DimVector sizes(query.sizes().begin(), query.sizes().end() - 2);
    sizes.push_back(chunk.rows);
    sizes.push_back(columns);
    return at::empty(sizes, query.options());
  }

  cpu::RegressionForward cut(const cpu::Chunk& chunk) const {
    cpu::RegressionForward work{};
    work.regression = plain_.regression();
    cpu::split_local(plain_.functions(), parallel_ ? threads_ : 1, chunk.rows, work);
    return work;
  }

  const kernels::Arguments regression_;
  kernels::Plain plain_;
  const double ridge_;
  const int64_t threads_ = at::get_num_threads();
  int64_t channels_, wide_, chunk_rows_;
  bool parallel_;
};

std::vector<Tensor> narrowed(std::vector<Tensor> rows, const cpu::Chunk& chunk) {
  for (auto& each : rows) each = each.narrow(-2, chunk.first_row, chunk.rows);
  return rows;
}

Forward forward_cpu(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& attn_mask, bool is_causal, bool exclude_self,
    double ridge) {
  const Arguments args{query,     key,       value,        bandwidth, kernel,
                       attn_mask, is_causal, exclude_self, ridge};
  check(args);
  if (!suits_engine(args) || reads_around_nan(args, {})) return forward_portable(args);
  const auto outputs = empty_outputs(args);
  const auto rows = as_rows(outputs);
  Engine engine(args);
  engine.for_each_chunk([&](const cpu::Chunk& chunk) {
    chunked::forward(engine.least_squares(chunk, engine.moments(chunk)), narrowed(rows, chunk));
  });
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

Gradients backward_cpu(
    const Tensor& grad_output, const Tensor& grad_slope, const Tensor& grad_leverage,
    const Tensor& grad_log_mass, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& bandwidth, const Names& kernel, const OptionalTensor& attn_mask,
    bool is_causal, bool exclude_self, double ridge, OutputMask output_mask) {
  const Arguments args{query,     key,       value,        bandwidth, kernel,
                       attn_mask, is_causal, exclude_self, ridge};
  const Grads grads{grad_output, grad_slope, grad_leverage, grad_log_mass};
  // A mask's gradient is as large as the scores: the portable path has it.
  if (!suits_engine(args) || output_mask[4] || reads_around_nan(args, grads)) {
    return backward_portable(grads, args, output_mask);
  }
  const auto rows = as_rows(grads);
  Engine engine(args);
  auto sums = engine.zero_gradients(output_mask);
  engine.for_each_chunk([&](const cpu::Chunk& chunk) {
    const auto moments = engine.moments(chunk);
    const auto by_moments = chunked::backward(
        engine.least_squares(chunk, moments), narrowed(rows, chunk), {true, true, true, false});
    engine.add_gradients(chunk, moments, by_moments, sums);
  });
  Tensor by_data;
  if (sums.data.defined()) {
    at::DimVector sizes(key.sizes().begin(), key.sizes().end() - 1);
    sizes.push_back(sums.data.size(-1));
    by_data = sums.data.sum(0).view(sizes);
  }
  const auto none = at::empty({0}, query.options());
  std::array<Tensor, kDifferentiable> g{none, none, none, none, none};
  const int64_t channels = query.size(-1);
  if (output_mask[0]) g[0] = sums.query.to(query.scalar_type());
  if (output_mask[1]) g[1] = by_data.narrow(-1, 0, channels).to(query.scalar_type()).contiguous();
  if (output_mask[2]) {
    g[2] = by_data.narrow(-1, channels, value.size(-1)).to(query.scalar_type()).contiguous();
  }
  if (output_mask[3]) {
    g[3] = at::empty(bandwidth->sizes(), bandwidth->options());
    kernels::write_bandwidth(sums.bandwidth, query.size(-3), g[3]);
  }
  return {g[0], g[1], g[2], g[3], g[4]};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixhead, CPU, m) {
  m.impl("_local_linear_attention_forward", forward_cpu);
  m.impl("_local_linear_attention_backward", backward_cpu);
}

}  // namespace mixhead::local_linear
