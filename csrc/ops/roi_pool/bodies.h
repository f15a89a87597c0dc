// RoI pooling, element by element: the arithmetic that CPU and CUDA share. Each struct is one task; index i runs over
// its elements in any order. No torch here: host and device compile the same source. `A` is the accumulator type, `S`
// the type that the maps are stored in.
#pragma once

#include "../../core/accumulate.h"
#include "../../core/roi_positions.h"
#include "../../core/view.h"

namespace dcn {

// Whether neighbours along the channels lie closer in memory than neighbours along a row. Elements then follow the
// channels, so that neighbouring threads read neighbouring values.
template <typename S>
DCN_HOST_DEVICE bool is_by_channel(const View<S>& v) {
  return v.c < v.w;
}

// Element i of the result: [R, D, P_h, P_w] in that order, or by channel [R, P_h, P_w, D]. Output d is of class c.
struct PooledElement {
  int64_t r, d, c, y, x;
  DCN_HOST_DEVICE PooledElement(const RoiGeometry& g, bool by_channel, int64_t i) {
    const int64_t each = g.outputs * g.bins(), rest = i % each;
    const int64_t bin = by_channel ? rest / g.outputs : rest % g.bins();
    r = i / each;
    d = by_channel ? rest % g.outputs : rest / g.bins();
    c = d / g.class_outputs();
    y = bin / g.out_width;
    x = bin % g.out_width;
  }
};

// output[r, d, bin] = mask * mean of the bin's samples
template <typename A, typename S>
struct PoolBins {
  Regions<A> regions;
  View<const S> input;
  View<S> output;

  DCN_HOST_DEVICE int64_t size() const { return regions.g.rois * regions.g.outputs * regions.g.bins(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const RoiGeometry& g = regions.g;
    const PooledElement e(g, is_by_channel(input), i);
    const RoiBin<A> bin = regions.bin(regions.frame(e.r), e.r, e.c, e.y, e.x);
    if (bin.image < 0) {
      output.at(e.r, e.d, e.y, e.x) = static_cast<S>(static_cast<A>(NAN));
      return;
    }
    const int64_t channel = g.channel(e.d, bin.cell);
    A sum = 0;
    for_each_sample(bin, [&](const Sample<A>& s, bool, bool) {
      sum += interpolate(
          s, [&](int64_t row, int64_t column) { return static_cast<A>(input.at(bin.image, channel, row, column)); });
    });
    output.at(e.r, e.d, e.y, e.x) = static_cast<S>(bin.mask * (sum * bin.inverse_count));
  }
};

// The adjoint of PoolBins: grad_input[image, channel, corner] += weight * mask / samples * grad_output[r, d, bin]
template <typename A, typename S>
struct ScatterBins {
  Regions<A> regions;
  View<const S> grad_output;
  View<A> grad_input;

  DCN_HOST_DEVICE int64_t size() const { return regions.g.rois * regions.g.outputs * regions.g.bins(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const RoiGeometry& g = regions.g;
    const PooledElement e(g, is_by_channel(grad_input), i);
    const RoiBin<A> bin = regions.bin(regions.frame(e.r), e.r, e.c, e.y, e.x);
    if (bin.image < 0) return;
    const int64_t channel = g.channel(e.d, bin.cell);
    const A grad = static_cast<A>(grad_output.at(e.r, e.d, e.y, e.x)) * bin.mask * bin.inverse_count;
    for_each_sample(bin, [&](const Sample<A>& s, bool, bool) {
      for (int corner = 0; corner < 4; ++corner) {
        const A w = s.weight(corner);
        if (s.has(corner) && w != 0)
          atomic_add(&grad_input.at(bin.image, channel, s.row(corner), s.column(corner)), w * grad);
      }
    });
  }
};

// Sums over the samples of a bin, or over the bins of a part, that become the gradients of offset and mask.
template <typename A>
struct PartSums {
  A value = 0, dy = 0, dx = 0;
};

// These sums for some outputs of a class: slice s of `slices` has the outputs s, s + slices, s + 2 slices, ... of it.
// One element: a slice, and a part of a class of a region.
template <typename A, typename S>
struct PartGradient {
  Regions<A> regions;
  View<const S> input, grad_output;
  int64_t slices;
  PartSums<A>* sums;  // [slices, R, classes, parts]

