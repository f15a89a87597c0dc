// Regions of interest: where the samples of one bin lie, for the three ways of pooling. Symbols as in
// docs/operators.md.
#pragma once

#include "sampling.h"

namespace dcn {

enum class RoiRule {
  kAlign,   // RoIAlign's grid: samples at the centres of a bin's parts, average over all of them
  kPart,    // deformable PS pooling's: rounded regions, samples at the starts, average over those on the map
  kPixels,  // R-FCN's: rounded regions, every whole pixel that the bin touches
};

// a * b, rounded, whatever it is then added to. Edges and samples often lie exactly on a border: on which side must not
// hang on where a compiler fuses a product with the addition that follows.
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

// A region on the map; [0] is y, [1] is x. image < 0: one that names no image or is not finite on the map. With kAlign
// one that is inside out may have a negative size, and so bins and steps; the other rules have a least size.
template <typename A>
struct RoiFrame {
  int64_t image;
  A start[2], size[2];
  A bin[2], samples[2], step[2];  // size of a bin, how many samples it has, how far they lie apart
};

// Pixels [first, last).
struct Span {
  int64_t first, last;
};

// The samples of one bin along one axis.
template <typename A>
struct BinAxis {
  A first, step, phase;  // sample i lies at first + (i + phase) * step; step < 0 in a region that is inside out
  int64_t begin, end;    // the others are not on the map
  A low, high, last;     // within [low, high] a sample is on the map; the centre of the last pixel
  A samples;             // what the average is over

  DCN_HOST_DEVICE A at(int64_t i) const { return first + distance(i); }
  DCN_HOST_DEVICE A distance(int64_t i) const { return rounded_product(static_cast<A>(i) + phase, step); }
  DCN_HOST_DEVICE bool falls() const { return step < 0; }
  // Number i of the samples [from, to), counted so that positions never fall.
  DCN_HOST_DEVICE int64_t rising(int64_t i, int64_t from, int64_t to) const { return falls() ? to - 1 - i : from + i; }
  // Of a sample at p: where it is moved on the map; whether it is on it, or NaN: a diverged offset shows; whether its
  // value changes with p: not so beyond the centres of the outer pixels.
  DCN_HOST_DEVICE A on_map(A p) const { return p < 0 ? A(0) : (p > last ? last : p); }
  DCN_HOST_DEVICE bool reads(A p) const { return !((p < low) | (p > high)); }
  DCN_HOST_DEVICE bool moves(A p) const { return !((p < 0) | (p >= last)); }

  // What the samples may read of an axis of n pixels; a NaN position reads none.
  DCN_HOST_DEVICE Span span(int64_t n) const {
    if (begin >= end) return {0, 0};
    const A from = at(rising(0, begin, end)), to = at(rising(end - begin - 1, begin, end));
    if (!(from <= high && to >= low)) return {0, 0};
    const int64_t beyond = static_cast<int64_t>(on_map(to)) + 2;
    return {static_cast<int64_t>(on_map(from)), beyond < n ? beyond : n};
  }
  // The same axis with the samples that read these pixels alone; the others do not. Not for NaN positions.
  DCN_HOST_DEVICE BinAxis reading(const Span& pixels) const {
    BinAxis axis = *this;
    const int64_t low_edge = edge(pixels.first - 1), high_edge = edge(pixels.last);
    axis.begin = falls() ? high_edge : low_edge;
    axis.end = falls() ? low_edge : high_edge;
    return axis;
  }

