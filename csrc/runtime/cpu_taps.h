// Samples on the CPU, found once for all channels that share them, several at a time: for any positions
// (core/positions.h) that come in planes. A plane is some samples that vectors run over, such as those of one tap in
// all pixels of a tile.
#pragma once

#include <algorithm>

#include "../core/positions.h"
#include "cpu_rows.h"

namespace dcn::tiles {

// Rows, columns and bits of samples, as wide as float so that they become vectors. Maps on which an Index does not
// reach everywhere take the portable path.
using Index = int32_t;

// A part of the map.
struct Window {
  int64_t y = 0, x = 0, height = 0, width = 0;
  int64_t pixels() const { return height * width; }
};

// What is found of the samples of some planes, [plane, sample] each.
template <typename A>
struct Taps {
  int64_t stride;            // from one plane to the next
  Index *y0, *x0, *corners;  // bits 0-3: corners on the map; bits 4-7: those that are read, which have weight
  A* weight[4];              // bilinear weight times modulation
  int64_t* value[4];         // addresses of the corners' channels; a row of zeros for what is not read
  A *ly = nullptr, *lx = nullptr;
  int64_t* grad[4] = {};  // addresses in the gradient of the input; a row that nobody reads
  A* dot = nullptr;       // [plane, sample, corner]: gradient of what was sampled . corner

  Taps(Scratch& scratch, int64_t planes, int64_t samples, bool backward) : stride(samples) {
    const int64_t count = planes * stride;
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

// Finds the samples of `planes`, which has planes(), plane(k): the positions of one, and height() and width() of the
// map. `Slopes`: with what the backward needs; `Bounded`: with the window on the map that holds all corners.
template <typename Planes, typename A, bool Slopes, bool Bounded>
struct FindTaps {
  Planes planes;
  Taps<A> taps;
  Window* window;

  DCN_HOST_DEVICE void operator()() const {
    Index top = INT32_MAX, left = INT32_MAX, bottom = -2, right = -2;
    for (int64_t plane = 0; plane < planes.planes(); ++plane) find(plane, top, left, bottom, right);
    if (!Bounded || bottom < top) return;
    // From the first to the last corner on the map.
    const auto inside = [](int64_t first, int64_t last, int64_t size, int64_t& start, int64_t& count) {
      start = std::max<int64_t>(first, 0);
      count = std::min(last + 1, size - 1) - start + 1;
    };
    inside(top, bottom, planes.height(), window->y, window->height);
    inside(left, right, planes.width(), window->x, window->width);
  }

  DCN_HOST_DEVICE void find(int64_t plane, Index& top, Index& left, Index& bottom, Index& right) const {
    const auto positions = planes.plane(plane);
    static_assert(IsPositions<std::decay_t<decltype(positions)>>::value, "see core/positions.h");
    const int64_t at = plane * taps.stride, count = positions.size();
    Index *y0 = taps.y0 + at, *x0 = taps.x0 + at, *corners = taps.corners + at;
    A *w0 = taps.weight[0] + at, *w1 = taps.weight[1] + at, *w2 = taps.weight[2] + at, *w3 = taps.weight[3] + at;
    A *ly = Slopes ? taps.ly + at : nullptr, *lx = Slopes ? taps.lx + at : nullptr;
    Index t = top, l = left, b = bottom, r = right;
#pragma omp simd reduction(min : t, l) reduction(max : b, r)
    for (int64_t q = 0; q < count; ++q) {
      const A m = positions.modulation(q);
      const Sample<A, Index> s = positions.sample(q);
      const A a0 = s.weight(0), a1 = s.weight(1), a2 = s.weight(2), a3 = s.weight(3);
      const Index r0 = s.has(0) & (a0 != 0), r1 = s.has(1) & (a1 != 0), r2 = s.has(2) & (a2 != 0),
                  r3 = s.has(3) & (a3 != 0);
      const A none = s.origin();
      // A modulation that is not finite shows even where nothing is read.
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

template <bool Slopes, typename A, typename Planes>
Window find_taps(const Planes& planes, const Taps<A>& taps, bool bounded) {
  Window window;
  if (bounded)
    run_vectorised(FindTaps<Planes, A, Slopes, true>{planes, taps, &window});
  else
    run_vectorised(FindTaps<Planes, A, Slopes, false>{planes, taps, &window});
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
  const int64_t* images;  // of each sample of a plane: where its image starts, in place of Addresses::start
  Taps<A> taps;
  Addresses in;
  int64_t other;  // for corners that lack their bit
  int bit;        // of corner 0: 0 for those on the map, 4 for those that are read
  int64_t* const* to;

  DCN_HOST_DEVICE void operator()() const {
    for (int64_t i = 0; i < planes; ++i) {
      const int64_t at = i * taps.stride;
      const Index *y0 = taps.y0 + at, *x0 = taps.x0 + at, *corners = taps.corners + at;
      int64_t *to0 = to[0] + at, *to1 = to[1] + at, *to2 = to[2] + at, *to3 = to[3] + at;
      const int64_t *image = images, h = in.row, w = in.pixel, otherwise = other;
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

}  // namespace dcn::tiles
