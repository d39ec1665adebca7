// Projected and sketched gradients of a segment of tokens (cpu/ops.h). Include inside a region, behind cpu/tiles.h or
// cpu/avx2.h.
#pragma once

namespace jz3 {
namespace {

void project_segment(const SegmentsArguments& a, int64_t segment) {
  const int64_t first = a.bounds[segment], tokens = a.bounds[segment + 1] - first, width = round_up(a.columns, LANES);
  Buffer<float> known_buffer(a.rows * width);
  alignas(64) float sketch[BUCKETS * BUCKETS], half[BUCKETS * BUCKETS], seen[BUCKETS * BUCKETS] = {};
  float* const known = known_buffer.get();
  const auto outer = [&](const float* g, int64_t rows, const float* right, int64_t columns, float* out, int64_t stride) {
    multiply<float, false>(rows, columns, tokens, {g + first * a.g_stride, 1, a.g_stride},
                           {right + first * a.a_stride, PANEL, a.a_stride}, out, stride, false);
  };
  outer(a.g_sketch, BUCKETS, a.a_sketch, BUCKETS, sketch, BUCKETS);
  if (a.rows && a.columns) {
    outer(a.g, a.rows, a.a, width, known, width);
    // Turned on the right in blocks of rows, which the left adds up.
    for (int64_t r = 0; r < a.rows; r += BUCKETS) {
      const int64_t some = std::min(BUCKETS, a.rows - r);
      multiply<float, false>(some, BUCKETS, a.columns, {known + r * width, width, 1}, {a.turn_right, PANEL, BUCKETS}, half,
                             BUCKETS, false);
      multiply<float, false>(BUCKETS, BUCKETS, some, {a.turn_left + r * BUCKETS, 1, BUCKETS}, {half, PANEL, BUCKETS}, seen,
                             BUCKETS, true);
    }
  }
  Vec rest = zeros();
  for (int64_t i = 0; i < BUCKETS * BUCKETS; i += LANES) {
    const Vec left_out = load(sketch + i) - load(seen + i);
    rest = mul_add(left_out, left_out, rest);
  }
  float square = sum_of(rest);
  for (int64_t r = 0; r < a.rows; ++r)
    for (int64_t c = 0; c < a.columns; ++c) square += known[r * width + c] * known[r * width + c];
  a.square[segment] += square;
  for (int64_t i = 0; i < a.count; ++i)
    a.values[segment * a.values_stride + i] = known[a.chosen[i] / a.columns * width + a.chosen[i] % a.columns];
}

}  // namespace
}  // namespace jz3
