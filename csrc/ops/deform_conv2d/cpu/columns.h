// Deformable convolution on the CPU, sampling: the columns of a tile and a block of channels, by the addresses of its
// taps.
#pragma once

#include "taps.h"

namespace dcn::tiles {

// A view of the taps of one run: its planes, and where its channels begin behind an address.
template <typename A>
struct RunTaps {
  Taps<A> taps;
  int64_t first_plane, channel;

  DCN_HOST_DEVICE int64_t at(int64_t k, int64_t q) const { return (first_plane + k) * taps.pixels + q; }
  DCN_HOST_DEVICE const A* value(int corner, int64_t at) const {
    return reinterpret_cast<const A*>(taps.value[corner][at]) + channel;
  }
};

// Calls f with the number of channels as a constant where it is a usual one, 0 where it is not: short loops of known
// length need no loop.
template <typename F>
DCN_HOST_DEVICE void with_channels(int64_t count, const F& f) {
  if (count == 64) return f(std::integral_constant<int64_t, 64>());
  if (count == 32) return f(std::integral_constant<int64_t, 32>());
  if (count == 16) return f(std::integral_constant<int64_t, 16>());
  f(std::integral_constant<int64_t, 0>());
}

template <int64_t N, typename A>
DCN_HOST_DEVICE void sample_run(const RunTaps<A>& run, int64_t at, int64_t count, A* __restrict out) {
  const A *c0 = run.value(0, at), *c1 = run.value(1, at), *c2 = run.value(2, at), *c3 = run.value(3, at);
  const A w0 = run.taps.weight[0][at], w1 = run.taps.weight[1][at];
  const A w2 = run.taps.weight[2][at], w3 = run.taps.weight[3][at];
  const int64_t channels = N ? N : count;
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) out[c] = w0 * c0[c] + w1 * c1[c] + w2 * c2[c] + w3 * c3[c];
}

// The columns of a run of channels, whose first lies at `columns`.
template <typename A>
struct FillRun {
  RunTaps<A> run;
  int64_t count, channels, kernel;
  A* columns;
  int64_t tap_stride, pixel_stride;
  const void* const* ahead;
  int64_t lines;

  DCN_HOST_DEVICE void operator()() const {
    const int64_t each = divide_up(lines, count);
    with_channels(channels, [&](auto n) DCN_INLINE_LAMBDA {
      for (int64_t q = 0, line = 0; q < count; ++q) {
        for (const int64_t until = line + each < lines ? line + each : lines; line < until; ++line)
          prefetch(ahead[line]);
        for (int64_t k = 0; k < kernel; ++k)
          sample_run<n.value>(run, run.at(k, q), channels, columns + k * tap_stride + q * pixel_stride);
      }
    });
  }
};

// products[pixel, channel] += sum_k weight[k, channel] * columns[k, channel]: without columns, the sums of some
// channels staying in a vector for all taps.
template <typename A>
struct DepthwiseRun {
  RunTaps<A> run;
  int64_t count, channels, kernel;
  const A* weight;
  int64_t weight_stride;
  A* products;
  int64_t pixel_stride;

  DCN_HOST_DEVICE void operator()() const {
    constexpr int64_t lanes = 16;
    for (int64_t q = 0; q < count; ++q)
      for (int64_t first = 0; first < channels; first += lanes) {
        if (channels - first >= lanes)
          add<lanes>(q, first, lanes);
        else
          add<0>(q, first, channels - first);
      }
  }
  template <int64_t N>
  DCN_HOST_DEVICE void add(int64_t q, int64_t first, int64_t some) const {
    const int64_t length = N ? N : some;
    A sums[N ? N : 16] = {};
    for (int64_t k = 0; k < kernel; ++k) {
      keep_iterations_apart();
      const int64_t at = run.at(k, q);
      const A *c0 = run.value(0, at) + first, *c1 = run.value(1, at) + first;
      const A *c2 = run.value(2, at) + first, *c3 = run.value(3, at) + first;
      const A w0 = run.taps.weight[0][at], w1 = run.taps.weight[1][at];
      const A w2 = run.taps.weight[2][at], w3 = run.taps.weight[3][at];
      const A* const w = weight + k * weight_stride + first;
#pragma omp simd
      for (int64_t c = 0; c < length; ++c) sums[c] += w[c] * (w0 * c0[c] + w1 * c1[c] + w2 * c2[c] + w3 * c3[c]);
    }
    A* const out = products + q * pixel_stride + first;
#pragma omp simd
    for (int64_t c = 0; c < length; ++c) out[c] += sums[c];
  }
};

