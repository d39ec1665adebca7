// Cross entropy in bfloat16, with exact products or in 8 bits, and in float32 with products in 8 or 16 bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/block_kernels.h"
#include "cpu/int8.h"
#include "cpu/ops.h"
#include "cpu/pool.h"
#include "cpu/tiles.h"

#ifdef JZ3_BF16

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,fma")
#include "cpu/cross_entropy_rows.h"

namespace jz3 {
namespace {

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
      const Mask seen = others(target_[row] - word_ - column - c, count_ - column - c);
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

  Exact(const CrossEntropyArguments<bf16>& a, int64_t first, int64_t rows)
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
  static constexpr int64_t NOTHING = -MOST_ROWS;

  const CrossEntropyArguments<bf16>& a_;
  int64_t rows_;
  const Pair* h_;
};

}  // namespace
}  // namespace jz3

#pragma GCC pop_options

namespace jz3 {

template <class T>
void cross_entropy(const CrossEntropyArguments<T>& a, int threads) {
  if (a.backward_group && WORDS % a.backward_group)
    throw std::invalid_argument("backward_group must divide " + std::to_string(WORDS) + ", got " +
                                std::to_string(a.backward_group));
  // Sums of 144 rows of width 576 stay in the second-level cache; on machines with tiles it is larger, on those with AVX2
  // alone it also holds the rows' logits.
  const bool tiles = !a.bits && tile_unit() != TileUnit::none;
  const int64_t most = a.bits == 16 ? 72 : tiles ? MOST_ROWS : 144, unit = tiles ? 2 * TILE : 1;
  // As many for every thread.
  const int64_t shares = threads * std::max<int64_t>((a.rows + threads * most - 1) / (threads * most), 1);
  const int64_t block = std::max(round_up((a.rows + shares - 1) / shares, unit), unit);
  share_rows(a.rows, block, threads, [&](int64_t begin, int64_t end) {
    if (a.bits == 8) return cross_entropy_block<WholeProducts<Int8, T>>(a, begin, end - begin);
    if constexpr (std::is_same_v<T, float>)
      cross_entropy_block_int16(a, begin, end - begin);
    else
      cross_entropy_block<Exact>(a, begin, end - begin);
  });
}

template void cross_entropy(const CrossEntropyArguments<float>&, int);
template void cross_entropy(const CrossEntropyArguments<uint16_t>&, int);

}  // namespace jz3

#endif
