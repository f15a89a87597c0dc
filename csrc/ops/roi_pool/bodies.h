// Pooling over regions of interest, element by element: the arithmetic that CPU and CUDA share. Each struct is one
// task; index i runs over its elements in any order. No torch here.
#pragma once

#include "../../core/accumulate.h"
#include "../../core/roi_geometry.h"
#include "../../core/view.h"

namespace dcn {

// Whether a step along the channels is shorter in memory than one along a row. Elements then follow the channels, so
// that threads side by side read side by side.
template <typename S>
DCN_HOST_DEVICE bool is_by_channel(const View<S>& v) {
  return v.c < v.w;
}

// Number i of the result, [R, D, P_h, P_w], or [R, P_h, P_w, D] by channel. Its output d belongs to class c.
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
  RoiPlaces<A> where;
  View<const S> input;
  View<S> output;

  DCN_HOST_DEVICE int64_t size() const { return where.g.rois * where.g.outputs * where.g.bins(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const RoiGeometry& g = where.g;
    const PooledElement e(g, is_by_channel(input), i);
    const RoiBin<A> bin = where.bin(g.frame(where.rois + 5 * e.r), e.r, e.c, e.y, e.x);
    if (bin.image < 0) {
      output.at(e.r, e.d, e.y, e.x) = static_cast<S>(static_cast<A>(NAN));
      return;
    }
    const int64_t channel = g.channel(e.d, bin.cell);
    A sum = 0;
    for_each_sample(g, bin, [&](const Sample<A>& s, bool, bool) {
      sum += interpolate(
          s, [&](int64_t row, int64_t column) { return static_cast<A>(input.at(bin.image, channel, row, column)); });
    });
    output.at(e.r, e.d, e.y, e.x) = static_cast<S>(where.modulation(e.r, e.c, e.y, e.x) * (sum * bin.share));
  }
};

// grad_input[image, channel, corner] += weight * mask * share * grad_output: the adjoint of PoolBins.
template <typename A, typename S>
struct ScatterBins {
  RoiPlaces<A> where;
  View<const S> grad_output;
  View<A> grad_input;

  DCN_HOST_DEVICE int64_t size() const { return where.g.rois * where.g.outputs * where.g.bins(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const RoiGeometry& g = where.g;
    const PooledElement e(g, is_by_channel(grad_input), i);
    const RoiBin<A> bin = where.bin(g.frame(where.rois + 5 * e.r), e.r, e.c, e.y, e.x);
    if (bin.image < 0) return;
    const int64_t channel = g.channel(e.d, bin.cell);
    const A grad =
        static_cast<A>(grad_output.at(e.r, e.d, e.y, e.x)) * where.modulation(e.r, e.c, e.y, e.x) * bin.share;
    for_each_sample(g, bin, [&](const Sample<A>& s, bool, bool) {
      for (int corner = 0; corner < 4; ++corner) {
        const A w = s.weight(corner);
        if (s.has(corner) && w != 0)
          atomic_add(&grad_input.at(bin.image, channel, s.row(corner), s.column(corner)), w * grad);
      }
    });
  }
};

// Sums of one bin for the gradients of its offset and mask.
template <typename A>
struct BinGradient {
  A value = 0, dy = 0, dx = 0;

  // One sample's value and derivatives, each already summed with the output's gradient over channels.
  DCN_HOST_DEVICE void add(const Gradient<A>& s, bool y_moves, bool x_moves) {
    value += s.value;
    if (y_moves) dy += s.dy;
    if (x_moves) dx += s.dx;
  }
};

// What a slice of the outputs of a class adds to the gradients of offset and mask: sums over the bins of a part and
// over the outputs slice, slice + slices, ... One element: a slice, and a part of a class of a region.
template <typename A, typename S>
struct PartGradient {
  RoiPlaces<A> where;
  View<const S> input, grad_output;
  int64_t slices;
  BinGradient<A>* sums;  // [slices, R, classes, parts]

  DCN_HOST_DEVICE int64_t places() const { return where.g.rois * where.g.classes * where.g.parts(); }
  DCN_HOST_DEVICE int64_t size() const { return slices * places(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const RoiGeometry& g = where.g;
    const bool by_channel = is_by_channel(input);
    const int64_t slice = by_channel ? i % slices : i / places(), place = by_channel ? i / slices : i % places();
    const int64_t part = place % g.parts(), c = place / g.parts() % g.classes, r = place / g.parts() / g.classes;
    const int64_t part_y = part / g.part_width, part_x = part % g.part_width;
    const RoiFrame<A> frame = g.frame(where.rois + 5 * r);
    BinGradient<A> total;
    for (int64_t y = g.first_bin(part_y, 0); y < g.first_bin(part_y + 1, 0); ++y)
      for (int64_t x = g.first_bin(part_x, 1); x < g.first_bin(part_x + 1, 1); ++x) {
        const RoiBin<A> bin = where.bin(frame, r, c, y, x);
        const A m = where.modulation(r, c, y, x);
        BinGradient<A> sum;
        if (bin.image < 0) {
          sum = {A(NAN), A(NAN), A(NAN)};
        } else {
          for_each_sample(g, bin, [&](const Sample<A>& s, bool y_moves, bool x_moves) {
            Gradient<A> all{0, 0, 0};
            for (int64_t d = c * g.class_outputs() + slice; d < (c + 1) * g.class_outputs(); d += slices) {
              const int64_t channel = g.channel(d, bin.cell);
              const A grad = static_cast<A>(grad_output.at(r, d, y, x));
              const Gradient<A> one = interpolate_gradient(s, [&](int64_t row, int64_t column) {
                return static_cast<A>(input.at(bin.image, channel, row, column));
              });
              all.value += grad * one.value;
              all.dy += grad * one.dy;
              all.dx += grad * one.dx;
            }
            sum.add(all, y_moves, x_moves);
          });
          sum.value *= bin.share;
          sum.dy *= bin.share * bin.size_y;
          sum.dx *= bin.share * bin.size_x;
        }
        total.value += sum.value;
        total.dy += m * sum.dy;
        total.dx += m * sum.dx;
      }
    sums[slice * places() + place] = total;
  }
};

// Gradients of offset and mask [R, (2) classes, parts] from their slices. One element: a part of a class of a region.
template <typename A>
struct AddSlices {
  int64_t places, parts, slices;
  const BinGradient<A>* sums;
  A *grad_offset, *grad_mask;  // dense; either may be null

  DCN_HOST_DEVICE int64_t size() const { return places; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    BinGradient<A> total;
    for (int64_t slice = 0; slice < slices; ++slice) {
      const BinGradient<A> sum = sums[slice * places + i];
      total.value += sum.value;
      total.dy += sum.dy;
      total.dx += sum.dx;
    }
    if (grad_offset) {
      A* const both = grad_offset + i / parts * 2 * parts + i % parts;
      both[0] = total.dy;
      both[parts] = total.dx;
    }
    if (grad_mask) grad_mask[i] = total.value;
  }
};

}  // namespace dcn
