// One pass over the codes, a tile of rows that fits the L2 cache at a time, while the next tile is prefetched.
//
// Only the queries' first plane is multiplied with every row. What the other planes can add is bounded by
// Cauchy-Schwarz, |<level, rest>| <= |level| |rest|, and only rows that could still be among the k best of a query
// are multiplied with these (on normal data one in thousands), so that a scan costs little more than that of one
// plane and finds what the definition finds: the products are exact integers, the rest is float64 in its order.
// AVX2 multiplies coarse digits instead, where rows are many for the k best of them (one in fifty stays open at 100 of
// 200,000), and both planes as one number otherwise.
//
// Per row: row_bytes read once, dim * queries multiply-adds; memory is that of a tile and the k best per group. Where
// all scores are wanted (score_codes), every plane is multiplied with every row and nothing is bounded.
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <utility>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/score_queries.h"

namespace jz3 {
namespace {

constexpr int64_t CACHED = 16 << 10;  // digits of a block of queries that stay in the L1 cache
constexpr int64_t TILE_BYTES = 128 << 10, MOST_ROWS = 128;
constexpr int64_t PAIRS_AHEAD = 1 << 10;  // rows before coarse digits are tried again
constexpr double INFINITE = std::numeric_limits<double>::infinity();

struct Found {
  float value;
  int64_t id;
};

// A type, because a function's address would not be inlined into the heap's steps.
struct Better {
  bool operator()(const Found& a, const Found& b) const {
    return a.value > b.value || (a.value == b.value && a.id < b.id);
  }
};
constexpr Better better;

// The k best seen so far; the worst of them on top.
class Best {
 public:
  explicit Best(int64_t k) : k_(k) { heap_.reserve(size_t(std::min<int64_t>(k, 4096))); }
  void offer(const Found& found) {
    if (!full()) {
      heap_.push_back(found);
      std::push_heap(heap_.begin(), heap_.end(), better);
    } else if (better(found, heap_.front())) {
      std::pop_heap(heap_.begin(), heap_.end(), better);
      heap_.back() = found;
      std::push_heap(heap_.begin(), heap_.end(), better);
    }
  }
  bool full() const { return int64_t(heap_.size()) == k_; }
  float worst() const { return heap_.front().value; }
  const std::vector<Found>& all() const { return heap_; }

 private:
  int64_t k_;
  std::vector<Found> heap_;
};

// The k best of a group so far, of all threads, so that each of them knows early what can't be among these.
struct alignas(64) Shared {
  std::atomic<float> worst{-std::numeric_limits<float>::infinity()};  // of k; what is below can't enter
  std::mutex mutex;
  Best best{0};

  void offer(const Found& found) {
    const std::lock_guard<std::mutex> lock(mutex);
    best.offer(found);
    if (best.full()) worst.store(best.worst(), std::memory_order_relaxed);
  }
};

struct Plan {
  const ScoreArguments& a;
  const Queries& queries;
  const Levels& levels;
  Kernels kernels;
  TileKernel tiles;   // for many queries, or null
  CodeKernel packed;  // by tiles, or null
  bool direct;                          // rows are used where they lie
  bool once;                            // and mostly once, so that no tile has to stay in a cache
  int64_t rows;                         // of a tile
  std::vector<Shared> best;  // [group]
};

class Scan {
 public:
  explicit Scan(Plan& plan)
      : p_(plan),
        a_(plan.a),
        sums_(size_t(p_.rows * p_.queries.width + 7)),
        norms_(size_t(p_.rows)),
        open_(size_t(a_.scores ? 0 : p_.rows * a_.queries + 1)),
        limit_(size_t(rounded_up(a_.queries, 8)), INFINITE),
        worst_(size_t(a_.count), -std::numeric_limits<float>::infinity()),
        highest_(size_t(a_.count)),
        seen_(size_t(a_.count), -1),
        members_(size_t(a_.count)),
        bytes_((p_.direct ? 1 : p_.rows) * p_.queries.columns, 128) {
    std::fill_n(limit_.begin(), a_.queries, -INFINITE);
    for (int64_t q = 0; a_.groups && q < a_.queries; ++q) members_[a_.groups[q]].push_back(q);
  }

  void run(int64_t first, int64_t last) {
    int64_t piece = std::upper_bound(a_.begins, a_.begins + a_.pieces, first) - a_.begins - 1;
    for (int64_t begin = first; begin < last;) {
      const int64_t stop = std::min(a_.begins[piece + 1], last), end = std::min(begin + p_.rows, stop);
      codes_ = a_.codes[piece];
      first_ = a_.begins[piece];
      const bool whole = a_.stride == a_.row_bytes;
      if (end < stop || end == last) {
        ahead_ = row(end);
        ahead_end_ = whole ? row(std::min(end + p_.rows, stop)) : ahead_;
      } else {  // the next piece, which may be empty
        ahead_ = a_.codes[piece + 1];
        const int64_t next = std::min(a_.begins[piece + 2], last) - end;
        ahead_end_ = whole ? ahead_ + std::min(p_.rows, next) * a_.stride : ahead_;
      }
      tile(begin, end - begin);
      for (begin = end; begin < last && begin >= a_.begins[piece + 1];) ++piece;
    }
  }

