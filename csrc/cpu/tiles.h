// Products of packed matrices of float32 or bfloat16 by the type of their numbers: in AVX-512 registers (cpu/multiply.h),
// those of bfloat16 in tiles where there are any (cpu/multiply_tiles.h).
// Include after the standard headers, as bf16.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <type_traits>

#include "cpu/bf16.h"

#ifdef JZ3_BF16
#define JZ3_BF16_PRODUCTS

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")

#include "cpu/avx512.h"
#include "cpu/multiply.h"
#include "cpu/multiply_tiles.h"

namespace jz3 {

template <class T>
struct Of : Avx512 {
  using Plain = T;  // as the type of a buffer
};
template <>
struct Of<bf16> : Avx512Bf16 {
  using Plain = uint32_t;
};
template <class T>
constexpr int64_t units(int64_t numbers) {
  return units_of<Of<T>>(numbers);
}
constexpr int64_t PANEL = panel_of<Of<float>>;

inline Direct result_in(float* c, int64_t stride, bool) { return {c, stride}; }
inline Rounded result_in(bf16* c, int64_t stride, bool streamed) { return {c, stride, streamed}; }

template <class Result>
bool multiply_in_tiles(int64_t rows, int64_t columns, int64_t depth, const Left<Of<bf16>>& left,
                       const Right<Of<bf16>>& right, int64_t panel, const Result& result, bool add, int64_t next = 0,
                       Nearer also = {}) {
  if (depth % TILE) return false;
  const TileUnit unit = tile_unit();
  if (unit == TileUnit::amx)
    multiply_tiles<AmxTiles>(rows, columns, depth, left, right, panel, result, add, next, also);
  else if (unit == TileUnit::emulated)
    multiply_tiles<EmulatedTiles>(rows, columns, depth, left, right, panel, result, add, next, also);
  return unit != TileUnit::none;
}

// C (+)= A B for panels of 64 columns; columns is rounded up to 16.
template <class T, bool Ahead, class Out>
void multiply(int64_t rows, int64_t columns, int64_t depth, const Left<Of<T>>& left, const Right<Of<T>>& right, Out* c,
              int64_t stride, bool add) {
  if constexpr (std::is_same_v<T, bf16> && Ahead)
    if (multiply_in_tiles(rows, columns, depth, left, right, PANEL, result_in(c, stride, false), add)) return;
  multiply_packed<Of<T>, Ahead>(rows, columns, depth, left, right, c, stride, add);
}

// A matrix as pack_product leaves it.
struct PackedMatrix {
  const Pair* pairs;
  int64_t depth, panel;  // in pairs, columns

  PackedMatrix(const void* packed, int64_t numbers)
      : pairs(static_cast<const Pair*>(packed)), depth((numbers + 1) / 2), panel(panel_for(depth)) {}

  static int64_t panel_for(int64_t depth) {
    return tile_unit() != TileUnit::none && depth % TILE == 0 ? 2 * TILE : PANEL;
  }

  // Columns from a multiple of 64 on, or of all columns the pairs from `first` on, to be brought nearer within `steps`.
  Nearer columns(int64_t first, int64_t count, int64_t steps) const {
    return {pairs + first * depth, count > 0, 0, count * depth * int64_t(sizeof(Pair)), steps};
  }
  Nearer units(int64_t first, int64_t count, int64_t columns, int64_t steps) const {
    const int64_t size = panel * int64_t(sizeof(Pair));
    return {pairs + first * panel, (columns + panel - 1) / panel, depth * size, count * size, steps};
  }

  // C (+)= A times the rows from the pair `first` on, of the columns from `column` on, a multiple of 64. Behind the rows
  // of A lie `next` more that will be multiplied then (less than none: they are near). Where tiles form them, `streamed`
  // results are written past the caches, and `also` is brought nearer meanwhile.
  template <class Out>
  void multiply(int64_t rows, int64_t columns, int64_t count, const Left<Of<bf16>>& left, int64_t first, int64_t column,
                Out* c, int64_t stride, bool add, int64_t next = 0, bool streamed = false, Nearer also = {}) const {
    const Right<Of<bf16>> right{pairs + column * depth + first * panel, depth * panel, panel};
    if (!multiply_in_tiles(rows, columns, count, left, right, panel, result_in(c, stride, streamed), add, next, also))
      multiply_packed<Of<bf16>, true>(rows, columns, count, left, right, c, stride, add);
  }

  // The same of all rows, for tiles alone: what becomes of the sums `result` says.
  template <class Result>
  void multiply_into(const Result& result, int64_t rows, int64_t columns, const Left<Of<bf16>>& left, int64_t column,
                     int64_t next, Nearer also = {}) const {
    const Right<Of<bf16>> right{pairs + column * depth, depth * panel, panel};
    multiply_in_tiles(rows, columns, depth, left, right, panel, result, false, next, also);
  }
};

}  // namespace jz3

#pragma GCC pop_options
#endif
