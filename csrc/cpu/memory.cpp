// What the allocator does with memory that is freed.
#include <atomic>

#include "cpu/ops.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace jz3 {

void hold_memory(bool hold) {
#if defined(__GLIBC__)
  static std::atomic<int> holders{0};
  if (hold && holders++ == 0) {
    mallopt(M_MMAP_MAX, 0);
    mallopt(M_TRIM_THRESHOLD, -1);
  } else if (!hold && --holders == 0) {
    // What glibc's own rule comes to in a process that has freed large arrays.
    mallopt(M_MMAP_MAX, 65536);
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 64 << 20);
    malloc_trim(0);
  }
#else
  (void)hold;
#endif
}

}  // namespace jz3
