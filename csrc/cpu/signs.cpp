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

}  // namespace jz3
