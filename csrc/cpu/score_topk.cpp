// One pass over the codes. Four rows at a time are unpacked to bytes (level + 128) in the L1 cache, multiplied
// with the four int8 planes of every query (vpdpbusd where there is AVX512-VNNI, vpmaddwd on AVX2), and put
// into a bounded heap per task: the scores of all rows never exist. The products are exact integers, the rest
// is float64 in the order of the definition, so values and ids are the reference's bit for bit.
//
// Per row and query: dim * bits / 8 bytes read once, 4 * dim multiply-adds.
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/ops.h"
#include "cpu/parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define JZ3_X86 1
#include <immintrin.h>
#endif

namespace jz3 {
namespace {

constexpr int64_t ROWS = 4, PLANES = 4, LANES = 64;
constexpr int64_t BLOCK = 1 << 15;  // columns whose partial sums fit 32 bits in every implementation

struct Found {
  float value;
  int64_t id;
};

inline bool better(const Found& a, const Found& b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

// The k best seen so far; the worst of them on top.
class Best {
 public:
  explicit Best(int64_t k) : k_(k) { heap_.reserve(size_t(std::min<int64_t>(k, 4096))); }
  void offer(const Found& found) {
    if (int64_t(heap_.size()) < k_) {
      heap_.push_back(found);
      std::push_heap(heap_.begin(), heap_.end(), better);
    } else if (better(found, heap_.front())) {
      std::pop_heap(heap_.begin(), heap_.end(), better);
      heap_.back() = found;
      std::push_heap(heap_.begin(), heap_.end(), better);
    }
  }
  const std::vector<Found>& all() const { return heap_; }

 private:
  int64_t k_;
  std::vector<Found> heap_;
};

// sums[row][plane] = sum over columns of bytes[row][c] * planes[plane][c]; columns is a multiple of LANES
using Dot = void (*)(const uint8_t* bytes, int64_t stride, const int8_t* const planes[PLANES], int64_t columns,
                     int64_t sums[ROWS][PLANES]);

void dot_scalar(const uint8_t* bytes, int64_t stride, const int8_t* const planes[PLANES], int64_t columns,
                int64_t sums[ROWS][PLANES]) {
  for (int64_t row = 0; row < ROWS; ++row)
    for (int64_t plane = 0; plane < PLANES; ++plane) {
      int64_t sum = 0;
      for (int64_t c = 0; c < columns; ++c) sum += int32_t(bytes[row * stride + c]) * planes[plane][c];
      sums[row][plane] += sum;
    }
}

// What a byte of codes unpacks to: level + 128 of each of its codes, in order.
struct Table {
  uint8_t level[256];     // of a code
  uint8_t bytes[256][8];  // of a byte of codes

  Table(const int8_t* levels, int bits) {
    for (int i = 0; i < (1 << bits); ++i) level[i] = uint8_t(int(levels[i]) + 128);
    for (int byte = 0; byte < 256; ++byte)
      for (int i = 0; i < 8 / bits; ++i) bytes[byte][i] = level[(byte >> (i * bits)) & ((1 << bits) - 1)];
  }
};

using Unpack = void (*)(const uint8_t* codes, const Table& table, int64_t row_bytes, uint8_t* bytes);

template <int BITS>
void unpack_table(const uint8_t* codes, const Table& table, int64_t row_bytes, uint8_t* bytes) {
  for (int64_t b = 0; b < row_bytes; ++b) std::memcpy(bytes + b * (8 / BITS), table.bytes[codes[b]], 8 / BITS);
}

void unpack_copy(const uint8_t* codes, const Table&, int64_t row_bytes, uint8_t* bytes) {
  std::memcpy(bytes, codes, size_t(row_bytes));
}

#ifdef JZ3_X86
template <class Vector>
inline int64_t sum_lanes(const Vector& x) {
  int32_t lane[sizeof(Vector) / 4];
  std::memcpy(lane, &x, sizeof(Vector));
  int64_t sum = 0;
  for (int32_t value : lane) sum += value;
  return sum;
}

__attribute__((target("avx2"))) void dot_avx2(const uint8_t* bytes, int64_t stride,
                                              const int8_t* const planes[PLANES], int64_t columns,
                                              int64_t sums[ROWS][PLANES]) {
  __m256i total[ROWS][PLANES];
  for (auto& row : total)
    for (auto& x : row) x = _mm256_setzero_si256();
  for (int64_t c = 0; c < columns; c += 16) {
    __m256i query[PLANES];
    for (int plane = 0; plane < PLANES; ++plane)
      query[plane] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(planes[plane] + c)));
    for (int row = 0; row < ROWS; ++row) {
      const __m256i code =
          _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + row * stride + c)));
      for (int plane = 0; plane < PLANES; ++plane)
        total[row][plane] = _mm256_add_epi32(total[row][plane], _mm256_madd_epi16(code, query[plane]));
    }
  }
  for (int row = 0; row < ROWS; ++row)
    for (int plane = 0; plane < PLANES; ++plane) sums[row][plane] += sum_lanes(total[row][plane]);
}

