#include "kernel_attention/log_kernel.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "dense.h"

namespace mixhead::kernels {
namespace {

using chunked::Chunk;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Rows of length 1; a zero row stays zero, with derivative 0.
Tensor unit(const Tensor& x) {
  const auto square = (x * x).sum(-1, /*keepdim=*/true);
  return x / square.masked_fill(square == 0, 1.0).sqrt();
}

/// log K of a distance kernel from u^2. Where u = 0 the branch taken has the kernel's own first and
/// second derivatives there; laplacian has a cusp, and the subgradient 0.
Tensor log_of_squared_distance(Kernel kernel, const Tensor& u2) {
  const auto at_zero = u2 == 0;
  const auto u = u2.masked_fill(at_zero, 1.0).sqrt();
  const auto inside = [&](const Tensor& x) { return x.masked_fill(u2 >= 1.0, 0.0); };
  const auto compact = [&](const Tensor& log) { return log.masked_fill(u2 >= 1.0, -kInfinity); };
  switch (kernel) {
    case Kernel::gaussian:
      return u2 * -0.5;
    case Kernel::laplacian:
      return (-u).masked_fill(at_zero, 0.0);
    case Kernel::matern32: {
      const auto s = u * std::sqrt(3.0);
      return at::where(at_zero, u2 * -1.5, s.log1p() - s);
    }
    case Kernel::matern52: {
      const auto s = u * std::sqrt(5.0);
      return at::where(at_zero, u2 * (-5.0 / 6.0), (s + s * s / 3.0).log1p() - s);
    }
    case Kernel::cauchy:
      return -u2.log1p();
    case Kernel::epanechnikov:
      return compact((-inside(u2)).log1p());
    case Kernel::tricube:
      return compact((-inside(u2 * u.masked_fill(at_zero, 0.0))).log1p() * 3.0);
    case Kernel::boxcar:
      return (u2.detach() * 0.0).masked_fill(u2 > 1.0, -kInfinity);
    case Kernel::dot:
    case Kernel::cosine:
      break;
  }
  TORCH_INTERNAL_ASSERT(false, "not a distance kernel");
}

Tensor log_kernel(Kernel kernel, const Tensor& query, const Tensor& key, const Tensor& bandwidth) {
  if (is_distance(kernel)) {
    return log_of_squared_distance(kernel, squared_distance(query, key, bandwidth));
  }
  const auto precision = bandwidth.pow(-2.0);
  if (kernel == Kernel::dot) return dense::products(query * precision, key);
  return dense::products(unit(query), unit(key)) * dense::grouped(precision, key.size(1));
}

/// The part of a per-query operand that belongs to one query head.
Tensor one_head(const Tensor& per_query, int64_t head) {
  return per_query.size(1) == 1 ? per_query : per_query.narrow(1, head, 1);
}

/// `each(kernel, query, key, bandwidth)` of every query head with its own kernel, joined along
/// dimension 1; at once where all heads of the chunk have the same. `key` may be undefined.
Tensor of_each_head(
    const std::vector<Kernel>& kernels, const Tensor& query, const Tensor& key,
    const Tensor& bandwidth, const Chunk& chunk,
    const std::function<Tensor(Kernel, const Tensor&, const Tensor&, const Tensor&)>& each) {
  if (kernels.size() == 1) return each(kernels[0], query, key, bandwidth);
  const auto query_heads = query.size(1), groups = query_heads / chunk.heads;
  const auto* own = kernels.data() + chunk.head * groups;
  if (std::all_of(own, own + query_heads, [&](Kernel kernel) { return kernel == *own; })) {
    return each(*own, query, key, bandwidth);
  }
  std::vector<Tensor> parts;
  parts.reserve(query_heads);
  for (int64_t head = 0; head < query_heads; ++head) {
    parts.push_back(each(
        own[head], one_head(query, head), key.defined() ? key.narrow(1, head / groups, 1) : key,
        one_head(bandwidth, head)));
  }
  return at::cat(parts, 1);
}

Tensor log_kernel_at_query(Kernel kernel, const Tensor& query, const Tensor& bandwidth) {
  switch (kernel) {
    case Kernel::dot: {
      const auto scaled = query / bandwidth;
      return (scaled * scaled).sum(-1, /*keepdim=*/true);
    }
    case Kernel::cosine: {
      const auto cosine = (query != 0).any(-1, /*keepdim=*/true).to(query.scalar_type());
      return cosine * bandwidth.pow(-2.0);
    }
    default:
      return at::zeros_like(query.narrow(-1, 0, 1));
  }
}

}  // namespace

std::vector<Kernel> kernels_named(const c10::List<std::string>& names) {
  std::vector<Kernel> kernels;
  kernels.reserve(names.size());
  for (const std::string& name : names) kernels.push_back(*kernel_named(name));
  return kernels;
}

bool is_distance(Kernel kernel) { return traits(kernel).distance; }

Tensor bandwidth_operand(const Tensor& bandwidth) {
  if (!bandwidth.defined()) return bandwidth;
  if (bandwidth.dim() == 2) return bandwidth.unsqueeze(1);
  return bandwidth.reshape({-1, 1, 1});
}

Tensor squared_distance(const Tensor& query, const Tensor& key, const Tensor& bandwidth) {
  const auto q = dense::grouped(query, key.size(1)).unsqueeze(-2);
  const auto k = key.unsqueeze(2).unsqueeze(2);
  const auto h = dense::grouped(bandwidth, key.size(1)).unsqueeze(-2);
  const auto difference = (q - k) / h;
  return (difference * difference).sum(-1);
}

Tensor log_kernels(
    const std::vector<Kernel>& kernels, const Tensor& query, const Tensor& key,
    const Tensor& bandwidth, const Chunk& chunk) {
  auto scores = of_each_head(kernels, query, key, bandwidth, chunk, log_kernel);
  if (scores.size(1) == key.size(1)) return scores;
  return scores.squeeze(2).unflatten(1, {key.size(1), scores.size(1) / key.size(1)});
}

Tensor log_kernels_at_query(
    const std::vector<Kernel>& kernels, const Tensor& query, const Tensor& bandwidth,
    const Chunk& chunk) {
  return of_each_head(
      kernels, query, {}, bandwidth, chunk,
      [](Kernel kernel, const Tensor& q, const Tensor& /*key*/, const Tensor& h) {
        return log_kernel_at_query(kernel, q, h);
      });
}

}  // namespace mixhead::kernels
