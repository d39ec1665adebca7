// Rows of memory that are brought nearer step by step, ahead of their use.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace jz3 {
namespace {

// Rows that will be read next, brought to the second-level cache some lines at a time.
class Nearer {
 public:
  Nearer() : Nearer(nullptr, 0, 0, 0, 1) {}
  // `bytes` of every row, within `steps` of at most `most` lines.
  Nearer(const void* begin, int64_t rows, int64_t stride, int64_t bytes, int64_t steps, int64_t most = 8)
      : row_(static_cast<const char*>(begin)),
        rows_(rows),
        stride_(stride),
        bytes_(bytes),
        most_(std::min<int64_t>(((bytes + 63) / 64 * rows + steps - 1) / steps, most)) {}
  void fetch() {
    for (int64_t i = most_; i > 0 && rows_; --i) {
      _mm_prefetch(row_ + at_, _MM_HINT_T1);
      if ((at_ += 64) >= bytes_) at_ = 0, row_ += stride_, --rows_;
    }
  }

 private:
  const char* row_;
  int64_t rows_, stride_, bytes_, most_, at_ = 0;
};

}  // namespace
}  // namespace jz3