__attribute__((target("avx2"))) void unpack_4bit_avx2(const uint8_t* codes, const Table& table,
                                                      int64_t row_bytes, uint8_t* bytes) {
  const __m256i levels =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table.level)));
  const __m256i mask = _mm256_set1_epi8(15);
  int64_t b = 0;
  for (; b + 16 <= row_bytes; b += 16) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + b));
    const __m256i wide = _mm256_cvtepu8_epi16(packed);  // 00 hl -> 0h 0l
    const __m256i index = _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), mask);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + 2 * b), _mm256_shuffle_epi8(levels, index));
  }
  unpack_table<4>(codes + b, table, row_bytes - b, bytes + 2 * b);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) void dot_avx512vnni(
    const uint8_t* bytes, int64_t stride, const int8_t* const planes[PLANES], int64_t columns,
    int64_t sums[ROWS][PLANES]) {
  __m512i total[ROWS][PLANES];
  for (auto& row : total)
    for (auto& x : row) x = _mm512_setzero_si512();
  for (int64_t c = 0; c < columns; c += 64) {
    __m512i query[PLANES];
    for (int plane = 0; plane < PLANES; ++plane) query[plane] = _mm512_loadu_si512(planes[plane] + c);
    for (int row = 0; row < ROWS; ++row) {
      const __m512i code = _mm512_loadu_si512(bytes + row * stride + c);
      for (int plane = 0; plane < PLANES; ++plane)
        total[row][plane] = _mm512_dpbusd_epi32(total[row][plane], code, query[plane]);
    }
  }
  for (int row = 0; row < ROWS; ++row)
    for (int plane = 0; plane < PLANES; ++plane) sums[row][plane] += sum_lanes(total[row][plane]);
}
#endif

Dot choose_dot(Isa isa) {
#ifdef JZ3_X86
  if (isa == Isa::avx512vnni) return dot_avx512vnni;
  if (isa == Isa::avx2) return dot_avx2;
#endif
  return dot_scalar;
}

Unpack choose_unpack(Isa isa, int bits) {
#ifdef JZ3_X86
  if (bits == 4 && isa != Isa::scalar) return unpack_4bit_avx2;
#endif
  return bits == 8 ? unpack_copy : bits == 4 ? unpack_table<4> : bits == 2 ? unpack_table<2> : unpack_table<1>;
}

// The queries' planes with rows padded with zeros to whole vectors, and what level + 128 adds to a sum.
struct Queries {
  int64_t columns;
  std::vector<int8_t> planes;  // [query][plane][columns]
  std::vector<int64_t> excess;  // [query][plane]

