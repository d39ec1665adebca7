// Rows of float32 and packed matrices in 16 bits for cpu/whole.h, on AVX2. Include inside a region, behind cpu/avx2.h.
//
// vpmaddwd sums pairs of products in 32 bits, and so must a group's products fit: with 192 numbers a group there are 3,344
// levels on either side of zero, which is finer than bfloat16 as long as a number is above a 13th of its group's largest.
#pragma once

#include <cstddef>

#include "cpu/whole.h"

namespace jz3 {
namespace {

struct Int16 {
  using Number = int16_t;
  using Register = __m256i;
  static constexpr int64_t count = 2, panel = INT16_PANEL;
  static constexpr int rows = 6;
  static constexpr float gain = 1;
  static constexpr bool ahead = true;  // first-level caches are small where AVX2 is the best

  // As it lies in memory, in pairs of the group's numbers.
  struct Part {
    float scale[panel];
    int16_t number[1][panel][count];  // as many as the group has
  };
  static constexpr int64_t part_bytes(int64_t group) { return offsetof(Part, number) + 2 * panel * group; }

  static float levels(int64_t group) { return std::floor(std::sqrt(2147483647.0 / double(group))); }
  static Register load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
  static Register spread(const Number* p) {
    int pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm256_set1_epi32(pair);
  }
  static Register start(const Part&, int64_t) { return _mm256_setzero_si256(); }
  static Vec numbers(Register x) { return _mm256_cvtepi32_ps(x); }
  // Instructions and not intrinsics, for which GCC copies the sums to and fro.
  static void add_products(Register& sums, Register x, Register w) {
    Register products;
    __asm__("vpmaddwd %1, %2, %0" : "=x"(products) : "x"(x), "x"(w));
    __asm__("vpaddd %1, %0, %0" : "+x"(sums) : "x"(products));
  }

  static void prepare(float*, int64_t) {}
  static void set(Part& part, int64_t n, const float* column, int64_t group, float inverse) {
    for (int64_t k = 0; k < group; ++k) part.number[k / 2][n][k % 2] = int16_t(std::nearbyint(column[k] * inverse));
  }

  static float quantise(const float* x, int64_t group, int64_t count, float* room, Number* q) {
    if (count < group) {
      std::memcpy(room, x, size_t(count) * sizeof(float));
      std::memset(room + count, 0, size_t(group - count) * sizeof(float));
      x = room;
    }
    // As whole numbers, bits without a sign are ordered as the numbers are, NaN above infinity.
    const __m256i unsigned_bits = _mm256_set1_epi32(0x7fffffff);
    __m256i top = _mm256_setzero_si256();
    for (int64_t i = 0; i < group; i += LANES)
      top = _mm256_max_epu32(top, _mm256_and_si256(unsigned_bits, _mm256_castps_si256(jz3::load(x + i))));
    alignas(32) uint32_t lanes[LANES];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), top);
    const uint32_t bits = *std::max_element(lanes, lanes + LANES);
    float largest;
    std::memcpy(&largest, &bits, 4);
    const Vec inverse = all(inverse_of(largest, levels(group)));
    const auto whole = [&](int64_t i) { return _mm256_cvtps_epi32(jz3::load(x + i) * inverse); };
    for (int64_t i = 0; i < group; i += 2 * LANES)
      _mm256_store_si256(reinterpret_cast<__m256i*>(q + i),
                         _mm256_permute4x64_epi64(_mm256_packs_epi32(whole(i), whole(i + LANES)), 0xD8));
    return scale_of(largest, levels(group));
  }
};

}  // namespace
}  // namespace jz3
