// Depthwise deformable convolution on the portable path, element by element, as bodies.h: one weight for each channel
// and tap, so there is no product of matrices. `C` channels lie side by side in weights, columns and the result's
// gradient.
#pragma once

#include "bodies.h"

namespace dcn {

// Weights as [taps, C].
template <typename S, typename T>
struct PackTapWeights {
  ConvGeometry g;
  View<const S> weight;
  T* packed;

  DCN_HOST_DEVICE int64_t size() const { return g.taps() * g.channels; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t tap = i / g.channels;
    packed[i] = static_cast<T>(weight.at(i % g.channels, 0, tap / g.kernel_w, tap % g.kernel_w));
  }
};

// output[n, c, y, x] = bias[c] + sum of weight[tap, c] * mask * bilinear(input[n, c], position) over the taps. One
// element: eight channels of an output pixel. There are no columns.
template <typename A, typename S, typename F, typename I, int V>
struct SumTaps {
  RowPositions<A, F, I> positions;
  ChannelLanes<I, V> lanes;
  View<const S> input;  // from the range's first image on, as is the output
  const A* weight;      // [taps, C], from a multiple of 16 bytes on
  const S* bias;        // may be null
  View<S> output;
  bool stores_vectors;  // else one value at a time: few beside those that are read

  DCN_HOST_DEVICE int64_t size() const { return positions.range.count * lanes.of_groups(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    constexpr int kTurns = ChannelLanes<I, V>::kTurns;
    const auto [pixel, og, lane] = lanes.place(i);
    const I taps = positions.by_taps.divisor, channels = lanes.turns * V * lanes.by_groups.divisor;
    ConvRow<I> row = positions.row(pixel * taps);
    const I first = (og * lanes.turns + lane) * V, step = lanes.lanes() * V, turn = lane;
    A sums[kTurns][V] = {};
    for (row.tap = 0; row.tap < taps; ++row.tap) {
      const Sample<A, I> s = positions.sample(row, og);
      const A m = positions.modulation(row, og);
      const Corners<A, I> corners(s, input, row.image);
      DCN_UNROLL
      for (int j = 0; j < kTurns; ++j) {
        if (turn + j * lanes.lanes() >= lanes.turns) break;
        const I c = first + j * step;
        Channels<S, V> read[4] = {};
        DCN_UNROLL
        for (int k = 0; k < 4; ++k)
          if (s.has(k) && corners.weight[k] != 0)
            read[k] = load_channels<S, V>(input.data + (corners.at[k] + c * static_cast<I>(input.c)));
        A value[V], scale[V];
        DCN_UNROLL
        for (int e = 0; e < V; ++e) value[e] = s.origin();
        DCN_UNROLL
        for (int k = 0; k < 4; ++k) add_scaled(value, corners.weight[k], read[k]);
        load_values<V>(scale, weight + (row.tap * channels + c));
        DCN_UNROLL
        for (int e = 0; e < V; ++e) sums[j][e] += m * value[e] * scale[e];
      }
    }
    DCN_UNROLL
    for (int j = 0; j < kTurns; ++j) {
      if (turn + j * lanes.lanes() >= lanes.turns) break;
      const I c = first + j * step;
      if (bias) {
        DCN_UNROLL
        for (int e = 0; e < V; ++e) sums[j][e] += static_cast<A>(bias[c + e]);
      }
      S* const to = output.data + place_in(output, row.image, c, row.y, row.x);
      if (stores_vectors) {
        store_values<V>(to, sums[j]);
      } else {
        DCN_UNROLL
        for (int e = 0; e < V; ++e) to[e * static_cast<I>(output.c)] = static_cast<S>(sums[j][e]);
      }
    }
  }
};

// The gradient of the columns: that of the output times the weight. One element: eight channels of a row.
template <typename A, typename M, typename I, int V>
struct SpreadGradient {
  int64_t rows;              // of the range: pixels times taps
  ChannelLanes<I, V> lanes;  // of all channels
  Divisor<I> by_taps;
  const M* grad_output;  // [pixels of the range, C]
  const A* weight;       // [taps, C]
  M* grad_columns;       // [pixels of the range, taps, C]

  DCN_HOST_DEVICE int64_t size() const { return rows * lanes.of_groups(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const auto place = lanes.place(i);
    const Quotient<I> at = by_taps(place.number);
    const I channels = lanes.turns * V;
    for (I turn = place.lane; turn < lanes.turns; turn += lanes.lanes()) {
      A grad[V];
      load_values<V>(grad, grad_output + (at.quotient * channels + turn * V));
      DCN_UNROLL
      for (int e = 0; e < V; ++e) grad[e] *= weight[at.remainder * channels + turn * V + e];
      store_values<V>(grad_columns + (place.number * channels + turn * V), grad);
    }
  }
};

// The gradient of the weight by parts: over the pixels of each share. One element: a channel and tap of a share.
template <typename A, typename M>
struct SumShares {
  static constexpr int64_t kPixels = 64;  // of a share

  int64_t pixels, taps, channels;
  const M* columns;      // [pixels, taps, C]
  const M* grad_output;  // [pixels, C]
  A* sums;               // [shares, taps, C]

  DCN_HOST_DEVICE static int64_t shares_of(int64_t pixels) { return (pixels + kPixels - 1) / kPixels; }
  DCN_HOST_DEVICE int64_t size() const { return shares_of(pixels) * taps * channels; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t row = taps * channels, share = i / row, at = i - share * row, c = at % channels;
    const int64_t last = (share + 1) * kPixels < pixels ? (share + 1) * kPixels : pixels;
    A sum = 0;
    for (int64_t p = share * kPixels; p < last; ++p)
      sum += static_cast<A>(columns[p * row + at]) * static_cast<A>(grad_output[p * channels + c]);
    sums[i] = sum;
  }
};

// grad_weight [C, taps] += the shares, in order.
template <typename A>
struct AddShares {
  int64_t shares, taps, channels;
  const A* sums;  // [shares, taps, C]
  A* grad_weight;

  DCN_HOST_DEVICE int64_t size() const { return taps * channels; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    A sum = 0;
    for (int64_t s = 0; s < shares; ++s) sum += sums[s * size() + i];
    grad_weight[i % channels * taps + i / channels] += sum;
  }
};

}  // namespace dcn
