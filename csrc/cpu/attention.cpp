// Causal attention with rotary positions, forward and backward, from one matrix of queries, keys and values.
//
// A task is one text and one key head with its query heads. Keys and values are rotated and packed once per task
// into units: single float32 numbers, or the pairs of bfloat16 that vdpbf16ps multiplies. Blocks of queries then
// see only the keys up to themselves. Scores stay in float32 and in the cache; the forward pass leaves every
// row's largest score and sum, from which the backward pass makes the probabilities again.
//
// Operations per text of S tokens and per query head of width D: 2 S^2 D forward, 5 S^2 D backward (half of
// the full square), plus what the blocks add along the diagonal.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/bf16.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"

namespace jz3 {

#ifdef JZ3_BF16

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")

namespace {

constexpr int64_t BLOCK = 48;  // queries at a time

// y = x rotated by the angle of its position.
template <class T>
void rotate(const T* x, const float* cosine, const float* sine, int64_t width, T* y) {
  const int64_t half = width / 2;
  for (int64_t c = 0; c < half; c += 16) {
    const __m512 low = load(x + c), high = load(x + half + c);
    store(y + c, _mm512_fnmadd_ps(high, _mm512_loadu_ps(sine + c), _mm512_mul_ps(low, _mm512_loadu_ps(cosine + c))));
    store(y + half + c, _mm512_fmadd_ps(low, _mm512_loadu_ps(sine + half + c),
                                        _mm512_mul_ps(high, _mm512_loadu_ps(cosine + half + c))));
  }
}

// The transpose of `rotate`, from float32.
template <class T>
void rotate_back(const float* x, const float* cosine, const float* sine, int64_t width, T* y) {
  const int64_t half = width / 2;
  for (int64_t c = 0; c < half; c += 16) {
    const __m512 low = _mm512_loadu_ps(x + c), high = _mm512_loadu_ps(x + half + c);
    store(y + c, _mm512_fmadd_ps(high, _mm512_loadu_ps(sine + half + c),
                                 _mm512_mul_ps(low, _mm512_loadu_ps(cosine + c))));
    store(y + half + c, _mm512_fnmadd_ps(low, _mm512_loadu_ps(sine + c),
                                         _mm512_mul_ps(high, _mm512_loadu_ps(cosine + half + c))));
  }
}

// Rows as the right operand: out[r / count][c] holds x[r][c] and, in a pair, x[r + 1][c] (zero after the last).
void pack_rows(const bf16* x, int64_t stride, int64_t rows, int64_t width, Pair* out) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < width; c += 16) {
      const auto* low = reinterpret_cast<const __m256i*>(x + r * stride + c);
      const auto* high = reinterpret_cast<const __m256i*>(x + (r + 1) * stride + c);
      _mm512_storeu_si512(out + r / 2 * width + c,
                          pairs(_mm256_loadu_si256(low),
                                r + 1 < rows ? _mm256_loadu_si256(high) : _mm256_setzero_si256()));
    }
}
void pack_rows(const float* x, int64_t stride, int64_t rows, int64_t width, float* out) {
  for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * width, x + r * stride, size_t(width) * sizeof(float));
}

// The transpose in panels of 64 rows: out[r / 64][c][r % 64] is unit c of row r; zero beyond `rows`.
template <class T>
void pack_columns(const T* x, int64_t stride, int64_t rows, int64_t width, typename Of<T>::Unit* out) {
  for (int64_t first = 0; first < rows; first += PANEL, out += units<T>(width) * PANEL)
    for (int64_t r = 0; r < PANEL; ++r) {
      const auto* row = reinterpret_cast<const typename Of<T>::Unit*>(x + (first + r) * stride);
      for (int64_t c = 0; c < units<T>(width); ++c) out[c * PANEL + r] = first + r < rows ? row[c] : 0;
    }
}

// What both directions need of a task's keys.
template <class T>
struct Task {
  const AttentionArguments<T>& a;
  int64_t text, head, stride, padded;
  const T *queries, *keys, *values;

