// RoI pooling, element by element: the arithmetic that CPU and CUDA share. Each struct is one task; index i runs over
// its elements in any order. Host and device compile the same source. `A` is the accumulator type, `S` the type that
// the maps are stored in, `I` that of numbers of elements. An element takes several channels of a bin, V at a time,
// which is 1 or 16 bytes (runtime/channels.h): where its samples lie is found once for all of them.
#pragma once

#include <algorithm>

#include "../../core/accumulate.h"
#include "../../core/channel_lanes.h"
#include "../../core/roi_positions.h"
#include "../../core/view.h"
#include "../../runtime/channels.h"

namespace dcn {

// The corners of a sample as they lie in an image, those that are read. In the place of others there is one that may
// be, so that a thread can read all four at once and leave out what does not count.
template <typename A, typename I>
struct ReadCorners {
  bool read[4];  // a corner without weight is not, so 0 * inf cannot arise
  A weight[4];   // NaN if a position is
  I at[4];

  template <typename S>
  DCN_HOST_DEVICE ReadCorners(const Sample<A, I>& s, const View<S>& v) {
    const I height = static_cast<I>(v.h), width = static_cast<I>(v.w), first = s.y0 * height + s.x0 * width;
    DCN_UNROLL
    for (int k = 0; k < 4; ++k) {
      const A w = s.weight(k);
      read[k] = s.has(k) && w != 0;
      weight[k] = read[k] ? w : s.origin();
      at[k] = first + (read[k] ? (k & 2 ? height : 0) + (k & 1 ? width : 0) : 0);
    }
  }
};

// How elements share the bins of all regions, and the outputs of each class.
template <typename A, typename I, int V>
struct BinElements {
  static constexpr int kTurns = ChannelLanes<I, V>::kTurns;

  Regions<A> regions;
  ChannelLanes<I, V> lanes;
  Divisor<I> by_bins, by_width;
  bool by_channel;  // neighbours along the channels lie closer in memory than those along a row

  BinElements(const Regions<A>& all, bool channels_first)
      : regions(all),
        lanes(all.g.class_outputs(), all.g.classes),
        by_bins(all.g.bins()),
        by_width(all.g.out_width),
        by_channel(channels_first) {}

  struct Place {
    I r, c, lane, y, x;
  };
  DCN_HOST_DEVICE int64_t size() const { return regions.g.rois * regions.g.bins() * lanes.of_groups(); }
  // Neighbouring elements have neighbouring channels, or bins.
  DCN_HOST_DEVICE Place place(int64_t i) const {
    const Quotient<I> outer = by_channel ? Quotient<I>{0, 0} : by_bins(static_cast<I>(i));
    const auto of_lanes = lanes.place(by_channel ? static_cast<I>(i) : outer.quotient);
    const Quotient<I> of_bins = by_channel ? by_bins(of_lanes.number) : Quotient<I>{of_lanes.number, outer.remainder};
    const Quotient<I> bin = by_width(of_bins.remainder);
    return {of_bins.quotient, of_lanes.group, of_lanes.lane, bin.quotient, bin.remainder};
  }
  DCN_HOST_DEVICE RoiBin<A, I> bin(const Place& p) const {
    return regions.bin(regions.template frame<I>(p.r), p.r, p.c, p.y, p.x);
  }
  DCN_HOST_DEVICE bool has(const Place& p, int j) const { return p.lane + j * lanes.lanes() < lanes.turns; }
  // The first output of an element, and how far the next turn's lies from it.
  DCN_HOST_DEVICE I first_output(const Place& p) const { return (p.c * lanes.turns + p.lane) * V; }
  DCN_HOST_DEVICE I step() const { return lanes.lanes() * V; }
  // Pointers to all turns, `distance` apart; a turn that does not exist has the one before it.
  template <typename T>
  DCN_HOST_DEVICE void find_turns(const Place& p, T* first, I distance, T* (&turns)[kTurns]) const {
    turns[0] = first;
    DCN_UNROLL
    for (int j = 1; j < kTurns; ++j) turns[j] = turns[j - 1] + (has(p, j) ? distance : 0);
  }
  // Calls f(j) for all turns that exist, and some that do not: half of them at once, without a branch, so that many
  // reads are under way, but few in vain where a class has few outputs.
  template <typename F>
  DCN_HOST_DEVICE void for_each_turn(const Place& p, const F& f) const {
    constexpr int kHalf = (kTurns + 1) / 2;
    DCN_UNROLL
    for (int j = 0; j < kHalf; ++j) f(j);
    if constexpr (kHalf < kTurns) {
      if (!has(p, kHalf)) return;
      DCN_UNROLL
      for (int j = kHalf; j < kTurns; ++j) f(j);
    }
  }
  // The same for the channels that are read, in a map.
  template <typename T>
  DCN_HOST_DEVICE void find_channels(const Place& p, const RoiBin<A, I>& bin, const View<T>& map,
                                     T* (&turns)[kTurns]) const {
    const I cells = static_cast<I>(regions.g.cells()), c = static_cast<I>(map.c);
    find_turns(p, map.data + (bin.image * static_cast<I>(map.n) + (first_output(p) * cells + bin.cell) * c),
               step() * cells * c, turns);
  }
};

// output[r, d, bin] = mask * mean of the bin's samples
template <typename A, typename S, typename I, int V>
struct PoolBins {
  using Elements = BinElements<A, I, V>;