 private:
  // The first sample that has passed the edge before `pixel`, whichever way the samples go; they never turn back.
  DCN_HOST_DEVICE int64_t edge(int64_t pixel) const {
    int64_t from = begin, to = end;
    while (from < to) {
      const int64_t middle = from + (to - from) / 2;
      if ((static_cast<int64_t>(on_map(at(middle))) < pixel) != falls())
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
  int64_t grid;                              // samples of a bin along each axis; 0: as the bin is large
  double spatial_scale, offset_scale;
  bool aligned;  // kAlign: half a pixel to the left, and no least size

  DCN_HOST_DEVICE int64_t bins() const { return out_height * out_width; }
  DCN_HOST_DEVICE int64_t parts() const { return part_height * part_width; }
  DCN_HOST_DEVICE int64_t class_outputs() const { return outputs / classes; }
  DCN_HOST_DEVICE int64_t extent(int axis) const { return axis == 0 ? height : width; }
  DCN_HOST_DEVICE int64_t bins_along(int axis) const { return axis == 0 ? out_height : out_width; }
  DCN_HOST_DEVICE int64_t parts_along(int axis) const { return axis == 0 ? part_height : part_width; }
  // Which part, or group, a bin lies in; and the first bin that does not lie before a part, or group.
  DCN_HOST_DEVICE int64_t part_of(int64_t bin, int axis) const { return bin * parts_along(axis) / bins_along(axis); }
  DCN_HOST_DEVICE int64_t group_of(int64_t bin, int axis) const { return bin * groups / bins_along(axis); }
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
  DCN_HOST_DEVICE int64_t channel(int64_t d, int64_t cell) const { return d * groups * groups + cell; }

  // `roi`: batch index, x1, y1, x2, y2.
  template <typename A>
  DCN_HOST_DEVICE RoiFrame<A> frame(const A* roi) const {
    RoiFrame<A> f{-1, {0, 0}, {0, 0}, {0, 0}, {0, 0}, {0, 0}};
    const A lower[2] = {roi[2], roi[1]}, upper[2] = {roi[4], roi[3]};
    bool sound = roi[0] >= 0 && roi[0] <= static_cast<A>(batch);
    for (int axis = 0; axis < 2; ++axis)  // infinity - infinity is not 0
      sound = sound && upper[axis] - upper[axis] == 0 && lower[axis] - lower[axis] == 0;
    if (!sound) return f;
    const int64_t image = static_cast<int64_t>(roi[0]);
    if (image >= batch || static_cast<A>(image) != roi[0]) return f;
    f.image = image;
    const A scale = static_cast<A>(spatial_scale);
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
      f.bin[axis] = f.size[axis] / static_cast<A>(bins_along(axis));
      // An adaptive number of samples follows the size: none where that is not positive.
      f.samples[axis] = grid > 0 ? static_cast<A>(grid) : (f.bin[axis] > 0 ? std::ceil(f.bin[axis]) : A(0));
      f.step[axis] = f.bin[axis] / f.samples[axis];
      // Scaled beyond the largest number.
      if (!(f.start[axis] - f.start[axis] == 0 && f.size[axis] - f.size[axis] == 0)) f.image = -1;
    }
    return f;
  }

  // Where the samples of bin `bin` start that has moved by `offset` (in units of offset_scale * size).
  template <typename A>
  DCN_HOST_DEVICE A start(const RoiFrame<A>& f, int64_t bin, A offset, int which) const {
    return f.start[which] + rounded_product(static_cast<A>(bin), f.bin[which]) +
           rounded_product(static_cast<A>(offset_scale) * f.size[which], offset);
  }

  // What all bins of a region share along an axis, with kAlign and kPart.
  template <typename A>
  DCN_HOST_DEVICE BinAxis<A> shared_axis(const RoiFrame<A>& f, int which) const {
    const A n = static_cast<A>(extent(which));
    if (rule == RoiRule::kPart) return {0, f.step[which], 0, 0, grid, A(-0.5), n - A(0.5), n - 1, 0};
    return {0, f.step[which], A(0.5), 0, grid, -1, n, n - 1, f.samples[which]};
  }

  // One axis of bin `bin`.
  template <typename A>
  DCN_HOST_DEVICE BinAxis<A> axis(const RoiFrame<A>& f, int64_t bin, A offset, int which) const {
    if (rule == RoiRule::kPixels) return pixels(f, bin, which);
    BinAxis<A> axis = shared_axis(f, which);
    axis.first = start(f, bin, offset, which);
    if (rule == RoiRule::kPart) {
      for (int64_t i = 0; i < grid; ++i) axis.samples += axis.reads(axis.at(i)) ? A(1) : A(0);
      return axis;
    }
    if (grid > 0 || !(axis.samples > 0)) return axis;
    // A region may be far larger than the map: only some of its samples can lie on it, and no more than two a pixel.
    axis.begin = index((axis.low - axis.first) / axis.step - 2, axis.samples);
    axis.end = index((axis.high - axis.first) / axis.step + 2, axis.samples);
    if (axis.end > axis.begin + 2 * extent(which) + 8) axis.end = axis.begin + 2 * extent(which) + 8;
    if (axis.first != axis.first) axis.begin = 0, axis.end = 1;  // all samples of a NaN position are alike
    return axis;
  }

 private:
  DCN_HOST_DEVICE int64_t first_bin(int64_t part, int64_t parts, int axis) const {
    return (part * bins_along(axis) + parts - 1) / parts;
  }
  template <typename A>
  DCN_HOST_DEVICE BinAxis<A> pixels(const RoiFrame<A>& f, int64_t bin, int which) const {
    // Divided last, which nothing fuses with: whole edges stay whole, the end of the last bin is the region's.
    const A size = f.size[which], n = static_cast<A>(extent(which)), bins = static_cast<A>(bins_along(which));
    const A low = std::floor(f.start[which] + rounded_product(static_cast<A>(bin), size) / bins);
    const A high = std::ceil(f.start[which] + rounded_product(static_cast<A>(bin + 1), size) / bins);
    BinAxis<A> axis{0, 1, 0, 0, 0, 0, n - 1, n - 1, 0};
    axis.begin = static_cast<int64_t>(low < 0 ? A(0) : (low > n ? n : low));
    axis.end = static_cast<int64_t>(high < 0 ? A(0) : (high > n ? n : high));
    axis.samples = axis.end > axis.begin ? static_cast<A>(axis.end - axis.begin) : A(0);
    return axis;
  }
  // `value` as an index from 0 to `end`. Compared before it is converted: it may be huge or NaN.
  template <typename A>
  DCN_HOST_DEVICE static int64_t index(A value, A end) {
    const A least = value < end ? value : end;
    return least > 0 ? (least < A(1e15) ? static_cast<int64_t>(least) : int64_t(1000000000000000)) : 0;
  }
};

// A bin with everything that its samples need.
template <typename A>
struct RoiBin {
  int64_t image, cell;  // image < 0: not to be read
  BinAxis<A> y, x;
  A share;           // what each sample adds
  A size_y, size_x;  // derivative of a position by its offset
};

// 1 / number of a bin's samples, 0 where there are none.
template <typename A>
DCN_HOST_DEVICE A sample_share(A along_y, A along_x) {
  const A count = along_y * along_x;
  return count > 0 ? 1 / count : A(0);
}

// Calls f(sample, y moves, x moves) for each sample of a bin that is on the map.
template <typename A, typename F>
DCN_HOST_DEVICE void for_each_sample(const RoiGeometry& g, const RoiBin<A>& bin, const F& f) {
  for (int64_t i = bin.y.begin; i < bin.y.end; ++i) {
    const A y = bin.y.at(i);
    if (!bin.y.reads(y)) continue;
    for (int64_t j = bin.x.begin; j < bin.x.end; ++j) {
      const A x = bin.x.at(j);
      if (!bin.x.reads(x)) continue;
      f(make_sample<A>(bin.y.on_map(y), bin.x.on_map(x), g.height, g.width), bin.y.moves(y), bin.x.moves(x));
    }
  }
}

// Regions, offsets and masks of a call, in the type of sums and densely stored.
template <typename A>
struct RoiPlaces {
  RoiGeometry g;
  const A *rois, *offset, *mask;  // [R, 5], [R, 2 classes, parts], [R, classes, parts]; the last two may be null

