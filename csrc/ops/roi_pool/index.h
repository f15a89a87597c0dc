// Which bins read a pixel: the pixels that each bin and region may read, and the gradient of the input gathered through
// them, always in the same order. A list of samples by pixel, as the convolution has (core/input_index.h), would be as
// long as the regions are large; a few numbers for each bin are enough, since its samples lie on a grid.
#pragma once

#include "../../core/roi_positions.h"
#include "../../core/view.h"

namespace dcn {

// The pixels that samples may read: rows, counted through all images, and columns.
struct Extent {
  Span rows, columns;

  DCN_HOST_DEVICE bool empty() const { return rows.first >= rows.last || columns.first >= columns.last; }
  DCN_HOST_DEVICE bool meets(int64_t row, const Span& pixels) const {
    return row >= rows.first && row < rows.last && pixels.first < columns.last && pixels.last > columns.first;
  }
};

// The extent of each bin, [R, classes, bins]; empty in an invalid region.
template <typename A>
struct FindBinExtents {
  Regions<A> regions;
  Extent* bins;

  DCN_HOST_DEVICE int64_t size() const { return regions.g.rois * regions.g.classes * regions.g.bins(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const RoiGeometry& g = regions.g;
    const int64_t index = i % g.bins(), c = i / g.bins() % g.classes, r = i / g.bins() / g.classes;
    const RoiBin<A> bin = regions.bin(regions.frame(r), r, c, index / g.out_width, index % g.out_width);
    if (bin.image < 0) {
      bins[i] = {{0, 0}, {0, 0}};
      return;
    }
    const Span rows = bin.y.span(g.height);
    const int64_t top = bin.image * g.height;
    bins[i] = {{top + rows.first, top + rows.last}, bin.x.span(g.width)};
  }
};

// The extent of each region: what encloses those of its bins.
struct FindRegionExtents {
  int64_t rois, bins_of_region;
  const Extent* bins;
  Extent* regions;

  DCN_HOST_DEVICE int64_t size() const { return rois; }
  DCN_HOST_DEVICE void operator()(int64_t r) const {
    Extent all{{0, 0}, {0, 0}};
    for (int64_t i = r * bins_of_region; i < (r + 1) * bins_of_region; ++i) {
      if (bins[i].empty()) continue;
      all = all.empty() ? bins[i] : Extent{enclosing(all.rows, bins[i].rows), enclosing(all.columns, bins[i].columns)};
    }
    regions[r] = all;
  }

 private:
  DCN_HOST_DEVICE static Span enclosing(const Span& a, const Span& b) {
    return {a.first < b.first ? a.first : b.first, a.last > b.last ? a.last : b.last};
  }
};

// The same sums as ScatterBins (bodies.h), without atomic additions. One element: a strip of `columns` pixels in a row
// of a channel, which takes from every bin that reads them. The channel changes fastest: neighbouring threads then meet
// the same bins.
template <typename A, typename S>
struct GatherBins {
  Regions<A> regions;
  View<const S> grad_output;
  View<A> grad_input;
  const Extent *region_extents, *bin_extents;

  // Narrower strips would occupy more threads, but each strip passes over all regions.
  static constexpr int64_t columns = 16;

  DCN_HOST_DEVICE int64_t strips() const { return (regions.g.width + columns - 1) / columns; }
  DCN_HOST_DEVICE int64_t size() const { return regions.g.batch * regions.g.height * strips() * regions.g.channels; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const RoiGeometry& g = regions.g;
    const int64_t channel = i % g.channels, strip = i / g.channels % strips(), row = i / g.channels / strips();
    const Span pixels{strip * columns, (strip + 1) * columns};
    const int64_t cells = g.groups * g.groups, d = channel / cells, c = d / g.class_outputs();
    const int64_t group_y = channel % cells / g.groups, group_x = channel % g.groups;
    // The bins that read this channel.
    const Span across{g.first_bin_of_group(group_x, 1), g.first_bin_of_group(group_x + 1, 1)};
    const Span down{g.first_bin_of_group(group_y, 0), g.first_bin_of_group(group_y + 1, 0)};
    for (int64_t r = 0; r < g.rois; ++r) {
      if (!region_extents[r].meets(row, pixels)) continue;
      const RoiFrame<A> frame = regions.frame(r);
      const Extent* const of_class = bin_extents + (r * g.classes + c) * g.bins();
      for (int64_t y = down.first; y < down.last; ++y)
        for (int64_t x = across.first; x < across.last; ++x)
          if (of_class[y * g.out_width + x].meets(row, pixels))
            add(regions.bin(frame, r, c, y, x), channel, row % g.height, pixels,
                static_cast<A>(grad_output.at(r, d, y, x)));
    }
  }

 private:
  DCN_HOST_DEVICE void add(RoiBin<A> bin, int64_t channel, int64_t row, const Span& pixels, A grad) const {
    grad *= bin.mask;
    bin.y = bin.y.reading({row, row + 1});
    bin.x = bin.x.reading(pixels);
    for_each_sample(bin, [&](const Sample<A>& s, bool, bool) {
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t column = s.column(corner);
        const A w = s.weight(corner);
        if (s.has(corner) && w != 0 && s.row(corner) == row && column >= pixels.first && column < pixels.last)
          grad_input.at(bin.image, channel, row, column) += w * (grad * bin.inverse_count);
      }
    });
  }
};

}  // namespace dcn
