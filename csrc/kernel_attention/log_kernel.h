#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "chunked.h"
#include "kernel_attention/kernels.h"

/// The kernel functions in differentiable ATen calls, for the portable formulas of every op that
/// takes a kernel.
namespace mixhead::kernels {

using at::Tensor;

std::vector<Kernel> kernels_named(const c10::List<std::string>& names);

/// Whether K is a function of norm((q - k) / h), with K = 1 where q equals k.
bool is_distance(Kernel kernel);

/// A bandwidth (), (Hq,) or (Hq, D) as a per-query operand (Hq or 1, 1, D or 1); may be undefined.
Tensor bandwidth_operand(const Tensor& bandwidth);

/// u^2 (b, heads, groups, rows, keys), by subtraction: exact for near points far from the origin.
Tensor squared_distance(const Tensor& query, const Tensor& key, const Tensor& bandwidth);

/// log K (b, heads, groups, rows, keys) of the chunk's query (b, Hq, rows, D) and key
/// (b or 1, heads, S, D). `kernels`: one, or one for each query head of the whole problem.
Tensor log_kernels(
    const std::vector<Kernel>& kernels, const Tensor& query, const Tensor& key,
    const Tensor& bandwidth, const chunked::Chunk& chunk);

/// log K(q, q) (b, Hq, rows, 1); 0 for every distance kernel.
Tensor log_kernels_at_query(
    const std::vector<Kernel>& kernels, const Tensor& query, const Tensor& bandwidth,
    const chunked::Chunk& chunk);

}  // namespace mixhead::kernels
