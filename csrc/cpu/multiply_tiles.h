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
#include "cpu/nearer.h"

namespace jz3 {
namespace {

constexpr int64_t TILE = 16;        // rows of a tile, pairs or sums of its rows
constexpr int64_t PART_TILES = 20;  // of A's pairs: 40 KB in 32 rows

constexpr bool is_deep(int64_t depth) { return depth > 3 * PART_TILES * TILE; }  // in pairs

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

// What becomes of the sums of a block of 2 TILE rows and columns. `direct`: they are formed, or added to, where at(n) says.
// Otherwise expect(n, rows) is called before the block at the column n is multiplied, take() when its sums lie in memory,
// which stay there until `blocks` more blocks are formed, and work(count) between the steps of the next, that many rows'
// worth. down(m) is the same for the rows from m on.
struct Direct {
  static constexpr bool direct = true;
  static constexpr int64_t blocks = 0;
  float* c;
  int64_t stride;

  Direct down(int64_t m) const { return {c + m * stride, stride}; }
  float* at(int64_t n) const { return c + n; }
};

// A block's sums, of whose rows those from `row` on wait for their turn.
struct Waiting {
  const float* sums = nullptr;
  int64_t stride = 0, column = 0, row = 0, rows = 0;
  bool wide = false;
};

// For results of which every block is worked off by itself: Own has put(row, column, sums, wide) for a row of it.
template <class Own>
class RowByRow {
 public:
  static constexpr bool direct = false;
  static constexpr int64_t blocks = 1;

  void expect(int64_t, int64_t) {}
  void take(const Waiting& block) {
    work(2 * TILE);
    late_ = block;
  }
  void work(int64_t count) {
    for (const int64_t end = std::min(late_.row + count, late_.rows); late_.row < end; ++late_.row)
      static_cast<Own*>(this)->put(late_.row, late_.column, late_.sums + late_.row * late_.stride, late_.wide);
  }

 private:
  Waiting late_;
};

// Rounded to bfloat16.
class Rounded : public RowByRow<Rounded> {
 public:
  Rounded(uint16_t* c, int64_t stride, bool streamed) : c_(c), stride_(stride), streamed_(streamed) {}
  Rounded down(int64_t m) const { return {c_ + m * stride_, stride_, streamed_}; }
  void put(int64_t row, int64_t column, const float* sums, bool wide) const {
    uint16_t* to = c_ + row * stride_ + column;
    if (wide)
      jz3::put(to, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(sums + TILE), _mm512_loadu_ps(sums)), streamed_);
    else
      Avx512Bf16::store(to, _mm512_loadu_ps(sums));
  }

