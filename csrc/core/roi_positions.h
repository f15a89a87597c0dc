// The positions of regions: the samples of their bins, moved by the offsets. Symbols as in docs/operators.md.
#pragma once

#include "positions.h"
#include "roi_geometry.h"

namespace dcn {

// The samples in one row of a bin, where that row is on the map: positions (positions.h).
template <typename A>
struct BinRow {
  A y;                  // where all of them lie
  bool y_varies;        // whether their values change with y
  const BinAxis<A>& x;  // of the bin; a copy in every row would cost more than its samples
  A mask;
  int64_t height, width;  // of the map

  DCN_HOST_DEVICE int64_t size() const { return x.end - x.begin; }
  // A sample that is not on the map has no corners.
  DCN_HOST_DEVICE Sample<A> sample(int64_t i) const {
    return make_sample<A>(y, is_on_map(i) ? x.clamp(position(i)) : A(-1), height, width);
  }
  DCN_HOST_DEVICE A modulation(int64_t) const { return mask; }
  DCN_HOST_DEVICE bool is_on_map(int64_t i) const { return x.is_on_map(position(i)); }
  DCN_HOST_DEVICE bool x_varies(int64_t i) const { return x.varies(position(i)); }

 private:
  DCN_HOST_DEVICE A position(int64_t i) const { return x.at(x.begin + i); }
};

static_assert(IsPositions<BinRow<float>>::value, "see positions.h");

// One bin of a region.
template <typename A>
struct RoiBin {
  int64_t image, cell;  // image < 0: the region is invalid; cell: which channels of a group the bin reads
  BinAxis<A> y, x;
  A mask;
  A inverse_count;        // 1 / number of samples, so that a sum of theirs becomes the mean
  A size_y, size_x;       // derivative of a sample's position by the offset
  int64_t height, width;  // of the map

  // The samples at y.at(i), which has to be on the map.
  DCN_HOST_DEVICE BinRow<A> row(int64_t i) const {
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
template <typename A, typename F>
DCN_HOST_DEVICE void for_each_sample(const RoiBin<A>& bin, const F& f) {
  for (int64_t i = bin.y.begin; i < bin.y.end; ++i) {
    if (!bin.y.is_on_map(bin.y.at(i))) continue;
    const BinRow<A> row = bin.row(i);
    for (int64_t j = 0; j < row.size(); ++j)
      if (row.is_on_map(j)) f(row.sample(j), row.y_varies, row.x_varies(j));
  }
}

// The regions of a call with their offsets and masks, densely stored in the accumulator type.
template <typename A>
struct Regions {
  RoiGeometry g;
  const A *rois, *offset, *mask;  // [R, 5], [R, 2 classes, parts], [R, classes, parts]; the last two may be null

  DCN_HOST_DEVICE RoiFrame<A> frame(int64_t r) const { return g.frame(rois + 5 * r); }
  // Of the bins of a part, for class c: their offset along an axis (0 without offsets), their factor (1 without masks).
  DCN_HOST_DEVICE A displacement(int64_t r, int64_t c, int64_t part, int axis) const {
    return offset ? offset[((r * g.classes + c) * 2 + axis) * g.parts() + part] : A(0);
  }
  DCN_HOST_DEVICE A modulation(int64_t r, int64_t c, int64_t part) const {
    return mask ? mask[(r * g.classes + c) * g.parts() + part] : A(1);
  }
  // Derivative of a sample's position by the offset.
  DCN_HOST_DEVICE A size(const RoiFrame<A>& f, int axis) const { return static_cast<A>(g.offset_scale) * f.size[axis]; }
  DCN_HOST_DEVICE RoiBin<A> bin(const RoiFrame<A>& f, int64_t r, int64_t c, int64_t bin_y, int64_t bin_x) const {
    RoiBin<A> b{f.image, g.cell_of(bin_y, bin_x), {}, {}, A(1), 0, size(f, 0), size(f, 1), g.height, g.width};
    if (f.image < 0) return b;
    const int64_t part = g.part_index(bin_y, bin_x);
    b.y = g.axis(f, bin_y, displacement(r, c, part, 0), 0);
    b.x = g.axis(f, bin_x, displacement(r, c, part, 1), 1);
    b.mask = modulation(r, c, part);
    b.inverse_count = inverse_sample_count(b.y.samples, b.x.samples);
    return b;
  }
};

}  // namespace dcn
