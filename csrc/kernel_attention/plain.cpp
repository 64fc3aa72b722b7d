#include "kernel_attention/plain.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>

#include <cmath>

#include "kernel_attention/kernels.h"
#include "wide_dtype.h"

namespace mixhead::kernels {
namespace {

using engine::allocate;

/// 1 / h as (query heads, channels), in float64.
Tensor inverse_bandwidth(const Arguments& args) {
  const auto heads = args.query.size(-3), channels = args.query.size(-1);
  const auto options = args.query.options().dtype(at::kDouble);
  if (!args.bandwidth) {
    return at::full({heads, channels}, std::pow(static_cast<double>(channels), -0.25), options);
  }
  auto inverse = args.bandwidth->detach().to(at::kDouble).reciprocal();
  if (inverse.dim() < 2) inverse = inverse.reshape({-1, 1});
  return inverse.expand({heads, channels}).contiguous();
}

}  // namespace

Plain::Plain(const Arguments& args)
    : views_(args.query.sizes().slice(0, args.query.dim() - 3)),
      accumulator_(wide_dtype(args.query)),
      functions_(cpu::regression_kernels(engine::type_of(accumulator_))) {
  auto& p = regression_.problem;
  const int64_t heads = args.query.size(-3), keys = args.key.size(-2);
  p.type = engine::type_of(args.query.scalar_type());
  p.batch = views_.batch();
  p.key_heads = args.key.size(-3);
  p.groups = heads / p.key_heads;
  p.rows = args.query.size(-2);
  p.channels = args.query.size(-1);
  p.value_channels = args.value.size(-1);
  p.query = view(args.query, p.channels);
  auto& source = p.source[0];
  source.key = views_.view(args.key, p.key_heads, keys, p.channels);
  source.value = views_.view(args.value, p.key_heads, keys, p.value_channels);
  source.keys = source.slots = keys;
  source.shared = args.key.dim() == 3;
  source.causal = args.is_causal;
  source.mask = views_.mask(args.attn_mask, heads, p.rows, keys);
  if (args.dropout_p > 0.0) {
    p.dropout.on = true;
    p.dropout.seed = args.seed->item<int64_t>();
    p.dropout.threshold = static_cast<uint64_t>(args.dropout_p * 4294967296.0);
    p.dropout.keep_scale = args.dropout_p < 1.0 ? 1.0 / (1.0 - args.dropout_p) : 0.0;
  }

  bool compact = false;
  for (const std::string& name : args.kernel) kernels_.push_back(*kernel_named(name));
  kernels_.resize(heads, kernels_[0]);
  for (const auto kernel : kernels_) compact |= traits(kernel).compact;
  regression_.kernel = kernels_.data();
  const auto inverse = inverse_bandwidth(args);
  inverse_ = inverse.to(accumulator_);
  regression_.inverse_bandwidth = inverse_.const_data_ptr();
  for (int64_t head = 0; head < heads; ++head) {
    const double first = p.channels > 0 ? inverse.const_data_ptr<double>()[head * p.channels] : 1.0;
    precision_.push_back(first * first);
  }
  regression_.precision = precision_.data();
  const int64_t units = cpu::key_units(p), bytes = functions_.accumulator_bytes;
  centre_ = allocate(units * p.channels * bytes);
  regression_.centre = centre_.get();
  regression_.box_keys = cpu::regression_block(functions_);
  if (compact) {
    const int64_t blocks = (keys + regression_.box_keys - 1) / regression_.box_keys;
    boxes_ = allocate(units * blocks * 2 * p.channels * bytes);
    regression_.boxes = boxes_.get();
  }
  regression_.normalize = args.normalize;
  regression_.exclude_self = args.exclude_self;
  regression_.nan_where_empty = args.empty == "nan";
}

void write_bandwidth(std::vector<double>& all, int64_t heads, const Tensor& gradient) {
  const auto channels = static_cast<int64_t>(all.size()) / heads;
  const auto found =
      at::from_blob(all.data(), {heads, channels}, at::TensorOptions().dtype(at::kDouble));
  const auto dim = gradient.dim();
  gradient.copy_(dim == 2 ? found : dim == 1 ? found.sum(-1) : found.sum());
}

}  // namespace mixhead::kernels
