// The positions of regions: the samples of their bins, moved by the offsets. Symbols as in docs/operators.md.
#pragma once

#include "positions.h"
#include "roi_geometry.h"

namespace dcn {

// The samples in one row of a bin, where that row is on the map: positions (positions.h).
template <typename A, typename I = int64_t>
struct BinRow {
  A y;                     // where all of them lie
  bool y_varies;           // whether their values change with y
  const BinAxis<A, I>& x;  // of the bin; a copy in every row would cost more than its samples
  A mask;
  I height, width;  // of the map

  DCN_HOST_DEVICE int64_t size() const { return x.end - x.begin; }
  // A sample that is not on the map has no corners.
  DCN_HOST_DEVICE Sample<A, I> sample(I i) const {
    if (x.whole) return {static_cast<I>(y), x.begin + i, 0, 0, 1u, 1};
    return make_sample<A, I>(y, is_on_map(i) ? x.clamp(position(i)) : A(-1), height, width);
  }
  DCN_HOST_DEVICE A modulation(I) const { return mask; }
  DCN_HOST_DEVICE bool is_on_map(I i) const { return x.is_on_map(position(i)); }
  DCN_HOST_DEVICE bool x_varies(I i) const { return x.varies(position(i)); }

 private:
  DCN_HOST_DEVICE A position(I i) const { return x.at(x.begin + i); }
};

static_assert(IsPositions<BinRow<float>>::value, "see positions.h");

// One bin of a region.
template <typename A, typename I = int64_t>
struct RoiBin {
  I image, cell;  // image < 0: the region is invalid; cell: which channels of a group the bin reads
  BinAxis<A, I> y, x;
  A mask;
  A inverse_count;   // 1 / number of samples, so that a sum of theirs becomes the mean
  A size_y, size_x;  // derivative of a sample's position by the offset
  I height, width;   // of the map

  // The samples at y.at(i), which has to be on the map.
  DCN_HOST_DEVICE BinRow<A, I> row(I i) const {
    const A p = y.at(i);
    return {y.clamp(p), y.varies(p), x, mask, height, width};
  }
};

// 1 / number of a bin's samples, or 0 where there are none.
template <typename A>
DCN_HOST_DEVICE A inverse_sample_count(A along_y, A along_x) {
  const A count = along_y * along_x;
  return count > 0 ? 1 / count : A(0);
}

// Calls f(sample, y varies, x varies) for each sample of a bin that is on the map: whether its value changes with y, x.
template <typename A, typename I, typename F>
DCN_HOST_DEVICE void for_each_sample(const RoiBin<A, I>& bin, const F& f) {
  for (I i = bin.y.begin; i < bin.y.end; ++i) {
    if (!bin.y.is_on_map(bin.y.at(i))) continue;
    const BinRow<A, I> row = bin.row(i);
    for (I j = 0; j < row.size(); ++j)
      if (row.is_on_map(j)) f(row.sample(j), row.y_varies, row.x_varies(j));
  }
}

// The same for a bin of whole pixels: calls f(y, x) for each.
template <typename A, typename I, typename F>
DCN_HOST_DEVICE void for_each_pixel(const RoiBin<A, I>& bin, const F& f) {
  for (I y = bin.y.begin; y < bin.y.end; ++y)
    for (I x = bin.x.begin; x < bin.x.end; ++x) f(y, x);
}

// The regions of a call with their offsets and masks, densely stored in the accumulator type.
template <typename A>
struct Regions {
  RoiGeometry g;
  const A *rois, *offset, *mask;  // [R, 5], [R, 2 classes, parts], [R, classes, parts]; the last two may be null
  RoiScales<A> scales;

  Regions(const RoiGeometry& geometry, const A* all, const A* offsets, const A* masks)
      : g(geometry),
        rois(all),
        offset(offsets),
        mask(masks),
        scales{static_cast<A>(geometry.spatial_scale), static_cast<A>(geometry.offset_scale)} {}

  template <typename I = int64_t>
  DCN_HOST_DEVICE RoiFrame<A, I> frame(I r) const {
    return g.frame<I>(rois + 5 * r, scales);
  }
  // Of the bins of a part, for class c: their offset along an axis (0 without offsets), their factor (1 without masks).
  template <typename I>
  DCN_HOST_DEVICE A displacement(I r, I c, I part, int axis) const {
    return offset ? offset[((r * static_cast<I>(g.classes) + c) * 2 + axis) * static_cast<I>(g.parts()) + part] : A(0);
  }
  template <typename I>
  DCN_HOST_DEVICE A modulation(I r, I c, I part) const {
    return mask ? mask[(r * static_cast<I>(g.classes) + c) * static_cast<I>(g.parts()) + part] : A(1);
  }
  // Derivative of a sample's position by the offset.
  template <typename I>
  DCN_HOST_DEVICE A size(const RoiFrame<A, I>& f, int axis) const {
    return scales.offset * f.size[axis];
  }
  template <typename I>
  DCN_HOST_DEVICE RoiBin<A, I> bin(const RoiFrame<A, I>& f, I r, I c, I bin_y, I bin_x) const {
    const A reach_y = size(f, 0), reach_x = size(f, 1);
    RoiBin<A, I> b{f.image,
                   static_cast<I>(g.cell_of(bin_y, bin_x)),
                   {},
                   {},
                   A(1),
                   0,
                   reach_y,
                   reach_x,
                   static_cast<I>(g.height),
                   static_cast<I>(g.width)};
    if (f.image < 0) return b;
    const I part = static_cast<I>(g.part_index(bin_y, bin_x));
    b.y = g.axis(f, bin_y, displacement(r, c, part, 0), reach_y, 0);
    b.x = g.axis(f, bin_x, displacement(r, c, part, 1), reach_x, 1);
    b.mask = modulation(r, c, part);
    b.inverse_count = inverse_sample_count(b.y.samples, b.x.samples);
    return b;
  }
};

}  // namespace dcn