 private:
  struct Source {
    const uint8_t* bytes;
    int64_t stride, width;
  };

  const uint8_t* row(int64_t i) const { return codes_ + (i - first_) * a_.stride; }

  void unpack(int64_t i, uint8_t* to) const { p_.kernels.unpack(row(i), p_.levels, a_.row_bytes, to); }

  void tile(int64_t begin, int64_t count) {
    const Queries& queries = p_.queries;
    const bool whole = a_.bits == 8 && a_.row_bytes == queries.columns && count == p_.rows;
    const bool in_place = p_.direct || (p_.tiles && whole);
    if (!in_place)
      for (int64_t r = 0; r < count; ++r) unpack(begin + r, bytes_.data() + r * queries.columns);
    const Source source = in_place ? Source{row(begin), a_.stride, a_.row_bytes}
                                   : Source{bytes_.data(), queries.columns, queries.columns};
    std::fill(norms_.begin(), norms_.end(), 0.0);
    if (a_.scores) {
      multiply(source, count, 0, sums_.data(), nullptr);
      multiply_rest(source, count);
      write(begin, count);
    } else if (begin < pairs_until_) {
      multiply_pairs(source, count, 0, sums_.data(), norms_.data());
      offer(begin, choose(begin, count, queries.whole.all()), true, source);
    } else {
      multiply(source, count, 0, sums_.data(), norms_.data());
      const int64_t open = choose(begin, count, queries.first.all());
      const bool all = open * (queries.coarse ? 8 : 4) > count * a_.queries;
      if (all) multiply_rest(source, count);
      if (all && queries.coarse) pairs_until_ = begin + PAIRS_AHEAD;
      offer(begin, open, all, source);
    }
  }

  // What the first sums leave out, for all rows.
  void multiply_rest(const Source& source, int64_t count) {
    const Queries& queries = p_.queries;
    if (queries.coarse) {
      ahead_end_ = ahead_;  // has been prefetched
      multiply_pairs(source, count, 0, sums_.data(), nullptr);
      return;
    }
    rest_.resize(size_t((queries.planes - 1) * p_.rows * queries.width));
    for (int64_t plane = 1; plane < queries.planes; ++plane)
      multiply(source, count, plane, rest_.data() + (plane - 1) * p_.rows * queries.width, nullptr);
  }

  void write(int64_t begin, int64_t count) const {
    for (int64_t q = 0; q < a_.queries; ++q)
      for (int64_t r = 0; r < count; ++r) a_.scores[q * a_.rows + begin + r] = score(begin, r, q, nullptr);
  }

  // From the sums of all planes; of the later ones for `bytes` alone where they aren't known.
  float score(int64_t begin, int64_t r, int64_t q, const uint8_t* bytes) const {
    const bool biased = p_.queries.biased;
    const int64_t at = r * p_.queries.width + q;
    int64_t dot = int64_t(sums_[at]);
    if (bytes && p_.queries.coarse) dot = dot * p_.queries.unit[q] + single(bytes, 1, q);
    if (biased) dot -= p_.queries.digit_sum[q];
    for (int64_t plane = 1; plane < p_.queries.planes; ++plane) {
      const int64_t sum = bytes ? single(bytes, plane, q)
                                : int64_t(rest_[(plane - 1) * p_.rows * p_.queries.width + at]);
      dot = dot * 128 + sum - ((bytes ? p_.kernels.biased : biased) ? p_.queries.digit_sum[plane * a_.queries + q] : 0);
    }
    return float(double(a_.row_scale[begin + r]) * (double(dot) * a_.step[q] + a_.bias[q]));
  }

  // sums[row][query] = rows x a plane of the queries; with the first plane, the next rows are prefetched
  void multiply(const Source& source, int64_t count, int64_t plane, double* sums, double* norms) {
    if (p_.packed) {
      multiply_codes(source, count, plane, sums, norms);
      return;
    }
    if (p_.tiles) {
      multiply_tiles(source, count, plane, sums, norms);
      return;
    }
    multiply_pairs(source, count, plane, sums, norms);
  }

