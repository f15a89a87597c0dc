// Images and results of RoI pooling on the CPU as rows of channels: the channels that a bin reads in a pixel lie side
// by side.
#pragma once

#include "../arguments.h"
#include "channels.h"

namespace dcn::tiles::regions {

// Transposes pixels between planes of any type (channel c lies at c * plane_stride) and rows of channels, in blocks of
// 16 by 16: whole cache lines on both sides. Planes whose pixels are not contiguous go through TransposeRow.
template <Transpose Direction, typename A, typename S>
struct TransposePlanes {
  S* planes;
  int64_t plane_stride, pixel_stride, channels, pixels;
  A* rows;
  int64_t row_stride;

  DCN_HOST_DEVICE void operator()() const {
    if (pixel_stride != 1)
      return TransposeRow<A, S, Direction>{planes, plane_stride, pixel_stride, channels, pixels, rows, row_stride}();
    for_each_block(channels, [&](auto width, int64_t first, int) DCN_INLINE_LAMBDA {
      transpose(first, std::make_index_sequence<decltype(width)::value>{});
    });
  }

 private:
  static constexpr bool to_rows = Direction == Transpose::kToRows;

  DCN_HOST_DEVICE static void move(S& pixel, A& value) {
    if constexpr (to_rows)
      value = static_cast<A>(pixel);
    else
      pixel = static_cast<S>(value);
  }
  // With one statement per channel (`C...`), which the compiler turns into shuffles.
  template <size_t... C>
  DCN_HOST_DEVICE void transpose(int64_t first, std::index_sequence<C...>) const {
    constexpr int n = sizeof...(C);
    S* const from = planes + first * plane_stride;
    A* const to = rows + first;
    int64_t done = 0;
    for (; done + 16 <= pixels; done += 16) {
      A tile[16 * n];
      if constexpr (!to_rows) copy_tile<n>(to + done * row_stride, tile);
#pragma omp simd
      for (int i = 0; i < 16; ++i) (move(from[C * plane_stride + done + i], tile[i * n + C]), ...);
      if constexpr (to_rows) copy_tile<n>(to + done * row_stride, tile);
    }
    for (; done < pixels; ++done) (move(from[C * plane_stride + done], to[done * row_stride + C]), ...);
  }
  template <int N>
  DCN_HOST_DEVICE void copy_tile(A* to, A* tile) const {
    for (int i = 0; i < 16; ++i)
#pragma omp simd
      for (int c = 0; c < N; ++c)
        if constexpr (to_rows)
          to[i * row_stride + c] = tile[i * N + c];
        else
          tile[i * N + c] = to[i * row_stride + c];
  }
};

// Images as rows of the channels that one bin reads. A bin of group cell `ic` reads channels d * cells + ic (see
// RoiGeometry), and that of pixel (y, x) lies at data + ic * cell + y * h + x * w + d. Where pooling is not
// position-sensitive there is one cell with all channels.
template <typename A>
struct CellRows {
  A* data;
  int64_t n, cell, h, w;
  DCN_HOST_DEVICE A* at(int64_t ic) const { return data + ic * cell; }
  DCN_HOST_DEVICE CellRows of(int64_t in) const { return {data + in * n, n, cell, h, w}; }
};

template <typename A>
CellRows<A> dense_cells(const RoiGeometry& g, A* data) {
  const int64_t plane = g.height * g.width;
  return {data, g.channels * plane, g.outputs * plane, g.width * g.outputs, g.outputs};
}

// Transposes between images of any type and layout and dense_cells.
template <Transpose Direction, typename A, typename S>
void transpose_cells(const RoiGeometry& g, const View<S>& images, int64_t first_image, int64_t count,
                     const CellRows<A>& rows) {
  const int64_t cells = g.groups * g.groups;
  // Planes without gaps are cut into strips of any length, others into their lines.
  const bool whole = images.w == 1 && images.h == g.width;
  const int64_t pixels = whole ? g.height * g.width : g.width,
                length = whole ? std::min(pixels, std::max<int64_t>(16, 8192 / g.outputs)) : pixels;
  const int64_t strips = whole ? divide_up(pixels, length) : g.height;
  torch::stable::parallel_for(0, count * cells * strips, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / strips / cells, cell = i / strips % cells, start = i % strips * length;
      const int64_t y = start / g.width, x = start % g.width;
      run_vectorised(TransposePlanes<Direction, A, S>{&images.at(first_image + n, cell, y, x), images.c * cells,
                                                      images.w, g.outputs, std::min(length, g.height * g.width - start),
                                                      rows.of(n).at(cell) + y * rows.h + x * rows.w, rows.w});
    }
  });
}

// One region of a result, or of its gradient, as a row of channels for each bin: [P_h * P_w, D] in the accumulator
// type.
template <typename A>
struct PooledRows {
  A* data;
  int64_t stride;  // from bin to bin
  DCN_HOST_DEVICE A* at(int64_t bin) const { return data + bin * stride; }
};

// Whether a result is stored like that: then nothing is transposed.
template <typename S>
bool is_pooled_rows(const RoiGeometry& g, const Tensor& result) {
  return std::is_same_v<S, Accumulate<S>> &&
         is_stored(result, {result.stride(0), 1, g.out_width * g.outputs, g.outputs});
}

// An odd number of cache lines, so that the same channels of all bins do not compete for a few sets of the cache.
inline int64_t pooled_stride(const RoiGeometry& g) { return (divide_up(g.outputs, 16) | 1) * 16; }

// Transposes the channels [first, last) of a region between a result of any type and layout and rows.
template <Transpose Direction, typename A, typename S>
void transpose_region(const RoiGeometry& g, const View<S>& result, int64_t r, int64_t first, int64_t last,
                      const PooledRows<A>& rows) {
  const bool whole = result.w == 1 && result.h == g.out_width;
  const int64_t lines = whole ? 1 : g.out_height, length = g.bins() / lines;
  for (int64_t y = 0; y < lines; ++y)
    run_vectorised(TransposePlanes<Direction, A, S>{&result.at(r, first, y, 0), result.c, result.w, last - first,
                                                    length, rows.at(y * length) + first, rows.stride});
}

// Whether images are stored as CellRows.
template <typename S>
bool is_cells(const RoiGeometry& g, const Tensor& t) {
  return g.groups == 1 && is_rows<S>(t);
}

template <typename S, typename A>
CellRows<A> rows_in_place(const View<S>& images, int64_t image) {
  return {reinterpret_cast<A*>(images.data) + image * images.n, images.n, 0, images.h, images.w};
}

// Some images of the input as CellRows: as they are stored (`direct`), else transposed into `buffer`.
template <typename S>
CellRows<const Accumulate<S>> input_cells(const RoiGeometry& g, bool direct, const View<const S>& input, int64_t image,
                                          int64_t images, const Tensor& buffer) {
  using A = Accumulate<S>;
  if (direct) return rows_in_place<const S, const A>(input, image);
  const CellRows<A> rows = dense_cells(g, static_cast<A*>(buffer.data_ptr()));
  transpose_cells<Transpose::kToRows>(g, input, image, images, rows);
  return {rows.data, rows.n, rows.cell, rows.h, rows.w};
}

}  // namespace dcn::tiles::regions
