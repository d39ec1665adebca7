// The portable kernels and the choice of kernels.
#include "cpu/score_kernels.h"

#include <cmath>
#include <cstring>

#include "cpu/parallel.h"

namespace jz3 {

Levels::Levels(const int8_t* levels, int bits) : byte{}, bytes{}, square{} {
  for (int i = 0; i < (1 << bits); ++i) byte[i] = uint8_t(int(levels[i]) + 128);
  for (int code = 0; code < 256; ++code)
    for (int i = 0; i < 8 / bits; ++i) bytes[code][i] = byte[(code >> (i * bits)) & ((1 << bits) - 1)];
  for (int i = 0; bits <= 4 && i < (1 << bits); ++i)
    square[i] = uint8_t((int(levels[i]) * int(levels[i]) + SQUARE - 1) / SQUARE);
}

namespace {

JZ3_CLONES double square_sum(const uint8_t* bytes, int64_t columns) {
  double total = 0;
  for (int64_t begin = 0; begin < columns; begin += 4096) {
    const int64_t end = begin + 4096 < columns ? begin + 4096 : columns;
    int32_t sum = 0;
    for (int64_t c = begin; c < end; ++c) sum += (int32_t(bytes[c]) - 128) * (int32_t(bytes[c]) - 128);
    total += sum;
  }
  return total;
}

void pair_scalar(const RowPair& rows, const int8_t* queries, const Levels&, double* const sums[2], double* norms[2]) {
  const uint8_t* row[2] = {rows.first, rows.second};
  for (int r = 0; r < 2; ++r) {
    int32_t total[QUERIES] = {};
    for (int64_t begin = 0; begin < rows.width; begin += STEP)
      for (int64_t q = 0; q < QUERIES; ++q)
        for (int64_t c = 0; c < STEP; ++c)
          total[q] += (int32_t(row[r][begin + c]) - 128) * queries[begin * QUERIES + q * STEP + c];
    for (int64_t q = 0; q < QUERIES; ++q) sums[r][q] += total[q];
    if (norms) *norms[r] += square_sum(row[r], rows.width);
  }
}

int64_t single_scalar(const uint8_t* bytes, const int8_t* query, int64_t columns) {
  int64_t total = 0;
  for (int64_t c = 0; c < columns; ++c) total += (int32_t(bytes[c]) - 128) * query[c];
  return total;
}

int64_t choose_plain(const Products& products, const Bounds& bounds, const double* limit, Open* open) {
  int64_t count = 0;
  for (int64_t r = 0; r < products.rows; ++r) {
    const double* const sums = products.sums + r * products.width;
    const double scale = products.row_scale[r], norm = std::sqrt(products.norms[r] * (1 + ROUNDING));
    for (int64_t q = 0; q < products.queries; ++q) {
      const double score = scale * (sums[q] * bounds.step[q] + bounds.offset[q]);
      const double most = score + std::fabs(scale) * (norm * bounds.rest[q] + bounds.slack[q]);
      open[count] = {int32_t(r), int32_t(q), most};
      count += most < limit[q] ? 0 : 1;
    }
  }
  return count;
}

template <int BITS>
void unpack_table(const uint8_t* codes, const Levels& levels, int64_t row_bytes, uint8_t* bytes) {
  for (int64_t b = 0; b < row_bytes; ++b) std::memcpy(bytes + b * (8 / BITS), levels.bytes[codes[b]], 8 / BITS);
}

void unpack_4bit(const uint8_t* codes, const Levels& levels, int64_t row_bytes, uint8_t* bytes) {
  for (int64_t b = 0; b < row_bytes; ++b) {
    uint8_t* to = bytes + b / STEP * (2 * STEP) + b % STEP;
    to[0] = levels.byte[codes[b] & 15];
    to[STEP] = levels.byte[codes[b] >> 4];
  }
}

void unpack_copy(const uint8_t* codes, const Levels&, int64_t row_bytes, uint8_t* bytes) {
  std::memcpy(bytes, codes, size_t(row_bytes));
}

}  // namespace

Kernels choose_kernels(Isa isa, int bits, int64_t queries) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa == Isa::avx512vnni) return avx512_kernels(bits, queries);
  if (isa == Isa::avx2) return avx2_kernels(bits, queries);
#endif
  return {pair_scalar, nullptr, QUERIES, false, false, false, 0, false, single_scalar, nullptr, choose_plain,
          bits == 8   ? unpack_copy
          : bits == 4 ? unpack_4bit
          : bits == 2 ? unpack_table<2>
                      : unpack_table<1>};
}

}  // namespace jz3
