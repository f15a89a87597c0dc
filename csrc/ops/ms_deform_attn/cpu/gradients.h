// Multi-scale deformable attention on the CPU, the backward's last step for a query: from dots to the gradients of
// locations (or offsets), weights (or logits) and reference points.
#pragma once

#include "points.h"

namespace dcn::tiles::attention {

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
  if (g.softmax) through_softmax(p, heads.count, g.points);
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
