// Cross entropy and its gradient with respect to the hidden states without logits in memory: of a block of rows and
// some hundred words the logits are made, turned into exp(z - z_target) and multiplied into the gradient at once.
// Shifted by its target's logit, a row needs no maximum. With e_v = exp(z_v - z_target) and rest = sum of e_v over the
// words but the target, loss = log(1 + rest) and grad = weight (sum of e_v W_v - rest W_target) / (1 + rest), again
// without the target: nothing cancels where it is all but certain. A loss beyond 80 overflows, and rest says so.
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/ops.h"
#include "cpu/pool.h"
#include "cpu/tiles.h"

namespace jz3 {

#ifdef JZ3_BF16

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")

namespace {

constexpr int64_t ROWS = 144;   // at a time: their sums of width 576 stay in the second-level cache
constexpr int64_t WORDS = 512;  // at a time

struct Scratch {
  std::vector<float> logits, sums;
  std::vector<uint32_t> e;  // pairs of exp(z - z_target)
};

float dot(const bf16* x, const bf16* y, int64_t width) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < width; c += 16) sum = _mm512_fmadd_ps(load(x + c), load(y + c), sum);
  return _mm512_reduce_add_ps(sum);
}

void cross_entropy_block(const CrossEntropyArguments& a, int64_t first, int64_t rows, Scratch& scratch) {
  const int64_t pairs = a.width / 2;
  const auto* h = reinterpret_cast<const Pair*>(a.h + first * a.width);
  float own[ROWS], rest[ROWS] = {};
  for (int64_t i = 0; i < rows; ++i)
    own[i] = dot(a.h + (first + i) * a.width, a.w + a.target[first + i] * a.width, a.width);
  float* sums = scratch.sums.data();
  std::memset(sums, 0, size_t(rows * a.width) * sizeof(float));
  for (int64_t word = 0; word < a.words; word += WORDS) {
    const int64_t count = std::min(WORDS, a.words - word), padded = round_up(count, 16);
    float* logits = scratch.logits.data();
    multiply<bf16, true>(rows, count, pairs, {h, pairs, 1},
                         {a.forward + word * pairs, pairs * PANEL, PANEL}, logits, WORDS, false);
    auto* e = reinterpret_cast<bf16*>(scratch.e.data());
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t target = a.target[first + i] - word;
      if (0 <= target && target < count) logits[i * WORDS + target] = -INFINITY;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t c = 0; c < padded; c += 16) {
        const __mmask16 inside = __mmask16((1u << std::min<int64_t>(16, count - c)) - 1);
        const __m512 z = _mm512_sub_ps(_mm512_loadu_ps(logits + i * WORDS + c), _mm512_set1_ps(own[i]));
        const __m512 p = _mm512_maskz_mov_ps(inside, exp_ps(z));
        sum = _mm512_add_ps(sum, p);
        store(e + i * WORDS + c, p);
      }
      rest[i] += _mm512_reduce_add_ps(sum);
    }
    multiply<bf16, true>(rows, a.width, (count + 1) / 2, {scratch.e.data(), WORDS / 2, 1},
                         {a.backward + word / 2 * PANEL, (a.words + 1) / 2 * PANEL, PANEL}, sums, a.width, true);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = first + i;
    a.rest[row] = rest[i];
    a.loss[row] = std::log1p(rest[i]);
    const bf16* w = a.w + a.target[row] * a.width;
    const __m512 factor = _mm512_set1_ps(a.weight[row] / (1.0f + rest[i])), others = _mm512_set1_ps(rest[i]);
    for (int64_t c = 0; c < a.width; c += 16) {
      const __m512 sum = _mm512_fnmadd_ps(others, load(w + c), _mm512_loadu_ps(sums + i * a.width + c));
      store(a.grad + row * a.width + c, _mm512_mul_ps(factor, sum));
    }
  }
}

}  // namespace

#pragma GCC pop_options

void cross_entropy(const CrossEntropyArguments& a, int threads) {
  share_rows(a.rows, ROWS, threads, [&](int64_t begin, int64_t end) {
    Scratch scratch{std::vector<float>(ROWS * WORDS), std::vector<float>(ROWS * round_up(a.width, PANEL)),
                    std::vector<uint32_t>(ROWS * WORDS / 2)};
    cross_entropy_block(a, begin, end - begin, scratch);
  });
}

#endif

}  // namespace jz3
