// The positions of a convolution: its taps, moved by the offsets. Symbols as in docs/operators.md.
#pragma once

#include "conv_geometry.h"
#include "positions.h"
#include "view.h"

namespace dcn {

// Output pixels [first, first + count) of the flattened (n, y, x) order.
struct PixelRange {
  int64_t first, count;
};

// Images [first, first + count).
struct ImageRange {
  int64_t first, count;

  // Those that a range has pixels of.
  ImageRange(const ConvGeometry& g, const PixelRange& range)
      : first(range.first / g.out_pixels()), count((range.first + range.count - 1) / g.out_pixels() + 1 - first) {}
};

struct Pixel {
  int64_t n, y, x;
  Pixel() = default;
  DCN_HOST_DEVICE Pixel(const ConvGeometry& g, int64_t flat)
      : n(flat / g.out_pixels()), y(flat % g.out_pixels() / g.out_width), x(flat % g.out_width) {}
};

// Offset and mask of a call, as the caller stores them: in F, which is float or the type of the input.
template <typename F>
struct Displacement {
  View<const F> offset, mask;  // mask.data may be null
};

// The samples of a range of output pixels, ordered by offset group, then tap, then pixel. A map is what an offset group
// reads of an image; maps are ordered by image, then offset group. A is the type of coordinates.
template <typename A, typename F>
struct ConvPositions {
  ConvGeometry g;
  PixelRange range;
  ImageRange images;
  Displacement<F> moved;

  ConvPositions(const ConvGeometry& geometry, const PixelRange& pixels, const Displacement<F>& displacement)
      : g(geometry), range(pixels), images(geometry, pixels), moved(displacement) {}

  DCN_HOST_DEVICE int64_t size() const { return g.offset_groups * g.taps() * range.count; }
  DCN_HOST_DEVICE Sample<A> sample(int64_t i) const { return sample(pixel(i), offset_group(i), tap(i)); }
  DCN_HOST_DEVICE A modulation(int64_t i) const { return modulation(pixel(i), offset_group(i), tap(i)); }
  DCN_HOST_DEVICE int64_t height() const { return g.height; }
  DCN_HOST_DEVICE int64_t width() const { return g.width; }
  DCN_HOST_DEVICE int64_t maps() const { return images.count * g.offset_groups; }
  DCN_HOST_DEVICE int64_t map(int64_t i) const {
    return (pixel(i).n - images.first) * g.offset_groups + offset_group(i);
  }

  // The same for those who have the parts of a sample's number at hand.
  DCN_HOST_DEVICE Sample<A> sample(const Pixel& p, int64_t offset_group, int64_t tap) const {
    const int64_t plane = offset_group * g.taps() + tap;
    return g.sample(g.start_y(p.y), g.start_x(p.x), tap / g.kernel_w, tap % g.kernel_w,
                    static_cast<A>(moved.offset.at(p.n, 2 * plane, p.y, p.x)),
                    static_cast<A>(moved.offset.at(p.n, 2 * plane + 1, p.y, p.x)));
  }
  DCN_HOST_DEVICE A modulation(const Pixel& p, int64_t offset_group, int64_t tap) const {
    return moved.mask.data ? static_cast<A>(moved.mask.at(p.n, offset_group * g.taps() + tap, p.y, p.x)) : A(1);
  }

 private:
  DCN_HOST_DEVICE Pixel pixel(int64_t i) const { return {g, range.first + i % range.count}; }
  DCN_HOST_DEVICE int64_t offset_group(int64_t i) const { return i / range.count / g.taps(); }
  DCN_HOST_DEVICE int64_t tap(int64_t i) const { return i / range.count % g.taps(); }
};

}  // namespace dcn
