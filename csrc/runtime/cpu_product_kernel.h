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

template <typename V>
DCN_TARGET inline __attribute__((always_inline)) void add_products(V& sums, V row, V column) {
  sums += row * column;
}
// Of pairs of bfloat16: the first of a pair is the lower half.
DCN_TARGET inline __attribute__((always_inline)) void add_products(Vector<float>::Type& sums, Vector<Pair>::Type row,
                                                                   Vector<Pair>::Type column) {
  using V = Vector<float>::Type;
#if defined(DCN_PAIRS)
  sums = reinterpret_cast<V>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), reinterpret_cast<__m512bh>(row),
                                              reinterpret_cast<__m512bh>(column)));
#else
  constexpr Pair second = -65536;  // the upper 16 bits
  sums += reinterpret_cast<V>(row << 16) * reinterpret_cast<V>(column << 16);
  sums += reinterpret_cast<V>(row & second) * reinterpret_cast<V>(column & second);
#endif
}

// `Across`: consecutive rows of the left matrix lie side by side and its depth has a stride; else the other way round.
template <typename T, int Rows, int Vectors, bool Across>
DCN_TARGET void multiply_tile(const Tile<T>& t) {
  using V = typename Vector<T>::Type;
  using Sum = typename Vector<SumOf<T>>::Type;
  using Stored = typename Vector<SumOf<T>>::Stored;
  constexpr int lanes = Vector<T>::lanes;
  constexpr int bases = (Rows + 2) / 3;  // three rows are addressed from one pointer

  Sum sums[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) sums[i][j] = Sum{};
  // What is added to may lie far away: it is fetched while the sums are made.
  for (int i = 0; t.accumulate && i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) __builtin_prefetch(t.result + i * t.result_stride + j * lanes, 1);
  // Steps until a line is there: from the last cache, or where steps lie far apart, from the second, since such lines
  // fill a few sets of the first.
  const int64_t ahead = (t.right_stride <= 2 * lanes ? 16 : 4) * t.right_stride;
  for (int64_t s = 0; s < t.segments; ++s) {
    const T* left[bases];
    for (int i = 0; i < bases; ++i) left[i] = t.left + s * t.left_segment + (Across ? 0 : 3 * i * t.left_stride);
    const T* right = t.right + s * t.right_segment;
    for (int64_t k = 0; k < t.depth; ++k) {
      for (int j = 0; j < Vectors * DCN_VECTOR_BYTES; j += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(right + ahead) + j);
      V column[Vectors];
      for (int j = 0; j < Vectors; ++j)
        column[j] = *reinterpret_cast<const typename Vector<T>::Stored*>(right + j * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const T value = Across ? left[0][i] : left[i / 3][i % 3 * t.left_stride];
        const V row = value - V{};  // a broadcast: x - 0 is x
        for (int j = 0; j < Vectors; ++j) add_products(sums[i][j], row, column[j]);
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
    SumOf<T> row[Vectors * lanes];
    for (int j = 0; j < Vectors; ++j) *reinterpret_cast<Stored*>(row + j * lanes) = sums[i][j];
    SumOf<T>* const to = t.result + i * t.result_stride;
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