  Task(const AttentionArguments<T>& arguments, int64_t index) : a(arguments) {
    text = index / a.key_heads, head = index % a.key_heads;
    stride = (a.heads + 2 * a.key_heads) * a.width;
    padded = round_up(a.tokens, PANEL);
    const T* row = a.qkv + text * a.tokens * stride;
    queries = row + head * (a.heads / a.key_heads) * a.width;
    keys = row + (a.heads + head) * a.width;
    values = keys + a.key_heads * a.width;
  }
  void rotated(const T* x, int64_t begin, int64_t count, T* out) const {
    for (int64_t r = begin; r < begin + count; ++r)
      rotate(x + r * stride, a.cosine + r * a.width, a.sine + r * a.width, a.width, out + (r - begin) * a.width);
  }
};

// Rows of unnormalised probabilities exp(scale * (score - top)); sums in float32.
template <class T>
void softmax_block(float* scores, int64_t stride, int64_t first, int64_t rows, float scale, T* p, float* top,
                   float* sum) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = scores + i * stride;
    const int64_t count = first + i + 1, end = round_up(first + rows, 32);
    for (int64_t c = count; c < end; ++c) row[c] = -INFINITY;
    __m512 largest = _mm512_set1_ps(-INFINITY);
    for (int64_t c = 0; c < count; c += 16) largest = _mm512_max_ps(largest, _mm512_loadu_ps(row + c));
    top[i] = _mm512_reduce_max_ps(largest);
    const __m512 shift = _mm512_set1_ps(top[i]);
    __m512 total = _mm512_setzero_ps();
    for (int64_t c = 0; c < end; c += 16) {
      const __m512 e = exp_ps(_mm512_mul_ps(factor, _mm512_sub_ps(_mm512_loadu_ps(row + c), shift)));
      total = _mm512_add_ps(total, e);
      store(p + i * stride + c, e);
    }
    sum[i] = _mm512_reduce_add_ps(total);
  }
}

template <class T>
const typename Of<T>::Unit* as_units(const T* row) {
  return reinterpret_cast<const typename Of<T>::Unit*>(row);
}

template <class T>
void forward_task(const AttentionArguments<T>& a, int64_t index) {
  const Task<T> task(a, index);
  const int64_t width = a.width, padded = task.padded, group = a.heads / a.key_heads, depth = units<T>(width);
  Buffer<T> rotated(a.tokens * width), block(BLOCK * width), p(BLOCK * padded);
  Buffer<typename Of<T>::Plain> keys(padded * depth), values(padded * depth);
  Buffer<float> scores(BLOCK * padded), out(BLOCK * width);
  float top[BLOCK], sum[BLOCK];
  task.rotated(task.keys, 0, a.tokens, rotated.get());
  pack_columns(rotated.get(), width, a.tokens, width, keys.get());
  pack_rows(task.values, task.stride, a.tokens, width, values.get());
  for (int64_t h = 0; h < group; ++h) {
    const int64_t head = task.head * group + h;
    for (int64_t first = 0; first < a.tokens; first += BLOCK) {
      const int64_t rows = std::min(BLOCK, a.tokens - first), seen = first + rows;
      task.rotated(task.queries + h * width, first, rows, block.get());
      multiply<T, true>(rows, seen, depth, {as_units(block.get()), depth, 1}, {keys.get(), depth * PANEL, PANEL},
                  scores.get(), padded, false);
      softmax_block(scores.get(), padded, first, rows, a.scale, p.get(), top, sum);
      multiply<T, true>(rows, width, units<T>(seen), {as_units(p.get()), units<T>(padded), 1},
                  {values.get(), PANEL, width}, out.get(), width, false);
      float* statistics = a.statistics + (task.text * a.heads + head) * 2 * a.tokens + first;
      for (int64_t i = 0; i < rows; ++i) {
        statistics[i] = top[i], statistics[a.tokens + i] = 1.0f / sum[i];
        const int64_t token = task.text * a.tokens + first + i;
        for (int64_t c = 0; c < width; c += 16)
          store(a.out + (token * a.heads + head) * width + c,
                _mm512_mul_ps(_mm512_loadu_ps(out.get() + i * width + c), _mm512_set1_ps(statistics[a.tokens + i])));
      }
    }
  }
}

