// Causal attention with rotary positions, forward and backward, from one matrix of queries, keys and values. Include inside
// a region, behind cpu/bf16.h and cpu/tiles.h or behind cpu/avx2.h.
//
// A task is one text and one key head with its query heads. Keys and values are rotated and packed once per task
// into units: single float32 numbers, or the pairs of bfloat16 that vdpbf16ps multiplies. Blocks of queries, of all of
// the task's heads at once, then see only the keys up to themselves. Scores stay in float32 and in the cache; the
// forward pass leaves the logarithm of every row's sum, from which the backward pass makes the probabilities again.
//
// Operations per text of S tokens and per query head of width D: 2 S^2 D forward, 5 S^2 D backward (half of
// the full square), plus what the blocks add along the diagonal.
#pragma once

#include <cstring>

#include "cpu/nearer.h"

namespace jz3 {
namespace {

constexpr int64_t KEYS = 64;  // at a time in the backward pass, whole panels

// Queries at a time, of all heads of a task, and to what the inner dimension is filled up with zeros.
struct Sizes {
  int64_t rows, fill;
};
template <class T>
Sizes sizes() {
#ifdef JZ3_BF16_PRODUCTS
  if (std::is_same_v<T, bf16> && tile_unit() != TileUnit::none) return {96, 2 * TILE};
#endif
  return {48, 2};
}

// Numbers below float32's smallest normal count as zero while it lives: they cost a hundred times as much.
class FlushedToZero {
 public:
  FlushedToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushedToZero() { _mm_setcsr(before_); }
  FlushedToZero(const FlushedToZero&) = delete;
  FlushedToZero& operator=(const FlushedToZero&) = delete;

 private:
  unsigned before_;
};

// y = x rotated by the angle of its position.
template <class T>
void rotate(const T* x, const float* cosine, const float* sine, int64_t width, T* y) {
  const int64_t half = width / 2;
  for (int64_t c = 0; c < half; c += LANES) {
    const Vec low = load(x + c), high = load(x + half + c);
    store(y + c, subtract_from(low * load(cosine + c), high, load(sine + c)));
    store(y + half + c, mul_add(low, load(sine + half + c), high * load(cosine + half + c)));
  }
}

// The transpose of `rotate`, from float32.
template <class T>
void rotate_back(const float* x, const float* cosine, const float* sine, int64_t width, T* y) {
  const int64_t half = width / 2;
  for (int64_t c = 0; c < half; c += LANES) {
    const Vec low = load(x + c), high = load(x + half + c);
    store(y + c, mul_add(high, load(sine + half + c), low * load(cosine + c)));
    store(y + half + c, subtract_from(high * load(cosine + half + c), low, load(sine + c)));
  }
}

// Rows as the right operand: out[r / count][c] holds x[r][c] and, in a pair, x[r + 1][c]; zero from `rows` to `end`.
#ifdef JZ3_BF16_PRODUCTS
void pack_rows(const bf16* x, int64_t stride, int64_t rows, int64_t end, int64_t width, Pair* out) {
  const auto row = [&](int64_t r, int64_t c) {
    return r < rows ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + r * stride + c)) : _mm256_setzero_si256();
  };
  for (int64_t r = 0; r < end; r += 2)
    for (int64_t c = 0; c < width; c += LANES) _mm512_storeu_si512(out + r / 2 * width + c, pairs(row(r, c), row(r + 1, c)));
}
#endif
void pack_rows(const float* x, int64_t stride, int64_t rows, int64_t end, int64_t width, float* out) {
  for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * width, x + r * stride, size_t(width) * sizeof(float));
  std::memset(out + rows * width, 0, size_t((end - rows) * width) * sizeof(float));
}

// The transpose of what pack_rows leaves: out[c][u] = in[u][c].
inline void turn_units(const void* in, int64_t units, int64_t width, void* out, int64_t stride) {
  for (int64_t u = 0; u < units; u += LANES)
    for (int64_t c = 0; c < width; c += LANES)
      transpose(static_cast<const uint32_t*>(in) + u * width + c, width, units - u,
                static_cast<uint32_t*>(out) + c * stride + u, stride);
}

