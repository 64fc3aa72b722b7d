#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <sstream>
#include <string>

#include "transforms.h"

/// How an argument is judged and how the error reads:
/// `op: argument must <what was expected>, got <what came>`.
///
/// Sizes are compared as SymInt, so that the same checks serve real tensors, Meta and export.
namespace mixhead::checks {

using at::Tensor;

#define MIXHEAD_CHECK(condition, op, ...) TORCH_CHECK(condition, op, ": ", __VA_ARGS__)

/// "(8, 4096, 32)".
inline std::string shape(c10::SymIntArrayRef sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}
inline std::string shape(const Tensor& tensor) { return shape(tensor.sym_sizes()); }

/// Equality; on sizes not yet known (export) it becomes an assertion at run time.
inline bool equal(const c10::SymInt& a, const c10::SymInt& b) {
  return a.sym_eq(b).expect_true(__FILE__, __LINE__);
}

inline bool is_one(const c10::SymInt& a) { return a.sym_eq(1).guard_or_false(__FILE__, __LINE__); }

inline bool at_least_one(const c10::SymInt& a) {
  return a.sym_ge(1).expect_true(__FILE__, __LINE__);
}

/// Whether `tensor` broadcasts to `target`, PyTorch's rules, without enlarging `target`.
inline bool broadcasts_to(const Tensor& tensor, c10::SymIntArrayRef target) {
  const auto sizes = tensor.sym_sizes();
  if (sizes.size() > target.size()) return false;
  for (size_t i = 1; i <= sizes.size(); ++i) {
    const auto& size = sizes[sizes.size() - i];
    if (!is_one(size) && !equal(size, target[target.size() - i])) return false;
  }
  return true;
}

inline bool same_shape(const Tensor& tensor, c10::SymIntArrayRef sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (!equal(tensor.sym_size(static_cast<int64_t>(i)), sizes[i])) return false;
  }
  return true;
}

/// The first tensor of an op: a dense tensor of a floating type with at least `dims` dimensions.
inline void floating(const char* op, const char* name, const Tensor& tensor, int64_t dims) {
  const auto dtype = tensor.scalar_type();
  MIXHEAD_CHECK(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
      op, name, " must be float32, float64, bfloat16 or float16, got ", dtype);
  MIXHEAD_CHECK(
      tensor.dim() >= dims, op, name, " must have at least ", dims, " dimensions, got ",
      shape(tensor));
}

/// A dense tensor on the device of `first`.
inline void beside(
    const char* op, const char* name, const Tensor& tensor, const Tensor& first,
    const char* first_name) {
  MIXHEAD_CHECK(
      tensor.layout() == at::kStrided, op, name, " must be a dense tensor, got layout ",
      tensor.layout());
  MIXHEAD_CHECK(
      tensor.device() == first.device(), op, name, " must be on ", first.device(), " like ",
      first_name, ", got ", tensor.device());
}

/// Beside `first`, and of the same dtype, or float32 where `float32_too`.
inline void companion(
    const char* op, const char* name, const Tensor& tensor, const Tensor& first,
    const char* first_name, bool float32_too = false) {
  beside(op, name, tensor, first, first_name);
  MIXHEAD_CHECK(
      tensor.scalar_type() == first.scalar_type() ||
          (float32_too && tensor.scalar_type() == at::kFloat),
      op, name, " must be ", first.scalar_type(), " like ", first_name,
      float32_too ? " or float32" : "", ", got ", tensor.scalar_type());
}

/// A mask: bool, or additive in the query's dtype or float32; broadcasts to `target`.
inline void mask(
    const char* op, const char* name, const Tensor& tensor, const Tensor& query,
    c10::SymIntArrayRef target) {
  if (tensor.scalar_type() == at::kBool) {
    beside(op, name, tensor, query, "query");
  } else {
    MIXHEAD_CHECK(
        at::isFloatingType(tensor.scalar_type()), op, name, " must be bool or floating, got ",
        tensor.scalar_type());
    companion(op, name, tensor, query, "query", /*float32_too=*/true);
  }
  MIXHEAD_CHECK(
      broadcasts_to(tensor, target), op, name, " must broadcast to ", shape(target), ", got ",
      shape(tensor));
}

/// A query: floating, dense, (B..., Hq, L, D) with at least one head and one channel.
inline void query(const char* op, const Tensor& query) {
  floating(op, "query", query, 3);
  MIXHEAD_CHECK(
      query.layout() == at::kStrided, op, "query must be a dense tensor, got layout ",
      query.layout());
  MIXHEAD_CHECK(
      at_least_one(query.sym_size(-1)) && at_least_one(query.sym_size(-3)), op,
      "query must have at least one head and one channel, got ", shape(query));
}

/// Leading dimensions (batch) of `tensor` equal those of query.
inline void batch(const char* op, const char* name, const Tensor& tensor, const Tensor& query) {
  bool same = tensor.dim() == query.dim();
  for (int64_t i = 0; same && i < query.dim() - 3; ++i) {
    same = equal(tensor.sym_size(i), query.sym_size(i));
  }
  MIXHEAD_CHECK(
      same, op, name, " must have the batch dimensions of query ", shape(query), ", got ",
      shape(tensor));
}

/// The heads of `key` are those of query, or divide them with enable_gqa.
inline void key_heads(
    const char* op, const char* name, const Tensor& key, const Tensor& query, bool enable_gqa) {
  const auto& heads = key.sym_size(-3);
  if (enable_gqa) {
    MIXHEAD_CHECK(
        at_least_one(heads) && equal(query.sym_size(-3) % heads, 0), op, name,
        " must have a number of heads that divides query's ", query.sym_size(-3),
        " with enable_gqa, got ", shape(key));
  } else {
    MIXHEAD_CHECK(
        equal(heads, query.sym_size(-3)), op, name, " must have ", query.sym_size(-3),
        " heads like query (or set enable_gqa), got ", shape(key));
  }
}

/// Points shared by the batch (H, S, X) or given for each entry (B..., H, S, X).
inline void points(const char* op, const char* name, const Tensor& points, const Tensor& query) {
  companion(op, name, points, query, "query");
  MIXHEAD_CHECK(
      points.dim() == 3 || points.dim() == query.dim(), op, name, " must have 3 dimensions ",
      "(shared by the batch) or ", query.dim(), " like query, got ", shape(points));
  if (points.dim() != 3) batch(op, name, points, query);
}

inline void dropout(const char* op, double dropout_p) {
  MIXHEAD_CHECK(
      dropout_p >= 0.0 && dropout_p <= 1.0, op, "dropout_p must be in [0, 1], got ", dropout_p);
}

/// Whether values can be read: a real tensor, not a shape under Meta, fake tensors or a trace.
inline bool has_values(const Tensor& tensor) {
  return !transforms::values_unknown() && !tensor.is_meta() &&
         !tensor.unsafeGetTensorImpl()->is_python_dispatch() && tensor.has_storage() &&
         tensor.numel() > 0;
}

/// The leading dimensions of query, then `tail`.
inline c10::SymDimVector like_query(const Tensor& query, std::initializer_list<c10::SymInt> tail) {
  const auto sizes = query.sym_sizes();
  c10::SymDimVector result(sizes.begin(), sizes.end() - 3);
  result.append(tail.begin(), tail.end());
  return result;
}

}  // namespace mixhead::checks
