// Multi-scale deformable attention on the CPU, the backward's last step for a query: from dots to the gradients of
// locations (or offsets), weights (or logits) and reference points.
#pragma once

#include "points.h"

namespace dcn::tiles::attention {

// Gradients of position and weight of `count` points, in vectors; the same sums as interpolate_gradient (sampling.h).
template <typename A>
DCN_HOST_DEVICE void find_gradients(Points<A>& p, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    Sample<A, Index> s{};
    s.ly = p.fraction_y[i];
    s.lx = p.fraction_x[i];
    const Index corners = p.corners[i];
    const A d0 = p.dot[4 * i], d1 = p.dot[4 * i + 1], d2 = p.dot[4 * i + 2], d3 = p.dot[4 * i + 3];
    // What is off the map has a gradient's product with zeros: 0, unless that is not finite.
    const A m0 = corners & 1 ? d0 : A(0), m1 = corners & 2 ? d1 : A(0);
    const A m2 = corners & 4 ? d2 : A(0), m3 = corners & 8 ? d3 : A(0);
    const A v0 = corners & 16 ? s.weight(0) * d0 : A(0), v1 = corners & 32 ? s.weight(1) * d1 : A(0);
    const A v2 = corners & 64 ? s.weight(2) * d2 : A(0), v3 = corners & 128 ? s.weight(3) * d3 : A(0);
    const A dy = s.weight_dy(0) * m0 + s.weight_dy(1) * m1 + s.weight_dy(2) * m2 + s.weight_dy(3) * m3;
    const A dx = s.weight_dx(0) * m0 + s.weight_dx(1) * m1 + s.weight_dx(2) * m2 + s.weight_dx(3) * m3;
    p.by_weight[i] = s.origin() + (v0 + v1 + v2 + v3);
    p.by_y[i] = p.attention[i] * (s.origin() + dy);
    p.by_x[i] = p.attention[i] * (s.origin() + dx);
  }
}

// Gradients of a call's points, densely stored, in the type that locations, weights and reference points have.
struct PointGradients {
  void *locations = nullptr, *weights = nullptr;  // null: not wanted
};

// Writes those of some heads of query number `query` (of all images).
template <typename T, typename A>
DCN_HOST_DEVICE void store_gradients(const AttentionGeometry& g, const PointGradients& to, int64_t query,
                                     HeadRange heads, Points<A>& p) {
  const int64_t first = (query * g.heads + heads.first) * g.points, count = heads.count * g.points;
  if (to.locations) {
    T* const out = static_cast<T*>(to.locations) + 2 * first;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      out[2 * i] = narrow<T>(p.by_x[i] * p.unit_x[i]);
      out[2 * i + 1] = narrow<T>(p.by_y[i] * p.unit_y[i]);
    }
  }
  if (!to.weights) return;
  T* const out = static_cast<T*>(to.weights) + first;
  for (int64_t m = 0; g.softmax && m < heads.count; ++m) {
    A *grad = p.by_weight + m * g.points, mean = 0;
    const A* const weight = p.attention + m * g.points;
#pragma omp simd reduction(+ : mean)
    for (int64_t k = 0; k < g.points; ++k) mean += weight[k] * grad[k];
#pragma omp simd
    for (int64_t k = 0; k < g.points; ++k) grad[k] = weight[k] * (grad[k] - mean);
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = narrow<T>(p.by_weight[i]);
}

// sums[head, reference level, number] of a query's reference points, over the points of each head.
template <typename A>
DCN_HOST_DEVICE void sum_references(const AttentionGeometry& g, HeadRange heads, const Points<A>& p, A* sums) {
  const int64_t numbers = g.reference_numbers, each = g.reference_levels * numbers;
  for (int64_t i = 0; i < heads.count * each; ++i) sums[i] = A(0);
  for (int64_t m = 0; m < heads.count; ++m)
    for (int64_t l = 0; l < g.levels; ++l) {
      const AttentionLevel& level = g.level[l];
      const A width = static_cast<A>(level.width), height = static_cast<A>(level.height);
      const A part = static_cast<A>(level.box_unit);
      A* const sum = sums + m * each + g.reference_level(l) * numbers;
      const int64_t first = m * g.points + level.first_point;
      for (int64_t i = first; i < first + level.points; ++i) {
        const A x = p.by_x[i] * width, y = p.by_y[i] * height;
        sum[0] += x;
        sum[1] += y;
        if (numbers != 4) continue;
        sum[2] += x * part * p.given_x[i];
        sum[3] += y * part * p.given_y[i];
      }
    }
}

}  // namespace dcn::tiles::attention