// The transpose in panels of rows: out[r / PANEL][c][r % PANEL] is unit c of row r; zero beyond `rows`.
template <class T>
void pack_columns(const T* x, int64_t stride, int64_t rows, int64_t width, typename Of<T>::Unit* out) {
  for (int64_t first = 0; first < rows; first += PANEL, out += units<T>(width) * PANEL)
    for (int64_t r = 0; r < PANEL; r += LANES)
      for (int64_t c = 0; c < units<T>(width); c += LANES)
        transpose(x + (first + r) * stride + c * Of<T>::count, stride / Of<T>::count, rows - first - r,
                  out + c * PANEL + r, PANEL);
}

// What both directions need of a task's keys.
template <class T>
struct Task {
  const AttentionArguments<T>& a;
  int64_t text, head, stride, padded;
  int64_t line;  // of a row of scores: rows of a tile must not meet in a few sets of the cache
  const T *queries, *keys, *values;

  Task(const AttentionArguments<T>& arguments, int64_t index) : a(arguments) {
    text = index / a.key_heads, head = index % a.key_heads;
    stride = (a.heads + 2 * a.key_heads) * a.width;
    padded = round_up(a.tokens, KEYS), line = padded + 32;
    const T* row = a.qkv + text * a.tokens * stride;
    queries = row + head * (a.heads / a.key_heads) * a.width;
    keys = row + (a.heads + head) * a.width;
    values = keys + a.key_heads * a.width;
  }
  void rotated(const T* x, int64_t begin, int64_t count, T* out) const {
    for (int64_t r = begin; r < begin + count; ++r)
      rotate(x + r * stride, a.cosine + r * a.width, a.sine + r * a.width, a.width, out + (r - begin) * a.width);
  }
  int64_t group() const { return a.heads / a.key_heads; }
  int64_t block() const { return std::max<int64_t>(4, sizes<T>().rows / group()); }  // queries of a head at a time
  float* statistics(int64_t h) const {
    return a.statistics + (text * a.heads + head * group() + h) * a.tokens;
  }
};

// Rows of a block: query `first + r % count` of head r / count.
struct Block {
  int64_t first, count, rows;
  int64_t query(int64_t r) const { return first + r % count; }
  int64_t seen() const { return first + count; }
  int64_t end() const { return round_up(seen(), 32); }  // of the keys that there are scores for
};

// What the next block of queries reads, or after the last the next task, brought nearer while this block is computed: a
// head's rows are short and lie far apart.
template <class T>
class Coming {
 public:
  // Within `steps`; the backward pass reads outputs and their gradients too.
  Coming(const Task<T>& task, int64_t index, int64_t first, int64_t steps, bool backward) {
    const AttentionArguments<T>& a = task.a;
    if (first < a.tokens) {
      queries(task, first, steps, backward);
    } else if (index + 1 < a.texts * a.key_heads) {
      const Task<T> next(a, index + 1);
      for (const T* x : {next.keys, next.values}) add(x, a.tokens, next.stride, a.width, steps);
      queries(next, 0, steps, backward);
    }
  }
  void fetch() {
    for (int i = 0; i < count_; ++i) rows_[i].fetch();
  }

 private:
  void queries(const Task<T>& task, int64_t first, int64_t steps, bool backward) {
    const AttentionArguments<T>& a = task.a;
    const int64_t count = std::min(task.block(), a.tokens - first), width = task.group() * a.width;
    const int64_t row = a.heads * a.width, place = (task.text * a.tokens + first) * row + task.head * width;
    add(task.queries + first * task.stride, count, task.stride, width, steps);
    if (backward)
      for (const T* x : {static_cast<const T*>(a.out), a.dout}) add(x + place, count, row, width, steps);
  }
  void add(const T* x, int64_t rows, int64_t stride, int64_t width, int64_t steps) {
    constexpr int64_t size = sizeof(T);
    rows_[count_++] = Nearer(x, rows, stride * size, width * size, steps);
  }

  Nearer rows_[5];
  int count_ = 0;
};

