// Fused backward, last part: the gradient of the input, gathered from the gradient of the columns by the inverted
// index.
#pragma once

#include "../../../core/input_index.h"
#include "../../../runtime/gpu_values.h"
#include "../bodies.h"

namespace dcn {

// grad_input[n, c, y, x] = sum of weight_corner * mask * grad_columns over the samples that read the pixel, in the
// index's order. One element: eight channels of a pixel; threads side by side have channels side by side, and read the
// same entries. The range holds whole images, so no other range adds to the same pixels.
template <typename S>
struct GatherVectors {
  ConvGeometry g;
  PixelRange range;
  ImageRange images;
  InputIndex<float> index;
  const S* grad_columns;  // [taps, range.count, C]
  View<S> grad_input;
  bool aligned_vectors;  // of grad_input

  DCN_HOST_DEVICE int64_t vectors() const { return g.channels / 8; }
  DCN_HOST_DEVICE int64_t size() const { return images.count * g.height * g.width * vectors(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t c = i % vectors() * 8, pixel = i / vectors(), x = pixel % g.width, y = pixel / g.width % g.height;
    const int64_t image = pixel / g.width / g.height, n = images.first + image, og = c / g.offset_group_channels();
    // The samples of an offset group are numbered after those of the one before, and have the same columns.
    const int64_t first = c - og * g.taps() * range.count * g.channels;
    float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    index.for_each_entry(image * g.offset_groups + og, y, x, [&](int32_t sample, float weight) {
      add_scaled(sums, weight, *reinterpret_cast<const Vector8<S>*>(grad_columns + (sample * g.channels + first)));
    });
    if (aligned_vectors) {
      *reinterpret_cast<Vector8<S>*>(&grad_input.at(n, c, y, x)) = pack<S>(sums);
    } else {
      DCN_UNROLL
      for (int e = 0; e < 8; ++e) grad_input.at(n, c + e, y, x) = static_cast<S>(sums[e]);
    }
  }
};

}  // namespace dcn