  Elements elements;
  View<const S> input;
  View<S> output;

  DCN_HOST_DEVICE int64_t size() const { return elements.size(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    constexpr int kTurns = Elements::kTurns;
    const typename Elements::Place p = elements.place(i);
    const RoiBin<A, I> bin = elements.bin(p);
    A sums[kTurns][V] = {};
    if (bin.image >= 0) {
      const S* from[kTurns];
      elements.find_channels(p, bin, input, from);
      if (bin.x.whole)
        for_each_pixel(bin, [&](I y, I x) {
          const I at = y * static_cast<I>(input.h) + x * static_cast<I>(input.w);
          elements.for_each_turn(p, [&](int j) { add_scaled(sums[j], A(1), load_channels<S, V>(from[j] + at)); });
        });
      else
        for_each_sample(bin, [&](const Sample<A, I>& s, bool, bool) {
          const ReadCorners<A, I> corners(s, input);
          elements.for_each_turn(p, [&](int j) {
            Channels<S, V> read[4];
            DCN_UNROLL
            for (int k = 0; k < 4; ++k) read[k] = load_channels<S, V>(from[j] + corners.at[k]);
            DCN_UNROLL
            for (int k = 0; k < 4; ++k)
              add_scaled(sums[j], corners.weight[k], corners.read[k] ? read[k] : Channels<S, V>{});
          });
        });
    }
    const A none = bin.image < 0 ? static_cast<A>(NAN) : A(0);
    S* to[kTurns];
    elements.find_turns(p, output.data + place_in(output, p.r, elements.first_output(p), p.y, p.x),
                        elements.step() * static_cast<I>(output.c), to);
    DCN_UNROLL
    for (int j = 0; j < kTurns; ++j) {
      if (!elements.has(p, j)) break;
      DCN_UNROLL
      for (int e = 0; e < V; ++e) sums[j][e] = bin.mask * (sums[j][e] * bin.inverse_count) + none;
      store_values<V>(to[j], sums[j]);
    }
  }
};

// The adjoint of PoolBins: grad_input[image, channel, corner] += weight * mask / samples * grad_output[r, d, bin]
template <typename A, typename S, typename I>
struct ScatterBins {
  using Elements = BinElements<A, I, 1>;

  Elements elements;
  View<const S> grad_output;
  View<A> grad_input;

  DCN_HOST_DEVICE int64_t size() const { return elements.size(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    constexpr int kTurns = Elements::kTurns;
    const typename Elements::Place p = elements.place(i);
    const RoiBin<A, I> bin = elements.bin(p);
    if (bin.image < 0) return;
    const S* from[kTurns];
    A* to[kTurns];
    elements.find_turns(p, grad_output.data + place_in(grad_output, p.r, elements.first_output(p), p.y, p.x),
                        elements.step() * static_cast<I>(grad_output.c), from);
    elements.find_channels(p, bin, grad_input, to);
    A grad[kTurns];
    DCN_UNROLL
    for (int j = 0; j < kTurns; ++j) grad[j] = static_cast<A>(*from[j]) * bin.mask * bin.inverse_count;
    const auto add = [&](I at, A weight) {
      DCN_UNROLL
      for (int j = 0; j < kTurns; ++j) {
        if (!elements.has(p, j)) break;
        atomic_add(to[j] + at, weight * grad[j]);
      }
    };
    if (bin.x.whole)
      for_each_pixel(bin,
                     [&](I y, I x) { add(y * static_cast<I>(grad_input.h) + x * static_cast<I>(grad_input.w), A(1)); });
    else
      for_each_sample(bin, [&](const Sample<A, I>& s, bool, bool) {
        const ReadCorners<A, I> corners(s, grad_input);
        DCN_UNROLL
        for (int k = 0; k < 4; ++k)
          if (corners.read[k]) add(corners.at[k], corners.weight[k]);
      });
  }
};

// Sums over the samples of a bin, or over the bins of a part, that become the gradients of offset and mask.
template <typename A>
struct PartSums {
  A value = 0, dy = 0, dx = 0;
};

// These sums for some outputs of a class: slice s of `slices` has turn s, s + slices, s + 2 slices, ... of its
// channels. One element: a slice, and a part of a class of a region.
template <typename A, typename S, typename I, int V>
struct PartGradient {
  Regions<A> regions;
  View<const S> input, grad_output;
  Divisor<I> by_slices, by_places, by_parts, by_part_width, by_classes;
  bool by_channel;
  PartSums<A>* sums;  // [slices, R, classes, parts]