// Rows of unnormalised probabilities exp(scale * (score - top)); sums in float32.
template <class T>
void softmax_block(float* scores, int64_t stride, const Block& block, float scale, T* p, float* top, float* sum,
                   Coming<T> coming) {
  const Vec factor = all(scale * LOG2E);
  const int64_t end = block.end();
  for (int64_t i = 0; i < block.rows; ++i) {
    float* row = scores + i * stride;
    const int64_t count = block.query(i) + 1;
    for (int64_t c = count; c < end; ++c) row[c] = -INFINITY;
    Vec largest = all(-INFINITY);
    for (int64_t c = 0; c < count; c += LANES) largest = larger(largest, load(row + c));
    top[i] = largest_of(largest);
    const Vec shift = all(top[i]);
    Vec total = zeros();
    for (int64_t c = 0; c < end; c += LANES) {
      const Vec e = exp2_ps<T>(factor * (load(row + c) - shift));
      total = total + e;
      store(p + i * stride + c, e);
    }
    sum[i] = sum_of(total);
    coming.fetch();
  }
}

template <class T>
const typename Of<T>::Unit* as_units(const T* row) {
  return reinterpret_cast<const typename Of<T>::Unit*>(row);
}

template <class T>
void forward_task(const AttentionArguments<T>& a, int64_t index) {
  const FlushedToZero flushed;
  const Task<T> task(a, index);
  const int64_t width = a.width, padded = task.padded, line = task.line, group = task.group(), depth = units<T>(width);
  const int64_t most = group * task.block(), fill = sizes<T>().fill;
  Buffer<T> rotated(a.tokens * width), queries(most * width), p(most * line);
  Buffer<typename Of<T>::Plain> keys(padded * depth), values(padded * depth);
  Buffer<float> scores(most * line), out(most * width), top(most), sum(most);
  task.rotated(task.keys, 0, a.tokens, rotated.get());
  pack_columns(rotated.get(), width, a.tokens, width, keys.get());
  pack_rows(task.values, task.stride, a.tokens, padded, width, values.get());
  for (int64_t first = 0; first < a.tokens; first += task.block()) {
    const int64_t count = std::min(task.block(), a.tokens - first);
    const Block block{first, count, count * group};
    for (int64_t h = 0; h < group; ++h)
      task.rotated(task.queries + h * width, first, count, queries.get() + h * count * width);
    multiply<T, true>(block.rows, block.seen(), depth, {as_units(queries.get()), depth, 1},
                      {keys.get(), depth * PANEL, PANEL}, scores.get(), line, false);
    softmax_block(scores.get(), line, block, a.scale, p.get(), top.get(), sum.get(),
                  Coming<T>(task, index, first + count, block.rows, false));
    multiply<T, true>(block.rows, width, units<T>(round_up(block.seen(), fill)), {as_units(p.get()), units<T>(line), 1},
                      {values.get(), PANEL, width}, out.get(), width, false);
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t h = r / count, query = block.query(r), token = task.text * a.tokens + query;
      task.statistics(h)[query] = top.get()[r] * a.scale * LOG2E + std::log2(sum.get()[r]);
      const Vec inverse = all(1.0f / sum.get()[r]);
      for (int64_t c = 0; c < width; c += LANES)
        store(a.out + (token * a.heads + task.head * group + h) * width + c,
              load(out.get() + r * width + c) * inverse);
    }
  }
}

// P = exp(scale * score - log sum) and dS = scale * P * (dP - delta) of a block of queries and KEYS keys: dS by rows for
// the queries' gradient, both in units of rows for the keys' and values'.
template <class T>
struct BackwardRows {
  const float *scores, *dp;  // [rows][KEYS]
  Block block;
  int64_t rows;  // with those of zeros behind the block's
  float scale;
  const float *log2_sum, *delta;  // of every row

