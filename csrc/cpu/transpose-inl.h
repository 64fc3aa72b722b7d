#pragma once
// Rows of numbers to columns, a square of vectors at a time.
#include "cpu/vector-inl.h"

namespace mixhead::cpu {
namespace {

/// The numbers at these places of `first` and, behind them, `second`.
template <class T, int... place>
inline __attribute__((always_inline)) Vector<T> shuffle(Vector<T> first, Vector<T> second) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(first, second, place...);
#else  // GCC 11
  return __builtin_shuffle(first, second, Vector<typename Bits<T>::Signed>{place...});
#endif
}

/// Swaps the off-diagonal squares of `half` x `half` numbers in each square twice as large: what a
/// transposition does at one level.
template <class T, int half, int... lane>
inline __attribute__((always_inline)) void swap_squares(Vector<T>* rows) {
  constexpr int lanes = kLanes<T>;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if (i & half) continue;
    const auto first = rows[i], second = rows[i + half];
    rows[i] = shuffle<T, (lane & half ? lanes + lane - half : lane)...>(first, second);
    rows[i + half] = shuffle<T, (lane & half ? lanes + lane : lane + half)...>(first, second);
  }
}

template <class T, int... lane>
inline __attribute__((always_inline)) void transpose_square(Vector<T>* rows) {
  if constexpr (kLanes<T> > 8) swap_squares<T, 8, lane...>(rows);
  if constexpr (kLanes<T> > 4) swap_squares<T, 4, lane...>(rows);
  if constexpr (kLanes<T> > 2) swap_squares<T, 2, lane...>(rows);
  swap_squares<T, 1, lane...>(rows);
}

inline __attribute__((always_inline)) void transpose_square(Vector<float>* rows) {
  if constexpr (kLanes<float> == 16) {
    transpose_square<float, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(rows);
  } else if constexpr (kLanes<float> == 8) {
    transpose_square<float, 0, 1, 2, 3, 4, 5, 6, 7>(rows);
  } else {
    transpose_square<float, 0, 1, 2, 3>(rows);
  }
}
inline __attribute__((always_inline)) void transpose_square(Vector<double>* rows) {
  if constexpr (kLanes<double> == 8) {
    transpose_square<double, 0, 1, 2, 3, 4, 5, 6, 7>(rows);
  } else if constexpr (kLanes<double> == 4) {
    transpose_square<double, 0, 1, 2, 3>(rows);
  } else {
    transpose_square<double, 0, 1>(rows);
  }
}

/// to[column][row] = from[row][column]; rows and `wide` are whole vectors, columns from `columns`
/// on are not written.
template <class T>
void transpose(const T* from, int64_t rows, int64_t wide, int64_t columns, T* to) {
  constexpr int lanes = kLanes<T>;
  for (int64_t row = 0; row < rows; row += lanes) {
    for (int64_t column = 0; column < columns; column += lanes) {
      Vector<T> square[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) square[i] = load<T>(from + (row + i) * wide + column);
      transpose_square(square);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (column + i < columns) store(to + (column + i) * rows + row, square[i]);
      }
    }
  }
}

}  // namespace
}  // namespace mixhead::cpu
