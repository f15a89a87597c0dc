// The gradient of attention's value, gathered through the index of each level's samples (input_index.h): the adjoint of
// Attend, always in the same order.
#pragma once

#include "attention_bodies.h"
#include "input_index.h"

namespace dcn {

// grad_value[n, pixel, m, d] += sum of corner weight * weight * grad_output over the samples that read the pixel. One
// element: a pixel of the level, in some channels of one head.
template <typename P, typename S>
struct GatherValueGradient {
  using A = typename P::Accumulator;

  LevelPositions<P> positions;
  InputIndex<A> index;
  View<const S> grad_output;
  View<A> grad_value;

  static constexpr int together = 8;  // channels that share one walk over the entries
  DCN_HOST_DEVICE int64_t blocks() const { return (positions.all.g.channels + together - 1) / together; }
  DCN_HOST_DEVICE int64_t size() const { return positions.maps() * positions.height() * positions.width() * blocks(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const AttentionGeometry& g = positions.all.g;
    const int64_t first = i % blocks() * together, pixel = i / blocks() % (positions.height() * positions.width());
    const int64_t map = i / blocks() / (positions.height() * positions.width());
    const int64_t n = positions.range.first_image(g) + map / g.heads, m = map % g.heads;
    const int64_t channels = g.channels - first;
    A sums[together] = {};
    bool any = false;
    index.for_each_entry(map, pixel / positions.width(), pixel % positions.width(), [&](int32_t sample, A weight) {
      any = true;
      const QueryHead h = positions.query_head(sample);
#if defined(__CUDACC__)
#pragma unroll
#endif
      for (int j = 0; j < together; ++j)
        if (j < channels) sums[j] += weight * static_cast<A>(grad_output.at(n, h.q, m, first + j));
    });
    if (!any) return;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int j = 0; j < together; ++j)
      if (j < channels) grad_value.at(n, positions.level().first_row + pixel, m, first + j) += sums[j];
  }
};

}  // namespace dcn