  PartGradient(const Regions<A>& all, const View<const S>& map, const View<const S>& grad, int64_t slices,
               bool channels_first, PartSums<A>* found)
      : regions(all),
        input(map),
        grad_output(grad),
        by_slices(slices),
        by_places(std::max<int64_t>(1, all.g.rois * all.g.classes * all.g.parts())),
        by_parts(all.g.parts()),
        by_part_width(all.g.part_width),
        by_classes(all.g.classes),
        by_channel(channels_first),
        sums(found) {}

  DCN_HOST_DEVICE int64_t size() const {
    return by_slices.divisor * (regions.g.rois * regions.g.classes * regions.g.parts());
  }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const RoiGeometry& g = regions.g;
    const Quotient<I> of = by_channel ? by_slices(static_cast<I>(i)) : by_places(static_cast<I>(i));
    const I slice = by_channel ? of.remainder : of.quotient, place = by_channel ? of.quotient : of.remainder;
    const Quotient<I> at = by_parts(place), part = by_part_width(at.remainder), of_class = by_classes(at.quotient);
    const I r = of_class.quotient, c = of_class.remainder;
    const RoiFrame<A, I> frame = regions.template frame<I>(r);
    const I y_end = static_cast<I>(g.first_bin(part.quotient + 1, 0));
    const I x_begin = static_cast<I>(g.first_bin(part.remainder, 1));
    const I x_end = static_cast<I>(g.first_bin(part.remainder + 1, 1));
    PartSums<A> total;
    for (I y = static_cast<I>(g.first_bin(part.quotient, 0)); y < y_end; ++y)
      for (I x = x_begin; x < x_end; ++x) {
        const RoiBin<A, I> bin = regions.bin(frame, r, c, y, x);
        const PartSums<A> sum = of_bin(bin, r, c, slice, y, x);
        total.value += sum.value;
        total.dy += bin.mask * sum.dy;
        total.dx += bin.mask * sum.dx;
      }
    sums[slice * by_places.divisor + place] = total;
  }

 private:
  DCN_HOST_DEVICE PartSums<A> of_bin(const RoiBin<A, I>& bin, I r, I c, I slice, I y, I x) const {
    if (bin.image < 0) return {A(NAN), A(NAN), A(NAN)};
    const I count = static_cast<I>(regions.g.class_outputs()), first = c * count,
            cells = static_cast<I>(regions.g.cells());
    const I step = by_slices.divisor * V, input_step = step * cells * static_cast<I>(input.c),
            grad_step = step * static_cast<I>(grad_output.c);
    const S* const from = input.data + (bin.image * static_cast<I>(input.n) +
                                        ((first + slice * V) * cells + bin.cell) * static_cast<I>(input.c));
    const S* const grads = grad_output.data + place_in(grad_output, r, first + slice * V, y, x);
    PartSums<A> sum;
    for_each_sample(bin, [&](const Sample<A, I>& s, bool y_varies, bool x_varies) {
      // Of each corner: sum over the slice's outputs of gradient * value.
      A of[4] = {};
      I at[4];
      DCN_UNROLL
      for (int k = 0; k < 4; ++k) at[k] = s.row(k) * static_cast<I>(input.h) + s.column(k) * static_cast<I>(input.w);
      const S *values = from, *grad_values = grads;
      for (I d = slice * V; d < count; d += step, values += input_step, grad_values += grad_step) {
        A grad[V];
        load_values<V>(grad, grad_values);
        DCN_UNROLL
        for (int k = 0; k < 4; ++k)
          if (s.has(k)) of[k] += dot(grad, load_channels<S, V>(values + at[k]));
      }
      const Gradient<A> all = combine_corners(s, [&](int k) { return of[k]; });
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