  void multiply_pairs(const Source& source, int64_t count, int64_t plane, double* sums, double* norms) {
    const Queries& queries = p_.queries;
    const bool codes = p_.direct && a_.bits < 8;
    const int64_t most = CACHED / queries.block / queries.digit_bytes();  // columns
    const int64_t per_byte = codes ? 8 / a_.bits : 1;
    // All queries in one pass over rows that lie behind one another: then these needn't be kept.
    const bool near = p_.once && source.stride == source.width && queries.columns * queries.block <= ROOMY;
    const int64_t span = near ? source.width : (queries.wide ? std::min(most, WIDE_COLUMNS) : most) / per_byte;
    const int64_t calls = queries.blocks * ((count + 1) / 2) * ((source.width + span - 1) / span);
    const int64_t steps = std::max<int64_t>(calls * ((std::min(span, source.width) + STEP - 1) / STEP), 1);
    // Spread evenly, so that the kernel never waits for the prefetches themselves.
    const int64_t ahead_step = plane ? 0 : std::min<int64_t>(2 * STEP, (ahead_end_ - ahead_ + steps - 1) / steps);
    double spare[QUERIES];
    const int64_t width = queries.block;
    std::fill(sums, sums + count * queries.width, 0.0);
    for (int64_t begin = 0; begin < source.width; begin += span)
      for (int64_t block = 0; block < queries.blocks; ++block) {
        const int8_t* digits = queries.blocked.digits() +
                               ((plane * queries.blocks + block) * queries.columns + begin * per_byte) * width *
                                   queries.digit_bytes();
        for (int64_t r = 0; r < count; r += 2) {
          const int64_t second = std::min(r + 1, count - 1);
          RowPair rows{source.bytes + r * source.stride + begin, source.bytes + second * source.stride + begin,
                       std::min(span, source.width - begin), ahead_, ahead_step, near && p_.kernels.past};
          if (near) rows.ahead = rows.first + p_.kernels.near, rows.ahead_step = 2 * STEP;
          ahead_ += (rows.width + STEP - 1) / STEP * ahead_step;
          double spare_norm;
          double* const to[2] = {sums + r * queries.width + block * width,
                                 second == r ? spare : sums + second * queries.width + block * width};
          double* norm[2] = {norms + r, second == r ? &spare_norm : norms + second};
          (codes ? p_.kernels.codes : p_.kernels.bytes)(rows, digits, p_.levels, to,
                                                        norms && block == 0 ? norm : nullptr);
        }
      }
  }

  void multiply_codes(const Source& source, int64_t count, int64_t plane, double* sums, double* norms) {
    const Queries& queries = p_.queries;
    const CodeRows rows{source.bytes, count, source.stride, source.width, queries.columns, &p_.levels};
    const int8_t* const digits = queries.tiled.digits() + plane * queries.width * queries.columns;
    p_.packed(rows, digits, queries.width / TILE_QUERIES, sums, norms);
  }

  void multiply_tiles(const Source& source, int64_t count, int64_t plane, double* sums, double* norms) {
    const Queries& queries = p_.queries;
    const int8_t* const digits = queries.tiled.digits() + plane * queries.width * queries.columns;
    const int64_t share = plane ? 0 : (ahead_end_ - ahead_) * TILE_ROWS / p_.rows;
    for (int64_t r = 0; r < count; r += TILE_ROWS)
      p_.tiles(source.bytes + r * source.stride, source.stride, digits, queries.columns, a_.queries,
               ahead_ + r / TILE_ROWS * share, share, sums + r * queries.width, norms ? norms + r : nullptr);
  }

  // Returns how many pairs of a row and a query may be among the best.
  int64_t choose(int64_t begin, int64_t count, const Bounds& bounds) {
    for (int64_t group = 0; group < a_.count; ++group) raise_limit(group);
    const Products products{sums_.data(), norms_.data(), a_.row_scale + begin, count, a_.queries, p_.queries.width};
    return p_.kernels.choose(products, bounds, limit_.data(), open_.data());
  }

  // Scores below the limit can't be among the k best of the group; one that rounds to it still may.
  void raise_limit(int64_t group) {
    const float worst = p_.best[group].worst.load(std::memory_order_relaxed);
    if (worst == worst_[group]) return;
    worst_[group] = worst;
    const double bound = std::nextafter(worst, -std::numeric_limits<float>::infinity());
    for (int64_t q : members_[group]) limit_[q] = bound;
  }

