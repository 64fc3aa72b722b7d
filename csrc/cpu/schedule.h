#pragma once

#include <cstdint>

#include "cpu/smoother.h"

/// Tiles from the caches and the head size, and the split of the work over heads, query rows and
/// keys. Everything depends on sizes and the number of threads alone, so that results do.
namespace mixhead::cpu {

/// The most that one call keeps besides its inputs and outputs, in bytes; half for partial results.
constexpr int64_t kScratchBudget = int64_t{48} << 20;

struct Caches {
  int64_t first, second;  // bytes, per core
};
const Caches& caches();

/// How the forward is cut. `part_rows[s]` is the number of rows that source s's partial results
/// have.
struct ForwardSchedule {
  Tiles tiles;
  int64_t chunk_rows;
  bool parallel;  // worth more than one thread
};
ForwardSchedule schedule_forward(const Problem& problem, const Kernels& kernels, int64_t threads);

/// Cuts one chunk's work; fills work.source and work.tiles. Returns the number of items.
int64_t split_forward(
    const ForwardSchedule& schedule, const Kernels& kernels, int64_t threads, ForwardWork& work);

/// How the backward is cut. Weights are recomputed once for all gradients (five products) where the
/// partial query gradients, and between chunks the keys' accumulators, fit the budget; else once
/// for the keys' and once for the queries' gradients (seven).
struct BackwardSchedule {
  Tiles tiles;
  int64_t wave_heads, chunk_rows;
  bool parallel;
  bool together;
};
BackwardSchedule schedule_backward(const Problem& problem, const Kernels& kernels, int64_t threads);

/// Cuts one wave's chunk; fills work.source and work.tiles. Returns the number of items.
int64_t split_backward(
    const BackwardSchedule& schedule, const Kernels& kernels, int64_t threads, BackwardWork& work);

/// Bytes of work.part[side].
int64_t part_bytes(const Kernels& kernels, const BackwardWork& work, int side);

}  // namespace mixhead::cpu
