// Images on the CPU as rows of channels (N H W C, in the type of sums), which the tuned paths of all operators read and
// write: vectors run over channels.
#pragma once

#include <algorithm>

#include "../core/view.h"
#include "../runtime/cpu.h"

namespace dcn::tiles {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pixel (n, y, x) starts at data + n * this->n + y * h + x * w.
template <typename A>
struct Rows {
  A* data;
  int64_t n, h, w;
  DCN_HOST_DEVICE A* at(int64_t in, int64_t y, int64_t x) const { return data + in * n + y * h + x * w; }
};

struct ImageSize {
  int64_t channels, height, width;
  int64_t elements() const { return channels * height * width; }
};

// Channels are already the innermost dimension, in the type of sums: nothing has to be copied.
template <typename S>
bool is_rows(const Tensor& t) {
  return std::is_same_v<S, Accumulate<S>> && (t.stride(1) == 1 || t.size(1) == 1);
}

// One image row between [C, W] of any type and [W, C] in the type of sums, 16 channels at a time.
template <typename A, typename S, bool ToRows>
struct TransposeRow {
  S* image;
  int64_t channel_stride, column_stride, channels, width;
  A* row;
  int64_t pixel_stride;
  DCN_HOST_DEVICE void operator()() const {
    for (int64_t first = 0; first < channels; first += 16) {
      const int64_t count = channels - first < 16 ? channels - first : 16;
      S* const plane = image + first * channel_stride;
      for (int64_t x = 0; x < width; ++x)
        for (int64_t c = 0; c < count; ++c) {
          S& pixel = plane[c * channel_stride + x * column_stride];
          A& value = row[x * pixel_stride + first + c];
          if constexpr (ToRows)
            value = static_cast<A>(pixel);
          else
            pixel = static_cast<S>(value);
        }
    }
  }
};

// Images between any layout and rows. With `cells` > 1 the rows hold channel d * cells + cell at cell * (C / cells) +
// d: what a position-sensitive bin reads lies together.
template <bool ToRows, typename A, typename S>
void transpose_images(const ImageSize& size, const View<S>& images, int64_t first_image, int64_t count,
                      const Rows<A>& rows, int64_t cells = 1) {
  const int64_t per_cell = size.channels / cells;
  torch::stable::parallel_for(0, count * size.height, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / size.height, y = i % size.height;
      for (int64_t cell = 0; cell < cells; ++cell)
        run_vectorised(TransposeRow<A, S, ToRows>{&images.at(first_image + n, cell, y, 0), images.c * cells, images.w,
                                                  per_cell, size.width, rows.at(n, y, 0) + cell * per_cell, rows.w});
    }
  });
}

template <typename A>
Rows<A> dense_rows(const ImageSize& size, A* data) {
  return {data, size.elements(), size.width * size.channels, size.channels};
}

// Images as rows of channels: as they lie in memory where that is `direct`, else brought into `buffer`.
template <typename S>
Rows<const Accumulate<S>> input_rows(bool direct, const View<const S>& input, const ImageSize& size, int64_t image,
                                     int64_t images, const Tensor& buffer, int64_t cells = 1) {
  using A = Accumulate<S>;
  if (direct) return {reinterpret_cast<const A*>(input.data) + image * input.n, input.n, input.h, input.w};
  const Rows<A> rows = dense_rows(size, static_cast<A*>(buffer.data_ptr()));
  transpose_images<true>(size, input, image, images, rows, cells);
  return {rows.data, rows.n, rows.h, rows.w};
}

// How many of `batch` images are held as rows at a time.
template <typename A>
int64_t images_at_a_time(const ImageSize& size, int64_t batch) {
  constexpr int64_t budget = 16 << 20;
  return std::max<int64_t>(1, std::min(batch, budget / (size.elements() * static_cast<int64_t>(sizeof(A)))));
}

}  // namespace dcn::tiles