  // Offset (0 without) of bins of `part` along an axis, and what they are multiplied with (1 without).
  DCN_HOST_DEVICE A displacement(int64_t r, int64_t c, int64_t part, int axis) const {
    return offset ? offset[((r * g.classes + c) * 2 + axis) * g.parts() + part] : A(0);
  }
  DCN_HOST_DEVICE A modulation(int64_t r, int64_t c, int64_t part) const {
    return mask ? mask[(r * g.classes + c) * g.parts() + part] : A(1);
  }
  DCN_HOST_DEVICE A modulation(int64_t r, int64_t c, int64_t bin_y, int64_t bin_x) const {
    return modulation(r, c, g.part_index(bin_y, bin_x));
  }
  // Derivative of a position by its offset.
  DCN_HOST_DEVICE A size(const RoiFrame<A>& f, int axis) const { return static_cast<A>(g.offset_scale) * f.size[axis]; }
  DCN_HOST_DEVICE RoiBin<A> bin(const RoiFrame<A>& f, int64_t r, int64_t c, int64_t bin_y, int64_t bin_x) const {
    RoiBin<A> b{f.image, g.cell_of(bin_y, bin_x), {}, {}, 0, size(f, 0), size(f, 1)};
    if (f.image < 0) return b;
    const int64_t part = g.part_index(bin_y, bin_x);
    b.y = g.axis(f, bin_y, displacement(r, c, part, 0), 0);
    b.x = g.axis(f, bin_x, displacement(r, c, part, 1), 1);
    b.share = sample_share(b.y.samples, b.x.samples);
    return b;
  }
};

}  // namespace dcn
