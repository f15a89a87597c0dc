// Deformable convolution on the CPU, where the taps of a tile lie: the positions of a tile, in planes for
// runtime/cpu_taps.h.
#pragma once

#include "../../../core/conv_positions.h"
#include "../../../runtime/cpu_taps.h"
#include "plan.h"

namespace dcn::tiles {

// Why the tuned path does not serve a call: an Index does not reach everywhere. Null: it does.
inline const char* why_portable(const ConvGeometry& g) {
  constexpr int64_t limit = int64_t{1} << 30;
  const bool reaches = std::max(g.height, g.start_y(g.out_height) + g.kernel_h * g.dilation_h) < limit &&
                       std::max(g.width, g.start_x(g.out_width) + g.kernel_w * g.dilation_w) < limit;
  return reaches ? nullptr : "input: expected fewer than 2^30 rows and columns, with padding";
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

// Offset and mask of a tile, in the accumulator type and with pixels side by side. A plane is an (offset group, tap),
// counted from the first group at hand.
template <typename A>
struct TileDisplacement {
  int64_t stride;    // from one plane to the next
  A *offset, *mask;  // [plane, (y, x), pixel] and [plane, pixel]; ones where there is no mask

  TileDisplacement(Scratch& scratch, int64_t planes, int64_t pixels)
      : stride(pixels), offset(scratch.take<A>(2 * planes * pixels)), mask(scratch.take<A>(planes * pixels)) {}

  // Of `planes` planes of the call from number `first` on; tile.n counts from `image`.
  template <typename F>
  void load(const Tile& tile, int64_t image, int64_t first, int64_t planes, const Displacement<F>& from) const {
    const auto copy = [&](const View<const F>& tensor, int64_t begin, int64_t count, A* to) {
      for_each_row(tile, [&](int64_t q, int64_t n, int64_t y) {
        // [plane, x] becomes rows of pixels: TransposeRow with pixels for its channels, and planes for its pixels.
        run_vectorised(TransposeRow<A, const F, Transpose::kToRows>{&tensor.at(image + n, begin, y, tile.x), tensor.w,
                                                                    tensor.c, tile.columns, count, to + q, stride});
      });
    };
    copy(from.offset, 2 * first, 2 * planes, offset);
    if (from.mask.data)
      copy(from.mask, first, planes, mask);
    else
      std::fill(mask, mask + planes * stride, A(1));
  }
};

// The positions of a tile: those of a plane are the samples of one tap in `count` pixels.
template <typename A>
struct TilePlanes {
  ConvGeometry g;
  int64_t count, offset_groups;
  TilePixels pixels;
  TileDisplacement<A> moved;

  struct Plane {
    const ConvGeometry& g;
    int64_t count, ky, kx;
    const Index *start_y, *start_x;
    const A *dy, *dx, *mask;

    DCN_HOST_DEVICE int64_t size() const { return count; }
    DCN_HOST_DEVICE Sample<A, Index> sample(int64_t q) const {
      return g.sample<A, Index>(start_y[q], start_x[q], ky, kx, dy[q], dx[q]);
    }
    DCN_HOST_DEVICE A modulation(int64_t q) const { return mask[q]; }
  };
  DCN_HOST_DEVICE int64_t planes() const { return offset_groups * g.taps(); }
  DCN_HOST_DEVICE Plane plane(int64_t i) const {
    const int64_t tap = i % g.taps(), at = i * moved.stride;
    const A* const dy = moved.offset + 2 * at;
    return {g, count, tap / g.kernel_w, tap % g.kernel_w, pixels.y, pixels.x, dy, dy + moved.stride, moved.mask + at};
  }
  DCN_HOST_DEVICE int64_t height() const { return g.height; }
  DCN_HOST_DEVICE int64_t width() const { return g.width; }
};

// Addresses of the corners of all samples of a tile's planes; tile.n counts from `first_image` of the rows.
template <typename A>
void point_taps(const Tile& tile, int64_t planes, const TilePixels& pixels, const Taps<A>& taps, const Addresses& in,
                int64_t first_image, const A* other, int bit, int64_t* const* to) {
  for_each_row(tile, [&](int64_t q, int64_t n, int64_t) {
    std::fill_n(pixels.image + q, tile.columns, in.start + (n - first_image) * in.image);
  });
  run_vectorised(PointTaps<A>{tile.count(), planes, pixels.image, taps, in, reinterpret_cast<int64_t>(other), bit, to});
}

}  // namespace dcn::tiles
