#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>

/// What the meta rooms of all ops share.
namespace mixhead::meta {

/// The gradient of an argument where it is wanted, else what backward ops give in its place.
inline at::Tensor gradient(
    bool wanted, const std::optional<at::Tensor>& of, const at::Tensor& query) {
  return wanted ? at::empty_symint(of->sym_sizes(), of->options())
                : at::empty({0}, query.options());
}

}  // namespace mixhead::meta
