// Products of tiles in shared memory on tensor cores: half operands, float sums in registers.
#pragma once

#include "../../../runtime/gpu_values.h"

namespace dcn {

// Rows of `Vectors` vectors of eight values. Vector number p of a row is stored at p ^ (row % 8), so that the same
// vector of eight successive rows, which fragments read at once, lies in different banks of shared memory.
template <typename S, int Vectors>
struct SharedTile {
  Vector8<S>* data;
  DCN_DEVICE Vector8<S>* at(int row, int vector) const { return data + row * Vectors + (vector ^ (row & 7)); }
};

// Whether the dimension that a product sums over lies along the rows of an operand's tile, or across them.
enum class Summed { kAlongRows, kAcrossRows };

// Eight warps share a product of [32 WarpRows, 8 TilesAcross WarpColumns]; each has 32 rows and TilesAcross tiles of
// eight columns.
template <int WarpRows, int WarpColumns, int TilesAcross>
struct ProductShape {
  static_assert(WarpRows * WarpColumns == 8 && TilesAcross % 2 == 0);
  static constexpr int kRows = 32 * WarpRows, kColumns = 8 * TilesAcross * WarpColumns, kThreads = 256;
  static constexpr int kTilesAcross = TilesAcross;
  static DCN_DEVICE int first_row(int thread) { return thread / 32 / WarpColumns * 32; }
  static DCN_DEVICE int first_column(int thread) { return thread / 32 % WarpColumns * 8 * TilesAcross; }
};

template <typename Shape>
struct ProductSums {
  float v[2][Shape::kTilesAcross][4];

  // All sums of a column begin with f(column).
  template <typename F>
  DCN_DEVICE void start(int thread, const F& f) {
    DCN_UNROLL
    for (int j = 0; j < Shape::kTilesAcross; ++j) {
      const int column = Shape::first_column(thread) + thread % 4 * 2 + 8 * j;
      const float first = f(column), second = f(column + 1);
      DCN_UNROLL
      for (int i = 0; i < 2; ++i) {
        v[i][j][0] = v[i][j][2] = first;
        v[i][j][1] = v[i][j][3] = second;
      }
    }
  }

  // Adds terms [16 step, 16 step + 16) of the sum.
  template <Summed A, Summed B, typename S, int VectorsA, int VectorsB, typename Block>
  DCN_DEVICE void add(Block& block, const SharedTile<S, VectorsA>& a, const SharedTile<S, VectorsB>& b, int step) {
    const int row0 = Shape::first_row(block.thread()), column0 = Shape::first_column(block.thread());
    // This lane names row r of number `matrix` of four 8x8 matrices: see CudaBlock::load_matrices.
    const int matrix = block.thread() % 32 / 8, r = block.thread() % 8, low = matrix & 1, high = matrix >> 1;
    uint32_t fragments[2][4];
    DCN_UNROLL
    for (int i = 0; i < 2; ++i) {
      if constexpr (A == Summed::kAlongRows)
        block.load_matrices(fragments[i], a.at(row0 + 16 * i + 8 * low + r, 2 * step + high));
      else
        block.load_matrices_transposed(fragments[i], a.at(16 * step + 8 * high + r, row0 / 8 + 2 * i + low));
    }
    DCN_UNROLL
    for (int j = 0; j < Shape::kTilesAcross; j += 2) {
      uint32_t pair[4];
      if constexpr (B == Summed::kAlongRows)
        block.load_matrices(pair, b.at(column0 + 8 * j + 8 * high + r, 2 * step + low));
      else
        block.load_matrices_transposed(pair, b.at(16 * step + 8 * low + r, column0 / 8 + j + high));
      DCN_UNROLL
      for (int i = 0; i < 2; ++i) {
        block.template multiply<S>(v[i][j], fragments[i], pair[0], pair[1]);
        block.template multiply<S>(v[i][j + 1], fragments[i], pair[2], pair[3]);
      }
    }
  }

  // Calls f(row, column, sum there, sum in the next column) for this thread's share.
  template <typename F>
  DCN_DEVICE void for_each_pair(int thread, const F& f) const {
    const int row0 = Shape::first_row(thread) + thread % 32 / 4, column0 = Shape::first_column(thread) + thread % 4 * 2;
    DCN_UNROLL
    for (int i = 0; i < 2; ++i) {
      DCN_UNROLL
      for (int j = 0; j < Shape::kTilesAcross; ++j) {
        f(row0 + 16 * i, column0 + 8 * j, v[i][j][0], v[i][j][1]);
        f(row0 + 16 * i + 8, column0 + 8 * j, v[i][j][2], v[i][j][3]);
      }
    }
  }
};

}  // namespace dcn
