// Which bins read a pixel: what each bin may read, and the gradient of the input gathered pixel by pixel from the bins
// that read it.
#pragma once

#include "../../core/roi_geometry.h"
#include "../../core/view.h"

namespace dcn {

// Where samples may read: rows, counted through all images, and columns.
struct Extent {
  Span rows, columns;

  DCN_HOST_DEVICE bool empty() const { return rows.first >= rows.last || columns.first >= columns.last; }
  DCN_HOST_DEVICE bool meets(int64_t row, const Span& pixels) const {
    return row >= rows.first && row < rows.last && pixels.first < columns.last && pixels.last > columns.first;
  }
};

// That of each bin, [R, classes, bins].
template <typename A>
struct FindBinExtents {
  RoiPlaces<A> where;
  Extent* bins;

  DCN_HOST_DEVICE int64_t size() const { return where.g.rois * where.g.classes * where.g.bins(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const RoiGeometry& g = where.g;
    const int64_t index = i % g.bins(), c = i / g.bins() % g.classes, r = i / g.bins() / g.classes;
    const RoiBin<A> bin = where.bin(g.frame(where.rois + 5 * r), r, c, index / g.out_width, index % g.out_width);
    if (bin.image < 0) {
      bins[i] = {{0, 0}, {0, 0}};
      return;
    }
    const Span rows = bin.y.span(g.height);
    const int64_t top = bin.image * g.height;
    bins[i] = {{top + rows.first, top + rows.last}, bin.x.span(g.width)};
  }
};

// That of each region, around those of its bins.
struct FindRegionExtents {
  int64_t rois, bins_of_region;
  const Extent* bins;
  Extent* regions;

  DCN_HOST_DEVICE int64_t size() const { return rois; }
  DCN_HOST_DEVICE void operator()(int64_t r) const {
    Extent all{{0, 0}, {0, 0}};
    for (int64_t i = r * bins_of_region; i < (r + 1) * bins_of_region; ++i) {
      if (bins[i].empty()) continue;
      all = all.empty() ? bins[i] : Extent{around(all.rows, bins[i].rows), around(all.columns, bins[i].columns)};
    }
    regions[r] = all;
  }

 private:
  DCN_HOST_DEVICE static Span around(const Span& a, const Span& b) {
    return {a.first < b.first ? a.first : b.first, a.last > b.last ? a.last : b.last};
  }
};

// What ScatterBins adds, always added in the same order: an element owns some pixels in a row of a channel, and takes
// from all bins that read them. By channel: threads side by side then meet the same bins.
template <typename A, typename S>
struct GatherBins {
  RoiPlaces<A> where;
  View<const S> grad_output;
  View<A> grad_input;
  const Extent *regions, *bins;

  // Fewer would be work for more threads, each of which passes over as many regions and bins.
  static constexpr int64_t columns = 16;

  DCN_HOST_DEVICE int64_t strips() const { return (where.g.width + columns - 1) / columns; }
  DCN_HOST_DEVICE int64_t size() const { return where.g.batch * where.g.height * strips() * where.g.channels; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const RoiGeometry& g = where.g;
    const int64_t channel = i % g.channels, strip = i / g.channels % strips(), row = i / g.channels / strips();
    const Span pixels{strip * columns, (strip + 1) * columns};
    const int64_t cells = g.groups * g.groups, d = channel / cells, c = d / g.class_outputs();
    const int64_t group_y = channel % cells / g.groups, group_x = channel % g.groups;
    const Span across{g.first_bin_of_group(group_x, 1), g.first_bin_of_group(group_x + 1, 1)};
    const Span down{g.first_bin_of_group(group_y, 0), g.first_bin_of_group(group_y + 1, 0)};
    for (int64_t r = 0; r < g.rois; ++r) {
      if (!regions[r].meets(row, pixels)) continue;
      const RoiFrame<A> frame = g.frame(where.rois + 5 * r);
      const Extent* const of_class = bins + (r * g.classes + c) * g.bins();
      for (int64_t y = down.first; y < down.last; ++y)
        for (int64_t x = across.first; x < across.last; ++x)
          if (of_class[y * g.out_width + x].meets(row, pixels))
            add(where.bin(frame, r, c, y, x), channel, row % g.height, pixels,
                static_cast<A>(grad_output.at(r, d, y, x)) * where.modulation(r, c, y, x));
    }
  }

 private:
  DCN_HOST_DEVICE void add(RoiBin<A> bin, int64_t channel, int64_t row, const Span& pixels, A grad) const {
    bin.y = bin.y.reading({row, row + 1});
    bin.x = bin.x.reading(pixels);
    for_each_sample(where.g, bin, [&](const Sample<A>& s, bool, bool) {
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t column = s.column(corner);
        const A w = s.weight(corner);
        if (s.has(corner) && w != 0 && s.row(corner) == row && column >= pixels.first && column < pixels.last)
          grad_input.at(bin.image, channel, row, column) += w * (grad * bin.share);
      }
    });
  }
};

}  // namespace dcn
