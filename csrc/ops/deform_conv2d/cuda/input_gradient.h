// Fused backward, last part: the gradient of the input, gathered from the gradient of the columns by the inverted
// index.
#pragma once

#include "../../../runtime/gpu_values.h"
#include "../index.h"

namespace dcn {

// grad_input[n, c, y, x] = sum of weight_corner * mask * grad_columns over the samples that read the pixel, in the
// index's order. One element: eight channels of a pixel; neighbouring threads have neighbouring channels and share the
// entries that they walk over. The range holds whole images, so nothing is added to what other ranges found.
template <typename S>
struct GatherPieces {
  InputIndex<float> index;
  const S* grad_columns;  // [taps, range.count, C]
  View<S> grad_input;
  bool whole_pieces;  // of grad_input

  DCN_HOST_DEVICE int64_t pieces() const { return index.g.channels / 8; }
  DCN_HOST_DEVICE int64_t size() const { return index.images * index.g.height * index.g.width * pieces(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const ConvGeometry& g = index.g;
    const int64_t c = i % pieces() * 8, pixel = i / pieces(), x = pixel % g.width, y = pixel / g.width % g.height;
    const int64_t n = index.first_image + pixel / g.width / g.height;
    float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    index.for_each_entry(n, c / g.offset_group_channels(), y, x, [&](int32_t sample, float weight) {
      add_scaled(sums, weight, *reinterpret_cast<const Eight<S>*>(grad_columns + sample * g.channels + c));
    });
    if (whole_pieces) {
      *reinterpret_cast<Eight<S>*>(&grad_input.at(n, c, y, x)) = pack<S>(sums);
    } else {
      DCN_UNROLL
      for (int e = 0; e < 8; ++e) grad_input.at(n, c + e, y, x) = static_cast<S>(sums[e]);
    }
  }
};

}  // namespace dcn
