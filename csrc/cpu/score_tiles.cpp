// The tile kernel with a plain emulation of tiles, for machines without them.
#include <cstring>

#define JZ3_TARGET
#include "cpu/score_tiles.h"

namespace jz3 {
namespace {

// Sums of R tiles of rows x B blocks of queries; a step adds the products of a: [16 R rows][64 columns] and
// b: [B][16 quads of columns][16 queries][4 columns].
template <int R, int B>
struct Emulated {
  static constexpr int64_t ROWS = 16 * R, WIDTH = 16 * B;
  int32_t sum[ROWS][WIDTH];

  static void begin() {}
  static void end() {}
  void zero() { std::memset(sum, 0, sizeof(sum)); }
  void step(const uint8_t* a, const int8_t* b) {
    for (int64_t r = 0; r < ROWS; ++r)
      for (int64_t block = 0; block < B; ++block)
        for (int64_t c = 0; c < STEP; ++c)
          for (int64_t q = 0; q < 16; ++q)
            sum[r][block * 16 + q] += int32_t(a[r * STEP + c]) * b[block * 1024 + c / 4 * STEP + q * 4 + c % 4];
  }
  void store(int32_t* to) { std::memcpy(to, sum, sizeof(sum)); }
};

template <int BITS>
struct PlainCode {
  static constexpr int64_t PAIR_BYTES = PAIR * BITS / 8;
  static constexpr double NORM_UNIT = 1;

  template <bool NORMS>
  static void unpack(const StepPair& pair, const Levels& levels) {
    for (int64_t r = 0; r < pair.rows; ++r)
      for (int64_t c = 0; c < PAIR; ++c) {
        const int64_t bit = (BITS == 4 ? c % STEP * 2 + c / STEP : c) * BITS;
        const uint8_t code = bit / 8 < pair.row_bytes ? pair.codes[r * pair.stride + bit / 8] >> bit % 8 : 0;
        const uint8_t byte = bit / 8 < pair.row_bytes ? levels.byte[code & ((1 << BITS) - 1)] : 128;
        pair.to[c / STEP * pair.step_bytes + r * STEP + c % STEP] = byte;
        if (NORMS) pair.norms[r * 16 + c % 16] += (byte - 128) * (byte - 128);
      }
  }
};

}  // namespace

TileKernel choose_tile_kernel(Isa isa, int64_t queries) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (queries <= 3 * QUERIES) return nullptr;
  if (isa == Isa::avx512vnni) return multiply_tiles_avx512;
  if (isa == Isa::avx2) return multiply_tiles_avx2;
#endif
  return nullptr;
}

CodeKernel choose_code_kernel(Isa isa, int bits, int64_t queries) {
#if defined(__x86_64__) && defined(__GNUC__)
  // Up to so many queries, rows in pairs are faster; those of 2 bits would be unpacked without AVX-512.
  const int64_t few = bits == 8 ? 3 : bits == 4 ? 4 : bits == 2 ? 0 : 8;
  if (isa == Isa::amx) return queries > few ? amx_kernel(bits) : nullptr;
#endif
  if (isa != Isa::emulated_tiles) return nullptr;
  return bits == 8   ? multiply_codes<Emulated, PlainCode<8>>
         : bits == 4 ? multiply_codes<Emulated, PlainCode<4>>
         : bits == 2 ? multiply_codes<Emulated, PlainCode<2>>
                     : multiply_codes<Emulated, PlainCode<1>>;
}

}  // namespace jz3
