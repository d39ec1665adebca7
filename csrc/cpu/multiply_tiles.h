// Products of packed bfloat16 matrices in the tiles of AMX: 32 x 32 sums in four tiles, 32 numbers of the inner dimension
// at a time. Include inside a region compiled for AVX-512 with bfloat16, behind cpu/avx512.h and cpu/multiply.h.
//
// What a step multiplies, 2 KB of A and 2 KB of B, takes 64 cycles; from the second-level cache it comes in 88, with A in
// the first in 62. So 32 rows of A, or a part of them that fits, stay there while B comes past it; it is packed in panels
// of 32 columns without gaps. Sums are rounded while the next are formed, when the unit's last results are not waited for,
// and the next rows of A are brought nearer meanwhile.
#pragma once

#include <cstring>

#include "cpu/amx.h"

namespace jz3 {
namespace {

constexpr int64_t TILE = 16;        // rows of a tile, pairs or sums of its rows
constexpr int64_t PART_TILES = 20;  // of A's pairs: 40 KB in 32 rows
constexpr int64_t FOUR_TILES = 2 * TILE * 2 * TILE;

constexpr int64_t parts_of(int64_t depth) { return (depth / TILE + PART_TILES - 1) / PART_TILES; }

struct AmxTiles {
  static void shape(const TileShapes& shapes) { load_tile_shapes(shapes); }
  static void release() { release_tiles(); }
  template <int Tile>
  static void zero() {
    tile_zero<Tile>();
  }
  template <int Tile>
  static void load(const void* from, int64_t stride) {
    tile_load<Tile>(from, 4 * stride);
  }
  template <int Tile>
  static void load_once(const void* from, int64_t stride) {
    tile_load_once<Tile>(from, 4 * stride);
  }
  template <int Tile>
  static void store(float* to, int64_t stride) {
    tile_store<Tile>(to, 4 * stride);
  }
  template <int Sums, int A, int B>
  static void add() {
    tile_add_pairs<Sums, A, B>();
  }
};

// The same in plain C++, for tests on other machines.
struct EmulatedTiles {
  static inline thread_local uint32_t tile[8][TILE][TILE];
  static inline thread_local TileShapes used;

  static void shape(const TileShapes& shapes) {
    used = shapes;
    std::memset(tile, 0, sizeof(tile));
  }
  static void release() {}
  template <int Tile>
  static void zero() {
    std::memset(tile[Tile], 0, sizeof(tile[Tile]));
  }
  template <int Tile>
  static void load(const void* from, int64_t stride) {
    for (int r = 0; r < used.rows[Tile]; ++r)
      std::memcpy(tile[Tile][r], static_cast<const uint32_t*>(from) + r * stride, sizeof(tile[Tile][r]));
  }
  template <int Tile>
  static void load_once(const void* from, int64_t stride) {
    load<Tile>(from, stride);
  }
  template <int Tile>
  static void store(float* to, int64_t stride) {
    for (int r = 0; r < used.rows[Tile]; ++r) std::memcpy(to + r * stride, tile[Tile][r], sizeof(tile[Tile][r]));
  }
  template <int Sums, int A, int B>
  static void add() {
    const auto number = [](uint32_t bits) {
      float x;
      std::memcpy(&x, &bits, 4);
      return x;
    };
    for (int r = 0; r < used.rows[Sums]; ++r)
      for (int k = 0; k < TILE; ++k)
        for (int c = 0; c < TILE; ++c) {
          const uint32_t a = tile[A][r][k], b = tile[B][k][c];
          const float sum = number(tile[Sums][r][c]) + number(a << 16) * number(b << 16) +
                            number(a & 0xffff0000) * number(b & 0xffff0000);
          std::memcpy(&tile[Sums][r][c], &sum, 4);
        }
  }
};

// C[m][n] (+)= sum over k of A[m][k] B[k][n] of one or two tiles of rows by one or two of columns. A's pairs lie behind
// one another, the rows of B `step` apart. Between its steps the unit has time for other work: meanwhile() is called
// after each.
template <class Tiles, int Rows, int Columns, class Meanwhile>
inline void sum_tiles(const Pair* a, int64_t row, const Pair* b, int64_t step, int64_t depth, float* c, int64_t stride,
                      bool add, Meanwhile&& meanwhile) {
  const auto each = [&](auto&& run) {
    run(std::integral_constant<int, 0>(), c);
    if constexpr (Columns == 2) run(std::integral_constant<int, 1>(), c + TILE);
    if constexpr (Rows == 2) run(std::integral_constant<int, 2>(), c + TILE * stride);
    if constexpr (Rows == 2 && Columns == 2) run(std::integral_constant<int, 3>(), c + TILE * stride + TILE);
  };
  each([&](auto tile, float* sums) {
    if (add)
      Tiles::template load<tile()>(sums, stride);
    else
      Tiles::template zero<tile()>();
  });
  for (int64_t k = 0; k < depth; k += TILE, a += TILE, b += TILE * step) {
    Tiles::template load_once<6>(b, step);
    Tiles::template load<4>(a, row);
    Tiles::template add<0, 4, 6>();
    if constexpr (Columns == 2) {
      Tiles::template load_once<7>(b + TILE, step);
      Tiles::template add<1, 4, 7>();
    }
    if constexpr (Rows == 2) {
      Tiles::template load<5>(a + TILE * row, row);
      Tiles::template add<2, 5, 6>();
      if constexpr (Columns == 2) Tiles::template add<3, 5, 7>();
    }
    meanwhile();
  }
  each([&](auto tile, float* sums) { Tiles::template store<tile()>(sums, stride); });
}

// Sums of one or two tiles of columns that are to be rounded, some rows at a time.
struct Unrounded {
  const float* sums = nullptr;
  int64_t from = 0;  // stride of sums
  uint16_t* c = nullptr;
  int64_t stride = 0, rows = 0;
  bool wide = false;

