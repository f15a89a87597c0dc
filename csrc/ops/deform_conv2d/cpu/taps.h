// Deformable convolution on the CPU, where the taps of a tile lie: found once for all channels that share them, several
// pixels at a time.
#pragma once

#include <cstring>

#include "plan.h"

namespace dcn::tiles {

// Rows, columns and bits of taps, as wide as float so that they become vectors.
using Index = int32_t;

// Maps on which an Index does not reach everywhere take the portable path.
inline bool fits_index(const ConvGeometry& g) {
  constexpr int64_t most = int64_t{1} << 30;
  return std::max(g.height, g.start_y(g.out_height) + g.kernel_h * g.dilation_h) < most &&
         std::max(g.width, g.start_x(g.out_width) + g.kernel_w * g.dilation_w) < most;
}

// Of each pixel of a tile: where its kernel starts on the input, and where its image starts in the rows.
struct TilePixels {
  Index *y, *x;
  int64_t* image;

  TilePixels(Scratch& scratch, int64_t pixels)
      : y(scratch.take<Index>(pixels)), x(scratch.take<Index>(pixels)), image(scratch.take<int64_t>(pixels)) {}

  void find(const ConvGeometry& g, const Tile& tile) const {
    for_each_row(tile, [&](int64_t q, int64_t, int64_t oy) {
      for (int64_t i = 0; i < tile.columns; ++i) {
        y[q + i] = static_cast<Index>(g.start_y(oy));
        x[q + i] = static_cast<Index>(g.start_x(tile.x + i));
      }
    });
  }
};

// The part of the input that a tile reads.
struct Window {
  int64_t y = 0, x = 0, height = 0, width = 0;
  int64_t pixels() const { return height * width; }
};

// The taps of a tile, [plane, pixel] each; a plane is an (offset group, tap), counted from the first group at hand.
template <typename A>
struct Taps {
  int64_t pixels;            // from one plane to the next
  A *offset, *mask;          // [plane, (y, x), pixel] and [plane, pixel]
  Index *y0, *x0, *corners;  // bits 0-3: corners on the map; bits 4-7: those that are read, which have weight
  A* weight[4];              // bilinear weight times mask
  int64_t* value[4];         // addresses of the corners' channels; a row of zeros for what is not read
  A *ly = nullptr, *lx = nullptr;
  int64_t* grad[4] = {};  // addresses in the gradient of the input; a row that nobody reads
  A* dot = nullptr;       // [plane, pixel, corner]: gradient of the columns . corner

  Taps(Scratch& scratch, int64_t planes, int64_t pixels_, bool backward) : pixels(pixels_) {
    const int64_t count = planes * pixels;
    offset = scratch.take<A>(2 * count);
    mask = scratch.take<A>(count);
    y0 = scratch.take<Index>(count);
    x0 = scratch.take<Index>(count);
    corners = scratch.take<Index>(count);
    for (int c = 0; c < 4; ++c) weight[c] = scratch.take<A>(count);
    for (int c = 0; c < 4; ++c) value[c] = scratch.take<int64_t>(count);
    if (!backward) return;
    ly = scratch.take<A>(count);
    lx = scratch.take<A>(count);
    for (int c = 0; c < 4; ++c) grad[c] = scratch.take<int64_t>(count);
    dot = scratch.take<A>(4 * count);
  }
};

// Offset and mask of a tile, for the planes from `first` on.
template <typename A, typename F>
void load_displacement(const Tile& tile, int64_t image, int64_t first, int64_t planes, const Displacement<A, F>& where,
                       const Taps<A>& taps) {
  const auto load = [&](const View<const F>& from, int64_t begin, int64_t count, A* to) {
    for_each_row(tile, [&](int64_t q, int64_t n, int64_t y) {
      // A plane is to the pixels here what a pixel is to the channels there.
      run_vectorised(TransposeRow<A, const F, Turn::kToRows>{&from.at(image + n, begin, y, tile.x), from.w, from.c,
                                                             tile.columns, count, to + q, taps.pixels});
    });
  };
  load(where.offset, 2 * first, 2 * planes, taps.offset);
  if (where.mask.data)
    load(where.mask, first, planes, taps.mask);
  else
    std::fill(taps.mask, taps.mask + planes * taps.pixels, A(1));
}

// `Slopes`: with what the backward needs; `Bounded`: with the window on the map that holds all corners.
template <typename A, bool Slopes, bool Bounded>
struct FindTaps {
  ConvGeometry g;
  int64_t count, offset_groups;
  TilePixels pixels;
  Taps<A> taps;
  Window* window;

  DCN_HOST_DEVICE void operator()() const {
    Index top = INT32_MAX, left = INT32_MAX, bottom = -2, right = -2;
    int64_t plane = 0;
    for (int64_t og = 0; og < offset_groups; ++og)
      for (int64_t ky = 0; ky < g.kernel_h; ++ky)
        for (int64_t kx = 0; kx < g.kernel_w; ++kx, ++plane) find(plane, ky, kx, top, left, bottom, right);
    if (!Bounded || bottom < top) return;
    // From the first to the last corner on the map.
    const auto inside = [](int64_t first, int64_t last, int64_t size, int64_t& start, int64_t& count) {
      start = std::max<int64_t>(first, 0);
      count = std::min(last + 1, size - 1) - start + 1;
    };
    inside(top, bottom, g.height, window->y, window->height);
    inside(left, right, g.width, window->x, window->width);
  }

