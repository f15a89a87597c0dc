// Matrix products of small operands that are already in the caches, in the calling thread. torch's own product costs
// microseconds a call, wants rows and columns only, and on some processors does not use the widest vectors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu.h"

#if defined(DCN_X86_LEVELS)
#include <immintrin.h>
#endif

namespace dcn::product {

constexpr int max_rows = 12;

// Two values of bfloat16 side by side: two terms of a sum, whose products are added in float. Operands of pairs have
// half the depth.
using Pair = int32_t;
template <typename T>
using SumOf = std::conditional_t<std::is_same_v<T, Pair>, float, T>;
// How many terms one element of an operand holds.
template <typename T>
constexpr int64_t terms_of = std::is_same_v<T, Pair> ? 2 : 1;

// result[i, j] (+)= sum over s and k of left[i, s, k] * right[s, k, j], for at most two vectors of columns.
template <typename T>
struct Tile {
  int64_t segments, depth;
  const T* left;
  int64_t left_segment, left_stride;
  const T* right;
  int64_t right_segment, right_stride;
  SumOf<T>* result;
  int64_t result_stride, columns;
  bool accumulate;
};

template <typename T>
struct Kernels {
  int lanes, rows;
  void (*tile[2][2][max_rows])(const Tile<T>&);  // by Across, vectors - 1, rows - 1
};

}  // namespace dcn::product

#if defined(__aarch64__)
#define DCN_TILE_ROWS 12
#else
#define DCN_TILE_ROWS 6
#endif
#define DCN_ISA baseline
#define DCN_TARGET
#define DCN_VECTOR_BYTES 16
#include "cpu_product_kernel.h"
#undef DCN_TILE_ROWS
#undef DCN_ISA
#undef DCN_TARGET
#undef DCN_VECTOR_BYTES

#if defined(DCN_X86_LEVELS)
#define DCN_ISA v3
#define DCN_TARGET DCN_TARGET_V3
#define DCN_VECTOR_BYTES 32
#define DCN_TILE_ROWS 6
#include "cpu_product_kernel.h"
#undef DCN_ISA
#undef DCN_TARGET
#undef DCN_VECTOR_BYTES
#undef DCN_TILE_ROWS

#define DCN_ISA v4
#define DCN_TARGET DCN_TARGET_V4
#define DCN_VECTOR_BYTES 64
#define DCN_TILE_ROWS 12
#include "cpu_product_kernel.h"
#undef DCN_ISA
#undef DCN_TARGET
#undef DCN_VECTOR_BYTES
#undef DCN_TILE_ROWS

#define DCN_ISA bfloat16
#define DCN_TARGET DCN_TARGET_BFLOAT16
#define DCN_VECTOR_BYTES 64
#define DCN_TILE_ROWS 12
#define DCN_PAIRS
#include "cpu_product_kernel.h"
#undef DCN_ISA
#undef DCN_TARGET
#undef DCN_VECTOR_BYTES
#undef DCN_TILE_ROWS
#undef DCN_PAIRS
#endif

namespace dcn::product {

template <typename T>
const Kernels<T>& kernels() {
#if defined(DCN_X86_LEVELS)
  static constexpr Kernels<T> with_v3 = v3::kernels<T>(), with_v4 = v4::kernels<T>();
  static constexpr Kernels<Pair> with_pairs = bfloat16::kernels<Pair>();
  const CpuKernels chosen = tuned_kernels();
  if constexpr (std::is_same_v<T, Pair>)
    if (has_bfloat16_products()) return with_pairs;
  if (chosen >= kTunedV4) return with_v4;
  if (chosen >= kTunedV3) return with_v3;
#endif
  static constexpr Kernels<T> with_baseline = baseline::kernels<T>();
  return with_baseline;
}

// Columns of a packed right matrix that lie together: two vectors.
template <typename T>
int64_t panel_width() {
  return 2 * kernels<T>().lanes;
}

// Element (i, s, k) at data + i * row + s * segment + k * depth; row or depth is 1.
template <typename T>
struct Left {
  const T* data;
  int64_t row, depth, segment = 0;
};

// Element (s, k, j) at data + j / width * panel + s * segment + k * depth + j % width. Whole vectors are read: beyond
// the last column there must be memory.
template <typename T>
struct Right {
  const T* data;
  int64_t panel, depth, segment = 0;
};

// Element (i, j) at data + i * row + j / width * panel + j % width; only the columns asked for are written.
template <typename T>
struct Result {
  T* data;
  int64_t row, panel;
};

struct Size {
  int64_t rows, columns, depth, segments = 1;
};

template <typename T>
void multiply(const Size& size, const Left<T>& left, const Right<T>& right, const Result<SumOf<T>>& result,
              bool accumulate) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t width = 2 * kernel.lanes;
  const bool across = left.row == 1 && left.depth != 1;
  // Tiles of even height: the last is not left with a single row.
  const int64_t tiles = (size.rows + kernel.rows - 1) / kernel.rows;
  const int64_t panels = (size.columns + width - 1) / width;
  const auto tile = [&](int64_t i, int64_t j) {
    const int64_t columns = std::min(width, size.columns - j * width);
    const int64_t first = i * size.rows / tiles, rows = (i + 1) * size.rows / tiles - first;
    kernel.tile[across][columns > kernel.lanes][rows - 1](
        {size.segments, size.depth, left.data + first * left.row, left.segment, across ? left.depth : left.row,
         right.data + j * right.panel, right.segment, right.depth, result.data + first * result.row + j * result.panel,
         result.row, columns, accumulate});
  };
  // The smaller matrix is passed over again and again, the larger once.
  if (size.rows > 2 * size.columns) {
    for (int64_t i = 0; i < tiles; ++i)
      for (int64_t j = 0; j < panels; ++j) tile(i, j);
  } else {
    for (int64_t j = 0; j < panels; ++j)
      for (int64_t i = 0; i < tiles; ++i) tile(i, j);
  }
}

// The same with a right matrix whose rows lie whole in memory, so that the columns of a panel lie far apart. A segment
// is multiplied with everything while it is in the second cache, into which the next is fetched meanwhile.
template <typename T>
void multiply_by_rows(const Size& size, const Left<T>& left, const Right<T>& right, const Result<SumOf<T>>& result) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t width = 2 * kernels<T>().lanes;
  for (int64_t s = 0; s < size.segments; ++s) {
    const T* const next = right.data + (s + 1) * right.segment;
    for (int64_t first = 0; first < size.columns; first += width) {
      const int64_t columns = std::min(width, size.columns - first);
      for (int64_t k = 0; s + 1 < size.segments && k < size.depth; ++k)
        for (int64_t j = 0; j < columns; j += line) prefetch_nearby(next + k * right.depth + first + j);
      multiply<T>({size.rows, columns, size.depth}, {left.data + s * left.segment, left.row, left.depth},
                  {right.data + s * right.segment + first, width, right.depth},
                  {result.data + first / width * result.panel, result.row, result.panel}, true);
    }
  }
}

}  // namespace dcn::product