  void offer(int64_t begin, int64_t open, bool rest_known, const Source& source) {
    for (int64_t i = 0; i < open;) {
      const int64_t r = open_[i].row;
      const uint8_t* bytes = nullptr;
      touched_.clear();
      for (; i < open && open_[i].row == r; ++i) {
        const int64_t q = open_[i].query;
        if (open_[i].most < limit_[q]) continue;
        if (!bytes && !rest_known && (p_.queries.planes > 1 || p_.queries.coarse)) bytes = one_row(begin, r, source);
        const float value = score(begin, r, q, bytes);
        const int64_t group = a_.groups[q];
        if (seen_[group] != begin + r) {
          seen_[group] = begin + r;
          touched_.push_back(group);
          highest_[group] = value;
        }
        highest_[group] = std::max(highest_[group], value);
      }
      for (int64_t group : touched_) {
        const Found found{highest_[group], a_.ids[begin + r]};
        if (found.value < p_.best[group].worst.load(std::memory_order_relaxed)) continue;
        p_.best[group].offer(found);
        raise_limit(group);
      }
    }
  }

  bool codes_singly() const { return p_.direct && p_.kernels.single_codes; }

  // A row for `single`.
  const uint8_t* one_row(int64_t begin, int64_t r, const Source& source) {
    if (source.width == p_.queries.columns || codes_singly()) return source.bytes + r * source.stride;
    unpack(begin + r, bytes_.data());
    return bytes_.data();
  }

  int64_t single(const uint8_t* bytes, int64_t plane, int64_t q) const {
    const int8_t* const digits = p_.queries.single.digits() + ((plane - 1) * a_.queries + q) * p_.queries.columns;
    if (codes_singly()) return p_.kernels.single_codes(bytes, a_.row_bytes, digits, p_.levels);
    return p_.kernels.single(bytes, digits, p_.queries.columns);
  }

  Plan& p_;
  const ScoreArguments& a_;
  std::vector<double> sums_, norms_, limit_, rest_;
  std::vector<Open> open_;
  std::vector<float> worst_;     // [group]: what `limit_` follows from
  std::vector<float> highest_;   // [group]: of the row at hand
  std::vector<int64_t> seen_;    // [group]: the row of `highest_`
  std::vector<std::vector<int64_t>> members_;
  Lines bytes_;
  std::vector<int64_t> touched_;
  int64_t pairs_until_ = 0;  // the row up to which rows are multiplied in pairs: coarse digits left too much open
  const uint8_t *codes_ = nullptr, *ahead_ = nullptr, *ahead_end_ = nullptr;  // of the piece at hand, its first row first_
  int64_t first_ = 0;
};

// Scans the rows in parts; returns the best of every group.
std::vector<Shared> scan(const ScoreArguments& a, int threads) {
  const Isa isa = choose_isa(a.isa);
  const Isa plain = isa > Isa::avx512vnni ? std::min(choose_isa(-1), Isa::avx512vnni) : isa;
  const CodeKernel packed = choose_code_kernel(isa, a.bits, a.queries);
  Kernels kernels = choose_kernels(plain, a.bits, a.queries);
  const bool narrow = kernels.wide && (packed || a.planes_count > 2);
  if (narrow) kernels = choose_kernels(Isa::scalar, a.bits, a.queries);
  // Wide kernels give whole scores at once.
  const bool pairs = packed || narrow || (kernels.wide && (a.scores || !Queries::can_split(a)));
  const TileKernel tiles = pairs ? nullptr : choose_tile_kernel(plain, a.queries);
  const Queries queries(a, packed ? CODE_BLOCKS : tiles ? 1 : 0, kernels, threads);
  const Levels levels(a.levels, a.bits);
  const bool fits = kernels.any_width || a.row_bytes % STEP == 0;
  const bool direct = packed || (!tiles && (a.bits == 8 ? fits : kernels.codes != nullptr));
  const int64_t bytes = std::max<int64_t>(direct ? a.row_bytes : queries.columns, 1);
  const int64_t rows = std::min(MOST_ROWS, TILE_BYTES / bytes) / TILE_ROWS * TILE_ROWS;
  const bool once = direct && !packed && isa == plain && kernels.near && queries.blocks == 1 && !a.scores;
  Plan plan{a, queries, levels, kernels, tiles, packed, direct, once, std::max(rows, TILE_ROWS),
            std::vector<Shared>(size_t(a.scores ? 0 : a.count))};
  for (Shared& shared : plan.best) shared.best = Best(a.k);
  parallel(a.rows, queries.columns * (a.queries + 2) / 32, threads,
           [&](int64_t, int64_t first, int64_t last) { Scan(plan).run(first, last); });
  return std::move(plan.best);
}

}  // namespace

void score_codes(const ScoreArguments& a, int threads) {
  scan(a, threads);
}

void score_topk(const ScoreArguments& a, int threads) {
  const std::vector<Shared> best = scan(a, threads);
  for (int64_t group = 0; group < a.count; ++group) {
    std::vector<Found> all = best[group].best.all();
    std::sort(all.begin(), all.end(), better);
    for (int64_t i = 0; i < a.k; ++i) {
      a.values[group * a.k + i] = all[i].value;
      a.found[group * a.k + i] = all[i].id;
    }
  }
}

}  // namespace jz3
