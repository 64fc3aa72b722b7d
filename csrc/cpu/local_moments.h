#pragma once

#include "cpu/regression.h"

/// What local-linear regression needs of each query's window, on the engine: the mean and the
/// covariance of its data x = (key, value), and their gradients. For kernels of a distance.
///
/// The regression's values are the rows x, of `wide` = channels + the values' own channels. What is
/// said of rows here is contiguous and in the accumulation dtype, (batch, heads, rows of the chunk,
/// ...). Items are (query unit, rows of it), the last fastest.
namespace mixhead::cpu {

struct LocalMoments {
  RegressionForward forward;  // how the rows are cut; one split of the keys
  Chunk chunk;
  void* mean;      // (..., wide): of x, the keys' part from the query
  void* second;    // (..., channels, wide): mean of (k - mean) (x - mean)'
  void* log_mass;  // (...); where it is -inf the moments are 0
};

struct LocalGradient {
  RegressionForward forward;
  Chunk chunk;
  int64_t row_splits;  // of the row blocks of a unit
  const void* mean;
  const void* log_mass;
  const void* linear;      // (..., wide): by the mean
  const void* quadratic;   // (..., channels, wide): by `second`, the keys' part plus its transpose
  const void* delta;       // (...): <by second, second> less the gradient by log_mass
  void* grad_query;        // (..., channels), or null
  void* grad_data;         // (splits, key units, keys, wide), added to; or null
  double* grad_bandwidth;  // (items, channels), added to; or null
};

}  // namespace mixhead::cpu
