// Deformable convolution on the CPU, sampling: the columns of a tile and a block of channels, from the taps' addresses
// and weights.
#pragma once

#include "taps.h"

namespace dcn::tiles {

// The taps of one run: the planes of its offset group, and which channel of an address is its first.
template <typename A>
struct RunTaps {
  Taps<A> taps;
  int64_t first_plane, channel;

  DCN_HOST_DEVICE int64_t at(int64_t k, int64_t q) const { return (first_plane + k) * taps.stride + q; }
  DCN_HOST_DEVICE const A* value(int corner, int64_t at) const {
    return reinterpret_cast<const A*>(taps.value[corner][at]) + channel;
  }
};

// Calls f with the number of channels as a constant if that is common, so that short loops are unrolled; else with 0.
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

// Fills the columns of a run, the first of which lies at `columns`, and meanwhile prefetches `lines` cache lines.
template <typename A>
struct FillRun {
  RunTaps<A> run;
  int64_t count, channels, kernel;
  A* columns;
  int64_t tap_stride, pixel_stride;
  const void* const* next;  // cache lines to prefetch
  int64_t lines;

  DCN_HOST_DEVICE void operator()() const {
    const int64_t each = divide_up(lines, count);
    with_channels(channels, [&](auto n) DCN_INLINE_LAMBDA {
      for (int64_t q = 0, line = 0; q < count; ++q) {
        for (const int64_t until = line + each < lines ? line + each : lines; line < until; ++line)
          prefetch(next[line]);
        for (int64_t k = 0; k < kernel; ++k)
          sample_run<n.value>(run, run.at(k, q), channels, columns + k * tap_stride + q * pixel_stride);
      }
    });
  }
};

// The same into columns of bfloat16, rounded once.
struct FillRounded {
  RunTaps<float> run;
  int64_t count, channels, kernel;
  BFloat16* columns;
  int64_t tap_stride, pixel_stride;
  const void* const* next;
  int64_t lines;

  DCN_HOST_DEVICE void operator()() const {
    float sums[block_channels];
    for (int64_t q = 0; q < count; ++q)
      for (int64_t k = 0; k < kernel; ++k) {
        sample_run<0>(run, run.at(k, q), channels, sums);
        RoundRow{sums, channels, columns + k * tap_stride + q * pixel_stride}();
      }
  }
};

#if defined(DCN_X86_LEVELS)
struct FillRoundedNatively {
  FillRounded fill;

  DCN_TARGET_BFLOAT16 void operator()() const {
    const int64_t each = divide_up(fill.lines, fill.count);
    for (int64_t q = 0, line = 0; q < fill.count; ++q) {
      for (const int64_t until = line + each < fill.lines ? line + each : fill.lines; line < until; ++line)
        prefetch(fill.next[line]);
      for (int64_t k = 0; k < fill.kernel; ++k)
        sample(fill.run.at(k, q), fill.columns + k * fill.tap_stride + q * fill.pixel_stride);
    }
  }
  DCN_TARGET_BFLOAT16 void sample(int64_t at, BFloat16* to) const {
    const float *const c0 = fill.run.value(0, at), *const c1 = fill.run.value(1, at);
    const float *const c2 = fill.run.value(2, at), *const c3 = fill.run.value(3, at);
    const Taps<float>& taps = fill.run.taps;
    const __m512 w0 = _mm512_set1_ps(taps.weight[0][at]), w1 = _mm512_set1_ps(taps.weight[1][at]);
    const __m512 w2 = _mm512_set1_ps(taps.weight[2][at]), w3 = _mm512_set1_ps(taps.weight[3][at]);
    int64_t c = 0;
    // Without masks where they are not needed: some processors take several times as long to store with one.
    for (; c + 32 <= fill.channels; c += 32) {
      __m512 first = w0 * _mm512_loadu_ps(c0 + c), second = w0 * _mm512_loadu_ps(c0 + c + 16);
      first += w1 * _mm512_loadu_ps(c1 + c), second += w1 * _mm512_loadu_ps(c1 + c + 16);
      first += w2 * _mm512_loadu_ps(c2 + c), second += w2 * _mm512_loadu_ps(c2 + c + 16);
      first += w3 * _mm512_loadu_ps(c3 + c), second += w3 * _mm512_loadu_ps(c3 + c + 16);
      _mm512_storeu_si512(to + c, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
    }
    for (; c < fill.channels; c += 16) {
      const __mmask16 some = lanes_of(fill.channels - c);
      __m512 sum = w0 * _mm512_maskz_loadu_ps(some, c0 + c);
      sum += w1 * _mm512_maskz_loadu_ps(some, c1 + c);
      sum += w2 * _mm512_maskz_loadu_ps(some, c2 + c);
      sum += w3 * _mm512_maskz_loadu_ps(some, c3 + c);
      store_rounded(sum, some, to + c);
    }
  }
};
#endif

inline void fill_rounded(const FillRounded& fill) {
#if defined(DCN_X86_LEVELS)
  if (has_bfloat16_products()) return FillRoundedNatively{fill}();
#endif
  run_vectorised(fill);
}

// products[pixel, channel] += sum over taps of weight[tap, channel] * column[tap, channel], without columns in memory:
// the sums of 16 channels stay in registers for all taps.
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

// Cache lines to prefetch, a few at a time while other work goes on: some processors drop many requests at once.
struct PrefetchList {
  static constexpr int64_t capacity = 1024;
  const void** lines;
  int64_t count = 0;

  explicit PrefetchList(Scratch& scratch) : lines(scratch.take<const void*>(capacity)) {}
};

// Lists what a tile will read of the input if offsets are no longer than a few pixels, from row `first_row` on. The
// processor's own prefetching fails here, since samples lie in no regular order.
template <typename S>
void list_lines(const ConvGeometry& g, const Tile& tile, int64_t first_row, const View<const S>& input, int64_t image,
                int64_t channel, int64_t channels, PrefetchList& list) {
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
  list.count = 0;
  for (int64_t n = image + tile.n; n < image + tile.n + tile.images; ++n)
    for (int64_t y = top; y < bottom; ++y)
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < length && list.count < PrefetchList::capacity; j += line)
          list.lines[list.count++] = &input.at(n, channel, y, left) + i * stride + j;
}

// The first row that has not been prefetched for `tile`, if `next` lies below it; else 0.
inline int64_t row_after(const ConvGeometry& g, const Tile& tile, const Tile& next) {
  if (next.n != tile.n || next.x != tile.x) return 0;
  return g.start_y(tile.y + tile.rows - 1) + (g.kernel_h - 1) * g.dilation_h + 4;
}

// Copies some channels of a window into rows.
template <typename A, typename S>
void load_window(const Tile& tile, const Window& window, const View<const S>& input, int64_t image, int64_t channel,
                 int64_t channels, A* rows) {
  for (int64_t n = 0; n < tile.images; ++n)
    for (int64_t y = 0; y < window.height; ++y)
      run_vectorised(TransposeRow<A, const S, Transpose::kToRows>{
          &input.at(image + tile.n + n, channel, window.y + y, window.x), input.c, input.w, channels, window.width,
          rows + (n * window.height + y) * window.width * channels, channels});
}

// How many channels of a block fit into a window's memory at a time; 0 if not even 16 do.
template <typename A>
int64_t window_channels(const Tile& tile, const Window& window, int64_t channels) {
  const int64_t fitting = window_bytes / std::max<int64_t>(1, tile.images * window.pixels() * sizeof(A));
  if (fitting >= channels) return channels;
  return fitting / 16 * 16;
}

}  // namespace dcn::tiles
