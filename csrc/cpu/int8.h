// Rows and packed matrices in 8 bits for cpu/whole.h: 255 levels per group of numbers. Include after the standard headers, as
// bf16.h; may run only where has_int8_products().
//
// Before they are rounded, every 64 numbers are multiplied with a Hadamard matrix, which leaves products as they are and
// spreads what is larger than its neighbours, by which their common scale would be set.
//
// vpdpbusd takes unsigned numbers on its left: rows are stored plus 128, and sums start at -128 times the column's sum.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>

#include "cpu/bf16.h"
#include "cpu/ops.h"
#include "cpu/tiles.h"

#ifdef JZ3_BF16

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,fma")

#include "cpu/whole.h"

namespace jz3 {
namespace {

constexpr int64_t TURNED = 64;
typedef uint32_t __attribute__((may_alias)) Four;  // bytes

// The bits of numbers without their sign: as whole numbers they are ordered as the numbers are, NaN above infinity.
inline __m512 magnitude(__m512 x) { return _mm512_and_ps(x, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff))); }

// Lane i of x plus, or minus where bit `Bit` of i is set, lane i with this bit turned over.
template <int Bit>
inline __m512 turn_lanes(__m512 x, __m512 other) {
  const __m512 minus = _mm512_set1_ps(-1.0f);
  constexpr __mmask16 set = Bit == 1 ? 0xAAAA : Bit == 2 ? 0xCCCC : Bit == 4 ? 0xF0F0 : 0xFF00;
  return _mm512_fmadd_ps(x, _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), set, minus), other);
}

// x times a Hadamard matrix.
inline __m512 turn_lanes(__m512 x) {
  x = turn_lanes<1>(x, _mm512_permute_ps(x, 0xB1));
  x = turn_lanes<2>(x, _mm512_permute_ps(x, 0x4E));
  x = turn_lanes<4>(x, _mm512_shuffle_f32x4(x, x, 0xB1));
  return turn_lanes<8>(x, _mm512_shuffle_f32x4(x, x, 0x4E));
}

// 64 numbers times a Hadamard matrix, whose square is 64.
struct Turned {
  __m512 a, b, c, d;
  void turn() {
    const __m512 e = _mm512_add_ps(a, b), f = _mm512_sub_ps(a, b), g = _mm512_add_ps(c, d), h = _mm512_sub_ps(c, d);
    a = turn_lanes(_mm512_add_ps(e, g)), b = turn_lanes(_mm512_add_ps(f, h));
    c = turn_lanes(_mm512_sub_ps(e, g)), d = turn_lanes(_mm512_sub_ps(f, h));
  }
  void keep(float* x) const {
    _mm512_store_ps(x, a), _mm512_store_ps(x + 16, b), _mm512_store_ps(x + 32, c), _mm512_store_ps(x + 48, d);
  }
};

// The first `count` of 16 numbers, zeros behind them.
template <class T>
inline __m512 load_some(const T* x, int64_t count) {
  if (count >= LANES) return load(x);
  return load_part(x, first_lanes(std::max<int64_t>(count, 0)));
}

// 64 numbers times `inverse` as bytes, in the order in which packing leaves them: rows' as matrices'.
inline __m512i bytes(const float* x, __m512 inverse) {
  const auto whole = [&](int64_t i) { return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(x + i), inverse)); };
  return _mm512_packs_epi16(_mm512_packs_epi32(whole(0), whole(16)), _mm512_packs_epi32(whole(32), whole(48)));
}

struct Int8 {
  using Number = uint8_t;
  using Register = __m512i;
  static constexpr int64_t count = 4, panel = INT8_PANEL;
  static constexpr int rows = 6;
  static constexpr float gain = TURNED;  // of both turns
  static constexpr bool ahead = false;

  // As it lies in memory, in fours of the group's numbers.
  struct Part {
    int32_t start[panel];  // -128 times the sum of the column's numbers
    float scale[panel];
    int8_t number[1][panel][count];  // as many as the group has
  };
  static constexpr int64_t part_bytes(int64_t group) { return offsetof(Part, number) + panel * group; }

  static float levels(int64_t) { return 127; }
  static Register load(const void* p) { return _mm512_load_si512(p); }
  static Register spread(const Number* p) { return _mm512_set1_epi32(int(*reinterpret_cast<const Four*>(p))); }
  static Register start(const Part& part, int64_t column) { return load(part.start + column); }
  static Vec numbers(Register x) { return _mm512_cvtepi32_ps(x); }
  // An instruction and not an intrinsic, for which GCC copies the sums to and fro.
  static void add_products(Register& sums, Register x, Register w) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
  }

  static void prepare(float* column, int64_t group) {
    for (int64_t k = 0; k < group; k += TURNED) {
      const float* x = column + k;
      Turned part{jz3::load(x), jz3::load(x + 16), jz3::load(x + 32), jz3::load(x + 48)};
      part.turn();
      part.keep(column + k);
    }
  }
  static void set(Part& part, int64_t n, const float* column, int64_t group, float inverse) {
    int32_t sum = 0;
    for (int64_t k = 0; k < group; k += TURNED) {
      alignas(64) int8_t q[TURNED];
      _mm512_store_si512(q, bytes(column + k, all(inverse)));
      for (int64_t i = 0; i < TURNED; ++i) part.number[(k + i) / 4][n][i % 4] = q[i], sum += q[i];
    }
    part.start[n] = -128 * sum;
  }

  template <class T>
  static float quantise(const T* x, int64_t group, int64_t count, float* turned, Number* q) {
    __m512i top = _mm512_setzero_si512();
    for (int64_t i = 0; i < group; i += TURNED) {
      const int64_t left = count - i;
      Turned part{load_some(x + i, left), load_some(x + i + 16, left - 16), load_some(x + i + 32, left - 32),
                  load_some(x + i + 48, left - 48)};
      part.turn();
      part.keep(turned + i);
      for (const __m512 y : {part.a, part.b, part.c, part.d})
        top = _mm512_max_epu32(top, _mm512_castps_si512(magnitude(y)));
    }
    const int32_t bits = int32_t(_mm512_reduce_max_epu32(top));
    float largest;
    std::memcpy(&largest, &bits, 4);
    const Vec inverse = all(inverse_of(largest, levels(group)));
    for (int64_t c = 0; c < group; c += TURNED)
      _mm512_store_si512(q + c, _mm512_xor_si512(bytes(turned + c, inverse), _mm512_set1_epi8(char(0x80))));
    return scale_of(largest, levels(group));
  }
};

}  // namespace
}  // namespace jz3

#pragma GCC pop_options
#endif
