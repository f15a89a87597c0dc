// Multi-scale deformable attention, element by element: what it has beside the sums of core/attention_bodies.h.
#pragma once

#include "../../core/attention_bodies.h"

namespace dcn {

// The gradients of reference points: sums over heads and points, over levels too where all of them share one, always
// in the same order. One element: a reference point.
template <typename P>
struct ReferenceGradient {
  using A = typename P::Accumulator;
  using F = typename P::Given;

  P points;
  const PointGradient<A>* found;
  F* grad_reference;  // [N, Q, L or 1, 2 or 4], densely stored

  DCN_HOST_DEVICE int64_t size() const { return points.g.batch * points.g.queries * points.g.reference_levels; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const AttentionGeometry& g = points.g;
    const int64_t query = i / g.reference_levels, r = i % g.reference_levels;
    A sums[4] = {0, 0, 0, 0};
    for (int64_t l = 0; l < g.levels; ++l) {
      if (g.reference_level(l) != r) continue;
      const AttentionLevel& level = g.level[l];
      for (int64_t m = 0; m < g.heads; ++m) {
        const int64_t head = query * g.heads + m;
        const QueryHead h(g, head);
        for (int64_t k = level.first_point; k < level.first_point + level.points; ++k)
          for (int along = 0; along < 2; ++along) {
            const A by_pixel = found[head * g.points + k].by_position[along] * points.size(l, along);
            sums[along] += by_pixel;
            if (g.reference_numbers == 4) sums[2 + along] += by_pixel * points.box_unit(l) * points.given(h, k, along);
          }
      }
    }
    // As many steps as there are sums, so that a GPU keeps these in registers.
    for (int j = 0; j < 4; ++j)
      if (j < g.reference_numbers) grad_reference[i * g.reference_numbers + j] = static_cast<F>(sums[j]);
  }
};

}  // namespace dcn
