// The two products of a gated layer with what is element by element between them, in tiles: SiLU(x G) * (x U) and, for the
// layer behind it, its gradient. The sums of the products are still in the nearest cache then, and the tiles go on
// multiplying meanwhile.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/ops.h"
#include "cpu/product_blocks.h"
#include "cpu/tiles.h"

#ifdef JZ3_BF16

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#include "cpu/silu.h"

namespace jz3 {
namespace {

constexpr int64_t WIDE = 2 * TILE;  // columns of a block

inline __m512i both(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
inline __m512 low(__m512i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)), 16));
}
inline __m512 high(__m512i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1)), 16));
}

// A block of the gate's columns and then one of the up projection's: both rounded, and SiLU(gate) * up of them.
struct Gate {
  static constexpr bool direct = false;
  static constexpr int64_t blocks = 2;
  bf16 *gate_up, *y;  // from the first of these columns on
  int64_t width;
  bool streamed;
  Waiting gate = {}, up = {};

  Gate down(int64_t m) const { return {gate_up + m * 2 * width, y + m * width, width, streamed}; }
  void expect(int64_t, int64_t) {}
  void take(const Waiting& block) {
    if (block.column / WIDE % 2 == 0) {
      work(WIDE);
      gate = block;
    } else {
      up = block;
    }
  }
  void work(int64_t count) {
    for (const int64_t end = std::min(up.row + count, up.rows); up.row < end; ++up.row) {
      const float *g = gate.sums + up.row * gate.stride, *u = up.sums + up.row * up.stride;
      const __m512i gates = both(_mm512_loadu_ps(g), _mm512_loadu_ps(g + TILE));
      const __m512i ups = both(_mm512_loadu_ps(u), _mm512_loadu_ps(u + TILE));
      bf16 *to = gate_up + up.row * 2 * width + gate.column / 2, *out = y + up.row * width + gate.column / 2;
      put(to, gates, streamed);
      put(to + width, ups, streamed);
      put(out, both(gated<bf16>(low(gates), low(ups)), gated<bf16>(high(gates), high(ups))), streamed);
    }
  }
};

// The gradient of y in blocks of columns, and those of gate and up in the place of what they were.
class GateGradient : public RowByRow<GateGradient> {
 public:
  GateGradient(bf16* gate_up, int64_t width) : gate_up_(gate_up), width_(width) {}
  GateGradient down(int64_t m) const { return {gate_up_ + m * 2 * width_, width_}; }
  void expect(int64_t column, int64_t rows) { wanted_ = gate_up_ + column, rows_ = rows; }
  void work(int64_t count) {
    for (int64_t i = std::min(count, rows_); i > 0; --i, --rows_, wanted_ += 2 * width_) {
      _mm_prefetch(wanted_, _MM_HINT_T1);
      _mm_prefetch(wanted_ + width_, _MM_HINT_T1);
    }
    RowByRow::work(count);
  }
  void put(int64_t row, int64_t column, const float* sums, bool) const {
    bf16* gate = gate_up_ + row * 2 * width_ + column;
    const __m512i gates = _mm512_loadu_si512(gate), ups = _mm512_loadu_si512(gate + width_);
    const GateUp first = gated_gradient<bf16>(low(gates), low(ups), _mm512_loadu_ps(sums));
    const GateUp second = gated_gradient<bf16>(high(gates), high(ups), _mm512_loadu_ps(sums + TILE));
    _mm512_storeu_si512(gate, both(first.gate, second.gate));
    _mm512_storeu_si512(gate + width_, both(first.up, second.up));
  }

 private:
  bf16* gate_up_;
  int64_t width_;
  const bf16* wanted_ = nullptr;  // what the block under way will be multiplied with
  int64_t rows_ = 0;
};

void check(const GatedArguments& a) {
  if (tile_unit() == TileUnit::none) throw std::invalid_argument("gated products need tiles");
  if (a.depth % WIDE || a.width % WIDE || (a.rows > 1 && a.x_stride % 2))
    throw std::invalid_argument("depth and width must be multiples of 32 and x_stride of 2, got " + std::to_string(a.depth) +
                                ", " + std::to_string(a.width) + " and " + std::to_string(a.x_stride));
}

Left<Of<bf16>> rows_of(const GatedArguments& a, int64_t begin) {
  return {reinterpret_cast<const Pair*>(a.x + begin * a.x_stride), a.x_stride / 2, 1};
}

}  // namespace

#pragma GCC pop_options

void gated_product(const GatedArguments& a, int threads) {
  check(a);
  const int64_t row_bytes = a.width * int64_t(sizeof(bf16));
  const bool streamed = streams(a.gate_up, 2 * a.rows * row_bytes, row_bytes) && streams(a.y, INT64_MAX, row_bytes);
  const auto block = [&](int64_t begin, int64_t end, int64_t first, int64_t last, Nearer also) {
    const Gate result{a.gate_up + begin * 2 * a.width + first / 2, a.y + begin * a.width + first / 2, a.width, streamed};
    PackedMatrix(a.w, a.depth)
        .multiply_into(result, end - begin, last - first, rows_of(a, begin), first, a.rows - end, also);
    end_streams();
  };
  each_block(a.w, a.rows, a.depth, 2 * a.width, threads, block);
}

void gated_gradient_product(const GatedArguments& a, int threads) {
  check(a);
  const auto block = [&](int64_t begin, int64_t end, int64_t first, int64_t last, Nearer also) {
    const GateGradient result{a.gate_up + begin * 2 * a.width + first, a.width};
    PackedMatrix(a.w, a.depth)
        .multiply_into(result, end - begin, last - first, rows_of(a, begin), first, a.rows - end, also);
  };
  each_block(a.w, a.rows, a.depth, a.width, threads, block);
}

}  // namespace jz3

#endif
