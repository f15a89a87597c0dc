// The positions of a convolution in the order of the rows of its columns: by offset group, then output pixel, then tap.
// Where one is follows from its number by products alone (division.h). `I` is the type of all numbers of elements:
// int32_t where they fit, which is for the host to know.
#pragma once

#include "conv_positions.h"
#include "division.h"

namespace dcn {

// The same view from its image `first` on.
template <typename S>
View<S> from_image(View<S> v, int64_t first) {
  if (v.data) v.data += first * v.n;
  return v;
}

// A row of columns: a tap of an output pixel. Images are counted from the first of the range.
template <typename I>
struct ConvRow {
  I image, y, x, tap;
};

template <typename A, typename F, typename I>
struct RowPositions {
  ConvGeometry g;
  PixelRange range;
  ImageRange images;
  Displacement<F> moved;  // from the first image of the range on
  Divisor<I> by_rows, by_taps, by_kernel_w, by_out_pixels, by_out_width, by_offset_groups;

  RowPositions(const ConvGeometry& geometry, const PixelRange& pixels, const Displacement<F>& displacement)
      : g(geometry),
        range(pixels),
        images(geometry, pixels),
        moved{from_image(displacement.offset, images.first), from_image(displacement.mask, images.first)},
        by_rows(rows()),
        by_taps(g.taps()),
        by_kernel_w(g.kernel_w),
        by_out_pixels(g.out_pixels()),
        by_out_width(g.out_width),
        by_offset_groups(g.offset_groups) {}

  DCN_HOST_DEVICE int64_t rows() const { return range.count * g.taps(); }
  DCN_HOST_DEVICE int64_t size() const { return g.offset_groups * rows(); }
  DCN_HOST_DEVICE int64_t height() const { return g.height; }
  DCN_HOST_DEVICE int64_t width() const { return g.width; }
  DCN_HOST_DEVICE int64_t maps() const { return images.count * g.offset_groups; }
  DCN_HOST_DEVICE int64_t map(int64_t i) const {
    const Quotient<I> of = by_rows(static_cast<I>(i));
    return row(of.remainder).image * g.offset_groups + of.quotient;
  }
  // The samples of a map have numbers from first_of_map to before last_of_map.
  DCN_HOST_DEVICE int64_t first_of_map(int64_t map) const {
    const Quotient<I> of = by_offset_groups(static_cast<I>(map));
    const int64_t pixel = of.quotient * g.out_pixels() - first_pixel();
    return of.remainder * rows() + (pixel > 0 ? pixel : 0) * g.taps();
  }
  DCN_HOST_DEVICE int64_t last_of_map(int64_t map) const {
    const Quotient<I> of = by_offset_groups(static_cast<I>(map));
    const int64_t pixel = (of.quotient + 1) * g.out_pixels() - first_pixel();
    return of.remainder * rows() + (pixel < range.count ? pixel : range.count) * g.taps();
  }
  DCN_HOST_DEVICE Sample<A, I> sample(int64_t i) const {
    const Quotient<I> of = by_rows(static_cast<I>(i));
    return sample(row(of.remainder), of.quotient);
  }
  DCN_HOST_DEVICE A modulation(int64_t i) const {
    const Quotient<I> of = by_rows(static_cast<I>(i));
    return modulation(row(of.remainder), of.quotient);
  }

  // The same for those who have the parts of a sample's number at hand.
  DCN_HOST_DEVICE ConvRow<I> row(I number) const {
    const Quotient<I> at = by_taps(number);
    const Quotient<I> pixel = by_out_pixels(at.quotient + static_cast<I>(first_pixel()));
    const Quotient<I> place = by_out_width(pixel.remainder);
    return {pixel.quotient, place.quotient, place.remainder, at.remainder};
  }
  DCN_HOST_DEVICE Sample<A, I> sample(const ConvRow<I>& r, I offset_group) const {
    const Quotient<I> tap = by_kernel_w(r.tap);
    const I at = place_in(moved.offset, r.image, 2 * plane(r, offset_group), r.y, r.x);
    return g.sample<A, I>(static_cast<I>(g.start_y(r.y)), static_cast<I>(g.start_x(r.x)), tap.quotient, tap.remainder,
                          static_cast<A>(moved.offset.data[at]),
                          static_cast<A>(moved.offset.data[at + static_cast<I>(moved.offset.c)]));
  }
  DCN_HOST_DEVICE A modulation(const ConvRow<I>& r, I offset_group) const {
    if (!moved.mask.data) return A(1);
    return static_cast<A>(moved.mask.data[place_in(moved.mask, r.image, plane(r, offset_group), r.y, r.x)]);
  }
  // Where the range begins in its first image.
  DCN_HOST_DEVICE int64_t first_pixel() const { return range.first - images.first * g.out_pixels(); }
  // Offset group and tap in one.
  DCN_HOST_DEVICE I plane(const ConvRow<I>& r, I offset_group) const {
    return offset_group * static_cast<I>(g.taps()) + r.tap;
  }
};

static_assert(IsMapPositions<RowPositions<float, float, int32_t>>::value, "see positions.h");

}  // namespace dcn
