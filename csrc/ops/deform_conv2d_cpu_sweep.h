// Deformable convolution on the CPU, the sweep of the backward: over one tile and one block of channels, the dots
// (gradients of offset and mask), the scatter (gradient of the input) and the columns again (gradient of the weight).
#pragma once

#include "deform_conv2d_cpu.h"

namespace dcn::tiles {

// Where one tap read. Corners off the map point at a row of zeros, and into a row that nobody reads.
template <typename A>
struct GradientTap {
  Sample<A> sample;
  A mask;
  const A* value[4];
  const A* weighted[4];  // the same without corners of weight 0, so that 0 * inf cannot arise
  A* grad[4];
  A weight[4];
};

template <typename A>
struct FindGradientTaps {
  ConvGeometry g;
  Tile tile;
  const Pixel* pixels;
  Rows<const A> input;
  Rows<A> grad_input;
  const A *offset, *mask, *zeros;
  A* sink;
  GradientTap<A>* taps;  // [count, G, K]

  DCN_HOST_DEVICE void operator()() const {
    const int64_t planes = g.offset_groups * g.taps();
    for_each_tap(g, tile, pixels, offset, mask, [&](int64_t q, int64_t i, const Sample<A>& s, A m) DCN_INLINE_LAMBDA {
      find(q, taps[q * planes + i], s, m);
    });
  }
  DCN_HOST_DEVICE void find(int64_t q, GradientTap<A>& tap, const Sample<A>& s, A m) const {
    tap.sample = s;
    tap.mask = m;
    for (int c = 0; c < 4; ++c) {
      tap.weight[c] = s.has(c) ? s.weight(c) : s.origin();
      tap.value[c] = s.has(c) ? input.at(pixels[q].n, s.row(c), s.column(c)) : zeros;
      tap.weighted[c] = tap.weight[c] != 0 ? tap.value[c] : zeros;
      tap.grad[c] =
          s.has(c) && tap.weight[c] != 0 && grad_input.data ? grad_input.at(pixels[q].n, s.row(c), s.column(c)) : sink;
    }
  }
};

// dots[c] += grad_columns . corner c; grad_input corners += weight * mask * grad_columns; columns = mask * sum w *
// corner
template <typename A, bool Dots, bool Scatter, bool Columns>
DCN_HOST_DEVICE void sweep_run(const GradientTap<A>& tap, const Run& run, const A* __restrict grad_columns, A* dots,
                               A* __restrict columns) {
  const A *v0 = tap.value[0] + run.first, *v1 = tap.value[1] + run.first;
  const A *v2 = tap.value[2] + run.first, *v3 = tap.value[3] + run.first;
  const A *u0 = tap.weighted[0] + run.first, *u1 = tap.weighted[1] + run.first;
  const A *u2 = tap.weighted[2] + run.first, *u3 = tap.weighted[3] + run.first;
  A *g0 = tap.grad[0] + run.first, *g1 = tap.grad[1] + run.first;
  A *g2 = tap.grad[2] + run.first, *g3 = tap.grad[3] + run.first;
  const A w0 = tap.weight[0] * tap.mask, w1 = tap.weight[1] * tap.mask;
  const A w2 = tap.weight[2] * tap.mask, w3 = tap.weight[3] * tap.mask;
  A d0 = 0, d1 = 0, d2 = 0, d3 = 0;
  // Corners of one sample are different rows, or all the same sink: the order of its additions does not matter.
#pragma omp simd reduction(+ : d0, d1, d2, d3)
  for (int64_t c = 0; c < run.count; ++c) {
    if constexpr (Dots) {
      d0 += grad_columns[c] * v0[c];
      d1 += grad_columns[c] * v1[c];
      d2 += grad_columns[c] * v2[c];
      d3 += grad_columns[c] * v3[c];
    }
    if constexpr (Columns) columns[c] = w0 * u0[c] + w1 * u1[c] + w2 * u2[c] + w3 * u3[c];
    if constexpr (Scatter) {
      g0[c] += w0 * grad_columns[c];
      g1[c] += w1 * grad_columns[c];
      g2[c] += w2 * grad_columns[c];
      g3[c] += w3 * grad_columns[c];
    }
  }
  if constexpr (Dots) {
    dots[0] += d0;
    dots[1] += d1;
    dots[2] += d2;
    dots[3] += d3;
  }
}

template <typename A, bool Dots, bool Scatter, bool Columns>
struct SweepTile {
  ConvGeometry g;
  const Block& block;
  Tile tile;
  const Pixel* pixels;
  const GradientTap<A>* taps;
  const A* grad_columns;  // [count, K, block channels]
  A* columns;             // the same
  A* displaced;           // [n, G K (y, x, mask), H' W'], added to

