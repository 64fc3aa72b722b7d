#include "kernel_attention/weights.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>

#include "kernel_attention/op.h"

namespace mixhead::kernels {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Keys in a block. The values of a block are its identity matrix, so a block costs as many
/// channels.
constexpr int64_t kBlock = 64;

/// The entries of `tensor` along `dim` (-1 or -2) in blocks, the number of the block in front:
/// (blocks, ..., kBlock, ...), zero (false) after the last. By index, as a view in blocks would
/// bind a captured graph to the length at hand.
Tensor in_blocks(const Tensor& tensor, int64_t dim, const Tensor& position) {
  c10::SymDimVector one(tensor.sym_sizes().begin(), tensor.sym_sizes().end());
  one[one.size() + dim] = 1;
  const auto with_zero = at::cat({tensor, at::zeros_symint(one, tensor.options())}, dim);
  c10::List<std::optional<Tensor>> index;
  for (int64_t i = 0; i < tensor.dim() + dim; ++i) index.push_back(std::nullopt);
  index.push_back(position.clamp_max(at::Scalar(tensor.sym_size(dim))));
  return with_zero.index(index).movedim(tensor.dim() + dim, 0);
}

/// `mask` with dimensions of size 1 after the first until it has `dims`.
Tensor aligned(Tensor mask, int64_t dims) {
  while (mask.dim() < dims) mask = mask.unsqueeze(1);
  return mask;
}

/// What each block may read, (blocks, ..., L or 1, kBlock), for queries of `dims` dimensions.
Tensor block_mask(
    const OptionalTensor& attn_mask, bool is_causal, int64_t dims, const c10::SymInt& rows,
    const c10::SymInt& keys, const Tensor& position) {
  auto mask = (position < at::Scalar(keys)).unsqueeze(1);
  if (is_causal) {
    const auto row = at::arange(at::Scalar(rows), position.options()).unsqueeze(-1);
    mask = mask.logical_and(position.unsqueeze(1) <= row + at::Scalar(keys - rows));
  }
  mask = aligned(mask, dims + 1);
  if (!attn_mask) return mask;
  c10::SymDimVector sizes(attn_mask->sym_sizes().begin(), attn_mask->sym_sizes().end());
  sizes.back() = keys;
  const auto given = aligned(in_blocks(attn_mask->expand_symint(sizes), -1, position), dims + 1);
  return given.scalar_type() == at::kBool ? given.logical_and(mask)
                                          : given.masked_fill(mask.logical_not(), -kInfinity);
}

}  // namespace

// Of each block of keys kernel_attention itself gives the weights, as the values are the identity,
// and its share of the whole is exp(mass of the block - mass of all). So there is one definition of
// each kernel, and the cost is that of attention with kBlock channels.
Tensor weights(
    const Tensor& query, const Tensor& key, const Tensor& log_mass, const OptionalTensor& bandwidth,
    const Names& kernel, const OptionalTensor& attn_mask, bool is_causal, bool enable_gqa) {
  const auto rows = query.sym_size(-2), keys = key.sym_size(-2);
  // One more than the keys fill: a number never 1, for which a graph of any length is captured.
  const c10::SymInt blocks = (keys + (kBlock - 1)) / kBlock + 1;
  const auto integers = query.options().dtype(at::kLong);
  const auto position = at::arange(at::Scalar(blocks), integers).unsqueeze(-1) * kBlock +
                        at::arange(kBlock, integers);
  const auto key_blocks = in_blocks(key, -2, position);
  c10::SymDimVector identity(key_blocks.sym_sizes().begin(), key_blocks.sym_sizes().end());
  identity.back() = kBlock;
  c10::SymDimVector queries(query.sym_sizes().begin(), query.sym_sizes().end());
  queries.insert(queries.begin(), blocks);
  const auto [each, block_mass] = kernel_attention(
      query.unsqueeze(0).expand_symint(queries), key_blocks,
      at::eye(kBlock, query.options()).expand_symint(identity), bandwidth, kernel.vec(),
      {.attn_mask = block_mask(attn_mask, is_causal, query.dim(), rows, keys, position),
       .enable_gqa = enable_gqa});
  const auto whole = log_mass.masked_fill(log_mass == -kInfinity, 0.0).unsqueeze(0);
  const auto share = (block_mass - whole).exp().unsqueeze(-1);
  const auto padded = (each * share).movedim(0, -2).flatten(-2);
  return padded.index_select(-1, at::arange(at::Scalar(keys), integers)).to(query.dtype());
}

TORCH_LIBRARY_IMPL(mixhead, CompositeImplicitAutograd, m) {
  m.impl("_kernel_attention_weights", weights);
}

}  // namespace mixhead::kernels
