// Deformable convolution, element by element: the arithmetic that CPU and CUDA share. Each struct is one task; index i
// runs over its elements in any order. Host and device compile the same source, so a test on the CPU proves the
// arithmetic of the GPU.
//
// Columns are [groups, output pixels, taps, channels of a group]: channels lie side by side, as the image's do, and an
// element takes eight of them at one position, V at a time. Elements side by side have channels side by side, so that
// neighbouring threads read and write neighbouring memory. V is 1 or 16 bytes (runtime/channels.h); `I` is the type of
// numbers of elements.
#pragma once

#include "../../core/channel_lanes.h"
#include "../../core/conv_rows.h"
#include "../../runtime/channels.h"

namespace dcn {

// Columns of a range, or their gradient.
template <typename M, typename I>
struct Columns {
  M* data;
  I group;  // elements of one group
  Divisor<I> by_group_channels;

  Columns(M* columns, const ConvGeometry& g, const PixelRange& range)
      : data(columns),
        group(static_cast<I>(range.count * g.taps() * g.group_channels())),
        by_group_channels(g.group_channels()) {}

  // Where channel c of the input begins, and how far its rows are apart.
  DCN_HOST_DEVICE I begin(I c) const {
    const Quotient<I> of = by_group_channels(c);
    return of.quotient * group + of.remainder;
  }
  DCN_HOST_DEVICE I row() const { return by_group_channels.divisor; }
};

// The corners of a sample as they lie in a view.
template <typename A, typename I>
struct Corners {
  I at[4];
  A weight[4];

  template <typename S>
  DCN_HOST_DEVICE Corners(const Sample<A, I>& s, const View<S>& view, I image) {
    DCN_UNROLL
    for (int c = 0; c < 4; ++c) {
      at[c] = place_in(view, image, I(0), s.row(c), s.column(c));
      weight[c] = s.weight(c);
    }
  }
};

// columns[row, c] = mask * bilinear(input[n, c], position). One element: eight channels of a row.
template <typename A, typename S, typename F, typename M, typename I, int V>
struct FillColumns {
  RowPositions<A, F, I> positions;
  ChannelLanes<I, V> lanes;
  View<const S> input;  // from the range's first image on
  Columns<M, I> columns;

  DCN_HOST_DEVICE int64_t size() const { return positions.rows() * lanes.of_groups(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const auto [number, og, lane] = lanes.place(i);
    const ConvRow<I> row = positions.row(number);
    const Sample<A, I> s = positions.sample(row, og);
    const A m = positions.modulation(row, og);
    const Corners<A, I> corners(s, input, row.image);
    const I first = og * lanes.turns;
    for (I turn = lane; turn < lanes.turns; turn += lanes.lanes()) {
      const I c = (first + turn) * V;
      // All four at once; a corner without weight is not read, so 0 * inf cannot arise.
      Channels<S, V> read[4] = {};
      DCN_UNROLL
      for (int k = 0; k < 4; ++k)
        if (s.has(k) && corners.weight[k] != 0)
          read[k] = load_channels<S, V>(input.data + (corners.at[k] + c * static_cast<I>(input.c)));
      A sums[V];
      DCN_UNROLL
      for (int e = 0; e < V; ++e) sums[e] = s.origin();
      DCN_UNROLL
      for (int k = 0; k < 4; ++k) add_scaled(sums, corners.weight[k], read[k]);
      DCN_UNROLL
      for (int e = 0; e < V; ++e) sums[e] *= m;
      store_values<V>(columns.data + (columns.begin(c) + number * columns.row()), sums);
    }
  }
};

// grad_offset, grad_mask: sums over the channels of one offset group. One element: (row, offset group), whose channels
// some threads share (runtime/shared_sums.h).
template <typename A, typename S, typename F, typename M, typename I, int V>
struct DisplacementGradient {
  RowPositions<A, F, I> positions;
  View<const S> input;  // from the range's first image on, as are the gradients
  Columns<const M, I> grad_columns;
  View<F> grad_offset, grad_mask;  // either may be null

  struct Place {
    I number, offset_group;
    ConvRow<I> row;
    Sample<A, I> sample;
  };
  // Of each corner: sum over channels of grad * value.
  struct Sums {
    A of[4] = {};
  };

  DCN_HOST_DEVICE int64_t size() const { return positions.size(); }
  DCN_HOST_DEVICE Place place(int64_t i) const {
    const Quotient<I> of = positions.by_rows(static_cast<I>(i));
    const ConvRow<I> row = positions.row(of.remainder);
    return {of.remainder, of.quotient, row, positions.sample(row, of.quotient)};
  }
  DCN_HOST_DEVICE Sums add_up(const Place& p, int lane, int lanes) const {
    const Corners<A, I> corners(p.sample, input, p.row.image);
    const I each = static_cast<I>(positions.g.offset_group_channels()), begin = p.offset_group * each;
    Sums sums;
    for (I c = begin + lane * V; c < begin + each; c += lanes * V) {
      A grad[V];
      load_values<V>(grad, grad_columns.data + (grad_columns.begin(c) + p.number * grad_columns.row()));
      DCN_UNROLL
      for (int k = 0; k < 4; ++k)
        if (p.sample.has(k))
          sums.of[k] += dot(grad, load_channels<S, V>(input.data + (corners.at[k] + c * static_cast<I>(input.c))));
    }
    return sums;
  }
  DCN_HOST_DEVICE void finish(const Place& p, const Sums& sums) const {
    const Gradient<A> sum = combine_corners(p.sample, [&](int k) { return sums.of[k]; });
    const ConvRow<I>& r = p.row;
    const I plane = positions.plane(r, p.offset_group);
    if (grad_offset.data) {
      const A m = positions.modulation(r, p.offset_group);
      const I at = place_in(grad_offset, r.image, 2 * plane, r.y, r.x);
      grad_offset.data[at] = static_cast<F>(m * sum.dy);
      grad_offset.data[at + static_cast<I>(grad_offset.c)] = static_cast<F>(m * sum.dx);
    }
    if (grad_mask.data) grad_mask.data[place_in(grad_mask, r.image, plane, r.y, r.x)] = static_cast<F>(sum.value);
  }
};

// grad_weight += one range's product, both [O, K, C / groups]. Sums are kept in `A` whatever a product is stored in.
template <typename A, typename M>
struct AddWeightGradient {
  int64_t count;
  const M* product;
  A* grad_weight;

  DCN_HOST_DEVICE int64_t size() const { return count; }
  DCN_HOST_DEVICE void operator()(int64_t i) const { grad_weight[i] += static_cast<A>(product[i]); }
};

}  // namespace dcn