  DCN_HOST_DEVICE void operator()() const {
    const int64_t kernel = g.taps(), planes = g.offset_groups * kernel;
    for (int64_t q = 0; q < tile.count; ++q) {
      const int64_t n = pixels[q].n, pixel = pixels[q].y * g.out_width + pixels[q].x;
      for (int64_t k = 0; k < kernel; ++k)
        for (const Run& run : block.runs) {
          const GradientTap<A>& tap = taps[q * planes + run.offset_group * kernel + k];
          const int64_t at = (q * kernel + k) * block.count + run.first - block.first;
          A dots[4] = {0, 0, 0, 0};
          sweep_run<A, Dots, Scatter, Columns>(tap, run, grad_columns + at, dots, columns + at);
          if constexpr (Dots) {
            A value = tap.sample.origin(), dy = value, dx = value;
            for (int c = 0; c < 4; ++c) {
              if (!tap.sample.has(c)) continue;
              if (tap.weight[c] != 0) value += tap.weight[c] * dots[c];
              dy += tap.sample.weight_dy(c) * dots[c];
              dx += tap.sample.weight_dx(c) * dots[c];
            }
            A* sums = displaced + (n * planes + run.offset_group * kernel + k) * 3 * g.out_pixels() + pixel;
            sums[0] += tap.mask * dy;
            sums[g.out_pixels()] += tap.mask * dx;
            sums[2 * g.out_pixels()] += value;
          }
        }
    }
  }
};

// The two products of a depthwise block, element by element.
template <typename A>
struct DepthwiseColumnGradient {
  int64_t count, kernel, channels, outputs;
  const A *weight, *grad_output;  // [K, channels], [count, O] from the block's first output
  A* grad_columns;
  DCN_HOST_DEVICE void operator()() const {
    for (int64_t q = 0; q < count; ++q)
      for (int64_t k = 0; k < kernel; ++k) {
        A* __restrict to = grad_columns + (q * kernel + k) * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) to[c] = weight[k * channels + c] * grad_output[q * outputs + c];
      }
  }
};

template <typename A>
struct DepthwiseWeightGradient {
  int64_t count, kernel, channels, outputs;
  const A *columns, *grad_output;
  A* grad_weight;  // [K, channels], added to
  DCN_HOST_DEVICE void operator()() const {
    for (int64_t q = 0; q < count; ++q)
      for (int64_t k = 0; k < kernel; ++k) {
        const A* from = columns + (q * kernel + k) * channels;
        A* __restrict to = grad_weight + k * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) to[c] += from[c] * grad_output[q * outputs + c];
      }
  }
};

// rows[pixel, output] of a tile, in the type of sums.
template <typename A, typename S>
struct LoadTile {
  int64_t count, outputs, channel_stride;
  const S* from;
  const int64_t* at;
  A* rows;
  DCN_HOST_DEVICE void operator()() const {
    for (int64_t first = 0; first < outputs; first += 16) {
      const int64_t width = outputs - first < 16 ? outputs - first : 16;
      for (int64_t q = 0; q < count; ++q)
        for (int64_t o = 0; o < width; ++o)
          rows[q * outputs + first + o] = static_cast<A>(from[at[q] + (first + o) * channel_stride]);
    }
  }
};

template <typename A>
void sweep(const SweepTile<A, true, true, true>& t, bool dots, bool scatter, bool columns) {
  const auto run = [&](auto d, auto s, auto c) {
    run_vectorised(SweepTile<A, d.value, s.value, c.value>{t.g, t.block, t.tile, t.pixels, t.taps, t.grad_columns,
                                                           t.columns, t.displaced});
  };
  using std::false_type;
  using std::true_type;
  if (dots && scatter && columns) return run(true_type{}, true_type{}, true_type{});
  // What is seldom asked for alone is done in sweeps of its own.
  if (dots) run(true_type{}, false_type{}, false_type{});
  if (scatter) run(false_type{}, true_type{}, false_type{});
  if (columns) run(false_type{}, false_type{}, true_type{});
}

}  // namespace dcn::tiles
