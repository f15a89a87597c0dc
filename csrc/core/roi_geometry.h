// Regions of interest: where the samples of each bin lie, for the three ways of pooling. Symbols as in
// docs/operators.md; `A` is the accumulator type, float or double.
#pragma once

#include "sampling.h"

namespace dcn {

enum class RoiRule {
  kAlign,   // RoIAlign's: samples at the centres of a grid's cells, mean over all of them
  kPart,    // deformable PS pooling's: rounded regions, samples at the cells' starts, mean over those on the map
  kPixels,  // R-FCN's: rounded regions, mean over every whole pixel that the bin touches
};

// a * b, rounded before anything is added to it. Edges and samples often lie exactly on a border, and on which side of
// it must not depend on whether a compiler fuses the product with an addition.
template <typename A>
DCN_HOST_DEVICE A rounded_product(A a, A b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(A) == 4)
    return __fmul_rn(a, b);
  else
    return __dmul_rn(a, b);
#elif defined(__GNUC__) && defined(__x86_64__)
  A product = a * b;
  __asm__("" : "+x"(product));
  return product;
#elif defined(__GNUC__) && defined(__aarch64__)
  A product = a * b;
  __asm__("" : "+w"(product));
  return product;
#else
  const volatile A product = a * b;
  return product;
#endif
}

// A region in pixels of the map; [0] is y, [1] is x. With kAlign a region that is inside out may have a negative size,
// and so negative bins and steps; the other rules have a minimum size. `I`, here and below, is the type of rows,
// columns and numbers of samples.
template <typename A, typename I = int64_t>
struct RoiFrame {
  I image;  // < 0: the region is invalid, since it names no image of the batch or is not finite on the map
  A start[2], size[2];
  A bin[2], samples[2], step[2];  // size of a bin, how many samples it has, how far they lie apart
};

// Of spatial_scale and offset_scale, in the type that regions are computed in.
template <typename A>
struct RoiScales {
  A spatial, offset;
};

// Pixels [first, last).
template <typename I>
struct SpanOf {
  I first, last;
};
using Span = SpanOf<int64_t>;

// The samples of one bin along one axis.
template <typename A, typename I = int64_t>
struct BinAxis {
  A first, step, phase;  // sample i lies at first + (skipped + i + phase) * step; step < 0: in a region inside out
  A skipped;             // whole: samples that do not count as such, since they are known not to be on the map
  I begin, end;          // samples [begin, end) are visited; no other is on the map
  A low, high, last;     // a sample within [low, high] is on the map, whose last pixel has its centre at `last`
  A samples;             // how many samples the mean is over
  bool whole = false;    // sample i is pixel i

  DCN_HOST_DEVICE A at(I i) const { return first + distance(i); }
  DCN_HOST_DEVICE A distance(I i) const { return rounded_product((skipped + static_cast<A>(i)) + phase, step); }
  DCN_HOST_DEVICE bool descends() const { return step < 0; }
  // Number i of the samples [from, to) in the order of ascending positions.
  DCN_HOST_DEVICE I ascending(I i, I from, I to) const { return descends() ? to - 1 - i : from + i; }
  // Whether a sample at p is on the map. NaN counts as such, so that a diverged offset shows in the result.
  DCN_HOST_DEVICE bool is_on_map(A p) const { return !((p < low) | (p > high)); }
  // Where it reads: beyond the centres of the outer pixels the map goes on with their values.
  DCN_HOST_DEVICE A clamp(A p) const { return p < 0 ? A(0) : (p > last ? last : p); }
  // Whether its value changes with p: not so where the map goes on.
  DCN_HOST_DEVICE bool varies(A p) const { return !((p < 0) | (p >= last)); }

  // The pixels, of n along this axis, that the samples may read; NaN positions read none.
  DCN_HOST_DEVICE SpanOf<I> span(I n) const {
    if (begin >= end) return {0, 0};
    const A from = at(ascending(0, begin, end)), to = at(ascending(end - begin - 1, begin, end));
    if (!(from <= high && to >= low)) return {0, 0};
    const I beyond = static_cast<I>(clamp(to)) + 2;
    return {static_cast<I>(clamp(from)), beyond < n ? beyond : n};
  }
  // The same axis with no samples but those that read these pixels. Not for NaN positions.
  DCN_HOST_DEVICE BinAxis reading(const SpanOf<I>& pixels) const {
    BinAxis axis = *this;
    const I low_edge = edge(pixels.first - 1), high_edge = edge(pixels.last);
    axis.begin = descends() ? high_edge : low_edge;
    axis.end = descends() ? low_edge : high_edge;
    return axis;
  }

 private:
  // The first sample beyond the lower edge of `pixel`, in the direction of the samples, by bisection.
  DCN_HOST_DEVICE I edge(I pixel) const {
    I from = begin, to = end;
    while (from < to) {
      const I middle = from + (to - from) / 2;
      if ((static_cast<I>(clamp(at(middle))) < pixel) != descends())
        from = middle + 1;
      else
        to = middle;
    }
    return from;
  }
};

