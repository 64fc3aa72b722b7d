#include "kernel_attention/kernel_checks.h"

#include <ATen/ops/min.h>

#include "checks.h"
#include "kernel_attention/kernels.h"

namespace mixhead::kernel_checks {

using checks::equal;
using checks::shape;

void points(
    const char* op, const Tensor& query, const Tensor& key, const Tensor& value, bool enable_gqa) {
  checks::points(op, "key", key, query);
  checks::points(op, "value", value, query);
  checks::key_heads(op, "key", key, query, enable_gqa);
  MIXHEAD_CHECK(
      equal(key.sym_size(-1), query.sym_size(-1)), op, "key must have ", query.sym_size(-1),
      " channels like query, got ", shape(key));
  MIXHEAD_CHECK(
      value.dim() == key.dim() && equal(value.sym_size(-3), key.sym_size(-3)) &&
          equal(value.sym_size(-2), key.sym_size(-2)),
      op, "value must have ", key.sym_size(-3), " heads, ", key.sym_size(-2), " rows and ",
      key.dim(), " dimensions like key, got ", shape(value));
}

void names(const char* op, const Tensor& query, const c10::List<std::string>& kernel) {
  const auto count = static_cast<int64_t>(kernel.size());
  MIXHEAD_CHECK(
      count == 1 || (count > 0 && equal(query.sym_size(-3), count)), op,
      "kernel must be one name or one for each of query's ", query.sym_size(-3), " heads, got ",
      count);
  for (const std::string& name : kernel) {
    MIXHEAD_CHECK(
        kernel_named(name).has_value(), op, "kernel must be one of ", kernel_names(), ", got \"",
        name, "\"");
  }
}

void bandwidth(
    const char* op, const Tensor& query, const c10::List<std::string>& kernel,
    const std::optional<Tensor>& bandwidth) {
  if (!bandwidth) return;
  checks::companion(op, "bandwidth", *bandwidth, query, "query", /*float32_too=*/true);
  const auto heads = query.sym_size(-3), channels = query.sym_size(-1);
  const bool fits = bandwidth->dim() == 0 ||
                    (bandwidth->dim() == 1 && equal(bandwidth->sym_size(0), heads)) ||
                    (bandwidth->dim() == 2 && equal(bandwidth->sym_size(0), heads) &&
                     equal(bandwidth->sym_size(1), channels));
  MIXHEAD_CHECK(
      fits, op, "bandwidth must be a scalar, (", heads, ",) or (", heads, ", ", channels, "), got ",
      shape(*bandwidth));
  for (const std::string& name : kernel) {
    MIXHEAD_CHECK(
        name != "cosine" || bandwidth->dim() < 2, op, "bandwidth must be a scalar or (", heads,
        ",) with kernel \"cosine\", got one per channel ", shape(*bandwidth));
  }
  if (!checks::has_values(*bandwidth)) return;
  const auto smallest = at::min(bandwidth->detach()).item<double>();
  MIXHEAD_CHECK(smallest > 0.0, op, "bandwidth must be positive, got ", smallest);
}

void readable(
    const char* op, const Tensor& query, const Tensor& key, bool exclude_self,
    const std::optional<Tensor>& attn_mask) {
  const auto rows = query.sym_size(-2), keys = key.sym_size(-2);
  MIXHEAD_CHECK(
      !exclude_self || equal(rows, keys), op, "key must have ", rows,
      " rows like query with exclude_self, got ", shape(key));
  if (!attn_mask) return;
  checks::mask(
      op, "attn_mask", *attn_mask, query,
      checks::like_query(query, {query.sym_size(-3), rows, keys}));
}

}  // namespace mixhead::kernel_checks
