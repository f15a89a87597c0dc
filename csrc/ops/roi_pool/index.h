// Which bins read a pixel: the pixels that each bin and region may read, and the gradient of the input gathered through
// them, always in the same order. A list of samples by pixel, as the convolution has (core/input_index.h), would be as
// long as the regions are large; a few numbers for each bin are enough, since its samples lie on a grid.
#pragma once

#include "../../core/division.h"
#include "../../core/roi_positions.h"
#include "../../core/view.h"

namespace dcn {

// The pixels that samples may read: rows, counted through all images, and columns. `I`, here and below, is the type of
// numbers of elements.
template <typename I>
struct Extent {
  SpanOf<I> rows, columns;

  DCN_HOST_DEVICE bool empty() const { return rows.first >= rows.last || columns.first >= columns.last; }
  DCN_HOST_DEVICE bool meets(I row, const SpanOf<I>& pixels) const {
    return row >= rows.first && row < rows.last && pixels.first < columns.last && pixels.last > columns.first;
  }
};

// The extent of each bin, [R, classes, bins]; empty in an invalid region.
template <typename A, typename I>
struct FindBinExtents {
  Regions<A> regions;
  Extent<I>* bins;

  DCN_HOST_DEVICE int64_t size() const { return regions.g.rois * regions.g.classes * regions.g.bins(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const RoiGeometry& g = regions.g;
    const I of_class = static_cast<I>(i) / static_cast<I>(g.bins()), width = static_cast<I>(g.out_width);
    const I index = static_cast<I>(i) - of_class * static_cast<I>(g.bins());
    const I r = of_class / static_cast<I>(g.classes), c = of_class % static_cast<I>(g.classes);
    const RoiBin<A, I> bin = regions.bin(regions.template frame<I>(r), r, c, index / width, index % width);
    if (bin.image < 0) {
      bins[i] = {{0, 0}, {0, 0}};
      return;
    }
    const SpanOf<I> rows = bin.y.span(bin.height);
    const I top = bin.image * bin.height;
    bins[i] = {{top + rows.first, top + rows.last}, bin.x.span(bin.width)};
  }
};

// The extent of each region: what encloses those of its bins.
template <typename I>
struct FindRegionExtents {
  int64_t rois, bins_of_region;
  const Extent<I>* bins;
  Extent<I>* regions;

  DCN_HOST_DEVICE int64_t size() const { return rois; }
  DCN_HOST_DEVICE void operator()(int64_t r) const {
    Extent<I> all{{0, 0}, {0, 0}};
    for (int64_t i = r * bins_of_region; i < (r + 1) * bins_of_region; ++i) {
      if (bins[i].empty()) continue;
      all =
          all.empty() ? bins[i] : Extent<I>{enclosing(all.rows, bins[i].rows), enclosing(all.columns, bins[i].columns)};
    }
    regions[r] = all;
  }

 private:
  DCN_HOST_DEVICE static SpanOf<I> enclosing(const SpanOf<I>& a, const SpanOf<I>& b) {
    return {a.first < b.first ? a.first : b.first, a.last > b.last ? a.last : b.last};
  }
};

// The same sums as ScatterBins (bodies.h), without atomic additions. One element: a strip of kColumns pixels in a row
// of a channel, which takes from every bin that reads them. The channel changes fastest: neighbouring threads then meet
// the same bins.
template <typename A, typename S, typename I>
struct GatherBins {
  // Narrower strips would occupy more threads, but each strip passes over all regions.
  static constexpr int kColumns = 16;

  Regions<A> regions;
  View<const S> grad_output;
  View<A> grad_input;
  const Extent<I>*region_extents, *bin_extents;
  Divisor<I> by_channels, by_strips, by_height;

  GatherBins(const Regions<A>& all, const View<const S>& grad, const View<A>& to, const Extent<I>* of_regions,
             const Extent<I>* of_bins)
      : regions(all),
        grad_output(grad),
        grad_input(to),
        region_extents(of_regions),
        bin_extents(of_bins),
        by_channels(all.g.channels),
        by_strips((all.g.width + kColumns - 1) / kColumns),
        by_height(all.g.height) {}

  DCN_HOST_DEVICE int64_t size() const {
    const RoiGeometry& g = regions.g;
    return g.batch * g.height * by_strips.divisor * g.channels;
  }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const RoiGeometry& g = regions.g;
    const Quotient<I> of_strip = by_channels(static_cast<I>(i)), of_row = by_strips(of_strip.quotient);
    const I channel = of_strip.remainder, strip = of_row.remainder, row = of_row.quotient;
    const SpanOf<I> pixels{strip * kColumns, (strip + 1) * kColumns};
    const I groups = static_cast<I>(g.groups), d = channel / static_cast<I>(g.cells());
    const I c = d / static_cast<I>(g.class_outputs()), cell = channel - d * static_cast<I>(g.cells());
    // The bins that read this channel.
    const SpanOf<I> down = bins_of(cell / groups, 0), across = bins_of(cell % groups, 1);
    const I rois = static_cast<I>(g.rois), classes = static_cast<I>(g.classes), width = static_cast<I>(g.out_width);
    for (I r = 0; r < rois; ++r) {
      if (!region_extents[r].meets(row, pixels)) continue;
      const RoiFrame<A, I> frame = regions.template frame<I>(r);
      const Extent<I>* const of_class = bin_extents + (r * classes + c) * static_cast<I>(g.bins());
      for (I y = down.first; y < down.last; ++y)
        for (I x = across.first; x < across.last; ++x)
          if (of_class[y * width + x].meets(row, pixels))
            add(regions.bin(frame, r, c, y, x), channel, by_height(row).remainder, pixels,
                static_cast<A>(grad_output.data[place_in(grad_output, r, d, y, x)]));
    }
  }

 private:
  DCN_HOST_DEVICE SpanOf<I> bins_of(I group, int axis) const {
    return {static_cast<I>(regions.g.first_bin_of_group(group, axis)),
            static_cast<I>(regions.g.first_bin_of_group(group + 1, axis))};
  }
  DCN_HOST_DEVICE void add(RoiBin<A, I> bin, I channel, I row, const SpanOf<I>& pixels, A grad) const {
    grad *= bin.mask;
    bin.y = bin.y.reading({row, row + 1});
    bin.x = bin.x.reading(pixels);
    A* const to = grad_input.data + place_in(grad_input, bin.image, channel, row, I(0));
    for_each_sample(bin, [&](const Sample<A, I>& s, bool, bool) {
      for (int corner = 0; corner < 4; ++corner) {
        const I column = s.column(corner);
        const A w = s.weight(corner);
        if (s.has(corner) && w != 0 && s.row(corner) == row && column >= pixels.first && column < pixels.last)
          to[column * static_cast<I>(grad_input.w)] += w * (grad * bin.inverse_count);
      }
    });
  }
};

}  // namespace dcn
