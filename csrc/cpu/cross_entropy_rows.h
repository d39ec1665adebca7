// Cross entropy and its gradient with respect to the hidden states without logits in memory: of a block of rows and
// some hundred words the logits are made, turned into exp(z - z_target) and multiplied into the gradient at once.
// Shifted by its target's logit, a row needs no maximum. With e_v = exp(z_v - z_target) and rest = sum of e_v over the
// words but the target, loss = log(1 + rest) and grad = weight (sum of e_v W_v - rest W_target) / (1 + rest), again
// without the target: nothing cancels where it is all but certain. A loss beyond 80 overflows, and rest says so.
// In 8 bits (cpu/int8.h) are both products or none; the target's own logit and row of W never are.
// Include inside a region, behind cpu/bf16.h and cpu/tiles.h or behind cpu/avx2.h.
#pragma once

#include <cmath>
#include <cstring>

namespace jz3 {
namespace {

constexpr int64_t MOST_ROWS = 320;  // at a time
constexpr int64_t WORDS = 384;      // at a time, a multiple of the groups of words
constexpr int64_t LINE = WORDS + 32;  // of a row of them: rows of a tile must not meet in a few sets of the cache

// Both products of a block of rows with whole numbers.
template <class V, class T>
class WholeProducts {
 public:
  using Number = float;

  WholeProducts(const CrossEntropyArguments<T>& a, int64_t first, int64_t rows)
      : a_(a),
        rows_(rows),
        hidden_(rows, a.width, a.forward_group),
        e_(rows, WORDS, a.backward_group),
        h_(hidden_.fill(a.h + first * a.width, rows, a.width, a.width)) {}

  bool exponents(Number*, Vec*, const float*, const int64_t*, int64_t, int64_t) { return false; }
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
               const WholeRows<V>& x, float* sums, int64_t stride, bool add) {
    const int64_t size = V::part_bytes(group);
    for (int64_t n = 0; n < count; n += V::panel)
      panel_whole<V>(rows_, std::min(V::panel, count - n), group, x,
                     static_cast<const uint8_t*>(packed) + ((first + n) / V::panel * groups + own) * size, sums + n, stride,
                     add);
  }

  const CrossEntropyArguments<T>& a_;
  int64_t rows_;
  Quantised<V> hidden_, e_;
  WholeRows<V> h_;
};

template <class T>
float dot(const T* x, const T* y, int64_t width) {
  Vec sum = zeros();
  for (int64_t c = 0; c < width; c += LANES) sum = mul_add(load(x + c), load(y + c), sum);
  return sum_of(sum);
}

template <class Products, class T>
void cross_entropy_block(const CrossEntropyArguments<T>& a, int64_t first, int64_t rows) {
  using Number = typename Products::Number;
  Products products(a, first, rows);
  const int64_t stride = round_up(a.width, 64) + 16;
  Buffer<float> logit_buffer(rows * LINE), sum_buffer(rows * stride);
  Buffer<Number> e_buffer(rows * LINE);  // exp(z - z_target)
  float *logits = logit_buffer.get(), *sums = sum_buffer.get();
  Number* e = e_buffer.get();
  float own[MOST_ROWS];
  Vec rests[MOST_ROWS];
  const int64_t* target = a.target + first;
  for (int64_t i = 0; i < rows; ++i) {
    own[i] = dot(a.h + (first + i) * a.width, a.w + target[i] * a.width, a.width);
    rests[i] = zeros();
  }
  std::memset(sums, 0, size_t(rows * stride) * sizeof(float));
  for (int64_t word = 0; word < a.words; word += WORDS) {
    const int64_t count = std::min(WORDS, a.words - word);
    if (!products.exponents(e, rests, own, target, word, count)) {
      products.forward(word, count, logits);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < count; c += LANES) {
          const Vec z = load(logits + i * LINE + c) - all(own[i]);
          const Vec p = keep(others(target[i] - word - c, count - c), exp_ps(z));
          rests[i] = rests[i] + p;
          store(e + i * LINE + c, p);
        }
    }
    products.backward(word, count, e, sums, stride);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = first + i;
    const float rest = sum_of(rests[i]);
    a.rest[row] = rest;
    a.loss[row] = std::log1p(rest);
    const T* w = a.w + a.target[row] * a.width;
    const Vec factor = all(a.weight[row] / (1.0f + rest)), others = all(rest);
    for (int64_t c = 0; c < a.width; c += LANES) {
      const Vec sum = subtract_from(load(sums + i * stride + c), others, load(w + c));
      store(a.grad + row * a.width + c, factor * sum);
    }
  }
}

}  // namespace
}  // namespace jz3
