// How the product of rows with a packed matrix of bfloat16 is cut so that what is read again stays in a core's caches.
#pragma once

#include "cpu/pool.h"
#include "cpu/tiles.h"

#ifdef JZ3_BF16

namespace jz3 {

// Calls body(begin, end, first, last), rows and columns, for all blocks of a product, on several threads: one after the
// other for a chunk of columns, multiples of 64, by which all rows come. Once if there are no columns. The last argument
// is what to bring nearer meanwhile.
template <class Body>
void each_block(const void* packed, int64_t rows, int64_t depth, int64_t columns, int threads, const Body& body) {
  const char* matrix = static_cast<const char*>(packed);
  constexpr int64_t WIDE = 2 * TILE;  // rows, columns and numbers of a step
  // Numbers that stay in a second-level cache: of the rows while the matrix comes by; of the matrix for tiles.
  constexpr int64_t of_rows = 192 * 1024, of_matrix = 320 * 1024;
  int64_t block = std::clamp<int64_t>(of_rows / depth / 6 * 6, 48, 192), chunk = columns;
  if (tile_unit() != TileUnit::none) {
    const bool deep = is_deep(depth / 2);
    const int64_t at_a_time = deep ? 2 * TILE * PART_TILES : depth;
    const int64_t passes = std::max<int64_t>((at_a_time * columns + of_matrix - 1) / of_matrix, 1);
    chunk = round_up((columns + passes - 1) / passes, PANEL);
    block = deep ? std::clamp<int64_t>(round_up((rows + threads - 1) / threads, 2 * TILE), 4 * TILE, 16 * TILE) : 4 * TILE;
  }
  int64_t first = 0;
  do {
    const int64_t last = std::min(first + chunk, columns), coming = std::min(chunk, columns - last);
    // Of the next chunk, which every core reads as a whole, each block brings a part nearer.
    const int64_t blocks = ((rows + block - 1) / block + threads - 1) / threads;
    share_rows(rows, block, threads, [&](int64_t begin, int64_t end) {
      const int64_t i = begin / block % blocks, bytes = coming * depth * 2, from = bytes * i / blocks / 64 * 64;
      body(begin, end, first, last,
           Nearer(matrix + last * depth * 2 + from, bytes > 0, 0, bytes * (i + 1) / blocks - from,
                  std::max<int64_t>(round_up(end - begin, WIDE) / WIDE * ((last - first) / WIDE) * (depth / WIDE), 1)));
    });
  } while ((first += chunk) < columns);
}

}  // namespace jz3
#endif
