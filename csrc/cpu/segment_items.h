// How the threads of segment_project share documents.
#pragma once

#include <atomic>
#include <vector>

#include "cpu/ops.h"

#ifdef JZ3_BF16

namespace jz3 {

constexpr int64_t SEGMENT_CHUNK = 256;  // tokens at a time
constexpr int64_t SEGMENT_WIDE = 128;   // outputs at a time

// Outputs [first, end) of documents [document, last): of one, or of several with at most SEGMENT_CHUNK tokens together.
struct SegmentItem {
  int64_t document, last, first, end;
};

class SegmentItems {
 public:
  SegmentItems(const SegmentArguments& arguments, int threads);
  int64_t count() const { return int64_t(items_.size()); }
  // The next one that nobody has taken; null after the last.
  const SegmentItem* next() {
    const int64_t i = taken_++;
    return i < count() ? &items_[size_t(i)] : nullptr;
  }

 private:
  std::vector<SegmentItem> items_;
  std::atomic<int64_t> taken_{0};
};

// Every thread's work on one vector unit; the last takes bfloat16 alone.
void segment_items_avx2(const SegmentArguments& arguments, SegmentItems& items);
void segment_items_avx512(const SegmentArguments& arguments, SegmentItems& items);
void segment_items_bf16(const SegmentArguments& arguments, SegmentItems& items);

}  // namespace jz3

#endif
