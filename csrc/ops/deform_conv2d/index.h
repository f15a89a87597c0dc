// The gradient of the input, gathered through the index of its samples (core/input_index.h): the adjoint of
// FillColumns.
#pragma once

#include "../../core/chunk_sums.h"
#include "bodies.h"

namespace dcn {

// What a sample gives the pixels that it reads (core/chunk_sums.h): its gradient of the columns. A part is eight
// channels of an offset group.
template <typename A, typename M, typename I, int V>
struct ColumnGather {
  using Accumulator = A;
  using Lanes = ChannelLanes<I, V>;
  static constexpr int kTurns = Lanes::kTurns, kSums = kTurns * V;

  I rows;  // of an offset group: output pixels times taps
  Lanes lanes;
  InputIndex<A> index;
  Columns<const M, I> grad_columns;

  struct Place {
    I from[kTurns];  // where the columns of sample 0 would begin: those of other offset groups come before this one's
    I turns;         // how many there are
  };
  struct Values {
    Channels<M, V> of[kTurns];
  };

  DCN_HOST_DEVICE int64_t parts() const { return lanes.lanes(); }
  DCN_HOST_DEVICE I channel(I og, I lane, int j) const { return (og * lanes.turns + lane + j * lanes.lanes()) * V; }
  DCN_HOST_DEVICE bool has(I lane, int j) const { return lane + j * lanes.lanes() < lanes.turns; }
  DCN_HOST_DEVICE Place place(int64_t map, int64_t lane) const {
    const I og = lanes.by_groups(static_cast<I>(map)).remainder;
    Place p{};
    DCN_UNROLL
    for (int j = 0; j < kTurns; ++j) {
      p.from[j] = grad_columns.begin(channel(og, static_cast<I>(lane), j)) - og * rows * grad_columns.row();
      p.turns += has(static_cast<I>(lane), j) ? 1 : 0;
    }
    return p;
  }
  DCN_HOST_DEVICE Values load(const Place& p, int32_t sample) const {
    Values values{};
    DCN_UNROLL
    for (int j = 0; j < kTurns; ++j)
      if (j < p.turns)
        values.of[j] =
            load_channels<M, V>(grad_columns.data + (p.from[j] + static_cast<I>(sample) * grad_columns.row()));
    return values;
  }
  DCN_HOST_DEVICE static void add(A (&sums)[kSums], A weight, const Values& values) {
    DCN_UNROLL
    for (int j = 0; j < kTurns; ++j) add_scaled(part_of<V>(sums, j), weight, values.of[j]);
  }
};

// grad_input[n, c, y, x] += sum of weight_corner * mask * grad_columns over the samples that read the pixel. One
// element: a pixel, in eight channels of one offset group.
template <typename A, typename M, typename I, int V>
struct GatherInputGradient {
  using Gather = ColumnGather<A, M, I, V>;

  Gather gather;
  const SumsOf<Gather>* chunk_sums;
  int64_t pixels;  // of all images
  Divisor<I> by_width, by_height;
  View<A> grad_input;  // from the range's first image on

  DCN_HOST_DEVICE int64_t size() const { return pixels * gather.lanes.of_groups(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const auto [pixel, og, lane] = gather.lanes.place(i);
    const Quotient<I> column = by_width(pixel), line = by_height(column.quotient);
    const I image = line.quotient, y = line.remainder, x = column.remainder;
    SumsOf<Gather> sums;
    const int64_t map = static_cast<int64_t>(image) * gather.lanes.by_groups.divisor + og;
    if (!gather_pixel(gather, chunk_sums, map, lane, y, x, sums)) return;
    const I first = lane;
    DCN_UNROLL
    for (int j = 0; j < Gather::kTurns; ++j) {
      if (!gather.has(first, j)) continue;
      A* const to = grad_input.data + place_in(grad_input, image, gather.channel(og, first, j), y, x);
      A(&part)[V] = part_of<V>(sums.of, j);
      A before[V];
      load_values<V>(before, static_cast<const A*>(to));
      DCN_UNROLL
      for (int e = 0; e < V; ++e) part[e] += before[e];
      store_values<V>(to, part);
    }
  }
};

}  // namespace dcn
