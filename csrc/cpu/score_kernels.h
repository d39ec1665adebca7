// The inner products of score_topk for one instruction set. A row is bytes of level + 128, in steps of 64; where a
// kernel takes 4-bit codes as they are, a step of 64 bytes of codes is two steps of columns: the low halves, then
// the high halves. The queries' columns are stored in that order for 4-bit codes, however they are unpacked. A step of
// 1-bit codes is eight steps of columns.
#pragma once

#include <cstdint>

#include "cpu/ops.h"

namespace jz3 {

constexpr int64_t STEP = 64, QUERIES = 8;  // columns of a step, most queries of a block

// What codes unpack to.
struct Levels {
  uint8_t byte[256];      // level + 128 of a code
  uint8_t bytes[256][8];  // the same of every code in a byte of codes, in order
  uint8_t square[16];     // of a 4-bit code: its squared level in units of SQUARE, rounded up
  Levels(const int8_t* levels, int bits);
};
constexpr int SQUARE = 130;  // so that the squares of two codes fit a byte

// Two rows of a matrix with the same query block; the second may be the first again.
struct RowPair {
  const uint8_t *first, *second;
  int64_t width;         // bytes of each
  const uint8_t* ahead;  // what to prefetch, `ahead_step` bytes with every step: at most 128
  int64_t ahead_step;
  bool past;  // whether past the second-level cache: it is used soon, and once
};

// sums[row][query] += bytes of the row x the query, norms[row] += the squared norm of its levels or a little more
// (unless null). queries: [steps][queries of a block][64] digits of a plane; where a kernel is `wide`, int16 numbers of
// two planes, with the even columns of every 32 first.
using PairKernel = void (*)(const RowPair& rows, const int8_t* queries, const Levels& levels, double* const sums[2],
                            double* norms[2]);

// What turns the first plane's sum of a query into a score and bounds what the other planes add to it:
// row_scale * (sum * step + offset), give or take |row_scale| * (norm * rest + slack). Zeros fill the last eight up.
struct Bounds {
  const double *step, *offset, *rest, *slack;
};

// The first plane's sums of some rows with all queries, and the rows' squared norms or a little more.
struct Products {
  const double* sums;  // [rows][width] and seven more
  const double* norms;
  const float* row_scale;
  int64_t rows, queries, width;
};
constexpr double ROUNDING = 1e-9;  // more than all roundings of a bound together

// A row's score of a query that may reach the query's limit, and the most that it can be.
struct Open {
  int32_t row, query;
  double most;
};

struct Kernels {
  PairKernel bytes;      // rows of unpacked bytes, or int8 codes, which are the same
  PairKernel codes;      // rows of 4-bit or 1-bit codes as they are; may be null
  int64_t block;         // queries of a block
  bool any_width;        // `bytes` takes widths that are no multiple of a step
  bool biased;           // the products are with level + 128 instead of the level
  bool wide;             // up to two planes are multiplied as one number, in at most WIDE_COLUMNS columns at a time
  // How many bytes ahead of their use rows come that are used once, where up to ROOMY bytes of digits and some rows fit
  // the first-level cache together, else 0; and whether past the second-level cache.
  int64_t near;
  bool past;
  // one row of whole steps and one query, its columns in a row
  int64_t (*single)(const uint8_t* bytes, const int8_t* query, int64_t columns);
  // the same of a row of codes as they are, whose columns are filled up with digits of 0; may be null
  int64_t (*single_codes)(const uint8_t* codes, int64_t row_bytes, const int8_t* query, const Levels& levels);
  // writes all that is open, row by row, and returns how many; the limits of eight queries are filled up with infinity
  int64_t (*choose)(const Products& products, const Bounds& bounds, const double* limit, Open* open);
  // row_bytes of codes to level + 128
  void (*unpack)(const uint8_t* codes, const Levels& levels, int64_t row_bytes, uint8_t* bytes);
};

constexpr int64_t ROOMY = 32 << 10;
constexpr int64_t WIDE_COLUMNS = 2048;  // whose sums fit 32 bits, whatever the planes

// For `isa`, which is none of the tile kinds, codes of `bits` and that many queries.
Kernels choose_kernels(Isa isa, int bits, int64_t queries);
Kernels avx2_kernels(int bits, int64_t queries);
Kernels avx512_kernels(int bits, int64_t queries);

constexpr int64_t TILE_ROWS = 32, TILE_QUERIES = 16;

// For many queries where there are no tiles: 32 rows of bytes with blocks of 16 queries, the last filled up, stored
// [block][columns / 64][16][16][4] (step, quad of columns, query, column of the quad): sums[row * 16 * blocks + query]
// is set, and norms[row] += the squared norm of its levels or a little more (unless null). `ahead` as above, for all 32
// rows. Beside `wide` kernels two neighbouring digits of a query, the first at an even column, are at most NEIGHBOURS
// together, whatever their signs.
using TileKernel = void (*)(const uint8_t* bytes, int64_t stride, const int8_t* digits, int64_t columns,
                            int64_t queries, const uint8_t* ahead, int64_t ahead_bytes, double* sums, double* norms);
constexpr int NEIGHBOURS = 128;
// Null where rows in pairs are faster.
TileKernel choose_tile_kernel(Isa isa, int64_t queries);
void multiply_tiles_avx2(const uint8_t* bytes, int64_t stride, const int8_t* digits, int64_t columns, int64_t queries,
                         const uint8_t* ahead, int64_t ahead_bytes, double* sums, double* norms);
void multiply_tiles_avx512(const uint8_t* bytes, int64_t stride, const int8_t* digits, int64_t columns,
                           int64_t queries, const uint8_t* ahead, int64_t ahead_bytes, double* sums, double* norms);
int64_t single_avx2(const uint8_t* bytes, const int8_t* digits, int64_t columns);

// The rows of the tile kernel: codes as they lie, and their columns, a multiple of 2 * STEP.
struct CodeRows {
  const uint8_t* codes;
  int64_t count, stride, row_bytes, columns;
  const Levels* levels;
};

// sums[row * 16 * blocks + query] is set, for rows up to a multiple of TILE_ROWS, and norms[row] unless null: the
// squared norm of the row's levels or a little more; then the rows after these in memory are prefetched too. Blocks of
// 16 queries are stored [four blocks][step][block][16][16][4]; the last four may be one or two.
using CodeKernel = void (*)(const CodeRows& rows, const int8_t* queries, int64_t blocks, double* sums, double* norms);
constexpr int64_t CODE_BLOCKS = 4;
// Null where there are no tiles, or rows in pairs are faster.
CodeKernel choose_code_kernel(Isa isa, int bits, int64_t queries);
CodeKernel amx_kernel(int bits);

}  // namespace jz3
