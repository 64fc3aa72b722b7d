#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

/// How the arguments that every op with a kernel function has are judged.
namespace mixhead::kernel_checks {

using at::Tensor;

/// key and value: points of query's channels, shared by the batch or given for each entry.
void points(
    const char* op, const Tensor& query, const Tensor& key, const Tensor& value, bool enable_gqa);

/// kernel: one known name, or one for each query head.
void names(const char* op, const Tensor& query, const c10::List<std::string>& kernel);

/// bandwidth: (), (Hq,) or (Hq, D), positive. Reads its values only where it has them.
void bandwidth(
    const char* op, const Tensor& query, const c10::List<std::string>& kernel,
    const std::optional<Tensor>& bandwidth);

/// What each query may read: exclude_self needs as many keys as queries, attn_mask broadcasts.
void readable(
    const char* op, const Tensor& query, const Tensor& key, bool exclude_self,
    const std::optional<Tensor>& attn_mask);

}  // namespace mixhead::kernel_checks