  void round(int64_t count) {
    for (count = std::min(count, rows), rows -= count; count; --count, sums += from, c += stride)
      if (wide)
        _mm512_storeu_si512(c, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(sums + TILE), _mm512_loadu_ps(sums)));
      else
        Avx512Bf16::store(c, _mm512_loadu_ps(sums));
  }
};

// Lines that will be read next, brought to the second-level cache some at a time.
struct Ahead {
  const char* line;
  int64_t left, most;  // lines, of these at a time

  // Those of `bytes` from `begin` on, within `steps`.
  Ahead(const void* begin, int64_t bytes, int64_t steps)
      : line(static_cast<const char*>(begin)), left((bytes + 63) / 64), most(std::min<int64_t>((left + steps - 1) / steps, 4)) {}
  void fetch() {
    for (int64_t i = std::min(most, left); i > 0; --i, --left, line += 64) _mm_prefetch(line, _MM_HINT_T1);
  }
};

// At most 2 TILE rows of C, in parts of the inner dimension; `sums` has room for two blocks of 2 TILE x 2 TILE sums or,
// with several parts, for these rows of C.
template <class Tiles, int Rows, class V, class Out>
void multiply_band(int64_t rows, int64_t columns, int64_t depth, const Left<V>& left, const Right<V>& right, int64_t panel,
                   Out* c, int64_t stride, bool add, float* sums, Ahead ahead) {
  constexpr bool exact = std::is_same_v<Out, float>;
  const int64_t parts = parts_of(depth);
  Unrounded late;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t k = depth / TILE * part / parts * TILE, end = depth / TILE * (part + 1) / parts * TILE;
    const int64_t share = (2 * TILE * TILE + end - k - 1) / (end - k);  // of the rows of a block, for every step
    for (int64_t n = 0; n < columns; n += 2 * TILE) {
      const Pair* b = right.b + n / panel * right.panel + n % panel + k * right.step;
      const auto run = [&](auto wide) {
        float* to = sums + n / (2 * TILE) % 2 * FOUR_TILES;
        int64_t row = 2 * TILE;
        if constexpr (exact)
          to = c + n, row = stride;
        else if (parts > 1)
          to = sums + n, row = columns + 2 * TILE;
        sum_tiles<Tiles, Rows, wide()>(left.a + k, left.row, b, right.step, end - k, to, row, add || part, [&] {
          if constexpr (!exact) late.round(share);
          ahead.fetch();
        });
        if constexpr (!exact) {
          late.round(late.rows);
          if (part == parts - 1) late = {to, row, c + n, stride, rows, wide() == 2};
        }
      };
      if (columns - n > TILE)
        run(std::integral_constant<int, 2>());
      else
        run(std::integral_constant<int, 1>());
    }
  }
  late.round(late.rows);
}

// As multiply_packed, for panels of `panel` columns and a depth of whole tiles. Behind the rows of A lie `next` more that
// will be multiplied then.
template <class Tiles, class V, class Out>
void multiply_tiles(int64_t rows, int64_t columns, int64_t depth, const Left<V>& left, const Right<V>& right, int64_t panel,
                    Out* c, int64_t stride, bool add, int64_t next) {
  const bool parted = !std::is_same_v<Out, float> && parts_of(depth) > 1;
  alignas(64) float few[2 * FOUR_TILES];
  Buffer<float> many(parted ? 2 * TILE * (columns + 2 * TILE) : 0);
  float* const sums = parted ? many.get() : few;
  const int64_t whole = rows / (2 * TILE) * 2 * TILE, rest = rows - whole;
  const int64_t steps = std::max<int64_t>(depth / TILE * ((columns + 2 * TILE - 1) / (2 * TILE)), 1);
  const auto behind = [&](int64_t m) {
    const int64_t count = std::clamp<int64_t>(rows + next - m, 0, 2 * TILE);
    return Ahead(left.a + m * left.row, count * left.row * int64_t(sizeof(Pair)), steps);
  };
  Tiles::shape(TileShapes{});
  for (int64_t m = 0; m < whole; m += 2 * TILE)
    multiply_band<Tiles, 2>(2 * TILE, columns, depth, Left<V>{left.a + m * left.row, left.row, 1}, right, panel,
                            c + m * stride, stride, add, sums, behind(m + 2 * TILE));
  if (rest) {
    TileShapes shapes;
    for (const int tile : {0, 1, 4}) shapes.rows[tile] = uint8_t(std::min(rest, TILE));
    for (const int tile : {2, 3, 5}) shapes.rows[tile] = uint8_t(std::max<int64_t>(rest - TILE, 1));
    Tiles::shape(shapes);
    const Left<V> own{left.a + whole * left.row, left.row, 1};
    if (rest > TILE)
      multiply_band<Tiles, 2>(rest, columns, depth, own, right, panel, c + whole * stride, stride, add, sums, behind(rows));
    else
      multiply_band<Tiles, 1>(rest, columns, depth, own, right, panel, c + whole * stride, stride, add, sums, behind(rows));
  }
  Tiles::release();
}

}  // namespace
}  // namespace jz3