  DCN_HOST_DEVICE int64_t places() const { return regions.g.rois * regions.g.classes * regions.g.parts(); }
  DCN_HOST_DEVICE int64_t size() const { return slices * places(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const RoiGeometry& g = regions.g;
    const bool by_channel = is_by_channel(input);
    const int64_t slice = by_channel ? i % slices : i / places(), place = by_channel ? i / slices : i % places();
    const int64_t part = place % g.parts(), c = place / g.parts() % g.classes, r = place / g.parts() / g.classes;
    const int64_t part_y = part / g.part_width, part_x = part % g.part_width;
    const RoiFrame<A> frame = regions.frame(r);
    PartSums<A> total;
    for (int64_t y = g.first_bin(part_y, 0); y < g.first_bin(part_y + 1, 0); ++y)
      for (int64_t x = g.first_bin(part_x, 1); x < g.first_bin(part_x + 1, 1); ++x) {
        const RoiBin<A> bin = regions.bin(frame, r, c, y, x);
        const PartSums<A> sum = of_bin(bin, r, c, slice, y, x);
        total.value += sum.value;
        total.dy += bin.mask * sum.dy;
        total.dx += bin.mask * sum.dx;
      }
    sums[slice * places() + place] = total;
  }

 private:
  DCN_HOST_DEVICE PartSums<A> of_bin(const RoiBin<A>& bin, int64_t r, int64_t c, int64_t slice, int64_t y,
                                     int64_t x) const {
    if (bin.image < 0) return {A(NAN), A(NAN), A(NAN)};
    const RoiGeometry& g = regions.g;
    PartSums<A> sum;
    for_each_sample(bin, [&](const Sample<A>& s, bool y_varies, bool x_varies) {
      Gradient<A> all{0, 0, 0};  // times grad_output, summed over the slice's outputs
      for (int64_t d = c * g.class_outputs() + slice; d < (c + 1) * g.class_outputs(); d += slices) {
        const int64_t channel = g.channel(d, bin.cell);
        const A grad = static_cast<A>(grad_output.at(r, d, y, x));
        const Gradient<A> one = interpolate_gradient(
            s, [&](int64_t row, int64_t column) { return static_cast<A>(input.at(bin.image, channel, row, column)); });
        all.value += grad * one.value;
        all.dy += grad * one.dy;
        all.dx += grad * one.dx;
      }
      sum.value += all.value;
      if (y_varies) sum.dy += all.dy;
      if (x_varies) sum.dx += all.dx;
    });
    sum.value *= bin.inverse_count;
    sum.dy *= bin.inverse_count * bin.size_y;
    sum.dx *= bin.inverse_count * bin.size_x;
    return sum;
  }
};

// The gradients of offset and mask: the sums of their slices. One element: a part of a class of a region.
template <typename A>
struct AddSlices {
  int64_t places, parts, slices;
  const PartSums<A>* sums;     // [slices, R, classes, parts]
  A *grad_offset, *grad_mask;  // [R, 2 classes, parts], [R, classes, parts]; either may be null

  DCN_HOST_DEVICE int64_t size() const { return places; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    PartSums<A> total;
    for (int64_t slice = 0; slice < slices; ++slice) {
      const PartSums<A> sum = sums[slice * places + i];
      total.value += sum.value;
      total.dy += sum.dy;
      total.dx += sum.dx;
    }
    if (grad_offset) {
      A* const planes = grad_offset + i / parts * 2 * parts + i % parts;
      planes[0] = total.dy;
      planes[parts] = total.dx;
    }
    if (grad_mask) grad_mask[i] = total.value;
  }
};

}  // namespace dcn
