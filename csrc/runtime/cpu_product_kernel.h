// The inner product of matrices for one instruction set: a tile of the result stays in registers while rows of the left
// matrix are broadcast against vectors of the right one. No `#pragma once`: cpu_product.h includes this file once for
// each instruction set, with DCN_ISA (a namespace), DCN_TARGET (the functions' attribute), DCN_VECTOR_BYTES and
// DCN_TILE_ROWS (as many as leave registers for the right matrix). Plain vector types of the compiler, no intrinsics.

namespace dcn::product::DCN_ISA {

template <typename T>
struct Vector {
  typedef T Type __attribute__((vector_size(DCN_VECTOR_BYTES)));
  // In memory: aligned as T is.
  typedef T Stored __attribute__((vector_size(DCN_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  static constexpr int lanes = DCN_VECTOR_BYTES / sizeof(T);
};

// `Across`: consecutive rows of the left matrix lie side by side and its depth has a stride; else the other way round.
template <typename T, int Rows, int Vectors, bool Across>
DCN_TARGET void multiply_tile(const Tile<T>& t) {
  using V = typename Vector<T>::Type;
  using Stored = typename Vector<T>::Stored;
  constexpr int lanes = Vector<T>::lanes;
  constexpr int bases = (Rows + 2) / 3;  // three rows are addressed from one pointer

  V sums[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) sums[i][j] = V{};
  // What is added to may lie far away: it is fetched while the sums are made.
  for (int i = 0; t.accumulate && i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) __builtin_prefetch(t.result + i * t.result_stride + j * lanes, 1);
  for (int64_t s = 0; s < t.segments; ++s) {
    const T* left[bases];
    for (int i = 0; i < bases; ++i) left[i] = t.left + s * t.left_segment + (Across ? 0 : 3 * i * t.left_stride);
    const T* right = t.right + s * t.right_segment;
    for (int64_t k = 0; k < t.depth; ++k) {
      constexpr int distance = 16;  // steps until a line from the last cache is there
      for (int j = 0; j < Vectors * DCN_VECTOR_BYTES; j += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(right + distance * t.right_stride) + j);
      V column[Vectors];
      for (int j = 0; j < Vectors; ++j) column[j] = *reinterpret_cast<const Stored*>(right + j * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const T value = Across ? left[0][i] : left[i / 3][i % 3 * t.left_stride];
        const V row = value - V{};  // a broadcast: x - 0 is x
        for (int j = 0; j < Vectors; ++j) sums[i][j] += row * column[j];
      }
      right += t.right_stride;
      for (int i = 0; i < bases; ++i) left[i] += Across ? t.left_stride : 1;
    }
  }
  if (t.columns == Vectors * lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < Vectors; ++j) {
        Stored* const to = reinterpret_cast<Stored*>(t.result + i * t.result_stride + j * lanes);
        *to = t.accumulate ? *to + sums[i][j] : sums[i][j];
      }
    return;
  }
  // The last columns of a matrix: what lies beyond them belongs to somebody else.
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    T row[Vectors * lanes];
    for (int j = 0; j < Vectors; ++j) *reinterpret_cast<Stored*>(row + j * lanes) = sums[i][j];
    T* const to = t.result + i * t.result_stride;
    for (int64_t j = 0; j < t.columns; ++j) to[j] = t.accumulate ? to[j] + row[j] : row[j];
  }
}

template <typename T, bool Across, int... Rows>
constexpr void list_tiles(Kernels<T>& kernels, std::integer_sequence<int, Rows...>) {
  ((kernels.tile[Across][0][Rows] = multiply_tile<T, Rows + 1, 1, Across>), ...);
  ((kernels.tile[Across][1][Rows] = multiply_tile<T, Rows + 1, 2, Across>), ...);
}

template <typename T>
constexpr Kernels<T> kernels() {
  Kernels<T> found{Vector<T>::lanes, DCN_TILE_ROWS, {}};
  list_tiles<T, false>(found, std::make_integer_sequence<int, DCN_TILE_ROWS>());
  list_tiles<T, true>(found, std::make_integer_sequence<int, DCN_TILE_ROWS>());
  return found;
}

}  // namespace dcn::product::DCN_ISA