struct RoiGeometry {
  RoiRule rule;
  int64_t batch, channels, height, width;    // N C H W
  int64_t rois, outputs, groups;             // R, D, groups of channels along each axis
  int64_t out_height, out_width;             // bins
  int64_t part_height, part_width, classes;  // of offset and mask
  int64_t grid;                              // samples of a bin along each axis; 0: one per pixel of its size
  double spatial_scale, offset_scale;
  bool aligned;  // kAlign: shifted by half a pixel, and without a minimum size

  DCN_HOST_DEVICE int64_t bins() const { return out_height * out_width; }
  DCN_HOST_DEVICE int64_t parts() const { return part_height * part_width; }
  DCN_HOST_DEVICE int64_t class_outputs() const { return outputs / classes; }
  DCN_HOST_DEVICE int64_t extent(int axis) const { return axis == 0 ? height : width; }
  DCN_HOST_DEVICE int64_t bins_along(int axis) const { return axis == 0 ? out_height : out_width; }
  DCN_HOST_DEVICE int64_t parts_along(int axis) const { return axis == 0 ? part_height : part_width; }
  // Which part or group a bin lies in; first_bin and first_bin_of_group say where the bins of one begin.
  DCN_HOST_DEVICE int64_t part_of(int64_t bin, int axis) const { return share_of(bin, parts_along(axis), axis); }
  DCN_HOST_DEVICE int64_t group_of(int64_t bin, int axis) const { return share_of(bin, groups, axis); }
  DCN_HOST_DEVICE int64_t cell_of(int64_t bin_y, int64_t bin_x) const {
    return group_of(bin_y, 0) * groups + group_of(bin_x, 1);
  }
  DCN_HOST_DEVICE int64_t part_index(int64_t bin_y, int64_t bin_x) const {
    return part_of(bin_y, 0) * part_width + part_of(bin_x, 1);
  }
  DCN_HOST_DEVICE int64_t first_bin(int64_t part, int axis) const { return first_bin(part, parts_along(axis), axis); }
  // Whether any bin lies in a part: there may be more parts than bins.
  DCN_HOST_DEVICE bool has_bins(int64_t part, int axis) const {
    return first_bin(part, axis) < first_bin(part + 1, axis);
  }
  DCN_HOST_DEVICE int64_t first_bin_of_group(int64_t group, int axis) const { return first_bin(group, groups, axis); }
  // The channel that output d reads in a bin of group cell (g_y * groups + g_x).
  DCN_HOST_DEVICE int64_t cells() const { return groups * groups; }
  DCN_HOST_DEVICE int64_t channel(int64_t d, int64_t cell) const { return d * cells() + cell; }

  // `roi`: batch index, x1, y1, x2, y2.
  template <typename I = int64_t, typename A>
  DCN_HOST_DEVICE RoiFrame<A, I> frame(const A* roi, const RoiScales<A>& scales) const {
    RoiFrame<A, I> f{-1, {0, 0}, {0, 0}, {0, 0}, {0, 0}, {0, 0}};
    const A lower[2] = {roi[2], roi[1]}, upper[2] = {roi[4], roi[3]};
    bool valid = roi[0] >= 0 && roi[0] <= static_cast<A>(static_cast<I>(batch));
    for (int axis = 0; axis < 2; ++axis)  // infinity - infinity is not 0
      valid = valid && upper[axis] - upper[axis] == 0 && lower[axis] - lower[axis] == 0;
    if (!valid) return f;
    const I image = static_cast<I>(roi[0]);
    if (image >= static_cast<I>(batch) || static_cast<A>(image) != roi[0]) return f;
    f.image = image;
    const A scale = scales.spatial;
    for (int axis = 0; axis < 2; ++axis) {
      if (rule == RoiRule::kAlign) {
        const A half = aligned ? A(0.5) : A(0);
        f.start[axis] = rounded_product(lower[axis], scale) - half;
        f.size[axis] = (rounded_product(upper[axis], scale) - half) - f.start[axis];
        if (!aligned && f.size[axis] < 1) f.size[axis] = 1;
      } else {
        const A half = rule == RoiRule::kPart ? A(0.5) : A(0);
        f.start[axis] = rounded_product(std::round(lower[axis]), scale) - half;
        f.size[axis] = (rounded_product(std::round(upper[axis]) + 1, scale) - half) - f.start[axis];
        if (f.size[axis] < A(0.1)) f.size[axis] = A(0.1);
      }
      f.bin[axis] = f.size[axis] / static_cast<A>(static_cast<I>(bins_along(axis)));
      // Without a grid the number of samples follows the size, and is 0 where that is not positive.
      f.samples[axis] =
          grid > 0 ? static_cast<A>(static_cast<I>(grid)) : (f.bin[axis] > 0 ? std::ceil(f.bin[axis]) : A(0));
      f.step[axis] = f.bin[axis] / f.samples[axis];
      // Finite corners may be scaled to infinity.
      if (!(f.start[axis] - f.start[axis] == 0 && f.size[axis] - f.size[axis] == 0)) f.image = -1;
    }
    return f;
  }