  template <bool Masked>
  void one(int64_t i, int64_t first, int64_t c, Vec& p, Vec& d) const {
    const int64_t ahead = i < block.rows ? std::clamp<int64_t>(block.query(i) + 1 - first - c, 0, LANES) : 0;
    const Mask seen = first_lanes(ahead);
    const auto number = [&](const float* x) { return Masked ? load_part(x, seen) : load(x); };
    const Vec s = number(scores + i * KEYS + c);
    const Vec exponent = mul_subtract(s, all(scale * LOG2E), all(log2_sum[i]));
    p = exp2_ps<T>(exponent);
    if (Masked) p = keep(seen, p);
    const Vec g = number(dp + i * KEYS + c) - all(delta[i]);
    d = p * all(scale) * g;
    if (Masked) d = keep(seen, d);
  }

#ifdef JZ3_BF16_PRODUCTS
  template <bool Masked>
  void run(int64_t first, int64_t i, int64_t end, bf16* ds, int64_t line, Pair* p_units, Pair* ds_units) const {
    // Behind one another 16 numbers of two rows, their pairs in turn.
    alignas(64) static constexpr uint16_t ORDER[32] = {0,  16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8,  24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(ORDER);
    for (int64_t c = 0; c < end; c += LANES) {
      Vec p[2], d[2];
      one<Masked>(i, first, c, p[0], d[0]);
      one<Masked>(i + 1, first, c, p[1], d[1]);
      const auto both_p = (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]), both_d = (__m512i)_mm512_cvtne2ps_pbh(d[1], d[0]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds + i * line + c), _mm512_castsi512_si256(both_d));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds + (i + 1) * line + c), _mm512_extracti64x4_epi64(both_d, 1));
      _mm512_storeu_si512(p_units + i / 2 * KEYS + c, _mm512_permutexvar_epi16(order, both_p));
      _mm512_storeu_si512(ds_units + i / 2 * KEYS + c, _mm512_permutexvar_epi16(order, both_d));
    }
  }
#endif

  template <bool Masked>
  void run(int64_t first, int64_t i, int64_t end, float* ds, int64_t line, float* p_units, float*) const {
    for (int64_t c = 0; c < end; c += LANES) {
      Vec p, d;
      one<Masked>(i, first, c, p, d);
      store(ds + i * line + c, d);
      store(p_units + i * KEYS + c, p);
    }
  }

  // For the keys first .. first + end; `ds` is the first one's column.
  template <class Unit>
  void run(int64_t first, int64_t end, T* ds, int64_t line, Unit* p_units, Unit* ds_units, Coming<T>& coming) const {
    const bool whole = first + end <= block.first + 1;  // every query sees all these keys
    for (int64_t i = 0; i < rows; i += Of<T>::count) {
      if (whole && i + Of<T>::count <= block.rows)
        run<false>(first, i, end, ds, line, p_units, ds_units);
      else
        run<true>(first, i, end, ds, line, p_units, ds_units);
      coming.fetch();
    }
  }
};

