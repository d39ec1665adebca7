#include "common/philox.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace jz3 {

void sign_bits(uint32_t* out, uint64_t key, int64_t rows, int64_t blocks, uint64_t first_row,
               uint64_t first_block, int threads) {
  parallel(rows, blocks * 40, threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t block = 0; block < blocks; ++block) {
        const Words words = philox(key, first_block + block, first_row + row);
        for (int i = 0; i < 4; ++i) out[(row * blocks + block) * 4 + i] = words.word[i];
      }
  });
}

namespace {

JZ3_CLONES void expand(const uint32_t* bits, float* out, int64_t count) {
  for (int64_t j = 0; j < count; ++j) out[j] = 1.0f - 2.0f * float((bits[j >> 5] >> (j & 31)) & 1);
}

}  // namespace

void sign_matrix(float* out, uint64_t key, int64_t rows, int64_t cols, uint64_t first_row, uint64_t first_block,
                 int threads) {
  const int64_t blocks = (cols + 127) / 128;
  parallel(rows, cols, threads, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<uint32_t> bits(size_t(blocks) * 4);
    for (int64_t row = begin; row < end; ++row) {
      sign_bits(bits.data(), key, 1, blocks, first_row + row, first_block, 1);
      expand(bits.data(), out + row * cols, cols);
    }
  });
}

}  // namespace jz3