// P = exp(scale * (score - top)) / sum and dS = scale * P * (dP - delta) of a block of queries: dS by rows for the
// queries' gradient, both in units of rows for the keys' and values'.
template <class T>
struct BackwardRows {
  const float *scores, *dp;
  int64_t stride, first, end;  // of the buffers; number of the first row's query; columns to fill
  float scale;
  const float *top, *inverse, *delta;  // inverse = 1 / sum

  void one(int64_t i, int64_t rows, int64_t c, __m512& p, __m512& d) const {
    const int64_t ahead = i < rows ? std::clamp<int64_t>(first + i + 1 - c, 0, 16) : 0;
    const __mmask16 seen = __mmask16((1u << ahead) - 1);
    const __m512 s = _mm512_maskz_loadu_ps(seen, scores + i * stride + c);
    const __m512 e = exp_ps(_mm512_mul_ps(_mm512_set1_ps(scale), _mm512_sub_ps(s, _mm512_set1_ps(top[i]))));
    p = _mm512_maskz_mul_ps(seen, e, _mm512_set1_ps(inverse[i]));
    const __m512 g = _mm512_sub_ps(_mm512_maskz_loadu_ps(seen, dp + i * stride + c), _mm512_set1_ps(delta[i]));
    d = _mm512_maskz_mul_ps(seen, _mm512_mul_ps(p, _mm512_set1_ps(scale)), g);
  }

  void run(int64_t rows, bf16* ds, Pair* p_units, Pair* ds_units) const {
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t c = 0; c < end; c += 16) {
        __m512 p[2], d[2];
        one(i, rows, c, p[0], d[0]);
        one(i + 1, rows, c, p[1], d[1]);
        const __m256i d_low = (__m256i)_mm512_cvtneps_pbh(d[0]), d_high = (__m256i)_mm512_cvtneps_pbh(d[1]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds + i * stride + c), d_low);
        _mm512_storeu_si512(ds_units + i / 2 * stride + c, pairs(d_low, d_high));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds + (i + 1) * stride + c), d_high);
        _mm512_storeu_si512(p_units + i / 2 * stride + c,
                            pairs((__m256i)_mm512_cvtneps_pbh(p[0]), (__m256i)_mm512_cvtneps_pbh(p[1])));
      }
  }

  void run(int64_t rows, float* ds, float* p_units, float*) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < end; c += 16) {
        __m512 p, d;
        one(i, rows, c, p, d);
        _mm512_storeu_ps(ds + i * stride + c, d);
        _mm512_storeu_ps(p_units + i * stride + c, p);
      }
  }
};

