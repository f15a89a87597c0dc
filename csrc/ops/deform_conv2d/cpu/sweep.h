// Deformable convolution on the CPU, the backward's sweep: one pass over the gradient of the columns of a tile and a
// run of channels makes up to three things. Dots: products with the corners, which hold the gradients of offset and
// mask. Scatter: the gradient of the input. Columns: the columns themselves, which overwrite their gradient, for the
// gradient of the weights.
#pragma once

#include "columns.h"

namespace dcn::tiles {

// Of one tap, for each channel:
//   Dots:    dot[corner] += gradient of the column * value at the corner
//   Scatter: gradient of the input at the corner += weight[corner] * gradient of the column
//   Columns: column = sum over corners of weight[corner] * value at the corner, in place of its gradient
// Whole: some corner on the map has no weight. N: the number of channels, or 0 if that is only known in `count`.
template <int64_t N, bool Dots, bool Scatter, bool Columns, bool Whole, typename A>
DCN_HOST_DEVICE void sweep_taps(const RunTaps<A>& run, int64_t at, int64_t count, const A* zeros, A* columns) {
  const Taps<A>& taps = run.taps;
  const A *v0 = run.value(0, at), *v1 = run.value(1, at), *v2 = run.value(2, at), *v3 = run.value(3, at);
  // A corner without weight is replaced by zeros for the columns, since its value may be infinite; dots read it.
  const Index corners = Whole ? taps.corners[at] : 0;
  const A *u0 = Whole && !(corners & 16) ? zeros : v0, *u1 = Whole && !(corners & 32) ? zeros : v1;
  const A *u2 = Whole && !(corners & 64) ? zeros : v2, *u3 = Whole && !(corners & 128) ? zeros : v3;
  const auto target = [&](int c) DCN_INLINE_LAMBDA {
    return Scatter ? reinterpret_cast<A*>(taps.grad[c][at]) + run.channel : nullptr;
  };
  A *g0 = target(0), *g1 = target(1), *g2 = target(2), *g3 = target(3);
  const A w0 = taps.weight[0][at], w1 = taps.weight[1][at], w2 = taps.weight[2][at], w3 = taps.weight[3][at];
  constexpr int64_t lanes = 16;
  A d[4][lanes] = {};
  const int64_t channels = N ? N : count;
  for (int64_t first = 0; first < channels; first += lanes) {
    const int64_t some = N || channels - first > lanes ? lanes : channels - first;
    // The four corners are different rows, or the sink, which nobody reads: they may be added to in any order.
#pragma omp simd
    for (int64_t i = 0; i < some; ++i) {
      const int64_t c = first + i;
      const A grad = Dots || Scatter ? columns[c] : A(0);
      if constexpr (Dots) {
        d[0][i] += grad * v0[c];
        d[1][i] += grad * v1[c];
        d[2][i] += grad * v2[c];
        d[3][i] += grad * v3[c];
      }
      if constexpr (Columns) {
        if constexpr (Whole)
          columns[c] = w0 * u0[c] + w1 * u1[c] + w2 * u2[c] + w3 * u3[c];
        else
          columns[c] = w0 * v0[c] + w1 * v1[c] + w2 * v2[c] + w3 * v3[c];
      }
      if constexpr (Scatter) {
        g0[c] += w0 * grad;
        g1[c] += w1 * grad;
        g2[c] += w2 * grad;
        g3[c] += w3 * grad;
      }
    }
  }
  if constexpr (Dots) add_lanes(d, taps.dot + 4 * at);
}

template <typename A, bool Dots, bool Scatter, bool Columns>
struct SweepRun {
  RunTaps<A> run;
  int64_t count, channels, kernel;
  const A* zeros;
  A* columns;
  int64_t tap_stride, pixel_stride;

