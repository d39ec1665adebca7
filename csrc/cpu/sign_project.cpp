// out += x Omega^T with signs that are made where they are used: 2,048 columns of four rows of Omega at a time, 1 KB of
// bits, by sixteen generators side by side; sixteen bits at a time become a vector of +-1, which six rows of x are
// multiplied with. Per sign and row of x one multiply-add of 16 a cycle and core (Zen 4), per sign a twentieth of a cycle
// for the generator. Every sum runs over 2,048 columns in sixteen lanes, and these sums are added in order, so that a row's
// result depends on nothing else.
#include "cpu/ops.h"
#include "cpu/parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC's own header (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <algorithm>

#define JZ3_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define JZ3_STEP JZ3_AVX512 inline __attribute__((always_inline))

namespace jz3 {
namespace {

constexpr int64_t LANES = 16, BITS = 128, CHUNK = LANES * BITS, ROWS = 4, PANEL = 96;

// Bits of a chunk of ROWS rows of Omega, in the order of the columns.
struct alignas(64) Signs {
  uint16_t sixteen[ROWS][CHUNK / 16];
};

// The counters of a chunk's sixteen blocks; lane 4 i + j has block 4 j + i, so that pieces of 128 bits come out in order.
struct alignas(64) Blocks {
  uint32_t low[LANES], high[LANES];
  explicit Blocks(uint64_t first) {
    for (int lane = 0; lane < LANES; ++lane) {
      const uint64_t block = first + 4 * (lane % 4) + lane / 4;
      low[lane] = uint32_t(block), high[lane] = uint32_t(block >> 32);
    }
  }
};

struct Product {
  __m512i high, low;
};

JZ3_STEP Product multiply(__m512i x, uint32_t constant) {
  const __m512i factor = _mm512_set1_epi64(constant);
  const __m512i even = _mm512_mul_epu32(x, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
  return {_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd),
          _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32))};
}

// philox() of common/philox.h, sixteen at a time.
JZ3_STEP void make_signs(uint64_t key, const Blocks& blocks, uint64_t row, uint16_t* bits) {
  __m512i c0 = _mm512_load_si512(blocks.low), c1 = _mm512_load_si512(blocks.high);
  __m512i c2 = _mm512_set1_epi32(int(row)), c3 = _mm512_set1_epi32(int(row >> 32));
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const Product p0 = multiply(c0, 0xD2511F53u), p1 = multiply(c2, 0xCD9E8D57u);
    c0 = _mm512_xor_si512(_mm512_xor_si512(p1.high, c1), _mm512_set1_epi32(int(k0)));
    c1 = p1.low;
    c2 = _mm512_xor_si512(_mm512_xor_si512(p0.high, c3), _mm512_set1_epi32(int(k1)));
    c3 = p0.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const __m512i low01 = _mm512_unpacklo_epi32(c0, c1), low23 = _mm512_unpacklo_epi32(c2, c3);
  const __m512i high01 = _mm512_unpackhi_epi32(c0, c1), high23 = _mm512_unpackhi_epi32(c2, c3);
  _mm512_store_si512(bits, _mm512_unpacklo_epi64(low01, low23));
  _mm512_store_si512(bits + 32, _mm512_unpackhi_epi64(low01, low23));
  _mm512_store_si512(bits + 64, _mm512_unpacklo_epi64(high01, high23));
  _mm512_store_si512(bits + 96, _mm512_unpackhi_epi64(high01, high23));
}

// Of four rows of Omega: vectors of signs, or of sums with a row of x.
struct Four {
  __m512 a, b, c, d;
};

// Sums of M rows of x; a chain of structures, because GCC keeps arrays in memory.
template <int M>
struct Sums {
  Four own;
  Sums<M - 1> rest;
};
template <>
struct Sums<0> {};

template <int M>
JZ3_STEP void clear(Sums<M>& sums) {
  sums.own.a = sums.own.b = sums.own.c = sums.own.d = _mm512_setzero_ps();
  if constexpr (M > 1) clear(sums.rest);
}

