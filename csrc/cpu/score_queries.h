// The queries of score_topk as its kernels want them, and per query what turns a sum into a score and bounds it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/score_kernels.h"

namespace jz3 {

// Bytes that begin on a cache line: loads across two lines would cost the kernels a third of their speed.
class Lines {
 public:
  explicit Lines(int64_t bytes, uint8_t fill = 0) : lines_(size_t((bytes + 63) / 64)) {
    for (Line& line : lines_) std::fill_n(line.byte, 64, fill);
  }
  uint8_t* data() { return lines_.empty() ? nullptr : lines_.front().byte; }
  const uint8_t* data() const { return lines_.empty() ? nullptr : lines_.front().byte; }
  const int8_t* digits() const { return reinterpret_cast<const int8_t*>(data()); }

 private:
  struct alignas(64) Line {
    uint8_t byte[64];
  };
  std::vector<Line> lines_;
};

constexpr int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// `Bounds` of some queries.
class QueryBounds {
 public:
  explicit QueryBounds(int64_t queries)
      : step_(size_t(rounded_up(queries, 8))), offset_(step_), rest_(step_), slack_(step_) {}

  // For sums with digits in units of `unit`, `excess` too large, where these and what is left of the numbers have the
  // squared norms `square` and `left`.
  void set(const ScoreArguments& a, int64_t q, double unit, double excess, double square, double left) {
    step_[q] = a.step[q] * unit;
    offset_[q] = a.bias[q] - excess * step_[q];
    rest_[q] = std::fabs(a.step[q]) * (std::sqrt(left) + ROUNDING * unit * std::sqrt(square));
    slack_[q] = ROUNDING * (std::fabs(a.bias[q]) + std::fabs(excess * step_[q]));
  }
  Bounds all() const { return {step_.data(), offset_.data(), rest_.data(), slack_.data()}; }

 private:
  std::vector<double> step_, offset_, rest_, slack_;
};

class Queries {
 public:
  int64_t columns, block, blocks, width;  // padded; queries of a block; blocks; queries in a row of sums
  bool biased;                            // the products are with level + 128
  bool wide;                              // all planes are one, of int16
  bool coarse;                            // then the tile kernel's digits are the highest of these numbers
  int64_t planes;                         // multiplied one by one
  Lines blocked;                   // [plane][block][step][queries of a block][64]
  Lines single;                    // [plane][query][columns], without the first plane; of a coarse one what it leaves
  Lines tiled;                     // for the tile kernels: [plane], as these want them
  std::vector<int64_t> digit_sum;  // [plane][query]: of its digits, times 128
  std::vector<int64_t> unit;       // [query]: of coarse digits
  QueryBounds first, whole;        // from the first or the coarse digits; from all, for coarse ones

  // `together` blocks of 16 for the tile kernels, next to each other in every step; 0 for the others
  Queries(const ScoreArguments& a, int64_t together, const Kernels& kernels, int threads)
      : columns(rounded_up(std::max<int64_t>(a.row_bytes, 1) * (8 / a.bits),
                           a.bits == 4 || together == CODE_BLOCKS ? 2 * STEP : STEP)),
        block(kernels.block),
        blocks((a.queries + block - 1) / block),
        width(together ? tiles_of(a.queries, together) * TILE_QUERIES : blocks * block),
        biased(together || kernels.biased),
        wide(kernels.wide),
        coarse(together && wide),
        planes(wide ? 1 : a.planes_count),
        blocked(together && !wide ? 0 : planes * blocks * block * columns * digit_bytes()),
        single((coarse ? 1 : planes - 1) * a.queries * columns),
        tiled(together ? planes * width * columns : 0),
        digit_sum(size_t(planes * a.queries)),
        unit(size_t(coarse ? a.queries : 0)),
        first(a.queries),
        whole(coarse ? a.queries : 0) {
    parallel(a.queries, planes * columns, threads,
             [&](int64_t, int64_t begin, int64_t end) { put(a, together, begin, end); });
  }

  int64_t digit_bytes() const { return wide ? 2 : 1; }

  // Whether numbers of both planes leave no more than 8 bits beside their coarse digits.
  static bool can_split(const ScoreArguments& a) {
    for (int64_t i = 0; a.planes_count == 2 && i < a.queries * a.dim; ++i)
      if (std::abs(128 * a.planes[i] + a.planes[a.queries * a.dim + i]) > 128 * 127) return false;
    return true;
  }