// The columns of a run straight from an image of any layout: for taps that lie so far apart that no window holds them.
template <typename A, typename S>
struct GatherRun {
  ConvGeometry g;
  Tile tile;
  Taps<A> taps;
  int64_t first_plane, count, channels;
  View<const S> input;
  int64_t image, channel;  // of tile.n and of the run
  A* columns;
  int64_t tap_stride, pixel_stride;

  void operator()() const {
    const int64_t per_image = tile.rows * tile.columns;
    for (int64_t q = 0; q < count; ++q)
      for (int64_t k = 0; k < g.taps(); ++k) {
        const int64_t at = (first_plane + k) * taps.pixels + q;
        A* const out = columns + k * tap_stride + q * pixel_stride;
        // Weights of corners that are not read are 0, or NaN where that is to show.
        A none = 0;
        for (int c = 0; c < 4; ++c)
          if (!(taps.corners[at] >> (4 + c) & 1)) none += taps.weight[c][at];
        std::fill_n(out, channels, none);
        for (int c = 0; c < 4; ++c) {
          if (!(taps.corners[at] >> (4 + c) & 1)) continue;
          const S* const from =
              &input.at(image + q / per_image, channel, taps.y0[at] + (c >> 1), taps.x0[at] + (c & 1));
          for (int64_t i = 0; i < channels; ++i) out[i] += taps.weight[c][at] * static_cast<A>(from[i * input.c]);
        }
      }
  }
};

// Cache lines that will be wanted next, asked for in between: many at once are dropped by some processors.
struct Ahead {
  static constexpr int64_t most = 1024;
  const void** lines;
  int64_t count = 0;

  explicit Ahead(Scratch& scratch) : lines(scratch.take<const void*>(most)) {}
};

// The part of the input that a tile will read with offsets of a few pixels, from row `first_row` on: samples come in no
// order that the processor foresees.
template <typename S>
void look_ahead(const ConvGeometry& g, const Tile& tile, int64_t first_row, const View<const S>& input, int64_t image,
                int64_t channel, int64_t channels, Ahead& ahead) {
  constexpr int64_t margin = 3, line = 64 / sizeof(S);
  const int64_t reach_y = (g.kernel_h - 1) * g.dilation_h + 1 + margin, reach_x = (g.kernel_w - 1) * g.dilation_w + 1;
  const int64_t top = std::max({first_row, g.start_y(tile.y) - margin, int64_t{0}});
  const int64_t bottom = std::min(g.height, g.start_y(tile.y + tile.rows - 1) + reach_y);
  const int64_t left = std::max<int64_t>(0, g.start_x(tile.x) - margin);
  const int64_t right = std::min(g.width, g.start_x(tile.x + tile.columns - 1) + reach_x + margin);
  // Along what lies together, line by line.
  const bool channels_together = input.c == 1;
  const int64_t count = channels_together ? right - left : channels, stride = channels_together ? input.w : input.c;
  const int64_t length = channels_together ? channels : right - left;
  ahead.count = 0;
  for (int64_t n = image + tile.n; n < image + tile.n + tile.images; ++n)
    for (int64_t y = top; y < bottom; ++y)
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < length && ahead.count < Ahead::most; j += line)
          ahead.lines[ahead.count++] = &input.at(n, channel, y, left) + i * stride + j;
}

// The first row that a tile's prefetched part does not hold, if the tile after it continues it; else 0.
inline int64_t row_after(const ConvGeometry& g, const Tile& tile, const Tile& next) {
  if (next.n != tile.n || next.x != tile.x) return 0;
  return g.start_y(tile.y + tile.rows - 1) + (g.kernel_h - 1) * g.dilation_h + 4;
}

// A window of some channels as rows.
template <typename A, typename S>
void load_window(const Tile& tile, const Window& window, const View<const S>& input, int64_t image, int64_t channel,
                 int64_t channels, A* rows) {
  for (int64_t n = 0; n < tile.images; ++n)
    for (int64_t y = 0; y < window.height; ++y)
      run_vectorised(TransposeRow<A, const S, Turn::kToRows>{
          &input.at(image + tile.n + n, channel, window.y + y, window.x), input.c, input.w, channels, window.width,
          rows + (n * window.height + y) * window.width * channels, channels});
}

// Channels of a block that fit into a window's memory at a time; 0 if not even one vector's worth does.
template <typename A>
int64_t window_channels(const Tile& tile, const Window& window, int64_t channels) {
  const int64_t fitting = window_bytes / std::max<int64_t>(1, tile.images * window.pixels() * sizeof(A));
  if (fitting >= channels) return channels;
  return fitting / 16 * 16;
}

}  // namespace dcn::tiles
