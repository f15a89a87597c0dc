// The backward's pass over the points of a head on the CPU, in vectors over its channels. Dots: products of the
// result's gradient with the corners, which hold the gradients of position and weight. Scatter: the gradient of the
// value.
#pragma once

#include "cpu_gather.h"
#include "cpu_rows.h"

namespace dcn::tiles::attention {

// dot[corner] of point i += gradient * value at the corner, for N channels from `channel` on.
template <int N, typename S, typename A, typename Corners>
DCN_HOST_DEVICE void dot_corners(Points<A>& p, const Corners& corners, int64_t i, int64_t channel, const A (&grad)[N]) {
  constexpr int64_t width = N < 16 ? N : 16;
  const S* const v0 = channels_at<S, const S>(corners.at(i, 0), channel);
  const S* const v1 = channels_at<S, const S>(corners.at(i, 1), channel);
  const S* const v2 = channels_at<S, const S>(corners.at(i, 2), channel);
  const S* const v3 = channels_at<S, const S>(corners.at(i, 3), channel);
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
template <int N, typename S, typename A, typename Corners>
DCN_HOST_DEVICE void dot_pairs(Points<A>& p, const Corners& corners, int64_t i, int64_t channel, const A (&grad)[N]) {
  constexpr int64_t pairs = N / 2, width = pairs < 16 ? pairs : 16;
  const Pair* const v0 = channels_at<S, const Pair>(corners.at(i, 0), channel);
  const Pair* const v1 = channels_at<S, const Pair>(corners.at(i, 1), channel);
  const Pair* const v2 = channels_at<S, const Pair>(corners.at(i, 2), channel);
  const Pair* const v3 = channels_at<S, const Pair>(corners.at(i, 3), channel);
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
template <int N, typename A, typename Corners>
DCN_HOST_DEVICE void scatter_corners(const Points<A>& p, const Corners& corners, int64_t i, int64_t channel,
                                     const A (&grad)[N]) {
  A* const g0 = channels_at<A, A>(corners.at(i, 0), channel);
  A* const g1 = channels_at<A, A>(corners.at(i, 1), channel);
  A* const g2 = channels_at<A, A>(corners.at(i, 2), channel);
  A* const g3 = channels_at<A, A>(corners.at(i, 3), channel);
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
template <bool Dots, bool Scatter, typename S, typename A, typename Corners>
DCN_HOST_DEVICE void sweep(Points<A>& p, const Corners& values, const Corners& grads, int64_t first, int64_t count,
                           int64_t channels, const A* gradient) {
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
        fetch_corners<n, S>(values, i, channel);
        if constexpr (pairs)
          dot_pairs<n, S>(p, values, i, channel, paired);
        else
          dot_corners<n, S>(p, values, i, channel, grad);
      }
      if constexpr (Scatter) {
        fetch_corners<n, A>(grads, i, channel);
        scatter_corners<n>(p, grads, i, channel, grad);
      }
    }
  });
}

}  // namespace dcn::tiles::attention