  // Where the samples of bin `bin` start once it has moved by `offset`, in units of `reach`, offset_scale * size.
  template <typename A, typename I>
  DCN_HOST_DEVICE A start(const RoiFrame<A, I>& f, I bin, A offset, A reach, int which) const {
    return f.start[which] + rounded_product(static_cast<A>(bin), f.bin[which]) + rounded_product(reach, offset);
  }

  // An axis as all bins of a region share it, with kAlign and kPart: all but where it starts.
  template <typename A, typename I>
  DCN_HOST_DEVICE BinAxis<A, I> shared_axis(const RoiFrame<A, I>& f, int which) const {
    const A n = static_cast<A>(static_cast<I>(extent(which)));
    const I samples = static_cast<I>(grid);
    if (rule == RoiRule::kPart) return {0, f.step[which], 0, 0, 0, samples, A(-0.5), n - A(0.5), n - 1, 0, false};
    return {0, f.step[which], A(0.5), 0, 0, samples, -1, n, n - 1, f.samples[which], false};
  }

  // One axis of bin `bin`.
  template <typename A, typename I>
  DCN_HOST_DEVICE BinAxis<A, I> axis(const RoiFrame<A, I>& f, I bin, A offset, A reach, int which) const {
    if (rule == RoiRule::kPixels) return pixels(f, bin, which);
    BinAxis<A, I> axis = shared_axis(f, which);
    axis.first = start(f, bin, offset, reach, which);
    if (rule == RoiRule::kPart) {
      for (I i = 0; i < axis.end; ++i) axis.samples += axis.is_on_map(axis.at(i)) ? A(1) : A(0);
      return axis;
    }
    if (grid > 0 || !(axis.samples > 0)) return axis;
    // A region may be far larger than the map: only some of its samples can lie on it, and no more than two a pixel.
    const int64_t from = index((axis.low - axis.first) / axis.step - 2, axis.samples);
    const int64_t count = index((axis.high - axis.first) / axis.step + 2, axis.samples) - from;
    const int64_t most = 2 * extent(which) + 8;
    axis.skipped = static_cast<A>(from);
    axis.end = static_cast<I>(count < 0 ? 0 : (count < most ? count : most));
    if (axis.first != axis.first) axis.skipped = 0, axis.end = 1;  // all samples of a NaN position are alike
    return axis;
  }

 private:
  DCN_HOST_DEVICE int64_t first_bin(int64_t part, int64_t parts, int axis) const {
    if (parts == 1 || parts == bins_along(axis)) return parts == 1 ? part * bins_along(axis) : part;
    return (part * bins_along(axis) + parts - 1) / parts;
  }
  // A bin's number among `shares` of all bins along an axis. Most calls have one, or as many as bins.
  DCN_HOST_DEVICE int64_t share_of(int64_t bin, int64_t shares, int axis) const {
    if (shares == 1) return 0;
    return shares == bins_along(axis) ? bin : bin * shares / bins_along(axis);
  }
  template <typename A, typename I>
  DCN_HOST_DEVICE BinAxis<A, I> pixels(const RoiFrame<A, I>& f, I bin, int which) const {
    // Divided last, which nothing fuses with: whole edges stay whole, the end of the last bin is the region's.
    const A size = f.size[which], n = static_cast<A>(static_cast<I>(extent(which)));
    const A bins = static_cast<A>(static_cast<I>(bins_along(which)));
    const A low = std::floor(f.start[which] + rounded_product(static_cast<A>(bin), size) / bins);
    const A high = std::ceil(f.start[which] + rounded_product(static_cast<A>(bin + 1), size) / bins);
    BinAxis<A, I> axis{0, 1, 0, 0, 0, 0, 0, n - 1, n - 1, 0, true};
    axis.begin = static_cast<I>(low < 0 ? A(0) : (low > n ? n : low));
    axis.end = static_cast<I>(high < 0 ? A(0) : (high > n ? n : high));
    axis.samples = axis.end > axis.begin ? static_cast<A>(axis.end - axis.begin) : A(0);
    return axis;
  }
  // `value` as an index from 0 to `end`. Compared before it is converted: it may be huge or NaN.
  template <typename A>
  DCN_HOST_DEVICE static int64_t index(A value, A end) {
    const A below = value < end ? value : end;
    return below > 0 ? (below < A(1e15) ? static_cast<int64_t>(below) : int64_t(1000000000000000)) : 0;
  }
};

}  // namespace dcn