template <class T>
void backward_task(const AttentionArguments<T>& a, int64_t index) {
  using Plain = typename Of<T>::Plain;
  const Task<T> task(a, index);
  const int64_t width = a.width, padded = task.padded, group = a.heads / a.key_heads, row = a.heads * width;
  const int64_t depth = units<T>(width), block_units = units<T>(BLOCK);
  Buffer<T> rotated(a.tokens * width), block(BLOCK * width), ds(BLOCK * padded);
  Buffer<Plain> keys(padded * depth), key_rows(padded * depth), values(padded * depth);
  Buffer<Plain> query_rows(block_units * width), grad_rows(block_units * width);
  Buffer<Plain> p_units(block_units * padded), ds_pairs(Of<T>::count == 1 ? 1 : block_units * padded);
  Buffer<float> scores(BLOCK * padded), dp(BLOCK * padded), dq(BLOCK * width);
  Buffer<float> dk(padded * width), dv(padded * width);
  // Single numbers are their own units.
  const auto* ds_units = Of<T>::count == 1 ? as_units(ds.get()) : ds_pairs.get();
  float delta[BLOCK];
  task.rotated(task.keys, 0, a.tokens, rotated.get());
  pack_columns(rotated.get(), width, a.tokens, width, keys.get());
  pack_rows(rotated.get(), width, a.tokens, width, key_rows.get());
  pack_columns(task.values, task.stride, a.tokens, width, values.get());
  std::memset(dk.get(), 0, size_t(padded * width) * sizeof(float));
  std::memset(dv.get(), 0, size_t(padded * width) * sizeof(float));
  T* grad = a.dqkv + task.text * a.tokens * task.stride;
  for (int64_t h = 0; h < group; ++h) {
    const int64_t head = task.head * group + h;
    const T* out = a.out + task.text * a.tokens * row + head * width;
    const T* dout = a.dout + task.text * a.tokens * row + head * width;
    for (int64_t first = 0; first < a.tokens; first += BLOCK) {
      const int64_t rows = std::min(BLOCK, a.tokens - first), seen = first + rows;
      for (int64_t i = 0; i < rows; ++i) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < width; c += 16)
          sum = _mm512_fmadd_ps(load(out + (first + i) * row + c), load(dout + (first + i) * row + c), sum);
        delta[i] = _mm512_reduce_add_ps(sum);
      }
      task.rotated(task.queries + h * width, first, rows, block.get());
      pack_rows(block.get(), width, rows, width, query_rows.get());
      pack_rows(dout + first * row, row, rows, width, grad_rows.get());
      multiply<T, true>(rows, seen, depth, {as_units(block.get()), depth, 1}, {keys.get(), depth * PANEL, PANEL},
                  scores.get(), padded, false);
      multiply<T, true>(rows, seen, depth, {as_units(dout + first * row), units<T>(row), 1},
                  {values.get(), depth * PANEL, PANEL}, dp.get(), padded, false);
      const float* top = a.statistics + (task.text * a.heads + head) * 2 * a.tokens + first;
      BackwardRows<T>{scores.get(), dp.get(), padded, first, round_up(seen, 16), a.scale, top, top + a.tokens, delta}
          .run(rows, ds.get(), p_units.get(), ds_pairs.get());
      multiply<T, true>(rows, width, units<T>(seen), {as_units(ds.get()), units<T>(padded), 1},
                  {key_rows.get(), PANEL, width}, dq.get(), width, false);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t position = first + i;
        rotate_back(dq.get() + i * width, a.cosine + position * width, a.sine + position * width, width,
                    grad + position * task.stride + head * width);
      }
      multiply<T, false>(seen, width, units<T>(rows), {p_units.get(), 1, padded}, {grad_rows.get(), PANEL, width}, dv.get(),
                  width, true);
      multiply<T, false>(seen, width, units<T>(rows), {ds_units, 1, padded}, {query_rows.get(), PANEL, width}, dk.get(),
                  width, true);
    }
  }
  T* key_grad = grad + (a.heads + task.head) * width;
  for (int64_t r = 0; r < a.tokens; ++r) {
    rotate_back(dk.get() + r * width, a.cosine + r * width, a.sine + r * width, width, key_grad + r * task.stride);
    for (int64_t c = 0; c < width; c += 16)
      store(key_grad + a.key_heads * width + r * task.stride + c, _mm512_loadu_ps(dv.get() + r * width + c));
  }
}

}  // namespace

#pragma GCC pop_options

template <class T>
void attention(const AttentionArguments<T>& a, int threads) {
  parallel(a.texts * a.key_heads, a.tokens * a.tokens * a.width, threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) forward_task(a, i);
  });
}

template <class T>
void attention_backward(const AttentionArguments<T>& a, int threads) {
  parallel(a.texts * a.key_heads, a.tokens * a.tokens * a.width, threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) backward_task(a, i);
  });
}

template void attention(const AttentionArguments<float>&, int);
template void attention(const AttentionArguments<uint16_t>&, int);
template void attention_backward(const AttentionArguments<float>&, int);
template void attention_backward(const AttentionArguments<uint16_t>&, int);

#endif

}  // namespace jz3
