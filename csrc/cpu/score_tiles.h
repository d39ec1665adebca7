// The tile kernel: rows x queries in up to four accumulator tiles. Included by what instantiates it, which defines
// JZ3_TARGET: attributes of the functions here, so that unpacking is inlined.
//
// Two steps of columns of 16 or 32 rows are unpacked to a buffer in the L1 cache while the two before are multiplied:
// of rows where they lie, the 16 lines of a tile would be in one set of the L1 cache, as often as not. As measured on
// Granite Rapids, unpacking has to be inlined and to alternate with single steps, because few tile instructions can be
// under way at a time and what follows waits for them. Four blocks of queries are next to each other in every step,
// 4 KiB of one page. They meet 16 rows and not 32, because two passes would unpack twice. Rows are prefetched column by
// column, as they are read; in a row, they came later.
#pragma once

#include <algorithm>

#include "cpu/score_kernels.h"

namespace jz3 {

constexpr int64_t PAIR = 2 * STEP;  // columns that are unpacked at a time

// A pair of steps of some rows.
struct StepPair {
  const uint8_t* codes;  // of the first row
  int64_t stride, rows;
  int64_t row_bytes;  // that there are: fewer than a pair's, or none, at the end of rows
  int64_t ahead;      // with norms: so many bytes further on are the codes to prefetch
  uint8_t* to;        // [step][row][64], the second step `step_bytes` after the first
  int64_t step_bytes;
  int32_t* norms;  // [row][16], to whose sum the squared norm is added, in units of Code::NORM_UNIT
};

// The rows of a tile, a pair of steps of half of them at a time.
template <class Code, bool NORMS, int ROWS>
class Unpacked {
 public:
  explicit Unpacked(const CodeRows& rows) : rows_(rows) {}

  // Into the buffer that is not at hand.
  JZ3_TARGET __attribute__((always_inline)) inline void half(int64_t row, int64_t column, int64_t first) {
    const int64_t at = column / PAIR * Code::PAIR_BYTES, count = std::min<int64_t>(ROWS / 2, rows_.count - row - first);
    int32_t* const norms = norms_[row / ROWS % 2] + first * 16;
    if (NORMS && column == 0) std::fill_n(norms, ROWS / 2 * 16, 0);
    Code::template unpack<NORMS>({rows_.codes + (row + first) * rows_.stride + at, rows_.stride, count,
                                  std::min(Code::PAIR_BYTES, rows_.row_bytes - at), ROWS * rows_.stride,
                                  bytes_[!current_] + first * STEP, STEP_BYTES, norms},
                                 *rows_.levels);
  }

  void turn() { current_ = !current_; }
  const uint8_t* step(int64_t i) const { return bytes_[current_] + i * STEP_BYTES; }

  JZ3_TARGET void add_norms(int64_t row, double* norms) const {
    for (int64_t r = 0; r < std::min<int64_t>(ROWS, rows_.count - row); ++r) {
      int64_t sum = 0;
      for (int64_t i = 0; i < 16; ++i) sum += norms_[row / ROWS % 2][r * 16 + i];
      norms[row + r] = Code::NORM_UNIT * double(sum);
    }
  }

 private:
  static constexpr int64_t STEP_BYTES = ROWS * STEP;
  alignas(64) uint8_t bytes_[2][2 * STEP_BYTES] = {};
  alignas(64) int32_t norms_[2][ROWS * 16];
  bool current_ = false;
  const CodeRows& rows_;
};

// The rows with as many queries as the tiles have.
template <class Tiles, class Code, bool NORMS>
JZ3_TARGET void multiply_rows(const CodeRows& rows, const int8_t* queries, double* sums, int64_t width, double* norms) {
  constexpr int64_t span = 1 << 15;  // columns whose sums fit 32 bits
  constexpr int64_t high = Tiles::ROWS, wide = Tiles::WIDTH;
  alignas(64) int32_t part[high * wide];
  const uint8_t* const after = rows.codes + 2 * high * rows.stride;
  Unpacked<Code, NORMS, high> unpacked(rows);
  Tiles tiles;
  unpacked.half(0, 0, 0);
  unpacked.half(0, 0, high / 2);
  for (int64_t row = 0; row < rows.count; row += high) {
    tiles.zero();
    for (int64_t c = 0; c < rows.columns; c += PAIR) {
      const bool last = c + PAIR == rows.columns;
      const int64_t next_row = last ? row + high : row, next = last ? 0 : c + PAIR;
      // One line at a time of the rows after those that are prefetched, so that their pages are known by then: all at
      // once, the walks of the page tables would hold up what memory delivers.
      if (NORMS) __builtin_prefetch(after + (row + c * high / rows.columns) * rows.stride, 0, 2);
      unpacked.turn();
      unpacked.half(next_row, next, 0);
      tiles.step(unpacked.step(0), queries + c * wide);
      unpacked.half(next_row, next, high / 2);
      tiles.step(unpacked.step(1), queries + (c + STEP) * wide);
      if (!last && (c + PAIR) % span) continue;
      tiles.store(part);
      tiles.zero();
      for (int64_t r = 0; r < high; ++r)
        for (int64_t q = 0; q < wide; ++q) {
          double& sum = sums[(row + r) * width + q];
          sum = double(part[r * wide + q]) + (c < span ? 0 : sum);
        }
    }
    if (NORMS) unpacked.add_norms(row, norms);
  }
}

// Four blocks of queries at a time, and what is left: one or two.
template <template <int, int> class Tiles, class Code>
JZ3_TARGET void multiply_codes(const CodeRows& rows, const int8_t* queries, int64_t blocks, double* sums,
                               double* norms) {
  const int64_t width = blocks * TILE_QUERIES;
  Tiles<1, 4>::begin();
  for (int64_t block = 0; block < blocks; block += CODE_BLOCKS) {
    const int64_t left = blocks - block;
    const bool first = norms && block == 0;
    const auto multiply =
        left == 1   ? first ? multiply_rows<Tiles<1, 1>, Code, true> : multiply_rows<Tiles<1, 1>, Code, false>
        : left == 2 ? first ? multiply_rows<Tiles<2, 2>, Code, true> : multiply_rows<Tiles<2, 2>, Code, false>
        : first     ? multiply_rows<Tiles<1, 4>, Code, true>
                    : multiply_rows<Tiles<1, 4>, Code, false>;
    multiply(rows, queries + block * TILE_QUERIES * rows.columns, sums + block * TILE_QUERIES, width, norms);
  }
  Tiles<1, 4>::end();
}

}  // namespace jz3
