// Projected gradients of documents in one pass over g: which vector unit, and the documents for each thread.
#include <algorithm>
#include <stdexcept>

#include "cpu/parallel.h"
#include "cpu/segment_items.h"

#ifdef JZ3_BF16

namespace jz3 {

SegmentItems::SegmentItems(const SegmentArguments& x, int threads) {
  std::vector<int64_t> starts;  // documents that an item begins with
  int64_t begin = 0;
  for (int64_t i = 0; i < x.documents; ++i)
    if (starts.empty() || x.bounds[i + 1] - begin > SEGMENT_CHUNK) {
      starts.push_back(i);
      begin = x.bounds[i];
    }
  const int64_t runs = int64_t(starts.size());
  starts.push_back(x.documents);
  // Few documents for many threads: a share of the outputs each, which read g once more.
  constexpr int64_t least = 64;
  const int64_t shares =
      std::clamp<int64_t>(threads / std::max<int64_t>(runs, 1), 1, (x.outputs + least - 1) / least);
  const int64_t share = (x.outputs + shares * least - 1) / (shares * least) * least;
  for (int64_t i = 0; i < runs; ++i)
    for (int64_t first = 0; first < x.outputs; first += share)
      items_.push_back({starts[size_t(i)], starts[size_t(i + 1)], first, std::min(first + share, x.outputs)});
}

SegmentUnit best_segment_unit() {
  if (has_bf16()) return SegmentUnit::bf16;
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return SegmentUnit::avx512;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? SegmentUnit::avx2 : SegmentUnit::none;
}

void segment_project(const SegmentArguments& x, int unit, int threads) {
  const SegmentUnit best = best_segment_unit(), chosen = unit < 0 ? best : SegmentUnit(unit);
  if (chosen > best || chosen == SegmentUnit::none)
    throw std::invalid_argument("segment_project has no code for this machine's vector unit");
  SegmentItems items(x, threads);
  const int64_t cost = (x.bounds[x.documents] - x.bounds[0]) * x.outputs * (x.width + x.columns) / 16;
  parallel(items.count(), cost / std::max<int64_t>(items.count(), 1), threads, [&](int64_t, int64_t, int64_t) {
    if (chosen == SegmentUnit::bf16 && x.bf16)
      segment_items_bf16(x, items);
    else if (chosen == SegmentUnit::avx2)
      segment_items_avx2(x, items);
    else
      segment_items_avx512(x, items);
  });
}

}  // namespace jz3
#endif
