// Shapes of one deformable convolution and where its samples lie. Symbols as in docs/operators.md.
#pragma once

#include "sampling.h"

namespace dcn {

struct ConvGeometry {
  int64_t batch, channels, height, width;       // N C H W
  int64_t out_channels, out_height, out_width;  // O H' W'
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int64_t groups, offset_groups;

  // One weight for each channel and tap.
  DCN_HOST_DEVICE bool is_depthwise() const { return groups == channels && out_channels == channels; }
  DCN_HOST_DEVICE int64_t taps() const { return kernel_h * kernel_w; }
  DCN_HOST_DEVICE int64_t out_pixels() const { return out_height * out_width; }
  DCN_HOST_DEVICE int64_t group_channels() const { return channels / groups; }
  DCN_HOST_DEVICE int64_t group_outputs() const { return out_channels / groups; }
  DCN_HOST_DEVICE int64_t offset_group_channels() const { return channels / offset_groups; }

  // p0 of the paper: where the kernel of an output pixel begins on the input.
  DCN_HOST_DEVICE int64_t start_y(int64_t oy) const { return oy * stride_h - pad_top; }
  DCN_HOST_DEVICE int64_t start_x(int64_t ox) const { return ox * stride_w - pad_left; }

  // p0 + p_k + offset: the sampling position of tap (ky, kx). `I` holds rows and columns.
  template <typename A, typename I>
  DCN_HOST_DEVICE Sample<A, I> sample(I y, I x, int64_t ky, int64_t kx, A offset_y, A offset_x) const {
    return make_sample<A, I>(static_cast<A>(y + static_cast<I>(ky * dilation_h)) + offset_y,
                             static_cast<A>(x + static_cast<I>(kx * dilation_w)) + offset_x, static_cast<I>(height),
                             static_cast<I>(width));
  }
};

}  // namespace dcn
