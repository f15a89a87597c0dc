// Products of tiles in shared memory on tensor cores: operands half or float (TF32), float sums in registers.
#pragma once

#include "../../../runtime/gpu_values.h"

namespace dcn {

// Rows of `Vectors` vectors of 16 bytes. Vector number p of a row is stored at p ^ (row % 8), so that the same
// vector of eight successive rows, which fragments read at once, lies in different banks of shared memory.
template <typename S, int Vectors>
struct SharedTile {
  ChannelVector<S>* data;
  DCN_DEVICE ChannelVector<S>* at(int row, int vector) const { return data + row * Vectors + (vector ^ (row & 7)); }
};

// Eight warps share a product of [16 TilesDown WarpRows, 8 TilesAcross WarpColumns]; each has TilesDown x TilesAcross
// tiles of 16 rows and eight columns.
template <int WarpRows, int WarpColumns, int TilesAcross, int TilesDown = 2>
struct ProductShape {
  static_assert(WarpRows * WarpColumns == 8 && TilesAcross % 2 == 0);
  static constexpr int kRows = 16 * TilesDown * WarpRows, kColumns = 8 * TilesAcross * WarpColumns, kThreads = 256;
  static constexpr int kTilesDown = TilesDown, kTilesAcross = TilesAcross;
  static DCN_DEVICE int first_row(int thread) { return thread / 32 / WarpColumns * 16 * TilesDown; }
  static DCN_DEVICE int first_column(int thread) { return thread / 32 % WarpColumns * 8 * TilesAcross; }
};

template <typename Shape>
struct ProductSums {
  float v[Shape::kTilesDown][Shape::kTilesAcross][4];

  // All sums of a column begin with f(column).
  template <typename F>
  DCN_DEVICE void start(int thread, const F& f) {
    DCN_UNROLL
    for (int j = 0; j < Shape::kTilesAcross; ++j) {
      const int column = Shape::first_column(thread) + thread % 4 * 2 + 8 * j;
      const float first = f(column), second = f(column + 1);
      DCN_UNROLL
      for (int i = 0; i < Shape::kTilesDown; ++i) {
        v[i][j][0] = v[i][j][2] = first;
        v[i][j][1] = v[i][j][3] = second;
      }
    }
  }

  // Adds the terms of vectors 2 step and 2 step + 1 of the rows of a and of b.
  template <typename S, int VectorsA, int VectorsB, typename Block>
  DCN_DEVICE void add(Block& block, const SharedTile<S, VectorsA>& a, const SharedTile<S, VectorsB>& b, int step) {
    const int row0 = Shape::first_row(block.thread()), column0 = Shape::first_column(block.thread());
    // This lane names row r of number `matrix` of four 8x8 matrices: see CudaBlock::load_matrices.
    const int matrix = block.thread() % 32 / 8, r = block.thread() % 8, low = matrix & 1, high = matrix >> 1;
    uint32_t fragments[Shape::kTilesDown][4];
    DCN_UNROLL
    for (int i = 0; i < Shape::kTilesDown; ++i) {
      block.load_matrices(fragments[i], a.at(row0 + 16 * i + 8 * low + r, 2 * step + high));
    }
    DCN_UNROLL
    for (int j = 0; j < Shape::kTilesAcross; j += 2) {
      uint32_t pair[4];
      block.load_matrices(pair, b.at(column0 + 8 * j + 8 * high + r, 2 * step + low));
      DCN_UNROLL
      for (int i = 0; i < Shape::kTilesDown; ++i) {
        block.template multiply<S>(v[i][j], fragments[i], pair[0], pair[1]);
        block.template multiply<S>(v[i][j + 1], fragments[i], pair[2], pair[3]);
      }
    }
  }

  // Calls begin_row(row) for each row of this thread's share, and what that returns with (column, sum there, sum in the
  // next column).
  template <typename F>
  DCN_DEVICE void for_each_row(int thread, const F& begin_row) const {
    const int row0 = Shape::first_row(thread) + thread % 32 / 4, column0 = Shape::first_column(thread) + thread % 4 * 2;
    DCN_UNROLL
    for (int i = 0; i < 2 * Shape::kTilesDown; ++i) {
      const auto f = begin_row(row0 + 8 * i);
      DCN_UNROLL
      for (int j = 0; j < Shape::kTilesAcross; ++j)
        f(column0 + 8 * j, v[i / 2][j][i % 2 * 2], v[i / 2][j][i % 2 * 2 + 1]);
    }
  }
  // Calls f(row, column, sum there, sum in the next column) for this thread's share.
  template <typename F>
  DCN_DEVICE void for_each_pair(int thread, const F& f) const {
    for_each_row(thread, [&](int row) {
      return [&f, row](int column, float first, float second) { f(row, column, first, second); };
    });
  }
};

}  // namespace dcn
