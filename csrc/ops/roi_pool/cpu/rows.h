// Images and results of RoI pooling on the CPU as rows of channels: the channels that a bin reads in a pixel lie side
// by side.
#pragma once

#include <optional>

#include "../arguments.h"
#include "channels.h"

namespace dcn::tiles::regions {

// Transposes pixels between planes of any type (channel c lies at c * plane_stride) and rows of channels, in blocks of
// 16 by 16: whole cache lines on both sides. Planes whose pixels are few or not contiguous go through TransposeRow.
template <Transpose Direction, typename A, typename S>
struct TransposePlanes {
  S* planes;
  int64_t plane_stride, pixel_stride, channels, pixels;
  A* rows;
  int64_t row_stride;

  DCN_HOST_DEVICE void operator()() const {
    if (pixel_stride != 1 || pixels < 16)
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
// position-sensitive there is one cell with all channels. There may be some cells alone, from `first` on.
template <typename A>
struct CellRows {
  A* data;
  int64_t n, cell, h, w, first;
  DCN_HOST_DEVICE A* at(int64_t ic) const { return data + (ic - first) * cell; }
  DCN_HOST_DEVICE CellRows of(int64_t in) const { return {data + in * n, n, cell, h, w, first}; }
};

// What is worked on at a time: some images, and of them the cells in some rows of groups, which the bins of some rows
// read.
struct Portion {
  int64_t image, images;
  Span groups;

  Span cells(const RoiGeometry& g) const { return {groups.first * g.groups, groups.last * g.groups}; }
  int64_t cell_count(const RoiGeometry& g) const { return (groups.last - groups.first) * g.groups; }
  Span bins(const RoiGeometry& g) const {
    return {g.first_bin_of_group(groups.first, 0) * g.out_width, g.first_bin_of_group(groups.last, 0) * g.out_width};
  }
};

// The portions of a call: of `images` images and `groups` rows of groups, or fewer at the end.
struct Portions {
  int64_t images, groups;

  int64_t elements(const RoiGeometry& g) const { return images * groups * g.groups * g.outputs * g.height * g.width; }
  template <typename F>
  void for_each(const RoiGeometry& g, const F& f) const {
    for (int64_t image = 0; image < g.batch; image += images)
      for (int64_t group = 0; group < g.groups; group += groups)
        f(Portion{image, std::min(images, g.batch - image), {group, std::min(group + groups, g.groups)}});
  }
};

// `direct`: nothing has to be transposed. Else cells are few enough to stay in the second-level cache: each is read by
// a few bins of a region alone, so that they are transposed as much as they are pooled.
template <typename A>
Portions portions_of(const RoiGeometry& g, bool direct) {
  constexpr int64_t budget = 1 << 20;
  if (direct) return {g.batch, g.groups};
  const ImageSize size{g.channels, g.height, g.width};
  if (g.groups == 1) return {images_at_a_time<A>(size, g.batch), 1};
  const int64_t image = size.elements() * static_cast<int64_t>(sizeof(A)), line = image / g.groups;
  if (image <= budget) return {std::min(budget / image, g.batch), g.groups};
  const int64_t passes = divide_up(g.groups, std::max<int64_t>(1, budget / line));
  return {1, divide_up(g.groups, passes)};
}

// Memory for a portion. Little is kept between calls, since fresh pages cost more than what is done with them.
template <typename A, int Slot>
class CellBuffer {
 public:
  CellBuffer(const Tensor& like, int64_t elements) : elements_(elements) {
    constexpr int64_t kept = 4 << 20;
    const bool keep = elements * static_cast<int64_t>(sizeof(A)) <= kept;
    own_ = torch::stable::new_empty(like, {keep ? 0 : elements}, scalar_type_of<A>());
    data_ = keep ? kept_memory(elements) : static_cast<A*>(own_->data_ptr());
  }
  A* data() const { return data_; }
  void clear() const {
    torch::stable::parallel_for(0, elements_, 1 << 12,
                                [&](int64_t begin, int64_t end) { std::fill(data_ + begin, data_ + end, A(0)); });
  }

 private:
  // Begins on a cache line, as a tensor does: vectors that cross lines take twice as long to load.
  static A* kept_memory(int64_t elements) {
    constexpr uintptr_t line = 64;
    const uintptr_t memory = reinterpret_cast<uintptr_t>(thread_scratch<A, Slot>(elements + line / sizeof(A)));
    return reinterpret_cast<A*>((memory + line - 1) / line * line);
  }

  int64_t elements_;
  std::optional<Tensor> own_;
  A* data_;
};

// Where the cells of all groups lie side by side in a pixel, they are transposed, and kept, pixel by pixel: a cache
// line holds channels of 16 cells.
template <typename S>
bool is_by_pixel(const RoiGeometry& g, const View<S>& images) {
  return g.groups > 1 && images.c == 1;
}

template <typename A>
CellRows<A> dense_cells(const RoiGeometry& g, const Portion& portion, bool by_pixel, A* data) {
  const int64_t plane = g.height * g.width, first = portion.cells(g).first,
                channels = portion.cell_count(g) * g.outputs;
  if (by_pixel) return {data, channels * plane, g.outputs, g.width * channels, channels, first};
  return {data, channels * plane, g.outputs * plane, g.width * g.outputs, g.outputs, first};
}

// Transposes a line of pixels, [pixel, output, cell], to [pixel, cell, output], or back.
template <Transpose Direction, typename A, typename S>
struct TransposePixels {
  S* line;
  int64_t pixel_stride, output_stride, pixels, outputs, cells;
  A* rows;
  int64_t row_stride, cell_stride;

  DCN_HOST_DEVICE void operator()() const {
    for (int64_t x = 0; x < pixels; ++x)
      TransposeRow<A, S, Direction>{line + x * pixel_stride, output_stride, 1, outputs, cells,
                                    rows + x * row_stride,   cell_stride}();
  }
};

// Transposes between images of any type and layout and dense_cells.
template <Transpose Direction, typename A, typename S>
void transpose_cells(const RoiGeometry& g, const View<S>& images, const Portion& portion, const CellRows<A>& rows) {
  const int64_t all = g.groups * g.groups, first = portion.cells(g).first, cells = portion.cell_count(g);
  if (is_by_pixel(g, images)) {
    torch::stable::parallel_for(0, portion.images * g.height, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / g.height, y = i % g.height;
        run_vectorised(TransposePixels<Direction, A, S>{&images.at(portion.image + n, first, y, 0), images.w, all,
                                                        g.width, g.outputs, cells, rows.of(n).at(first) + y * rows.h,
                                                        rows.w, rows.cell});
      }
    });
    return;
  }
  // Planes without gaps are cut into strips of any length, others into their lines.
  const bool whole = images.w == 1 && images.h == g.width;
  const int64_t pixels = whole ? g.height * g.width : g.width,
                length = whole ? std::min(pixels, std::max<int64_t>(16, 8192 / g.outputs)) : pixels;
  const int64_t strips = whole ? divide_up(pixels, length) : g.height;
  torch::stable::parallel_for(0, portion.images * cells * strips, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / strips / cells, cell = first + i / strips % cells, start = i % strips * length;
      const int64_t y = start / g.width, x = start % g.width;
      run_vectorised(TransposePlanes<Direction, A, S>{&images.at(portion.image + n, cell, y, x), images.c * all,
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

// Transposes the channels `of` of some bins, which are whole rows of them, between a region of a result of any type and
// layout and rows.
template <Transpose Direction, typename A, typename S>
void transpose_region(const RoiGeometry& g, const View<S>& result, int64_t r, const Span& bins, const Span& of,
                      const PooledRows<A>& rows) {
  const bool whole = result.w == 1 && result.h == g.out_width;
  const int64_t length = whole ? bins.last - bins.first : g.out_width;
  for (int64_t bin = bins.first; bin < bins.last; bin += length)
    run_vectorised(TransposePlanes<Direction, A, S>{&result.at(r, of.first, bin / g.out_width, 0), result.c, result.w,
                                                    of.last - of.first, length, rows.at(bin) + of.first, rows.stride});
}

// Whether images are stored as CellRows.
template <typename S>
bool is_cells(const RoiGeometry& g, const Tensor& t) {
  return g.groups == 1 && is_rows<S>(t);
}

template <typename S, typename A>
CellRows<A> rows_in_place(const View<S>& images, int64_t image) {
  return {reinterpret_cast<A*>(images.data) + image * images.n, images.n, 0, images.h, images.w, 0};
}

// A portion of the input as CellRows: as it is stored (`direct`), else transposed into `buffer`.
template <typename S>
CellRows<const Accumulate<S>> input_cells(const RoiGeometry& g, bool direct, const View<const S>& input,
                                          const Portion& portion, Accumulate<S>* buffer) {
  using A = Accumulate<S>;
  if (direct) return rows_in_place<const S, const A>(input, portion.image);
  const CellRows<A> rows = dense_cells(g, portion, is_by_pixel(g, input), buffer);
  transpose_cells<Transpose::kToRows>(g, input, portion, rows);
  return {rows.data, rows.n, rows.cell, rows.h, rows.w, rows.first};
}

}  // namespace dcn::tiles::regions