  DCN_HOST_DEVICE void operator()() const {
    with_channels(channels, [&](auto n) DCN_INLINE_LAMBDA {
      for (int64_t q = 0; q < count; ++q)
        for (int64_t k = 0; k < kernel; ++k) {
          const int64_t at = run.at(k, q);
          A* const column = columns + k * tap_stride + q * pixel_stride;
          const Index corners = run.taps.corners[at];
          // Bits 0-3 are the corners on the map, bits 4-7 those with weight.
          if (Dots && Columns && (corners & 15 & ~(corners >> 4)))
            sweep_taps<n.value, Dots, Scatter, Columns, true>(run, at, channels, zeros, column);
          else
            sweep_taps<n.value, Dots, Scatter, Columns, false>(run, at, channels, zeros, column);
        }
    });
  }
};

// Calls f(dots, scatter, columns) with the three as constants.
template <typename F>
void with_wanted(bool dots, bool scatter, bool columns, const F& f) {
  using std::false_type;
  using std::true_type;
  if (dots && scatter && columns) return f(true_type(), true_type(), true_type());
  if (dots && scatter) return f(true_type(), true_type(), false_type());
  if (dots && columns) return f(true_type(), false_type(), true_type());
  if (scatter && columns) return f(false_type(), true_type(), true_type());
  if (dots) return f(true_type(), false_type(), false_type());
  if (scatter) return f(false_type(), true_type(), false_type());
  if (columns) return f(false_type(), false_type(), true_type());
}

// Turns the dots of each tap into the gradients of its offset and mask, and adds those.
template <typename A>
struct FinishDots {
  int64_t count, planes;
  Taps<A> taps;
  const A* modulations;  // [plane, sample], as in `taps`
  A *offset, *mask;      // gradients, as in TileDisplacement

  DCN_HOST_DEVICE void operator()() const {
    for (int64_t i = 0; i < planes; ++i) {
      const int64_t at = i * taps.stride;
      const A* const dots = taps.dot + 4 * at;
      const A *ly = taps.ly + at, *lx = taps.lx + at, *modulation = modulations + at;
      const Index* corners = taps.corners + at;
      A *to_y = offset + 2 * at, *to_x = to_y + taps.stride, *to_value = mask + at;
#pragma omp simd
      for (int64_t q = 0; q < count; ++q) {
        Sample<A, Index> s{};
        s.ly = ly[q], s.lx = lx[q], s.corners = static_cast<unsigned>(corners[q]);
        const A m = modulation[q], none = s.origin();
        const Index bits = corners[q];
        const A f0 = bits & 16 ? s.weight(0) * dots[4 * q + 0] : A(0),
                f1 = bits & 32 ? s.weight(1) * dots[4 * q + 1] : A(0);
        const A f2 = bits & 64 ? s.weight(2) * dots[4 * q + 2] : A(0),
                f3 = bits & 128 ? s.weight(3) * dots[4 * q + 3] : A(0);
        // Slopes of corners off the map are left out, not multiplied by 0: they may be NaN.
        const A y0 = bits & 1 ? s.weight_dy(0) * dots[4 * q + 0] : A(0),
                y1 = bits & 2 ? s.weight_dy(1) * dots[4 * q + 1] : A(0);
        const A y2 = bits & 4 ? s.weight_dy(2) * dots[4 * q + 2] : A(0),
                y3 = bits & 8 ? s.weight_dy(3) * dots[4 * q + 3] : A(0);
        const A x0 = bits & 1 ? s.weight_dx(0) * dots[4 * q + 0] : A(0),
                x1 = bits & 2 ? s.weight_dx(1) * dots[4 * q + 1] : A(0);
        const A x2 = bits & 4 ? s.weight_dx(2) * dots[4 * q + 2] : A(0),
                x3 = bits & 8 ? s.weight_dx(3) * dots[4 * q + 3] : A(0);
        to_y[q] += m * (none + y0 + y1 + y2 + y3);
        to_x[q] += m * (none + x0 + x1 + x2 + x3);
        to_value[q] += none + f0 + f1 + f2 + f3;
      }
    }
  }
};

// The products of depthwise channels. columns[pixel, tap, channel] = weight * gradient of the output.
template <typename A>
struct DepthwiseColumnGradient {
  int64_t count, kernel, channels;
  const A *weight, *grad_output;  // [K, channels], [count, outputs] from the block's first
  int64_t outputs;
  A* columns;
  int64_t tap_stride, pixel_stride;
  DCN_HOST_DEVICE void operator()() const {
    for (int64_t q = 0; q < count; ++q)
      for (int64_t k = 0; k < kernel; ++k) {
        A* __restrict to = columns + k * tap_stride + q * pixel_stride;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) to[c] = weight[k * channels + c] * grad_output[q * outputs + c];
      }
  }
};

template <typename A>
struct DepthwiseWeightGradient {
  int64_t count, kernel, channels;
  const A *columns, *grad_output;
  int64_t tap_stride, pixel_stride, outputs;
  A* grad_weight;  // [K, channels], added to
  DCN_HOST_DEVICE void operator()() const {
    for (int64_t k = 0; k < kernel; ++k)
      for (int64_t q = 0; q < count; ++q) {
        const A* from = columns + k * tap_stride + q * pixel_stride;
        A* __restrict to = grad_weight + k * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) to[c] += from[c] * grad_output[q * outputs + c];
      }
  }
};

}  // namespace dcn::tiles
