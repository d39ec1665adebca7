// Cross entropy and its gradient with respect to the hidden states without logits in memory: of a block of rows and
// some hundred words the logits are made, turned into exp(z - z_target) and multiplied into the gradient at once.
// Shifted by its target's logit, a row needs no maximum. With e_v = exp(z_v - z_target) and rest = sum of e_v over the
// words but the target, loss = log(1 + rest) and grad = weight (sum of e_v W_v - rest W_target) / (1 + rest), again
// without the target: nothing cancels where it is all but certain. A loss beyond 80 overflows, and rest says so.
// In 8 bits (cpu/int8.h) are both products or none; the target's own logit and row of W never are.
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/int8.h"
#include "cpu/ops.h"
#include "cpu/pool.h"
#include "cpu/tiles.h"

namespace jz3 {

#ifdef JZ3_BF16

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,fma")

namespace {

constexpr int64_t ROWS = 144;   // at a time: their sums of width 576 stay in the second-level cache
constexpr int64_t TILES_ROWS = 320;  // the same on machines with tiles, whose second-level caches are larger
constexpr int64_t WORDS = 384;  // at a time, a multiple of the groups of words in 8 bits
constexpr int64_t LINE = WORDS + 32;  // of a row of them: rows of a tile must not meet in a few sets of the cache

// Of 16 columns those that count: not the target's, and none from the column `end` on.
inline __mmask16 others(int64_t target, int64_t end) {
  const uint32_t inside = end < 16 ? (1u << end) - 1 : 0xffffu;
  return __mmask16(0 <= target && target < 16 ? inside & ~(1u << target) : inside);
}

// exp(z - z_target) of a block of words' logits, while tiles form the next.
class Exponents : public RowByRow<Exponents> {
 public:
  // e[rows][LINE] and, by rows, their sums `rests`, the targets' logits `own` and the targets; `word` is the first of these
  // `count` words.
  Exponents(bf16* e, __m512* rests, const float* own, const int64_t* target, int64_t word, int64_t count)
      : e_(e), rests_(rests), own_(own), target_(target), word_(word), count_(count) {}
  Exponents down(int64_t m) const { return {e_ + m * LINE, rests_ + m, own_ + m, target_ + m, word_, count_}; }
  void put(int64_t row, int64_t column, const float* logits, bool wide) const {
    const __m512 shift = _mm512_set1_ps(own_[row]);
    const auto power = [&](int64_t c) {
      const __mmask16 seen = others(target_[row] - word_ - column - c, count_ - column - c);
      return _mm512_maskz_mov_ps(seen, exp_ps(_mm512_sub_ps(_mm512_loadu_ps(logits + c), shift)));
    };
    const __m512 low = power(0), high = wide ? power(TILE) : _mm512_setzero_ps();
    rests_[row] = _mm512_add_ps(rests_[row], _mm512_add_ps(low, high));
    _mm512_storeu_si512(e_ + row * LINE + column, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }

 private:
  bf16* e_;
  __m512* rests_;
  const float* own_;
  const int64_t* target_;
  int64_t word_, count_;
};

// Both products of a block of rows in bfloat16.
class Exact {
 public:
  using Number = bf16;  // of exp(z - z_target)

  Exact(const CrossEntropyArguments& a, int64_t first, int64_t rows)
      : a_(a), rows_(rows), h_(reinterpret_cast<const Pair*>(a.h + first * a.width)) {}

  // logits[rows][LINE] of `count` words.
  void forward(int64_t word, int64_t count, float* logits) {
    const int64_t pairs = a_.width / 2;
    PackedMatrix(a_.forward, a_.width).multiply(rows_, count, pairs, {h_, pairs, 1}, 0, word, logits, LINE, false);
  }
  // e = exp(z - z_target) and rests += their sums; false if that isn't done here.
  bool exponents(Number* e, __m512* rests, const float* own, const int64_t* target, int64_t word, int64_t count) {
    if (tile_unit() == TileUnit::none || a_.width % (2 * TILE)) return false;
    const Exponents result{e, rests, own, target, word, count};
    PackedMatrix(a_.forward, a_.width).multiply_into(result, rows_, count, {h_, a_.width / 2, 1}, word, NOTHING,
                       PackedMatrix(a_.backward, a_.words).units(word / 2, count / 2, a_.width, steps()));
    return true;
  }
  // sums[rows][stride] += e[rows][LINE] W.
  void backward(int64_t word, int64_t count, const Number* e, float* sums, int64_t stride) {
    const Left<Of<bf16>> left{reinterpret_cast<const Pair*>(e), LINE / 2, 1};
    const int64_t next = word + count;
    const Nearer coming = PackedMatrix(a_.forward, a_.width).columns(next, std::min(WORDS, a_.words - next), steps());
    PackedMatrix(a_.backward, a_.words)
        .multiply(rows_, a_.width, (count + 1) / 2, left, word / 2, 0, sums, stride, true, NOTHING, false, coming);
  }

 private:
  // Of either product, each bringing the other's matrix nearer: the rows are near as it is.
  int64_t steps() const { return round_up(rows_, 2 * TILE) * WORDS / (2 * TILE) * a_.width / (2 * TILE) / (2 * TILE); }
  static constexpr int64_t NOTHING = -TILES_ROWS;

