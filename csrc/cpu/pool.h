// Threads that stay: work is cut into items that whoever is free takes, so that a thread that the system lets wait holds
// nobody up.
#pragma once

#include <cstdint>
#include <functional>

namespace jz3 {

// Calls item(i) once for every i in [0, count), on at most `threads` threads, the caller's among them. An exception of
// any item is thrown again here.
void share(int64_t count, int threads, const std::function<void(int64_t)>& item);

// The same for [0, rows) in pieces of at most `size`: body(begin, end).
template <class Body>
void share_rows(int64_t rows, int64_t size, int threads, const Body& body) {
  share((rows + size - 1) / size, threads, [&](int64_t i) {
    const int64_t begin = i * size, end = begin + size;
    body(begin, end < rows ? end : rows);
  });
}

}  // namespace jz3