 private:
  uint16_t* c_;
  int64_t stride_;
  bool streamed_;
};

// One part of the inner dimension of at most 2 TILE rows of C. Sums that aren't direct lie in `sums`: all of these rows,
// or with a stride of 2 TILE the blocks that are not yet done with.
template <class Tiles, int Rows, class V, class Result>
void multiply_band(int64_t rows, int64_t columns, int64_t depth, const Left<V>& left, const Right<V>& right, int64_t panel,
                   Result result, float* sums, int64_t stride, bool add, bool last, Nearer ahead, Nearer& also) {
  constexpr int64_t WIDTH = 2 * TILE, MEMORY = 2 * Result::blocks;
  // Of the rows of the blocks that wait, for every step.
  const int64_t share = Result::direct ? 0 : (WIDTH * TILE + depth * Result::blocks - 1) / (depth * Result::blocks);
  for (int64_t n = 0; n < columns; n += WIDTH) {
    const Pair* b = right.b + n / panel * right.panel + n % panel;
    const auto run = [&](auto wide) {
      float* to = sums + n;
      if constexpr (Result::direct)
        to = result.at(n);
      else if (stride == WIDTH)
        to = sums + n / WIDTH % MEMORY * WIDTH * WIDTH;
      if constexpr (!Result::direct)
        if (last) result.expect(n, rows);
      sum_tiles<Tiles, Rows, wide()>(left.a, left.row, b, right.step, depth, to, stride, add, [&] {
        if constexpr (!Result::direct) result.work(share);
        ahead.fetch();
        also.fetch();
      });
      if constexpr (!Result::direct)
        if (last) result.take({to, stride, n, 0, rows, wide() == 2});
    };
    if (columns - n > TILE)
      run(std::integral_constant<int, 2>());
    else
      run(std::integral_constant<int, 1>());
  }
  if constexpr (!Result::direct) result.work(WIDTH);
}

// As multiply_packed, for panels of `panel` columns and a depth of whole tiles. Behind the rows of A lie `next` more that
// will be multiplied then; `also` is brought nearer meanwhile. The inner dimension is taken in parts of which 2 TILE rows
// fit the first-level cache. Of a deep product all rows take a part before the next, so that the second has to hold this
// part of B alone, and the rows are copied to the first: those of some lengths meet in few of its sets.
template <class Tiles, class V, class Result>
void multiply_tiles(int64_t rows, int64_t columns, int64_t depth, const Left<V>& left, const Right<V>& right, int64_t panel,
                    const Result& result, bool add, int64_t next, Nearer also = {}) {
  constexpr int64_t BAND = 2 * TILE;
  const int64_t parts = (depth / TILE + PART_TILES - 1) / PART_TILES, together = is_deep(depth) ? rows : BAND;
  const bool kept = !Result::direct && parts > 1;
  alignas(64) float few[std::max<int64_t>(2 * Result::blocks, 1) * BAND * BAND];
  int64_t stride = kept ? round_up(columns, BAND) + TILE : BAND;
  if constexpr (Result::direct) stride = result.stride;
  Buffer<float> many(kept ? round_up(together, BAND) * stride : 0);
  Buffer<uint32_t> copies(is_deep(depth) ? BAND * PART_TILES * TILE : 0);
  auto* const copy = reinterpret_cast<Pair*>(copies.get());
  const auto begin = [&](int64_t part) { return depth / TILE * part / parts * TILE; };
  Nearer coming = also;
  int64_t shaped = 0;
  const auto band = [&](int64_t m, int64_t part) {
    const int64_t k = begin(part), count = begin(part + 1) - k, some = std::min(BAND, rows - m);
    const int64_t steps = std::max<int64_t>(count / TILE * ((columns + BAND - 1) / BAND), 1);
    if (shaped != some) {
      TileShapes shapes;
      for (const int tile : {0, 1, 4}) shapes.rows[tile] = uint8_t(std::min(some, TILE));
      for (const int tile : {2, 3, 5}) shapes.rows[tile] = uint8_t(std::max<int64_t>(some - TILE, 1));
      Tiles::shape(shapes);
      shaped = some;
    }
    Left<V> own{left.a + m * left.row + k, left.row, 1};
    if (is_deep(depth)) {
      for (int64_t i = 0; i < some; ++i) std::memcpy(copy + i * count, own.a + i * own.row, size_t(4 * count));
      own = {copy, count, 1};
    }
    const Right<V> below{right.b + k * right.step, right.panel, right.step};
    const Nearer ahead(left.a + (m + BAND) * left.row + k, std::clamp<int64_t>(rows + next - m - BAND, 0, BAND),
                      4 * left.row, 4 * count, steps);
    const auto run = [&](auto tiles) {
      multiply_band<Tiles, tiles()>(some, columns, count, own, below, panel, result.down(m),
                                    kept ? many.get() + m % together * stride : few, stride, add || part,
                                    part == parts - 1, ahead, coming);
    };
    if (some > TILE)
      run(std::integral_constant<int, 2>());
    else
      run(std::integral_constant<int, 1>());
  };
  for (int64_t first = 0; first < rows; first += together)
    for (int64_t part = 0; part < parts; ++part) {
      if (is_deep(depth) && part + 1 < parts) {
        const int64_t k = begin(part + 1), blocks = (columns + BAND - 1) / BAND;
        coming = Nearer(right.b + k * right.step, (columns + panel - 1) / panel, 4 * right.panel,
                       4 * (begin(part + 2) - k) * panel,
                       std::max<int64_t>(blocks * (rows + BAND - 1) / BAND * (k - begin(part)) / TILE, 1));
      } else if (is_deep(depth)) {
        coming = also;
      }
      for (int64_t m = first; m < std::min(first + together, rows); m += BAND) band(m, part);
    }
  Tiles::release();
}

}  // namespace
}  // namespace jz3
