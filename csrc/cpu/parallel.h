// Split a range over threads; small work stays on the caller's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

// One function body for several instruction sets, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define JZ3_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define JZ3_CLONES
#endif

namespace jz3 {

// Calls body(part, begin, end) for contiguous parts of [0, count), whose `cost` is the number of elementary
// steps of one item. An exception of any part is thrown again here. Where no more threads are to be had, their parts
// are done by this one.
template <class Body>
void parallel(int64_t count, int64_t cost, int threads, const Body& body) {
  const int64_t worthwhile = count * std::max<int64_t>(cost, 1) / 100000 + 1;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>({threads, count, worthwhile}));
  std::vector<std::exception_ptr> errors(parts);
  auto run = [&](int64_t part) {
    try {
      body(part, count * part / parts, count * (part + 1) / parts);
    } catch (...) {
      errors[part] = std::current_exception();
    }
  };
  std::vector<std::thread> workers;
  workers.reserve(size_t(parts - 1));
  int64_t part = 1;
  try {
    for (; part < parts; ++part) workers.emplace_back(run, part);
  } catch (const std::system_error&) {
  }
  run(0);
  for (; part < parts; ++part) run(part);
  for (auto& worker : workers) worker.join();
  for (auto& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace jz3