template <class T>
void backward_task(const AttentionArguments<T>& a, int64_t index) {
  const FlushedToZero flushed;
  using Plain = typename Of<T>::Plain;
  const Task<T> task(a, index);
  const int64_t width = a.width, padded = task.padded, line = task.line, group = task.group(), row = a.heads * width;
  const int64_t fill = sizes<T>().fill, most = round_up(group * task.block(), fill), most_units = units<T>(most);
  const int64_t depth = units<T>(width), turned = round_up(most_units, LANES);
  Buffer<T> rotated(a.tokens * width), queries(most * width), grads(most * width), ds(most * line);
  Buffer<Plain> keys(padded * depth), key_rows(padded * depth), values(padded * depth);
  Buffer<Plain> row_units(most_units * width), query_columns(turned * width), grad_columns(turned * width);
  Buffer<Plain> p_units(most_units * KEYS), ds_pairs(Of<T>::count == 1 ? 1 : most_units * KEYS);
  Buffer<float> scores(most * KEYS), dp(most * KEYS), dq(most * width);
  Buffer<float> dk(width * line), dv(width * line), delta(most), log2_sum(most);  // dk and dv transposed
  task.rotated(task.keys, 0, a.tokens, rotated.get());
  pack_columns(rotated.get(), width, a.tokens, width, keys.get());
  pack_rows(rotated.get(), width, a.tokens, padded, width, key_rows.get());
  pack_columns(task.values, task.stride, a.tokens, width, values.get());
  std::memset(dk.get(), 0, size_t(width * line) * sizeof(float));
  std::memset(dv.get(), 0, size_t(width * line) * sizeof(float));
  T* grad = a.dqkv + task.text * a.tokens * task.stride;
  for (int64_t first = 0; first < a.tokens; first += task.block()) {
    const int64_t count = std::min(task.block(), a.tokens - first);
    const Block block{first, count, count * group};
    const int64_t rows = round_up(block.rows, fill);
    for (int64_t h = 0; h < group; ++h)
      task.rotated(task.queries + h * width, first, count, queries.get() + h * count * width);
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t h = r / count, query = block.query(r);
      const int64_t place = (task.text * a.tokens + query) * row + (task.head * group + h) * width;
      Vec sum = zeros();
      for (int64_t c = 0; c < width; c += LANES) {
        const Vec g = load(a.dout + place + c);
        sum = mul_add(load(a.out + place + c), g, sum);
        store(grads.get() + r * width + c, g);
      }
      delta.get()[r] = sum_of(sum);
      log2_sum.get()[r] = task.statistics(h)[query];
    }
    pack_rows(queries.get(), width, block.rows, rows, width, row_units.get());
    turn_units(row_units.get(), units<T>(rows), width, query_columns.get(), turned);
    pack_rows(grads.get(), width, block.rows, rows, width, row_units.get());
    turn_units(row_units.get(), units<T>(rows), width, grad_columns.get(), turned);
    Coming<T> coming(task, index, first + count, units<T>(rows) * ((block.seen() + KEYS - 1) / KEYS), true);
    for (int64_t key = 0; key < block.seen(); key += KEYS) {
      const int64_t count = std::min(KEYS, block.seen() - key), end = std::min(KEYS, block.end() - key);
      multiply<T, true>(block.rows, count, depth, {as_units(queries.get()), depth, 1},
                        {keys.get() + key * depth, depth * PANEL, PANEL}, scores.get(), KEYS, false);
      multiply<T, true>(block.rows, count, depth, {as_units(grads.get()), depth, 1},
                        {values.get() + key * depth, depth * PANEL, PANEL}, dp.get(), KEYS, false);
      BackwardRows<T>{scores.get(), dp.get(), block, rows, a.scale, log2_sum.get(), delta.get()}.run(
          key, end, ds.get() + key, line, p_units.get(), ds_pairs.get(), coming);
      multiply<T, true>(width, count, units<T>(rows), {grad_columns.get(), turned, 1}, {p_units.get(), PANEL, KEYS},
                        dv.get() + key, line, true);
      // Single numbers are their own units.
      const Right<Of<T>> ds_units = Of<T>::count == 1 ? Right<Of<T>>{as_units(ds.get() + key), PANEL, line}
                                                      : Right<Of<T>>{ds_pairs.get(), PANEL, KEYS};
      multiply<T, true>(width, count, units<T>(rows), {query_columns.get(), turned, 1}, ds_units, dk.get() + key, line,
                        true);
    }
    multiply<T, true>(block.rows, width, units<T>(round_up(block.seen(), fill)), {as_units(ds.get()), units<T>(line), 1},
                      {key_rows.get(), PANEL, width}, dq.get(), width, false);
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t position = block.query(r) * width;
      rotate_back(dq.get() + r * width, a.cosine + position, a.sine + position, width,
                  grad + block.query(r) * task.stride + (task.head * group + r / count) * width);
    }
  }
  T* key_grad = grad + (a.heads + task.head) * width;
  Buffer<float> key_rows_of_grad(LANES * width), value_rows_of_grad(LANES * width);
  for (int64_t first = 0; first < a.tokens; first += LANES) {
    for (int64_t c = 0; c < width; c += LANES) {
      transpose(dk.get() + c * line + first, line, LANES, key_rows_of_grad.get() + c, width);
      transpose(dv.get() + c * line + first, line, LANES, value_rows_of_grad.get() + c, width);
    }
    for (int64_t r = first; r < std::min(first + LANES, a.tokens); ++r) {
      const int64_t from = (r - first) * width;
      rotate_back(key_rows_of_grad.get() + from, a.cosine + r * width, a.sine + r * width, width,
                  key_grad + r * task.stride);
      for (int64_t c = 0; c < width; c += LANES)
        store(key_grad + a.key_heads * width + r * task.stride + c, load(value_rows_of_grad.get() + from + c));
    }
  }
}

}  // namespace
}  // namespace jz3