  DCN_HOST_DEVICE void find(int64_t plane, int64_t ky, int64_t kx, Index& top, Index& left, Index& bottom,
                            Index& right) const {
    const int64_t at = plane * taps.pixels;
    const A *dy = taps.offset + 2 * at, *dx = dy + taps.pixels, *mask = taps.mask + at;
    const Index *start_y = pixels.y, *start_x = pixels.x;
    Index *y0 = taps.y0 + at, *x0 = taps.x0 + at, *corners = taps.corners + at;
    A *w0 = taps.weight[0] + at, *w1 = taps.weight[1] + at, *w2 = taps.weight[2] + at, *w3 = taps.weight[3] + at;
    A *ly = Slopes ? taps.ly + at : nullptr, *lx = Slopes ? taps.lx + at : nullptr;
    Index t = top, l = left, b = bottom, r = right;
#pragma omp simd reduction(min : t, l) reduction(max : b, r)
    for (int64_t q = 0; q < count; ++q) {
      const A m = mask[q];
      const Sample<A, Index> s = g.sample<A, Index>(start_y[q], start_x[q], ky, kx, dy[q], dx[q]);
      const A a0 = s.weight(0), a1 = s.weight(1), a2 = s.weight(2), a3 = s.weight(3);
      const Index r0 = s.has(0) & (a0 != 0), r1 = s.has(1) & (a1 != 0), r2 = s.has(2) & (a2 != 0),
                  r3 = s.has(3) & (a3 != 0);
      const A none = s.origin();
      // A mask that is not finite shows even where nothing is read.
      w0[q] = r0 ? a0 * m : none + (s.corners ? A(0) : 0 * m);
      w1[q] = r1 ? a1 * m : none;
      w2[q] = r2 ? a2 * m : none;
      w3[q] = r3 ? a3 * m : none;
      y0[q] = s.y0;
      x0[q] = s.x0;
      corners[q] = static_cast<Index>(s.corners) | r0 << 4 | r1 << 5 | r2 << 6 | r3 << 7;
      if constexpr (Slopes) {
        ly[q] = s.ly;
        lx[q] = s.lx;
      }
      if constexpr (Bounded) {
        const Index low_y = s.corners ? s.y0 : INT32_MAX, low_x = s.corners ? s.x0 : INT32_MAX;
        const Index high_y = s.corners ? s.y0 : -2, high_x = s.corners ? s.x0 : -2;
        t = low_y < t ? low_y : t;
        l = low_x < l ? low_x : l;
        b = high_y > b ? high_y : b;
        r = high_x > r ? high_x : r;
      }
    }
    top = t, left = l, bottom = b, right = r;
  }
};

template <bool Slopes, typename A>
Window find_taps(const ConvGeometry& g, int64_t count, int64_t offset_groups, const TilePixels& pixels,
                 const Taps<A>& taps, bool bounded) {
  Window window;
  if (bounded)
    run_vectorised(FindTaps<A, Slopes, true>{g, count, offset_groups, pixels, taps, &window});
  else
    run_vectorised(FindTaps<A, Slopes, false>{g, count, offset_groups, pixels, taps, &window});
  return window;
}

// Where pixel (n, y, x) of the map begins in some rows of channels: start + n * image + y * row + x * pixel, in bytes.
struct Addresses {
  int64_t start, image, row, pixel;

  template <typename A>
  static Addresses of(const Rows<A>& rows) {
    constexpr int64_t size = sizeof(A);
    return {reinterpret_cast<int64_t>(rows.data), rows.n * size, rows.h * size, rows.w * size};
  }
  // Rows that hold the window alone, image by image, `channels` to the pixel.
  template <typename A>
  static Addresses of(const Window& window, int64_t channels, A* data) {
    constexpr int64_t size = sizeof(A);
    const int64_t pixel = channels * size, row = window.width * pixel;
    return {reinterpret_cast<int64_t>(data) - window.y * row - window.x * pixel, window.height * row, row, pixel};
  }
};

// From rows and columns of taps to addresses.
template <typename A>
struct PointTaps {
  int64_t count, planes;
  TilePixels pixels;  // `image` filled
  Taps<A> taps;
  Addresses in;
  int64_t other;  // for corners that lack their bit
  int bit;        // of corner 0: 0 for those on the map, 4 for those that are read
  int64_t* const* to;

  DCN_HOST_DEVICE void operator()() const {
    for (int64_t i = 0; i < planes; ++i) {
      const int64_t at = i * taps.pixels;
      const Index *y0 = taps.y0 + at, *x0 = taps.x0 + at, *corners = taps.corners + at;
      int64_t *to0 = to[0] + at, *to1 = to[1] + at, *to2 = to[2] + at, *to3 = to[3] + at;
      const int64_t *image = pixels.image, h = in.row, w = in.pixel, otherwise = other;
      const int shift = bit;
#pragma omp simd
      for (int64_t q = 0; q < count; ++q) {
        const int64_t first = image[q] + y0[q] * h + x0[q] * w;
        const Index bits = corners[q] >> shift;
        to0[q] = bits & 1 ? first : otherwise;
        to1[q] = bits & 2 ? first + w : otherwise;
        to2[q] = bits & 4 ? first + h : otherwise;
        to3[q] = bits & 8 ? first + h + w : otherwise;
      }
    }
  }
};

template <typename A>
void point_taps(const Tile& tile, int64_t planes, const TilePixels& pixels, const Taps<A>& taps, const Addresses& in,
                int64_t first_image, const A* other, int bit, int64_t* const* to) {
  for_each_row(tile, [&](int64_t q, int64_t n, int64_t) {
    std::fill_n(pixels.image + q, tile.columns, in.start + (n - first_image) * in.image);
  });
  run_vectorised(PointTaps<A>{tile.count(), planes, pixels, taps, in, reinterpret_cast<int64_t>(other), bit, to});
}

}  // namespace dcn::tiles
