// The gradient of the input, gathered through the index of its samples (core/input_index.h): the adjoint of
// FillColumns.
#pragma once

#include "../../core/input_index.h"
#include "bodies.h"

namespace dcn {

// grad_input[n, c, y, x] += sum of weight_corner * mask * grad_columns over the samples that read the pixel. One
// element: a pixel, in some channels of one offset group.
template <typename A, typename M>
struct GatherInputGradient {
  ConvGeometry g;
  PixelRange range;
  ImageRange images;
  InputIndex<A> index;
  const M* grad_columns;
  View<A> grad_input;

  static constexpr int together = 8;  // channels that share one walk over the entries
  DCN_HOST_DEVICE int64_t blocks() const { return (g.offset_group_channels() + together - 1) / together; }
  DCN_HOST_DEVICE int64_t size() const { return images.count * g.offset_groups * blocks() * g.height * g.width; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t x = i % g.width, y = i / g.width % g.height, block = i / g.width / g.height;
    const int64_t map = block / blocks(), og = map % g.offset_groups, first = block % blocks() * together;
    const int64_t n = images.first + map / g.offset_groups;
    const int64_t channels = g.offset_group_channels() - first, c = og * g.offset_group_channels() + first;
    // Columns of a channel are [K, pixels], and samples are numbered [offset group, K, pixels].
    const int64_t stride = g.taps() * range.count;
    const M* const from = grad_columns + (c - og) * stride;
    A sums[together] = {};
    bool any = false;
    index.for_each_entry(map, y, x, [&](int32_t sample, A weight) {
      any = true;
#if defined(__CUDACC__)
#pragma unroll
#endif
      for (int j = 0; j < together; ++j)
        if (j < channels) sums[j] += weight * static_cast<A>(from[j * stride + sample]);
    });
    if (!any) return;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int j = 0; j < together; ++j)
      if (j < channels) grad_input.at(n, c + j, y, x) += sums[j];
  }
};

}  // namespace dcn