  explicit Queries(const ScoreArguments& a)
      : columns((a.row_bytes * (8 / a.bits) + LANES - 1) / LANES * LANES),
        planes(size_t(a.queries * PLANES * columns), 0),
        excess(size_t(a.queries * PLANES), 0) {
    for (int64_t q = 0; q < a.queries; ++q)
      for (int64_t plane = 0; plane < PLANES; ++plane) {
        const int8_t* from = a.planes + (plane * a.queries + q) * a.dim;
        std::copy(from, from + a.dim, planes.begin() + (q * PLANES + plane) * columns);
        for (int64_t c = 0; c < a.dim; ++c) excess[q * PLANES + plane] += 128 * int64_t(from[c]);
      }
  }
};

void scan(const ScoreArguments& a, const Queries& queries, const Table& table, int64_t first, int64_t last,
          std::vector<Best>& best) {
  const Isa isa = choose_isa(a.isa);
  const Dot dot = choose_dot(isa);
  const Unpack unpack = choose_unpack(isa, a.bits);
  const int64_t columns = queries.columns;
  std::vector<uint8_t> bytes(size_t(ROWS * columns), 0);
  std::vector<float> highest(size_t(ROWS * a.count));
  for (int64_t begin = first; begin < last; begin += ROWS) {
    const int64_t rows = std::min(ROWS, last - begin);
    const bool in_place = a.bits == 8 && a.row_bytes == columns && rows == ROWS;
    const uint8_t* unpacked = in_place ? a.codes + begin * columns : bytes.data();
    for (int64_t row = 0; row < rows && !in_place; ++row)
      unpack(a.codes + (begin + row) * a.row_bytes, table, a.row_bytes, bytes.data() + row * columns);
    std::fill(highest.begin(), highest.end(), -std::numeric_limits<float>::infinity());
    for (int64_t q = 0; q < a.queries; ++q) {
      int64_t sums[ROWS][PLANES] = {};
      for (int64_t c = 0; c < columns; c += BLOCK) {
        const int8_t* planes[PLANES];
        for (int64_t plane = 0; plane < PLANES; ++plane)
          planes[plane] = queries.planes.data() + (q * PLANES + plane) * columns + c;
        dot(unpacked + c, columns, planes, std::min(BLOCK, columns - c), sums);
      }
      const int64_t* excess = queries.excess.data() + q * PLANES;
      for (int64_t row = 0; row < rows; ++row) {
        int64_t whole = 0;
        for (int64_t plane = 0; plane < PLANES; ++plane) whole = whole * 128 + (sums[row][plane] - excess[plane]);
        const double score = double(a.row_scale[begin + row]) * (double(whole) * a.step[q] + a.bias[q]);
        float& top = highest[row * a.count + a.groups[q]];
        top = std::max(top, float(score));
      }
    }
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t group = 0; group < a.count; ++group)
        best[group].offer({highest[row * a.count + group], a.ids[begin + row]});
  }
}

}  // namespace

Isa choose_isa(int asked) {
  Isa best = Isa::scalar;
#ifdef JZ3_X86
  if (__builtin_cpu_supports("avx2")) best = Isa::avx2;
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    best = Isa::avx512vnni;
#endif
  return asked < 0 || asked > int(best) ? best : Isa(asked);
}

void score_topk(const ScoreArguments& a, int threads) {
  const Queries queries(a);
  const Table table(a.levels, a.bits);
  std::vector<std::vector<Best>> best(size_t(std::max(threads, 1)));
  parallel(a.rows, queries.columns * (PLANES * a.queries + 2) / 32, threads,
           [&](int64_t part, int64_t first, int64_t last) {
             best[part].assign(size_t(a.count), Best(a.k));
             scan(a, queries, table, first, last, best[part]);
           });
  for (int64_t group = 0; group < a.count; ++group) {
    std::vector<Found> all;
    for (auto& part : best)
      if (!part.empty()) all.insert(all.end(), part[group].all().begin(), part[group].all().end());
    std::partial_sort(all.begin(), all.begin() + a.k, all.end(), better);
    for (int64_t i = 0; i < a.k; ++i) {
      a.values[group * a.k + i] = all[i].value;
      a.found[group * a.k + i] = all[i].id;
    }
  }
}

}  // namespace jz3
