// Deformable convolution as torch calls it: arguments checked and brought to their types, then a device's
// implementation.
#pragma once

#include "arguments.h"

namespace dcn {

// The operators as torch calls them. `Implementation` has forward(arguments, geometry) and
// backward(grad_output, arguments, geometry, wanted).
template <typename Implementation>
Tensor deform_conv2d(Tensor input, Tensor offset, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> mask,
                     std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  ConvArguments a{input, offset, weight, bias, mask};
  const ConvGeometry g = check_deform_conv2d("deform_conv2d", a, stride, padding, dilation);
  unify_displacement_types(a);
  if (a.bias) a.bias = torch::stable::contiguous(*a.bias);
  return Implementation::forward(a, g);
}

template <typename Implementation>
ConvGradients deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor weight,
                                     std::optional<Tensor> mask, std::vector<int64_t> stride,
                                     std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t wanted) {
  ConvArguments a{input, offset, weight, std::nullopt, mask};
  const char* op = "deform_conv2d_backward";
  const ConvGeometry g = check_deform_conv2d(op, a, stride, padding, dilation);
  check(grad_output.dim() == 4 && grad_output.size(0) == g.batch && grad_output.size(1) == g.out_channels &&
            grad_output.size(2) == g.out_height && grad_output.size(3) == g.out_width,
        op, ": grad_output: expected shape [", g.batch, ", ", g.out_channels, ", ", g.out_height, ", ", g.out_width,
        "], got ", shape_of(grad_output));
  check_like(op, "grad_output", grad_output, "input", input, false);
  if (!mask) wanted &= ~static_cast<int64_t>(kMask);
  unify_displacement_types(a);
  auto [grad_input, grad_offset, grad_weight, grad_mask] = Implementation::backward(grad_output, a, g, wanted);
  grad_offset = torch::stable::to(grad_offset, offset.scalar_type());
  if (mask) grad_mask = torch::stable::to(grad_mask, mask->scalar_type());
  return {grad_input, grad_offset, grad_weight, grad_mask};
}

}  // namespace dcn