JZ3_STEP Four signs_of(const Signs& signs, int64_t i) {
  const __m512 plus = _mm512_set1_ps(1.0f), minus = _mm512_set1_ps(-1.0f);
  return {_mm512_mask_mov_ps(plus, signs.sixteen[0][i], minus), _mm512_mask_mov_ps(plus, signs.sixteen[1][i], minus),
          _mm512_mask_mov_ps(plus, signs.sixteen[2][i], minus), _mm512_mask_mov_ps(plus, signs.sixteen[3][i], minus)};
}

// The first `count` of sixteen columns.
template <bool ALL, int M>
JZ3_STEP void add(Sums<M>& sums, const Four& signs, const float* x, int64_t stride, int64_t count) {
  const __m512 some = ALL ? _mm512_loadu_ps(x) : _mm512_maskz_loadu_ps(__mmask16((1 << count) - 1), x);
  sums.own.a = _mm512_fmadd_ps(some, signs.a, sums.own.a);
  sums.own.b = _mm512_fmadd_ps(some, signs.b, sums.own.b);
  sums.own.c = _mm512_fmadd_ps(some, signs.c, sums.own.c);
  sums.own.d = _mm512_fmadd_ps(some, signs.d, sums.own.d);
  if constexpr (M > 1) add<ALL>(sums.rest, signs, x + stride, stride, count);
}

template <int M>
JZ3_STEP void finish(const Sums<M>& sums, float* out, int64_t stride, int64_t rows) {
  const float all[ROWS] = {_mm512_reduce_add_ps(sums.own.a), _mm512_reduce_add_ps(sums.own.b),
                           _mm512_reduce_add_ps(sums.own.c), _mm512_reduce_add_ps(sums.own.d)};
  for (int64_t r = 0; r < rows; ++r) out[r] += all[r];
  if constexpr (M > 1) finish(sums.rest, out + stride, stride, rows);
}

template <int M>
JZ3_AVX512 void multiply_rows(const Signs& signs, const float* x, int64_t x_stride, int64_t columns, float* out,
                              int64_t out_stride, int64_t rows) {
  Sums<M> sums;
  clear(sums);
  int64_t i = 0;
  for (; i < columns / LANES; ++i) add<true>(sums, signs_of(signs, i), x + i * LANES, x_stride, LANES);
  if (columns % LANES) add<false>(sums, signs_of(signs, i), x + i * LANES, x_stride, columns % LANES);
  finish(sums, out, out_stride, rows);
}

JZ3_AVX512 void project(const SignArguments& a, int64_t first, int64_t last) {
  Signs signs;
  for (int64_t panel = 0; panel < a.rows; panel += PANEL)
    for (int64_t column = 0; column < a.columns; column += CHUNK) {
      const Blocks blocks(a.first_block + uint64_t(column / BITS));
      const int64_t columns = std::min(CHUNK, a.columns - column), end = std::min(panel + PANEL, a.rows);
      for (int64_t r = first; r < last; r += ROWS) {
        for (int64_t i = 0; i < ROWS; ++i) make_signs(a.key, blocks, uint64_t(r + i), signs.sixteen[i]);
        for (int64_t s = panel; s < end;) {
          const float* const x = a.x + s * a.stride + column;
          float* const out = a.out + s * a.k + r;
          const int64_t left = end - s, rows = std::min(ROWS, last - r);
          if (left >= 6)
            multiply_rows<6>(signs, x, a.stride, columns, out, a.k, rows), s += 6;
          else if (left >= 4)
            multiply_rows<4>(signs, x, a.stride, columns, out, a.k, rows), s += 4;
          else if (left >= 2)
            multiply_rows<2>(signs, x, a.stride, columns, out, a.k, rows), s += 2;
          else
            multiply_rows<1>(signs, x, a.stride, columns, out, a.k, rows), s += 1;
        }
      }
    }
}

}  // namespace

bool has_sign_project() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

void sign_project(const SignArguments& a, int threads) {
  const int64_t parts = (a.k + ROWS - 1) / ROWS;
  parallel(parts, a.columns * ROWS * (a.rows + 4) / LANES, threads, [&](int64_t, int64_t begin, int64_t end) {
    project(a, begin * ROWS, std::min(end * ROWS, a.k));
  });
}

}  // namespace jz3
#else
namespace jz3 {
bool has_sign_project() { return false; }
void sign_project(const SignArguments&, int) {}
}  // namespace jz3
#endif
