// Codes and back. The inner loops are written for the compiler's vectoriser: a chunk of indices is made first,
// then packed. Only operations whose result IEEE fixes are used (no contraction), so that codes are the
// reference's bit for bit.
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace jz3 {
namespace {

constexpr int64_t CHUNK = 1024;

JZ3_CLONES void standardise(const float* values, const float* mean, const float* inverse, float* z, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const float scaled = (values[j] - mean[j]) * inverse[j];
    z[j] = inverse[j] > 0 ? scaled : 0.0f;
  }
}

JZ3_CLONES void index_uniform(const float* z, float per_unit, uint8_t* index, int64_t count) {
  // Adding and subtracting 1.5 * 2^23 rounds half to even.
  constexpr float round = 12582912.0f;
  for (int64_t j = 0; j < count; ++j) {
    float x = z[j] * per_unit;
    x = x < -127.0f ? -127.0f : x;
    x = x > 127.0f ? 127.0f : x;
    index[j] = uint8_t(int32_t((x + round) - round) + 128);
  }
}

JZ3_CLONES void index_table(const float* z, const float* thresholds, int levels, uint8_t* index, int64_t count) {
  int32_t found[CHUNK];
  for (int64_t j = 0; j < count; ++j) found[j] = 0;
  for (int t = 0; t + 1 < levels; ++t) {
    const float bound = thresholds[t];
    for (int64_t j = 0; j < count; ++j) found[j] += z[j] > bound ? 1 : 0;
  }
  for (int64_t j = 0; j < count; ++j) index[j] = uint8_t(found[j]);
}

void pack(const uint8_t* index, uint8_t* codes, int64_t count, int bits) {
  const int64_t per_byte = 8 / bits;
  for (int64_t j = 0; j < count; j += per_byte) {
    int byte = 0;
    for (int64_t i = 0; i < per_byte && j + i < count; ++i) byte |= index[j + i] << (i * bits);
    codes[j / per_byte] = uint8_t(byte);
  }
}

JZ3_CLONES void apply_table(const uint8_t* index, const float* table, const float* mean, const float* scale,
                            float* values, int64_t count) {
  for (int64_t j = 0; j < count; ++j) values[j] = mean[j] + scale[j] * table[index[j]];
}

}  // namespace

void encode(const EncodeArguments& a, int threads) {
  std::vector<float> inverse(a.dim);
  for (int64_t j = 0; j < a.dim; ++j) inverse[j] = a.scale[j] >= a.smallest_scale ? 1.0f / a.scale[j] : 0.0f;
  parallel(a.rows, a.dim * 4, threads, [&](int64_t, int64_t first, int64_t last) {
    float z[CHUNK];
    uint8_t index[CHUNK];
    for (int64_t row = first; row < last; ++row)
      for (int64_t begin = 0; begin < a.dim; begin += CHUNK) {
        const int64_t count = std::min(CHUNK, a.dim - begin);
        standardise(a.values + row * a.dim + begin, a.mean + begin, inverse.data() + begin, z, count);
        if (a.bits == 8)
          index_uniform(z, 1.0f / a.unit, index, count);
        else
          index_table(z, a.thresholds, 1 << a.bits, index, count);
        pack(index, a.codes + row * a.row_bytes + begin * a.bits / 8, count, a.bits);
      }
  });
}

void decode(const uint8_t* codes, const float* mean, const float* scale, const float* table, float* values,
            int64_t rows, int64_t dim, int64_t row_bytes, int bits, int threads) {
  parallel(rows, dim * 2, threads, [&](int64_t, int64_t first, int64_t last) {
    uint8_t index[CHUNK];
    const int64_t per_byte = 8 / bits;
    const int mask = (1 << bits) - 1;
    for (int64_t row = first; row < last; ++row)
      for (int64_t begin = 0; begin < dim; begin += CHUNK) {
        const int64_t count = std::min(CHUNK, dim - begin);
        const uint8_t* packed = codes + row * row_bytes + begin / per_byte;
        for (int64_t j = 0; j < count; ++j)
          index[j] = uint8_t((packed[j / per_byte] >> (j % per_byte * bits)) & mask);
        apply_table(index, table, mean + begin, scale + begin, values + row * dim + begin, count);
      }
  });
}

}  // namespace jz3
