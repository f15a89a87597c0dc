// Shapes of one deformable convolution and where its samples lie. Symbols as in docs/operators.md.
#pragma once

#include "sampling.h"

namespace dcn {

struct ConvGeometry {
  int64_t batch, channels, height, width;       // N C H W
  int64_t out_channels, out_height, out_width;  // O H' W'
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int64_t groups, offset_groups;

  DCN_HOST_DEVICE int64_t taps() const { return kernel_h * kernel_w; }
  DCN_HOST_DEVICE int64_t out_pixels() const { return out_height * out_width; }
  DCN_HOST_DEVICE int64_t group_channels() const { return channels / groups; }
  DCN_HOST_DEVICE int64_t group_outputs() const { return out_channels / groups; }
  DCN_HOST_DEVICE int64_t offset_group_channels() const { return channels / offset_groups; }

  // p0 + p_k + offset: the paper's sampling position of tap (ky, kx) for output pixel (oy, ox).
  template <typename A>
  DCN_HOST_DEVICE Sample<A> sample(int64_t oy, int64_t ox, int64_t ky, int64_t kx, A offset_y, A offset_x) const {
    const A y = static_cast<A>(oy * stride_h - pad_top + ky * dilation_h) + offset_y;
    const A x = static_cast<A>(ox * stride_w - pad_left + kx * dilation_w) + offset_x;
    return make_sample<A>(y, x, height, width);
  }
};

}  // namespace dcn
