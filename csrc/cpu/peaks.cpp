// What the machine can do at most, measured: products that never leave the registers, and a plain read of memory.
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "cpu/amx.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define JZ3_X86 1
#include <immintrin.h>
#endif

namespace jz3 {
namespace {

#ifdef JZ3_X86
// Each returns the multiplications and additions done; `sink` keeps the compiler from leaving them out.
using Loop = int64_t (*)(int64_t rounds, int32_t* sink);

__attribute__((target("avx2"))) int64_t loop_avx2(int64_t rounds, int32_t* sink) {
  __m256i total[8];
  for (auto& x : total) x = _mm256_set1_epi32(sink[0]);
  __m256i left = _mm256_set1_epi8(char(sink[1])), right = _mm256_set1_epi8(char(sink[2]));
  for (int64_t i = 0; i < rounds; ++i)
    for (auto& x : total) {
      __asm__ volatile("" : "+x"(left), "+x"(right));
      x = _mm256_add_epi32(x, _mm256_madd_epi16(_mm256_maddubs_epi16(left, right), _mm256_set1_epi16(1)));
    }
  for (auto& x : total) sink[0] += _mm256_extract_epi32(x, 0);
  return rounds * 8 * 64;
}

__attribute__((target("avx512f,avx512vnni"))) int64_t loop_avx512vnni(int64_t rounds, int32_t* sink) {
  __m512i total[16];
  for (auto& x : total) x = _mm512_set1_epi32(sink[0]);
  __m512i left = _mm512_set1_epi32(sink[1]), right = _mm512_set1_epi32(sink[2]);
  for (int64_t i = 0; i < rounds; ++i) {
    __asm__ volatile("" : "+v"(left), "+v"(right));
    for (auto& x : total) x = _mm512_dpbusd_epi32(x, left, right);
  }
  for (auto& x : total) sink[0] += _mm512_cvtsi512_si32(x);
  return rounds * 16 * 128;
}

int64_t loop_amx(int64_t rounds, int32_t*) {
  load_tile_shapes(TileShapes{});
  for (int64_t i = 0; i < rounds; ++i) {
    tile_add_bytes<0, 4, 6>();
    tile_add_bytes<1, 4, 7>();
    tile_add_bytes<2, 5, 6>();
    tile_add_bytes<3, 5, 7>();
  }
  release_tiles();
  return rounds * 4 * 2 * 16 * 16 * 64;
}

Loop choose_loop(Isa isa) {
  return isa == Isa::amx ? loop_amx : isa == Isa::avx512vnni ? loop_avx512vnni : isa == Isa::avx2 ? loop_avx2 : nullptr;
}
#endif

JZ3_CLONES uint64_t add_words(const uint8_t* bytes, int64_t count) {
  uint64_t total = 0;
  for (int64_t i = 0; i + 8 <= count; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    total += word;
  }
  return total;
}

}  // namespace

double peak_int8(int isa, int threads, double seconds) {
#ifdef JZ3_X86
  if (const Loop loop = choose_loop(choose_isa(isa))) {
    using Clock = std::chrono::steady_clock;
    std::atomic<int> ready{0};
    std::vector<double> rate(size_t(threads), 0.0);
    parallel(threads, 1000000, threads, [&](int64_t part, int64_t, int64_t) {
      int32_t sink[3] = {int32_t(part), 3, 5};
      ++ready;
      auto start = Clock::now();
      // All at once, unless there are fewer threads than wanted.
      while (ready < threads && Clock::now() - start < std::chrono::seconds(1)) {
      }
      int64_t done = 0;
      start = Clock::now();
      double passed = 0;
      while (passed < seconds) {
        done += loop(1 << 12, sink);
        passed = std::chrono::duration<double>(Clock::now() - start).count();
      }
      rate[part] = double(done) / passed + (sink[0] == 1234567 ? 1 : 0);
    });
    double sum = 0;
    for (double r : rate) sum += r;
    return sum;
  }
#endif
  throw std::invalid_argument("peak_int8 needs AVX2, AVX512-VNNI or AMX");
}

uint64_t read_all(const uint8_t* bytes, int64_t count, int threads) {
  std::vector<uint64_t> sums(size_t(std::max(threads, 1)), 0);
  parallel(count / 64, 64, threads, [&](int64_t part, int64_t first, int64_t last) {
    sums[part] = add_words(bytes + first * 64, (last - first) * 64);
  });
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace jz3