  const CrossEntropyArguments& a_;
  int64_t rows_;
  const Pair* h_;
};

// The same in 8 bits.
class Int8 {
 public:
  using Number = float;

  Int8(const CrossEntropyArguments& a, int64_t first, int64_t rows)
      : a_(a),
        rows_(rows),
        hidden_(rows, a.width, a.forward_group),
        e_(rows, WORDS, a.backward_group),
        h_(hidden_.fill(a.h + first * a.width, rows, a.width, a.width)) {}

  bool exponents(Number*, __m512*, const float*, const int64_t*, int64_t, int64_t) { return false; }
  void forward(int64_t word, int64_t count, float* logits) {
    product(a_.forward, a_.forward_group, h_.groups, word, count, 0, h_, logits, LINE, false);
  }
  void backward(int64_t word, int64_t count, const Number* e, float* sums, int64_t stride) {
    const int64_t group = a_.backward_group, groups = (a_.words + group - 1) / group;
    product(a_.backward, group, groups, 0, a_.width, word / group, e_.fill(e, rows_, count, LINE), sums, stride,
            true);
  }

 private:
  // Columns first .. first + count of a packed matrix with `groups` groups a column, from group `own` on.
  void product(const void* packed, int64_t group, int64_t groups, int64_t first, int64_t count, int64_t own,
               const Int8Rows& x, float* sums, int64_t stride, bool add) {
    const int64_t size = INT8_HEAD + PANEL * group;
    for (int64_t n = 0; n < count; n += PANEL)
      panel_int8(rows_, std::min(PANEL, count - n), group, x,
                 static_cast<const uint8_t*>(packed) + ((first + n) / PANEL * groups + own) * size, sums + n, stride, add);
  }

  const CrossEntropyArguments& a_;
  int64_t rows_;
  Quantised hidden_, e_;
  Int8Rows h_;
};

float dot(const bf16* x, const bf16* y, int64_t width) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < width; c += 16) sum = _mm512_fmadd_ps(load(x + c), load(y + c), sum);
  return _mm512_reduce_add_ps(sum);
}

template <class Products>
void cross_entropy_block(const CrossEntropyArguments& a, int64_t first, int64_t rows) {
  using Number = typename Products::Number;
  Products products(a, first, rows);
  const int64_t stride = round_up(a.width, PANEL) + 16;
  Buffer<float> logit_buffer(rows * LINE), sum_buffer(rows * stride);
  Buffer<Number> e_buffer(rows * LINE);  // exp(z - z_target)
  float *logits = logit_buffer.get(), *sums = sum_buffer.get();
  Number* e = e_buffer.get();
  float own[TILES_ROWS];
  __m512 rests[TILES_ROWS];
  const int64_t* target = a.target + first;
  for (int64_t i = 0; i < rows; ++i) {
    own[i] = dot(a.h + (first + i) * a.width, a.w + target[i] * a.width, a.width);
    rests[i] = _mm512_setzero_ps();
  }
  std::memset(sums, 0, size_t(rows * stride) * sizeof(float));
  for (int64_t word = 0; word < a.words; word += WORDS) {
    const int64_t count = std::min(WORDS, a.words - word);
    if (!products.exponents(e, rests, own, target, word, count)) {
      products.forward(word, count, logits);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < count; c += 16) {
          const __m512 z = _mm512_sub_ps(_mm512_loadu_ps(logits + i * LINE + c), _mm512_set1_ps(own[i]));
          const __m512 p = _mm512_maskz_mov_ps(others(target[i] - word - c, count - c), exp_ps(z));
          rests[i] = _mm512_add_ps(rests[i], p);
          store(e + i * LINE + c, p);
        }
    }
    products.backward(word, count, e, sums, stride);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = first + i;
    const float rest = _mm512_reduce_add_ps(rests[i]);
    a.rest[row] = rest;
    a.loss[row] = std::log1p(rest);
    const bf16* w = a.w + a.target[row] * a.width;
    const __m512 factor = _mm512_set1_ps(a.weight[row] / (1.0f + rest)), others = _mm512_set1_ps(rest);
    for (int64_t c = 0; c < a.width; c += 16) {
      const __m512 sum = _mm512_fnmadd_ps(others, load(w + c), _mm512_loadu_ps(sums + i * stride + c));
      store(a.grad + row * a.width + c, _mm512_mul_ps(factor, sum));
    }
  }
}

}  // namespace

#pragma GCC pop_options

void cross_entropy(const CrossEntropyArguments& a, int threads) {
  if (a.backward_group && WORDS % a.backward_group)
    throw std::invalid_argument("backward_group must divide " + std::to_string(WORDS) + ", got " +
                                std::to_string(a.backward_group));
  const bool tiles = tile_unit() != TileUnit::none && !a.forward_group;
  const int64_t most = tiles ? TILES_ROWS : ROWS, unit = tiles ? 2 * TILE : 1;
  // As many for every thread.
  const int64_t shares = threads * std::max<int64_t>((a.rows + threads * most - 1) / (threads * most), 1);
  const int64_t block = std::max(round_up((a.rows + shares - 1) / shares, unit), unit);
  share_rows(a.rows, block, threads, [&](int64_t begin, int64_t end) {
    if (a.forward_group)
      cross_entropy_block<Int8>(a, begin, end - begin);
    else
      cross_entropy_block<Exact>(a, begin, end - begin);
  });
}

#endif

}  // namespace jz3
