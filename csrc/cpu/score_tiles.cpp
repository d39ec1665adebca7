// The tile kernel: 32 rows x 32 queries in four accumulator tiles, 64 columns at a time, by AMX, and by a plain
// emulation of its tiles on machines without them. Rows are used where they lie.
#include "cpu/score_kernels.h"

#include <cstring>

#include "cpu/amx.h"

namespace jz3 {
namespace {

// Two tiles of rows a, two of queries b, four of sums: sum[i][j] += a[i] x b[j], with
// a: 16 rows of 64 bytes, b: 16 quads of columns x 16 queries x 4 columns.
struct Emulated {
  int32_t sum[2][2][16][16];
  uint8_t a[2][16][64];
  int8_t b[2][16][64];

  void begin() {}
  void end() {}
  void zero() { std::memset(sum, 0, sizeof(sum)); }
  void rows(const uint8_t* from, int64_t stride) {
    for (int r = 0; r < 32; ++r) std::memcpy(a[r / 16][r % 16], from + r * stride, 64);
  }
  void queries(const int8_t* first, const int8_t* second) {
    std::memcpy(b[0], first, 1024);
    std::memcpy(b[1], second, 1024);
  }
  void multiply() {
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j)
        for (int r = 0; r < 16; ++r)
          for (int c = 0; c < 64; ++c)
            for (int q = 0; q < 16; ++q) sum[i][j][r][q] += int32_t(a[i][r][c]) * b[j][c / 4][4 * q + c % 4];
  }
  void store(int32_t* to) {
    for (int r = 0; r < 32; ++r)
      for (int q = 0; q < 32; ++q) to[r * 32 + q] = sum[r / 16][q / 16][r % 16][q % 16];
  }
};

#ifdef JZ3_AMX
struct Amx {
  void begin() { load_tile_shapes(TileShapes{}); }
  void end() { release_tiles(); }
  void zero() {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  void rows(const uint8_t* from, int64_t stride) {
    tile_load<4>(from, stride);
    tile_load<5>(from + 16 * stride, stride);
  }
  void queries(const int8_t* first, const int8_t* second) {
    tile_load<6>(first, 64);
    tile_load<7>(second, 64);
  }
  void multiply() {
    tile_add_bytes<0, 4, 6>();
    tile_add_bytes<1, 4, 7>();
    tile_add_bytes<2, 5, 6>();
    tile_add_bytes<3, 5, 7>();
  }
  void store(int32_t* to) {
    tile_store<0>(to, 128);
    tile_store<1>(to + 16, 128);
    tile_store<2>(to + 16 * 32, 128);
    tile_store<3>(to + 16 * 32 + 16, 128);
  }
};
#endif

template <class Tiles>
void multiply_tiles(const uint8_t* bytes, int64_t stride, const int8_t* queries, int64_t columns, int64_t blocks,
                    const uint8_t* ahead, int64_t ahead_bytes, double* sums) {
  constexpr int64_t span = 1 << 15;  // columns whose sums fit 32 bits
  Tiles tiles;
  alignas(64) int32_t part[TILE_ROWS * 32];
  const int64_t block_bytes = columns * TILE_QUERIES, calls = (columns / STEP) * ((blocks + 1) / 2);
  const int64_t share = (ahead_bytes / (calls ? calls : 1) + 63) / 64 * 64;
  const uint8_t* const ahead_end = ahead + ahead_bytes;
  std::memset(sums, 0, sizeof(double) * TILE_ROWS * TILE_QUERIES * blocks);
  tiles.begin();
  for (int64_t block = 0; block < blocks; block += 2) {
    const int8_t* first = queries + block * block_bytes;
    const int8_t* second = block + 1 < blocks ? first + block_bytes : first;
    for (int64_t begin = 0; begin < columns; begin += span) {
      tiles.zero();
      for (int64_t c = begin; c < columns && c < begin + span; c += STEP) {
        tiles.rows(bytes + c, stride);
        tiles.queries(first + c * TILE_QUERIES, second + c * TILE_QUERIES);
        tiles.multiply();
        for (int64_t i = 0; i < share && ahead < ahead_end; i += 64, ahead += 64) __builtin_prefetch(ahead, 0, 2);
      }
      tiles.store(part);
      const int64_t width = second == first ? TILE_QUERIES : 2 * TILE_QUERIES;
      for (int64_t r = 0; r < TILE_ROWS; ++r)
        for (int64_t q = 0; q < width; ++q)
          sums[(r * blocks + block) * TILE_QUERIES + q] += double(part[r * 32 + q]);
    }
  }
  tiles.end();
}

}  // namespace

TileKernel choose_tile_kernel(Isa isa, int64_t queries) {
#ifdef JZ3_AMX
  if (isa == Isa::amx) return multiply_tiles<Amx>;
  if (isa == Isa::avx512vnni && queries > 3 * QUERIES) return multiply_tiles_avx512;
#endif
  return isa == Isa::emulated_tiles ? multiply_tiles<Emulated> : nullptr;
}

}  // namespace jz3
