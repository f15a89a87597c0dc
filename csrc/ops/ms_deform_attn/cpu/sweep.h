// Multi-scale deformable attention on the CPU, the backward's pass over the points of a head, in vectors over its
// channels. Dots: products of the result's gradient with the corners, which hold the gradients of position and weight.
// Scatter: the gradient of the value.
#pragma once

#include "../../../runtime/cpu_rows.h"
#include "gather.h"

namespace dcn::tiles::attention {

// dot[corner] of point i += gradient * value at the corner, for N channels from `channel` on.
template <int N, typename S, typename A>
DCN_HOST_DEVICE void dot_corners(Points<A>& p, int64_t i, int64_t channel, const A (&grad)[N]) {
  constexpr int64_t width = N < 16 ? N : 16;
  const S* const v0 = corner_at<S, const S>(p.value[0][i], channel);
  const S* const v1 = corner_at<S, const S>(p.value[1][i], channel);
  const S* const v2 = corner_at<S, const S>(p.value[2][i], channel);
  const S* const v3 = corner_at<S, const S>(p.value[3][i], channel);
  A d[4][width] = {};
  for (int64_t first = 0; first < N; first += width) {
#pragma omp simd
    for (int64_t l = 0; l < width; ++l) {
      const int64_t c = first + l;
      d[0][l] += grad[c] * widen(v0[c]);
      d[1][l] += grad[c] * widen(v1[c]);
      d[2][l] += grad[c] * widen(v2[c]);
      d[3][l] += grad[c] * widen(v3[c]);
    }
  }
  add_lanes(d, p.dot + 4 * i);
}

// The same for half values, read in pairs: `grad` has the channels that come first in them, then those that come
// second.
template <int N, typename S, typename A>
DCN_HOST_DEVICE void dot_pairs(Points<A>& p, int64_t i, int64_t channel, const A (&grad)[N]) {
  constexpr int64_t pairs = N / 2, width = pairs < 16 ? pairs : 16;
  const Pair* const v0 = corner_at<S, const Pair>(p.value[0][i], channel);
  const Pair* const v1 = corner_at<S, const Pair>(p.value[1][i], channel);
  const Pair* const v2 = corner_at<S, const Pair>(p.value[2][i], channel);
  const Pair* const v3 = corner_at<S, const Pair>(p.value[3][i], channel);
  A d[4][width] = {};
  for (int64_t first = 0; first < pairs; first += width) {
#pragma omp simd
    for (int64_t l = 0; l < width; ++l) {
      const int64_t c = first + l;
      const uint32_t p0 = v0[c], p1 = v1[c], p2 = v2[c], p3 = v3[c];
      d[0][l] += grad[c] * first_of<S>(p0) + grad[pairs + c] * second_of<S>(p0);
      d[1][l] += grad[c] * first_of<S>(p1) + grad[pairs + c] * second_of<S>(p1);
      d[2][l] += grad[c] * first_of<S>(p2) + grad[pairs + c] * second_of<S>(p2);
      d[3][l] += grad[c] * first_of<S>(p3) + grad[pairs + c] * second_of<S>(p3);
    }
  }
  add_lanes(d, p.dot + 4 * i);
}

// Gradient of the value at the corners of point i += weight * gradient, for N channels from `channel` on.
template <int N, typename A>
DCN_HOST_DEVICE void scatter_corners(const Points<A>& p, int64_t i, int64_t channel, const A (&grad)[N]) {
  A* const g0 = corner_at<A, A>(p.grad[0][i], channel);
  A* const g1 = corner_at<A, A>(p.grad[1][i], channel);
  A* const g2 = corner_at<A, A>(p.grad[2][i], channel);
  A* const g3 = corner_at<A, A>(p.grad[3][i], channel);
  const A w0 = p.weight[0][i], w1 = p.weight[1][i], w2 = p.weight[2][i], w3 = p.weight[3][i];
  // The four corners are different rows, or that which nobody reads: they may be added to in any order.
#pragma omp simd
  for (int64_t c = 0; c < N; ++c) {
    g0[c] += w0 * grad[c];
    g1[c] += w1 * grad[c];
    g2[c] += w2 * grad[c];
    g3[c] += w3 * grad[c];
  }
}

// Both for the points [first, first + count) of a head, the gradient of whose result is `gradient`.
template <bool Dots, bool Scatter, typename S, typename A>
DCN_HOST_DEVICE void sweep(Points<A>& p, int64_t first, int64_t count, int64_t channels, const A* gradient) {
  for_each_block(channels, [&](auto block, int64_t channel) DCN_INLINE_LAMBDA {
    constexpr int n = decltype(block)::value;
    constexpr bool pairs = Dots && sizeof(S) == 2 && n > 1;
    A grad[n], paired[n];
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) grad[c] = gradient[channel + c];
    if constexpr (pairs) {
#pragma omp simd
      for (int64_t c = 0; c < n / 2; ++c) {
        paired[c] = gradient[channel + 2 * c];
        paired[n / 2 + c] = gradient[channel + 2 * c + 1];
      }
    }
    for (int64_t i = first; i < first + count; ++i) {
      keep_iterations_apart();
      if constexpr (Dots) {
        fetch_corners<n, S>(p.value, i + fetch_ahead, channel);
        if constexpr (pairs)
          dot_pairs<n, S>(p, i, channel, paired);
        else
          dot_corners<n, S>(p, i, channel, grad);
      }
      if constexpr (Scatter) {
        fetch_corners<n, A>(p.grad, i + fetch_ahead, channel);
        scatter_corners<n>(p, i, channel, grad);
      }
    }
  });
}

}  // namespace dcn::tiles::attention
