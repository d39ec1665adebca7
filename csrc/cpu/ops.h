// The CPU kernels: raw pointers and sizes, no Python and no torch. Arrays are row-major.
#pragma once

#include <cstdint>

namespace jz3 {

enum class Isa : int { scalar = 0, avx2 = 1, avx512vnni = 2 };

// The best instruction set of this machine, or the one asked for (-1: the best).
Isa choose_isa(int asked);

// Packed signs (jz3/ops/signs.py): out[rows][4 * blocks].
void sign_bits(uint32_t* out, uint64_t key, int64_t rows, int64_t blocks, uint64_t first_row,
               uint64_t first_block, int threads);

// The same signs as numbers: out[rows][cols] of +1 and -1.
void sign_matrix(float* out, uint64_t key, int64_t rows, int64_t cols, uint64_t first_row, uint64_t first_block,
                 int threads);

// Signed hash (jz3/ops/sketch.py): out[rows][dim] is set.
template <class T>
void sketch(const T* block, float* out, int64_t rows, int64_t n, int64_t row_stride, uint64_t key, int64_t dim,
            int threads);

// Codes (jz3/ops/encode.py): bits in {1, 2, 4, 8}; thresholds has 2^bits - 1 entries, unused for 8 bits.
struct EncodeArguments {
  const float *values, *mean, *scale, *thresholds;
  uint8_t* codes;
  int64_t rows, dim, row_bytes;
  int bits;
  float unit, smallest_scale;
};
void encode(const EncodeArguments& arguments, int threads);
void decode(const uint8_t* codes, const float* mean, const float* scale, const float* table, float* values,
            int64_t rows, int64_t dim, int64_t row_bytes, int bits, int threads);

// Streaming top-k over codes (jz3/ops/score_topk.py).
struct ScoreArguments {
  const uint8_t* codes;
  const int8_t *levels, *planes;  // [2^bits], [4][queries][dim]
  const double *step, *bias;      // [queries]
  const float* row_scale;         // [rows]
  const int64_t *ids, *groups;    // [rows], [queries]
  float* values;                  // [count][k]
  int64_t* found;                 // [count][k]
  int64_t rows, dim, row_bytes, queries, count, k;  // k <= rows
  int bits, isa;
};
void score_topk(const ScoreArguments& arguments, int threads);

}  // namespace jz3