 private:
  void put(const ScoreArguments& a, int64_t together, int64_t first_query, int64_t last_query) {
    std::vector<int16_t> line(static_cast<size_t>(columns));
    std::vector<double> below(static_cast<size_t>(columns));  // what the first digits leave, as one number
    for (int64_t q = first_query; q < last_query; ++q) {
      double power = std::ldexp(1.0, int(7 * (planes - 1))), square = 0, left = 0;
      int64_t sum = 0;
      std::fill(below.begin(), below.end(), 0.0);
      for (int64_t plane = 0; plane < planes; ++plane) {
        const int8_t* const digits = a.planes + (plane * a.queries + q) * a.dim;
        const int8_t* const lower = wide && a.planes_count == 2 ? digits + a.queries * a.dim : nullptr;
        for (int64_t c = 0; c < a.dim; ++c)
          line[a.bits == 4 ? c / 128 * 128 + c % 2 * STEP + c % 128 / 2 : c] =
              int16_t(lower ? 128 * digits[c] + lower[c] : digits[c]);
        digit_sum[plane * a.queries + q] = 128 * sum_of(line);
        if (!together || wide) put_blocked(line, plane, q);
        if (plane) {
          for (int64_t c = 0; c < columns; ++c) below[c] = below[c] * 128 + line[c];
          std::copy(line.begin(), line.end(), single.data() + ((plane - 1) * a.queries + q) * columns);
        }
        if (coarse) {
          whole.set(a, q, 1, excess(sum_of(line)), square_of(line), 0);
          unit[q] = split(line, below);
          power = double(unit[q]);
          std::copy(below.begin(), below.end(), single.data() + q * columns);
        }
        if (together) put_tiled(line, plane, q, together);
        if (!plane) sum = sum_of(line), square = square_of(line);
      }
      for (double x : below) left += x * x;
      first.set(a, q, power, excess(sum), square, left);
    }
  }

  // How many blocks of 16 queries; with four of them together, the last three are four.
  static int64_t tiles_of(int64_t queries, int64_t together) {
    const int64_t count = (queries + TILE_QUERIES - 1) / TILE_QUERIES;
    return count + (together == CODE_BLOCKS && count % CODE_BLOCKS == 3);
  }

  double excess(int64_t sum) const { return biased ? 128.0 * double(sum) : 0; }

  static double square_of(const std::vector<int16_t>& line) {
    double sum = 0;
    for (double digit : line) sum += digit * digit;
    return sum;
  }

  static int64_t sum_of(const std::vector<int16_t>& line) {
    int64_t sum = 0;
    for (int16_t digit : line) sum += digit;
    return sum;
  }

  // Leaves of every number its digit in the returned unit, and the rest of it, between -128 and 127, in `below`. The
  // digits are as fine as NEIGHBOURS lets them be.
  static int64_t split(std::vector<int16_t>& line, std::vector<double>& below) {
    int most = 1;
    for (size_t c = 0; c < line.size(); c += 2) most = std::max(most, std::abs(line[c]) + std::abs(line[c + 1]));
    const int unit = (most + NEIGHBOURS - 2) / (NEIGHBOURS - 1);  // rounding may add a half to either
    for (size_t c = 0; c < line.size(); ++c) {
      const double digit = std::floor((line[c] + unit / 2) / double(unit));
      below[c] = line[c] - digit * unit;
      line[c] = int16_t(digit);
    }
    return unit;
  }

  void put_tiled(const std::vector<int16_t>& line, int64_t plane, int64_t q, int64_t together) {
    const int64_t tile = q / TILE_QUERIES, first = tile / together * together;
    const int64_t count = std::min(together, width / TILE_QUERIES - first);
    uint8_t* const to = tiled.data() + (plane * width + first * TILE_QUERIES) * columns +
                        (tile - first) * STEP * TILE_QUERIES + q % TILE_QUERIES * 4;
    for (int64_t c = 0; c < columns; c += 4)
      std::copy_n(&line[c], 4, to + (c / STEP * STEP * count + c % STEP) * TILE_QUERIES);
  }

  void put_blocked(const std::vector<int16_t>& line, int64_t plane, int64_t q) {
    const int64_t at = (plane * blocks + q / block) * columns * block + q % block * STEP;
    for (int64_t c = 0; c < columns; c += STEP) {
      if (wide)
        put_wide(&line[c], blocked.data() + 2 * (at + c * block));
      else
        std::copy_n(&line[c], STEP, blocked.data() + at + c * block);
    }
  }

  // A step of one query, of every 32 columns the even ones first.
  static void put_wide(const int16_t* step, uint8_t* to) {
    int16_t ordered[STEP];
    for (int64_t c = 0; c < STEP; ++c) ordered[c / 32 * 32 + c % 2 * 16 + c % 32 / 2] = step[c];
    std::memcpy(to, ordered, sizeof ordered);
  }
};

}  // namespace jz3
