// The tile kernel by AMX, with codes unpacked by AVX-512.
#include "cpu/amx.h"
#include "cpu/score_avx512.h"

#ifdef JZ3_AMX
#define JZ3_TARGET JZ3_AVX512
#include "cpu/score_tiles.h"

namespace jz3 {
namespace {

template <int R, int B>
struct Amx {
  static constexpr int64_t ROWS = 16 * R, WIDTH = 16 * B;

  static void begin() { load_tile_shapes(TileShapes{}); }
  static void end() { release_tiles(); }
  JZ3_INLINE void zero() {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  JZ3_INLINE void step(const uint8_t* a, const int8_t* b) {
    tile_load<4>(a, STEP);
    if constexpr (R == 2) tile_load<5>(a + 1024, STEP);
    multiply<0>(b);
  }
  template <int J = 0>
  JZ3_INLINE void store(int32_t* to) {
    tile_store<J>(to + J / B * 16 * WIDTH + J % B * 16, WIDTH * 4);
    if constexpr (J + 1 < R * B) store<J + 1>(to);
  }

 private:
  template <int J>
  JZ3_INLINE void multiply(const int8_t* b) {
    constexpr int block = R == 2 ? 6 + J : 5 + J % 3;
    tile_load<block>(b + J * 1024, STEP);
    tile_add_bytes<J, 4, block>();
    if constexpr (R == 2) tile_add_bytes<B + J, 5, block>();
    if constexpr (J + 1 < B) multiply<J + 1>(b);
  }
};

JZ3_INLINE __mmask64 first_bytes(int64_t count) {
  return count >= STEP ? ~uint64_t(0) : count > 0 ? (uint64_t(1) << count) - 1 : 0;
}

template <int BITS>
struct Avx512Code {
  static constexpr int64_t PAIR_BYTES = PAIR * BITS / 8;
  static constexpr double NORM_UNIT = BITS == 4 ? SQUARE : square_bound;

  // Prefetches into the L2 cache: the L1 cache is for the queries.
  template <bool NORMS>
  static JZ3_INLINE void unpack(StepPair pair, const Levels& levels) {
    const __m512i table = table_of(levels.byte), squares = table_of(levels.square);
    const __mmask64 known = first_bytes(pair.row_bytes), rest = first_bytes(pair.row_bytes - PAIR_BYTES / 2);
    for (; pair.rows > 0; --pair.rows, pair.codes += pair.stride, pair.to += STEP, pair.norms += 16) {
      __m512i first, second, norm = squares;
      if (NORMS) norm = _mm512_load_si512(pair.norms);
      if (BITS == 4) {
        const Codes codes = codes_of(_mm512_maskz_loadu_epi8(known, pair.codes));
        first = _mm512_shuffle_epi8(table, codes.low);
        second = _mm512_shuffle_epi8(table, codes.high);
        if (NORMS) add_code_squares(norm, codes, squares);
      } else {
        first = step(pair.codes, known, table);
        second = step(pair.codes + PAIR_BYTES / 2, rest, table);
        if (NORMS) add_squares(norm, first);
        if (NORMS) add_squares(norm, second);
      }
      _mm512_store_si512(pair.to, first);
      _mm512_store_si512(pair.to + pair.step_bytes, second);
      if (!NORMS) continue;
      _mm512_store_si512(pair.norms, norm);
      _mm_prefetch(reinterpret_cast<const char*>(pair.codes + pair.ahead), _MM_HINT_T1);
      if (BITS == 8) _mm_prefetch(reinterpret_cast<const char*>(pair.codes + pair.ahead + STEP), _MM_HINT_T1);
    }
  }

 private:
  // 64 columns, of whose bytes the first may be known; the digits of the others are 0.
  static JZ3_INLINE __m512i step(const uint8_t* codes, __mmask64 known, __m512i table) {
    if (BITS == 8) return _mm512_mask_loadu_epi8(_mm512_set1_epi8(-128), known, codes);
    const __m128i some = _mm_maskz_loadu_epi8(__mmask16(known & (BITS == 1 ? 0xFF : 0xFFFF)), codes);
    if (BITS == 1)
      return _mm512_shuffle_epi8(table, _mm512_maskz_set1_epi8(_cvtu64_mask64(_mm_cvtsi128_si64(some)), 1));
    const __m512i four = _mm512_cvtepu8_epi32(some);  // to the codes of a byte in four
    const __m512i two = _mm512_or_si512(four, _mm512_slli_epi32(four, 12));
    const __m512i each = _mm512_or_si512(two, _mm512_slli_epi32(two, 6));
    return _mm512_shuffle_epi8(table, _mm512_and_si512(each, _mm512_set1_epi8(3)));
  }
};

}  // namespace

CodeKernel amx_kernel(int bits) {
  return bits == 8   ? multiply_codes<Amx, Avx512Code<8>>
         : bits == 4 ? multiply_codes<Amx, Avx512Code<4>>
         : bits == 2 ? multiply_codes<Amx, Avx512Code<2>>
                     : multiply_codes<Amx, Avx512Code<1>>;
}

}  // namespace jz3
#endif
