// The backward's pass over the taps of a pixel on the CPU, in vectors over its channels. Dots: products of the result's
// gradient with the corners, which hold the gradients of position and weight. Scatter: the gradient of the value.
#pragma once

#include "taps.h"

namespace dcn::tiles::aggregate {

// dot[corner] of pixel p += gradient * value at the corner, for N channels.
template <int N, typename A>
DCN_HOST_DEVICE void dot_corners(Tap<A>& t, int64_t p, const Corners& corners, const A (&grad)[N]) {
  constexpr int64_t part = 8;
  const int64_t offset = t.offset[p];
  const A* const v0 = corners.at<const A>(offset, 0);
  const A* const v1 = corners.at<const A>(offset, 1);
  const A* const v2 = corners.at<const A>(offset, 2);
  const A* const v3 = corners.at<const A>(offset, 3);
  A d[4][part] = {};
  for (int64_t i = 0; i < N; i += part) {
#pragma omp simd
    for (int64_t l = 0; l < part; ++l) {
      d[0][l] += grad[i + l] * v0[i + l];
      d[1][l] += grad[i + l] * v1[i + l];
      d[2][l] += grad[i + l] * v2[i + l];
      d[3][l] += grad[i + l] * v3[i + l];
    }
  }
  add_lanes(d, t.dot + 4 * p);
}

// Gradient of the value at the corners += weight * gradient. The corners are different pixels: they may be added to in
// any order.
template <int N, typename A>
DCN_HOST_DEVICE void scatter_corners(const Tap<A>& t, int64_t p, const Corners& corners, const A (&grad)[N]) {
  const int64_t offset = t.offset[p];
  A* const g0 = corners.at<A>(offset, 0);
  A* const g1 = corners.at<A>(offset, 1);
  A* const g2 = corners.at<A>(offset, 2);
  A* const g3 = corners.at<A>(offset, 3);
  const A w0 = t.weight[0][p], w1 = t.weight[1][p], w2 = t.weight[2][p], w3 = t.weight[3][p];
#pragma omp simd
  for (int c = 0; c < N; ++c) {
    g0[c] += w0 * grad[c];
    g1[c] += w1 * grad[c];
    g2[c] += w2 * grad[c];
    g3[c] += w3 * grad[c];
  }
}

// Both for the taps of pixel p, the gradient of whose result is `gradient`; `values` and `grads` from channel 0 on.
template <bool Dots, bool Scatter, typename A>
DCN_HOST_DEVICE void sweep(Tap<A>* taps, int64_t points, const MapShape& shape, const A* value, const A* grad_value,
                           int64_t p, const A* gradient) {
  for_each_vector(shape.channels, [&](auto width, int64_t channel) DCN_INLINE_LAMBDA {
    constexpr int N = decltype(width)::value;
    const Corners values = Corners::of(shape, value, channel), grads = Corners::of(shape, grad_value, channel);
    A grad[N];
#pragma omp simd
    for (int c = 0; c < N; ++c) grad[c] = gradient[channel + c];
    Tap<A>*t = taps, *const end = taps + points;
    do {
      keep_iterations_apart();
      if constexpr (Dots) dot_corners<N>(*t, p, values, grad);
      if constexpr (Scatter) scatter_corners<N>(*t, p, grads, grad);
    } while (++t != end);
  });
}

// The same where something is not finite: only at the corners that are read or, for dots, lie on the map.
template <bool Dots, bool Scatter, typename A>
DCN_HOST_DEVICE void sweep_exactly(Tap<A>* taps, int64_t points, const MapShape& shape, const A* value,
                                   const A* grad_value, int64_t p, const A* gradient) {
  const Corners values = Corners::of(shape, value), grads = Corners::of(shape, grad_value);
  for (Tap<A>* t = taps; t != taps + points; ++t)
    for (int corner = 0; corner < 4; ++corner) {
      const A* const v = values.at<const A>(t->offset[p], corner);
      A* const to = grads.at<A>(t->offset[p], corner);
      for (int64_t c = 0; c < shape.channels; ++c) {
        if (Dots && t->corners[p] >> corner & 1) t->dot[4 * p + corner] += gradient[c] * v[c];
        if (Scatter && t->reads(p, corner)) to[c] += t->weight[corner][p] * gradient[c];
      }
    }
}

// From dots to the gradients of position and weight, which take the places of what was given: offsets (in pixels) and
// weights. The same sums as interpolate_gradient (sampling.h).
template <bool Exact, typename A>
DCN_HOST_DEVICE void find_gradients(const Tap<A>* taps, int64_t points, bool x_first, A scale, A* pairs, A* weights) {
  for (int64_t k = 0; k < points; ++k) {
    keep_iterations_apart();
    const Tap<A>& t = taps[k];
    A *const plane = pairs + 2 * k * lanes, *const weight = weights + k * lanes;
    A *const by_x = x_first ? plane : plane + lanes, *const by_y = x_first ? plane + lanes : plane;
#pragma omp simd
    for (int64_t p = 0; p < lanes; ++p) {
      Sample<A, Index> s{};
      s.ly = t.fraction_y[p];
      s.lx = t.fraction_x[p];
      const A d0 = t.dot[4 * p], d1 = t.dot[4 * p + 1], d2 = t.dot[4 * p + 2], d3 = t.dot[4 * p + 3];
      A m0 = d0, m1 = d1, m2 = d2, m3 = d3;
      A v0 = s.weight(0) * d0, v1 = s.weight(1) * d1, v2 = s.weight(2) * d2, v3 = s.weight(3) * d3;
      if constexpr (Exact) {
        // What is off the map has a gradient's product with zeros: 0, unless that is not finite.
        const Index corners = t.corners[p];
        m0 = corners & 1 ? d0 : A(0), m1 = corners & 2 ? d1 : A(0);
        m2 = corners & 4 ? d2 : A(0), m3 = corners & 8 ? d3 : A(0);
        v0 = corners & 16 ? v0 : A(0), v1 = corners & 32 ? v1 : A(0);
        v2 = corners & 64 ? v2 : A(0), v3 = corners & 128 ? v3 : A(0);
      }
      const A dy = s.weight_dy(0) * m0 + s.weight_dy(1) * m1 + s.weight_dy(2) * m2 + s.weight_dy(3) * m3;
      const A dx = s.weight_dx(0) * m0 + s.weight_dx(1) * m1 + s.weight_dx(2) * m2 + s.weight_dx(3) * m3;
      const A m = weight[p];
      by_y[p] = m * (s.origin() + dy) * scale;
      by_x[p] = m * (s.origin() + dx) * scale;
      weight[p] = s.origin() + (v0 + v1 + v2 + v3);
    }
  }
}

// From the gradients of weights to those of the logits that they follow from.
template <typename A>
DCN_HOST_DEVICE void through_softmax(int64_t points, const A* weights, A* grads) {
  A mean[lanes] = {};
  for (int64_t k = 0; k < points; ++k) {
    keep_iterations_apart();
#pragma omp simd
    for (int64_t p = 0; p < lanes; ++p) mean[p] += weights[k * lanes + p] * grads[k * lanes + p];
  }
  for (int64_t k = 0; k < points; ++k) {
    keep_iterations_apart();
#pragma omp simd
    for (int64_t p = 0; p < lanes; ++p)
      grads[k * lanes + p] = weights[k * lanes + p] * (grads[k * lanes + p] - mean[p]);
  }
}

}  // namespace dcn::tiles::aggregate
