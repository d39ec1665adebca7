// The tiles of AMX: eight registers of 16 rows of 64 bytes. Instructions of our own and not the compiler's intrinsics,
// which don't tell it what memory they read: GCC 12 drops the stores that fill the configuration.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define JZ3_AMX

namespace jz3 {

// How many rows and bytes of every tile are used, as ldtilecfg reads it.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Empties all tiles.
inline void load_tile_shapes(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes)); }

inline void release_tiles() { __asm__ volatile("tilerelease"); }

template <int Tile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(Tile));
}

template <int Tile>
inline void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
}

// The same of what is read once: it leaves the first-level cache to others.
template <int Tile>
inline void tile_load_once(const void* from, int64_t stride) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
}

template <int Tile>
inline void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Tile) : "memory");
}

// Sums += a b of unsigned bytes a and signed bytes b, four at a time.
template <int Sums, int A, int B>
inline void tile_add_bytes() {
  __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
}

// Sums += a b of pairs of bfloat16 numbers.
template <int Sums, int A, int B>
inline void tile_add_pairs() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
}

}  // namespace jz3
#endif
